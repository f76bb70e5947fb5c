"""Do the back ends of --log_to hold what metrics.jsonl holds, once, however often a run is started?

Each is read back with its own reader: csv with Python's, the others with their packages, where these are installed.
"""

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import UserError
from tests.forked import Ended, Forked, start_ranks, wait_for
from training.config import resolve_config
from training.log_to import LOGGERS
from training.metrics import RunLog, TrainRow
from training.run_files import read_history

SMALL = (
    "--hidden_size 32 --num_layers 1 --num_heads 2 --batch_size 8 --learning_rate 3e-3 --log_interval 1 "
    "--save_interval 2 --eval_interval 3 --keep_checkpoints 0 --max_steps 6 --device cpu"
)


def train(folder: Path, words: str, code: int = 0, **environment: str) -> Ended:
    """`train.py WORDS`, started in `folder`."""
    with contextlib.chdir(folder):
        ended = Forked(folder / "streams", f"{SMALL} {words}".split(), **environment).wait()
    assert ended.code == code, ended.out + ended.err
    return ended


def crash_after(run: Path, step: int) -> None:
    """As a kill leaves it before the next checkpoint: rows of later steps, and no checkpoint of them."""
    for path in run.glob("checkpoint_step_*"):
        if int(path.name.rpartition("_")[2]) > step:
            shutil.rmtree(path)


def figures(run: Path, rows: str, *names: str) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), …]} by metrics.jsonl."""
    return {name: [(row["step"], row[name]) for row in getattr(read_history(run), rows)] for name in names}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in table(path)]


def a_row(step: int, **more: float) -> TrainRow:
    return TrainRow(
        step=step, loss=1.0 / step, lr=1e-3, grad_norm=None, tok_s=1.0, tok_s_gpu=1.0, mfu=None, dt=0.1, data_wait=0.0,
        tokens=step, epoch=0.1, scaler=None, mem_gb=1.0, mem_reserved_gb=None, figures=more,
    )  # fmt: skip


def a_log(folder: Path, step: int = 0, log_to=("csv",)) -> RunLog:
    log = RunLog(folder, is_main=True, max_steps=9, start_step=step)
    log.start({"name": "mine", "config": {"log_to": list(log_to), "seed": 1}})
    return log


# -------------------------------------------------------------------------------------------------------------------- csv


def test_a_run_that_goes_on_has_each_row_once(tiny_data, tmp_path):
    train(tmp_path, f"--data_dir {tiny_data} --save_dir run --log_to csv --sample_tokens 3")
    before = {name: table(tmp_path / f"run/csv/{name}.csv") for name in ("train", "evaluation", "sample", "event")}
    assert [row["step"] for row in before["train"]] == [str(step) for step in range(1, 7)]
    crash_after(tmp_path / "run", 4)
    with open(tmp_path / "run/csv/train.csv", "a") as file:
        file.write("4,17")  # what a crash cuts
    train(tmp_path, "--checkpoint latest --save_dir run")
    for rows, name, key in (("train", "train", "loss"), ("train", "train", "lr"), ("evals", "evaluation", "val_loss")):
        assert column(tmp_path / f"run/csv/{name}.csv", key) == figures(tmp_path / "run", rows, key)[key]
        assert [(row["step"], row[key]) for row in table(tmp_path / f"run/csv/{name}.csv")] == [
            (row["step"], row[key]) for row in before[name]
        ]
    assert [(row["step"], row["sample"]) for row in table(tmp_path / "run/csv/sample.csv")] == [
        (row["step"], row["sample"]) for row in before["sample"]
    ]
    events = [(row["step"], row["event"]) for row in table(tmp_path / "run/csv/event.csv")]
    assert events == [("0", "start"), ("2", "save"), ("4", "save"), ("4", "resume"), ("6", "save"), ("6", "finish")]


@pytest.mark.exhaustive
def test_a_run_that_is_killed_has_each_row_once(tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} --save_dir run --log_to csv --max_steps 400 --eval_interval 0 --sample_prompt="
    with contextlib.chdir(tmp_path):
        process = Forked(tmp_path / "streams", f"{SMALL} {words}".split())
        path = tmp_path / "run/csv/train.csv"
        wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 50)
        process.send(signal.SIGKILL)
        process.wait()
    steps = max(int(name.name.rpartition("_")[2]) for name in (tmp_path / "run").glob("checkpoint_step_*")) + 5
    train(tmp_path, f"--checkpoint latest --save_dir run --max_steps {steps}")
    assert column(path, "loss") == figures(tmp_path / "run", "train", "loss")["loss"]
    assert [step for step, _ in column(path, "loss")] == list(range(1, steps + 1))


def test_other_ranks_log_nothing(tmp_path):
    log = RunLog(tmp_path, is_main=False, max_steps=9)
    log.start({"name": "mine", "config": {"log_to": ["csv"]}})
    log.train(a_row(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_only_the_first_rank_of_two_logs(tiny_data, tmp_path):
    words = f"{SMALL} --data_dir {tiny_data} --save_dir {tmp_path / 'run'} --log_to csv --sample_prompt= --max_steps 2"
    ended = [one.wait() for one in start_ranks(tmp_path, *words.split())]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    assert column(tmp_path / "run/csv/train.csv", "loss") == figures(tmp_path / "run", "train", "loss")["loss"]


def test_texts_of_many_lines_and_columns_that_come_later(tmp_path):
    log = a_log(tmp_path)
    log.train(a_row(1))
    log.train(a_row(2, reward=0.5))
    log.train(a_row(3))
    log.sample(3, 'say "a,b"\n', "one\r\ntwo\x0b\u2028three,\n")
    log.sample(4, "", "end")
    assert [row["reward"] for row in table(tmp_path / "csv/train.csv")] == ["", "0.5", ""]
    assert [(row["prompt"], row["sample"]) for row in table(tmp_path / "csv/sample.csv")] == [
        ('say "a,b"\n', "one\r\ntwo\x0b\u2028three,\n"), ("", "end")
    ]  # fmt: skip
    a_log(tmp_path, step=3)
    assert [row["step"] for row in table(tmp_path / "csv/train.csv")] == ["1", "2", "3"]
    assert [row["sample"] for row in table(tmp_path / "csv/sample.csv")] == ["one\r\ntwo\x0b\u2028three,\n"]


def test_a_back_end_that_fails_is_one_alert_and_the_run_goes_on(tmp_path):
    log = a_log(tmp_path)
    log.train(a_row(1))
    shutil.rmtree(tmp_path / "csv")
    for step in (2, 3):
        log.train(a_row(step))
    history = read_history(tmp_path)
    assert [row["step"] for row in history.train] == [1, 2, 3]
    assert [row["event"] for row in history.events] == ["alert"]
    assert (
        "--log_to csv failed at step 2 and is off until the next start: FileNotFoundError"
        in history.events[0]["message"]
    )


def test_a_back_end_that_cannot_begin_ends_a_new_run_and_not_one_that_goes_on(tmp_path):
    (tmp_path / "csv").write_text("a file where the folder would be")
    with pytest.raises(UserError, match="--log_to csv cannot begin: FileExistsError"):
        a_log(tmp_path)
    a_log(tmp_path, step=2).train(a_row(3))
    assert "--log_to csv cannot go on and is off" in read_history(tmp_path).events[0]["message"]
    assert [row["step"] for row in read_history(tmp_path).train] == [3]


def test_a_package_that_is_not_there_is_named_before_any_data_is_read(tmp_path, monkeypatch):
    absent = [name for name in LOGGERS if name != "csv" and importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("all packages are installed")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / absent[0]).mkdir()  # as wandb leaves it beside a run: a folder is no package
    with pytest.raises(UserError, match=f"--log_to {absent[0]}: the package is not installed; run pip install"):
        resolve_config({"data_dir": ["nowhere"], "log_to": ["csv", absent[0]]})


# ----------------------------------------------------------------------------------------------------------- the packages


def twice_started(folder: Path, data: Path, name: str, **environment: str) -> Path:
    """A run that went on from step 4 after it had logged 6 steps."""
    train(folder, f"--data_dir {data} --save_dir run --log_to {name} --sample_tokens 3", **environment)
    crash_after(folder / "run", 4)
    ended = train(folder, "--checkpoint latest --save_dir run", **environment)
    assert "--log_to" not in ended.out, ended.out
    return folder / "run"


def test_tensorboard(tiny_data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    run = twice_started(tmp_path, tiny_data, "tensorboard")
    seen = EventAccumulator(str(run / "tensorboard"), {"tensors": 0}).Reload()
    for rows, name, tag in (("train", "loss", "train/loss"), ("evals", "val_loss", "val/loss")):
        found = [(event.step, make_ndarray(event.tensor_proto).item()) for event in seen.Tensors(tag)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in figures(run, rows, name)[name]]
    samples = seen.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [row["step"] for row in read_history(run).samples]
    assert read_history(run).samples[-1]["sample"] in samples[-1].tensor_proto.string_val[0].decode()


def wandb_records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: a header of 7 bytes, then a log as LevelDB's: parts of records in blocks of 32 KiB."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(tiny_data, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run = twice_started(tmp_path, tiny_data, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert len(files) == 2 and len({path.name for path in files}) == 1  # one id
    found: dict[str, list] = {"train/loss": [], "val/loss": [], "event": [], "sample/_type": []}
    for record in (one for path in files for one in wandb_records(path)):
        row = wandb_internal_pb2.Record.FromString(record).history.item
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row}
        for name in found.keys() & items.keys():
            found[name].append((items["step"], items[name]))
    assert found["train/loss"] == figures(run, "train", "loss")["loss"]
    assert found["val/loss"] == figures(run, "evals", "val_loss")["val_loss"]
    assert [step for step, _ in found["sample/_type"]] == [3, 6]
    assert found["event"][-1][1].startswith("finish: finished at step 6")


def test_trackio(tiny_data, tmp_path):
    pytest.importorskip("trackio")
    run = twice_started(tmp_path, tiny_data, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    name = json.loads((run / "log_to.json").read_text())["trackio"]
    script = f"""
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("groundup")
assert [run["name"] if isinstance(run, dict) else run for run in runs] == [{name!r}], runs
print(json.dumps(SQLiteStorage.get_logs("groundup", {name!r}), default=str))
"""
    found = json.loads(own_process(script, TRACKIO_DIR=str(tmp_path / "trackio")))
    for key, rows, ours in (("train/loss", "train", "loss"), ("val/loss", "evals", "val_loss")):
        assert sorted((row["step"], row[key]) for row in found if key in row) == figures(run, rows, ours)[ours]
    assert any(row.get("event", "").startswith("finish") for row in found)


def test_mlflow(tiny_data, tmp_path):
    pytest.importorskip("mlflow")
    where = {"MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlflow'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    run = twice_started(tmp_path, tiny_data, "mlflow", **where)
    number = json.loads((run / "log_to.json").read_text())["mlflow"]
    script = f"""
import json
from mlflow.tracking import MlflowClient
client = MlflowClient()
[experiment] = [one for one in client.search_experiments() if one.name == "groundup"]
[run] = client.search_runs([experiment.experiment_id])
assert run.info.run_id == {number!r} and run.info.status == "FINISHED" and run.data.params["hidden_size"] == "32"
curves = {{name: [(m.step, m.value) for m in client.get_metric_history({number!r}, name)] for name in ("train/loss", "val/loss")}}
print(json.dumps([curves, [file.path for file in client.list_artifacts({number!r}, "samples")]]))
"""
    curves, samples = json.loads(own_process(script, **where))
    for key, rows, ours in (("train/loss", "train", "loss"), ("val/loss", "evals", "val_loss")):
        assert sorted(map(tuple, curves[key])) == figures(run, rows, ours)[ours]
    assert samples == ["samples/step_3.txt", "samples/step_6.txt"]


def own_process(script: str, **environment: str) -> str:
    """The last line that a script prints; these packages read the environment once, when they are imported."""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
