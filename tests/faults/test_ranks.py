"""Is nothing lost, and does nobody wait for ever, when a rank dies, stops, hangs, or is asked to leave?"""

import hashlib
import json
import os
import shutil
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
    return list(losses(save_dir))


def losses(save_dir: Path) -> dict[int, float]:
    """Of two rows of a step the later one counts."""
    path = save_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {row["step"]: row["loss"] for row in rows if "lr" in row}


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


def test_a_restart_goes_on_from_what_was_saved_since_and_not_from_where_the_command_began(words, tmp_path):
    run = tmp_path / "run"
    assert Forked(tmp_path / "0", [*words, "--save_dir", run, "--max_steps", 14]).wait().code == 0
    given = [*words, "--save_dir", run, "--checkpoint", run / "checkpoint_step_7", "--max_steps", 16]
    again = Forked(tmp_path / "0", given, TORCHELASTIC_RESTART_COUNT="1").wait()
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


# ---- ranks that stand still ---------------------------------------------------------------------------------------------

HANGS = """
import time

def on_step(state):
    if state.step == 5 and {who}:
        time.sleep(1000)
"""

SLOW = """
import time

def on_step(state):
    for _ in range(10 * (state.step == 3)):
        time.sleep(0.1)
        time.sleep(0.1)
"""


def test_a_stopped_rank_is_named_and_the_others_show_their_stacks(words, tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(tmp_path, *words, "--max_steps", 3000, "--save_dir", run, "--timeout", 0.025)
    wait_for(lambda: len(steps(run)) >= 5)
    ranks[1].send(signal.SIGSTOP)
    try:
        left = ranks[0].wait(30)
    finally:
        ranks[1].send(signal.SIGKILL)
    assert left.code == 1
    assert "error: rank 1 said nothing for so long: the process is stopped" in left.err
    assert "in optimizer_step" in left.err and "in optimizer_step" in (run / "stacks_rank_0.txt").read_text()
    assert "rank 1 said nothing" in json.loads((run / "status.json").read_text())["error"]


@pytest.mark.parametrize("world_size", grid([1, 2], [1]))
def test_a_rank_that_stands_still_in_its_own_code_is_named_with_the_line(world_size, words, tmp_path):
    hooks = tmp_path / "mine.py"
    hooks.write_text(HANGS.format(who=f"int(__import__('os').environ.get('RANK', 0)) == {world_size - 1}"))
    run = tmp_path / "run"
    given = [*words, "--save_dir", run, "--hooks", hooks, "--timeout", 0.025]
    ranks = start_ranks(tmp_path, *given) if world_size == 2 else [Forked(tmp_path / "0", given)]
    ended = [rank.wait(30) for rank in ranks]
    assert [one.code for one in ended] == [1] * world_size
    said = ended[0].err + ended[-1].err
    assert "nothing has moved for" in said if world_size == 1 else "the others wait for rank 1 at mine.py:6" in said
    for rank in range(world_size):
        stacks = (run / f"stacks_rank_{rank}.txt").read_text()
        assert ("mine.py" in stacks) == (rank == world_size - 1) and "in loop" in stacks


@pytest.mark.exhaustive
def test_what_goes_on_slowly_is_left_alone(words, tmp_path):
    """One rank takes longer over a step than --timeout, and moves all the while; and a run that is stopped as a whole and
    continued was never hanging."""
    hooks = tmp_path / "slow.py"
    hooks.write_text(SLOW)
    given = [*words, "--max_steps", 8, "--save_dir", tmp_path / "run", "--hooks", hooks, "--timeout", 0.025]
    slow = Forked(tmp_path / "0", given)
    wait_for(lambda: len(steps(tmp_path / "run")) >= 2)
    slow.send(signal.SIGSTOP)
    subprocess.run(["sleep", "2"], check=True)
    slow.send(signal.SIGCONT)
    assert slow.wait(30).code == 0


# ---- ranks that are asked to leave, and that disagree ---------------------------------------------------------------------

ASKS = """
import os, signal

def {event}(state):
    if state.step == 14 and os.environ["RANK"] == "1":
        for _ in range({times}):
            os.kill(os.getpid(), signal.SIG{name})
"""


def hooked(folder: Path, words: list[str], code: str) -> list[object]:
    (folder / "mine.py").write_text(code)
    return [*words, "--save_dir", folder / "run", "--hooks", folder / "mine.py"]


PHASES = [("on_step", "INT"), ("on_step", "USR1"), ("on_evaluate", "TERM"), ("on_checkpoint", "TERM")]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("event", "name"), PHASES)
def test_a_rank_is_asked_to_leave_in_a_step_an_evaluation_or_a_save(event, name, words, whole, tmp_path):
    """Whenever it is, all save at one step, leave, and go on to the same bits."""
    number, run = getattr(signal, f"SIG{name}"), tmp_path / "run"
    given = hooked(tmp_path, [*words, "--eval_interval", "7"], ASKS.format(event=event, name=name, times=1))
    ended = [rank.wait(60) for rank in start_ranks(tmp_path, *given)]
    assert [one.code for one in ended] == [128 + number] * 2, ended[1].err
    last = max(steps(run))
    assert last in (14, 15) and (run / f"checkpoint_step_{last}").is_dir()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    (tmp_path / "mine.py").write_text("def on_step(state): ...\n")
    again = start_ranks(tmp_path, *given, "--checkpoint", "latest")
    assert [rank.wait(60).code for rank in again] == [0, 0]
    assert digests(run / "checkpoint_step_30") == whole


def test_a_second_signal_leaves_at_once_and_leaves_nothing_half(words, tmp_path):
    given = hooked(tmp_path, words, ASKS.format(event="on_step", name="TERM", times=2))
    ended = [rank.wait(20) for rank in start_ranks(tmp_path, *given)]
    assert [one.code for one in ended] == [2, 143] and "another rank has ended" in ended[0].err
    assert {path.name for path in (tmp_path / "run").glob("checkpoint*")} == {"checkpoint_step_7"}


@pytest.mark.exhaustive
def test_two_ranks_then_one_then_two_learn_what_two_did(words, tmp_path):
    for folder, parts in (("straight", [(2, 30)]), ("changing", [(2, 10), (1, 20), (2, 30)])):
        for place, (world_size, last) in enumerate(parts):
            more = ["--save_dir", tmp_path / folder, "--schedule", "constant", "--max_steps", last]
            more += ["--checkpoint", "latest"] if place else []
            ended = [rank.wait() for rank in start_ranks(tmp_path, *words, *more, world_size=world_size)]
            assert [one.code for one in ended] == [0] * world_size, ended[0].err
    straight, changing = (losses(tmp_path / folder) for folder in ("straight", "changing"))
    assert len(changing) == 30 and changing == pytest.approx(straight, rel=1e-4)


NAN_ON_RANK_1 = """
import os

seen = 0

def loss(model, batch, stage_loss):
    global seen
    seen += 1
    total, metrics = stage_loss(model, batch)
    spoilt = os.environ["RANK"] == "1" and seen == 2 + 9  # two passes settle DDP's buckets
    return total * (float("nan") if spoilt else 1.0), metrics
"""


def test_a_nan_on_one_rank_is_left_out_on_all(words, tmp_path):
    (tmp_path / "mine.py").write_text(NAN_ON_RANK_1)
    run = tmp_path / "run"
    given = [*words, "--save_dir", run, "--loss_file", f"{tmp_path / 'mine.py'}:loss", "--save_interval", 1]
    ended = [rank.wait() for rank in start_ranks(tmp_path, *given, "--max_steps", 11)]
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert "step 9: the gradient is not finite" in ended[0].out
    at = {step: digests(run / f"checkpoint_step_{step}") for step in (8, 9, 10)}
    assert at[8] == at[9] != at[10]


DIVERGES = """
import os, torch

def on_step(state):
    if state.step == 9 and os.environ["RANK"] == "{rank}":
        with torch.no_grad():
            state.model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
"""


@pytest.mark.parametrize(("world_size", "whose"), grid([(2, "one of the ranks"), (3, "rank 1")], [(3, "rank 1")]))
def test_a_replica_that_became_another_model_is_named_and_not_saved(world_size, whose, words, tmp_path):
    given = hooked(tmp_path, words, DIVERGES.format(rank=1))
    ended = [rank.wait() for rank in start_ranks(tmp_path, *given, "--max_steps", 30, world_size=world_size)]
    assert [one.code for one in ended] == [2] * world_size
    for one in ended:
        assert (
            f"step 14: model.embed_tokens.weight is not the same on all ranks, {whose} has other bits" in one.err
            or (
                f"step 14: model.layers.1.mlp.down_proj.weight is not the same on all ranks, {whose} has other bits"
                in one.err
            )
        )
    assert {path.name for path in (tmp_path / "run").glob("checkpoint*")} == {"checkpoint_step_7"}


# ---- data that changes under the reader ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", grid([1, 2], [1]))
def test_a_shard_that_shrinks_ends_the_run_with_a_sentence_and_costs_nothing_when_it_is_put_back(
    world_size, words, tiny_data, tmp_path
):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    shard = data / "dataset" / "train_00000.bin"
    whole, status = shard.read_bytes(), shard.stat()
    given = [*words, "--data_dir", data, "--save_dir", run, "--max_steps", 3000]
    ranks = start_ranks(tmp_path, *given) if world_size == 2 else [Forked(tmp_path / "0", given)]
    wait_for(lambda: len(steps(run)) >= 8)
    os.truncate(shard, 400)
    ended = [rank.wait(30) for rank in ranks]
    assert [one.code for one in ended] == [2] * world_size
    assert any(f"{shard} has shrunk from {len(whole):,} to 400 bytes" in one.err for one in ended)
    assert not any("Traceback" in one.err for one in ended)
    shard.write_bytes(whole)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = Forked(tmp_path / "0", [*given, "--max_steps", max(steps(run)) + 2, "--checkpoint", "latest"]).wait()
    assert again.code == 0 and "resumed from" in again.out, again.err
