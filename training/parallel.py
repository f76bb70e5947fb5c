"""How is the finished model wrapped for several ranks, and how do these end a step together?

The order in which a finished model is changed is fixed here: compile in place, then DDP.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ranks import Ranks


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


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, a backward pass averages gradients over the ranks only if `enabled`: once a step, not once a micro-batch."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def settle_gradient_buckets(model: nn.Module, backward: Callable[[], object]) -> None:
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

    def received_by_any(self, ranks: Ranks) -> signal.Signals:
        """`agreed`, after a run that ended early: a signal is all that ends one without an error."""
        received = self.agreed(ranks)
        assert received is not None
        return received
