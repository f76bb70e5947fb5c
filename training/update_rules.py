"""How does an optimizer update a model that is one function of a weight, its gradient and its state?

`Rule` holds that function, `ByRule` makes a torch optimizer of it, which leaves out a step on the device. The rules here
are element-wise: each number depends on nothing but itself, so they work as well on a part of a tensor as on the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Group = dict[str, Any]  # of parameters: "params", "lr", "weight_decay", and the rule's settings


@dataclass(frozen=True)
class Rule:
    """start: the state of a parameter before its first step. update: (weight, gradient, state, group) → both anew.

    `update` is pure, and asks the device for nothing. Of all state only step counters and the like are 0-dimensional.
    """

    name: str  # in checkpoints
    start: Callable[[Tensor], State]
    update: Callable[[Tensor, Tensor, State, Group], tuple[Tensor, State]]


class ByRule(torch.optim.Optimizer):
    """The optimizer of a rule. Set `found_inf` (one-element float tensor) to 1.0 to skip a step on the device."""

    _step_supports_amp_scaling = True  # torch's word for: looks at found_inf

    def __init__(self, groups: list[Group], rule: Rule, **settings: float):
        self.rule = rule
        super().__init__(groups, settings)

    @property
    def name(self) -> str:
        return self.rule.name

    def state_shapes(self, parameter: Tensor) -> dict[str, torch.Size]:
        """Of what a checkpoint holds for `parameter`."""
        return {name: value.shape for name, value in self.rule.start(parameter.detach().to("meta")).items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `self.found_inf` is 1.0."""
        if closure is not None:
            raise ValueError(f"{self.name} takes no closure")
        skip = skip_flag(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.rule.start(parameter.detach()))
                weight, values = self.rule.update(parameter, parameter.grad, state, group)
                assign(parameter, weight, skip)
                for name, value in values.items():
                    assign(state[name], value, skip)


def skip_flag(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """0-dim bool on the device: whether this step is left out. None where nobody has said."""
    found_inf = getattr(optimizer, "found_inf", None)
    return None if found_inf is None else found_inf.reshape(()) != 0


def assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """target <- value, unless the device-side flag `skip` says to keep it."""
    target.copy_(value if skip is None else torch.where(skip, target, value))


def decayed(weight: Tensor, group: Group) -> Tensor:
    """After decoupled weight decay (arXiv 1711.05101)."""
    return weight * (1.0 - group["lr"] * group["weight_decay"])


def counter(parameter: Tensor) -> Tensor:
    """A 0-dimensional zero beside `parameter`."""
    return torch.zeros((), device=parameter.device)


# ---- Lion: the sign of an interpolated momentum (Chen et al., arXiv 2302.06675, algorithm 2) ---------------------------


def _lion(weight: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    direction = torch.lerp(state["momentum"], gradient, 1.0 - group["beta1"]).sign_()
    momentum = torch.lerp(state["momentum"], gradient, 1.0 - group["beta2"])
    return decayed(weight, group).sub_(direction, alpha=group["lr"]), {"momentum": momentum}


LION = Rule("Lion", lambda parameter: {"momentum": torch.zeros_like(parameter)}, _lion)


# ---- SGD with heavy-ball momentum, as torch.optim.SGD, but with decoupled decay (arXiv 1711.05101, algorithm 1) --------


def _sgd(weight: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    momentum = state["momentum"] * group["momentum"] + gradient
    return decayed(weight, group).sub_(momentum, alpha=group["lr"]), {"momentum": momentum}


SGD = Rule("SGD", lambda parameter: {"momentum": torch.zeros_like(parameter)}, _sgd)


# ---- Schedule-free AdamW (Defazio et al., arXiv 2405.15682, algorithm 1) -----------------------------------------------


def _schedule_free(weight: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    """The weight is y, where gradients are taken; z makes the steps; x, their average, is what training is for.

    y = beta1 x + (1 - beta1) z, so x is not kept: training/averages.py works it out where it is wanted. A step counts in
    the average by the square of the largest learning rate so far, so warm-up steps count little.
    """
    step = state["step"] + 1
    lr_max = state["lr_max"].clamp_min(group["lr"])
    # the sum of all squares over the newest: it grows by 1 a step, where the sum itself would lose digits
    total = state["total"] * (state["lr_max"] / lr_max).square() + 1
    share = 1 / total  # of z in x from here on
    squares = torch.lerp(state["exp_avg_sq"], gradient.square(), 1.0 - group["beta2"])
    denominator = (squares / (1 - group["beta2"] ** step)).sqrt_().add_(group["eps"])
    direction = gradient / denominator + group["weight_decay"] * weight
    y = torch.lerp(weight, state["z"], share) + direction * (group["lr"] * (group["beta1"] * (1 - share) - 1))
    z = state["z"] - direction * group["lr"]
    return y, {"step": step, "lr_max": lr_max, "total": total, "exp_avg_sq": squares, "z": z}


def _start_schedule_free(parameter: Tensor) -> State:
    counters = {name: counter(parameter) for name in ("step", "lr_max", "total")}
    return counters | {"exp_avg_sq": torch.zeros_like(parameter), "z": parameter.clone()}


SCHEDULE_FREE = Rule("ScheduleFreeAdamW", _start_schedule_free, _schedule_free)
