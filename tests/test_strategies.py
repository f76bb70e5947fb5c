"""Is it all the same to a run how its ranks hold the model: to what it learns, to its checkpoints, and to who goes on from them?

That a step has the same loss and gradients, in every stage, is in stages/test_every_stage.py. Here whole runs are compared,
by train.py's own loop.
"""

import importlib.util
import json
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that
from safetensors.numpy import load_file

from arguments import ArgumentParser
from errors import UserError
from ranks import Ranks
from sharding import is_part
from tests.ranks import run_ranks
from tests.tiers import grid
from train import Run, build_run, loop
from training.config import add_options
from training.parallel import StopRequest
from training.run_files import read_history

CPU = torch.device("cpu")
SIZES = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 6 --learning_rate 3e-3 --log_interval 1 --device cpu"
)
WAYS = {
    "one rank": (1, ""),
    "ddp": (2, ""),
    "context": (2, "--context_parallel 2"),
    "contexts": (4, "--context_parallel 2 --strategy fsdp"),
    "tensor": (2, "--tensor_parallel 2"),
    "tensors": (4, "--tensor_parallel 2 --micro_batch_size 2"),
    "tensors of fsdp": (4, "--tensor_parallel 2 --strategy fsdp"),
    "tensors of contexts": (4, "--tensor_parallel 2 --context_parallel 2"),
    "fsdp": (2, "--strategy fsdp --micro_batch_size 2"),
    "fsdp of 3": (3, "--strategy fsdp --no-reshard_after_forward"),
    "two copies": (4, "--strategy fsdp --shard_size 2"),
    "offloaded": (2, "--strategy fsdp --offload all"),
    # with what else acts on a step or a checkpoint
    "ddp, guarded": (2, "--spike_guard 6 --async_checkpoint"),
    "fsdp, guarded": (2, "--strategy fsdp --spike_guard 6 --async_checkpoint --activation_checkpointing full"),
    "tensor, guarded": (2, "--tensor_parallel 2 --spike_guard 6 --async_checkpoint --activation_checkpointing full"),
    "context, guarded": (2, "--context_parallel 2 --spike_guard 6 --activation_checkpointing selective"),
}


# a checkpoint's options go with it, so who goes on from it says what it does not share
NOT_SHARED = "--context_parallel 1 --tensor_parallel 1"


def build(rank: int, world_size: int, words: str, save_dir: Path) -> Run:
    save_dir.mkdir(exist_ok=True, parents=True)
    parser = ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args([*words.split(), "--save_dir", str(save_dir)]))
    return build_run(given, Ranks(rank, world_size, CPU), None)


def trained(rank: int, world_size: int, words: str, save_dir: Path) -> None:
    run = build(rank, world_size, words, save_dir)
    loop(run, StopRequest())
    run.log.close()


def losses(save_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_history(save_dir).train}


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name}: {name}": array for file in files for name, array in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> tuple[str, Path]:
    """The flags of a run with Muon and AdamW, and where one rank made six steps of it, with a checkpoint in the middle."""
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 6 --eval_interval 3"
    save_dir = tmp_path_factory.mktemp("whole")
    run_ranks(trained, 1, words, save_dir)
    return words, save_dir


@pytest.mark.parametrize("way", grid([way for way in WAYS if way != "one rank"], ["fsdp", "tensors of fsdp"]))
def test_a_run_learns_the_same_and_leaves_the_same_files(way, whole, tmp_path):
    words, reference = whole
    world_size, flags = WAYS[way]
    run_ranks(trained, world_size, f"{words} {NOT_SHARED} {flags}", tmp_path)
    expected = losses(reference)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5) and len(expected) == 6
    for step in (3, 6):
        found, wanted = (tensors(folder / f"checkpoint_step_{step}") for folder in (tmp_path, reference))
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert np.abs(found[name] - array).max() <= 1e-5 + 1e-3 * np.abs(array).max(), name
    sizes = [
        {file.name: file.stat().st_size for file in (folder / "checkpoint_step_6").glob("*.safetensors")}
        for folder in (tmp_path, reference)
    ]
    assert sizes[0] == sizes[1], "the same bytes but for the values"


PAIRS = [(writer, reader) for writer in WAYS for reader in WAYS if "fsdp" in (writer, reader) or writer == reader]
PAIRS += [
    ("contexts", "one rank"),
    ("tensors", "tensors"),
    ("tensors of contexts", "tensor"),
    ("tensors of fsdp", "ddp"),
]


@pytest.mark.parametrize(
    ("writer", "reader"),
    grid(PAIRS, [("ddp", "fsdp"), ("tensors of fsdp", "ddp")]),
)
def test_a_checkpoint_of_any_way_goes_on_in_any_other(writer, reader, whole, tmp_path):
    words, reference = whole
    world_size, flags = WAYS[writer]
    run_ranks(trained, world_size, f"{words} {NOT_SHARED} {flags}", tmp_path)
    shutil.rmtree(tmp_path / "checkpoint_step_6")
    world_size, flags = WAYS[reader]
    run_ranks(trained, world_size, f"{words} {NOT_SHARED} {flags} --checkpoint latest", tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-5)


def shares(rank: int, world_size: int, words: str, save_dir: Path) -> tuple[int, int, dict[str, float]]:
    """(bytes of this rank's weights, of its optimizer state after a step, the plan's memory)."""
    run = build(rank, world_size, words, save_dir)
    run.optimizer_step(next(run.stage.batches(0)), 1.0, False)

    def held(values) -> int:
        return sum(one.to_local().nbytes if is_part(one) else one.nbytes for one in values)

    states = [value for one in run.optimizers for state in one.state.values() for value in state.values() if value.ndim]
    return held(run.model.parameters()), held(states), run.plan.memory


def test_each_rank_holds_its_part_as_the_plan_says(tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --optimizer adamw --max_steps 2"
    ((weights, states, _),) = run_ranks(shares, 1, words, tmp_path / "one")
    parts = run_ranks(shares, 2, f"{words} --strategy fsdp", tmp_path / "two")
    assert sum(part[0] for part in parts) == weights and sum(part[1] for part in parts) == states
    split = run_ranks(shares, 2, f"{words} --tensor_parallel 2", tmp_path / "split")
    for of_weights, of_states, plan in parts + split:
        assert plan["weights (fp32)"] == pytest.approx(of_weights, rel=0.02)
        assert plan["optimizer state (fp32)"] == pytest.approx(of_states, rel=0.02)


def saved_twice(rank: int, world_size: int, words: str, save_dir: Path) -> int:
    """Save once without and once with room; returns the failed saves after the first."""
    run = build(rank, world_size, words, save_dir)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run.optimizer_step(next(run.stage.batches(0)), 1.0, False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    run.save(1)
    failed = run.saves.failed
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.save(1)
    return failed


def test_a_full_disk_on_rank_0_costs_one_checkpoint_and_nobody_waits(tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 9 --strategy fsdp"
    assert run_ranks(saved_twice, 2, words, tmp_path) == [1, 1]
    assert [path.name for path in tmp_path.glob("checkpoint_step_*")] == ["checkpoint_step_1"]
    assert not list(tmp_path.glob(".tmp*"))
    alerts = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"alert"' in line]
    assert len(alerts) == 1 and "File too large" in alerts[0]["message"]


def refused(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    with pytest.raises(UserError) as error:
        build(rank, world_size, words, save_dir)
    return str(error.value)


def test_a_group_that_does_not_divide_the_ranks_is_refused(tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 2 --strategy fsdp --shard_size 2"
    assert set(run_ranks(refused, 3, words, tmp_path)) == {"--shard_size 2 does not divide the number of ranks, 3"}


def test_ranks_that_cannot_share_rows_are_refused(tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 2 --context_parallel 2"
    wanted = "--context_parallel 2 does not divide the number of ranks, 3: give what does, or 1"
    assert refused(0, 3, words, tmp_path) == wanted
    wanted = (
        "--attention varlen is not for --context_parallel, whose queries are a part of a row: choose auto, sdpa or flex"
    )
    assert refused(0, 2, f"{words} --attention varlen", tmp_path) == wanted
    words = words.replace("--batch_size 6", "--batch_size 1")
    assert refused(0, 4, words, tmp_path) == "--batch_size 1 is smaller than the number of groups of 2 ranks, 2"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (
            "--optimizer adafactor",
            "--optimizer adafactor is not for --tensor_parallel: choose adamw, muon, lion, sgd, or give 1",
        ),
        ("--ema 0.9", "--ema is not for --tensor_parallel: leave it out, or give 1"),
        (
            "--context_parallel 2",
            "--context_parallel 2 times --tensor_parallel 2 does not divide the number of ranks, 2",
        ),
        ("--num_heads 1", "--tensor_parallel 2 does not divide the model's 1 attention heads: give a number that does"),
        ("--model mixtral", "--tensor_parallel 2 is not for mixtures of experts"),
        ("--model gpt2", "--tensor_parallel 2 is not for a gpt2, which has several matrices in one"),
    ],
)
def test_what_ranks_cannot_share_is_refused(flags, wanted, tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 2 --tensor_parallel 2 {flags}"
    assert refused(0, 2, words, tmp_path).startswith(wanted)


@pytest.mark.parametrize("optimizer", grid(["adamw", "lion", "sgd"], []))
def test_other_optimizers_learn_the_same_in_parts(optimizer, tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --optimizer {optimizer} --max_steps 4 --save_interval 2"
    run_ranks(trained, 1, words, tmp_path / "one")
    run_ranks(trained, 2, f"{words} --strategy fsdp", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint_step_4")
    run_ranks(trained, 2, f"{words} --strategy fsdp --checkpoint latest", tmp_path / "two")
    # lion's step is a sign, which rounding turns over where a gradient is nearly nothing
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("flags", ["--optimizer adafactor", "--optimizer adamw8bit", "--ema 0.9"])
def test_what_needs_whole_tensors_is_refused(flags, tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 2 --strategy fsdp {flags}"
    assert "is not for --strategy fsdp" in refused(0, 1, words, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_asked_for_in_a_sentence(tiny_data, tmp_path, root):
    words = f"--data_dir {tiny_data} {SIZES} --max_steps 2 --deepspeed {root}/configs/deepspeed/zero3.json"
    for said in run_ranks(refused, 2, words, tmp_path):
        assert said.startswith("--strategy deepspeed: ") and "requirements-distributed.txt" in said
