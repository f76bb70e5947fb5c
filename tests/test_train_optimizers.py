"""Do runs keep their promises with every optimizer and average: exact resume, the right weights evaluated, saved and loaded?"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import utils
from arguments import ArgumentParser
from errors import UserError
from tests.forked import Forked, start_ranks
from tests.tiers import grid
from training.config import add_options, resolve_config
from training.optimizers import OPTIMIZERS

SHAPE = "--hidden_size 64 --num_layers 2 --num_heads 2"  # 64 x 64 weights: as many as adamw8bit wants to keep bytes
QUIET = "--batch_size 4 --learning_rate 3e-3 --warmup_steps 3 --sample_prompt= --log_interval 1 --device cpu"
NEVER = "--optimizer sgd --learning_rate 1e-30 --max_steps 1"  # a step that moves nothing, and an evaluation
OWN = """
import torch

def build(groups, settings):
    return torch.optim.RMSprop(groups, centered=True)
"""


@pytest.fixture(scope="module")
def workshop(tiny_data, tmp_path_factory) -> Path:
    """A folder with text, and a file with an optimizer; `train` adds a small model to start from, once one is asked for."""
    folder = tmp_path_factory.mktemp("optimizers")
    (folder / "TEXT").symlink_to(tiny_data)
    (folder / "own.py").write_text(OWN)
    return folder


@pytest.fixture
def train(workshop, tmp_path):
    """Runs train.py with a new folder below tmp_path as its --save_dir, on one rank or more."""

    def run(name: str, words: str, world_size: int = 1, code: int = 0) -> Path:
        if "BASE" in words and not (workshop / "BASE").exists():
            run(str(workshop / "BASE"), f"{NEW} {QUIET} --max_steps 2 --eval_interval 0")
        for known in ("TEXT", "BASE", "own.py"):
            words = words.replace(known, str(workshop / known))
        flags = [*words.split(), "--save_dir", tmp_path / name]
        if world_size > 1:
            ended = [one.wait() for one in start_ranks(tmp_path, *flags, world_size=world_size)]
        else:
            ended = [Forked(tmp_path / "streams", flags).wait()]
        assert all(one.code == code for one in ended), ended[0].err
        return tmp_path / name if code == 0 else Path(ended[0].err)

    return run


def rows(run: Path, key: str) -> dict[int, float]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in found if key in row}


def digests(checkpoint: Path) -> dict[str, str]:
    """Of all tensors: of the model, the optimizer, the average and what else lies there."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}


NEW, ADAPTED = f"--data_dir TEXT {SHAPE}", "--data_dir TEXT --init_from BASE --lora --lora_r 64"
CELLS = [
    *((start, f"--optimizer {name}") for start in (NEW, ADAPTED) for name in OPTIMIZERS),
    *((start, f"--optimizer {name} --ema 0.8 --layer_lr_decay 0.7") for start in (NEW, ADAPTED)
      for name in ("adamw", "muon", "adamw8bit")),
    (f"{ADAPTED} --load_in_4bit", "--optimizer adamw8bit --ema 0.8 --layer_lr_decay 0.7"),
    (f"{ADAPTED} --load_in_4bit", "--optimizer schedule_free"),
    (NEW, "--optimizer_file own.py:build --ema 0.8"),
]  # fmt: skip
QUICK = [(NEW, "--optimizer schedule_free"), (NEW, "--optimizer adamw8bit --ema 0.8 --layer_lr_decay 0.7")]


@pytest.mark.parametrize("start,optimizer", grid(CELLS, quick=QUICK))
def test_a_resumed_run_is_the_one_that_never_stopped_bit_for_bit(train, start, optimizer):
    run = train("run", f"{start} {QUIET} {optimizer} --max_steps 12 --save_interval 8 --eval_interval 6")
    whole, lines = digests(run / "checkpoint_step_12"), rows(run, "loss")
    assert ("ema.safetensors" in whole) == ("--ema" in optimizer)
    shutil.rmtree(run / "checkpoint_step_12")
    train("run", "--checkpoint latest")
    assert digests(run / "checkpoint_step_12") == whole
    assert rows(run, "loss") == lines and len(lines) == 12


@pytest.mark.parametrize(
    "optimizer",
    grid(
        [f"--optimizer {name} --layer_lr_decay 0.7" for name in OPTIMIZERS] + ["--optimizer adamw --ema 0.8"], quick=[]
    ),
)
def test_two_ranks_train_as_one_and_hold_the_same_average(train, optimizer):
    """To 1e-4: fp32 sums in another order, of which 8-bit moments and signs make more."""
    words = f"{NEW} {QUIET} {optimizer} --max_steps 6 --eval_interval 3 --max_length 32"
    alone, shared = train("one", words), train("two", words, world_size=2)
    for key in ("loss", "val_loss", *(["val_loss_ema"] if "--ema" in optimizer else [])):
        one, two = rows(alone, key), rows(shared, key)
        assert one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 1e-4
    train("two", "--checkpoint latest --max_steps 7")  # one rank goes on from what two wrote


def evaluated_alone(train, folder: Path) -> float:
    """The validation loss of a folder's weights, by a run that starts from them and moves nothing."""
    run = train(f"look_{folder.name}", f"--data_dir TEXT --init_from {folder} {QUIET} {NEVER} --weight_decay 0")
    return rows(run, "val_loss")[1]


def test_schedule_free_evaluates_and_saves_the_average_and_not_what_it_trains(train):
    run = train("run", f"{NEW} {QUIET} --optimizer schedule_free --max_steps 9 --eval_interval 9")
    checkpoint = run / "checkpoint_step_9"
    assert evaluated_alone(train, checkpoint) == pytest.approx(rows(run, "val_loss")[9], abs=1e-6)
    weights, state = (load_file(checkpoint / name) for name in ("model.safetensors", "optimizer.safetensors"))
    for name, x in weights.items():
        y, z = state[f"{name}.y"].double(), state[f"{name}.z"].double()
        torch.testing.assert_close(0.9 * x.double() + 0.1 * z, y, atol=1e-7, rtol=1e-6)
        assert not torch.equal(x.double(), y)


def test_the_average_is_that_of_the_weights_after_each_step_and_becomes_a_model(train, tmp_path):
    """Worked out in float64 from the checkpoints of all steps; and what `average` makes of it has the loss that was said."""
    run = train(
        "run", f"{NEW} {QUIET} --ema 0.7 --max_steps 6 --save_interval 1 --eval_interval 6 --keep_checkpoints 0"
    )
    steps = [load_file(run / f"checkpoint_step_{step}" / "model.safetensors") for step in range(1, 7)]
    weights = [0.7 ** (6 - step) for step in range(1, 7)]
    average = load_file(run / "checkpoint_step_6" / "ema.safetensors")
    assert average.keys() == steps[0].keys()
    for name, found in average.items():
        exact = sum(w * step[name].double() for w, step in zip(weights, steps, strict=True)) / sum(weights)
        torch.testing.assert_close(found.double(), exact, atol=1e-7, rtol=1e-6)
    output = tmp_path / "averaged"
    assert utils.main(["average", "--checkpoint_dir", str(run), "--ema", "--output", str(output)]) == 0
    said = rows(run, "val_loss_ema")[6]
    assert evaluated_alone(train, output) == pytest.approx(said, abs=1e-6)
    assert abs(said - rows(run, "val_loss")[6]) > 1e-3


@pytest.mark.exhaustive
def test_the_average_of_adapters_becomes_an_adapter(train, tmp_path):
    run = train("run", f"{ADAPTED} {QUIET} --optimizer adamw --ema 0.7 --max_steps 6 --eval_interval 6")
    output, merged = tmp_path / "averaged", tmp_path / "merged"
    assert utils.main(["average", "--checkpoint_dir", str(run), "--ema", "--output", str(output)]) == 0
    base = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    words = ["merge", "--base", base, "--adapter", str(output), "--output", str(merged)]
    assert utils.main(words) == 0
    said = rows(run, "val_loss_ema")[6]
    assert evaluated_alone(train, merged) == pytest.approx(said, abs=1e-5)
    assert abs(said - rows(run, "val_loss")[6]) > 1e-4


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("optimizer", ["--optimizer schedule_free", "--optimizer adamw8bit --ema 0.8"])
def test_compiled_runs_follow_eager_ones(train, optimizer):
    words = f"{NEW} {QUIET} {optimizer} --max_steps 5 --eval_interval 2"
    eager, compiled = train("eager", words), train("compiled", f"{words} --compile_model")
    for key in ("loss", "val_loss", *(["val_loss_ema"] if "--ema" in words else [])):
        one, two = rows(eager, key), rows(compiled, key)
        assert one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 1e-4


@pytest.mark.exhaustive
def test_stages_of_a_plan_have_optimizers_of_their_own(train, workshop, tmp_path):
    """What schedule-free training ends in, x, is what the next stage starts from."""
    (tmp_path / "plan.toml").write_text(
        f"""
data_dir = "{workshop / "TEXT"}"
batch_size = 4
learning_rate = 3e-3
eval_interval = 4
sample_prompt = ""
ema = 0.8

[[stages]]
hidden_size = 64
num_layers = 2
num_heads = 2
optimizer = "schedule_free"
max_steps = 4

[[stages]]
init_from = "{tmp_path / "run" / "1_pretrain"}"
optimizer = "sgd"
schedule = "restarts"
cycle_steps = 2
layer_lr_decay = 0.5
learning_rate = 1e-30
weight_decay = 0.0
max_steps = 4
"""
    )
    run = train("run", f"--config {tmp_path / 'plan.toml'} --device cpu")
    first, second = run / "1_pretrain", next(run.glob("2_*"))
    assert rows(second, "val_loss")[4] == pytest.approx(rows(first, "val_loss")[4], abs=1e-6)
    assert rows(second, "val_loss_ema") and not rows(first, "val_loss_ema")


def test_what_cannot_be_is_said_before_any_data_is_read(workshop):
    """Where options are resolved, of data that is not there."""
    parser = ArgumentParser()
    add_options(parser)
    for words, said in (
        ("--optimizer schedule_free --schedule cosine", "--schedule cosine cannot be used"),
        ("--optimizer schedule_free --beta1 0", "--beta1 must be positive"),
        ("--optimizer schedule_free --ema 0.9", "--ema is for"),
        ("--optimizer adafactor --beta2 0.9", "--beta2 is for"),
        ("--momentum 0.9 --optimizer lion", "--momentum is for"),
        ("--schedule restarts", "--cycle_steps"),
        ("--cycle_steps 5", "--cycle_steps is for"),
        ("--schedule constant --min_lr_fraction 0.1", "--min_lr_fraction is for"),
        ("--ema 1", "--ema must lie between 0 and 1"),
        ("--layer_lr_decay 0", "--layer_lr_decay must lie above 0"),
        ("--optimizer_file own.py:absent", "defines no absent"),
        ("--optimizer_file own.py", "write FILE:FUNCTION"),
        ("--optimizer_file nowhere.py:build", "nowhere.py cannot be read (No such file or directory)"),
        ("--optimizer_file own.py:build --optimizer lion", "say one thing in two ways"),
    ):
        flags = f"--data_dir nowhere {words}".replace("own.py", str(workshop / "own.py")).split()
        with pytest.raises(UserError) as refused:
            resolve_config(vars(parser.parse_args(flags)))
        assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.exhaustive
def test_a_run_goes_on_with_what_it_began_with(train):
    train("run", f"{NEW} {QUIET} --optimizer lion --ema 0.9 --max_steps 2 --eval_interval 0")
    for words in ("--optimizer sgd", "--ema 0.5", "--optimizer_file own.py:build"):
        refused = str(train("run", f"--checkpoint latest --max_steps 4 {words}", code=2))
        assert f"was trained with {words.split()[0]}" in refused or "was trained with --optimizer" in refused, refused
