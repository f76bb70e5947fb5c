"""Is a run that was killed while it saved, again and again, the run that was never killed? And does one that cannot save go on?

Runs are train.py's own, in processes that are really killed, on disks that are really full or gone; with checkpoints that the
loop writes, and that a thread does. Single saves under every kill, and damaged or hostile folders, are in
tests/checkpointing/test_checkpoint_faults.py; docs/reliability.md lists all faults.
"""

import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointing.load import load_state, resolve_checkpoint
from checkpointing.save_folder import list_checkpoints, verify_checkpoint
from tests.forked import wait_for
from tests.processes import new_process
from tests.ranks import run_ranks
from tests.tiers import grid
from tests.training.test_saving import SMALL, on_rank, run, with_a_slow_disk
from training.run_files import read_history

WAYS = {"loop": "", "thread": "--async_checkpoint"}


@pytest.fixture(scope="module")
def words(tiny_data) -> str:
    return f"--data_dir {tiny_data} {SMALL}"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".tmp_", ".old_", ".del_")))


def assert_whole(save_dir: Path) -> None:
    found = {path.name: verify_checkpoint(path) for _, path in list_checkpoints(save_dir)}
    assert not any(found.values()), found


def tensor_bytes(save_dir: Path, step: int) -> tuple[bytes, bytes]:
    folder = save_dir / f"checkpoint_step_{step}"
    return (folder / "model.safetensors").read_bytes(), (folder / "optimizer.safetensors").read_bytes()


def messages(save_dir: Path, event: str) -> list[str]:
    return [row["message"] for row in read_history(save_dir).events if row["event"] == event]


# ---- killed ----------------------------------------------------------------------------------------------------------

POINTS = {  # the call before which the process is killed, and which of them since it started
    "while the weights are written": (r"fsync .*/\.tmp_step_\d+_[^/]+/model\.safetensors", 3),
    "before the manifest": (r"open .*/\.tmp_step_\d+_[^/]+/manifest\.json", 1),
    "before it has its name": (r"rename .* .*/checkpoint_step_\d+", 1),
    "before the pointer": (r"replace .*/\.tmp_latest_\S+ .*/latest", 1),
    "before an old one is deleted": (r"rename .* .*/\.del_checkpoint_step_\d+_\w+", 1),
    "while an old one is deleted": (r"unlink model\.safetensors", 1),
    "before a manifest without the optimizer": (r"replace .* .*/checkpoint_step_\d+/manifest\.json", 1),
    "before the optimizer's file goes": (r"unlink .*/checkpoint_step_\d+/optimizer\.safetensors", 1),
}


def killed_before(pattern: str, number: int, words: str, save_dir: Path) -> None:
    """A run that kills itself (-9) before its `number`-th call to the file system that `pattern` describes."""
    calls = itertools.count(1)

    def guarded(name: str) -> Callable:
        call = getattr(os, name)

        def guard(*args, **kwargs):
            subject = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else " ".join(map(str, args[:2]))
            if name in ("open", "unlink"):
                subject = str(args[0])
            if re.fullmatch(pattern, f"{name} {subject}") and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return guard

    for name in ("open", "fsync", "rename", "replace", "unlink"):
        setattr(os, name, guarded(name))
    run(words, save_dir)


@pytest.mark.parametrize("way", grid(WAYS, quick=["thread"]))
def test_killed_at_each_point_of_a_save_one_after_another(way, words, tmp_path):
    """Each start goes on where the last was killed; at no moment is there a checkpoint that is not whole."""
    flags = f"{words} --max_steps 20 --checkpoint latest"
    saving = f"{WAYS[way]} --save_interval 2 --keep_checkpoints 2 --keep_optimizer last"
    newest = 0
    for name, (pattern, number) in POINTS.items():
        process = new_process(killed_before, pattern, number, f"{flags} {saving}", tmp_path / "killed")
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, name
        assert_whole(tmp_path / "killed")
        found = resolve_checkpoint("latest", tmp_path / "killed", to_go_on=True)
        assert found.path is not None and found.skipped == [], name
        step = load_state(found.path)["step"]
        assert step >= newest, name
        newest = step
    assert newest < 20
    assert run(f"{flags} {saving}", tmp_path / "killed") == ""
    assert run(f"{flags} --save_interval 100", tmp_path / "whole") == ""
    assert tensor_bytes(tmp_path / "killed", 20) == tensor_bytes(tmp_path / "whole", 20)
    assert leftovers(tmp_path / "killed") == []
    kept = {path.name: (path / "optimizer.safetensors").exists() for _, path in list_checkpoints(tmp_path / "killed")}
    assert kept == {"checkpoint_step_18": False, "checkpoint_step_20": True}


RANDOM_KILLS = [(10, "thread"), (10, "loop"), (50, "thread")]


@pytest.mark.parametrize(("kills", "way"), grid(RANDOM_KILLS, quick=[]))
def test_killed_at_random_moments_and_the_same_bits_at_the_end(kills, way, words, tmp_path):
    """Every step is saved, so that most kills fall into a save; on purpose other moments each time."""
    steps, moment = 15 * kills, random.Random()
    flags = f"{words} --max_steps {steps} --checkpoint latest"
    saving = f"{WAYS[way]} --save_interval 1 --keep_checkpoints 2 --keep_optimizer last"
    newest = partial = 0
    for _ in range(kills):
        process = new_process(run, f"{flags} {saving}", tmp_path / "killed")
        process.start()
        wait_for(lambda: max((step for step, _ in list_checkpoints(tmp_path / "killed")), default=0) > newest)  # noqa: B023
        time.sleep(moment.random() * 0.05)
        process.kill()
        process.join()
        partial += bool(leftovers(tmp_path / "killed"))
        assert_whole(tmp_path / "killed")
        found = resolve_checkpoint("latest", tmp_path / "killed", to_go_on=True)
        step = load_state(found.path)["step"]
        assert newest < step < steps and found.skipped == []
        newest = step
    assert kills < 50 or partial > kills // 10  # else hardly a kill fell into a save; of ten none may
    assert run(f"{flags} {saving}", tmp_path / "killed") == ""
    assert run(f"{flags} --save_interval {steps}", tmp_path / "whole") == ""
    assert tensor_bytes(tmp_path / "killed", steps) == tensor_bytes(tmp_path / "whole", steps)
    assert leftovers(tmp_path / "killed") == []


STOPS = {  # after step 7
    "a signal": "os.kill(os.getpid(), signal.SIGTERM)",
    "hooks": "state.stop_after_this_step = True",
    "an error": "1 / 0",
}


@pytest.mark.parametrize("stop", grid(STOPS, quick=["a signal"]))
def test_a_run_that_ends_while_one_is_written_leaves_it_whole(stop, words, tmp_path):
    """The weights of step 4 reach the disk some time after step 6, when the run is asked to end after step 7."""
    hook = f"import os, signal\ndef on_step(state):\n    if state.step == 7:\n        {STOPS[stop]}\n"
    (tmp_path / "hook.py").write_text(hook)
    flags = f"--async_checkpoint --max_steps 9 --save_interval 4 --hooks {tmp_path / 'hook.py'}"
    (said,) = run_ranks(with_a_slow_disk, 1, f"{words} {flags}", tmp_path / "run")
    assert ("ZeroDivisionError" in said) == (stop == "an error")
    steps = {"a signal": [4, 8], "hooks": [4, 7], "an error": [4]}[stop]  # a signal is heard with the next step
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == steps
    assert_whole(tmp_path / "run")
    assert leftovers(tmp_path / "run") == [] and len(messages(tmp_path / "run", "save")) == len(steps)


# ---- a disk that is full, or gone ------------------------------------------------------------------------------------

FULL = """
import json, resource
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
limited = False

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

def on_checkpoint(state):
    global limited
    if state.ranks.rank == 0 and not limited and state.checkpoint.name == "checkpoint_step_2":
        limited = True
        limit(30_000)

def on_step(state):
    if state.ranks.rank == 0 and LIFTED and '"alert"' in open(f"{state.config.save_dir}/metrics.jsonl").read():
        limit(soft)
    if state.step == STOP:
        state.stop_after_this_step = True
"""


def with_a_full_disk(words: str, tmp_path: Path, world_size: int = 1, lifted: bool = True, stop: int = 0) -> str:
    """A run on whose rank 0 no file may exceed 30 kB once step 2 is saved; lifted: until an alert says that one did."""
    (tmp_path / "full.py").write_text(FULL.replace("LIFTED", str(lifted)).replace("STOP", str(stop)))
    said = run_ranks(on_rank, world_size, f"{words} --save_interval 2 --hooks {tmp_path / 'full.py'}", tmp_path / "run")
    assert len(set(said)) == 1
    return said[0]


CELLS = [(way, world_size) for way in WAYS for world_size in (1, 2)]


@pytest.mark.parametrize(("way", "world_size"), grid(CELLS, quick=[("thread", 2)]))
def test_a_full_disk_costs_checkpoints_and_not_the_run(way, world_size, words, tmp_path):
    flags = f"{words} {WAYS[way]} --max_steps 8 --strategy fsdp"
    assert with_a_full_disk(flags, tmp_path, world_size) == ""
    alerts = messages(tmp_path / "run", "alert")
    assert 1 <= len(alerts) <= 2 and all("File too large" in alert for alert in alerts)
    steps = [step for step, _ in list_checkpoints(tmp_path / "run")]
    assert 2 in steps and steps[-1] == 8 and 4 not in steps
    assert_whole(tmp_path / "run")
    assert leftovers(tmp_path / "run") == []
    assert [row["step"] for row in read_history(tmp_path / "run").train] == list(range(1, 9))


LAST = [("thread", 20, 0), ("thread", 3, 0), ("loop", 3, 0), ("thread", 9, 3)]


@pytest.mark.parametrize(("way", "max_steps", "stop"), grid(LAST, quick=[("thread", 20, 0), ("thread", 9, 3)]))
def test_three_in_a_row_or_the_last_end_the_run_with_the_reason(way, max_steps, stop, words, tmp_path):
    """Of 20 steps those of 4, 6 and 8 fail. The last is that of --max_steps, or where a hook has ended the run."""
    said = with_a_full_disk(f"{words} {WAYS[way]} --max_steps {max_steps}", tmp_path, lifted=False, stop=stop)
    failed = 8 if max_steps == 20 else 3
    assert said.startswith(f"step {failed} could not be saved to {tmp_path / 'run'}: ") and "File too large" in said
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert_whole(tmp_path / "run")
    assert leftovers(tmp_path / "run") == []
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("way", grid(WAYS, quick=["thread"]))
def test_a_folder_that_vanishes_is_said_three_times_and_not_made_again(way, words, tmp_path):
    hook = "import shutil\ndef on_step(state):\n    if state.step == 3:\n        shutil.rmtree(state.config.save_dir)\n"
    (tmp_path / "hook.py").write_text(hook)
    flags = f"{words} {WAYS[way]} --max_steps 20 --save_interval 4 --hooks {tmp_path / 'hook.py'}"
    said = run(flags, tmp_path / "run")
    assert said == f"step 12 could not be saved to {tmp_path / 'run'}: {tmp_path / 'run'}: the folder is gone"
    assert not (tmp_path / "run").exists()


# ---- a clock that jumps ----------------------------------------------------------------------------------------------


def with_a_clock_that_jumps(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    """Each look at the wall clock shows a day earlier than the one before."""
    days = itertools.count()
    real = time.time
    time.time = lambda: real() - 86_400 * next(days)
    return run(words, save_dir, rank, world_size)


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(words, tmp_path):
    save_dir = tmp_path / "run"
    flags = f"{words} --save_interval 2 --save_every_minutes 1 --keep_checkpoints 2"
    assert run_ranks(with_a_clock_that_jumps, 1, f"{flags} --max_steps 8", save_dir) == [""]
    assert [step for step, _ in list_checkpoints(save_dir)] == [6, 8]  # of minutes there was none
    os.utime(save_dir / "checkpoint_step_8", (0, 0))
    assert run(f"{flags} --max_steps 10 --checkpoint latest", save_dir) == ""
    assert f"resumed from {save_dir}/checkpoint_step_8" in messages(save_dir, "resume")
    assert [step for step, _ in list_checkpoints(save_dir)] == [8, 10]
