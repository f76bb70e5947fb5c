"""How is a call of somebody else's code stopped, a reward function or a chat template, that takes too long or too much memory?

Lowest layer, beside errors.py.
"""

import contextlib
import ctypes
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class CallTimeout(Exception):
    """A call took longer than it may."""


class _TimeUp(BaseException):
    """What is raised in the call; not an Exception, so that a function's `except Exception` does not take it."""


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """function(), or CallTimeout when it took longer than `seconds` of wall-clock time.

    It runs in the calling thread, whichever that is, so what it may do in the main thread it still may. A watching thread
    makes CPython raise an exception in it at the next bytecode, again every second until it ends: that stops Python code,
    while one call into C (a sleep, a read from the network) is only stopped when it comes back.
    """
    caller = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    # locks, and no Events, while something may be raised: between two bytecodes of an Event it would leave that locked
    raising, begun, ended = threading.Lock(), threading.Lock(), threading.Event()
    over = interrupted = False

    def watch() -> None:
        nonlocal interrupted
        begun.acquire()
        pause = seconds
        while not ended.wait(pause):
            with raising:
                if not over:
                    interrupted = True
                    raise_in(caller, ctypes.py_object(_TimeUp))
            pause = 1.0

    begun.acquire()
    threading.Thread(target=watch, daemon=True).start()
    try:
        try:
            begun.release()
            result = function()
        finally:
            over = True  # from here on nothing more is raised
            with raising:  # unless the watching thread was about to: what is pending is forgotten
                raise_in(caller, None)
    except _TimeUp:
        pass
    finally:
        ended.set()
    if interrupted:
        raise CallTimeout
    return result


@contextlib.contextmanager
def memory_within(num_bytes: int) -> Iterator[None]:
    """Inside, MemoryError where this process would come to hold more than `num_bytes` beyond what it holds now.

    On Linux, through the limit on the address space, which is the whole process's: keep what is inside short. Elsewhere,
    and where the process has a tighter limit of its own, nothing is changed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes + _address_space() if sys.platform == "linux" else resource.RLIM_INFINITY
    if limit == resource.RLIM_INFINITY or any(0 <= known < limit for known in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
