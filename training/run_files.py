"""What does a run say about itself? The reader of run.json, metrics.jsonl, status.json and the checkpoint folders.

It imports no torch, so the monitor starts at once, and trusts nothing: a line cut short by a crash, a file that was
rotated or written anew, values of the wrong kind, and rows that a resumed run wrote again are all expected.

metrics.jsonl holds one JSON object a line, of four kinds told apart by their keys: events (`event`), samples
(`sample`), evaluations (any key that begins with `val_`) and, with none of these, training rows. After a start or a
resume at step s the rows above s that were written before it are void; of two rows of one kind and step the later
one counts.
"""

import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"

_CHECKPOINT = re.compile(r"checkpoint_step_(\d+)(\.pt)?")
_SEAM_BYTES = 64

Row = dict[str, Any]


@dataclass
class RunHistory:
    """Everything one run has written so far; the rows of each list are in order of step, events in order of writing."""

    folder: Path
    run: Row = field(default_factory=dict)
    status: Row = field(default_factory=dict)
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    unreadable_lines: int = 0
    # True when the run was started on this host and its process had ended before `status` was read
    process_gone: bool = False
    # seconds since this reader saw run.json or status.json change, by its own clock; None until it has
    unchanged_seconds: float | None = None

    @property
    def name(self) -> str:
        return printable(self.run.get("name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """Optimizer steps completed, by status.json, or by metrics.jsonl where there is none."""
        known = [self.status.get("step"), *(rows[-1]["step"] for rows in (self.train, self.evals) if rows)]
        return int(next((step for step in map(number, known) if math.isfinite(step)), 0))


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint as its folder shows it, no tensor read; `problem` is None when all sizes are the manifest's."""

    path: Path
    step: int
    bytes: int
    time: float
    problem: str | None


class RunReader:
    """Reads one run again and again, each time only what metrics.jsonl has gained."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._history = RunHistory(self.folder)
        self._changed: float | None = None
        self._forget_rows()

    def refresh(self) -> RunHistory:
        """The run as it is now. The same object is filled and returned by every call."""
        history = self._history
        before = history.run, history.status
        history.run = read_json(self.folder / RUN_FILE) or history.run
        history.process_gone = _process_gone(history.run)  # looked at first: a process that is gone writes no more
        history.status = read_json(self.folder / STATUS_FILE) or history.status
        if any(before) and before != (history.run, history.status):
            self._changed = time.monotonic()
        if self._changed is not None:
            history.unchanged_seconds = time.monotonic() - self._changed
        if self._read_new_lines():
            history.train = _in_step_order(self._train)
            history.evals = _in_step_order(self._evals)
            history.samples = _in_step_order(self._samples)
        return history

    def _forget_rows(self) -> None:
        self._offset, self._seam = 0, b""
        self._inode: int | None = None
        self._train: dict[Any, Row] = {}
        self._evals: dict[Any, Row] = {}
        self._samples: dict[Any, Row] = {}
        self._history.events, self._history.unreadable_lines = [], 0

    def _read_new_lines(self) -> bool:
        """Take in what was appended; True if the rows changed. A file that is not the one read before is read anew."""
        try:
            file = open(self.folder / METRICS_FILE, "rb")  # noqa: SIM115 - closed by the `with` below
        except FileNotFoundError:
            changed = self._offset > 0
            self._forget_rows()
            return changed
        with file:
            seam_start = self._offset - len(self._seam)
            file.seek(seam_start)
            data = file.read()
            inode = os.fstat(file.fileno()).st_ino
            rewritten = not data.startswith(self._seam) or self._inode not in (None, inode)
            if rewritten:
                self._forget_rows()
                file.seek(0)
                data, seam_start = file.read(), 0
        self._inode = inode
        new = data[len(self._seam) :]
        used = self._take_lines(new)
        self._offset += used
        self._seam = data[: len(self._seam) + used][-_SEAM_BYTES:]
        return rewritten or used > 0

    def _take_lines(self, data: bytes) -> int:
        """Add the rows of the whole lines in `data`; returns how many bytes they were. A cut last line is left."""
        used = 0
        for line in data.splitlines(keepends=True):
            row = _parse_row(line)
            if row is None and not line.endswith(b"\n"):
                break
            used += len(line)
            if row is not None:
                self._add(row)
            elif line.strip():
                self._history.unreadable_lines += 1
        return used

    def _add(self, row: Row) -> None:
        step = row["step"]
        if "event" in row:
            self._history.events.append(row)
            if row["event"] in ("start", "resume"):
                for rows in (self._train, self._evals, self._samples):
                    for key in [key for key, old in rows.items() if old["step"] > step]:
                        del rows[key]
        elif "sample" in row:
            self._samples[step, str(row.get("prompt"))] = row
        elif any(key.startswith("val_") for key in row):
            self._evals[step] = row
        else:
            self._train[step] = row


def read_history(run_dir: str | os.PathLike) -> RunHistory:
    """The whole history of the run in `run_dir`; files that do not exist leave their part empty."""
    return RunReader(run_dir).refresh()


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """One value of each row as float64 (rows,); NaN where it is null, missing or not a number."""
    return np.array([number(row.get(key)) for row in rows], dtype=np.float64)


def number(value: Any) -> float:
    """The value of a JSON field as a float; NaN where it is null, missing, not a number or too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def printable(text: Any) -> str:
    """`text` as one line without what a terminal would obey or choke on: control codes, text direction, surrogates."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in str(text))


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 12 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = max(0, round(seconds))
    for unit, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // below} {below_name}"
    return f"{seconds} s"


def smoothed(values: np.ndarray, span: int | None = None) -> np.ndarray:
    """Exponential moving average of `values` (n,) over about `span` rows, without the bias of its start.

    The span is n/50 rows, at least 5, where it is not given: a longer one trails far behind the steep start of a
    short run. A value that is not finite is skipped: the average stays what it was.
    """
    span = span or max(5, len(values) // 50)
    keep = 1 - 2 / (span + 1)
    average, weight = 0.0, 0.0
    result = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if math.isfinite(value):
            average = keep * average + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        if weight:
            result[index] = average / weight
    return result


def robust_range(values: np.ndarray, also: np.ndarray | None = None, skip: float = 0.2) -> tuple[float, float]:
    """The y range that shows a curve (n,) well: its last four fifths without the outermost 1 % on each side.

    So neither the cliff of the warm-up nor one spike flattens the rest. Points of `also` that come after the first
    fifth of it are always inside. skip: another share than a fifth. Returns (0, 1) when there is nothing finite to show.
    """
    parts = []
    for points, cut in ((values, 1), (also, 0)):
        if points is None:
            continue
        tail = points[int(len(points) * skip) :]
        tail = tail[np.isfinite(tail)]
        if len(tail):
            parts += [np.percentile(tail, cut), np.percentile(tail, 100 - cut)]
    if not parts:
        return 0.0, 1.0
    low, high = float(min(parts)), float(max(parts))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def find_runs(folder: str | os.PathLike) -> list[Path]:
    """Every folder at or below `folder` that holds a run: its run files, or at least a checkpoint; sorted by path."""
    return sorted(_walk_runs(Path(folder)))


def list_checkpoints(run_dir: str | os.PathLike) -> list[CheckpointFiles]:
    """The checkpoints in a run's folder in order of step, their sizes compared with the manifest. No folder: []."""
    found = []
    try:
        with os.scandir(os.fspath(run_dir)) as scan:
            entries = list(scan)
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        match = _CHECKPOINT.fullmatch(entry.name)
        if not match or entry.is_dir() == bool(match.group(2)):
            continue
        try:
            found.append(_describe_checkpoint(Path(entry.path), int(match.group(1))))
        except FileNotFoundError:
            continue  # the trainer removed it, as --keep_checkpoints asks, while we looked
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _describe_checkpoint(path: Path, step: int) -> CheckpointFiles:
    if path.is_file():  # a single old-style file: nothing to compare it with
        return CheckpointFiles(path, step, path.stat().st_size, path.stat().st_mtime, None)
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.is_file()}
    return CheckpointFiles(path, step, sum(sizes.values()), path.stat().st_mtime, _size_problem(path, sizes))


def _size_problem(path: Path, sizes: dict[str, int]) -> str | None:
    files = read_json(path / "manifest.json").get("files")
    if not isinstance(files, dict) or not files:
        return "manifest.json is missing or unreadable"
    for name, entry in files.items():
        expected = entry.get("bytes") if isinstance(entry, dict) else None
        if name not in sizes:
            return printable(f"{name} is missing")
        if sizes[name] != expected:
            return printable(f"{name} has {sizes[name]} bytes, its manifest says {expected}")
    return None


def _walk_runs(folder: Path) -> Iterator[Path]:
    for path, subfolders, files in os.walk(folder):
        checkpoints = [name for name in (*subfolders, *files) if _CHECKPOINT.fullmatch(name)]
        if checkpoints or RUN_FILE in files or METRICS_FILE in files:
            yield Path(path)
        subfolders[:] = [name for name in subfolders if not _CHECKPOINT.fullmatch(name) and not name.startswith(".")]


def _in_step_order(rows: dict[Any, Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: row["step"])


def _parse_row(line: bytes) -> Row | None:
    row = _parse_object(line)
    return row if row is not None and type(row.get("step")) is int and abs(row["step"]) < 2**53 else None


def _process_gone(run: Row) -> bool:
    """True when the run's process was one of this host and is no more; False when it lives or nothing is known."""
    pid = run.get("pid")
    if run.get("host") != socket.gethostname() or type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is another user's
        return False
    return False


def read_json(path: Path) -> Row:
    """The object in a JSON file; empty when the file is missing, broken or another kind of JSON."""
    try:
        return _parse_object(path.read_bytes()) or {}
    except OSError:
        return {}


def _parse_object(data: bytes) -> Row | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
