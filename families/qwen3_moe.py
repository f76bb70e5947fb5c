"""How is the folder of a Qwen3 with experts written? (Qwen Team 2025). A Qwen3 most of whose MLPs are experts."""

from typing import Any

from errors import UserError
from families.common import canonical_llama, read_attention_bias, read_common, read_count, read_number, write_common

CLASS, ARCHITECTURE = "Qwen3Moe", "Qwen3MoeForCausalLM"
NAMES: dict[str, str] = {}
TRANSPOSED: frozenset[str] = frozenset()
_EXPERT = "model.layers.N.mlp.experts.E."
EXPERTS = (f"{_EXPERT}gate_proj.weight", f"{_EXPERT}up_proj.weight", f"{_EXPERT}down_proj.weight")
canonical = canonical_llama
_DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768}
_COUNT = ("num_experts", "num_local_experts")  # as version 4 and version 5 save it


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    Layers in `mlp_only_layers`, and all but every `decoder_sparse_step`-th, have an MLP of intermediate_size.
    """
    fields = read_common(config, _DEFAULTS, {"mlp_bias": False}, never_null=("head_dim", "num_key_value_heads"))
    count = read_number(config, _COUNT, 128)
    if count < 1:
        raise UserError(f"config.json: num_experts is {count}; a model without experts is a qwen3")
    step, dense = read_count(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return {
        **fields,
        **read_attention_bias(config),
        "qk_norm": True,
        "sliding_window": config.get("sliding_window", 4096) if config.get("use_sliding_window") else None,
        "num_experts": count,
        "experts_per_token": config.get("num_experts_per_tok", 8),
        "expert_size": config.get("moe_intermediate_size", 768),
        "normalise_routing": config.get("norm_topk_prob", False),
        "dense_layers": [i for i in range(config["num_hidden_layers"]) if i in dense or (i + 1) % step] or None,
        "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_common(fields, "qwen3_moe", ARCHITECTURE, dtype) | {
        "attention_bias": fields["qkv_bias"],
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        **dict.fromkeys(_COUNT, fields["num_experts"]),
        "num_experts_per_tok": fields["experts_per_token"],
        "moe_intermediate_size": fields["expert_size"],
        "norm_topk_prob": fields["normalise_routing"],
        "mlp_only_layers": fields["dense_layers"] or [],
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": fields["router_aux_loss_coef"],
        "output_router_logits": False,
    }
