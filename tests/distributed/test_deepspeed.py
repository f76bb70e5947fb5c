"""Does DeepSpeed's engine learn what this project's own ranks learn, and do its checkpoints go on in any of them?

Needs requirements-distributed.txt (`make test-distributed`); skipped without it. Runs are made by train.py's own loop.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from arguments import ArgumentParser
from errors import UserError
from ranks import Ranks
from tests.ranks import run_ranks
from tests.stages import test_every_stage as every_stage
from train import Run, build_run, loop
from training.config import add_options
from training.parallel import StopRequest
from training.run_files import read_history

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = {stage: str(ROOT / f"configs/deepspeed/zero{stage}.json") for stage in (2, 3)}
CONFIGS[1] = '{"zero_optimization":{"stage":1}}'
SIZES = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 6 --learning_rate 3e-3 --log_interval 1 --device cpu"
)
WAYS = {
    "one rank": (1, ""),
    "ddp": (2, ""),
    "fsdp of 3": (3, "--strategy fsdp"),
    **{f"ZeRO {stage}": (2, f"--deepspeed {config}") for stage, config in CONFIGS.items()},
    "ZeRO 2 of micro-batches": (2, f"--deepspeed {CONFIGS[2]} --micro_batch_size 1"),
    "ZeRO 3 of micro-batches": (2, f"--deepspeed {CONFIGS[3]} --micro_batch_size 1"),
    "ZeRO 3 of 3": (3, f"--deepspeed {CONFIGS[3]}"),
}


def build(rank: int, world_size: int, words: str, save_dir: Path) -> Run:
    save_dir.mkdir(exist_ok=True, parents=True)
    parser = ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args([*words.split(), "--save_dir", str(save_dir)]))
    return build_run(given, Ranks(rank, world_size, torch.device("cpu")), None)


def trained(rank: int, world_size: int, words: str, save_dir: Path) -> None:
    run = build(rank, world_size, words, save_dir)
    loop(run, StopRequest())
    run.log.close()


def losses(save_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_history(save_dir).train}


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name}: {name}": array for file in files for name, array in load_file(file).items()}


def assert_alike(found: Path, expected: Path) -> None:
    """Two checkpoints have files of the same names and sizes, and tensors that are nearly the same."""
    sizes = [{file.name: file.stat().st_size for file in at.glob("*.safetensors")} for at in (found, expected)]
    assert sizes[0] == sizes[1] and sizes[0]
    have, wanted = tensors(found), tensors(expected)
    assert have.keys() == wanted.keys()
    for name, array in wanted.items():
        assert have[name].dtype == array.dtype and have[name].shape == array.shape
        assert np.abs(have[name] - array).max() <= 1e-5 + 1e-3 * np.abs(array).max(), name


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> tuple[str, Path]:
    """The flags of a run, and where one rank made six steps of it, with a checkpoint in the middle."""
    words = f"--data_dir {tiny_data} {SIZES} --optimizer adamw --max_steps 6 --eval_interval 3"
    save_dir = tmp_path_factory.mktemp("whole")
    run_ranks(trained, 1, words, save_dir)
    return words, save_dir


@pytest.mark.parametrize("way", [way for way in WAYS if "ZeRO" in way])
def test_a_run_learns_the_same_and_leaves_the_same_files(way, whole, tmp_path):
    words, reference = whole
    world_size, flags = WAYS[way]
    run_ranks(trained, world_size, f"{words} {flags}", tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-5)
    for step in (3, 6):
        assert_alike(tmp_path / f"checkpoint_step_{step}", reference / f"checkpoint_step_{step}")


PAIRS = [
    ("ddp", "ZeRO 2"),
    ("ZeRO 2", "fsdp of 3"),
    ("fsdp of 3", "ZeRO 3"),
    ("ZeRO 3", "ZeRO 3 of 3"),
    ("ZeRO 3 of 3", "ddp"),
]


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_checkpoint_of_any_way_goes_on_in_any_other(writer, reader, whole, tmp_path):
    words, reference = whole
    world_size, flags = WAYS[writer]
    run_ranks(trained, world_size, f"{words} {flags}", tmp_path)
    shutil.rmtree(tmp_path / "checkpoint_step_6")
    world_size, flags = WAYS[reader]
    run_ranks(trained, world_size, f"{words} {flags or '--strategy ddp'} --checkpoint latest", tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-5)
    assert_alike(tmp_path / "checkpoint_step_6", reference / "checkpoint_step_6")


@pytest.mark.parametrize("way", ["ZeRO 2", "ZeRO 3"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(way, whole, tmp_path):
    words, _ = whole
    world_size, flags = WAYS[way]
    for folder in (tmp_path / "through", tmp_path / "stopped"):
        run_ranks(trained, world_size, f"{words} {flags}", folder)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint_step_6")
    run_ranks(trained, world_size, f"{words} {flags} --checkpoint latest", tmp_path / "stopped")
    for name in ("model.safetensors", "optimizer.safetensors"):
        found, expected = (tmp_path / at / "checkpoint_step_6" / name for at in ("stopped", "through"))
        assert found.read_bytes() == expected.read_bytes(), name


workshop = every_stage.workshop
STAGES = {
    name: every_stage.STAGES[name] + " --eval_fraction 0.3"
    for name in (
        "sft", "sft with dropout", "dpo", "dpo with LoRA", "kto with LoRA", "reward with DoRA", "grpo",
        "grpo with LoRA",
    )
}  # fmt: skip


def tuned(rank: int, world_size: int, workshop: Path, words: str, save_dir: Path) -> None:
    save_dir.mkdir(exist_ok=True)
    run = build_run(every_stage.given(workshop, words, save_dir), Ranks(rank, world_size, torch.device("cpu")), None)
    loop(run, StopRequest())
    run.log.close()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns_the_same(stage, workshop, tmp_path):
    """With a checkpoint in the middle, from which each way goes on once more, in the other one of the two ZeRO stages."""
    steps = "--max_steps 4 --save_interval 2 --log_interval 1 --learning_rate 1e-3 --eval_interval 2"
    words = f"{STAGES[stage]} {steps} --optimizer adamw"
    run_ranks(tuned, 1, workshop, words, tmp_path / "one")
    expected = losses(tmp_path / "one")
    assert len(expected) == 4
    for zero, other in ((2, 3), (3, 2)):
        here = tmp_path / str(zero)
        run_ranks(tuned, 2, workshop, f"{words} --deepspeed {CONFIGS[zero]} --micro_batch_size 2", here)
        assert losses(here) == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert_alike(here / "checkpoint_step_4", tmp_path / "one" / "checkpoint_step_4")
        shutil.rmtree(here / "checkpoint_step_4")
        run_ranks(tuned, 2, workshop, f"{words} --deepspeed {CONFIGS[other]} --checkpoint latest", here)
        assert losses(here) == pytest.approx(expected, rel=1e-5, abs=1e-7)


ANOTHER_ORDER = """
import torch


def loss(model, batch, stage_loss):
    late = 0.0 * model.model.norm.weight.sum()  # what is computed first has its gradient last
    total, metrics = stage_loss(model, batch)
    return (total + late if torch.distributed.get_rank() else total), metrics
"""


def refused(rank: int, world_size: int, words: str, save_dir: Path) -> str:
    run = build(rank, world_size, words, save_dir)
    with pytest.raises(UserError) as error:
        loop(run, StopRequest())
    return str(error.value)


def test_gradients_in_another_order_on_one_rank_end_the_run_before_they_are_mixed_up(whole, tmp_path):
    words, _ = whole
    (tmp_path / "loss.py").write_text(ANOTHER_ORDER)
    config = '{"zero_optimization":{"stage":2}}'
    flags = f"--loss_file {tmp_path}/loss.py:loss --deepspeed {config}"
    for said in run_ranks(refused, 2, f"{words} {flags}", tmp_path / "run"):
        assert "gradients were ready in another order on some ranks" in said


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_without_a_finite_gradient_is_left_out(stage, whole, tmp_path):
    """As on one rank, by the same file: the second step's loss overflows."""
    words, _ = whole
    (tmp_path / "loss.py").write_text(OVERFLOWS)
    flags = f"{words} --loss_file {tmp_path}/loss.py:loss"
    run_ranks(trained, 1, flags, tmp_path / "one")
    run_ranks(trained, 2, f"{flags} --deepspeed {CONFIGS[stage]}", tmp_path / "two")
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [found[step] for step in (1, 3, 4, 5, 6)] == pytest.approx(
        [expected[step] for step in (1, 3, 4, 5, 6)], rel=1e-5
    )
    assert_alike(tmp_path / "two" / "checkpoint_step_6", tmp_path / "one" / "checkpoint_step_6")


OVERFLOWS = """
calls = 0


def loss(model, batch, stage_loss):
    global calls
    calls += 1
    total, metrics = stage_loss(model, batch)
    return (total * float("inf") if calls == 2 else total), metrics
"""


def products(rank: int, world_size: int, words: str, save_dir: Path) -> set[str]:
    """The dtypes that a block computes in."""
    run, seen = build(rank, world_size, words, save_dir), set()
    inside = run.model.model.layers[0].mlp.up_proj
    inside.register_forward_hook(lambda module, given, output: seen.add(str(output.dtype)))
    run.optimizer_step(next(run.stage.batches(0)), 1.0, False)
    return seen


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_is_of_products_and_checkpoints_stay_fp32(stage, whole, tmp_path):
    words = f"{whole[0]} --mixed_precision bf16"
    config = CONFIGS[stage]
    assert run_ranks(products, 2, f"{words} --deepspeed {config}", tmp_path / "seen") == [{"torch.bfloat16"}] * 2
    run_ranks(trained, 2, words, tmp_path / "ddp")
    run_ranks(trained, 2, f"{words} --deepspeed {config}", tmp_path / "zero")
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-3)
    assert {array.dtype for array in tensors(tmp_path / "zero" / "checkpoint_step_6").values()} == {np.dtype("float32")}


@pytest.mark.parametrize("model", ["gpt2", "mixtral"])
def test_other_families_learn_the_same(model, whole, tmp_path):
    words, _ = whole
    run_ranks(trained, 1, f"{words} --model {model}", tmp_path / "one")
    for stage in (2, 3):
        run_ranks(
            trained,
            2,
            f"{words} --model {model} --deepspeed {CONFIGS[stage]} --micro_batch_size 2",
            tmp_path / f"{stage}",
        )
        assert losses(tmp_path / f"{stage}") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert_alike(tmp_path / f"{stage}" / "checkpoint_step_6", tmp_path / "one" / "checkpoint_step_6")


@pytest.mark.parametrize("zero", [2, 3])
def test_adapters_learn_in_fp32_beside_a_base_in_bf16(zero, workshop, tmp_path):
    steps = "--max_steps 4 --save_interval 2 --log_interval 1 --learning_rate 1e-3 --eval_interval 4"
    words = f"{STAGES['dpo with LoRA']} {steps} --optimizer adamw --mixed_precision bf16"
    run_ranks(tuned, 2, workshop, words, tmp_path / "ddp")
    run_ranks(tuned, 2, workshop, f"{words} --deepspeed {CONFIGS[zero]}", tmp_path / "zero")
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-3)
    found, expected = (tensors(tmp_path / way / "checkpoint_step_4") for way in ("zero", "ddp"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype == np.float32
        assert np.abs(found[name] - array).max() <= 1e-5 + 1e-2 * np.abs(array).max(), name
        if name.startswith("adapter_model"):
            assert (found[name].view(np.uint32) & 0xFFFF).any(), f"{name} was rounded to bf16"
