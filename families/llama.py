"""How is a Llama's folder written? (Touvron et al. 2023; Grattafiori et al. 2024). The model's own names and parts."""

from typing import Any

from families.common import canonical_llama, read_common, write_common

CLASS, ARCHITECTURE = "Llama", "LlamaForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_FIXED = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    return read_common(config, {}, _FIXED)


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_common(fields, "llama", ARCHITECTURE, dtype) | {"attention_bias": False, "mlp_bias": False}
