"""How do several processes work as one? What each of them is, on which device, how they begin, add up and leave together."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from errors import UserError

_TIMEOUT = timedelta(minutes=30)  # the first step of a large compiled model can take minutes on the slowest rank


@dataclass(frozen=True)
class Ranks:
    """This process among all: its global number, how many there are, and the device it computes on.

    sharing: how many ranks, neighbours, work on each micro-batch together (context and tensor parallelism). Whoever divides
    samples, or adds up what was found of them, does so as `data` says; whoever means processes, as in drawing answers, in
    agreeing on a signal and in what a user's hooks see, does without. Each of those that share one has its whole loss, which
    counts once: where gradients are averaged over all ranks, it is times data.world_size that undoes it.
    alike, place: of `data` alone: how many processes are this one rank, and which of them this is.
    """

    rank: int
    world_size: int
    device: torch.device
    sharing: int = 1
    alike: int = 1
    place: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == self.place == 0

    @property
    def data(self) -> "Ranks":
        """The ranks as samples are divided among them: those that share a micro-batch are one, and what each of them adds to a
        sum, alike, counts once."""
        sharing = self.sharing
        return Ranks(
            self.rank // sharing, self.world_size // sharing, self.device, alike=sharing, place=self.rank % sharing
        )

    def part(self, count: int) -> slice:
        """This rank's contiguous part of `count` things."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks of host numbers, in float64 on the CPU: no device has to wait for it."""
        if self.world_size * self.alike == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.alike).tolist()

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.world_size * self.alike == 1:
            return value
        most = torch.tensor(value)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def start_ranks(device_name: str) -> Ranks:
    """Join the process group that torchrun (or any launcher that sets its variables) announces, else be alone.

    device_name: "auto", "cpu", "cuda" or "mps". Raises UserError for a device that is not here.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(device_name, local_rank)
    if "LOCAL_RANK" in os.environ:
        _die_with_parent()
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    return Ranks(rank, world_size, device)


def stop_ranks(ranks: Ranks, exit_code: int) -> None:
    """Leave the process group together, and, where there is one, end the process with `exit_code`.

    Ranks that leave early would turn the others' shutdown into an error. And a gloo thread that still holds a Python
    object when the interpreter is taken down aborts the process, now and then, after all work is done.
    """
    if ranks.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "mps". Raises UserError when it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; run `python utils.py setup` to see why")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "lower --nproc_per_node"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device cpu")
    return torch.device(name)


def unwrap(model: nn.Module) -> Any:
    """The model inside DDP, or the model itself: of whichever class the caller built."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _die_with_parent() -> None:
    """On Linux, get SIGTERM when torchrun dies: a killed torchrun otherwise leaves its workers training on as orphans."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
