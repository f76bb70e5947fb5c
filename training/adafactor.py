"""How does Adafactor keep the second moments of a matrix in one row and one column?

It needs whole rows and columns: a part of a matrix cannot be updated by itself.
"""

import torch
from torch import Tensor

from training.update_rules import Group, Rule, State, counter, decayed

_DECAY_EXPONENT = -0.8  # beta2 of step t is 1 - t^-0.8 (Shazeer & Stern, arXiv 1804.04235, §7.2)
_SMALLEST_SQUARE = 1e-30
_LARGEST_UPDATE = 1.0  # root mean square beyond which an update is scaled down (§6)


def _adafactor(weight: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    """Algorithm 4 with the learning rate as it is, neither relative to the step nor to the weights (transformers'
    `scale_parameter=False, relative_step=False`), and decoupled decay; of stacked matrices each has its row and column."""
    step = state["step"] + 1
    new = step**_DECAY_EXPONENT  # what the newest squares count
    squares = gradient.square() + _SMALLEST_SQUARE
    values: State = {"step": step}
    if "row" in state:
        row = torch.lerp(state["row"], squares.mean(-1), new)
        column = torch.lerp(state["column"], squares.mean(-2), new)
        values |= {"row": row, "column": column}
        update = gradient * (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :]
    else:
        values["square"] = torch.lerp(state["square"], squares, new)
        update = gradient * values["square"].rsqrt()
    size = update.square().mean().sqrt()
    update = update / (size / _LARGEST_UPDATE).clamp_min(1.0)
    return decayed(weight, group).sub_(update, alpha=group["lr"]), values


def _start(parameter: Tensor) -> State:
    if parameter.ndim < 2:
        return {"step": counter(parameter), "square": torch.zeros_like(parameter)}
    shape = parameter.shape
    row, column = parameter.new_zeros(shape[:-1]), parameter.new_zeros(shape[:-2] + shape[-1:])
    return {"step": counter(parameter), "row": row, "column": column}


ADAFACTOR = Rule("Adafactor", _start, _adafactor)
