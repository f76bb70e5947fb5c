"""How is a Gemma 2's folder written? (Gemma Team 2024). Norms before and after, softcaps, every second layer windowed."""

from typing import Any

from errors import UserError
from families.common import (
    DEFAULTS,
    FULL,
    SLIDING,
    canonical_llama,
    layer_types,
    read_activation,
    read_attention_bias,
    read_layer_types,
    read_rope,
    read_shape,
    write_activation,
    write_rope,
    write_shape,
)

CLASS, ARCHITECTURE = "Gemma2", "Gemma2ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
DEFAULTS_OF_GEMMA = DEFAULTS | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_FIXED = {"use_bidirectional_attention": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    fields = read_gemma(config, DEFAULTS_OF_GEMMA, _FIXED) | read_rope(config)
    every_second = [FULL if i % 2 else SLIDING for i in range(config["num_hidden_layers"])]
    return fields | {
        "layer_types": read_layer_types(config, every_second, fields["sliding_window"]),
        "attn_logit_softcapping": config.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": config.get("final_logit_softcapping", 30.0),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_gemma(fields, "gemma2", ARCHITECTURE, dtype) | write_rope(fields)


def read_gemma(config: dict, defaults: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, of ModelConfig's fields."""
    fields = read_shape(config, defaults, fixed, never_null=("head_dim", "num_key_value_heads"))
    scalar = config.get("query_pre_attn_scalar", 256)
    if not isinstance(scalar, (int, float)) or scalar <= 0 or scalar != int(scalar):
        raise UserError(f"config.json: query_pre_attn_scalar is {scalar!r}; it must be a whole number")
    return {
        **fields,
        **read_attention_bias(config),
        "hidden_act": read_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_position": "both",
        "norm_offset": True,
        "scale_embedding": True,
        "attention_scale": scalar**-0.5,
        "sliding_window": config.get("sliding_window", 4096),
    }


def write_gemma(fields: dict[str, Any], model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, of config.json."""
    scale = fields["attention_scale"]
    return write_shape(fields, model_type, architecture, dtype) | {
        "hidden_activation": write_activation(fields["hidden_act"]),
        "attention_bias": fields["qkv_bias"],
        "attention_dropout": 0.0,
        "query_pre_attn_scalar": fields["head_dim"] if scale is None else round(scale**-2),
        "sliding_window": fields["sliding_window"],
        "layer_types": layer_types(fields),
        "attn_logit_softcapping": fields["attn_logit_softcapping"],
        "final_logit_softcapping": fields["final_logit_softcapping"],
    }
