"""Is the micro-batch that is found one that fits, and does a run that runs out of memory learn what it would have learned?

Memory runs out by a --loss_file that raises what torch raises for it, or, in a process of limited address space, by itself.
"""

import ctypes
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that
from safetensors.numpy import load_file

from arguments import ArgumentParser
from errors import UserError, is_out_of_memory
from model_config import ModelConfig
from ranks import Ranks
from tests.ranks import run_ranks
from tests.tiers import grid
from train import build_run, loop
from training.config import TrainConfig, add_options, resolve_config
from training.failures import failures_recorded
from training.micro_batches import fitted, free_bytes
from training.option import AUTO, Size
from training.parallel import StopRequest
from training.plan import plan_run
from training.run_files import read_history

CPU = torch.device("cpu")
SIZES = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 12 --learning_rate 0.1 --log_interval 1 --device cpu "
    "--optimizer sgd --max_steps 6 --save_interval 3 --eval_interval 0 --keep_checkpoints 0"
)
LOSS = """
import os

calls = 0


def full(*_):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: not enough memory: you tried to "
                       "allocate 4398046511104 bytes.")


def loss(model, batch, stage_loss):
    global calls
    calls += 1
    total, metrics = stage_loss(model, batch)
    if calls > {calls} and len(batch.input_ids) > {rows} and os.environ.get("RANK", "0") in "{ranks}":
        {where}
    return total, metrics
"""
IN_FORWARD, IN_BACKWARD = "full()", "total.register_hook(full)"


def trained(rank: int, world_size: int, words: str, save_dir: Path) -> tuple[int, str, str]:
    """(the size of micro-batches at the end, what run.json says of them and of where they are from)."""
    save_dir.mkdir(exist_ok=True, parents=True)
    parser = ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args([*words.split(), "--save_dir", str(save_dir)]))
    run = build_run(given, Ranks(rank, world_size, CPU), None)
    with failures_recorded(run):
        loop(run, StopRequest())
    run.log.close()
    described = json.loads((save_dir / "run.json").read_text()) if rank == 0 else {}
    told = [str(described.get(part, {}).get("micro_batch_size")) for part in ("config", "origins")]
    return run.micro_batch_size, *told


def figures(save_dir: Path) -> tuple[dict[int, float], dict[str, np.ndarray], list[str]]:
    """(losses, weights at the end, what was said of memory)."""
    losses = {row["step"]: row["loss"] for row in read_history(save_dir).train}
    rows = map(json.loads, (save_dir / "metrics.jsonl").read_text().splitlines())
    said = [row["message"] for row in rows if "out of memory" in row.get("message", "")]
    return losses, load_file(save_dir / "checkpoint_step_6" / "model.safetensors"), said


def assert_same(found: Path, expected: Path) -> None:
    (losses, weights, _), (wanted, others, said) = figures(found), figures(expected)
    assert losses == pytest.approx(wanted, rel=1e-6) and len(wanted) == 6 and not said
    assert weights.keys() == others.keys()
    for name, array in others.items():
        assert np.abs(weights[name] - array).max() <= 1e-6, name


def loss_file(tmp_path: Path, *, calls: int = 2, rows: int = 3, ranks: str = "0", where: str = IN_FORWARD) -> str:
    file = tmp_path / "full.py"
    file.write_text(LOSS.format(calls=calls, rows=rows, ranks=ranks, where=where))
    return f"--loss_file {file}:loss"


@pytest.fixture(scope="module")
def small(tiny_data, tmp_path_factory) -> tuple[str, Path]:
    """The flags of a run, and where it was made with micro-batches of 3 from the start."""
    words, save_dir = f"--data_dir {tiny_data} {SIZES}", tmp_path_factory.mktemp("small")
    run_ranks(trained, 1, f"{words} --micro_batch_size 3", save_dir)
    return words, save_dir


@pytest.mark.parametrize("where", grid([IN_FORWARD, IN_BACKWARD], [IN_BACKWARD]))
def test_a_run_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(where, small, tmp_path):
    """From 12 over 6 to 3 rows at step 2, after which it goes on from its checkpoint with 3."""
    words, expected = small
    words = f"{words} {loss_file(tmp_path, where=where)}"
    assert run_ranks(trained, 1, words, tmp_path / "run") == [(3, "None", "default")]
    assert_same(tmp_path / "run", expected)
    said = figures(tmp_path / "run")[2]
    assert [sentence.partition(":")[0] for sentence in said] == ["step 2", "step 2"]
    assert (
        "micro-batches of 12; from here on they are of 6" in said[0] and "of 6; from here on they are of 3" in said[1]
    )
    shutil.rmtree(tmp_path / "run" / "checkpoint_step_6")
    assert run_ranks(trained, 1, f"{words} --checkpoint latest", tmp_path / "run")[0][0] == 3
    assert_same(tmp_path / "run", expected)
    assert len(figures(tmp_path / "run")[2]) == 2


@pytest.mark.parametrize(
    ("where", "calls", "ranks"),
    grid([(IN_FORWARD, 3, "1"), (IN_BACKWARD, 3, "0"), (IN_BACKWARD, 0, "01")], [(IN_FORWARD, 3, "1")]),
)
def test_ranks_agree_on_it_whichever_of_them_is_full(where, calls, ranks, small, tmp_path):
    """With auto, in a step or in the trial before the first: both halve, from 6 rows to 3, and nobody waits."""
    words, expected = small
    words = f"{words} --micro_batch_size auto {loss_file(tmp_path, where=where, calls=calls, ranks=ranks)}"
    results = run_ranks(trained, 2, words, tmp_path / "run")
    assert [size for size, *_ in results] == [3, 3] and results[0][1] == "6"
    assert results[0][2].startswith("auto: found 6, ") and results[0][2].endswith("% of the memory")
    assert_same(tmp_path / "run", expected)
    (said,) = figures(tmp_path / "run")[2]
    assert said.startswith("step 0:" if calls == 0 else "step 2:")
    # the same command goes on with what was found, and ends with the same bits
    before = (tmp_path / "run" / "checkpoint_step_6" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint_step_6")
    resumed = run_ranks(trained, 2, f"{words} --checkpoint latest", tmp_path / "run")
    assert [size for size, *_ in resumed] == [3, 3] and resumed[0][1:] == ("6", "checkpoint")
    assert (tmp_path / "run" / "checkpoint_step_6" / "model.safetensors").read_bytes() == before


def limited(rank: int, world_size: int, words: str, save_dir: Path, room: int) -> tuple[int, str, str]:
    """As `trained`, with so many bytes of address space more than the process has, of which threads take none for themselves."""
    m_arena_max = -8
    ctypes.CDLL(None).mallopt(m_arena_max, 1)
    lines = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) for line in lines if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (1024 * size + room, resource.RLIM_INFINITY))
    return trained(rank, world_size, words, save_dir)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="it takes Linux to know the address space of a process"
)
@pytest.mark.parametrize("auto", grid(["", "--micro_batch_size auto"], []))
def test_so_it_is_where_the_allocator_says_so(auto, tiny_data, tmp_path):
    """768 rows keep some 170 MB of activations, and 216 MB hold them, their gradients and two threads in parts alone."""
    words = (
        f"--data_dir {tiny_data} {SIZES} --batch_size 768 --max_steps 2 --save_interval 2 --keep_checkpoints 1 {auto}"
    )
    ((found, _, _),) = run_ranks(limited, 1, words, tmp_path / "limited", 216 * 2**20)
    assert 1 < found < 768
    run_ranks(trained, 1, words.replace(auto, "") + f" --micro_batch_size {found}", tmp_path / "small")
    losses = [
        {row["step"]: row["loss"] for row in read_history(tmp_path / name).train} for name in ("limited", "small")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 2
    said = (tmp_path / "limited" / "metrics.jsonl").read_text().count("out of memory")
    assert said if not auto else not said


def test_where_one_row_does_not_fit_the_run_ends_with_advice(small, tmp_path):
    words, _ = small
    with pytest.raises(
        RuntimeError, match=r"UserError: cpu ran out of memory at step 2 with micro-batches of 1: choose --acti"
    ):
        run_ranks(trained, 1, f"{words} {loss_file(tmp_path, rows=0)}", tmp_path / "run")


def test_auto_takes_the_fewest_micro_batches_that_the_plan_says_fit():
    """64 rows of a step: 64, 32, 22, 16, 13 … at once, each count of passes with its smallest size."""
    shape = ModelConfig(384, 64, 192, 2, 2, max_position_embeddings=32)
    config = TrainConfig(data_dir=["data"], batch_size=64, micro_batch_size=AUTO)

    def planned(config: TrainConfig):
        return plan_run(config, shape, max_length=32, world_size=1, half_precision=False, train_windows=100)

    def memory(size: int) -> float:
        return planned(TrainConfig(data_dir=["data"], batch_size=64, micro_batch_size=Size(size))).memory_total

    for free, size in ((memory(64), 64), (memory(64) - 1, 32), (memory(32) - 1, 22), (memory(1), 1), (0, 1)):
        found, share = fitted(config, planned, 1, free)
        assert found.micro_batch_size == size and (share == pytest.approx(memory(size) / free) if free else share > 1)
    assert 0 < free_bytes(CPU) < 2**50


def test_what_is_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**46, dtype=torch.uint8)  # more than any machine maps
    assert is_out_of_memory(error.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError("not enough memory"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"strategy": "fsdp"}, "--micro_batch_size auto is not for --strategy fsdp"),
        ({"eval_iter": 2}, "--eval_iter counts micro-batches"),
        (
            {
                "stage": "grpo",
                "init_from": "base",
                "train_data": ["a"],
                "reward_function": ["length=3"],
                "data_dir": [],
            },
            "--micro_batch_size auto is not for --stage grpo",
        ),
        ({"micro_batch_size": Size(0)}, "--micro_batch_size must be positive, or auto, and is 0"),
    ],
)
def test_auto_is_refused_where_it_cannot_be(given, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_config({"data_dir": ["data"], "micro_batch_size": AUTO} | given)
