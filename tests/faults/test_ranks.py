"""Is nothing lost, and does nobody wait for ever, when a rank dies, stops, hangs, or is asked to leave?"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.forked import Forked, start_ranks, wait_for
from tests.tiers import grid

SIZES = "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 8 --learning_rate 3e-3 --warmup_steps 4"
QUIET = "--eval_interval 0 --sample_prompt= --log_interval 1 --device cpu --save_interval 7 --keep_checkpoints 0"


def steps(save_dir: Path) -> list[int]:
    """Of the training rows in metrics.jsonl, but for one that is being written."""
    path = save_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [row["step"] for row in rows if "loss" in row]


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(checkpoint.glob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def words(tiny_data) -> list[str]:
    return f"--data_dir {tiny_data} {SIZES} {QUIET} --max_steps 30".split()


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> dict[str, str]:
    """The digests of two ranks' last checkpoint, where nobody was in their way."""
    folder = tmp_path_factory.mktemp("whole")
    for rank in start_ranks(folder, *words, "--save_dir", folder):
        assert rank.wait().code == 0
    return digests(folder / "checkpoint_step_30")


class Agent:
    """What torchrun gives the ranks of a machine: one store, which it keeps over all restarts, and their number so far."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, folder: Path, *words: object, restarts: int) -> list[Forked]:
        return start_ranks(
            folder, *words, MASTER_PORT=str(self.store.port), TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT=str(restarts),
        )  # fmt: skip


@pytest.mark.parametrize("victim", grid([0, 1], [1]))
def test_a_rank_is_killed_and_the_restart_ends_in_the_same_bits(victim, words, whole, tmp_path):
    agent, run = Agent(), tmp_path / "run"
    ranks = agent.start(tmp_path, *words, "--save_dir", run, restarts=0)
    wait_for(lambda: len(steps(run)) >= 9)
    ranks[victim].send(signal.SIGKILL)
    left = ranks[1 - victim].wait(20)
    assert left.code == 2 and "error: another rank has ended" in left.err and "Traceback" not in left.err
    assert not list(run.glob(".tmp*")), "nothing half written"
    assert ranks[victim].wait(1).code == -signal.SIGKILL
    # as torchrun starts them again: the same command, a larger number, the same store
    again = [rank.wait(60) for rank in agent.start(tmp_path, *words, "--save_dir", run, restarts=1)]
    assert [one.code for one in again] == [0, 0], again[0].err
    assert "resumed from" in again[0].out
    assert digests(run / "checkpoint_step_30") == whole


def test_a_restart_goes_on_from_what_was_saved_since_and_not_from_where_the_command_began(words, whole, tmp_path):
    run = tmp_path / "run"
    assert Forked(tmp_path / "0", [*words, "--save_dir", run, "--max_steps", 7]).wait().code == 0
    first = [*words, "--save_dir", run, "--checkpoint", run / "checkpoint_step_7"]
    assert Forked(tmp_path / "0", [*first, "--max_steps", 14]).wait().code == 0
    again = Forked(tmp_path / "0", [*first, "--max_steps", 16], TORCHELASTIC_RESTART_COUNT="1").wait()
    assert again.code == 0 and "checkpoint_step_14" in again.out, again.err


@pytest.mark.exhaustive
def test_torchrun_restarts_what_was_killed(root, words, whole, tmp_path):
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "train.py", *words, "--save_dir", str(run)], cwd=root, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(lambda: len(steps(run)) >= 9)
        pid = json.loads((run / "run.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "resumed from" in out, out
    assert digests(run / "checkpoint_step_30") == whole
