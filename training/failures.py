"""What ends a run early, and in which words is it told?"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from errors import UserError
from ranks import lost_rank


@contextlib.contextmanager
def failures_recorded(run: Any) -> Iterator[None]:
    """Whatever ends the run early is written where `utils.py monitor` reads it; UserError for too little
    memory, and for a rank that is lost."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        run.log.status("failed", run.step, "out of memory")
        raise UserError(
            f"{run.ranks.device} ran out of memory at step {run.step} with micro-batches of {run.plan.micro_batch_size}; "
            "lower --micro_batch_size (the batch, and so the result, stays the same) and go on with --checkpoint latest"
        ) from error
    except BaseException as error:
        lost = lost_rank(error)
        run.log.status("failed", run.step, lost or str(error))
        if lost:
            raise UserError(lost) from error
        raise
