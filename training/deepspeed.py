"""How does DeepSpeed hold a model's weights, gradients and optimizer state for this project's loop?

ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) shares out the optimizer state (stage 1), the gradients
too (2), and the weights too (3). DeepSpeed's engine does that, clips and steps. Everything else stays the loop's: the
data order, the division by the weight of all ranks, learning rates, metrics, and checkpoints, which are put together
tensor by tensor. Under stage 3 a block is one unit: its weights are gathered for the time that it computes. Embedding, head
and last norm stay gathered, as the loss reads the head's weight beside the model's forward.

DeepSpeed is imported where a run asks for it, and by nothing else.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batches.micro_batch import MicroBatch
from checkpointing.load import stored_states
from errors import UserError
from layers import Block
from ranks import Ranks, unwrap
from sharding import ZERO, Deferred
from training.config import TrainConfig
from training.deepspeed_json import engine_settings, read_settings
from training.metrics import Metrics
from training.precision import Precision

Loss = Callable[[nn.Module, MicroBatch], tuple[Tensor, Metrics]]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW:
    """DeepSpeed's engine in the optimizer's place: what the loop sets, a step of all ranks, what a checkpoint holds.

    It is the attribute ZERO of its model, which stays the module that it was.
    """

    name = "AdamW"  # as torch's is called in a checkpoint: the states are the same

    def __init__(
        self,
        model: nn.Module,
        adamw: torch.optim.Optimizer,
        settings: dict[str, Any],
        ranks: Ranks,
        precision: Precision,
    ):
        """model: whole on every rank. settings: from `training.deepspeed_json.engine_settings`."""
        deepspeed = _import_deepspeed(ranks)
        self._model, self._adamw, self._ranks = model, adamw, ranks
        self._shares_weights = settings["zero_optimization"]["stage"] == 3
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        if self._shares_weights:
            for block in blocks:
                deepspeed.utils.set_z3_leaf_module(block, True)
            # DeepSpeed takes a block for done when the gradient of its input is there, or at once where that needs none
            blocks[0].register_forward_pre_hook(_with_gradient)
        in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
        outside: list[Any] = [p for p in model.parameters() if id(p) not in in_blocks]
        # a block's gradients are taken together under stage 3
        self._watch(outside if self._shares_weights else list(model.parameters()))
        self.engine = deepspeed.initialize(
            model=_Computed(model, precision, ranks.device), optimizer=adamw, config=settings
        )[0]
        self._kept = outside if self._shares_weights else []
        for parameter in self._kept:
            # a module that has read it does not give it up, not even in the first steps, when DeepSpeed forgets the former
            parameter.ds_persist = parameter.is_external_param = True
        self._keep()
        self._start_states()
        vars(model)[ZERO] = self

    def _start_states(self) -> None:
        """What torch's AdamW begins with. Left to the first step, DeepSpeed would link only those of its first group."""
        zero = self.engine.optimizer
        for part in zero.fp32_partitioned_groups_flat if self._shares_weights else zero.single_partition_of_fp32_groups:
            moments = {name: torch.zeros_like(part, requires_grad=False) for name in _MOMENTS}
            self._adamw.state[part] = {"step": torch.zeros((), device=part.device), **moments}
        if not self._shares_weights:
            zero._lazy_init_hp_params_optimizer_state()

    def _watch(self, parameters: list[nn.Parameter]) -> None:
        """Keep account of the order in which gradients arrive: DeepSpeed adds them up over the ranks in that order."""
        self._order = 0

        def arrived(place: int) -> None:
            self._order = (self._order * 1_000_003 + place + 1) % (1 << 61)

        for place, parameter in enumerate(parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, place=place: arrived(place))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._adamw.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.optimizer.zero_grad(set_to_none)

    def loss(self, compute: Loss) -> Loss:
        """`compute`, called by the engine, which then follows its backward pass."""
        return lambda model, batch: self.engine(compute, batch)

    def accumulate(self, last: bool) -> None:
        """Before a micro-batch: whether it is the last one of its step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def update(self, lr_factor: float, bad_steps: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step; gradients that are not finite leave everything as it was.

        Returns their norm before it was clipped, and how many steps in a row are bad now. UserError where a model does not
        compute the same on all ranks.
        """
        if self._ranks.largest(self._order) != -self._ranks.largest(-self._order):
            raise UserError(
                "--strategy deepspeed: gradients were ready in another order on some ranks than on others, and DeepSpeed would "
                "mix them up; go on from the last checkpoint with --strategy fsdp"
            )
        self._order = 0
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self.engine.step()
        self._keep()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.engine.device)
        return norm, torch.where(torch.isfinite(norm), 0.0, bad_steps + 1)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, each rank has all of the model and may use it alone. Every rank enters; nothing is trained inside."""
        if not self._shares_weights:
            yield
            return
        import deepspeed

        offload = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self._model.parameters())):
            offload._remove_module_hooks()  # they would give a block up when it has computed
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()
        self._keep()

    def _keep(self) -> None:
        """Gather what stays so; a step gives up everything."""
        if self._kept:
            self._kept[0].all_gather(self._kept)

    def named_states(self) -> dict[str, Tensor]:
        """What torch's AdamW would hold, "PARAMETER.STATE"; moments are put together when their turn comes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self._adamw.state.values()))["step"]  # DeepSpeed updates all or none
        states: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            states[f"{name}.step"] = step
            meta = torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=torch.float32, device="meta")
            for moment in _MOMENTS:

                def build(parameter=parameter, moment=moment) -> Tensor:
                    return safe_get_full_optimizer_state(parameter, moment)

                states[f"{name}.{moment}"] = Deferred.like(meta, build)
        return states

    def load(self, path: Path) -> None:
        """Take the states that a checkpoint holds, whoever wrote it, tensor by tensor. UserError where they do not fit."""
        parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        steps = {name: value for name, state, value in stored_states(path, [self]) if state == "step"}
        if not steps:
            return
        if unknown := steps.keys() - parameters.keys():
            raise UserError(f"checkpoint {path} has optimizer state of what this model does not train: {min(unknown)}")
        if steps.keys() != parameters.keys() or len({float(step) for step in steps.values()}) > 1:
            raise UserError(
                f"checkpoint {path} is of a run in which some weights learned in fewer steps than others, which DeepSpeed "
                "does not count: go on with --strategy fsdp"
            )
        for state in self._adamw.state.values():
            state["step"].fill_(next(iter(steps.values())))
        for name, moment, value in stored_states(path, [self]):
            if moment != "step":
                self._set(parameters[name], moment, value.clone())

    def _set(self, parameter: Any, moment: str, value: Tensor) -> None:
        """This rank's part of a moment, which stage 3 pads to the same length on each rank."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self._shares_weights:
            return safe_set_full_optimizer_state(parameter, value.to(self.engine.device), moment)
        length, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        part = value.flatten()[length * rank : length * (rank + 1)]
        return safe_set_local_optimizer_state(parameter, nn.functional.pad(part, (0, length - part.numel())), moment)


def start_engine(
    config: TrainConfig, model: nn.Module, adamw: torch.optim.Optimizer, ranks: Ranks, precision: Precision,
    checkpoint: Path | None,
) -> ZeroAdamW:  # fmt: skip
    """Share out a model that is whole on every rank and what its AdamW holds, as --deepspeed says. UserError."""
    assert config.deepspeed is not None
    if precision.dtype == torch.float16:
        raise UserError(
            "--strategy deepspeed computes in bf16 or fp32, and this GPU has no bf16: add --mixed_precision none"
        )
    settings = engine_settings(
        read_settings(config.deepspeed), grad_clip=config.grad_clip, hidden_size=unwrap(model).config.hidden_size,
        world_size=ranks.world_size,
    )  # fmt: skip
    zero = ZeroAdamW(model, adamw, settings, ranks, precision)
    if checkpoint is not None:
        zero.load(checkpoint)
    return zero


class _Computed(nn.Module):
    """What the engine calls its model: a loss of it, so that all that the loss reads is read inside of a forward pass."""

    def __init__(self, model: nn.Module, precision: Precision, device: torch.device):
        super().__init__()
        self.model, self._precision, self._device = model, precision, device

    def forward(self, compute: Loss, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        with self._precision.autocast(self._device):  # once more, as the engine switches the loop's off
            return compute(self.model, batch)


def _with_gradient(module: nn.Module, arguments: tuple) -> tuple:
    hidden, *others = arguments
    return (hidden.requires_grad_() if torch.is_grad_enabled() and hidden.is_leaf else hidden, *others)


def _import_deepspeed(ranks: Ranks) -> Any:
    """DeepSpeed, quiet, on this project's device and process group. UserError where it is not installed."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"--strategy deepspeed: {error}; install it with pip install -r requirements-distributed.txt"
        ) from error
    # compiled for minutes, it would add up in inference alone; a killed compiler leaves a lock that others wait on for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
