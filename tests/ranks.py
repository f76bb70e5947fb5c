"""How does a test run a function on several ranks? In processes that have imported torch already.

A two-rank test costs a tenth of a second this way, and ten seconds or more under torchrun. The ranks meet through a
file (no port to collide on) and talk over gloo.
"""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from tests.processes import new_process


def run_ranks(function: Callable, world_size: int, *args, timeout: float = 120.0) -> list:
    """What `function(rank, world_size, *args)` returns on each rank, in order; each runs in its own process.

    Results are pickled: return numbers, bytes or arrays rather than tensors. Raises RuntimeError with the traceback of
    the first rank that failed, or when one died or `timeout` seconds are up; no process is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [new_process(_run_rank, function, rank, world_size, folder, args) for rank in range(world_size)]
        for process in processes:
            process.start()
        try:
            return _collect(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(processes: list, folder: Path, timeout: float) -> list:
    """Wait for one answer of each rank."""
    results: dict[int, object] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(processes):
        for rank in set(range(len(processes))) - set(results):
            # Looked at before the file: what a process wrote before it ended is then certainly seen.
            code, answer = processes[rank].exitcode, folder / f"answer_{rank}"
            if answer.exists():
                failure, results[rank] = pickle.loads(answer.read_bytes())
                if failure is not None:
                    raise RuntimeError(f"rank {rank} failed:\n{failure}")
            elif code is not None:
                raise RuntimeError(f"rank {rank} died with exit code {code}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(set(range(len(processes))) - set(results))} hang")
        time.sleep(0.01)
    for process in processes:
        process.join(10)
    return [results[rank] for rank in range(len(processes))]


def _run_rank(function: Callable, rank: int, world_size: int, folder: Path, args: tuple) -> None:
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
        answer = (None, function(rank, world_size, *args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    unfinished = folder / f"unfinished_{rank}"
    unfinished.write_bytes(pickle.dumps(answer))
    unfinished.rename(folder / f"answer_{rank}")
    if answer[0] is None:
        dist.destroy_process_group()
