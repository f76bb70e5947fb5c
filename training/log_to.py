"""Where do a run's rows go besides metrics.jsonl? To the back ends that --log_to names, one file each in training/loggers/.

A row is sent once. After a crash a run goes on from a checkpoint, and what came after that is computed again: `csv` and
`tensorboard` take the old rows back, and get the new ones; the others cannot, so they get only what they have not seen,
unless the run goes on with other options, whose rows are others. What a back end needs to go on with the same curve, such
as the id of its run, is in log_to.json of the run's folder. A back end that fails is left out from there on, and the run
goes on.
"""

import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from errors import UserError
from training.run_files import RUN_FILE, RunHistory, read_history, read_json

LOGGERS = ("tensorboard", "wandb", "trackio", "mlflow", "csv")
Row = dict[str, Any]

_KEPT_FILE = "log_to.json"
_REPEATED = (
    "train",
    "evaluation",
    "sample",
)  # kinds of rows that a run which goes on makes again; an event happens anew
_NOT_FIGURES = ("step", "time")
# options that may differ while every row stays what it was
_SAME_ROWS = (
    "checkpoint", "save_dir", "log_to", "save_interval", "save_every_minutes", "async_checkpoint", "keep_checkpoints",
    "keep_every", "keep_optimizer", "best_metric", "best_mode",
)  # fmt: skip


@dataclass(frozen=True)
class LoggedRun:
    """What a back end is told when it begins.

    folder: the run's. step: where this start begins; 0, or that of the checkpoint it goes on from. kept: what the back end
    gave at an earlier start, None at the first.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    step: int
    kept: str | None


class Logger(Protocol):
    """One back end. takes_back: whether it forgets rows after `LoggedRun.step` when it begins. kept: for later starts."""

    takes_back: bool
    kept: str | None

    def log(self, kind: str, row: Row) -> None:
        """A row of metrics.jsonl, of kind train, evaluation, sample or event."""

    def close(self, failed: bool) -> None: ...


def check_packages(names: Sequence[str]) -> None:
    """UserError for a back end whose package is not installed."""
    for name in names:
        spec = None if name == "csv" else importlib.util.find_spec(name)
        if name != "csv" and (spec is None or spec.origin is None):  # a folder of that name is no package
            raise UserError(
                f"--log_to {name}: the package is not installed; run pip install -r requirements-loggers.txt, or pip install "
                f"{name}"
            )


class Loggers:
    """The back ends of one start of a run, in its first rank."""

    def __init__(self, folder: Path, run: dict[str, Any], step: int) -> None:
        """Begin. run: what run.json is about to hold. UserError where a new run's back end cannot begin."""
        config = run.get("config", {})
        names = list(dict.fromkeys(config.get("log_to", [])))
        self.failures: list[str] = []  # sentences that are still to be said
        self._open: dict[str, Logger] = {}
        history = read_history(folder) if names else RunHistory(folder)
        before = read_json(folder / RUN_FILE).get("config", {})
        rows = zip(_REPEATED, (history.train, history.evals, history.samples), strict=True)
        self._sent = {kind: {row["step"] for row in of_kind} for kind, of_kind in rows}
        self._step, self._same_rows = step, _without_free(before) == _without_free(config)
        kept = read_json(folder / _KEPT_FILE)
        for name in names:
            told = LoggedRun(folder, run["name"], config, step, kept.get(name))
            try:
                self._open[name] = importlib.import_module(f"training.loggers.{name}").Logger(told)
            except Exception as error:
                if not step:  # it was asked for, and nothing is lost yet
                    raise UserError(f"--log_to {name} cannot begin: {_said(error)}") from error
                self._give_up(name, "cannot go on", error)
        if kept_now := {name: logger.kept for name, logger in self._open.items() if logger.kept}:
            (folder / _KEPT_FILE).write_text(json.dumps(kept | kept_now, indent=1) + "\n")

    def log(self, kind: str, row: Row) -> None:
        """Send a row to every back end that has not had it."""
        for name, logger in list(self._open.items()):
            again = row["step"] in self._sent.get(kind, ())
            if again and (row["step"] <= self._step or (self._same_rows and not logger.takes_back)):
                continue
            try:
                logger.log(kind, row)
            except Exception as error:
                self._give_up(name, f"failed at step {row['step']:,}", error)

    def close(self, failed: bool) -> None:
        for name, logger in list(self._open.items()):
            try:
                logger.close(failed)
            except Exception as error:
                self._give_up(name, "could not be ended", error)
        self._open = {}

    def _give_up(self, name: str, words: str, error: Exception) -> None:
        self._open.pop(name, None)
        self.failures.append(f"--log_to {name} {words} and is off until the next start: {_said(error)}")


def figures_of(kind: str, row: Row) -> dict[str, float]:
    """{name of the curve: number} of a training or evaluation row: train/loss, val/loss, val/bpb."""
    group = "train" if kind == "train" else "val"
    numbers = {
        name: value for name, value in row.items() if isinstance(value, int | float) and name not in _NOT_FIGURES
    }
    return {f"{group}/{name.removeprefix('val_')}": float(value) for name, value in numbers.items()}


def _without_free(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _SAME_ROWS}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
