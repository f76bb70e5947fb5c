"""How is a SmolLM3's folder written? (Bakouch et al. 2025). A Llama without rotation in every fourth layer."""

from typing import Any

from errors import UserError
from families.common import (
    DEFAULTS,
    FULL,
    SLIDING,
    canonical_llama,
    layer_types,
    read_attention_bias,
    read_count,
    read_layer_types,
    read_rope,
    read_shape,
    write_common,
)

CLASS, ARCHITECTURE = "SmolLM3", "SmolLM3ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_DEFAULTS = DEFAULTS | {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    A 0 in `no_rope_layers` means no rotation; such layers are the windowed ones where `use_sliding_window` is true.
    """
    fields = read_shape(config, _DEFAULTS, {"hidden_act": "silu"})
    count = config["num_hidden_layers"]
    rotated = _rotated(config, count)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    by_rotation = [FULL if turned or window is None else SLIDING for turned in rotated]
    kinds = read_layer_types(config, by_rotation, window)
    return {
        **fields,
        **read_rope(config, 2000000.0),
        **read_attention_bias(config),
        "mlp_bias": bool(config.get("mlp_bias")),
        "rope_layers": None if all(rotated) else rotated,
        "sliding_window": window,
        "layer_types": None if window is None else kinds,
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    rotated = fields["rope_layers"] or [True] * fields["num_hidden_layers"]
    return write_common(fields, "smollm3", ARCHITECTURE, dtype) | {
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["mlp_bias"],
        "no_rope_layers": [int(turned) for turned in rotated],
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "layer_types": layer_types(fields),
    }


def _rotated(config: dict, count: int) -> list[bool]:
    """Whether each layer rotates, from `no_rope_layers` or every `no_rope_layer_interval`-th."""
    given = config.get("no_rope_layers")
    if given is not None:
        if len(given) < count:
            raise UserError(
                f"config.json: no_rope_layers has {len(given)} entries for {count} layers; give one a layer"
            )
        return [bool(turned) for turned in given[:count]]
    interval = read_count(config, "no_rope_layer_interval", 4)
    return [(i + 1) % interval != 0 for i in range(count)]
