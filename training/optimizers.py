"""Which optimizers are there, and which of them updates which parameter with which learning rate and decay?

`OPTIMIZERS` is the table. What it lists gets the trainable parameters in groups, by role and by depth, and makes
optimizers of them; a function in a user's own file may do so instead (`--optimizer_file`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from sharding import mesh_of
from training.adafactor import ADAFACTOR
from training.adamw8bit import ADAMW_8BIT
from training.muon import Muon
from training.update_rules import LION, SCHEDULE_FREE, SGD, ByRule, Group, Rule
from training.user_code import read_optimizer


@dataclass(frozen=True)
class Settings:
    """What is the same for all groups. muon_dtype: of Muon's matrix products; bf16 where the device is fast in it."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    muon_dtype: torch.dtype = torch.float32


Builder = Callable[[list[Group], Settings], "torch.optim.Optimizer | list[torch.optim.Optimizer]"]
HIDDEN, OTHER, UNDECAYED = "hidden", "other", "undecayed"  # roles of parameters


def _adamw(groups: list[Group], settings: Settings) -> list[torch.optim.Optimizer]:
    # fused is the only implementation that honours found_inf; CPU, CUDA, MPS and XPU all have it
    betas = settings.beta1, settings.beta2
    return [torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=True)] if groups else []


def _muon(groups: list[Group], settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the blocks, AdamW on the rest: one learning rate serves both, because Muon's update is
    scaled to the size that AdamW's usually has."""
    matrices = [group for group in groups if group["role"] == HIDDEN]
    momentum, dtype = settings.momentum, settings.muon_dtype
    muon = [Muon(matrices, lr=0.0, momentum=momentum, iteration_dtype=dtype)] if matrices else []
    return [*muon, *_adamw([group for group in groups if group["role"] != HIDDEN], settings)]


def _by(rule: Rule, *names: str) -> Builder:
    """The builder for a rule that reads these settings."""
    return lambda groups, settings: ByRule(groups, rule, **{name: getattr(settings, name) for name in names})


RULES = {"adamw8bit": ADAMW_8BIT, "adafactor": ADAFACTOR, "lion": LION, "sgd": SGD, "schedule_free": SCHEDULE_FREE}
OPTIMIZERS: dict[str, Builder] = {
    "adamw": _adamw,
    "muon": _muon,
    "adamw8bit": _by(ADAMW_8BIT, "beta1", "beta2", "eps"),
    "adafactor": _by(ADAFACTOR),
    "lion": _by(LION, "beta1", "beta2"),
    "sgd": _by(SGD, "momentum"),
    "schedule_free": _by(SCHEDULE_FREE, "beta1", "beta2", "eps"),
}


def build_optimizers(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    layer_lr_decay: float = 1.0,
    file: str | None = None,
    **settings: Any,
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every trainable parameter of `model` (in DDP or not) exactly once.

    name: in OPTIMIZERS. file: "FILE.py:FUNCTION" that builds them instead. settings: fields of `Settings`.
    Weight decay is decoupled (arXiv 1711.05101) and reaches matrices only: norms, biases and embeddings (a head tied
    to the embedding is one) have none. Each group carries `base_lr`, `learning_rate` times `layer_lr_decay` to the power
    of its depth from the top; the loop sets `group["lr"] = group["base_lr"] * factor`.

    Set `optimizer.found_inf` to a one-element float tensor on the parameters' device before `step()` to skip the step
    on the device, without asking the host: at 1.0 parameters and state keep their bits, at 0.0 it is an ordinary step.

    Raises ValueError for an unknown name or a model with nothing to train, UserError for a `file` that does not do that.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimizer must be one of {tuple(OPTIMIZERS)}, not {name!r}")
    groups = parameter_groups(model, learning_rate, weight_decay, layer_lr_decay)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    chosen = OPTIMIZERS[name] if file is None else load_builder(file)
    built = chosen(groups, Settings(**settings))
    optimizers = built if isinstance(built, list) else [built]
    if file is not None:
        _check_built(file, optimizers, groups)
    return optimizers


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_lr_decay: float = 1.0
) -> list[Group]:
    """What is trained, in groups: params, role (hidden, other, undecayed), weight_decay, lr and base_lr; none is empty."""
    num_layers = 1 + max(
        (layer for name, _ in model.named_parameters() if (layer := _layer(name)) is not None), default=-1
    )
    found: dict[tuple[str, float, Any], list[nn.Parameter]] = {}
    roles = parameter_roles(model)
    for role in (HIDDEN, OTHER, UNDECAYED):
        for name, parameter in model.named_parameters():
            if roles.get(name) == role:
                factor = layer_lr_decay ** depth_from_top(name, num_layers)
                found.setdefault((role, factor, mesh_of(parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "role": role,
            "weight_decay": 0.0 if role == UNDECAYED else weight_decay,
            "lr": learning_rate * factor,
            "base_lr": learning_rate * factor,
        }
        for (role, factor, _), parameters in found.items()
    ]


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Of each trainable parameter: a matrix inside the blocks, experts' too; another one, such as the head; never decayed.

    Routers are among the others: their rows are scores of single experts, and none of them a direction of many.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    roles = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            roles[name] = UNDECAYED
        else:
            inside = _layer(name) is not None and not name.endswith(".mlp.gate.weight")
            roles[name] = HIDDEN if inside else OTHER
    return roles


def depth_from_top(name: str, num_layers: int) -> int:
    """0 for the head and the last norm, 1 for the last block, num_layers for the first, one more for embeddings.

    As Clark et al. (arXiv 2003.10555) count; an adapter is as deep as its block.
    """
    layer = _layer(name)
    if layer is not None:
        return num_layers - layer
    return num_layers + 1 if any(part.startswith("embed_") for part in name.split(".")) else 0


def _layer(name: str) -> int | None:
    """The number of the block that a parameter lies in."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def state_bytes(name: str, role: str, parameter: Tensor) -> int:
    """Of what an optimizer of the table keeps beside a parameter, which may be on "meta"; counters are left out."""
    if name in RULES:
        return sum(value.nbytes for value in RULES[name].start(parameter).values() if value.ndim)
    moments = 1 if name == "muon" and role == HIDDEN else 2
    return moments * 4 * parameter.numel()


# ---- optimizers of a user's own ----------------------------------------------------------------------------------------


@cache  # a file is run once, however often options are looked at
def load_builder(where: str) -> Builder:
    """The function that "FILE.py:FUNCTION" means; runs the file. Raises UserError."""
    code, name = read_optimizer(where)
    return code.run()[name]


def _check_built(where: str, optimizers: list[Any], groups: list[Group]) -> None:
    """UserError unless these are torch optimizers that hold each parameter once; gives their groups what the loop reads."""
    if not optimizers or not all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers):
        raise UserError(f"--optimizer_file {where} must return a torch.optim.Optimizer, or a list of them")
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    wanted = [id(p) for group in groups for p in group["params"]]
    if sorted(held) != sorted(wanted):
        raise UserError(
            f"--optimizer_file {where} returned optimizers of {len(held)} parameters, {len(set(held) & set(wanted))} of the "
            f"{len(wanted)} that are trained: each must be in one group of one optimizer"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]  # which the file may have chosen
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            _skip_on_the_host(optimizer)


def _skip_on_the_host(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that does not look at found_inf leave out a step all the same; it waits for the device each time."""
    step = optimizer.step

    def step_if_finite() -> None:
        if not getattr(optimizer, "found_inf", False):
            step()

    optimizer.step = step_if_finite  # type: ignore[assignment, method-assign]
