"""How is a ModernBERT's folder written? (Warner et al. 2024). A BERT with rotary positions, GeGLU and windows."""

from typing import Any

from errors import UserError
from families.bert import named_class, read_heads
from families.common import (
    DEFAULTS_UNGROUPED,
    FULL,
    REQUIRED,
    SLIDING,
    layer_types,
    read_activation,
    read_attention_bias,
    read_count,
    read_layer_types,
    read_layered_rope,
    read_shape,
    with_prefix,
    write_activation,
    write_layered_rope,
    write_shape,
)

CLASS, ARCHITECTURE = "ModernBert", "ModernBertForMaskedLM"
NAMES = {
    "model.embed_tokens": "model.embeddings.tok_embeddings",
    "model.embed_norm": "model.embeddings.norm",
    "model.layers.N.input_layernorm": "model.layers.N.attn_norm",
    "model.layers.N.self_attn.qkv_proj": "model.layers.N.attn.Wqkv",
    "model.layers.N.self_attn.o_proj": "model.layers.N.attn.Wo",
    "model.layers.N.post_attention_layernorm": "model.layers.N.mlp_norm",
    "model.layers.N.mlp.gate_up_proj": "model.layers.N.mlp.Wi",  # the first half goes through the activation
    "model.layers.N.mlp.down_proj": "model.layers.N.mlp.Wo",
    "model.norm": "model.final_norm",
    "head.bias": "decoder.bias",
}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
_RENAMED = {"rms_norm_eps": "norm_eps"}
_DEFAULTS = DEFAULTS_UNGROUPED | {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50281,
    "eos_token_id": 50282,
    "pad_token_id": 50283,
}
_FIXED = {"tie_word_embeddings": True}
_BASES = ("global_rope_theta", "local_rope_theta")


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    `local_attention` counts the tokens to both sides: 128 are 64 on each, which is |query - key| < 65. Every
    `global_attn_every_n_layers`-th layer, the first one among them, sees all.
    """
    fields = read_shape(config, _DEFAULTS, _FIXED, _RENAMED)
    full, local_theta = read_layered_rope(config, *_BASES, (160000.0, 10000.0))
    if full["rope_scaling"] is not None:
        raise UserError("config.json: rope_parameters are scaled; only rope_type default can be loaded")
    activation = read_activation(config, "hidden_activation", "gelu")
    if read_activation(config, "classifier_activation", "gelu") != activation:
        raise UserError("config.json: classifier_activation is not hidden_activation, which cannot be loaded")
    window = read_count(config, "local_attention", 128, least=0) // 2 + 1
    return {
        **fields,
        **full,
        **read_attention_bias(config),
        "local_rope_theta": local_theta,
        "sliding_window": window,
        "layer_types": _kinds(config, window),
        "hidden_act": activation,
        "mlp_bias": bool(config.get("mlp_bias")),
        "norm_bias": bool(config.get("norm_bias")),
        "head_dense_bias": bool(config.get("classifier_bias")),
        "head_bias": bool(config.get("decoder_bias", True)),
        "causal": False,
        "norm": "layer",
        "embedding_norm": True,
        "first_norm": False,
        "fused_qkv": True,
        "fused_gate_up": True,
        **read_heads(config, CLASS),
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    kinds, end = layer_types(fields), fields["eos_token_id"]
    activation = write_activation(fields["hidden_act"])
    return {
        **write_shape(fields, "modernbert", named_class(fields, CLASS), dtype, (*REQUIRED, *_DEFAULTS), _RENAMED),
        **write_layered_rope(fields, *_BASES),
        "cls_token_id": fields["bos_token_id"],
        "sep_token_id": end[0] if isinstance(end, list) else end,
        "local_attention": 2 * (fields["sliding_window"] - 1),
        "layer_types": kinds,
        "global_attn_every_n_layers": _interval(kinds),
        "hidden_activation": activation,
        "classifier_activation": activation,
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["mlp_bias"],
        "norm_bias": fields["norm_bias"],
        "classifier_bias": fields["head_dense_bias"],
        "decoder_bias": fields["head_bias"],
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
    }


def canonical(name: str) -> str | None:
    """The tensor's name in a folder of today. The head's matrix, tied, may be there under a second name."""
    if name == "decoder.weight":
        return None
    return with_prefix(name, "model.", ("embeddings.", "layers.", "final_norm."))


def _interval(kinds: list[str]) -> int:
    """After how many layers one that sees all comes again."""
    return kinds.index(FULL, 1) if FULL in kinds[1:] else len(kinds)


def _every(interval: int, count: int) -> list[str]:
    return [SLIDING if i % interval else FULL for i in range(count)]


def _kinds(config: dict, window: int) -> list[str]:
    """The kind of each layer. Version 4 can only write a pattern, so that nothing else is loaded."""
    count, interval = config["num_hidden_layers"], read_count(config, "global_attn_every_n_layers", 3)
    kinds = read_layer_types(config, _every(interval, count), window)
    if kinds != _every(_interval(kinds), count):
        raise UserError(
            f"config.json: layer_types has no {FULL} after every so many layers; nothing else can be loaded"
        )
    if "global_attn_every_n_layers" in config and kinds != _every(interval, count):
        raise UserError(f"config.json: layer_types is not what global_attn_every_n_layers {interval} says; correct one")
    return kinds
