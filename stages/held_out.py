"""How is a model judged on all that is held out, exactly, whatever number of ranks share it?

Figures such as F1 are no means over examples: each rank counts on its own part, and the counts are added up.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from batches.micro_batch import MicroBatch
from ranks import Ranks, unwrap
from sharding import in_step
from training.examples_data import ExampleFeed, without_dropout

T = TypeVar("T")


@torch.no_grad()
def over_held_out(
    feed: ExampleFeed,
    model: nn.Module,
    batches: SequenceOf[MicroBatch],
    judge: Callable[[nn.Module, MicroBatch], T],
) -> list[T]:
    """What `judge` makes of each micro-batch, in the precision of the run and without dropout."""
    inner, found = unwrap(model), []
    with without_dropout(inner):
        for batch, counts in in_step(batches, inner, feed.ranks, feed.idle):
            with feed.precision.autocast(feed.ranks.device):
                judged = judge(inner, batch.to(feed.ranks.device))
            found += [judged] * counts
    return found


def summed(ranks: Ranks, values: np.ndarray) -> np.ndarray:
    """The sum of an array over all ranks, in float64, which holds counts exactly."""
    return np.array(ranks.sum(values.astype(np.float64).flatten().tolist())).reshape(values.shape)
