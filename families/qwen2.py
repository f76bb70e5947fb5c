"""How is a Qwen2's or Qwen2.5's folder written? (Qwen Team 2024). A Llama with biases on queries, keys and values."""

from typing import Any

from families.common import (
    DEFAULTS,
    FULL,
    SLIDING,
    canonical_llama,
    layer_types,
    read_count,
    read_layer_types,
    read_rope,
    read_shape,
    write_common,
)

CLASS, ARCHITECTURE = "Qwen2", "Qwen2ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_DEFAULTS = DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_FIXED = {"hidden_act": "silu", "mlp_bias": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    `sliding_window` is of the layers from `max_window_layers` on where `use_sliding_window` is true, else meaningless.
    """
    fields = read_shape(config, _DEFAULTS, _FIXED) | read_rope(config) | {"qkv_bias": True}
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = read_count(config, "max_window_layers", 28, least=0) if window is not None else config["num_hidden_layers"]
    kinds = read_layer_types(
        config, [SLIDING if i >= first else FULL for i in range(config["num_hidden_layers"])], window
    )
    return fields | {"sliding_window": window, "layer_types": None if window is None else kinds}


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    kinds = layer_types(fields)
    return write_common(fields, "qwen2", ARCHITECTURE, dtype) | {
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "max_window_layers": kinds.index(SLIDING) if SLIDING in kinds else len(kinds),
        "layer_types": kinds,
    }
