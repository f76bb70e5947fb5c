"""How is a checkpoint written while training goes on? From a copy in host memory, by a thread.

The copy is all that the loop waits for. Where ranks hold parts of the model, they are put together while it is made, so the
thread speaks to no other rank.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

from checkpointing.save_folder import from_rank_0
from sharding import whole

T = TypeVar("T")
_ALIGNMENT = 64  # bytes, a multiple of every element's size


class HostRoom:
    """Memory of this host for the tensors of one checkpoint, kept for the next: new memory costs six times the copy into it.

    It is pinned, and so filled at full speed, where any of the tensors is on a CUDA device.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copies(self, groups: list[dict[str, Tensor]], keep: bool) -> list[dict[str, Tensor]]:
        """The tensors of some files as they are now, whole, good until the next call; every rank of a sharded model calls it.

        keep: whether this rank wants them; the others only give their parts, and get empty dicts.
        """
        pinned = any(tensor.is_cuda for group in groups for tensor in group.values())
        if keep:
            self._make(sum(_aligned(tensor) for group in groups for tensor in group.values()), pinned)
        result: list[dict[str, Tensor]] = []
        start = 0
        for group in groups:
            result.append({})
            for name, tensor in group.items():
                values = whole(tensor.detach())
                if keep:
                    place = self._bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                    result[-1][name] = place.copy_(values, non_blocking=pinned)
                    start += _aligned(tensor)
        if pinned:
            torch.cuda.synchronize()
        return result

    def _make(self, size: int, pinned: bool) -> None:
        if self._bytes.nbytes < size or self._bytes.is_pinned() != pinned:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # given back before the new one is asked for
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


class InFlight(Generic[T]):
    """What a thread of rank 0 does, and the other ranks wait for or not. `work` is None on them."""

    def __init__(self, work: Callable[[], T] | None) -> None:
        self._future: Future[T] | None = None
        if work is not None:
            pool = ThreadPoolExecutor(1, "checkpoint")
            self._future = pool.submit(work)
            pool.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """On rank 0 whether the thread is through; False on the others, who hear it from rank 0."""
        return self._future is not None and self._future.done()

    def wait_alone(self) -> T | None:
        """What came of it, on rank 0; None on the others. No rank waits for another."""
        return None if self._future is None else self._future.result()

    def result(self) -> T:
        """What came of it, on every rank. Every rank calls it and waits."""
        return from_rank_0(self.wait_alone)
