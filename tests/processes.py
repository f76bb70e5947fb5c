"""Where do tests get processes that have imported torch already, seconds sooner than a new interpreter would?

From a server of their own (multiprocessing's "forkserver"), which has imported the project and computed nothing. A fork of
the test process would not do everywhere: once it has run a backward pass, torch with CUDA refuses one in its children.
"""

import multiprocessing
import os
from collections.abc import Callable

import cloudpickle
import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def new_process(function: Callable, *args: object) -> multiprocessing.process.BaseProcess:
    """function(*args) in a process with this one's environment and folder, not yet started. Both may hold closures."""
    work = cloudpickle.dumps((function, args))
    return CONTEXT.Process(target=_run, args=(work, dict(os.environ), os.getcwd()), daemon=True)


def _run(work: bytes, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    function, args = cloudpickle.loads(work)
    function(*args)
