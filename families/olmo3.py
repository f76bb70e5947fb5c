"""How is an OLMo 3's folder written? (OLMo Team 2025). An OLMo 2 with a window in three layers of four."""

from typing import Any

from errors import UserError
from families.common import (
    DEFAULTS,
    FULL,
    SLIDING,
    canonical_llama,
    layer_types,
    read_attention_bias,
    read_layer_types,
    read_layered_rope,
    read_shape,
    write_common,
    write_layered_rope,
)
from families.olmo2 import DEFAULTS_OF_OLMO, PARTS_OF_OLMO

CLASS, ARCHITECTURE = "Olmo3", "Olmo3ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_BASES = ("rope_theta", "rope_theta")  # version 4 has one base, and scales the full-attention layers alone


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    fields = read_shape(config, DEFAULTS | DEFAULTS_OF_OLMO, {"hidden_act": "silu", "mlp_bias": False})
    full, local_theta = read_layered_rope(config, *_BASES, (500000.0, 500000.0))
    if local_theta != full["rope_theta"]:
        raise UserError(
            f"config.json: rope_parameters has the rope_theta {full['rope_theta']} for {FULL} and {local_theta} for "
            f"{SLIDING}; an OLMo 3 has one"
        )
    window = config.get("sliding_window", 4096)
    pattern = [SLIDING if (i + 1) % 4 else FULL for i in range(config["num_hidden_layers"])]
    return {
        **fields,
        **read_attention_bias(config),
        **PARTS_OF_OLMO,
        **full,
        "local_rope_theta": None if full["rope_scaling"] is None else local_theta,
        "sliding_window": window,
        "layer_types": read_layer_types(config, pattern, window),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    config = write_common(fields, "olmo3", ARCHITECTURE, dtype) | write_layered_rope(fields, *_BASES)
    return config | {
        "attention_bias": fields["qkv_bias"],
        "sliding_window": fields["sliding_window"],
        "layer_types": layer_types(fields),
    }
