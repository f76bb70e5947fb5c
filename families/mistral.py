"""How is a Mistral's folder written? (Jiang et al. 2023). A Llama whose tokens see a window of the past, or all of it."""

from typing import Any

from families.common import canonical_llama, read_common, write_common

CLASS, ARCHITECTURE = "Mistral", "MistralForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_FIXED = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    `sliding_window` counts the token itself: a key is seen where query - key < window. Where it is missing transformers
    takes 4096; from version 0.3 on the models have null, which is no window.
    """
    fields = read_common(config, {"max_position_embeddings": 131072, "num_key_value_heads": 8}, _FIXED)
    return fields | {"sliding_window": config.get("sliding_window", 4096)}


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_common(fields, "mistral", ARCHITECTURE, dtype) | {"sliding_window": fields["sliding_window"]}
