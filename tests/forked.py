"""How do tests run train.py in a process that they can kill, and that starts at once?"""

import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import train
from errors import run_script
from tests.processes import new_process


@dataclass
class Ended:
    """Exit code and what the process wrote."""

    code: int
    out: str
    err: str


class Forked:
    """`train.py WORDS` in a process of its own, with its output in files."""

    def __init__(self, folder: Path, words: list[object], **environment: str):
        folder.mkdir(exist_ok=True)
        self._streams = folder / "stdout", folder / "stderr"
        self._process = new_process(_run, self._streams, [str(word) for word in words], environment)
        self._process.start()

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = 120) -> Ended:
        self._process.join(seconds)
        assert self._process.exitcode is not None, "the run hangs"
        code = self._process.exitcode
        return Ended(code, *(path.read_text() for path in self._streams))


def _run(streams: tuple[Path, Path], words: list[str], environment: dict[str, str]) -> None:
    sys.stdout, sys.stderr = (open(path, "w", buffering=1) for path in streams)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)  # to which a signal handler writes
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environment)
    run_script(lambda: train.main(words))


def start_ranks(folder: Path, *words: object, world_size: int = 2, **environment: str) -> list[Forked]:
    """One process a rank, as a launcher starts them; `environment` adds to what it says, or says it otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [
        Forked(folder / str(rank), list(words), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world_size)
    ]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.005)
