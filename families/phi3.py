"""How is a Phi-3's or Phi-4's folder written? (Abdin et al. 2024). A Llama with fused projections, stretched by LongRoPE."""

from typing import Any

from errors import UserError
from families.common import DEFAULTS, canonical_llama, read_rope, read_shape, write_common

CLASS, ARCHITECTURE = "Phi3", "Phi3ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "lm_head_bias": False}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    rope_scaling is None or {"rope_type": "longrope", "short_factor", "long_factor", "original_max_position_embeddings"} and,
    where they are not what follows from these, "factor" and "attention_factor" (Ding et al. 2024). short_factor and
    long_factor hold a number for each of the D · partial_rotary_factor / 2 rotated pairs; factor is by default
    max_position_embeddings / original_max_position_embeddings.
    """
    fields = read_shape(config, _DEFAULTS, _FIXED, never_null=("original_max_position_embeddings",))
    # transformers takes this for the context before stretching, whatever rope_parameters say
    fields |= read_rope({"original_max_position_embeddings": 4096} | config, partial=True)
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = _longrope(fields["rope_scaling"], fields["max_position_embeddings"])
    return fields | {"fused_qkv": True, "fused_gate_up": True, "sliding_window": config.get("sliding_window")}


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields.

    Version 4 insists on a rope_scaling of exactly "type", "short_factor" and "long_factor", and reads the rest beside it: it
    refuses the rare one that has a factor of its own.
    """
    config = write_common(fields, "phi3", ARCHITECTURE, dtype)
    original, partial = fields["max_position_embeddings"], fields["partial_rotary_factor"]
    if fields["rope_scaling"] is not None:
        scaling = {"type": "longrope"} | fields["rope_scaling"]
        original = scaling.pop("original_max_position_embeddings")
        del scaling["rope_type"]
        if scaling.get("factor") == fields["max_position_embeddings"] / original:  # what both versions take without
            del scaling["factor"]
        config["rope_scaling"] = scaling
    config["rope_parameters"]["partial_rotary_factor"] = partial
    return config | {
        "original_max_position_embeddings": original,
        "partial_rotary_factor": partial,
        "sliding_window": fields["sliding_window"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _longrope(scaling: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """The scaling under its name of today, without what follows from the rest."""
    if scaling["rope_type"] not in ("longrope", "su", "yarn"):  # the latter two are what it was called
        raise UserError(
            f"config.json: rope_type is {scaling['rope_type']!r}; a Phi-3 can only be loaded with 'longrope'"
        )
    stretch = max_position_embeddings / scaling["original_max_position_embeddings"]
    implied = {"factor": (None, stretch), "attention_factor": (None,)}
    kept = {name: value for name, value in scaling.items() if value not in implied.get(name, ())}
    return kept | {"rope_type": "longrope"}
