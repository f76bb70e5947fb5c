"""What do the config.json files of most families have in common? Required fields, fixed ones, the rotary embedding.

A family's file turns config.json into the fields of model.ModelConfig and back; both sides are plain dictionaries, so that
the model knows of families by their name alone.
"""

from typing import Any

from errors import UserError
from kernels.rotary import STRETCHED_FROM

INIT_STD = 0.02
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# fields that all families here name as ModelConfig does, beside the required ones
SAME_NAME = (
    *REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# fields that change what is computed, and the only value of each that the model computes
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}


def read_common(config: dict, defaults: dict[str, Any], never_null: tuple[str, ...] = ()) -> dict[str, Any]:
    """ModelConfig's fields from a config.json, as transformers 4 or 5 writes it.

    defaults: what the family's reader assumes where config.json is silent. never_null: fields that it refuses a null of.
    Raises UserError, naming the field, for anything that would be computed differently and for contradictions.
    """
    for name in REQUIRED:
        if not isinstance(config.get(name), int):
            raise UserError(f"config.json: {name} is missing or not a whole number")
    for name, value in _FIXED.items():
        if config.get(name, value) != value and config[name] is not None:
            raise UserError(f"config.json: {name} is {config[name]!r}; only {value!r} can be loaded")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError("config.json: layer_types has layers other than full_attention, which cannot be loaded")
    for name in ("rope_theta", *never_null):  # a null rope_theta is taken for no number at all
        if config.get(name, 0) is None and not (name == "rope_theta" and config.get("rope_parameters")):
            raise UserError(f"config.json: {name} is null; give it a number, or leave the field out")
    theta, scaling = _rope(config)
    fields = {"rms_norm_eps": 1e-6, **defaults} | {name: config[name] for name in SAME_NAME if name in config}
    return fields | {"rope_theta": theta, "rope_scaling": scaling}


def write_common(fields: dict[str, Any], model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields. dtype: of the saved weights.

    Every field is explicit and the renamed ones are there under both names, because readers differ in what they
    assume: without a top-level rope_theta transformers 4 silently takes 10000, without rope_parameters version 5
    would have to guess, and mlx-lm ties the embeddings of a config that does not say.
    """
    theta, scaling = fields["rope_theta"], fields["rope_scaling"]
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{name: fields[name] for name in SAME_NAME if name not in (*ends, "tie_word_embeddings")},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields["tie_word_embeddings"],
        **{name: fields[name] for name in ends},
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": INIT_STD,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _rope(config: dict) -> tuple[float, dict | None]:
    """(theta, rope_scaling) from version 4's rope_theta and rope_scaling or version 5's rope_parameters."""
    sources = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
    if any(isinstance(value, dict) for source in sources for value in source.values()):
        raise UserError("config.json: rope_parameters differ from layer to layer, which cannot be loaded")
    theta = _agreed(config, sources, "rope_theta")
    original = _agreed(config, sources, "original_max_position_embeddings")
    scaling = dict(sources[0] or sources[1])  # the order of precedence of transformers 5
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)  # the name before transformers 4.43
    for name in ("rope_theta", "original_max_position_embeddings"):
        scaling.pop(name, None)
    if _agreed(config, sources, "partial_rotary_factor") not in (None, 1.0):
        raise UserError("config.json: partial_rotary_factor is not 1, which cannot be loaded")
    scaling.pop("partial_rotary_factor", None)
    if original is not None and kind in STRETCHED_FROM:
        scaling["original_max_position_embeddings"] = original
    return 10000.0 if theta is None else float(theta), None if kind == "default" else {"rope_type": kind, **scaling}


def _agreed(config: dict, sources: list[dict], name: str) -> float | None:
    """The value that config.json gives a field of the rotary embedding, at its top or in one of the `sources`."""
    found = {source[name] for source in (config, *sources) if source.get(name) is not None}
    if len(found) > 1:
        raise UserError(f"config.json: {name} is given as {' and as '.join(map(str, sorted(found)))}; correct one")
    return found.pop() if found else None
