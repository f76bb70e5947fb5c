"""Which numbers describe a model? The fields of ModelConfig: sizes, and the degrees of freedom of its blocks.

Names are those of Hugging Face's config.json, or say the same in words where families differ. Every default is Llama's.
families/ says how each family's config.json becomes these fields and back; nothing else asks for a family's name.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from errors import UserError
from families.common import FULL, REQUIRED, SLIDING
from families.names import read_config, write_config
from kernels.rotary import check_rotary_width, checked_scaling

_DERIVED: Any = None  # a field's default that __post_init__ replaces by what follows from the others
_VALUES = {
    "position_embedding": ("rotary", "learned"),
    "norm": ("rms", "layer"),
    "norm_position": ("before", "after", "both", "on_sum"),
    "hidden_act": ("silu", "gelu", "gelu_tanh", "relu2"),
    "head": ("lm", "mlm", "none"),
}


def _not_given(value: Any) -> bool:
    return value is None


@dataclass
class ModelConfig:
    """The shape of the model. Raises UserError on an impossible one.

    Sizes. num_key_value_heads defaults to num_attention_heads, head_dim to hidden_size / num_attention_heads.

    Positions. rope_scaling: None, or {"rope_type": …, "factor": …, …} with transformers' keys (kernels/rotary.py).
    local_rope_theta: RoPE's base in sliding layers, which then are not scaled; None: as in the others. rope_layers: False
    for each layer that turns nothing; None: all turn. partial_rotary_factor: the share of a head's channels that turn.
    position_embedding "learned": a table of max_position_embeddings rows, of which the first position_offset serve no
    token (RoBERTa).

    Attention. causal: a token sees what is before it; otherwise its whole text. sliding_window: how many tokens one sees
    at most to a side, itself included; None: all. layer_types: "full_attention" or "sliding_attention" of each layer; None:
    all alike, sliding where there is a window. qk_norm: a norm on queries and keys, on each head of them before RoPE
    (Qwen3), or with qk_norm_per_head=False on their whole width (OLMo 2). attention_scale: of the scores, by default
    head_dim^-½. attn_logit_softcapping, final_logit_softcapping: scores and logits become cap · tanh(x / cap).

    Norms. rms_norm_eps is that of LayerNorms, too. norm_offset: the weight counts from one. norm_position: "before" each
    sub-layer; "after" it, on its result; "both"; or "on_sum", of the residual stream and the result. first_norm: whether
    the first block has one before attention.

    Linear layers. fused_qkv, fused_gate_up: one matrix where others have three and two. gated_mlp: act(gate) · up, or
    else act(up). num_experts: of each block's MLP, each expert_size wide; experts_per_token work on a token, weighted by
    their shares, which normalise_routing makes sum to one. dense_layers: those without experts.

    Multipliers. scale_embedding: by √H rounded to the weights' dtype (Gemma). logits_scaling divides.

    head: "lm"; "mlm", a masked language model's (dense, activation, norm, then the embedding and, with head_bias, a bias;
    head_dense_bias: of the dense layer); "none". pooler: a dense layer and tanh on the first token's state, of which
    next_sentence tells whether a text goes on with the next segment (BERT).
    family: whose folder the model is saved as, by default the first of Llama, Mistral, Qwen3 that has its parts.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = _DERIVED
    head_dim: int = _DERIVED
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    family: str = _DERIVED
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # positions
    local_rope_theta: float | None = None
    rope_layers: list[bool] | None = None
    partial_rotary_factor: float = 1.0
    position_embedding: str = "rotary"
    position_offset: int = 0
    type_vocab_size: int = 0
    # attention
    causal: bool = True
    layer_types: list[str] | None = None
    qk_norm_per_head: bool = True
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    # norms
    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: bool = False
    norm_position: str = "before"
    first_norm: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    # linear layers
    hidden_act: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_size: int | None = None
    normalise_routing: bool = True
    dense_layers: list[int] | None = None
    router_aux_loss_coef: float = 0.001
    # multipliers
    scale_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    # head
    head: str = "lm"
    head_bias: bool = False
    head_dense_bias: bool = False
    pooler: bool = False
    next_sentence: bool = False

    def __post_init__(self):
        if _not_given(self.family):
            self.family = "qwen3" if self.qk_norm else "llama" if self.sliding_window is None else "mistral"
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window is {self.sliding_window}; it must be at least 1, or null")
        if _not_given(self.num_key_value_heads):
            self.num_key_value_heads = self.num_attention_heads
        for name in (*REQUIRED, "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_heads()
        self._check_layers()
        for name, values in _VALUES.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")
        if self.rope_scaling is not None:
            self.rope_scaling = checked_scaling(self.rope_scaling, self.max_position_embeddings)
            check_rotary_width(self.rope_scaling, self.rotary_width)
        self._check_family()

    def _check_family(self) -> None:
        """UserError for a field whose value the family's folder cannot say: it would be lost in a checkpoint."""
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
        }
        kept: dict[str, Any] = {field.name: field.default for field in fields(self)}
        kept |= read_config(write_config(asdict(self), "float32"))
        if kept["rope_scaling"] is not None:
            kept["rope_scaling"] = checked_scaling(kept["rope_scaling"], self.max_position_embeddings)
        for name, value in asdict(self).items():
            found = derived.get(name) if _not_given(kept[name]) else kept[name]
            if found != value:
                raise UserError(
                    f"{name} is {value!r}, which the folder of a {self.family} cannot say: there it is {found!r}"
                )

    def _check_heads(self) -> None:
        # transformers' LlamaConfig insists on this even where head_dim is given; the others do not
        if self.hidden_size % self.num_attention_heads and (_not_given(self.head_dim) or self.family == "llama"):
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        if _not_given(self.head_dim):
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; change one of them"
            )
        if self.position_embedding != "rotary":
            return
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_dim:
            raise UserError(
                f"partial_rotary_factor {self.partial_rotary_factor} of heads of {self.head_dim} channels turns "
                f"{self.rotary_width} of them; it must be an even number of them"
            )

    def _check_layers(self) -> None:
        for name in ("layer_types", "rope_layers"):
            listed = getattr(self, name)
            if listed is not None and len(listed) != self.num_hidden_layers:
                raise UserError(
                    f"{name} is of {len(listed)} layers, and num_hidden_layers is {self.num_hidden_layers}; correct one"
                )
        kinds = set(self.layer_types or ())
        if unknown := kinds - {FULL, SLIDING}:
            raise UserError(f"layer_types has {min(unknown)}; only {FULL} and {SLIDING} are computed")
        if SLIDING in kinds and self.sliding_window is None:
            raise UserError(f"layer_types has {SLIDING}, and sliding_window is null; give it a number")
        if self.num_experts is not None and not 1 <= (self.experts_per_token or 0) <= self.num_experts:
            raise UserError(f"{self.experts_per_token} experts a token cannot be chosen of {self.num_experts}")

    @property
    def rotary_width(self) -> int:
        """The channels of a head that turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    def layer_kind(self, layer: int) -> str:
        """FULL or SLIDING."""
        if self.layer_types is not None:
            return self.layer_types[layer]
        return FULL if self.sliding_window is None else SLIDING

    def layer_kinds(self) -> set[str]:
        """Those that the model has."""
        return {self.layer_kind(layer) for layer in range(self.num_hidden_layers)}

    def has_experts(self, layer: int) -> bool:
        return self.num_experts is not None and layer not in (self.dense_layers or ())

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict:
        """The contents of config.json, as the family has them. `dtype` is that of the saved weights."""
        return write_config(asdict(self), str(dtype).removeprefix("torch."))

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Read a config.json of one of families/, as transformers 4 or 5 writes it. Raises UserError, naming the field."""
        return cls(**read_config(config))
