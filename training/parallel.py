"""How do several processes train one model? What each rank is, how the finished model is wrapped, how they agree.

The order in which a finished model is changed is fixed here: compile in place, then DDP.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from errors import UserError

_TIMEOUT = timedelta(minutes=30)  # the first step of a large compiled model can take minutes on the slowest rank


@dataclass(frozen=True)
class Ranks:
    """This process among all: its global number, how many there are, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks of host numbers, in float64 on the CPU: no device has to wait for it."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()


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


def prepare_model(model: nn.Module, ranks: Ranks, *, compile_model: bool) -> nn.Module:
    """The finished model, compiled in place (so that parameter names stay) and wrapped in DDP when there are ranks."""
    if compile_model:
        model.compile()
    if ranks.world_size == 1:
        return model
    # gradients live in DDP's buckets, which saves a copy of them; buffers (4-bit weights) never change
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, a backward pass averages gradients over the ranks only if `enabled`: once a step, not once a micro-batch."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def settle_gradient_buckets(model: nn.Module, backward: Callable[[], None]) -> None:
    """Let DDP finish arranging its gradient buckets before the first step.

    DDP regroups its buckets after the first backward pass, which changes the order in which three or more ranks are
    summed. Without two throw-away passes at every start, a resumed run's first step would differ in the last bit. What they
    draw is drawn again by the first step.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices)):
            for _ in range(2):
                backward()
        model.zero_grad(set_to_none=True)


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1 (a scheduler's warning): the loop finishes its step, saves and leaves.

    A second signal leaves at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # os.write, not print: a handler may interrupt a print that holds the stream's lock
        os.write(sys.stderr.fileno(), f"\n{self.signal.name}: finishing this step, then saving\n".encode())

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any rank received, the same one on all of them; None without one. Every rank calls it."""
        received = ranks.sum([float(self.signal or 0) * (rank == ranks.rank) for rank in range(ranks.world_size)])
        return signal.Signals(int(max(received))) if any(received) else None


def _die_with_parent() -> None:
    """On Linux, get SIGTERM when torchrun dies: a killed torchrun otherwise leaves its workers training on as orphans."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
