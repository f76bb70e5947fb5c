"""Does training go on while a checkpoint is written, with the same bytes on the disk, and is a save that fails said and counted?

The disk is slow, full or gone in truth or by what `os` is made to do; runs are train.py's own. That a run in every stage goes on
bit for bit from what a thread wrote is in tests/test_finetune.py, kills are in tests/faults/test_saves.py.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that

from arguments import ArgumentParser
from checkpointing.save_folder import list_checkpoints, verify_checkpoint
from errors import UserError
from ranks import Ranks
from tests.forked import wait_for
from tests.ranks import run_ranks
from tests.tiers import grid
from train import run_stage
from training.config import TrainConfig, add_options
from training.run_files import read_history

SMALL = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 6 --learning_rate 3e-3 --log_interval 1 --eval_interval 0 "
    "--device cpu --keep_checkpoints 0"
)


@pytest.fixture(scope="module")
def words(tiny_data) -> str:
    return f"--data_dir {tiny_data} {SMALL}"


def run(words: str, save_dir: Path, rank: int = 0, world_size: int = 1) -> str:
    """train.py's run of one stage, without the process's end; the sentence of the error that ended it, or nothing.

    Signals are this process's own again afterwards.
    """
    parser = ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args([*words.split(), "--save_dir", str(save_dir), "--sample_prompt", ""]))
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        run_stage(given, Ranks(rank, world_size, torch.device("cpu")))
    except UserError as error:
        return str(error)
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
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


@pytest.mark.parametrize("cell", grid(CELLS, quick=["ema"]))
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
    """The weights of step 4 reach the disk only some time after step 6 has been logged."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "model.safetensors" and path.parent.name.startswith(".tmp_step_4"):
            wait_for(lambda: 6 in {row["step"] for row in read_history(save_dir).train})
            time.sleep(0.2)
        real(descriptor)

    os.fsync = slow
    return run(words, save_dir, rank, world_size)


@pytest.mark.parametrize("world_size", grid([1, 2], quick=[2]))
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


def with_a_lazy_disk(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    """All that is flushed takes its time."""
    real = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.03), real(descriptor))
    return run(words, save_dir, rank, world_size)


def test_the_best_is_marked_when_it_is_on_the_disk(words, tmp_path):
    """An evaluation follows each save at once, and finds no checkpoint yet."""
    flags = f"{words} --async_checkpoint --max_steps 6 --eval_interval 2"
    assert run_ranks(with_a_lazy_disk, 1, flags, tmp_path / "run") == [""]
    losses = {row["step"]: row["val_loss"] for row in read_history(tmp_path / "run").evals}
    best = (tmp_path / "run/best").read_text().strip()
    assert best == f"checkpoint_step_{min(losses, key=losses.__getitem__)}"
    assert verify_checkpoint(tmp_path / "run" / best) is None


# ---- which are kept, and which is the best ---------------------------------------------------------------------------


def steps_in(save_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(save_dir)]


def test_minutes_are_those_of_the_first_rank_and_all_save_together(words, tmp_path):
    """The second rank has no clock that goes: alone it would never save."""
    flags = "--save_every_minutes 0.0005 --save_interval 1000 --max_steps 30 --async_checkpoint"
    assert run_ranks(with_a_stopped_clock, 2, f"{words} {flags}", tmp_path) == ["", ""]
    assert len(steps_in(tmp_path)) > 2 and steps_in(tmp_path)[-1] == 30


def with_a_stopped_clock(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    if rank == 1:
        now = time.monotonic()
        time.monotonic = lambda: now
    return run(words, save_dir, rank, world_size)


def test_what_is_kept_for_ever_and_what_of_it_can_be_gone_on_from(words, tmp_path):
    """keep_checkpoints is given twice: the last one counts."""
    flags = "--max_steps 7 --save_interval 1 --keep_checkpoints 2 --keep_every 3 --keep_optimizer last"
    assert run(f"{words} {flags} --async_checkpoint", tmp_path / "run") == ""
    found = {path.name: (path / "optimizer.safetensors").exists() for _, path in list_checkpoints(tmp_path / "run")}
    assert found == {f"checkpoint_step_{step}": step == 7 for step in (3, 6, 7)}
    third = tmp_path / "run/checkpoint_step_3"
    refused = run(f"{words} --max_steps 9 --checkpoint {third}", tmp_path / "other")
    assert f"--init_from {third}" in refused and "optimizer state was removed" in refused
    data = words.partition(" --hidden_size")[0]
    assert run(f"{data} --max_steps 1 --init_from {third} --device cpu --eval_interval 0", tmp_path / "other") == ""
    assert run(f"{words} --max_steps 9 --checkpoint latest", tmp_path / "run") == ""
    os.truncate(tmp_path / "run/checkpoint_step_9/model.safetensors", 10)
    refused = run(f"{words} --max_steps 11 --checkpoint latest", tmp_path / "run")
    assert "is whole, with its optimizer state" in refused and "--init_from" in refused


SCORES = """
def on_evaluate(state):
    if state.ranks.rank == 0:
        state.log["score"] = {2: 1.0, 4: 5.0, 6: 3.0, 8: 4.0, 10: 6.0}[state.step]
"""


@pytest.mark.parametrize("world_size", grid([1, 2], quick=[]))
def test_the_best_by_any_figure_is_kept_and_known_again_when_the_run_goes_on(world_size, words, tmp_path):
    (tmp_path / "scores.py").write_text(SCORES)
    save_dir = tmp_path / "run"
    flags = f"{words} --eval_interval 2 --hooks {tmp_path / 'scores.py'} --keep_checkpoints 1"
    by_score = "--best_metric score --best_mode max"

    def go(more: str) -> str:
        if world_size == 1:
            return run(f"{flags} {more}", save_dir)
        said = run_ranks(on_rank, world_size, f"{flags} {more}", save_dir)
        assert len(set(said)) == 1
        return said[0]

    refused = go("--max_steps 2 --best_metric f1")
    assert refused == "--best_metric f1: evaluations of this run give val_loss, val_bpb, val_score"
    assert steps_in(save_dir) == [2]  # and the run can go on from there
    assert go(f"--max_steps 6 --checkpoint latest {by_score}") == ""
    assert (save_dir / "best").read_text() == "checkpoint_step_4\n" and steps_in(save_dir) == [4, 6]
    (save_dir / "best").unlink()  # as if it had been killed before it was marked
    assert go(f"--max_steps 8 --checkpoint latest {by_score}") == ""
    assert (save_dir / "best").read_text() == "checkpoint_step_4\n" and steps_in(save_dir) == [4, 8]
    assert go("--max_steps 10 --checkpoint latest") == ""
    assert (save_dir / "best").read_text() == "checkpoint_step_10\n"


def test_a_metric_says_by_its_name_what_is_better_or_is_asked(words, tmp_path):
    better = {"val_accuracy": True, "f1": True, "eval_loss": False, "val_reward": True, "bpb": False, "score": None}
    for name, higher in better.items():
        if higher is None:
            with pytest.raises(UserError, match="--best_metric score: add --best_mode min or max"):
                _ = TrainConfig(best_metric=name).higher_is_better
        else:
            assert TrainConfig(best_metric=name).higher_is_better == higher
            assert TrainConfig(best_metric=name, best_mode="min").higher_is_better is False
    assert "add --best_mode" in run(f"{words} --max_steps 2 --best_metric score", tmp_path)
