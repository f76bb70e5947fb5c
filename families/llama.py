"""How is a Llama's folder written? (Touvron et al. 2023; Grattafiori et al. 2024). The model's own names and parts."""

from typing import Any

from families.common import read_common, write_common

CLASS = "Llama"


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    return read_common(config, {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None})


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_common(fields, "llama", f"{CLASS}ForCausalLM", dtype)
