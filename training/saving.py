"""What does a run put into its checkpoints, what happens when one cannot be written, and which of them is the best?

How a folder comes to be whole or absent is checkpointing/save.py. Every rank calls what is here, and rank 0 writes.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointing.background import HostRoom, InFlight
from checkpointing.save import SaveResult, collect, mark_best
from checkpointing.save_folder import from_rank_0, read_pointer, write_pointer
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError
from training.averages import weights_to_use
from training.description import git_commit, versions
from training.loading import checkpoint_parts
from training.metrics import Figures
from training.run_files import number, read_history

MAX_FAILED_SAVES = 3  # in a row, before the run gives up


@dataclass
class Saves:
    """The checkpoints of one run. `run` is train.Run in all of its methods.

    With --async_checkpoint the newest may be in flight: a thread writes it, and what comes of it is said, and given to
    hooks, when rank 0 has told all ranks at the sum of a step that it is through, or when it is waited for. That is before
    the next one, before it is marked as best, and at the end.
    """

    newest: Path | None = None  # that was read or written
    step: int | None = None  # of the newest that this start of the run has written, or is writing
    failed: int = 0  # in a row, the last one for this reason
    reason: str = ""
    due: bool = False  # for its own sake; a run's last one, and what hooks ask for, is the loop's to know
    best: float | None = None  # the figure of the best, less is better; None before the first look
    _in_flight: tuple[int, InFlight[SaveResult]] | None = None
    _through: bool = False  # as all ranks know
    _begun: float = field(default_factory=time.monotonic)  # the newest, or the run
    _room: HostRoom = field(default_factory=HostRoom)

    def save(self, run: Any, step: int) -> None:
        """Write the checkpoint of this step. UserError where one cannot be written, and it is one too many or the last."""
        self.settle(run)
        self._recall_best(run, step)  # before old ones are deleted
        run.hooks.save = self.due = False
        self._begun = time.monotonic()
        run.log.status("saving", step)
        checkpoint = collect(
            run.config.save_dir, step, model=run.model, optimizers=run.optimizers, state=_state(run), files=_files(run),
            keep_checkpoints=run.config.keep_checkpoints, keep_every=run.config.keep_every,
            keep_optimizer=run.config.keep_optimizer, stop_ids=run.data.stop_ids,
            **checkpoint_parts(run.config, run.model, run.ema),
        )  # fmt: skip
        self.step = step
        if run.config.async_checkpoint:
            self._in_flight = step, checkpoint.start_writing(self._room)
        else:
            self._end(run, step, checkpoint.write())

    def settle(self, run: Any) -> None:
        """Wait for the checkpoint that is being written, if one is. UserError as of `save`."""
        if self._in_flight is not None:
            step, writing = self._in_flight
            result = writing.result()
            self._in_flight, self._through = None, False
            self._end(run, step, result)

    def _end(self, run: Any, step: int, result: SaveResult) -> None:
        self._say(run, step, result)
        if result.ok:
            self.failed, self.newest = 0, result.path
            with weights_to_use(run.model, run.optimizers):
                run.hooks.call("on_checkpoint", run)
            return
        self.step, self.reason = None, result.message
        self.failed += 1
        if self.failed >= MAX_FAILED_SAVES or step == run.config.max_steps:
            self._give_up(run, step)

    def _say(self, run: Any, step: int, result: SaveResult) -> None:
        if result.ok:
            run.log.event(step, "save", f"saved {result.path}" + (f" ({result.message})" if result.message else ""))
            return
        words = f"step {step:,} could not be saved: {result.message}; earlier checkpoints are untouched"
        run.log.event(step, "alert", words)

    # ---------------------------------------------------------------------------------------------------- in the loop

    def news(self, run: Any) -> list[float]:
        """What rank 0 alone knows, 0 on the others: numbers to be summed over the ranks, for `hear`."""
        if not run.ranks.is_main:
            return [0.0, 0.0]
        minutes, is_through = run.config.save_every_minutes, self._in_flight is not None and self._in_flight[1].is_done
        is_time = minutes is not None and time.monotonic() - self._begun >= 60 * minutes
        # for its minutes alone none is begun while another is written: the loop would wait
        return [float(is_through), float(is_time and (self._in_flight is None or is_through))]

    def hear(self, news: list[float]) -> None:
        self._through = news[0] > 0
        self.due |= news[1] > 0

    def after_step(self, run: Any, step: int) -> None:
        """What a step's end brings: the news of a checkpoint that is on the disk by now, and that another is due."""
        self.due |= step % run.config.resolved_save_interval == 0
        if self._through:
            self.settle(run)

    def end(self, run: Any) -> None:
        """Wait for the last one. UserError where the run would end without it."""
        self.settle(run)
        if self.failed:
            self._give_up(run, run.step)

    @contextlib.contextmanager
    def finished_alone(self, run: Any) -> Iterator[None]:
        """An error that leaves this block lets what is being written be finished; other ranks may be anywhere by then."""
        try:
            yield
        except BaseException:
            if self._in_flight is not None and (result := self._in_flight[1].wait_alone()):
                self._say(run, self._in_flight[0], result)
            raise

    def _give_up(self, run: Any, step: int) -> None:
        run.log.status("failed", step, self.reason)
        raise UserError(f"step {step} could not be saved to {run.config.save_dir}: {self.reason}")

    # ------------------------------------------------------------------------------------------------------- the best

    def mark_if_best(self, run: Any, step: int, row: Figures) -> None:
        """Point `best` at this step's checkpoint if no other one has as good a figure. UserError for one that there is not.

        row: all that the evaluation of this step gave; the first rank's counts.
        """
        save_dir, figure = Path(run.config.save_dir), run.config.best_figure

        def is_better() -> bool:
            if figure not in row and run.config.best_metric is not None:
                there_is = ", ".join(row) or "no figures"
                raise UserError(f"--best_metric {run.config.best_metric}: evaluations of this run give {there_is}")
            self._recall_best(run, step)
            assert self.best is not None
            return _badness(run, row.get(figure)) < self.best

        if not from_rank_0(is_better):
            return
        self.settle(run)
        checkpoint = save_dir / f"checkpoint_step_{step}"
        if from_rank_0(checkpoint.is_dir):
            self.best = _badness(run, row.get(figure))
            mark_best(save_dir, checkpoint)

    def _recall_best(self, run: Any, step: int) -> None:
        """On rank 0, once: which checkpoint from before this step is the best, as the evaluations say that came after them.

        `best` is set right, too: a run may have been killed before it was, or have had another --best_metric.
        """
        if self.best is not None or not run.ranks.is_main:
            return
        save_dir, self.best, best = Path(run.config.save_dir), math.inf, None
        for row in read_history(save_dir).evals:
            badness, path = _badness(run, row.get(run.config.best_figure)), save_dir / f"checkpoint_step_{row['step']}"
            if row["step"] < step and badness < self.best and path.is_dir():
                self.best, best = badness, path
        if best is not None and read_pointer(save_dir, "best") != best:
            with contextlib.suppress(OSError):
                write_pointer(save_dir, "best", best.name)


def _badness(run: Any, value: Any) -> float:
    """A figure so that less is better; infinite where there is none."""
    value = number(value)
    return math.inf if math.isnan(value) else -value if run.config.higher_is_better else value


def _state(run: Any) -> dict[str, Any]:
    """What the loop wants back when the run goes on."""
    return {
        "options": dataclasses.asdict(run.config),
        "samples_consumed": run.samples,
        "tokens_consumed": run.tokens,
        "data_order": run.data.order,
        "stands_on": run.stands_on,
        "hooks": run.hooks.for_checkpoint(),
        "scaler": run.scaler.state(),
        "stage": run.stage.state() if hasattr(run.stage, "state") else {},  # of those that draw their own answers
        "empty_steps": run.empty_steps,
        "skipped": run.skipped,
        "micro_batch_size": run.micro_batch_size,
        "micro_batch_is_auto": run.is_auto,
        "spike_guard": run.guard.state() if run.guard else None,
        "learning_rate": run.learning_rate,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _files(run: Any) -> dict[str, bytes]:
    """The tokenizer's files, and what else the data wants beside the model."""
    folder = run.data.tokenizer_folder
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()} | run.data.files
