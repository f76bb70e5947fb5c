"""How is an array on disk read so that a file that shrinks, vanishes or is replaced is an error with a sentence?

A mapped file that shrinks ends the process that touches it: SIGBUS, which Python cannot catch. Here each piece is read with
pread, which gives fewer bytes instead. A window of 4,096 tokens costs as much either way.

No more than MAX_OPEN files are open at a time, however many shards there are. One that is opened again must be the one it
was at first, by size and time of change; one that stays open stays what it was, whatever takes its name.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError

MAX_OPEN = 256
_BLOCK = 256  # items that a search reads at a time


class FileArray:
    """(length,) items of `dtype` from byte `offset` of a file on (length None: all of them), of which pieces are read.

    An index or a slice gives what NumPy would, as a copy: a scalar, or an array. UserError where the file is no more what it
    was when this was made.
    """

    def __init__(self, path: Path, dtype: Any, offset: int = 0, length: int | None = None) -> None:
        self.path, self.dtype, self._offset = path, np.dtype(dtype), offset
        status = os.stat(path)
        self._known = status.st_size, status.st_mtime_ns
        self._length = (status.st_size - offset) // self.itemsize if length is None else length

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(self._length)
            return self._read(start, max(0, stop - start))[::step]
        if place < 0:
            place += self._length
        if not 0 <= place < self._length:
            raise IndexError(place)
        return self._read(place, 1)[0]

    def _read(self, first: int, count: int) -> np.ndarray:
        at, missing = self._offset + first * self.itemsize, count * self.itemsize
        try:
            file = _opened(self.path, *self._known)
            data = os.pread(file.number, missing, at)
            while len(data) < missing:  # the system gives no more than 2 GB at a time
                more = os.pread(file.number, missing - len(data), at + len(data))
                if not more:
                    size = os.fstat(file.number).st_size
                    raise _changed(f"{self.path} has shrunk from {self._known[0]:,} to {size:,} bytes")
                data += more
        except OSError as error:
            raise _changed(f"{self.path} cannot be read any more ({error.strerror})") from error
        return np.frombuffer(data, self.dtype)


def count_up_to(ascending: FileArray, value: int) -> int:
    """How many items are at most `value`: bisect_right, in two or three reads where items are about evenly spaced."""
    low, high = 0, len(ascending)  # the answer is in [low, high]
    if high <= _BLOCK:
        return int(np.searchsorted(ascending[:], value, side="right"))
    below, above = int(ascending[0]), int(ascending[high - 1])  # the items at low - 1 and at high, or beside them
    by_value = True
    while high - low > _BLOCK:
        # where a straight line would be, and the middle each second time, as no corpus has to be even
        share = (value - below) / (above - below) if by_value and above > below else 0.5
        start = min(max(low + int(share * (high - low)) - _BLOCK // 2, low), high - _BLOCK)
        block = ascending[start : start + _BLOCK]
        if block[0] > value:
            high, above = start, int(block[0])
        elif block[-1] <= value:
            low, below = start + _BLOCK, int(block[-1])
        else:
            return start + int(np.searchsorted(block, value, side="right"))
        by_value = not by_value
    return low + int(np.searchsorted(ascending[low:high], value, side="right"))


class _OpenFile:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here: `os` may be gone at the very end
        close(self.number)


@lru_cache(maxsize=MAX_OPEN)
def _opened(path: Path, size: int, changed: int) -> _OpenFile:
    file = _OpenFile(os.open(path, os.O_RDONLY))
    status = os.fstat(file.number)
    if (status.st_size, status.st_mtime_ns) != (size, changed):
        raise _changed(f"{path} was replaced or written to: it has {status.st_size:,} bytes, and had {size:,}")
    return file


def _changed(what: str) -> UserError:
    return UserError(f"{what} while it was in use; put back the data as it was, and go on with --checkpoint latest")
