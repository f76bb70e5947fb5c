"""What ends a run early, and in which words is it told?"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from errors import UserError, is_out_of_memory
from ranks import lost_rank
from training.garbage import own_collection
from training.parallel import StopRequest
from training.watchdog import watched

MAX_BAD_STEPS = 10  # steps in a row without a finite gradient before the run gives up

T = TypeVar("T")


def followed(loop: Callable[[Any, StopRequest], T], run: Any, stop: StopRequest) -> T:
    """What train.py's `loop` returns; its end is recorded, whatever it is, and its standing still noticed."""
    with own_collection(), failures_recorded(run), run.saves.finished_alone(run), watched(run):
        return loop(run, stop)


@contextlib.contextmanager
def failures_recorded(run: Any) -> Iterator[None]:
    """Whatever ends the run early is written where `utils.py monitor` reads it; UserError for too little
    memory, and for a rank that is lost."""
    try:
        yield
    except BaseException as error:
        full, lost = is_out_of_memory(error), lost_rank(error)
        run.log.status("failed", run.step, "out of memory" if full else lost or str(error))
        if full:
            raise UserError(
                f"{run.ranks.device} ran out of memory at step {run.step} with micro-batches of {run.micro_batch_size}; "
                "lower --micro_batch_size (the batch, and so the result, stays the same) and go on with --checkpoint latest"
            ) from error
        if lost:
            raise UserError(lost) from error
        raise


def give_up_if_diverged(run: Any, step: int) -> None:
    """Alert after steps without a finite gradient, which were left out; UserError after many in a row."""
    bad = int(run.bad_steps.item())
    if bad and not run.scaler.enabled:
        words = f"step {step:,}: the gradient is not finite ({bad} steps in a row); the update was left out"
        run.log.event(step, "nan", words)
    if bad >= MAX_BAD_STEPS * (4 if run.scaler.enabled else 1):  # the scaler needs some steps to find its scale
        run.log.status("failed", step, f"no finite gradient for {bad} steps")
        raise UserError(
            f"the loss or its gradient has not been finite for {bad} steps in a row, up to step {step}; the weights are "
            f"those from before, and the checkpoints in {run.config.save_dir} are whole: go on from one with "
            "--checkpoint latest and a lower --learning_rate, or look at the data of these steps"
        )
