"""How does a test run a function on several ranks? By forking this process, which has imported torch already.

A two-rank test costs a tenth of a second this way, and ten seconds or more under torchrun. The ranks meet through a
file (no port to collide on) and talk over gloo.
"""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(function: Callable, world_size: int, *args, timeout: float = 120.0) -> list:
    """What `function(rank, world_size, *args)` returns on each rank, in order; each runs in its own process.

    Results are pickled: return numbers, bytes or arrays rather than tensors. Raises RuntimeError with the traceback of
    the first rank that failed, or when one died or `timeout` seconds are up; no process is left behind.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_run_rank, args=(function, rank, world_size, store, answers, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results = _collect(processes, answers, timeout)
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _collect(processes: list, answers, timeout: float) -> dict[int, object]:
    """Wait for one answer of each rank."""
    results: dict[int, object] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(processes):
        # Looked at before the queue: what a process put there before it ended is then certainly seen.
        dead = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        try:
            rank, failure, value = answers.get(timeout=0.5)
        except queue.Empty:
            if missing := [rank for rank in dead if rank not in results]:
                code = processes[missing[0]].exitcode
                raise RuntimeError(f"rank {missing[0]} died with exit code {code}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks {sorted(set(range(len(processes))) - set(results))} hang") from None
            continue
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed:\n{failure}")
        results[rank] = value
    return results


def _run_rank(function: Callable, rank: int, world_size: int, store: Path, answers, args: tuple) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        answers.put((rank, None, function(rank, world_size, *args)))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
