"""What do the config.json files of most families have in common? Shape, fixed fields, rotary embedding, layers' kinds.

A family's file turns config.json into the fields of model.ModelConfig and back; both sides are plain dictionaries, so that
the model knows of families by their name alone. Every family's file defines

    CLASS         the prefix of transformers' classes; ARCHITECTURE: the class that its folder names for a language model
    read, write   config.json → fields, fields → config.json
    NAMES         our module's path → the folder's, where they differ; N stands for a layer's number
    TRANSPOSED    our modules whose weight the folder stores as (in, out)
    EXPERTS       the folder's tensors of expert E in layer N that are our stacked gate, up and down projections, or None
    canonical     a tensor's name as some folder has it → as the family's folders have it today; None: a tensor to ignore

Dropout is no field of the model: any value is read, and 0 is written.
"""

from typing import Any

from errors import UserError
from kernels.rotary import STRETCHED_FROM

INIT_STD = 0.02
FULL, SLIDING = "full_attention", "sliding_attention"
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# fields that most families name as ModelConfig does, beside the required ones, and what Llama's reader assumes of each
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# of families whose folders say neither: a key head for each query head, and heads that share the width
DEFAULTS_UNGROUPED = {name: DEFAULTS[name] for name in DEFAULTS if name not in ("num_key_value_heads", "head_dim")}
# the config's name of an activation → the model's
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


# ---------------------------------------------------------------------------------------------------------------- shape


def read_common(
    config: dict,
    defaults: dict[str, Any],
    fixed: dict[str, Any],
    never_null: tuple[str, ...] = (),
    rope_theta: float = 10000.0,
) -> dict[str, Any]:
    """ModelConfig's fields from the config.json of a rotary model with SiLU whose layers are all alike.

    defaults: beside `DEFAULTS`; rope_theta: the base where none is given. The others are those of `read_shape`.
    """
    fields = read_shape(config, DEFAULTS | defaults, {"hidden_act": "silu", **fixed}, never_null=never_null)
    if any(kind != FULL for kind in config.get("layer_types") or []):
        raise UserError(f"config.json: layer_types has layers other than {FULL}, which cannot be loaded")
    return fields | read_rope(config, rope_theta)


def write_common(fields: dict[str, Any], model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """config.json of a rotary model with SiLU. dtype: of the saved weights."""
    silu = {"hidden_act": "silu", "attention_dropout": 0.0}
    return write_shape(fields, model_type, architecture, dtype) | write_rope(fields) | silu


def read_shape(
    config: dict,
    defaults: dict[str, Any],
    fixed: dict[str, Any],
    renamed: dict[str, str] | None = None,
    never_null: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The required fields and those of `defaults` from a config.json, as transformers 4 or 5 writes it.

    defaults: what the family's reader assumes where config.json is silent. fixed: fields that change what is computed, and
    the only value of each that the model computes (null is taken for it). renamed: our name → config.json's. never_null:
    fields that the reader refuses a null of. Raises UserError, naming config.json's field, for anything else.
    """
    named = {name: (renamed or {}).get(name, name) for name in (*REQUIRED, *defaults)}
    for name in REQUIRED:
        if type(config.get(named[name])) is not int:
            raise UserError(f"config.json: {named[name]} is missing or not a whole number")
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config says that the weights are rounded, from which this model cannot be built; take "
            "the one that it was made of"
        )
    for name, value in fixed.items():
        if config.get(name, value) != value and config[name] is not None:
            raise UserError(f"config.json: {name} is {config[name]!r}; only {value!r} can be loaded")
    for name in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", *never_null):
        _refuse_null(config, named.get(name, name))
    return defaults | {name: config[theirs] for name, theirs in named.items() if theirs in config}


def write_shape(
    fields: dict[str, Any],
    model_type: str,
    architecture: str,
    dtype: str,
    names: tuple[str, ...] = (*REQUIRED, *DEFAULTS),
    renamed: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The part of config.json that `read_shape` reads. names: the fields that the family has. dtype: of the weights.

    Every field is explicit, because readers differ in what they assume: mlx-lm ties the embeddings of a config that does
    not say, transformers' classes each assume other special tokens.
    """
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{(renamed or {}).get(name, name): fields[name] for name in names},
        "initializer_range": INIT_STD,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def read_activation(config: dict, name: str, assumed: str) -> str:
    """The model's name of the activation that field `name` names."""
    given = config.get(name, assumed)
    if given not in _ACTIVATIONS:
        raise UserError(f"config.json: {name} is {given!r}; only {', '.join(_ACTIVATIONS)} can be loaded")
    return _ACTIVATIONS[given]


def write_activation(ours: str) -> str:
    """transformers' name of the model's activation."""
    return "gelu_pytorch_tanh" if ours == "gelu_tanh" else ours


def read_attention_bias(config: dict) -> dict[str, Any]:
    """`attention_bias` of the families in which it is of all four projections."""
    bias = bool(config.get("attention_bias"))
    return {"qkv_bias": bias, "output_bias": bias}


def read_count(config: dict, name: str, assumed: int, least: int = 1) -> int:
    """A whole number of at least `least`."""
    value = config.get(name, assumed)
    if not isinstance(value, int) or value < least:
        raise UserError(f"config.json: {name} is {value!r}; it must be a whole number of at least {least}")
    return value


def read_number(config: dict, names: tuple[str, ...], assumed: Any) -> Any:
    """The value of a field that has more than one name in config.json, which must agree."""
    found = {config[name] for name in names if config.get(name) is not None}
    if len(found) > 1:
        raise UserError(f"config.json: {' and '.join(names)} differ; correct one")
    return found.pop() if found else assumed


def _refuse_null(config: dict, name: str) -> None:
    if name in config and config[name] is None:
        raise UserError(f"config.json: {name} is null; give it a value, or leave the field out")


# --------------------------------------------------------------------------------------------------- kinds of layers


def read_layer_types(config: dict, assumed: list[str], sliding_window: int | None) -> list[str]:
    """A kind for each layer: `layer_types`, or what the family assumes without. Raises UserError, naming the field."""
    kinds = config.get("layer_types") or assumed
    if len(kinds) != config["num_hidden_layers"]:
        raise UserError(
            f"config.json: layer_types has {len(kinds)} entries and num_hidden_layers is {config['num_hidden_layers']}; "
            "give one a layer"
        )
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise UserError(f"config.json: layer_types has {min(unknown)}; only {FULL} and {SLIDING} can be loaded")
    if SLIDING in kinds and sliding_window is None:
        raise UserError(f"config.json: layer_types has {SLIDING}, but no sliding_window is in use; give one")
    return list(kinds)


def layer_types(fields: dict[str, Any]) -> list[str]:
    """The kind of each layer, from ModelConfig's fields."""
    alike = FULL if fields["sliding_window"] is None else SLIDING
    return fields["layer_types"] or [alike] * fields["num_hidden_layers"]


# -------------------------------------------------------------------------------------------------------------- rotary


def read_rope(config: dict, assumed: float = 10000.0, partial: bool = False) -> dict[str, Any]:
    """rope_theta and rope_scaling from version 4's fields of those names or version 5's rope_parameters.

    assumed: the base where none is given. partial: whether the family knows partial_rotary_factor, which is then the third.
    """
    if not config.get("rope_parameters"):
        _refuse_null(config, "rope_theta")  # it is taken for no number at all
    sources = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
    if any(isinstance(value, dict) for source in sources for value in source.values()):
        raise UserError("config.json: rope_parameters differ from layer to layer, which cannot be loaded")
    theta = _agreed(config, sources, "rope_theta")
    original = _agreed(config, sources, "original_max_position_embeddings")
    turned = _agreed(config, sources, "partial_rotary_factor")
    scaling = dict(sources[0] or sources[1])  # the order of precedence of transformers 5
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)  # the name before transformers 4.43
    for name in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        scaling.pop(name, None)
    if not partial and turned not in (None, 1.0):
        raise UserError("config.json: partial_rotary_factor is not 1, which cannot be loaded")
    if original is not None and kind in STRETCHED_FROM:
        scaling["original_max_position_embeddings"] = original
    return {
        "rope_theta": assumed if theta is None else float(theta),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
        **({"partial_rotary_factor": 1.0 if turned is None else float(turned)} if partial else {}),
    }


def write_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling under the names of both versions.

    Without a top-level rope_theta transformers 4 silently takes 10000; without rope_parameters version 5 has to guess.
    """
    theta, scaling = fields["rope_theta"], fields["rope_scaling"]
    both = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": both}


def read_layered_rope(
    config: dict, full_name: str, sliding_name: str, assumed: tuple[float, float]
) -> tuple[dict[str, Any], float]:
    """rope_theta and rope_scaling of the full-attention layers, and the base of the sliding ones, which are unscaled.

    Version 5 nests them in rope_parameters, version 4 has the bases as `full_name` and `sliding_name`. assumed: both bases
    where config.json is silent.
    """
    nested = config.get("rope_parameters") or {}
    if flat := nested.keys() - {FULL, SLIDING}:
        raise UserError(
            f"config.json: rope_parameters has {min(flat)} beside {FULL} and {SLIDING}, which it must be in"
        )
    found = []
    for kind, name, base in ((FULL, full_name, assumed[0]), (SLIDING, sliding_name, assumed[1])):
        _refuse_null(config, name)
        one: dict[str, Any] = {"rope_parameters": nested.get(kind)}
        if name in config:
            one["rope_theta"] = config[name]
        if kind == FULL:
            one["rope_scaling"] = config.get("rope_scaling")
        found.append(read_rope(one, base))
    full, sliding = found
    if sliding["rope_scaling"] is not None:
        raise UserError(f"config.json: rope_parameters scales {SLIDING}; only rope_type default can be loaded there")
    return full, sliding["rope_theta"]


def write_layered_rope(fields: dict[str, Any], full_name: str, sliding_name: str) -> dict[str, Any]:
    """What `read_layered_rope` reads, under the names of both versions."""
    rope = write_rope(fields)
    base = fields["rope_theta"] if fields["local_rope_theta"] is None else fields["local_rope_theta"]
    return {
        full_name: fields["rope_theta"],
        sliding_name: base,
        "rope_scaling": rope["rope_scaling"],
        "rope_parameters": {FULL: rope["rope_parameters"], SLIDING: {"rope_type": "default", "rope_theta": base}},
    }


def _agreed(config: dict, sources: list[dict], name: str) -> float | None:
    """The value that config.json gives a field of the rotary embedding, at its top or in one of the `sources`."""
    found = {source[name] for source in (config, *sources) if source.get(name) is not None}
    if len(found) > 1:
        raise UserError(f"config.json: {name} is given as {' and as '.join(map(str, sorted(found)))}; correct one")
    return found.pop() if found else None


# --------------------------------------------------------------------------------------------------------------- names


def with_prefix(name: str, prefix: str, children: tuple[str, ...]) -> str:
    """The tensor's name in a language model's folder; a folder of the bare model (LlamaModel) has it without prefix."""
    return prefix + name if name.startswith(children) else name


def canonical_llama(name: str) -> str | None:
    """`canonical` of the families that name their tensors as Llama does."""
    return with_prefix(name, "model.", ("embed_tokens.", "layers.", "norm."))
