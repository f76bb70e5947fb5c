"""What does a run leave for others to read, and what does it print?

In the run's folder: run.json (what was started), metrics.jsonl (one JSON object a line), status.json (what it is doing
now); run_files.py reads them. On the terminal: one line at each log interval, and, on a terminal, a live line below it.
The rows of metrics.jsonl go to the back ends of --log_to, too (log_to.py).
"""

import contextlib
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor

from checkpointing.save_folder import from_rank_0
from ranks import Ranks
from training.log_to import Loggers
from training.run_files import METRICS_FILE, RUN_FILE, STATUS_FILE, duration

T = TypeVar("T")
Metrics = dict[str, tuple[Tensor, float | Tensor]]  # {metric: (sum, weight)} of one rank
Figures = dict[str, float | None]  # of all ranks, None where nothing was averaged over

_LAST_STATES = ("finished", "stopped", "failed")
_STATUS_SECONDS = 5.0
_LIVE_SECONDS = 0.5

# Dense peak TFLOP/s in 16-bit with fp32 accumulation, from the makers' data sheets, by product as the driver names it.
_PEAK_TFLOPS_16BIT = {
    "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H20": 148, "GH200": 989, "B200": 2250,
    "B100": 1750, "A100": 312, "A800": 312, "A10G": 70, "A10": 125, "A30": 165, "A40": 150, "L40S": 362, "L40": 181, "L4": 121,
    "V100": 125, "V100 PCIe": 112, "T4": 65, "GeForce RTX 4090": 165, "GeForce RTX 3090": 71, "RTX A6000": 155,
}  # fmt: skip
# what stands beside the product's name: the board it is on and its memory. Any other word makes it another product
_BOARD = re.compile(r"[- ](?:SXM\d?|PCIE|PG\d+|\d+|\d+GB?|HBM\d?e?)(?=[- ]|$)")


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak TFLOP/s of one device for matrix products in `dtype`, or None where groundup does not know it."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """`peak_tflops` in 16-bit of the product that the driver calls `name`, None for one that is not known by its whole name.

    "RTX A1000" is no A100, a part of one ("A100-SXM4-40GB MIG 1g.5gb") or a laptop's chip is not the card.
    """
    name = name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    if name.startswith("V100"):
        name = name.replace("-PCIE", " PCIe")
    name = re.sub(r"^(A100|A800) (\d+GB) PCIe$", r"\1-PCIE-\2", name)
    while (shorter := _BOARD.sub("", name, count=1)) != name:
        if name in _PEAK_TFLOPS_16BIT:
            break
        name = shorter
    return float(_PEAK_TFLOPS_16BIT[name]) if name in _PEAK_TFLOPS_16BIT else None


def reduce_metrics(metrics: Metrics, ranks: Ranks) -> Figures:
    """{metric: mean over all ranks, None of one that nothing was averaged over} from each rank's (sum, weight)."""
    total = iter(ranks.sum([float(part) for name in sorted(metrics) for part in metrics[name]]))
    return {name: mean(next(total), next(total)) for name in sorted(metrics)}


def mean(total: float, weight: float) -> float | None:
    """None where nothing was averaged over: 0 would be a figure."""
    return total / weight if weight else None


def shown(value: float | None, digits: int) -> str:
    """A figure for the terminal."""
    return "n/a" if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class TrainRow:
    """The figures of one log line, None where there is none. Rates are over the steps since the last line; `mfu` is a fraction.

    empty_steps: so far in the run, steps in which no rank had anything to learn, which leave weights and optimizer alone.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tok_s: float
    tok_s_gpu: float
    mfu: float | None
    dt: float
    data_wait: float
    tokens: int
    epoch: float
    scaler: float | None
    mem_gb: float
    mem_reserved_gb: float | None
    empty_steps: int = 0
    figures: dict[str, float | None] = field(default_factory=dict)  # what else the stage reports


class RunLog:
    """Writes a run's files and its progress lines. On ranks other than the first every method does nothing."""

    def __init__(self, save_dir: str | Path, *, is_main: bool, max_steps: int, start_step: int = 0) -> None:
        self._dir = Path(save_dir)
        self._is_main = is_main
        self._max_steps = max_steps
        self._step = start_step
        self._eta: float | None = None
        self._status_written = 0.0
        self._state = ""
        self._progress = ProgressLine(sys.stdout, enabled=is_main)
        self._loggers: Loggers | None = None
        if is_main:
            self._end_cut_line()

    def start(self, run: dict[str, Any]) -> None:
        """Write run.json, and begin the back ends of --log_to. Every rank calls it. UserError where one cannot begin."""

        def begin() -> None:
            if self._is_main:
                self._loggers = Loggers(self._dir, run, self._step)
                write_json(self._dir / RUN_FILE, run)

        from_rank_0(begin)
        self._say_failures(self._step)

    def train(self, row: TrainRow) -> None:
        """One log line: to metrics.jsonl and to the terminal."""
        self._eta = row.dt * (self._max_steps - row.step)
        columns = dict(row.__dict__)
        self._append("train", columns | columns.pop("figures"))
        more = "".join(f"{name} {shown(value, 3)}  " for name, value in row.figures.items())
        mfu = "mfu n/a" if row.mfu is None else f"mfu {row.mfu:.1%}"
        skipped = "  not finite: step skipped" if row.loss is not None and not math.isfinite(row.loss) else ""
        skipped += f"  {row.empty_steps:,} empty steps so far" if row.empty_steps else ""
        self.say(
            f"step {row.step:,}/{self._max_steps:,}  loss {shown(row.loss, 4)}  {more}lr {row.lr:.2e}  "
            f"grad_norm {shown(row.grad_norm, 3)}  {row.tok_s:,.0f} tok/s  {mfu}  mem {row.mem_gb:.1f} GB  "
            f"eta {duration(self._eta)}{skipped}"
        )

    def evaluation(self, step: int, seconds: float, figures: dict[str, float | None]) -> None:
        self._append("evaluation", {"step": step, **figures, "eval_s": seconds})
        words = "  ".join(f"{name} {shown(value, 4)}" for name, value in figures.items())
        self.say(f"step {step:,}  {words}  ({seconds:.1f} s)")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append("sample", {"step": step, "prompt": prompt, "sample": text})
        self.say(f"step {step:,} sample: {prompt}{text}".replace("\n", "\n    "))

    def event(self, step: int, event: str, message: str, **more: Any) -> None:
        """start, resume, save, alert, nan, spike, finish or stop, with a sentence; `more` is for metrics.jsonl."""
        self._append("event", {"step": step, "event": event, "message": message, **more})
        self.say(message)

    def status(self, state: str, step: int, error: str | None = None) -> None:
        """Say what the run does now: at once when the state changes, otherwise at most every 5 seconds.

        finished, stopped and failed are the last one, and end the back ends.
        """
        self._step = step
        if not self._is_main:
            return
        now = time.monotonic()
        if state == self._state and now - self._status_written < _STATUS_SECONDS:
            return
        self._state, self._status_written = state, now
        content = {"state": state, "step": step, "max_steps": self._max_steps, "time": time.time(), "eta_s": self._eta}
        write_json(self._dir / STATUS_FILE, {**content, "error": error})
        if state in _LAST_STATES and self._loggers:
            self._loggers.close(failed=state == "failed")
            self._say_failures(step)

    def live(self, step: int) -> None:
        """Move the live line on (terminals only)."""
        self._progress.update(step, self._max_steps, self._eta)

    def say(self, text: str) -> None:
        if self._is_main:
            self._progress.print(text)

    def close(self) -> None:
        self._progress.clear()

    def _append(self, kind: str, row: dict[str, Any]) -> None:
        """One whole line in one write, so that a reader sees no half of it and a crash loses at most this line."""
        if not self._is_main:
            return
        row = {"step": row["step"], "time": time.time(), **row}
        row = {name: _finite_or_null(value) for name, value in row.items()}
        line = json.dumps(row) + "\n"
        try:
            with open(self._dir / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:  # a full disk must not end a run that could still be saved
            self._progress.print(f"warning: {self._dir / METRICS_FILE} could not be written: {error}")
        if self._loggers:
            self._loggers.log(kind, row)
            self._say_failures(row["step"])

    def _say_failures(self, step: int) -> None:
        """An alert for each back end that failed since the last look."""
        while self._loggers and self._loggers.failures:
            self.event(step, "alert", self._loggers.failures.pop(0))

    def _end_cut_line(self) -> None:
        """A killed run may have left half a line; end it, so that the next one starts at the left margin."""
        path = self._dir / METRICS_FILE
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n")


@dataclass
class ProgressLine:
    """The line that moves on a terminal: a bar, the step, the time left. Anything else is printed above it."""

    stream: TextIO
    enabled: bool
    _shown: bool = field(default=False, init=False)
    _time: float = field(default=0.0, init=False)

    def update(self, step: int, max_steps: int, eta: float | None) -> None:
        if not (self.enabled and self.stream.isatty()) or time.monotonic() - self._time < _LIVE_SECONDS:
            return
        self._time, self._shown = time.monotonic(), True
        width = 30
        done = width * step // max(1, max_steps)
        left = "" if eta is None else f"  {duration(eta)} left"
        self.stream.write(f"\r\x1b[K[{'#' * done}{'.' * (width - done)}] {step:,}/{max_steps:,}{left}")
        self.stream.flush()

    def print(self, text: str) -> None:
        self.clear()
        if self.enabled:
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        if self._shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self._shown = False


class Clock:
    """Times training steps between log lines, without evaluations and checkpoints, and the wait for data within them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps, self.tokens = 0, 0
        self._start, self._out, self._data = time.perf_counter(), 0.0, 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, the wait for each counted as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data += time.perf_counter() - start
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        start = time.perf_counter()
        yield
        self._out += time.perf_counter() - start

    def seconds_per_step(self) -> float:
        return max(1e-9, time.perf_counter() - self._start - self._out) / max(1, self.steps)

    def data_wait(self) -> float:
        """Seconds a step."""
        return self._data / max(1, self.steps)


def memory_gb(device: torch.device) -> tuple[float, float | None]:
    """(peak GB in use, GB reserved or None): of the device on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, None


def train_row(run: Any, figures: Figures, grad_norm: Tensor | None, clock: Clock) -> TrainRow:
    """What a run has to say after a step. run: train.Run; figures: means over the steps since the last row."""
    plan, seconds = run.plan, clock.seconds_per_step()
    rate = clock.tokens / max(1, clock.steps) / seconds
    used, reserved = memory_gb(run.ranks.device)
    useful = rate / plan.world_size * plan.flops_per_token  # FLOP/s of one device
    return TrainRow(
        step=run.step,
        loss=figures["loss"],
        lr=run.learning_rate,
        grad_norm=None if grad_norm is None else grad_norm.item(),
        tok_s=rate,
        tok_s_gpu=rate / plan.world_size,
        mfu=useful / (run.peak_tflops * 1e12) if run.peak_tflops else None,
        dt=seconds,
        data_wait=clock.data_wait(),
        tokens=run.tokens,
        epoch=run.stage.epoch(run.samples),
        figures={name: value for name, value in figures.items() if name != "loss"},
        scaler=run.scaler.scale.item() if run.scaler.enabled else None,
        mem_gb=used,
        mem_reserved_gb=reserved,
        empty_steps=run.empty_steps,
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step; a reader sees the old one or the new one. A full disk is reported, not raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        print(f"warning: {path} could not be written: {error}", file=sys.stderr)


def _finite_or_null(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
