"""Is a run read back as it was written, whatever happened to its files while they were read?"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from random import Random

import numpy as np
import pytest

from training.metrics import RunLog, TrainRow
from training.run_files import (
    METRICS_FILE,
    RunReader,
    column,
    duration,
    find_runs,
    list_checkpoints,
    printable,
    read_history,
    robust_range,
    smoothed,
)


def write_rows(folder, rows, end="\n"):
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows) + end
    (folder / METRICS_FILE).write_text(text, encoding="utf-8")


def append(folder, data: bytes):
    with open(folder / METRICS_FILE, "ab") as file:
        file.write(data)


def content(history):
    return (history.train, history.evals, history.samples, history.events, history.unreadable_lines)


def train_row(step, **values):
    return {"step": step, "time": 1e9 + step, "loss": 5.0 - 0.001 * step, **values}


def test_reads_what_train_py_writes(tmp_path):
    log = RunLog(tmp_path, is_main=True, max_steps=10)
    log.start({"name": "first", "max_steps": 10})
    values = dict(
        lr=1e-3, grad_norm=0.5, tok_s=10.0, tok_s_gpu=10.0, mfu=None, dt=0.1, data_wait=0.0, tokens=10, epoch=0.1,
        scaler=None, mem_gb=1.0, mem_reserved_gb=None,
    )  # fmt: skip
    log.train(TrainRow(step=1, loss=3.5, **values))
    log.train(TrainRow(step=2, loss=math.nan, **values))
    log.evaluation(2, 0.5, {"val_loss": 3.25, "val_bpb": 1.5})
    log.sample(2, "def ", "x\ny")
    log.event(2, "save", "saved")
    log.status("training", 2)
    run = read_history(tmp_path)
    assert run.name == "first" and run.step == 2 and run.status["state"] == "training"
    assert "null" in (tmp_path / METRICS_FILE).read_text() and "NaN" not in (tmp_path / METRICS_FILE).read_text()
    np.testing.assert_array_equal(column(run.train, "loss"), [3.5, np.nan])
    np.testing.assert_array_equal(column(run.train, "mfu"), [np.nan, np.nan])
    assert column(run.evals, "val_loss") == [3.25]
    assert run.samples[0]["sample"] == "x\ny" and run.events[0]["event"] == "save"


def test_a_cut_last_line_is_taken_when_it_is_whole(tmp_path):
    write_rows(tmp_path, [train_row(1), train_row(2)], end="")
    whole = (tmp_path / METRICS_FILE).read_bytes()
    (tmp_path / METRICS_FILE).write_bytes(whole[:-9])
    reader = RunReader(tmp_path)
    assert [row["step"] for row in reader.refresh().train] == [1]
    append(tmp_path, whole[-9:] + b"\n")
    assert [row["step"] for row in reader.refresh().train] == [1, 2]
    assert reader.refresh().unreadable_lines == 0


def test_broken_and_hostile_lines_are_counted_and_passed_over(tmp_path):
    bad = [
        b"{", b"[]", b'{"step": "7"}', b'{"step": true}', b'{"loss": 1}', b"\xff\xfe", b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}", b'{"step": ' + b"9" * 400 + b"}", b'{"step": NaN}',
    ]  # fmt: skip
    odd = b'{"step": 3, "loss": ' + b"9" * 400 + b', "lr": "x", "grad_norm": true, "tok_s": [1]}'
    tmp_path.joinpath(METRICS_FILE).write_bytes(b"\n".join([*bad, odd, b'{"step": 3, "sample": 1, "prompt": []}', b""]))
    (tmp_path / "status.json").write_text('{"step": Infinity}')
    (tmp_path / "run.json").write_text("[" * 100_000)
    run = read_history(tmp_path)
    assert run.unreadable_lines == len(bad)
    assert [row["step"] for row in run.train] == [3] and len(run.samples) == 1
    assert all(np.isnan(column(run.train, key)).all() for key in ("loss", "lr", "grad_norm", "tok_s"))
    assert run.step == 3


def test_rows_written_before_a_resume_do_not_count(tmp_path):
    first = [train_row(step, loss=1.0) for step in range(1, 31)]
    evals = [{"step": step, "val_loss": 1.0} for step in (10, 20, 30)]
    samples = [{"step": step, "prompt": "p", "sample": "old"} for step in (10, 20, 30)]
    resume = [{"step": 20, "event": "resume", "message": ""}]
    second = [train_row(step, loss=2.0) for step in range(21, 26)] + [train_row(23, loss=3.0)]
    write_rows(tmp_path, first + evals + samples + resume + second)
    run = read_history(tmp_path)
    expected = [1.0] * 20 + [2.0, 2.0, 3.0, 2.0, 2.0]  # 21 to 25, of which 23 was written twice
    assert [row["step"] for row in run.train] == list(range(1, 26))
    assert column(run.train, "loss").tolist() == expected
    assert [row["step"] for row in run.evals] == [row["step"] for row in run.samples] == [10, 20]


def test_a_run_begun_anew_in_its_folder_voids_all_rows(tmp_path):
    write_rows(tmp_path, [train_row(5), {"step": 0, "event": "start", "message": ""}, train_row(1)])
    assert [row["step"] for row in read_history(tmp_path).train] == [1]


@pytest.mark.parametrize("seed", range(3))
def test_reading_on_equals_reading_anew(tmp_path, seed):
    """At every moment of a file that grows by random bytes, against a reader that sees it for the first time."""
    random = Random(seed)
    lines, step = [], 0
    for _ in range(150):
        kind = random.random()
        step += 1
        if kind < 0.05:
            step = random.randint(0, step)
            lines.append(json.dumps({"step": step, "event": random.choice(["resume", "start", "save"])}))
        elif kind < 0.15:
            lines.append(json.dumps({"step": step, "val_loss": random.random()}))
        elif kind < 0.25:
            lines.append(json.dumps({"step": step, "prompt": "日本", "sample": "ü\n"}, ensure_ascii=False))
        elif kind < 0.3:
            lines.append('{"step": 1, "loss"')
        else:
            lines.append(json.dumps(train_row(step)))
    data = ("\n".join(lines) + "\n").encode()
    reader = RunReader(tmp_path)
    while data:
        size = random.randint(1, 800)
        append(tmp_path, data[:size])
        data = data[size:]
        assert content(reader.refresh()) == content(read_history(tmp_path))
    assert len(reader.refresh().train) >= 10


def test_a_file_that_shrank_was_replaced_or_removed_is_read_anew(tmp_path):
    write_rows(tmp_path, [train_row(step) for step in range(1, 50)])
    reader = RunReader(tmp_path)
    assert len(reader.refresh().train) == 49
    write_rows(tmp_path, [train_row(step, loss=1.0) for step in range(1, 4)])  # cut short in place
    assert column(reader.refresh().train, "loss").tolist() == [1.0] * 3
    write_rows(tmp_path, [train_row(step, loss=7.0) for step in range(1, 60)])  # longer again, with another content
    assert column(reader.refresh().train, "loss").tolist() == [7.0] * 59
    (tmp_path / METRICS_FILE).rename(tmp_path / "metrics.jsonl.1")  # rotated
    assert reader.refresh().train == []
    write_rows(tmp_path, [train_row(1)])
    assert len(reader.refresh().train) == 1


def test_a_folder_without_files_is_an_empty_run(tmp_path):
    run = read_history(tmp_path / "nothing")
    assert (run.step, run.train, run.run, run.status, run.name) == (0, [], {}, {}, "nothing")


def test_the_age_of_a_heartbeat_is_by_the_readers_clock_once_it_was_seen_to_change(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "training", "time": 1}')
    reader = RunReader(tmp_path)
    assert reader.refresh().unchanged_seconds is None
    assert reader.refresh().unchanged_seconds is None
    (tmp_path / "status.json").write_text('{"state": "training", "time": 2}')
    assert reader.refresh().unchanged_seconds < 5
    time.sleep(0.05)
    assert reader.refresh().unchanged_seconds >= 0.05


def test_a_process_that_ended_is_gone_here_and_unknown_elsewhere(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for pid, host, gone in (
        (process.pid, socket.gethostname(), True),
        (os.getpid(), socket.gethostname(), False),
        (process.pid, "another-host", False),
        ("1", socket.gethostname(), False),
        (-1, socket.gethostname(), False),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"pid": pid, "host": host}))
        assert read_history(tmp_path).process_gone is gone


def make_checkpoint(run_dir, step, files):
    folder = run_dir / f"checkpoint_step_{step}"
    folder.mkdir(parents=True)
    for name, size in files.items():
        (folder / name).write_bytes(b"x" * size)
    manifest = {"format": 1, "step": step, "files": {name: {"bytes": size} for name, size in files.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_checkpoints_are_compared_with_their_manifests(tmp_path):
    make_checkpoint(tmp_path, 9, {"model.safetensors": 100})
    short = make_checkpoint(tmp_path, 100, {"model.safetensors": 100, "config.json": 3})
    (short / "model.safetensors").write_bytes(b"x" * 99)
    missing = make_checkpoint(tmp_path, 20, {"model.safetensors": 100, "config.json": 3})
    (missing / "config.json").unlink()
    unfinished = make_checkpoint(tmp_path, 30, {"model.safetensors": 100})
    (unfinished / "manifest.json").unlink()
    (tmp_path / "checkpoint_step_40.pt").write_bytes(b"x" * 7)
    (tmp_path / "checkpoint_step_5x").mkdir()
    found = list_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in found] == [9, 20, 30, 40, 100]
    assert found[0].problem is None and found[3].problem is None
    assert found[0].bytes == 100 + (tmp_path / "checkpoint_step_9" / "manifest.json").stat().st_size
    assert found[3].bytes == 7
    assert "config.json" in found[1].problem
    assert "manifest.json" in found[2].problem
    assert "model.safetensors" in found[4].problem and "99" in found[4].problem and "100" in found[4].problem
    assert list_checkpoints(tmp_path / "missing") == []


def test_runs_are_found_at_any_depth(tmp_path):
    write_rows(tmp_path / "b", [train_row(1)])
    make_checkpoint(tmp_path / "a" / "deep", 1, {"model.safetensors": 1})
    write_rows(tmp_path / "a" / "deep" / "checkpoint_step_1", [train_row(1)])  # inside a checkpoint: no run
    (tmp_path / "empty").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{}")
    assert find_runs(tmp_path) == [tmp_path / "a" / "deep", tmp_path / "b", tmp_path / "c"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    assert find_runs(tmp_path / "empty") == []


def test_smoothing_is_the_weighted_mean_of_what_came_before():
    """Against the definition: weights (1 - 2/(span+1))^age over the finite values so far, normalised (float64)."""
    values = np.random.default_rng(0).normal(3.0, 1.0, 60)
    values[[7, 30, 31]] = np.nan
    for span in (None, 9):
        keep = 1 - 2 / ((span or 5) + 1)
        for end in range(60):
            finite = values[: end + 1][np.isfinite(values[: end + 1])]
            weights = keep ** np.arange(len(finite))[::-1]
            # 60 additions of values near 3: rounding stays below 60 eps
            assert smoothed(values, span)[end] == pytest.approx(np.average(finite, weights=weights), rel=1e-13)
    assert np.isnan(smoothed(np.array([np.nan, 1.0]))).tolist() == [True, False]


def test_the_range_leaves_out_the_cliff_and_the_spike_and_keeps_late_validation():
    steps = np.arange(1000)
    loss = 2.5 + 6 * np.exp(-steps / 30) + np.random.default_rng(0).normal(0, 0.02, 1000)
    loss[700] = 9.0
    loss[10] = np.nan
    low, high = robust_range(loss)
    assert 2.3 < low < 2.5 and 2.5 < high < 2.7
    low, high = robust_range(loss, np.array([8.0, 3.3, 3.2, 3.1, 3.0]))
    assert 3.3 < high < 3.5
    assert robust_range(np.array([np.nan])) == (0.0, 1.0)
    low, high = robust_range(np.full(5, 2.0))
    assert low < 2.0 < high


def test_printable_leaves_nothing_for_a_terminal_to_obey():
    hostile = "a\x1b[31m\x07\x9b2J\r\n\tb\u202e\ud800日é"
    assert printable(hostile).isprintable()
    assert printable(hostile).startswith("a") and printable(hostile).endswith("日é")
    assert printable("plain [bold]") == "plain [bold]"
    printable(hostile).encode("utf-8")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3 * 3600 + 120, "3 h 2 min"), (2 * 86400, "2 d 0 h"), (-5, "0 s")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
    assert duration(math.nan) == duration(math.inf) == "unknown"
