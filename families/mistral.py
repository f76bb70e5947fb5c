"""How is a Mistral's folder written? (Jiang et al. 2023). A Llama whose tokens see a window of the past, or all of it."""

from typing import Any

from families.common import read_common, write_common

CLASS = "Mistral"


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    `sliding_window` counts the token itself: a key is seen where query - key < window. Where it is missing transformers
    takes 4096; from version 0.3 on the models have null, which is no window.
    """
    defaults = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": None}
    return read_common(config, defaults) | {"sliding_window": config.get("sliding_window", 4096)}


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    config = write_common(fields, "mistral", f"{CLASS}ForCausalLM", dtype)
    del config["mlp_bias"], config["attention_bias"]  # Mistral has no such fields
    return config | {"sliding_window": fields["sliding_window"]}
