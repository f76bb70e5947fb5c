"""How is a Qwen3's folder written? (Qwen Team 2025). A Llama with a norm on each query and key head."""

from typing import Any

from families.common import read_common, write_common

CLASS = "Qwen3"


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
    return read_common(config, defaults, never_null=("head_dim",)) | {"qk_norm": True}


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    config = write_common(fields, "qwen3", f"{CLASS}ForCausalLM", dtype)
    del config["mlp_bias"]  # Qwen3 has no such field
    return config | {"use_sliding_window": False, "sliding_window": None}
