"""What learns when the model is frozen? Low-rank adapters on its linear layers, whose weights may be 4-bit.

LoRA (Hu et al. 2021): a frozen weight W gets scale · B A beside it, scale = alpha / rank, and only A and B learn. QLoRA
(Dettmers et al. 2023): W is kept in NF4. A layer keeps its name, and its adapters' A and B lie beside its weight, in fp32
whatever the frozen weights are in.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from kernels.lora_linear import Adapter, augmented_weight, choose_path, device_name, lora_linear, store_adapters
from kernels.nf4 import NF4Weight, quantise_nf4
from kernels.nf4_linear import nf4_linear
from kernels.norm_lora import norm_lora_linear
from kernels.rms_norm import rms_norm
from model import RMSNorm, Transformer

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTISATIONS = (None, "nf4")
_NF4_TENSORS = ("packed", "absmax", "code", "absmax2", "offset")


class LoraLinear(nn.Module):
    """A frozen linear layer without bias and its adapters, by name; those in `active` are added."""

    def __init__(self, weight: Tensor, dropout: float, quantise: str | None, implementation: str):
        super().__init__()
        self.shape, self.dropout, self.quantised = tuple(weight.shape), dropout, quantise is not None
        self.implementation = implementation  # of NF4
        self.path = "torch"  # of LoRA; see kernels/lora_linear.py
        if self.quantised:
            for name, tensor in zip(_NF4_TENSORS, quantise_nf4(weight).tensors, strict=True):
                self.register_buffer(name, tensor)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.augmented: Tensor | None = None

    def add(self, name: str, a: Tensor, scale: float) -> None:
        """A new adapter that starts from A and adds nothing: its B is zero."""
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(a.new_zeros(self.shape[0], len(a)))
        self.scales[name] = scale
        self.active = (*self.active, name)

    def adapters(self) -> list[Adapter]:
        return [Adapter(self.lora_A[name], self.lora_B[name], self.scales[name]) for name in self.active]

    def take_path(self, path: str) -> None:
        """Compute in this way from now on. For "augmented" the weight moves into a buffer that holds B too."""
        self.path = path
        if path == "augmented":
            self.augmented = augmented_weight(self.weight, self.adapters())
            self.weight.data = self.augmented[:, : self.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if not self.quantised:
            x = x.to(self.weight.dtype)
            return lora_linear(
                x, self.weight, self.adapters(), dropout=dropout, path=self.path, augmented=self.augmented
            )
        weight = NF4Weight(*(getattr(self, name) for name in _NF4_TENSORS), self.shape)
        if not dropout:
            return nf4_linear(x, weight, self.adapters(), implementation=self.implementation)
        y = nf4_linear(x, weight, implementation=self.implementation)
        for adapter in self.adapters():  # the mask is the adapter's alone, so it cannot join the one product
            low = F.linear(F.dropout(x, dropout), adapter.a.to(x.dtype))
            y = y + adapter.scale * F.linear(low, adapter.b.to(x.dtype))
        return y


class NormProjections(nn.Module):
    """A norm, and behind it projections of the same input with their adapters, as one operation (kernels/norm_lora.py).

    It stands in the norm's place, under its name and with its weight; the layers keep theirs, whose weights become rows of
    the joint buffer.
    """

    def __init__(self, norm: RMSNorm, layers: Sequence[LoraLinear], implementation: str):
        super().__init__()
        self.weight, self.eps, self.implementation = norm.weight, norm.eps, implementation
        self.layers = tuple(layers)  # not a ModuleList: each has its own name in the model
        width = layers[0].shape[1]
        self.augmented = augmented_weight(torch.cat([layer.weight for layer in layers]), self.adapters())
        for layer, first, last in zip(layers, self._starts(), self._starts()[1:], strict=False):
            layer.weight.data = self.augmented[first:last, :width]

    def _starts(self) -> list[int]:
        return [0, *accumulate(layer.shape[0] for layer in self.layers)]

    def adapters(self) -> list[Adapter]:
        return [
            replace(adapter, first_row=first)
            for layer, first in zip(self.layers, self._starts(), strict=False)
            for adapter in layer.adapters()
        ]

    def add(self, x: Tensor, update: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
        """(all projections of norm(x + update) side by side, x + update)."""
        if adapters := self.adapters():
            return norm_lora_linear(
                x, self.weight, self.eps, self.augmented, adapters, update=update, implementation=self.implementation
            )
        s = x if update is None else x + update
        normed = rms_norm(s, self.weight, self.eps, out_dtype=self.augmented.dtype, implementation=implementation)
        return F.linear(normed, self.augmented[:, : x.shape[-1]]), s


def join_projections(model: Transformer, implementation: str) -> None:
    """In every block make q, k, v together with the norm before them, and gate and up with theirs.

    For adapters on all of these, without dropout, over weights that are not quantised; ValueError otherwise.
    """
    for block in model.model["layers"]:
        for part, norm, names in (
            (block.self_attn, "input_layernorm", ("q_proj", "k_proj", "v_proj")),
            (block.mlp, "post_attention_layernorm", ("gate_proj", "up_proj")),
        ):
            layers = [getattr(part, name) for name in names]
            if any(not isinstance(layer, LoraLinear) or layer.quantised or layer.dropout for layer in layers):
                raise ValueError(f"{', '.join(names)} cannot be joined: each needs adapters, without dropout or NF4")
            setattr(block, norm, NormProjections(getattr(block, norm), layers, implementation))
            part.joint_sizes = [layer.shape[0] for layer in layers]


def add_adapters(
    model: Transformer,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] = BLOCK_LINEARS,
    quantise: str | None = None,
    name: str = "default",
    seed: int = 0,
    rows: int | None = None,
) -> None:
    """Freeze the model and put an adapter on each linear layer of its blocks whose name is in `targets`.

    A is uniform in ±1/√in (peft's default), drawn from (seed, layer's name); B is zero, so the model computes what it
    did. quantise: None, or "nf4" for the weights of all block linears, targeted or not. rows: tokens of a micro-batch,
    for which the way of computing is taken from what was measured on this device (default: the plain one). UserError
    for a target or quantisation that is not known.
    """
    joint = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}.issubset(targets) and not (quantise or dropout)
    if unknown := [target for target in targets if target not in BLOCK_LINEARS]:
        raise UserError(f"adapters: {unknown[0]} is not a layer of a block; choose from {', '.join(BLOCK_LINEARS)}")
    if quantise not in QUANTISATIONS:
        raise UserError(f"adapters: weights can be quantised to nf4, not {quantise}")
    model.requires_grad_(False)
    for path, linear in list(model.named_modules()):
        parent_path, _, child = path.rpartition(".")
        if child not in BLOCK_LINEARS or not (quantise or child in targets):
            continue
        parent = model.get_submodule(parent_path)
        if isinstance(linear, nn.Linear):
            linear = LoraLinear(linear.weight.data, dropout, quantise, model.kernels.nf4)
            setattr(parent, child, linear)
        if child in targets:
            linear.add(name, _draw_a(seed, f"{path}.{name}", rank, linear), alpha / rank)
            if rows and not linear.quantised:
                linear.take_path(_measured_path([linear], rows))
    if rows and joint and model.kernels.lora == "triton":
        attention, mlp = model.model["layers"][0].self_attn, model.model["layers"][0].mlp
        stacks = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        if all(_measured_path(stack, rows) == "augmented" for stack in stacks):
            join_projections(model, "triton")


def store_after_steps(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """After each optimizer step, copy what B learned to where "augmented" and joint layers multiply with it."""
    holders = [module for module in model.modules() if isinstance(module, (LoraLinear, NormProjections))]

    def store(*_) -> None:
        for holder in holders:
            if holder.augmented is not None and (adapters := holder.adapters()):
                store_adapters(holder.augmented, adapters)

    for optimizer in optimizers:
        optimizer.register_step_post_hook(store)


def _measured_path(stack: Sequence[LoraLinear], rows: int) -> str:
    """The way that was fastest for these layers as one stacked weight."""
    weight, out_features = stack[0].weight, sum(layer.shape[0] for layer in stack)
    total_rank = sum(len(layer.lora_A[name]) for layer in stack for name in layer.active)
    return choose_path(device_name(weight.device), weight.dtype, rows, out_features, stack[0].shape[1], total_rank)


def _draw_a(seed: int, name: str, rank: int, linear: LoraLinear) -> Tensor:
    """(rank, in) fp32 uniform in ±1/√in, from a generator of its own, so neither order nor device matters."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(linear.shape[1])
    a = torch.empty(rank, linear.shape[1]).uniform_(-bound, bound, generator=generator)
    return a.to(next(linear.buffers() if linear.quantised else linear.parameters()).device)
