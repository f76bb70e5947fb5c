"""Which weights are evaluated and saved, where those that are trained are not all there is?

Schedule-free AdamW trains at y and is for x, which is worked out here. `Ema` is an average beside any other optimizer's
weights: evaluated as well as they are, and saved beside them in a file that is a model's (`utils.py average --ema`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapters.lora import store_learned
from ranks import unwrap
from training.metrics import Figures
from training.update_rules import SCHEDULE_FREE, ByRule

EMA_FILE = "ema.safetensors"
_TRAINED = (
    "y"  # the state that holds the trained weights where others stand in the model, so that a checkpoint has both
)


class Ema:
    """Exponential moving average, in fp32, of the weights that a checkpoint holds.

    After n steps it is Σ decay^(n-i) wᵢ / Σ decay^(n-i) over the weights w₁ … wₙ after each: the correction of the bias
    (Kingma & Ba, arXiv 1412.6980, §3) is in it at any time, so it needs none where it is used, and no warm-up.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float):
        """weights: by the names of the file, sharing memory with the model's."""
        self.weights, self.decay = weights, decay
        self.averages = {name: weight.float().clone() for name, weight in weights.items()}
        self.steps = torch.zeros((), device=next(iter(weights.values())).device)  # that it is over

    @torch.no_grad()
    def update(self, skip: Tensor | None) -> None:
        """With the weights after a step, unless `skip` (0-dim bool on the device) says that it was left out."""
        counted = 1.0 if skip is None else (~skip).float()
        self.steps += counted
        # 1 - decay^n from its logarithm: decay is near 1, and the difference would lose most digits
        share = counted * (1.0 - self.decay) / -torch.expm1(self.steps.clamp_min(1.0) * math.log(self.decay))
        for name, average in self.averages.items():
            average.lerp_(self.weights[name].to(average.dtype), share)

    @contextlib.contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averages for its weights, and they have its weights: bit for bit what they were after."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, average in self.averages.items():
            weight = self.weights[name].clone()
            self.weights[name].copy_(average)
            average.copy_(weight)
        store_learned(unwrap(model))


def figures_of_both(
    ema: Ema | None, evaluate: Callable[[nn.Module, bool], Figures], model: nn.Module, everything: bool
) -> Figures:
    """What a stage's `evaluate` finds; with an average also what it finds with that, under names that end in _ema."""
    averaged: Figures = {}
    if ema is not None:
        with ema.standing_in(model):  # first, so that what a stage remembers of its evaluation is of the weights
            averaged = {f"{name}_ema": value for name, value in evaluate(model, everything).items()}
    return evaluate(model, everything) | averaged


# ---- schedule-free -----------------------------------------------------------------------------------------------------


def with_weights_to_use(method: Callable) -> Callable:
    """Inside this method of a run, its model has the weights that training is for: of schedule-free AdamW x, not y."""

    @functools.wraps(method)
    def wrapped(run: Any, *args: Any, **named: Any) -> Any:
        with weights_to_use(run.model, run.optimizers):
            return method(run, *args, **named)

    return wrapped


@contextlib.contextmanager
def weights_to_use(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside, parameters that schedule-free AdamW trains are x; afterwards y again, bit for bit.

    Inside another such block it does nothing.
    """
    trained = [one for one in _schedule_free(optimizers) if one[1] and _TRAINED not in one[1]]
    with torch.no_grad():
        for parameter, state, beta1 in trained:
            state[_TRAINED] = parameter.detach().clone()
            parameter.lerp_(state["z"], 1.0 - 1.0 / beta1)
    try:
        if trained:
            store_learned(unwrap(model))
        yield
    finally:
        if trained:
            train_on(model, optimizers)


@torch.no_grad()
def train_on(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put y, where the optimizer's state holds it, as that of a checkpoint does, back into the model."""
    found = [(parameter, state) for parameter, state, _ in _schedule_free(optimizers) if _TRAINED in state]
    for parameter, state in found:
        parameter.copy_(state.pop(_TRAINED))
    if found:
        store_learned(unwrap(model))


def _schedule_free(optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
    """(parameter, its state, beta1) of all that schedule-free AdamW trains."""
    for optimizer in optimizers:
        if isinstance(optimizer, ByRule) and optimizer.rule is SCHEDULE_FREE:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, optimizer.state.get(parameter, {}), group["beta1"]
