"""What do the tests of the stages that draw answers share? A step as the loop makes it, and several of them."""

from collections import defaultdict

import numpy as np
import torch

from ranks import Ranks
from training.parallel import gradient_sync

ALONE = Ranks(0, 1, torch.device("cpu"))


def loss_and_gradient(stage, model, micro_batches, ranks=ALONE) -> tuple[np.ndarray, dict[str, float]]:
    """As train.py's loop does it: summed, divided once by the weight of all micro-batches and ranks."""
    model.zero_grad()
    [total_weight] = ranks.sum([float(sum(batch.weight for batch in micro_batches))])
    sums = defaultdict(lambda: [0.0, 0.0])
    for index, batch in enumerate(micro_batches):
        with gradient_sync(model, enabled=index == len(micro_batches) - 1):
            loss, metrics = stage.loss(model, batch)
            (loss * (ranks.world_size / total_weight)).backward()
        for name, (value, weight) in metrics.items():
            sums[name] = [sums[name][0] + value.item(), sums[name][1] + float(weight)]
    flat = ranks.sum([part for name in sorted(sums) for part in sums[name]])
    metrics = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(sorted(sums))}
    return gradient_of(model), metrics


def gradient_of(model) -> np.ndarray:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().numpy()


def train(stage, model, optimizer, steps: int, first_sample: int = 0) -> list[dict[str, float]]:
    rows = []
    for _, micro_batches in zip(range(steps), stage.batches(first_sample), strict=False):
        rows.append(loss_and_gradient(stage, model, micro_batches)[1])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return rows
