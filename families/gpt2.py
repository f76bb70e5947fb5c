"""How is a GPT-2's folder written? (Radford et al. 2019). Learned positions, LayerNorm, biases, weights stored (in, out)."""

from typing import Any

from families.common import (
    DEFAULTS_UNGROUPED,
    REQUIRED,
    read_activation,
    read_shape,
    with_prefix,
    write_activation,
    write_shape,
)

CLASS, ARCHITECTURE = "GPT2", "GPT2LMHeadModel"
_LAYER = "transformer.h.N"
NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.layers.N.input_layernorm": f"{_LAYER}.ln_1",
    "model.layers.N.self_attn.qkv_proj": f"{_LAYER}.attn.c_attn",
    "model.layers.N.self_attn.o_proj": f"{_LAYER}.attn.c_proj",
    "model.layers.N.post_attention_layernorm": f"{_LAYER}.ln_2",
    "model.layers.N.mlp.up_proj": f"{_LAYER}.mlp.c_fc",
    "model.layers.N.mlp.down_proj": f"{_LAYER}.mlp.c_proj",
    "model.norm": "transformer.ln_f",
}
# transformers' Conv1D computes x W + b
TRANSPOSED = frozenset(
    {
        "model.layers.N.self_attn.qkv_proj",
        "model.layers.N.self_attn.o_proj",
        "model.layers.N.mlp.up_proj",
        "model.layers.N.mlp.down_proj",
    }
)
EXPERTS = None
_RENAMED = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
}
_DEFAULTS = DEFAULTS_UNGROUPED | {
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
# reorder_and_upcast_attn may have any value: it only says that scores are computed in fp32
_FIXED = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    A null `n_inner` means 4 n_embd; `scale_attn_weights` false leaves the scores unscaled.
    """
    width = config.get("n_embd")
    if config.get("n_inner") is None and isinstance(width, int):
        config = config | {"n_inner": 4 * width}
    return {
        **read_shape(config, _DEFAULTS, _FIXED, _RENAMED),
        "hidden_act": read_activation(config, "activation_function", "gelu_new"),
        "attention_scale": None if config.get("scale_attn_weights", True) else 1.0,
        "position_embedding": "learned",
        "norm": "layer",
        "norm_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "fused_qkv": True,
        "gated_mlp": False,
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    config = write_shape(fields, "gpt2", ARCHITECTURE, dtype, (*REQUIRED, *_DEFAULTS), _RENAMED)
    tanh = fields["hidden_act"] == "gelu_tanh"
    return config | {
        "activation_function": "gelu_new" if tanh else write_activation(fields["hidden_act"]),
        "scale_attn_weights": fields["attention_scale"] is None,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def canonical(name: str) -> str | None:
    """The tensor's name in a folder of today. OpenAI's own has no prefix and holds the causal mask as a tensor."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return with_prefix(name, "transformer.", ("wte.", "wpe.", "h.", "ln_f."))
