"""Is each family's config.json read as transformers means it, and does transformers read the written one as the same?

The truth is transformers' own config classes: one of them, saved → our fields → our config.json → read by transformers.
"""

import dataclasses
import json

import pytest

from errors import UserError
from families.names import FAMILIES, read_config, write_config
from families.weights import canonical_name
from model_config import ModelConfig

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [1.5 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}  # fmt: skip
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
BASES = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5}}
# changes of each family's config, beside none
VARIANTS: dict[str, list[dict]] = {
    "llama": [{"rope_parameters": YARN, "tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 2}],
    "qwen3": [{"head_dim": 32, "num_key_value_heads": 2}],
    "mistral": [{"sliding_window": None, "num_key_value_heads": 2}, {"sliding_window": 7, "head_dim": 32}],
    "gpt2": [
        {"n_inner": 100, "activation_function": "gelu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
        {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "eos_token_id": [1, 2], "pad_token_id": 5},
    ],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3, "tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED, "rope_parameters": YARN},
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 3, "num_key_value_heads": 2},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ],
    "phi3": [
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "sliding_window": 9},
        {"rope_parameters": LONGROPE | {"factor": 3.0, "attention_factor": 1.2}, "original_max_position_embeddings": 64},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": None, "rms_norm_eps": 1e-3},
    ],
    "gemma2": [
        {"query_pre_attn_scalar": 224, "attn_logit_softcapping": None, "final_logit_softcapping": 11.0},
        {"layer_types": MIXED, "sliding_window": 5, "attention_bias": True, "hidden_activation": "gelu", "head_dim": 16},
        {"tie_word_embeddings": False, "rope_parameters": YARN},
    ],
    "gemma3_text": [
        {"rope_parameters": BASES, "query_pre_attn_scalar": 168},
        {"layer_types": MIXED, "final_logit_softcapping": 11.0, "sliding_window": 5, "head_dim": 16},
        {"sliding_window_pattern": 3},
    ],
    "olmo2": [{"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}, "attention_bias": True}],
    "olmo3": [
        {"layer_types": MIXED, "sliding_window": 5, "num_key_value_heads": 2},
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 5e5}}},
    ],
    "smollm3": [
        {"no_rope_layers": [1, 0] * 4, "use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
        {"no_rope_layer_interval": 3, "mlp_bias": True, "tie_word_embeddings": False},
        {"no_rope_layers": [1] * 8, "layer_types": MIXED, "use_sliding_window": True, "sliding_window": 5},
    ],
    "granite": [
        {
            "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "mlp_bias": True,
            "attention_multiplier": 0.0078125, "attention_bias": True, "tie_word_embeddings": True,
        },
    ],
    "mixtral": [
        {"num_local_experts": 4, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.02, "sliding_window": 9},
        {"head_dim": 32, "num_key_value_heads": 2},
    ],
    "qwen3_moe": [
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
        {"mlp_only_layers": [0, 5], "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
        {"attention_bias": True, "head_dim": 32, "router_aux_loss_coef": 0.02},
    ],
    "bert": [{"type_vocab_size": 3, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "pad_token_id": None}],
    "roberta": [{"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 3, "max_position_embeddings": 514}],
    "modernbert": [
        {"local_attention": 32, "layer_types": ["full_attention"] * 8, "norm_bias": True, "mlp_bias": True},
        {"global_attn_every_n_layers": 4, "attention_bias": True, "classifier_bias": True, "decoder_bias": False},
        {
            "rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 3.0}},
            "hidden_activation": "silu", "classifier_activation": "silu", "norm_eps": 1e-3,
        },
    ],
}  # fmt: skip
CASES = [(family, change) for family in FAMILIES for change in ({}, *VARIANTS[family])]
# training and generation alone, or another way to say what other fields hold
IGNORED = {
    "initializer_range", "use_cache", "architectures", "dtype", "transformers_version", "head_dim", "num_key_value_heads",
    "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "embedding_dropout", "mlp_dropout", "mlp_only_layers", "decoder_sparse_step", "no_rope_layer_interval", "n_inner",
    "reorder_and_upcast_attn", "output_router_logits", "max_window_layers", "_sliding_window_pattern",
    "sliding_window_pattern", "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta",
    "original_max_position_embeddings", "partial_rotary_factor",
}  # fmt: skip
FIELDS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def completed(fields: dict) -> dict:
    """The fields as a ModelConfig of them holds them."""
    fields = FIELDS | {"num_key_value_heads": None, "head_dim": None} | fields
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    return fields


def saved(transformers, family: str, **changes) -> dict:
    """The config.json that transformers writes."""
    given = (GPT2 if family == "gpt2" else SMALL) | json.loads(json.dumps(changes))
    return json.loads(transformers.AutoConfig.for_model(family, **given).to_json_string(use_diff=False))


def read_again(transformers, folder, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


def meaning(config) -> dict:
    """What of a transformers config the model is computed with."""
    values = config.to_dict()
    found = {name: value for name, value in values.items() if name not in IGNORED}
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    found["heads"] = (
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        getattr(config, "num_key_value_heads", None) or heads,
    )
    found["inner"] = values.get("intermediate_size") or values.get("n_inner") or 4 * config.hidden_size
    if "mlp_only_layers" in values:
        sparse, step = values["mlp_only_layers"], values["decoder_sparse_step"]
        found["dense"] = [i for i in range(layers) if i in sparse or (i + 1) % step]
    if "activation_function" in values:
        found["activation_function"] = values["activation_function"].replace("gelu_pytorch_tanh", "gelu_new")
    found["hidden_act"] = values.get("hidden_act", "").replace("gelu_new", "gelu_pytorch_tanh")
    if "rope_parameters" in values:
        found["rope_parameters"] = rotary(values["rope_parameters"], values)
    return found


def rotary(parameters: dict, config: dict) -> dict:
    """Rotary parameters without what follows from the rest."""
    if "full_attention" in parameters:
        return {kind: rotary(of, config) for kind, of in parameters.items()}
    kept = {name: value for name, value in parameters.items() if name != "type" and value is not None}
    kept.setdefault("partial_rotary_factor", 1.0)
    if kept["rope_type"] == "longrope":
        kept.setdefault("factor", config["max_position_embeddings"] / kept["original_max_position_embeddings"])
    return kept


@pytest.mark.parametrize(("family", "change"), CASES)
def test_transformers_reads_what_it_wrote_and_we_wrote_again(family, change, transformers, tmp_path):
    theirs = saved(transformers, family, **change)
    fields = completed(read_config(theirs))
    written = write_config(fields, "float32")
    again = read_again(transformers, tmp_path, written)
    assert meaning(again) == meaning(read_again(transformers, tmp_path, theirs))
    assert completed(read_config(written)) == fields
    assert completed(read_config(json.loads(again.to_json_string(use_diff=False)))) == fields
    class_name = f"{FAMILIES[family].CLASS}Config"
    assert type(again).__name__ == class_name and hasattr(transformers, FAMILIES[family].ARCHITECTURE)


@pytest.mark.parametrize(("family", "change"), CASES)
def test_either_version_alone_reads_the_same(family, change, transformers):
    """What version 4 has not, and what version 5 no longer has, left out of the config.json that serves both."""
    fields = completed(read_config(saved(transformers, family, **change)))
    written = write_config(fields, "float32")
    of_5 = {
        "rope_parameters",
        "dtype",
        *({"modernbert": ["layer_types"], "qwen3_moe": ["num_local_experts"]}.get(family, [])),
    }
    of_4 = {
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "global_rope_theta",
        "local_rope_theta",
        "torch_dtype",
    }
    of_4 |= {"global_attn_every_n_layers", *({"qwen3_moe": ["num_experts"]}.get(family, []))}
    for unknown in (of_5, of_4):
        known = {name: value for name, value in written.items() if name not in unknown}
        assert completed(read_config(known)) == fields


@pytest.mark.parametrize(
    ("family", "found", "name"),
    [
        ("llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("gpt2", "h.11.attn.c_attn.bias", "transformer.h.11.attn.c_attn.bias"),
        ("gpt2", "transformer.h.11.attn.bias", None),
        ("gpt2", "h.11.attn.masked_bias", None),
        ("bert", "bert.encoder.layer.0.output.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.weight"),
        ("bert", "cls.predictions.transform.LayerNorm.beta", "cls.predictions.transform.LayerNorm.bias"),
        ("bert", "embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.bias"),
        ("bert", "bert.embeddings.position_ids", None),
        ("bert", "cls.predictions.decoder.weight", None),
        ("roberta", "encoder.layer.0.output.dense.weight", "roberta.encoder.layer.0.output.dense.weight"),
        ("roberta", "lm_head.decoder.bias", None),
        ("modernbert", "layers.1.attn_norm.weight", "model.layers.1.attn_norm.weight"),
        ("modernbert", "decoder.bias", "decoder.bias"),
    ],
)
def test_names_of_older_and_of_bare_folders_become_those_of_today(family, found, name):
    assert canonical_name(family, found) == name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family, transformers, tmp_path):
    needed = {name: value for name, value in (GPT2 if family == "gpt2" else SMALL).items() if "position" not in name}
    silent = needed | {"model_type": family}
    whole = json.loads(read_again(transformers, tmp_path, silent).to_json_string(use_diff=False))
    ours, theirs = completed(read_config(silent)), completed(read_config(whole))
    if family in ("llama", "qwen3", "mistral"):  # whose special tokens nobody assumes
        whole_ends = {name: theirs.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        assert all(ours.pop(name) is None for name in whole_ends)
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function"),
        ("gpt2", {"n_embd": None}, "n_embd"),
        ("gpt2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("qwen2", {"layer_types": MIXED}, "layer_types"),  # use_sliding_window is false
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["linear_attention"] * 8}, "linear_attention"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("phi3", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 99}}, "original_max_position"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),  # rope_parameters still say 1
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"layer_types": MIXED, "sliding_window_pattern": 6}, "sliding_window_pattern"),
        ("gemma3_text", {"rope_theta": 5.0}, "rope_theta"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": YARN}}, "sliding_attention"),
        ("olmo3", {"rope_parameters": BASES}, "rope_parameters"),  # the sliding layers keep 500000
        ("olmo2", {"rope_parameters": BASES}, "rope_parameters"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers"),
        ("smollm3", {"layer_types": MIXED}, "layer_types"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"layer_types": MIXED}, "layer_types"),
        ("qwen3_moe", {"num_experts": 5}, "num_experts"),  # num_local_experts still says 128
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("roberta", {"hidden_act": "gelu_new"}, "hidden_act"),
        ("roberta", {"pad_token_id": None}, "pad_token_id"),
        ("roberta", {"position_embedding_type": "relative_key_query"}, "position_embedding_type"),
        ("modernbert", {"layer_types": MIXED}, "layer_types"),
        ("modernbert", {"global_attn_every_n_layers": 2}, "global_attn_every_n_layers"),
        ("modernbert", {"classifier_activation": "silu"}, "classifier_activation"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ("modernbert", {"local_rope_theta": None}, "local_rope_theta"),
        ("modernbert", {"local_attention": None}, "local_attention"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": None}, "max_window_layers"),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": None}, "original_max_position"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("bert", {"layer_norm_eps": None}, "layer_norm_eps"),
        ("bert", {"tie_word_embeddings": None}, "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_what_would_be_computed_differently_is_refused_by_name(family, change, named, transformers):
    with pytest.raises(UserError, match=named):
        read_config(saved(transformers, family) | change)


def test_a_dynamic_stretch_from_another_context_than_transformers_takes_is_refused(transformers):
    """It stretches from max_position_embeddings, 256 here, whatever else a config says."""
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match="original_max_position_embeddings 64 is not heeded"):
        ModelConfig.from_hf(saved(transformers, "llama", rope_parameters=stretched))
    ModelConfig.from_hf(
        saved(transformers, "llama", rope_parameters=stretched | {"original_max_position_embeddings": 256})
    )


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", {"num_key_value_heads": 2}), ("gpt2", {"head_dim": 32}), ("bert", {"num_key_value_heads": 2}),
        ("modernbert", {"head_dim": 32}), ("llama", {"qkv_bias": True}), ("mistral", {"qk_norm": True}),
    ],
)  # fmt: skip
def test_what_a_familys_folder_cannot_say_is_refused(family, change):
    """It would be lost in a checkpoint, which then could not be loaded."""
    fields = read_config((GPT2 if family == "gpt2" else SMALL | {"num_key_value_heads": 4}) | {"model_type": family})
    ModelConfig(**fields)
    with pytest.raises(UserError, match=f"{next(iter(change))} is .*, which the folder of a {family} cannot say"):
        ModelConfig(**fields | change)
