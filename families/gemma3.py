"""How is the folder of a Gemma 3 for text written? (Gemma Team 2025). A Gemma 2 with query and key norms and two bases."""

from typing import Any

from errors import UserError
from families.common import (
    FULL,
    SLIDING,
    canonical_llama,
    read_count,
    read_layer_types,
    read_layered_rope,
    write_layered_rope,
)
from families.gemma2 import DEFAULTS_OF_GEMMA, read_gemma, write_gemma

CLASS, ARCHITECTURE = "Gemma3Text", "Gemma3ForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
canonical = canonical_llama
_DEFAULTS = DEFAULTS_OF_GEMMA | {"max_position_embeddings": 131072}
# transformers keeps attn_logit_softcapping and never applies it
_FIXED = {"use_bidirectional_attention": False, "attn_logit_softcapping": None}
_BASES = ("rope_theta", "rope_local_base_freq")


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    Every `sliding_window_pattern`-th layer sees all; where `layer_types` is there too both must say the same.
    """
    fields = read_gemma(config, _DEFAULTS, _FIXED)
    full, local_theta = read_layered_rope(config, *_BASES, (1000000.0, 10000.0))
    pattern = read_count(config, "sliding_window_pattern", 6)
    patterned = [SLIDING if (i + 1) % pattern else FULL for i in range(config["num_hidden_layers"])]
    kinds = read_layer_types(config, patterned, fields["sliding_window"])
    if "sliding_window_pattern" in config and kinds != patterned:
        raise UserError(f"config.json: layer_types is not what sliding_window_pattern {pattern} says; correct one")
    return {
        **fields,
        **full,
        "local_rope_theta": local_theta,
        "layer_types": kinds,
        "qk_norm": True,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_gemma(fields, "gemma3_text", ARCHITECTURE, dtype) | write_layered_rope(fields, *_BASES)
