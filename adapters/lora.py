"""What learns when the model is frozen? Low-rank adapters on its linear layers, whose weights may be 4-bit.

LoRA (Hu et al. 2021): a frozen weight W gets scale · B A beside it, scale = alpha / rank, and only A and B learn.
rsLoRA (Kalajdzievski 2023): scale = alpha / √rank. DoRA (Liu et al. 2024): row i of W + scale · B A is stretched to a
length m_i that learns too. QLoRA (Dettmers et al. 2023): W is kept in NF4. A layer keeps its name, and its adapters' A,
B and m lie beside its weight, in fp32 whatever the frozen weights are in: in bf16 a step of m is often too small to
change it. The files of adapters are in adapter_files.py.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.quantised_experts import STACKS, NF4Experts, quantise_experts
from adapters.token_rows import store_rows
from errors import UserError
from families.weights import stored_path, stored_views
from kernels.linear import linear
from kernels.lora_linear import Adapter, augmented_weight, choose_path, device_name, lora_linear, masked, store_adapters
from kernels.nf4 import NF4Weight, dequantise_nf4, quantise_nf4
from kernels.nf4_linear import nf4_linear
from kernels.norm_lora import norm_lora_linear
from kernels.rms_norm import rms_norm
from layers import RMSNorm
from model import Transformer
from ranks import unwrap
from tensor_parallel import TensorGroup, own

# the linear layers of a block that adapters and NF4 may have, by the model's own names
BLOCK_LINEARS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
ALL_LINEAR = "all-linear"  # as in PEFT: the linear layers of the blocks, without the head
SCORE = "score.weight"  # the head of a reward model
QUANTISATIONS = (None, "nf4")
_NF4_TENSORS = ("packed", "absmax", "code", "absmax2", "offset")
# of a block: the part, the norm that it reads from, and those of its layers that read from there
_STACKS = (
    ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
    ("mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
)

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class AdapterSettings:
    """What one adapter was made with, in the words of PEFT's adapter_config.json.

    targets: each the name of linear layers ("q_proj"), or the end or whole of a path ("layers.0.mlp.up_proj"). All paths
    are those of the model's family ("transformer.h.0.attn.c_attn"), as PEFT sees them. rank_pattern, alpha_pattern: other
    values for the layers whose path ends with the regular expression; the first that fits counts. UserError for a rank or
    dropout that cannot be.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise UserError(f"adapters: the rank is {rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapters: the dropout is {self.dropout}; it must be from 0 up to, not including, 1")

    def has(self, path: str) -> bool:
        return any(path == target or path.endswith(f".{target}") for target in self.targets)

    def rank_of(self, path: str) -> int:
        return _first_fitting(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """What B A is multiplied with in the layer at `path`."""
        rank, alpha = self.rank_of(path), _first_fitting(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _first_fitting(patterns: dict, path: str, otherwise):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise


def adapter_settings(model: nn.Module) -> dict[str, AdapterSettings]:
    """The settings of each adapter of the model, by name; empty where there are none."""
    return vars(unwrap(model)).get("adapters", {})


def block_linears(model: nn.Module) -> dict[str, str]:
    """The linear layers of the blocks by their path in the model: their path in its family's classes.

    Of a mixture of experts those of attention alone: PEFT takes the names of an MLP's layers for the experts there.
    """
    inner = unwrap(model)
    parts = (".self_attn.",) if inner.config.num_experts else (".self_attn.", ".mlp.")
    return {
        path: stored_path(inner.config.family, path)
        for path, layer in inner.named_modules()
        if path.rpartition(".")[2] in BLOCK_LINEARS and isinstance(layer, (nn.Linear, LoraLinear))
        if any(part in path for part in parts)
    }


def target_names(model: nn.Module) -> tuple[str, ...]:
    """The names by which adapters' targets are called: the last word of a path, or two where one says too little."""
    words = [path.split(".") for path in block_linears(model).values()]
    return tuple(dict.fromkeys(".".join(each[-2:] if each[-1] == "dense" else each[-1:]) for each in words))


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The heads that learn whole beside adapters, by the model's names: of models that give scores or a task's logits."""
    inner = unwrap(model)
    heads = tuple(f"{path}." for path in getattr(inner, "heads", ()))
    return {name: parameter for name, parameter in inner.named_parameters() if name.startswith(heads)}


def is_quantised(model: nn.Module) -> bool:
    """Whether layers of the model are in NF4."""
    return any(isinstance(module, LoraLinear) and module.quantised for module in model.modules())


# --------------------------------------------------------------------------------------------------------------- layers


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapters, by name; those in `active` are added, in that order.

    group, sums: as those of layers.Linear.
    """

    group: TensorGroup | None = None
    sums = False

    read_in_a_pass = ("active", "training", "token_keys")  # kernels/recompute.py

    def __init__(self, weight: Tensor | NF4Weight, implementation: str, bias: Tensor | None = None):
        super().__init__()
        self.shape, self.quantised = tuple(weight.shape), isinstance(weight, NF4Weight)
        self.implementation = implementation  # of NF4
        if isinstance(weight, NF4Weight):
            self.blocks = weight.block, weight.absmax_block
            for name, tensor in zip(_NF4_TENSORS, weight.tensors, strict=True):
                self.register_buffer(name, tensor)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()  # m, of DoRA's adapters
        self.scales: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.token_keys: Tensor | None = None  # (B, T) int64: what decides on dropout's masks; see set_token_keys
        self.stream = 0  # this layer's masks among those of the same tokens
        self.active: tuple[str, ...] = ()
        self.path = "torch"  # of LoRA; see kernels/lora_linear.py
        self.augmented: Tensor | None = None
        self.stored: tuple[str, ...] = ()  # the adapters whose B is in `augmented`

    def add(self, name: str, a: Tensor, scale: float, *, dropout: float, dora: bool) -> None:
        """A new adapter that starts from A and changes nothing: its B is zero, its m the length of each row."""
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(a.new_zeros(self.shape[0], len(a)))
        if dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.frozen_weight().norm(dim=1))
        self.scales[name], self.dropouts[name] = scale, dropout
        self.active = (*self.active, name)

    def adapters(self) -> list[Adapter]:
        return self._adapters(self.active)

    def stored_adapters(self) -> list[Adapter]:
        """Those that the buffer holds, which need not be the active ones."""
        return self._adapters(self.stored)

    def _adapters(self, names: Iterable[str]) -> list[Adapter]:
        a, b = self.lora_A, self.lora_B
        return [Adapter(self._own(a[name]), self._own(b[name]), self.scales[name]) for name in names]

    def _own(self, parameter: Tensor) -> Tensor:
        return parameter if self.group is None else own(parameter)

    def take_path(self, path: str) -> None:
        """Compute in this way from now on. For "augmented" the weight moves into a buffer that holds B too."""
        self.path, self.augmented, self.stored = path, None, ()
        if path == "augmented":
            self.stored = self.active
            self.augmented = augmented_weight(self.weight, self.stored_adapters())
            self.weight.data = self.augmented[:, : self.shape[1]]

    def nf4_weight(self) -> NF4Weight:
        tensors = {name: getattr(self, name) for name in _NF4_TENSORS}
        block, absmax_block = self.blocks
        return NF4Weight(**tensors, shape=self.shape, block=block, absmax_block=absmax_block)

    def frozen_weight(self) -> Tensor:
        """W (out, in) in fp32; the weight itself if it is fp32."""
        if self.quantised:
            return dequantise_nf4(self.nf4_weight(), torch.float32, implementation=self.implementation)
        return self.weight.detach().float()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """(out, in) fp32: the weight that computes what this layer does with its active adapters.

        In float64 up to the last rounding, because float32 products may be TF32 on a GPU.
        """
        frozen = merged = self.frozen_weight().double()
        for name in self.active:
            update = self.scales[name] * (self.lora_B[name].double() @ self.lora_A[name].double())
            merged = merged + update
            if name in self.lora_magnitude_vector:
                lengths = (frozen + update).norm(dim=1)
                merged = merged * (self.lora_magnitude_vector[name].double() / lengths)[:, None]
        return merged.float()

    def forward(self, x: Tensor) -> Tensor:
        y = self._without_bias(x)
        if self.group is not None and self.sums:
            y = self.group.leaving(y)
        return y if self.bias is None else y + self._own(self.bias).to(y.dtype)

    def _without_bias(self, x: Tensor) -> Tensor:
        dropouts = {self.dropouts[name] for name in self.active} if self.training else set()
        dropout = max(dropouts, default=0.0)
        dora = any(name in self.lora_magnitude_vector for name in self.active)
        if not self.quantised:
            x = x.to(self.weight.dtype)
        # where adapters have masks of their own over NF4, or differ in them, no one product computes them all
        if dora or len(dropouts) > 1 or (dropout and self.quantised):
            return self._one_by_one(x)
        if self.quantised:
            return nf4_linear(x, self.nf4_weight(), self.adapters(), implementation=self.implementation)
        path = "torch" if self.path == "augmented" and self.active != self.stored else self.path
        return lora_linear(
            x, self._own(self.weight), self.adapters(), dropout=dropout, keys=self._keys(), path=path, augmented=self.augmented
        )  # fmt: skip

    def _keys(self) -> tuple[Tensor, int] | None:
        return None if self.token_keys is None else (self.token_keys, self.stream)

    def _one_by_one(self, x: Tensor) -> Tensor:
        """y = x Wᵀ, then for each active adapter in turn y + update, or with DoRA m / |W + scale · B A| · (y + update).

        Under dropout DoRA's frozen part sees the masked x as well (PEFT's reading of the paper's equation 5).
        """
        y = self._frozen_product(x)
        for number, name in enumerate(self.active):
            dropout = self.dropouts[name] if self.training else 0.0
            branch = masked(x, dropout, self._keys(), number) if dropout else x
            low = F.linear(branch, self.lora_A[name].to(x.dtype))
            update = self.scales[name] * F.linear(low, self.lora_B[name].to(x.dtype))
            if name not in self.lora_magnitude_vector:
                y = y + update
                continue
            factor = self._stretch(name)
            if dropout:
                stretched = y + (factor - 1) * self._frozen_product(branch) + factor * update
            else:
                stretched = factor * (y + update)
            y = stretched.to(y.dtype)
        return y

    def _frozen_product(self, x: Tensor) -> Tensor:
        if self.quantised:
            return nf4_linear(x, self.nf4_weight(), implementation=self.implementation)
        return linear(x, self._own(self.weight))

    def _stretch(self, name: str) -> Tensor:
        """m / |row of W + scale · B A| (out,) fp32. The length is a constant to the gradient (section 4.3 of DoRA)."""
        a, b = self.lora_A[name], self.lora_B[name]
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            lengths = torch.addmm(self.frozen_weight(), b, a, alpha=self.scales[name]).norm(dim=1)
        return self.lora_magnitude_vector[name] / lengths


def set_token_keys(model: nn.Module, keys: Tensor) -> None:
    """Let the dropout of every adapter, in training mode, be decided by these keys (B, T) int64 until others are set.

    They stay, so that an activation that is computed again in the backward pass gets the same mask. The model's own
    dropout follows them too. Where ranks share rows, each takes those of its own tokens.
    """
    adapters = any(settings.dropout for settings in adapter_settings(model).values())
    keys = next((module.own_tokens(keys) for module in model.modules() if isinstance(module, Transformer)), keys)
    for module in model.modules():
        if (isinstance(module, LoraLinear) and adapters) or (isinstance(module, Transformer) and module.dropout):
            module.token_keys = keys


class NormProjections(nn.Module):
    """A norm, and behind it projections of the same input with their adapters, as one operation (kernels/norm_lora.py).

    It stands in the norm's place, under its name and with its weight; the layers keep theirs, whose weights become rows of
    the joint buffer.
    """

    def __init__(self, norm: RMSNorm, layers: Sequence[LoraLinear], implementation: str):
        super().__init__()
        self.weight, self.eps, self.implementation = norm.weight, norm.eps, implementation
        self.layers = tuple(layers)  # not a ModuleList: each has its own name in the model
        self.stored = tuple(layer.active for layer in layers)  # the adapters whose B is in `augmented`
        width = layers[0].shape[1]
        self.augmented = augmented_weight(torch.cat([layer.weight for layer in layers]), self.stored_adapters())
        for layer, first, last in zip(layers, self._starts(), self._starts()[1:], strict=False):
            layer.take_path("torch")
            layer.weight.data = self.augmented[first:last, :width]

    def _starts(self) -> list[int]:
        return [0, *accumulate(layer.shape[0] for layer in self.layers)]

    def stored_adapters(self) -> list[Adapter]:
        return [
            Adapter(layer.lora_A[name], layer.lora_B[name], layer.scales[name], first)
            for layer, first, names in zip(self.layers, self._starts(), self.stored, strict=False)
            for name in names
        ]

    def add(self, x: Tensor, update: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
        """(all projections of norm(x + update) side by side, x + update)."""
        active = tuple(layer.active for layer in self.layers)
        if any(active) and active == self.stored:
            adapters = self.stored_adapters()
            return norm_lora_linear(
                x, self.weight, self.eps, self.augmented, adapters, update=update, implementation=self.implementation
            )
        s = x if update is None else x + update
        normed = rms_norm(s, self.weight, self.eps, out_dtype=self.augmented.dtype, implementation=implementation)
        if any(active):
            return torch.cat([layer(normed) for layer in self.layers], -1), s
        return F.linear(normed, self.augmented[:, : x.shape[-1]]), s


def join_projections(model: Transformer, implementation: str) -> None:
    """In every block make q, k, v together with the norm before them, and gate and up with theirs.

    For LoRA on all of these, without dropout, over weights that are not quantised; ValueError otherwise.
    """
    for block in model.model.layers:
        for part, norm, names in _STACKS:
            layers = [getattr(getattr(block, part), name) for name in names]
            if not all(_is_plain_lora(layer) for layer in layers):
                raise ValueError(f"{', '.join(names)} cannot be joined: each needs LoRA, without dropout, DoRA or NF4")
            setattr(block, norm, NormProjections(getattr(block, norm), layers, implementation))
            getattr(block, part).joint_sizes = [layer.shape[0] for layer in layers]


def _is_plain_lora(layer: nn.Module) -> bool:
    if not isinstance(layer, LoraLinear) or layer.quantised or layer.bias is not None:
        return False
    return bool(layer.active) and not layer.lora_magnitude_vector and not any(layer.dropouts.values())


# --------------------------------------------------------------------------------------------------- putting them there


def add_adapters(
    model: Transformer,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] = (ALL_LINEAR,),
    rslora: bool = False,
    dora: bool = False,
    quantise: str | None = None,
    name: str = "default",
    seed: int = 0,
    rows: int | None = None,
) -> None:
    """Freeze the model and put an adapter on each linear layer of its blocks whose name is in `targets`.

    targets: the family's names (`target_names`), or "all-linear" for all of them. rank, alpha, dropout, rslora, dora: see
    the file's docstring. The rest as in `place_adapters`. UserError for a target or quantisation that is not known.
    """
    known, paths = target_names(model), block_linears(model).values()
    targets = known if ALL_LINEAR in targets else tuple(targets)  # "all-linear" in "all-linear", too
    for target in targets:
        if not any(path.endswith(f".{target}") for path in paths):
            choices = ", ".join((*known, ALL_LINEAR))
            raise UserError(f"adapters: {target} is not a linear layer of a block; choose from {choices}")
    settings = AdapterSettings(rank, alpha, dropout, rslora, dora, targets)
    place_adapters(model, name, settings, quantise=quantise, seed=seed, rows=rows)


def place_adapters(
    model: Transformer,
    name: str,
    settings: AdapterSettings,
    *,
    quantise: str | None = None,
    seed: int = 0,
    rows: int | None = None,
) -> None:
    """Freeze all of the model but its adapters and heads that learn whole, and add the adapter `name` to what is active.

    A is uniform in ±1/√in (PEFT's default), drawn from (seed, layer's name); B is zero, so the model computes what it
    did. quantise: None, or "nf4" for the weights of all block linears, targeted or not. rows: tokens of a micro-batch,
    for which the way of computing is taken from what was measured on this device (default: the plain one). UserError
    for an unknown quantisation, ValueError for a name that is taken or cannot be one.
    """
    if quantise not in QUANTISATIONS:
        raise UserError(f"weights can be quantised to nf4, not {quantise}")
    if not name.isidentifier() or hasattr(nn.ParameterDict, name) or name in adapter_settings(model):
        raise ValueError(f"{name!r} cannot be the name of an adapter, or is that of another one")
    heads = head_parameters(model)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" not in parameter_name and parameter_name not in heads:
            parameter.requires_grad_(False)
    if quantise:
        quantise_layers(model)
    for path, stored in block_linears(model).items():
        if not settings.has(stored):
            continue
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            layer = _replace(model, path, LoraLinear(layer.weight.data, model.kernels.nf4, _data(layer.bias)))
        assert isinstance(layer, LoraLinear)
        a = _draw_a(seed, f"{path}.{name}", settings.rank_of(stored), layer)
        layer.add(name, a, settings.scale_of(stored), dropout=settings.dropout, dora=settings.dora)
        layer.stream = _stream(path)
    for module in model.modules():
        if isinstance(module, (LoraLinear, NF4Experts)):  # the kernels may have been chosen after the base was loaded
            module.implementation = model.kernels.nf4
    vars(model)["adapters"] = {**adapter_settings(model), name: settings}
    if rows:
        _take_measured_paths(model, rows)


def quantise_layers(model: Transformer) -> None:
    """Put the weights of the block linears that have no adapters yet, and of experts, in NF4, one after another."""
    for path in block_linears(model):
        if isinstance(linear := model.get_submodule(path), nn.Linear):
            _replace(model, path, LoraLinear(quantise_nf4(linear.weight.data), model.kernels.nf4, _data(linear.bias)))
    quantise_experts(model, model.kernels.nf4)


def _data(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.data


def _replace(model: nn.Module, path: str, layer: LoraLinear) -> LoraLinear:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def _take_measured_paths(model: Transformer, rows: int) -> None:
    """Let each layer, or each stack of layers that can be joined, compute in the way that was measured as the fastest."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and layer.active and not (layer.quantised or layer.lora_magnitude_vector):
            layer.take_path(_measured_path([layer], rows))
    if model.kernels.lora != "triton":
        return
    if model.config.norm_position != "before" or model.config.norm_offset or model.config.num_experts:
        return
    for block in model.model.layers:
        for part, _, names in _STACKS:
            if not all(hasattr(getattr(block, part), name) for name in names):
                return  # fused already, or an MLP without a gate
            stack = [getattr(getattr(block, part), name) for name in names]
            if not all(_is_plain_lora(layer) for layer in stack) or _measured_path(stack, rows) != "augmented":
                return
    join_projections(model, "triton")


def _measured_path(stack: Sequence[LoraLinear], rows: int) -> str:
    """The way that was fastest for these layers as one stacked weight."""
    weight, out_features = stack[0].weight, sum(layer.shape[0] for layer in stack)
    total_rank = sum(len(layer.lora_A[name]) for layer in stack for name in layer.active)
    return choose_path(device_name(weight.device), weight.dtype, rows, out_features, stack[0].shape[1], total_rank)


def _stream(path: str) -> int:
    """A number for each layer, far from those of the others: an adapter adds its own, small one."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "little") << 8


def _draw_a(seed: int, name: str, rank: int, linear: LoraLinear) -> Tensor:
    """(rank, in) fp32 uniform in ±1/√in, from a generator of its own, so neither order nor device matters."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(linear.shape[1])
    a = torch.empty(rank, linear.shape[1]).uniform_(-bound, bound, generator=generator)
    return a.to(next(linear.buffers() if linear.quantised else linear.parameters()).device)


# ------------------------------------------------------------------------------------------------------ while they learn


def store_after_steps(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """After each optimizer step, copy what B learned to where "augmented" and joint layers multiply with it, and rows too."""
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: store_learned(model))


def store_learned(model: nn.Module) -> None:
    """Bring those copies of B, and of rows that learn, up to date; needed wherever others than an optimizer changed them."""
    for module in model.modules():
        if not isinstance(module, (LoraLinear, NormProjections)) or module.augmented is None:
            continue
        if stored := module.stored_adapters():
            store_adapters(module.augmented, stored)
    store_rows(model)


def set_aside(model: nn.Module, name: str) -> None:
    """The adapter is not among the active ones any more, and does not learn: a judge, for `adapters_active` to switch on."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and name in layer.scales:
            layer.active = tuple(active for active in layer.active if active != name)
            for parameters in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                if name in parameters:
                    parameters[name].requires_grad_(False)


@contextlib.contextmanager
def adapters_active(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the model (DDP or not) computes with these adapters alone; afterwards with those that it had before.

    A layer that an adapter does not target goes without it. ValueError for a name that the model has not.
    """
    if unknown := [name for name in names if name not in adapter_settings(model)]:
        raise ValueError(
            f"the model has no adapter {unknown[0]!r}; it has {', '.join(adapter_settings(model)) or 'none'}"
        )
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = tuple(name for name in names if name in layer.scales)
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def adapters_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the model computes what its frozen weights alone do: the reference policy of DPO, PPO and GRPO."""
    return adapters_active(model, ())


def merged_state(
    model: nn.Module, *, dtype: torch.dtype | None = None, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The plain model's weights by their names in its family's folder, W + scale · B A in place of W where adapters are active.

    NF4 weights are decoded first: an adapter learned beside those values, and folding it into the original ones would
    add the error of quantisation again. Summed in fp32 or better, then rounded once to `dtype`, by default that of the
    frozen weights, which for NF4 is the embedding's. names: of these weights only, the model's own names, by default
    of all. Neither the model nor its tied embedding changes.
    """
    inner = unwrap(model)
    parameters, dtype = dict(inner.named_parameters()), dtype or inner.model.embed_tokens.weight.dtype
    state: dict[str, Tensor] = {}
    for name in plain_shapes(inner) if names is None else names:
        path, _, leaf = name.rpartition(".")
        layer = inner.get_submodule(path)
        if isinstance(layer, NF4Experts) and leaf in STACKS:
            tensor = layer.decoded(leaf, torch.float32)
        else:
            merges = isinstance(layer, LoraLinear) and leaf == "weight"
            tensor = layer.merged_weight() if merges else parameters[name].detach()
        state |= stored_views(inner.config.family, name, tensor.to(dtype))
    return state


def plain_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight that the model would have without adapters, in its order."""
    model = unwrap(model)
    with torch.device("meta"):
        plain = type(model)(model.config)  # a language model or a reward model
    return {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
