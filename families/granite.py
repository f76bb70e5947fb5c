"""How is a Granite 3's folder written? (IBM 2024). A Llama with four multipliers."""

from typing import Any

from families.common import canonical_llama, read_attention_bias, read_common, write_common

CLASS, ARCHITECTURE = "Granite", "GraniteForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")  # the last one divides


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    return {
        **read_common(config, {"bos_token_id": 1, "eos_token_id": 2}, {}),
        **read_attention_bias(config),
        "mlp_bias": bool(config.get("mlp_bias")),
        "attention_scale": config.get("attention_multiplier", 1.0),
        **{name: config.get(name, 1.0) for name in _MULTIPLIERS},
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    scale = fields["attention_scale"]
    return write_common(fields, "granite", ARCHITECTURE, dtype) | {
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["mlp_bias"],
        "attention_multiplier": fields["head_dim"] ** -0.5 if scale is None else scale,
        **{name: fields[name] for name in _MULTIPLIERS},
    }
