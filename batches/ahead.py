"""How are batches ready before a step needs them? Made by a thread, a few steps ahead.

What a step learns is a pure function of the run's position, so making it early changes nothing but the time.
"""

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import torch

from batches.micro_batch import MicroBatch

Step = list[MicroBatch]


def made_ahead(steps: Iterator[Step], device: torch.device, depth: int = 2) -> Iterator[Step]:
    """The same steps, of which a thread makes up to `depth` ahead; for CUDA they come in pinned memory.

    What making one raises is raised where it would be used. The thread ends with the iterator, or when that is closed.
    """
    made: SimpleQueue[tuple[Step, BaseException | None]] = SimpleQueue()
    room, closed = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else pinning would open a context on the first GPU
        while room.acquire() and not closed.is_set():
            try:
                step = next(steps)
                made.put(([batch.pinned() for batch in step] if device.type == "cuda" else step, None))
            except BaseException as error:
                made.put(([], error))
                return

    threading.Thread(target=work, name="batches", daemon=True).start()
    try:
        while True:
            step, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield step
    finally:
        closed.set()
        room.release()
