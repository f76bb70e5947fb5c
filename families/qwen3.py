"""How is a Qwen3's folder written? (Qwen Team 2025). A Llama with a norm on each query and key head."""

from typing import Any

from families.common import canonical_llama, read_common, write_common

CLASS, ARCHITECTURE = "Qwen3", "Qwen3ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
_FIXED = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    return read_common(config, _DEFAULTS, _FIXED, never_null=("head_dim",)) | {"qk_norm": True}


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    config = write_common(fields, "qwen3", ARCHITECTURE, dtype)
    return config | {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}
