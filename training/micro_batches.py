"""How many sequences go through the model at once, and what is done where they do not fit into memory? (--micro_batch_size)

`auto` takes the fewest micro-batches that the plan says fit into the memory that is free, and tries the heaviest one before
step 1. Where a forward or backward pass runs out of memory, in the trial or in any step, what it left is dropped, and the
same samples are cut into micro-batches of half the size, on all ranks alike: the batch, and so the result, stays the same.

Ranks must agree on that at a moment when none of them waits for the others' gradients. So with `auto` DDP does not average
gradients within the last backward pass: each rank goes through all of its micro-batches, all say whether they could, and
then gradients are averaged. Where a size is given, several ranks keep DDP's way, which is faster, and end where memory does
not suffice; so do ranks that share a model, whose passes are common ones, and rollouts, whose answers are drawn already.
"""

import gc
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from batches.micro_batch import MicroBatch
from errors import UserError, is_out_of_memory
from ranks import Ranks
from training.config import TrainConfig
from training.metrics import Metrics, RunLog
from training.option import AUTO, Size
from training.plan import RunPlan

_MARGINS = {"cuda": 0.9, "cpu": 0.8}  # of what is free: the plan is an estimate, and leaves some things out
_TOGETHER = 2**23  # gradients that are averaged at once: so many values, or one tensor


class FittedRun(Protocol):
    """What is used here of train.py's Run. micro_batch_size: of now. fits_itself: see `fits_itself`."""

    config: TrainConfig
    plan: RunPlan
    ranks: Ranks
    log: RunLog
    stage: Any
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int
    samples: int
    micro_batch_size: int
    is_auto: bool

    def backward(self, micro_batches: list[MicroBatch], total_weight: float) -> Metrics: ...


# ------------------------------------------------------------------------------------------------------------ the size


def settle_size(
    config: TrainConfig, origins: dict[str, str], saved: dict[str, Any], plan_with: Callable[[TrainConfig], RunPlan],
    ranks: Ranks,
) -> tuple[TrainConfig, int, bool]:  # fmt: skip
    """(the options with a number for `auto`, the size to begin with, whether it was found by itself); origins say how.

    saved: the checkpoint that is gone on from, whose size a run keeps that is given no number.
    """
    if config.micro_batch_size is AUTO and saved.get(
        "micro_batch_is_auto"
    ):  # the same command goes on: so must its bits
        config = replace(config, micro_batch_size=saved["options"]["micro_batch_size"])
        origins["micro_batch_size"] = "checkpoint"
    if config.micro_batch_size is AUTO:
        free = -ranks.largest(-free_bytes(ranks.device))
        config, share = fitted(config, plan_with, ranks.world_size, free)
        origins["micro_batch_size"] = f"auto: found {config.micro_batch_size}, {share:.0%} of the memory"
        return config, plan_with(config).micro_batch_size, True
    size = plan_with(config).micro_batch_size
    if origins["micro_batch_size"] not in ("checkpoint", "default"):
        return config, size, False
    return config, min(size, saved.get("micro_batch_size", size)), saved.get("micro_batch_is_auto", False)


def fitted(
    config: TrainConfig, plan_with: Callable[[TrainConfig], RunPlan], world_size: int, free: float
) -> tuple[TrainConfig, float]:
    """(the options with the size of the fewest micro-batches that fit into `free` bytes, the share of them that they take)."""
    rows = -(-config.batch_size // world_size)
    sizes = sorted({-(-rows // count) for count in range(1, rows + 1)}, reverse=True)
    low, high = 0, len(sizes) - 1  # the first that fits; the last where none does, which the trial then says
    while low < high:
        middle = (low + high) // 2
        fits = plan_with(replace(config, micro_batch_size=Size(sizes[middle]))).memory_total <= free
        low, high = (low, middle) if fits else (middle + 1, high)
    config = replace(config, micro_batch_size=Size(sizes[low]))
    return config, plan_with(config).memory_total / max(free, 1)


def free_bytes(device: torch.device) -> int:
    """What a run may take: of the device's free memory, or of the machine's or its cgroup's, by each rank there; a margin off."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _MARGINS["cuda"])
    sizes = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if (described := _number("/proc/meminfo", "MemAvailable:")) is not None:
        sizes = [1024 * described]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        sizes += [] if most is None or now is None else [max(0, most - now)]
    most, now = resource.getrlimit(resource.RLIMIT_AS)[0], _number("/proc/self/status", "VmSize:")
    sizes += [] if most == resource.RLIM_INFINITY or now is None else [max(0, most - 1024 * now)]
    return int(min(sizes) * _MARGINS["cpu"] / int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))))


def _number(path: str, name: str = "") -> int | None:
    """The number behind `name` in a file, or None where there is no such file or number, as with "max"."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    words = (text.partition(name)[2] if name else text).split()
    return int(words[0]) if words and words[0].isdigit() else None


# ------------------------------------------------------------------------------------------------------------ the run


def halves(run: FittedRun) -> bool:
    """Whether micro-batches that do not fit are cut in two, rather than ending the run."""
    if run.config.stage in ("grpo", "ppo") or run.ranks.sharing > 1:
        return False
    return run.ranks.world_size == 1 or defers_sync(run)


def defers_sync(run: FittedRun) -> bool:
    """Whether gradients are averaged after the backward passes, and not within the last one."""
    return run.is_auto and run.ranks.world_size > 1


def tried(run: FittedRun, first: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of the first step, cut anew where the heaviest of them does not fit beside what is still to come.

    A size that was given is not tried: the first step does.
    """
    if not run.is_auto:
        return first
    stage = run.stage
    new_state = sum(size for part, size in run.plan.memory.items() if "optimizer state" in part)
    state = 0 if any(optimizer.state for optimizer in run.optimizers) else int(new_state)
    with torch.random.fork_rng(devices=[run.ranks.device] if run.ranks.device.type == "cuda" else []):
        backward_that_fits(run, first, total_weight=1.0, beside=state, trial=True)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return first if run.stage is stage else next(run.stage.batches(run.samples))


def backward_that_fits(
    run: FittedRun, micro_batches: list[MicroBatch], total_weight: float, *, beside: int = 0, trial: bool = False
) -> Metrics:
    """run.backward, and, where memory does not suffice and the run may, again with the same samples in smaller micro-batches.

    beside: bytes that must be free at the same time. trial: of the heaviest micro-batch alone, without averaging.
    """
    if not halves(run):
        return run.backward(micro_batches, total_weight)
    while True:
        heaviest = max(micro_batches, key=lambda batch: batch.input_ids.numel())
        metrics, failed = _attempt(run, [heaviest] if trial else micro_batches, total_weight, beside)
        if not run.ranks.sum([float(failed)])[0]:
            break
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if run.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        _halve(run)
        micro_batches = next(run.stage.batches(run.samples))
    if defers_sync(run) and not trial:
        average_gradients(run.model, run.ranks)
    return metrics


def _attempt(
    run: FittedRun, micro_batches: list[MicroBatch], total_weight: float, beside: int
) -> tuple[Metrics, bool]:  # fmt: skip
    """(what run.backward gives, whether memory did not suffice). Nothing of a failed pass is held when this returns."""
    try:
        taken = torch.empty(beside, dtype=torch.uint8, device=run.ranks.device)
        metrics = run.backward(micro_batches, total_weight)
        del taken
        return metrics, False
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {}, True


def _halve(run: FittedRun) -> None:
    size = run.micro_batch_size
    if size == 1:
        raise UserError(
            f"{run.ranks.device} ran out of memory at step {run.step} with micro-batches of 1: choose "
            "--activation_checkpointing full, a shorter --max_length or a smaller model"
        )
    run.micro_batch_size = -(-size // 2)
    run.stage = with_size(run.stage, run.micro_batch_size)
    run.log.event(
        run.step, "alert",
        f"step {run.step:,}: out of memory with micro-batches of {size}; from here on they are of {run.micro_batch_size}, "
        "and the batch is the same",
    )  # fmt: skip


def with_size(stage: Any, size: int) -> Any:
    """The stage with micro-batches of another size."""
    if hasattr(stage, "feed"):
        return replace(stage, feed=replace(stage.feed, micro_batch_size=size))
    return replace(stage, micro_batch_size=size)


@torch.no_grad()
def average_gradients(model: nn.Module, ranks: Ranks) -> None:
    """As DDP does it, in an order of its own: the mean over ranks of each parameter's gradient; where one has none, zeros."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    group: list[torch.Tensor] = []
    for number, parameter in enumerate(learning, start=1):
        assert parameter.grad is not None
        group.append(parameter.grad)
        if sum(gradient.numel() for gradient in group) < _TOGETHER and number < len(learning):
            continue
        flat = torch.cat([gradient.flatten() for gradient in group]).div_(ranks.world_size)
        dist.all_reduce(flat)
        for gradient, part in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
        group = []
