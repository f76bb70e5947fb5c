"""Does training go on while a checkpoint is written, with the same bytes on the disk, and is a save that fails said and counted?

The disk is slow, full or gone in truth or by what `os` is made to do; runs are train.py's own. That a run in every stage goes on
bit for bit from what a thread wrote is in tests/test_finetune.py, kills are in tests/faults/test_saves.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that

from arguments import ArgumentParser
from checkpointing.save_folder import verify_checkpoint
from errors import UserError
from ranks import Ranks
from tests.forked import wait_for
from tests.ranks import run_ranks
from tests.tiers import grid
from train import run_stage
from training.config import add_options
from training.run_files import read_history

SMALL = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 6 --learning_rate 3e-3 --log_interval 1 --eval_interval 0 "
    "--device cpu --keep_checkpoints 0"
)


@pytest.fixture(scope="module")
def words(tiny_data) -> str:
    return f"--data_dir {tiny_data} {SMALL}"


def run(words: str, save_dir: Path, rank: int = 0, world_size: int = 1) -> str:
    """train.py's run of one stage, without the process's end; the sentence of the error that ended it, or nothing."""
    parser = ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args([*words.split(), "--save_dir", str(save_dir), "--sample_prompt", ""]))
    try:
        run_stage(given, Ranks(rank, world_size, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return ""


def on_rank(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    return run(words, save_dir, rank, world_size)


def contents(save_dir: Path) -> dict[str, bytes]:
    """Every file of every checkpoint, without what says how it was written."""
    found = {}
    for path in sorted(save_dir.glob("checkpoint_step_*/*")):
        content = path.read_bytes()
        if path.name == "trainer_state.json":
            state = json.loads(content)
            for name in ("save_dir", "async_checkpoint"):
                del state["options"][name]
            state["rng"] = [of_rank["torch"] for of_rank in state["rng"]]  # of a process's own are Python's and NumPy's
            content = json.dumps(state).encode()
        elif path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["files"]["trainer_state.json"]
            content = json.dumps(manifest).encode()
        found[f"{path.parent.name}/{path.name}"] = content
    return found


CELLS = {
    "muon": (1, ""),
    "ema": (1, "--ema 0.9 --model gpt2"),  # whose weights are views that are turned round
    "schedule_free": (1, "--optimizer schedule_free"),
    "adamw8bit": (1, "--optimizer adamw8bit --hidden_size 64"),
    "ddp": (2, ""),
    "fsdp": (2, "--strategy fsdp"),
    "fsdp of 3": (3, "--strategy fsdp --offload all"),
}


@pytest.mark.parametrize("cell", grid(CELLS, quick=["ema", "schedule_free", "fsdp"]))
def test_what_a_thread_writes_is_byte_for_byte_what_the_loop_would_have_written(cell, words, tmp_path):
    world_size, flags = CELLS[cell]
    for name, more in (("sync", ""), ("async", "--async_checkpoint")):
        words_of = f"{words} {flags} {more} --max_steps 5 --save_interval 2"
        assert run_ranks(on_rank, world_size, words_of, tmp_path / name) == [""] * world_size
    assert contents(tmp_path / "async") == contents(tmp_path / "sync")
    assert len(list((tmp_path / "async").glob("checkpoint_*"))) == 3


HOOK = """
def on_checkpoint(state):
    whole = (state.checkpoint / "manifest.json").exists()
    with open("CALLS", "a") as file:
        print(state.ranks.rank, state.checkpoint.name, state.step, whole, file=file)
"""


def with_a_slow_disk(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    """The weights of step 4 reach the disk only when step 6 has been logged."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "model.safetensors" and path.parent.name.startswith(".tmp_step_4"):
            wait_for(lambda: 6 in {row["step"] for row in read_history(save_dir).train})
        real(descriptor)

    os.fsync = slow
    return run(words, save_dir, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_are_made_while_the_disk_is_slow_and_saved_is_said_when_it_is_true(world_size, words, tmp_path):
    (tmp_path / "hook.py").write_text(HOOK.replace("CALLS", str(tmp_path / "calls")))
    flags = f"--async_checkpoint --max_steps 9 --save_interval 4 --hooks {tmp_path / 'hook.py'} --strategy fsdp"
    assert run_ranks(with_a_slow_disk, world_size, f"{words} {flags}", tmp_path / "run") == [""] * world_size
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    order = [row.get("message", row["step"]) for row in lines]
    saved = [order.index(f"saved {tmp_path / 'run'}/checkpoint_step_{step}") for step in (4, 8, 9)]
    assert order.index(6) < saved[0] < saved[1] < saved[2]
    calls = sorted(line.split() for line in (tmp_path / "calls").read_text().splitlines())
    assert [call[:2] for call in calls] == [
        [str(rank), f"checkpoint_step_{step}"] for rank in range(world_size) for step in (4, 8, 9)
    ]
    assert all(int(step) > 5 and whole == "True" for _, _, step, whole in calls)


def test_the_best_is_marked_when_it_is_on_the_disk(words, tmp_path):
    flags = f"{words} --async_checkpoint --max_steps 6 --eval_interval 2"
    assert run(flags, tmp_path / "run") == ""
    losses = {row["step"]: row["val_loss"] for row in read_history(tmp_path / "run").evals}
    best = (tmp_path / "run/best").read_text().strip()
    assert best == f"checkpoint_step_{min(losses, key=losses.__getitem__)}"
    assert verify_checkpoint(tmp_path / "run" / best) is None
