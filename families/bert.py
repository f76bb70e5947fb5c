"""How is a BERT's folder written? (Devlin et al. 2019). Two-sided attention, norms on sums, a head for masked words."""

from typing import Any

from families.common import (
    DEFAULTS_UNGROUPED,
    REQUIRED,
    read_activation,
    read_shape,
    with_prefix,
    write_activation,
    write_shape,
)

CLASS, ARCHITECTURE = "Bert", "BertForMaskedLM"
_EMBEDDINGS, _LAYER = "bert.embeddings", "bert.encoder.layer.N"
NAMES = {
    "model.embed_tokens": f"{_EMBEDDINGS}.word_embeddings",
    "model.embed_positions": f"{_EMBEDDINGS}.position_embeddings",
    "model.embed_types": f"{_EMBEDDINGS}.token_type_embeddings",
    "model.embed_norm": f"{_EMBEDDINGS}.LayerNorm",
    "model.layers.N.self_attn.q_proj": f"{_LAYER}.attention.self.query",
    "model.layers.N.self_attn.k_proj": f"{_LAYER}.attention.self.key",
    "model.layers.N.self_attn.v_proj": f"{_LAYER}.attention.self.value",
    "model.layers.N.self_attn.o_proj": f"{_LAYER}.attention.output.dense",
    "model.layers.N.post_attention_layernorm": f"{_LAYER}.attention.output.LayerNorm",
    "model.layers.N.mlp.up_proj": f"{_LAYER}.intermediate.dense",
    "model.layers.N.mlp.down_proj": f"{_LAYER}.output.dense",
    "model.layers.N.post_feedforward_layernorm": f"{_LAYER}.output.LayerNorm",
    "model.pooler": "bert.pooler.dense",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.bias": "cls.predictions.bias",
    "seq_relationship": "cls.seq_relationship",
}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
RENAMED = {"rms_norm_eps": "layer_norm_eps"}
ENCODER_DEFAULTS = DEFAULTS_UNGROUPED | {
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
FIXED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
# what BERT and RoBERTa have that Llama has not
PARTS = {
    "causal": False,
    "position_embedding": "learned",
    "norm": "layer",
    "norm_bias": True,
    "norm_position": "on_sum",
    "embedding_norm": True,
    "final_norm": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "gated_mlp": False,
    "head": "mlm",
    "head_dense_bias": True,
    "head_bias": True,
}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field."""
    return {
        **read_shape(config, ENCODER_DEFAULTS | {"pad_token_id": 0}, FIXED, RENAMED),
        **PARTS,
        **read_heads(config, CLASS),
        "hidden_act": read_activation(config, "hidden_act", "gelu"),
        "type_vocab_size": config.get("type_vocab_size", 2),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    return write_encoder(fields, "bert", named_class(fields, CLASS), dtype)


def read_heads(config: dict, prefix: str) -> dict[str, Any]:
    """Which heads the weights of this config.json have, by the class that it names; a masked language model's without one."""
    named = (config.get("architectures") or [""])[0]
    bare, pretraining = named == f"{prefix}Model", named == f"{prefix}ForPreTraining"
    return {
        "head": "none" if bare else "mlm",
        "pooler": (bare and prefix != "ModernBert") or pretraining,
        "next_sentence": pretraining,
    }


def named_class(fields: dict[str, Any], prefix: str) -> str:
    """The class that has these heads."""
    if fields["next_sentence"]:
        return f"{prefix}ForPreTraining"
    return f"{prefix}Model" if fields["head"] == "none" else f"{prefix}ForMaskedLM"


def write_encoder(fields: dict[str, Any], model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """config.json of a BERT or RoBERTa."""
    return write_shape(fields, model_type, architecture, dtype, (*REQUIRED, *ENCODER_DEFAULTS), RENAMED) | {
        "hidden_act": write_activation(fields["hidden_act"]),
        "type_vocab_size": fields["type_vocab_size"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def canonical(name: str) -> str | None:
    """The tensor's name in a folder of today.

    The first ones, made with TensorFlow, call a norm's weight and bias gamma and beta. The head's matrix, tied, and its bias
    may be there under a second name.
    """
    if name.endswith("embeddings.position_ids") or name.startswith("cls.predictions.decoder."):
        return None
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return with_prefix(name, "bert.", ("embeddings.", "encoder.", "pooler."))
