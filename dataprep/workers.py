"""How are the tasks of a plan run on several processes, so that a killed one is noticed at once?

Processes are spawned, not forked (the thread pool of `tokenizers` does not survive a fork). Through their pipes go task
numbers and progress, never tokens. A worker whose parent is gone ends itself.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataprep.encoding import Encoder
from dataprep.tasks import Plan, done_mark, run_task
from dataprep.tokenizers import load_tokenizer
from errors import UserError, explain_os_error

_REPORT_SECONDS = 0.3


@dataclass(frozen=True)
class Job:
    """What a worker needs besides the plan."""

    state: Path
    tokenizer_folder: Path
    engine: str
    dtype: str


def run_tasks(job: Job, plan: Plan, num_workers: int, report: Callable[[int, int], None]) -> None:
    """Do every task that has no done mark. `report(task, bytes)` is called as work goes on.

    UserError when a worker is killed, naming it and what it was reading, or when it meets a mistake of the user's.
    """
    todo = [task for task in range(len(plan.tasks)) if not done_mark(job.state, task).exists()]
    if not todo:
        return
    if num_workers == 1 or len(todo) == 1:
        run = _prepare(job, plan)
        for task in todo:
            run(task, partial(report, task))
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}
    doing: dict[Any, int] = {}
    try:
        for _ in range(min(num_workers, len(todo))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(job, plan, theirs), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        queue = list(reversed(todo))
        while workers:
            connection: Any
            for connection in multiprocessing.connection.wait(list(workers)):
                try:
                    message, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    _explain_death(workers[connection], plan, doing.get(connection))
                if message == "ready":
                    if connection in doing:
                        report(doing[connection], plan.task_bytes(doing.pop(connection)))
                    if not queue:
                        connection.send(None)
                        workers.pop(connection).join()
                        continue
                    doing[connection] = queue.pop()
                    connection.send(doing[connection])
                elif message == "progress":
                    report(doing[connection], value)
                elif message == "user error":
                    raise UserError(value)
                else:
                    raise RuntimeError(f"a worker failed:\n{value}")
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _explain_death(process: Any, plan: Plan, task: int | None) -> None:
    process.join()
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
    reading = "before its first task"
    if task is not None:
        first, last = (plan.files[plan.tasks[task][index].file].path for index in (0, -1))
        reading = f"while reading {first}" + (f" … {last}" if first != last else "")
    hint = "; if memory ran out, use fewer --num_workers" if code == -signal.SIGKILL else ""
    raise UserError(f"worker process {process.pid} {how} {reading}{hint}; run the same command again to continue")


def _prepare(job: Job, plan: Plan) -> Callable[[int, Callable[[int], None]], None]:
    tokenizer = load_tokenizer(job.tokenizer_folder, lazy=True)
    encoder = Encoder(tokenizer, job.engine)

    def run(task: int, report: Callable[[int], None]) -> None:
        run_task(plan, job.state, task, encoder, tokenizer, job.dtype, report)

    return run


def _worker(job: Job, plan: Plan, connection: Any) -> None:
    """The main function of a worker process: ask for a task, do it, until there is none."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core; threads inside would only get in the way
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run = _prepare(job, plan)
        reported = time.monotonic()

        def report(size: int) -> None:
            nonlocal reported
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                connection.send(("progress", size))

        connection.send(("ready", None))
        while (task := connection.recv()) is not None:
            run(task, report)
            connection.send(("ready", None))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except UserError as error:
        connection.send(("user error", str(error)))
    except OSError as error:
        sentence = explain_os_error(error)
        connection.send(("user error", sentence) if sentence else ("failure", traceback.format_exc()))
    except Exception:
        connection.send(("failure", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
