"""A small model of each family in transformers, with odd sizes: what the tests of families compare with."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 7  # shorter than the texts
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
    "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500000.0}
# by a name: (transformers' config class, its class, what is not SIZES)
MODELS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW, "head_dim": 24}),
    "mistral nemo": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 windows": (
        "Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24}),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 131, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt2 unscaled": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96,
         "scale_attn_weights": False, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": None}),
    "phi3 window": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "phi4 mini": (
        "Phi3Config", "Phi3ForCausalLM",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM",
        {"sliding_window": WINDOW, "head_dim": 24, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5,
         "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {"sliding_window": WINDOW, "head_dim": 24, "query_pre_attn_scalar": 20, "layer_types": ALTERNATING},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo3": (
        "Olmo3Config", "Olmo3ForCausalLM",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING,
         "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500000.0}, "full_attention": YARN}},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
    "granite": (
        "GraniteConfig", "GraniteForCausalLM",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    ),
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "qwen3 moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True, "head_dim": 24,
         "mlp_only_layers": [1]},
    ),
    "qwen3 moe unnormalised": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 40, "norm_topk_prob": False,
         "decoder_sparse_step": 2},
    ),
    "llama dynamic": (
        "LlamaConfig", "LlamaForCausalLM",
        {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
}  # fmt: skip
ENCODER_SIZES = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "pad_token_id")}
ENCODER_SIZES["pad_token_id"] = 1
ENCODERS: dict[str, tuple[str, str, dict]] = {
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {"type_vocab_size": 1, "max_position_embeddings": 258}),
    "modernbert": (
        "ModernBertConfig", "ModernBertForMaskedLM",
        {"local_attention": 2 * WINDOW - 2, "cls_token_id": 1, "sep_token_id": 2, "norm_bias": True, "classifier_bias": True},
    ),
    "modernbert plain": ("ModernBertConfig", "ModernBertForMaskedLM", {"local_attention": 2 * WINDOW - 2}),
}  # fmt: skip


def peer_config(name: str, **more: Any) -> Any:
    """transformers' config of the model."""
    config_class, _, changes = (MODELS | ENCODERS)[name]
    sizes = {} if config_class == "GPT2Config" else ENCODER_SIZES if name in ENCODERS else SIZES
    return getattr(transformers, config_class)(**{**sizes, **changes, **more})


def peer(name: str, **more: Any) -> torch.nn.Module:
    """transformers' model, each parameter moved by noise."""
    config = peer_config(name, **more)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, (MODELS | ENCODERS)[name][1])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
