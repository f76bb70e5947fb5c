"""Do functions of the user's own see the run and steer it, exactly, on every rank, and however often it is started?"""

import contextlib
import csv
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from errors import UserError
from ranks import Ranks
from tests.forked import Ended, Forked, start_ranks
from tests.ranks import run_ranks
from tests.tiers import grid
from training.config import TrainConfig, resolve_config
from training.hooks import load_hooks
from training.saving import Saves

SMALL = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 8 --learning_rate 3e-3 --warmup_steps 4 --sample_prompt= "
    "--log_interval 1 --keep_checkpoints 0 --device cpu"
)

# it keeps what it knows in memory: the rate is halved after every evaluation, and every second loss is remembered
STEERING = """
def on_start(state):
    state.memory.setdefault("evaluations", [])

def on_step(state):
    state.log["twice"] = 2 * state.figures["loss"]
    if state.step % 2 == 0:
        state.memory["losses"] = [*state.memory.get("losses", []), state.figures["loss"]]
    if state.step == 6:
        state.evaluate_now = state.save_now = True

def on_evaluate(state):
    state.memory["evaluations"].append(state.figures["val_loss"])
    state.lr_factor *= 0.5
    state.log["rate"] = state.learning_rate
"""


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def train(folder: Path, words: str, code: int = 0) -> Ended:
    """`train.py WORDS`, started in `folder`."""
    with contextlib.chdir(folder):
        ended = Forked(folder / "streams", f"{SMALL} {words}".split()).wait()
    assert ended.code == code, ended.out + ended.err
    assert "Traceback" not in ended.err
    return ended


def rows(run: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in lines if key in row}


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


def weights(checkpoint: Path) -> str:
    files = sorted([*checkpoint.glob("*model.safetensors"), checkpoint / "optimizer.safetensors"])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("def on_step(state):\n    return (\n", "line 2: '\\(' was never closed"),
        ("x = 1\n", "defines none of on_start, on_step, on_evaluate, on_checkpoint, on_finish"),
        ("\ndef on_setp(state): ...\n", "line 2: no run calls on_setp.*did you mean on_step"),
        ("def on_step(): ...\n", "line 1: on_step is called with one argument"),
        ("def on_step(state, more): ...\n", "line 1: on_step is called with one argument"),
        ("async def on_step(state): ...\n", "line 1: on_step is async"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line_before_any_data_is_read(tmp_path, text, sentence):
    path = tmp_path / "mine.py" if text is None else write(tmp_path, text)
    with pytest.raises(UserError, match=sentence) as caught:
        resolve_config({"data_dir": ["nowhere"], "hooks": [str(path)]})
    assert f"--hooks {path}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def on_step(state): ...\n\n1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("def on_step(state): ...\non_start = print\n", "on_start is made or imported there"),
        ("def on_step(state):\n    yield\n", "line 1: on_step yields"),
    ],
)
def test_a_file_that_fails_when_it_is_run_is_refused(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        load_hooks(TrainConfig(hooks=[str(write(tmp_path, text))]), {})


# ---------------------------------------------------------------------------------------- what hooks may read and change


def a_run(**changes) -> SimpleNamespace:
    """What hooks are shown, as train.py's Run has it."""
    seen = {
        "config": TrainConfig(save_dir="runs/mine"), "model": nn.Linear(1, 1), "ranks": Ranks(0, 1, torch.device("cpu")),
        "step": 3, "tokens": 30, "learning_rate": 0.1, "saves": Saves(),
    }  # fmt: skip
    return SimpleNamespace(**seen | changes)


def call(tmp_path, body: str, event: str = "on_step", figures=None, run=None):
    path = write(tmp_path, f"import math\ndef {event}(state):\n    {body}\n")
    hooks = load_hooks(TrainConfig(hooks=[str(path)]), {})
    return hooks, hooks.call(event, run or a_run(), figures or {"loss": 2.0})


@pytest.mark.parametrize(
    ("body", "event", "sentence"),
    [
        ("state.stop_after_step = True", "on_step", "line 3, on_step at step 3: AttributeError: state.stop_after_step cannot"),
        ("state.step = 9", "on_step", "state.step cannot be set; what can be is lr_factor, stop_after_this_step"),
        ("state.lr_factor = math.nan", "on_step", "line 2, on_step at step 3: ValueError: state.lr_factor is nan"),
        ("state.lr_factor = -1", "on_step", "state.lr_factor is -1; it must be a finite number, and not negative"),
        ("state.log['loss'] = 1", "on_step", "the row has something of this name already"),
        ("state.log['lr'] = 1", "on_step", "the row has something of this name already"),
        ("state.log['event'] = 1", "on_step", "the row has something of this name already"),
        ("state.log['val_x'] = 1", "on_step", "a name that begins with val_ is one of an evaluation"),
        ("state.log['x'] = 'high'", "on_step", "could not convert string to float"),
        ("state.save_now = True", "on_checkpoint", "state.save_now cannot be set in on_checkpoint, after the save"),
        ("state.memory['x'] = 1", "on_finish", "TypeError: 'mappingproxy' object does not support item assignment"),
        ("state.log['x'] = 1", "on_start", "TypeError: 'mappingproxy' object does not support item assignment"),
        ("raise SystemExit('enough')", "on_step", "line 3, on_step at step 3: SystemExit: enough"),
        ("import json; json.loads('{')", "on_step", "line 3, on_step at step 3: JSONDecodeError"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_granted_ends_the_run_with_a_sentence(tmp_path, body, event, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        call(tmp_path, body, event)
    assert "runs/mine are as they were" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_logged_becomes_numbers_under_names_of_their_row(tmp_path):
    _, row = call(tmp_path, "import torch; state.log.update(a=torch.tensor(1.5), b=None)")
    assert row == {"a": 1.5, "b": None}
    _, row = call(tmp_path, "state.log.update(a=1, val_b=2)", "on_evaluate")
    assert row == {"val_a": 1.0, "val_b": 2.0}


def test_a_memory_that_json_would_change_is_refused(tmp_path):
    for value in ("object()", "(1, 2)", "{1: 2}", "{'a'}"):
        hooks, _ = call(tmp_path, f"state.memory['x'] = {value}")
        with pytest.raises(UserError, match=r"state.memory\['x'\] is .* which a checkpoint cannot keep"):
            hooks.for_checkpoint()
    hooks, _ = call(tmp_path, "state.memory['x'] = [1.5, math.inf, math.nan, None, {'a': 'b'}]")
    assert json.loads(json.dumps(hooks.for_checkpoint()))["memory"]["x"][1] == float("inf")


def test_two_files_are_called_in_order_and_share_what_they_change(tmp_path):
    first = write(tmp_path, "def on_step(state): state.lr_factor = 0.5; state.memory['n'] = [1]\n", "first.py")
    second = write(tmp_path, "def on_step(state): state.lr_factor *= 0.5; state.memory['n'].append(2)\n", "second.py")
    hooks = load_hooks(TrainConfig(hooks=[str(first), str(second)]), {})
    hooks.call("on_step", a_run())
    assert hooks.lr_factor == 0.25 and hooks.memory == {"n": [1, 2]}


# ---------------------------------------------------------------------------------------------------------- several ranks


ON_RANKS = {  # what a hook does, and what comes of it on each rank: the wishes to stop, evaluate and save, and lr_factor
    "if state.ranks.rank == 1: state.stop_after_this_step = True": [(True, False, False, 1.0)] * 2,
    "if state.ranks.rank == 0: state.save_now = state.evaluate_now = True": [(False, True, True, 1.0)] * 2,
    "state.lr_factor = state.ranks.sum([1.0])[0]": [(False, False, False, 2.0)] * 2,
    "state.lr_factor = 0.5 + state.ranks.rank": ["to 0.5 on rank 0 and to 1.5 on rank 1 at step 3"] * 2,
    "if state.ranks.rank == 1: 1 / 0": ["failed at step 3 on rank 1, which says why", "ZeroDivisionError: division"],
}


def _on_ranks(rank: int, world_size: int, paths: list[str]) -> list:
    found: list = []
    for path in paths:
        hooks = load_hooks(TrainConfig(hooks=[path]), {})
        try:
            hooks.call("on_step", a_run(ranks=Ranks(rank, world_size, torch.device("cpu"))))
        except UserError as error:
            found.append(str(error))
        else:
            found.append((hooks.stop, hooks.evaluate, hooks.save, hooks.lr_factor))
    return found


def test_ranks_agree(tmp_path):
    bodies = enumerate(ON_RANKS)
    paths = [str(write(tmp_path, f"def on_step(state):\n    {body}\n", f"{number}.py")) for number, body in bodies]
    for rank, of_rank in enumerate(run_ranks(_on_ranks, 2, paths)):
        for body, found in zip(ON_RANKS, of_rank, strict=True):
            wanted = ON_RANKS[body][rank]
            assert wanted in found if isinstance(wanted, str) else found == wanted, body


@pytest.mark.exhaustive
def test_a_run_on_two_ranks_stops_where_one_of_them_asks(tiny_data, tmp_path):
    path = write(tmp_path, "def on_step(state):\n    state.stop_after_this_step = state.step == 2 + state.ranks.rank\n")
    words = (
        f"{SMALL} --data_dir {tiny_data} --max_steps 6 --eval_interval 0 --save_dir {tmp_path / 'run'} --hooks {path}"
    )
    ended = [one.wait() for one in start_ranks(tmp_path, *words.split())]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    assert "ended by --hooks at step 2" in ended[0].out and (tmp_path / "run/checkpoint_step_2/manifest.json").exists()


# ------------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def steered(tiny_data, tmp_path_factory) -> Path:
    """A folder with a run of 8 steps under STEERING, saved and evaluated every 4."""
    folder = tmp_path_factory.mktemp("steered")
    write(folder, STEERING)
    (folder / "TEXT").symlink_to(tiny_data)
    train(
        folder,
        "--data_dir TEXT --max_steps 8 --eval_interval 4 --decay_fraction 0 --log_to csv --save_dir run --hooks mine.py",
    )
    return folder


def test_hooks_steer_a_run(steered):
    run = steered / "run"
    loss, lr = rows(run, "loss"), rows(run, "lr")
    assert rows(run, "twice") == {step: 2 * value for step, value in loss.items()}
    assert sorted(rows(run, "val_loss")) == [4, 6, 8]
    assert sorted(path.name for path in run.glob("checkpoint_*")) == [f"checkpoint_step_{n}" for n in (4, 6, 8)]
    # warm-up over 4 steps, then constant, but halved after steps 4 and 6
    shares = [1 / 4, 2 / 4, 3 / 4, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]
    assert [lr[step] for step in range(1, 9)] == pytest.approx([3e-3 * share for share in shares])
    assert rows(run, "val_rate") == {step: lr[step] for step in (4, 6, 8)}
    memory = state_of(run / "checkpoint_step_8")["hooks"]["memory"]
    assert memory["losses"] == [loss[step] for step in (2, 4, 6, 8)]
    assert memory["evaluations"] == [rows(run, "val_loss")[step] for step in (4, 6)]  # 8 comes after the checkpoint


@pytest.mark.parametrize("step", grid([4, 6], quick=[6]))
def test_a_run_that_goes_on_is_the_run_that_never_stopped(steered, tmp_path, step):
    """From the checkpoint of step 6, say, after which an evaluation came, as on_step had asked, that halved the rate."""
    place = shutil.copytree(steered, tmp_path / "place", symlinks=True)
    for path in place.glob("run/checkpoint_step_*"):
        if int(path.name.rpartition("_")[2]) > step:
            shutil.rmtree(path)
    train(place, "--checkpoint latest --save_dir run")
    names = [path.name for path in (steered / "run").glob("checkpoint_*")]
    assert all(weights(place / "run" / name) == weights(steered / "run" / name) for name in names)
    assert all(state_of(place / "run" / name)["hooks"] == state_of(steered / "run" / name)["hooks"] for name in names)
    for key in ("loss", "lr", "twice", "val_loss", "val_rate"):
        assert rows(place / "run", key) == rows(steered / "run", key)
    with open(place / "run/csv/evaluation.csv", newline="") as file:  # that evaluation was made twice
        assert [int(row["step"]) for row in csv.DictReader(file)] == [4, 6, 8]


def test_an_exception_names_its_line_and_leaves_the_checkpoints(steered, tmp_path):
    """On going on with a file that is another now, which is said in one line."""
    place = shutil.copytree(steered, tmp_path / "place", symlinks=True)
    before = {path.name: weights(path) for path in place.glob("run/checkpoint_*")}
    write(place, STEERING + "    raise ValueError('too\\nhigh')\n")
    ended = train(place, "--checkpoint latest --save_dir run --max_steps 20", code=2)
    assert "--hooks is not what run/checkpoint_step_8 was trained with (changed: mine.py)" in ended.out
    line = len(STEERING.splitlines()) + 1
    assert ended.err.splitlines()[-1].startswith(
        f"error: --hooks mine.py, line {line}, on_evaluate at step 8: ValueError: too high"
    )
    assert {path.name: weights(path) for path in place.glob("run/checkpoint_*")} == before
    assert json.loads((place / "run/status.json").read_text())["state"] == "failed"


STOPPING = """
def on_evaluate(state):
    state.stop_after_this_step = state.step >= 3

def on_checkpoint(state):
    with open("calls", "a") as file:
        print("checkpoint", state.step, state.checkpoint, file=file)

def on_finish(state):
    with open("calls", "a") as file:
        print("finish", state.step, state.checkpoint, file=file)
"""
PLAN = """
save_dir = "plan"
data_dir = "TEXT"
hidden_size = 32
num_layers = 2
num_heads = 2
max_steps = 6
eval_interval = 3
save_interval = {save}
[[stages]]
name = "first"
hooks = ["mine.py"]
[[stages]]
name = "second"
max_steps = 1
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("save", [3, 6])
def test_a_stage_that_hooks_end_is_finished_and_the_next_begins(tiny_data, tmp_path, save):
    """Where the evaluation that ends it is saved before, and where it is not."""
    write(tmp_path, STOPPING)
    (tmp_path / "TEXT").symlink_to(tiny_data)
    (tmp_path / "plan.toml").write_text(PLAN.format(save=save))
    words = ["--config", "plan.toml", "--sample_prompt=", "--log_interval", "1", "--device", "cpu", "--batch_size", "4"]
    with contextlib.chdir(tmp_path):
        ended = Forked(tmp_path / "streams", words).wait()
        assert ended.code == 0, ended.err
        assert "ended by --hooks at step 3" in ended.out and "finished at step 1" in ended.out
        first = "plan/1_first/checkpoint_step_3"
        assert (tmp_path / "calls").read_text() == f"checkpoint 3 {first}\nfinish 3 {first}\n"
        assert json.loads(Path("plan/2_second/run.json").read_text())["config"]["init_from"] == first
        again = Forked(tmp_path / "again", [*words, "--checkpoint", "latest"]).wait()
    assert again.code == 0, again.err
    assert again.out.count("finished already") == (2 if save == 6 else 1)
    assert not list(tmp_path.glob("plan/1_first/checkpoint_step_[4-6]"))
