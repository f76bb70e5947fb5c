"""How is a Mixtral's folder written? (Jiang et al. 2024). A Mistral with experts in the place of its MLPs."""

from typing import Any

from families.common import canonical_llama, read_common, read_number, write_common

CLASS, ARCHITECTURE = "Mixtral", "MixtralForCausalLM"
NAMES = {"model.layers.N.mlp.gate": "model.layers.N.block_sparse_moe.gate"}
TRANSPOSED: frozenset[str] = frozenset()
_EXPERT = "model.layers.N.block_sparse_moe.experts.E."
EXPERTS = (f"{_EXPERT}w1.weight", f"{_EXPERT}w3.weight", f"{_EXPERT}w2.weight")  # gate, up, down
canonical = canonical_llama
_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FIXED = {"attention_bias": False, "router_jitter_noise": 0}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    fields = read_common(config, _DEFAULTS, _FIXED, rope_theta=1000000.0)
    return {
        **fields,
        "sliding_window": config.get("sliding_window"),
        "num_experts": read_number(config, ("num_local_experts", "num_experts"), 8),
        "experts_per_token": config.get("num_experts_per_tok", 2),
        "expert_size": fields["intermediate_size"],
        "normalise_routing": True,
        "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_common(fields, "mixtral", ARCHITECTURE, dtype) | {
        "sliding_window": fields["sliding_window"],
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["experts_per_token"],
        "intermediate_size": fields["expert_size"],
        "router_aux_loss_coef": fields["router_aux_loss_coef"],
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }
