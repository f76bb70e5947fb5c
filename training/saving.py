"""What does a run put into its checkpoints, what happens when one cannot be written, and which of them is the best?

How a folder comes to be whole or absent is checkpointing/save.py. Every rank calls what is here, and rank 0 writes.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.save import mark_best, save_checkpoint
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError
from training.description import git_commit, versions
from training.loading import checkpoint_parts
from training.run_files import read_history

MAX_FAILED_SAVES = 3  # in a row, before the run gives up


@dataclass
class Saves:
    """The checkpoints of one run. `run` is train.Run in all of its methods."""

    newest: Path | None = None  # that was read or written
    step: int | None = None  # of the newest that this start of the run has written
    failed: int = 0  # in a row
    best_loss: float | None = None

    def save(self, run: Any, step: int) -> None:
        """Write the checkpoint of this step. UserError where one cannot be written, and it is one too many or the last."""
        run.hooks.save = False
        run.log.status("saving", step)
        result = save_checkpoint(
            run.config.save_dir, step, model=run.model, optimizers=run.optimizers, state=_state(run), files=_files(run),
            keep_checkpoints=run.config.keep_checkpoints, stop_ids=run.data.stop_ids,
            **checkpoint_parts(run.config, run.model, run.ema),
        )  # fmt: skip
        if result.ok:
            self.failed, self.step, self.newest = 0, step, result.path
            run.log.event(step, "save", f"saved {result.path}" + (f" ({result.message})" if result.message else ""))
            run.hooks.call("on_checkpoint", run)
            return
        self.failed += 1
        run.log.event(
            step, "alert", f"step {step:,} could not be saved: {result.message}; earlier checkpoints are untouched"
        )
        if self.failed >= MAX_FAILED_SAVES or step == run.config.max_steps:
            run.log.status("failed", step, result.message)
            raise UserError(f"step {step} could not be saved to {run.config.save_dir}: {result.message}")

    def mark_if_best(self, run: Any, step: int, loss: float) -> None:
        """Point `best` at this step's checkpoint if no evaluation of this run was lower."""
        is_best, save_dir = False, Path(run.config.save_dir)
        checkpoint = save_dir / f"checkpoint_step_{step}"
        if run.ranks.is_main:
            if self.best_loss is None:  # of an earlier part of this run; the row of this step is already among them
                earlier = [row["val_loss"] for row in read_history(save_dir).evals if row["step"] != step]
                self.best_loss = min((value for value in earlier if value is not None), default=math.inf)
            is_best = loss < self.best_loss and checkpoint.is_dir()
        if run.ranks.sum([float(is_best)])[0]:
            self.best_loss = loss
            mark_best(save_dir, checkpoint)


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
        "learning_rate": run.learning_rate,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _files(run: Any) -> dict[str, bytes]:
    """The tokenizer's files, and what else the data wants beside the model."""
    folder = run.data.tokenizer_folder
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()} | run.data.files
