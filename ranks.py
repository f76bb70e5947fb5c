"""How do several processes work as one? What each of them is, on which device, how they begin, add up and leave together."""

import ctypes
import os
import secrets
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from errors import UserError

_moves = 0


def move_on() -> None:
    """Say that the main thread gets on, in a loop that may be found at one and the same line each time it is looked at."""
    global _moves
    _moves += 1


def moves() -> int:
    """How often `move_on` was called."""
    return _moves


@dataclass(frozen=True)
class Ranks:
    """This process among all: its global number, how many there are, and the device it computes on.

    sharing: how many ranks, neighbours, work on each micro-batch together (context and tensor parallelism). Whoever divides
    samples, or adds up what was found of them, does so as `data` says; whoever means processes, as in drawing answers, in
    agreeing on a signal and in what a user's hooks see, does without. Each of those that share one has its whole loss, which
    counts once: where gradients are averaged over all ranks, it is times data.world_size that undoes it.
    alike, place: of `data` alone: how many processes are this one rank, and which of them this is.
    restarted: torchrun has started the ranks before; the same on all of them.
    """

    rank: int
    world_size: int
    device: torch.device
    sharing: int = 1
    alike: int = 1
    place: int = 0
    restarted: bool = False

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


def start_ranks(device_name: str, timeout: float) -> Ranks:
    """Join the process group that torchrun (or any launcher that sets its variables) announces, else be alone.

    device_name: "auto", "cpu", "cuda" or "mps". timeout: minutes that ranks wait for one another, and some more: who is
    missing is told first (training/watchdog.py). Raises UserError for a device that is not here.
    """
    patience = timedelta(minutes=1.25 * timeout + 1)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # each machine's torchrun counts what ended on its own: where another one's rank died, this one has restarted nothing
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    device = choose_device(device_name, local_rank)
    if "LOCAL_RANK" in os.environ:
        _die_with_parent()
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, world_size = next(rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            restarted |= rank == 0 and store.add("groundup/starts", 1) > 1
            store = _of_this_start(store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    alone = Ranks(rank, world_size, device)
    return replace(alone, restarted=alone.largest(restarted) > 0)


def _of_this_start(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """What in torchrun's store belongs to this start of the ranks alone. Every rank calls it.

    torchrun keeps one store over all restarts, and gloo, without this, waits there for ranks that are dead
    (pytorch#135712). No number of restarts names a start: on each machine torchrun counts its own. So rank 0 names it, and
    tells every rank that asks; what the dead have asked is answered, too, and read by nobody.
    """
    if rank:
        me = secrets.token_hex(8)
        store.set(f"groundup/asks/{rank}", me)
        name = store.get(f"groundup/answer/{me}").decode()
        store.set(f"groundup/{name}/heard/{rank}", "")
    else:
        name, deaf = secrets.token_hex(8), set(range(1, world_size))
        while deaf:
            for other in deaf:
                asks = store.get(f"groundup/asks/{other}").decode()  # waits for its first
                store.set(f"groundup/answer/{asks}", name)
            deaf = {other for other in deaf if not store.check([f"groundup/{name}/heard/{other}"])}
            time.sleep(0.02 if deaf else 0)
    return dist.PrefixStore(f"groundup/{name}", store)


def lost_rank(error: BaseException) -> str | None:
    """The sentence for an error that another rank's end has caused; None for any other error."""
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    if not by_gloo and not isinstance(error, dist.DistError):
        return None
    reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". This is typically")[0]
    return (
        f"another rank has ended, or does not answer ({reason}): its own output says why; go on with --checkpoint latest, "
        "which torchrun --max-restarts does by itself"
    )


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
