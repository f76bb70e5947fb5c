"""What is a block made of? Norms, attention, an MLP, and how they are added up.

Each part reads its degrees of freedom off ModelConfig once, when it is built; a forward knows of no family.
Letters in shape comments: B rows, T tokens of a row, S keys, H hidden size, A query heads, K key-value heads, D head
size, F MLP size, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from context import RowShare
from errors import UserError
from experts import Experts, Routing
from kernels.attention import attention
from kernels.attention_masks import AttentionMask
from kernels.choice import KernelChoice
from kernels.dropout import keyed_dropout
from kernels.fp8 import SIZE_MULTIPLE, fp8_linear
from kernels.linear import linear
from kernels.recompute import recomputed
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from model_config import ModelConfig
from tensor_parallel import TensorGroup, own


class Cache(Protocol):
    """What takes in keys and values of new tokens (model.KVCache)."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class Shared(NamedTuple):
    """What every block of one forward uses.

    rotary: cos and sin by kind of layer; empty where no layer turns. masks: who may see whom, by kind of layer.
    cache: what keys and values are appended to. dropout: its probability, and token_keys (B, T), which decide on it.
    with_routing: whether blocks say what their routers did. share: of rows that several ranks share, this one's tokens, which
    are then all that T stands for.
    """

    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, AttentionMask | None]
    cache: Cache | None
    kernels: KernelChoice
    dropout: float = 0.0
    token_keys: Tensor | None = None
    with_routing: bool = False
    share: RowShare | None = None

    def dropped(self, x: Tensor, stream: int) -> Tensor:
        """x with elements zeroed as dropout says; `stream` is another number for each use."""
        if not self.dropout:
            return x
        assert self.token_keys is not None, "dropout follows keys: call set_token_keys before each training forward"
        return keyed_dropout(x, self.dropout, self.token_keys, stream)


# ---------------------------------------------------------------------------------------------------------------- norms


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, fp32 inside (Zhang & Sennrich 2019).

    offset: the weight counts from one, and nothing is rounded before the product (Gemma). The result has the dtype of the
    matrix product that follows; under autocast the residual stream keeps its fp32. group: of ranks that norm some heads each.
    """

    group: TensorGroup | None = None

    def __init__(self, size: int, eps: float, offset: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor, implementation: str) -> Tensor:
        weight = self.weight if self.group is None else own(self.weight)
        return rms_norm(
            x, weight, self.eps, gemma=self.offset, out_dtype=compute_dtype(x), implementation=implementation
        )  # fmt: skip

    def in_its_dtype(self, x: Tensor) -> Tensor:
        """The norm of x in x's dtype: of a residual stream, which a norm on the sum goes on with."""
        return rms_norm(x, self.weight, self.eps, gemma=self.offset)

    def add(self, x: Tensor, update: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
        """(norm of x + update, x + update) in one pass over memory; without an update, of x."""
        if update is None:
            return self(x, implementation), x
        return add_rms_norm(
            x, update, self.weight, self.eps, gemma=self.offset, out_dtype=compute_dtype(x),
            implementation=implementation,
        )  # fmt: skip


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(variance + eps) · weight + bias (Ba et al. 2016), fp32 inside: torch's own fused operator."""

    def __init__(self, size: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor, implementation: str = "torch") -> Tensor:
        return self.in_its_dtype(x).to(compute_dtype(x))

    def in_its_dtype(self, x: Tensor) -> Tensor:
        """As RMSNorm's. Widened first: torch adds up a half-precision x's gradients of the weights in its precision."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps).to(x.dtype)

    def add(self, x: Tensor, update: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
        """(norm of x + update, x + update); without an update, of x."""
        x = x if update is None else x + update
        return self(x), x


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig, size: int) -> Norm:
    """The model's kind of norm over `size` channels."""
    if config.norm == "layer":
        return LayerNorm(size, config.rms_norm_eps, config.norm_bias)
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers will give their output."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# --------------------------------------------------------------------------------------------------- linear, attention


class Linear(nn.Linear):
    """torch's, whose product runs where kernels/linear.py sends it.

    fp8: it is in fp8 while it is learned from. What is evaluated, drawn or judged is what others will compute of the weights.
    group: of ranks that have some rows of the weight each, or with `sums` some columns, and then sum their products.
    """

    fp8 = False
    group: TensorGroup | None = None
    sums = False

    def forward(self, input: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled():
            return fp8_linear(input, self.weight, self.bias)
        if self.group is None:
            return linear(input, self.weight, self.bias)
        if not self.sums:
            return linear(input, own(self.weight), own(self.bias))
        y = self.group.leaving(linear(input, own(self.weight)))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(nn.Embedding):
    """torch's. group: of ranks that have some rows of the weight each; a token has its row on one of them."""

    group: TensorGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(input)
        rows = own(self.weight)
        places = input - self.group.first(self.num_embeddings)
        inside = (places >= 0) & (places < len(rows))
        found = F.embedding(places.where(inside, 0), rows) if len(rows) else rows.new_zeros(*input.shape, rows.shape[1])
        return self.group.leaving(torch.where(inside[..., None], found, 0.0))


class Attention(nn.Module):
    """Self-attention of grouped queries. group: of ranks that have some of the heads each."""

    group: TensorGroup | None = None

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.kind = layer, config.layer_kind(layer)
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query, key = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.sizes = [query, key, key]
        if config.fused_qkv:
            self.qkv_proj = Linear(hidden, sum(self.sizes), bias=config.qkv_bias)
        else:
            self.q_proj = Linear(hidden, query, bias=config.qkv_bias)
            self.k_proj = Linear(hidden, key, bias=config.qkv_bias)
            self.v_proj = Linear(hidden, key, bias=config.qkv_bias)
        self.o_proj = Linear(query, hidden, bias=config.output_bias)
        self.norm_per_head = config.qk_norm_per_head
        widths = (self.head_dim, self.head_dim) if self.norm_per_head else (query, key)
        self.q_norm, self.k_norm = (norm_of(config, width) if config.qk_norm else None for width in widths)
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        turns = config.position_embedding == "rotary" and (config.rope_layers is None or config.rope_layers[layer])
        self.rotary_width = config.rotary_width if turns else 0
        self.joint_sizes: list[int] | None = None  # set where adapters project together with the norm before

    def projections(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of x, or x cut in three if it is them already (adapters/lora.py)."""
        if self.joint_sizes:
            return x.split(self.joint_sizes, dim=-1)
        if hasattr(self, "qkv_proj"):
            return self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        batch, length, _ = x.shape
        x = x if self.group is None else self.group.entering(x)
        q, k, v = self.projections(x)  # (B, T, A·D), (B, T, K·D) twice
        if not self.norm_per_head:
            q, k = self.normed(q, k, shared)
        q, k, v = (part.view(batch, length, -1, self.head_dim) for part in (q, k, v))  # (B, T, A or K, D)
        if self.norm_per_head:
            q, k = self.normed(q, k, shared)
        if self.rotary_width:
            q, k = self.turned(q, k, shared)
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k, v)  # (B, S, K, D)
        if shared.share is not None:
            k, v = shared.share.gather(torch.cat([k, v], dim=2)).chunk(2, dim=2)  # those of whole rows, (B, S, K, D)
        out = attention(q, k, v, mask=shared.masks[self.kind], scale=self.scale, softcap=self.softcap)  # (B, T, A, D)
        return self.o_proj(out.reshape(batch, length, -1))

    def normed(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed over their last dimension, where the model does so."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q, shared.kernels.rms_norm), self.k_norm(k, shared.kernels.rms_norm)

    def turned(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Queries and keys with their first `rotary_width` channels turned by their tokens' angles."""
        cos, sin = shared.rotary[self.kind]
        if self.rotary_width == self.head_dim:
            return rope(q, k, cos, sin, implementation=shared.kernels.rope)
        q_turning, q_rest = q.split([self.rotary_width, self.head_dim - self.rotary_width], dim=-1)
        k_turning, k_rest = k.split([self.rotary_width, self.head_dim - self.rotary_width], dim=-1)
        q_turned, k_turned = rope(q_turning, k_turning, cos, sin, implementation=shared.kernels.rope)
        return torch.cat([q_turned, q_rest], dim=-1), torch.cat([k_turned, k_rest], dim=-1)


# ------------------------------------------------------------------------------------------------------------------ MLP


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020), or down(act(up(x))). group: of ranks that have some channels of it each."""

    group: TensorGroup | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.fused_gate_up:
            self.gate_up_proj = Linear(hidden, 2 * inner, bias=bias)
        else:
            if config.gated_mlp:
                self.gate_proj = Linear(hidden, inner, bias=bias)
            self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.gated, self.act = config.gated_mlp, config.hidden_act
        self.joint_sizes: list[int] | None = None  # as in Attention

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = x if self.group is None else self.group.entering(x)
        if not self.gated:
            return self.down_proj(activation(self.up_proj(x), self.act))
        gate, up = self.projections(x)  # (B, T, F) twice, or packed (B, T, 2F) and None
        if self.act == "silu":
            return self.down_proj(swiglu(gate, up, implementation=shared.kernels.swiglu))
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        return self.down_proj(activation(gate, self.act) * up)

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.joint_sizes:
            return x, None
        if hasattr(self, "gate_up_proj"):
            return self.gate_up_proj(x), None
        return self.gate_proj(x), self.up_proj(x)


class MixtureMLP(Experts):
    """Experts in an MLP's place."""

    def __init__(self, config: ModelConfig):
        assert config.num_experts is not None and config.expert_size is not None
        assert config.experts_per_token is not None
        super().__init__(
            config.hidden_size, config.expert_size, config.num_experts, config.experts_per_token,
            config.normalise_routing,
        )  # fmt: skip

    def forward(self, x: Tensor, shared: Shared) -> tuple[Tensor, Routing | None]:  # type: ignore[override]  # as MLP's
        num_real = None if shared.share is None else shared.share.num_real
        return super().forward(x, shared.kernels.swiglu, shared.with_routing, num_real)


def activation(x: Tensor, name: str) -> Tensor:
    """x by one of: silu; gelu, the erf form; gelu_tanh (Hendrycks & Gimpel 2016); relu2 (So et al. 2021)."""
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
    return F.relu(x).square()


# ---------------------------------------------------------------------------------------------------------------- block


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream x, with norms where the model has them:

    before   x + attention(norm(x))            both     x + norm(attention(norm(x)))
    after    x + norm(attention(x))            on_sum   norm(x + attention(x))

    and then the same with the MLP. A sum is taken by the norm that reads it next, in one pass over memory. Names are those
    of Hugging Face's Llama, Gemma and OLMo, in which post_attention_layernorm stands before the MLP where norms stand
    before only.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.norm_position = layer, config.norm_position
        self.recompute = "none"  # what is not kept for the backward pass: kernels/recompute.py
        self.residual_multiplier = config.residual_multiplier
        before = config.norm_position in ("before", "both")
        if before and (config.first_norm or layer):
            self.input_layernorm = norm_of(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm_of(config, config.hidden_size)
        if config.norm_position == "both":
            self.pre_feedforward_layernorm = norm_of(config, config.hidden_size)
        self.mlp = MixtureMLP(config) if config.has_experts(layer) else MLP(config)
        if config.norm_position != "before":
            self.post_feedforward_layernorm = norm_of(config, config.hidden_size)

    def forward(self, x: Tensor, update: Tensor | None, shared: Shared) -> tuple[Tensor, Tensor | None, Routing | None]:
        """The residual stream (B, T, H), and what is still to be added to it (None: nothing); the same two, and what the router
        did, if that is asked for: a result like the others, since who gathers weights for the backward pass looks at results.
        """
        if self.recompute == "none" or shared.cache is not None or not torch.is_grad_enabled():
            return self._forward(x, update, shared)
        return recomputed(self._forward, self, self.recompute, x, update, shared)

    def _forward(
        self, x: Tensor, update: Tensor | None, shared: Shared
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        position, kernel = self.norm_position, shared.kernels.rms_norm
        if hasattr(self, "input_layernorm"):
            normed, x = self.input_layernorm.add(x, update, kernel)
        else:
            normed = x = x if update is None else x + update
        update = self.scaled(self.self_attn(normed, shared), shared, 0)
        if position == "before":
            normed, x = self.post_attention_layernorm.add(x, update, kernel)
            update, routing = self.mlp_update(normed, shared)
            return x, update, routing
        if position == "on_sum":
            x = self.post_attention_layernorm.in_its_dtype(x + update)
            update, routing = self.mlp_update(x, shared)
            return self.post_feedforward_layernorm.in_its_dtype(x + update), None, routing
        update = self.post_attention_layernorm(update, kernel)
        if position == "both":
            normed, x = self.pre_feedforward_layernorm.add(x, update, kernel)
        else:
            normed = x = x + update
        update, routing = self.mlp_update(normed, shared)
        return x, self.post_feedforward_layernorm(update, kernel), routing

    def mlp_update(self, x: Tensor, shared: Shared) -> tuple[Tensor, Routing | None]:
        found = self.mlp(x, shared)
        update, routing = found if isinstance(found, tuple) else (found, None)
        return self.scaled(update, shared, 1), routing

    def scaled(self, update: Tensor, shared: Shared, place: int) -> Tensor:
        """A sub-layer's result as it is added: after dropout, times Granite's residual multiplier. place: 0 or 1 in the block."""
        if shared.dropout:  # else blocks are one to the compiler, where they have no number
            update = shared.dropped(update, 2 * self.layer + place)
        return update if self.residual_multiplier == 1.0 else update * self.residual_multiplier


def use_fp8(model: nn.Module) -> None:
    """Let the linear layers of its blocks multiply in fp8. UserError for one whose sizes fp8 does not take."""
    for place, block in model.named_modules():
        for name, layer in block.named_modules() if isinstance(block, Block) else ():
            if not isinstance(layer, Linear):
                continue
            if layer.in_features % SIZE_MULTIPLE or layer.out_features % SIZE_MULTIPLE:
                raise UserError(
                    f"--mixed_precision fp8: {place}.{name} is {layer.out_features} x {layer.in_features}, and fp8 takes "
                    f"multiples of {SIZE_MULTIPLE}; choose other sizes, or bf16"
                )
            layer.fp8 = True


class PredictionHead(nn.Module):
    """Between a masked language model's last hidden state and its logits: dense, activation, norm; and the logits' bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.head_dense_bias)
        self.norm = norm_of(config, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        self.act = config.hidden_act

    def forward(self, hidden: Tensor, implementation: str) -> Tensor:
        return self.norm(activation(self.dense(hidden), self.act), implementation)
