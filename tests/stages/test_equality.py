"""How far are the losses of a run apart from those of one rank, whatever the way its ranks share the work?

    python -m pytest -m exhaustive tests/stages/test_equality.py

prints the table of docs/parallel.md: the largest difference of the losses and gradient norms of three steps, as a share of them
where they are above 1. GRPO's first loss is nothing but rounding, as a group's advantages sum to 0; its gradient is not.
"""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.stages.test_every_stage import SHARDED, build, workshop  # noqa: F401 - the fixture
from training.metrics import reduce_metrics

STAGES = ("pretrain", "sft with LoRA", "dpo", "grpo")
WAYS = {
    "micro-batches of 2": (1, "--micro_batch_size 2"),
    "2 DDP": (2, ""),
    "2 FSDP2": (2, "--strategy fsdp"),
    "2 context": (2, "--context_parallel 2"),
    "2 tensor": (2, "--tensor_parallel 2"),
    "2 context x 2 FSDP2": (4, "--context_parallel 2 --strategy fsdp"),
    "2 tensor x 2 FSDP2": (4, "--tensor_parallel 2 --strategy fsdp"),
    "2 tensor x 2 context": (4, "--tensor_parallel 2 --context_parallel 2"),
}


def losses(rank: int, world_size: int, workshop: Path, flags: str, folder: Path) -> dict[str, list[float]]:  # noqa: F811
    """Of the first three steps of each stage, and the norms of their gradients."""
    found = {}
    for stage in STAGES:
        run = build(
            workshop, f"{SHARDED[stage]} --learning_rate 1e-3 {flags}", folder / stage.split()[0], rank, world_size
        )
        found[stage] = []
        for _, micro_batches in zip(range(3), run.stage.batches(0), strict=False):
            sums, norm, _ = run.optimizer_step(micro_batches, 1.0, False)
            found[stage] += [reduce_metrics(sums, run.ranks.data)["loss"], norm.item()]
    return found


@pytest.mark.exhaustive
def test_losses_are_the_same_to_1e_5_whatever_the_way(workshop, tmp_path, capsys):  # noqa: F811
    (wanted,) = run_ranks(losses, 1, workshop, "", tmp_path)
    assert all(len(set(steps)) == 6 for steps in wanted.values())  # something is learned
    table = [f"{'largest difference':<22}" + "".join(f"{stage:>15}" for stage in STAGES)]
    worst = 0.0
    for number, (way, (world_size, flags)) in enumerate(WAYS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = run_ranks(losses, world_size, workshop, flags, folder)
        apart = {
            stage: max(
                abs(a - b) / max(1.0, abs(b)) for one in found for a, b in zip(one[stage], wanted[stage], strict=True)
            )
            for stage in STAGES
        }
        table.append(f"{way:<22}" + "".join(f"{apart[stage]:>15.1e}" for stage in STAGES))
        worst = max(worst, *apart.values())
    with capsys.disabled():
        print("\n" + "\n".join(table))
    assert worst < 1e-5
