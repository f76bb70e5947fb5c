"""How is an OLMo 2's folder written? (OLMo Team 2024). Norms on what sub-layers return, and on whole queries and keys."""

from typing import Any

from families.common import canonical_llama, read_attention_bias, read_common, write_common

CLASS, ARCHITECTURE = "Olmo2", "Olmo2ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
DEFAULTS_OF_OLMO = {"rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1}
PARTS_OF_OLMO = {"norm_position": "after", "qk_norm": True, "qk_norm_per_head": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    return read_common(config, DEFAULTS_OF_OLMO, {"mlp_bias": False}) | read_attention_bias(config) | PARTS_OF_OLMO


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields. Version 4 reads no other rope_scaling than "type" and "factor"."""
    config = write_common(fields, "olmo2", ARCHITECTURE, dtype) | {"attention_bias": fields["qkv_bias"]}
    scaling = fields["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": float(scaling["factor"])}
    return config
