"""How is a run noticed that stands still, and which rank is it that the others wait for?

A thread beside the loop looks at the main one. It stands still while it is at the same micro-batch of the same step, says
nothing of moving on (`ranks.move_on`: batches of an evaluation, tokens of an answer), and every frame of its stack is at the
same instruction; whatever else takes long, such as compiling, moves on in these.
After --timeout minutes of it each rank shows all its threads' stacks, on stderr and in --save_dir/stacks_rank_N.txt, one
sentence names the rank that is waited for, and the process ends, so that torchrun starts the ranks again.

Ranks hear of one another through the process group's store. A rank whose thread is silent there, too, is a process that
is stopped, or a machine that is gone.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from ranks import moves
from training.metrics import write_json
from training.run_files import STATUS_FILE

EXIT_HANGS = 1
_LONGEST_INTERVAL = 5.0  # seconds between looks
_PATIENCE = 1.0  # seconds that ranks have, at least, to say where they stand
_SHOWN_RANKS = 16
_LEFT = -1  # in place of the number of looks: this rank is through


@dataclass(frozen=True)
class Place:
    """Where a rank stands. looks: how often its thread has looked, so that no two of one rank are alike."""

    looks: int
    step: int
    micro_batch: int
    where: str  # the innermost line of the project's own, or of a user's, code
    waits: bool  # inside torch.distributed, so for the others


@contextlib.contextmanager
def watched(run: Any) -> Iterator[None]:
    """Inside, the main thread, which enters this, is looked at. run: train.Run. Every rank enters."""
    watch = _Watch(run, 60.0 * run.config.timeout)
    thread = threading.Thread(target=watch.look_on, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.over.set()
        thread.join()


class _Watch:
    def __init__(self, run: Any, limit: float) -> None:
        self.run, self.limit = run, limit
        self.interval = min(_LONGEST_INTERVAL, limit / 10)
        self.over = threading.Event()
        self.main = threading.get_ident()
        self.rank, self.world_size = run.ranks.rank, run.ranks.world_size
        self.looks, self.still = 0, 0.0
        self.store: dist.Store | None = None
        if self.world_size > 1:
            # a connection of its own: the main thread may hold the other one while it waits
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self.store = dist.PrefixStore(f"watchdog/{run.config.save_dir}", store)
            self.store.set_timeout(timedelta(seconds=max(_PATIENCE, 2 * self.interval)))

    def look_on(self) -> None:
        before, last = None, time.monotonic()
        self._tell(self._look()[1])
        while not self.over.wait(self.interval):
            now = time.monotonic()
            # a gap in which this thread did not run either was one of the whole process: Ctrl-Z, a suspended machine
            passed, last = min(now - last, 3 * self.interval), now
            here, place = self._look()
            self.still = self.still + passed if here == before else 0.0
            before = here
            alarm = self._tell(place)
            if self.still >= self.limit or alarm:
                self._end(first=not alarm)
        if self.store is not None:  # else who is still at work would take its silence for a stop
            with contextlib.suppress(RuntimeError):
                self.store.set(
                    f"place/{self.rank}", json.dumps(asdict(replace(self._look()[1], looks=_LEFT, waits=True)))
                )

    def _look(self) -> tuple[object, Place]:
        """(what changes whenever the main thread moves on, where it stands). No frame outlives the call, as it would keep the
        tensors alive that it holds."""
        frames = []
        frame: FrameType | None = sys._current_frames()[self.main]
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        here = self.run.step, self.run.micro_batch, moves(), [(id(frame), frame.f_lasti) for frame in frames]
        files = [frame.f_code.co_filename for frame in frames]
        own = next((i for i, file in enumerate(files) if "site-packages" not in file and "/lib/python" not in file), 0)
        where = f"{Path(files[own]).name}:{frames[own].f_lineno} {frames[own].f_code.co_name}"
        waits = any("torch/distributed/" in file for file in files[:own])
        self.looks += 1
        return here, Place(self.looks, self.run.step, self.run.micro_batch, where, waits)

    def _tell(self, place: Place) -> bool:
        """Say where this rank stands; whether any rank has raised the alarm."""
        if self.store is None:
            return False
        with contextlib.suppress(RuntimeError):  # a store that does not answer shows when it is asked who is missing
            self.store.set(f"place/{self.rank}", json.dumps(asdict(place)))
            if self.rank == 0 and self.looks == 1:
                self.store.set("alarm", "")
            return self.store.get("alarm") != b""
        return False

    def _end(self, first: bool) -> None:
        """Show the stacks; the one who raised the alarm also names the rank that is waited for. Ends the process."""
        self._show_stacks()
        if first and self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set("alarm", str(self.rank))
        if first:
            sentence = self._name()
            status = {"state": "failed", "step": self.run.step, "error": sentence}
            write_json(Path(self.run.config.save_dir) / STATUS_FILE, status)
            # os.write: the main thread may stand still with a stream's lock in its hand
            os.write(sys.stderr.fileno(), f"error: {sentence}\n".encode())
        end = time.monotonic() + (0 if first else 2 * self._patience)  # who ends first has torchrun end the others
        while time.monotonic() < end:
            time.sleep(self.interval)
            self._tell(self._look()[1])
        os._exit(EXIT_HANGS)

    def _show_stacks(self) -> None:
        head = f"rank {self.rank} at step {self.run.step}, where it has stood for {self.still:.0f} s:\n".encode()
        os.write(sys.stderr.fileno(), b"\n" + head)
        faulthandler.dump_traceback(sys.stderr.fileno())
        with contextlib.suppress(OSError), open(self._stacks_file(), "wb", buffering=0) as file:
            file.write(head)
            faulthandler.dump_traceback(file)

    def _stacks_file(self) -> Path:
        return Path(self.run.config.save_dir) / f"stacks_rank_{self.rank}.txt"

    @property
    def _patience(self) -> float:
        return max(_PATIENCE, 4 * self.interval)

    def _name(self) -> str:
        """One sentence: who is waited for, as far as can be told, and what to do."""
        advice = (
            f"the stacks are above and in {self.run.config.save_dir}/stacks_rank_*.txt (docs/hangs.md); "
            "go on with --checkpoint latest, with a longer --timeout if this was no fault"
        )
        if self.store is None:
            return f"nothing has moved for {self.still:.0f} s; {advice}"
        try:
            before = self._places()
            time.sleep(self._patience)
            places = self._places()
        except RuntimeError:
            by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            keeper = "torchrun on the first machine" if by_torchrun else "rank 0"
            return f"{keeper}, which keeps the ranks' store, does not answer; {advice}"
        silent = [r for r in range(self.world_size) if r not in places or r not in before or places[r] == before[r]]
        stopped = [r for r in silent if r != self.rank and (r not in places or places[r].looks != _LEFT)]
        return f"{_who(places, stopped)}; {advice}"

    def _places(self) -> dict[int, Place]:
        """Of each rank that has ever said where it stands. RuntimeError where the store does not answer."""
        assert self.store is not None
        found = {self.rank: self.store.get(f"place/{self.rank}")}
        for rank in range(self.world_size):
            with contextlib.suppress(RuntimeError):
                found[rank] = self.store.get(f"place/{rank}")
        return {rank: Place(**json.loads(said)) for rank, said in found.items()}


def _who(places: dict[int, Place], stopped: list[int]) -> str:
    """Which ranks the others wait for: those that are stopped; else that are behind; else that are not among the waiting."""
    if stopped:
        return f"{_ranks(stopped)} said nothing for so long: the process is stopped, or its machine is gone"
    furthest = max((place.step, place.micro_batch) for place in places.values())
    behind = [rank for rank, place in places.items() if (place.step, place.micro_batch) < furthest]
    busy = [rank for rank, place in places.items() if not place.waits]
    chosen = behind or (busy if len(busy) < len(places) else [])
    words = "the others wait for" if chosen else "no rank is behind the others:"
    standing = ", ".join(f"rank {r} at {places[r].where}" for r in (chosen or list(places))[:_SHOWN_RANKS])
    return f"{words} {standing} (step {furthest[0]})"


def _ranks(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
