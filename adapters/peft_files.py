"""Which files do adapters come from and go to? adapter_config.json and adapter_model.safetensors, as PEFT has them.

A folder holds one adapter; its base is named, and not held (base_models.py).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base_models import json_bytes, new_folder
from adapters.lora import (
    ALL_LINEAR,
    SCORE,
    AdapterSettings,
    LoraLinear,
    adapter_settings,
    block_linears,
    head_parameters,
    is_quantised,
    place_adapters,
    store_learned,
    target_names,
)
from adapters.token_rows import token_rows, vocabulary_layers, write_rows
from checkpointing.safetensors_writer import TensorFile, write_file
from checkpointing.save_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from errors import UserError
from families.names import FAMILIES
from families.weights import stored_path, stored_views
from model import open_safetensors, read_json
from ranks import unwrap
from sharding import held

_PREFIX = "base_model.model."  # of every tensor in a PEFT file: PEFT's own wrappers around the model
_LEARNED_OVER = "base_weights"  # in the header of our adapter files: "nf4" or "full"

# Keys of adapter_config.json that are read here, or that change nothing about a finished adapter. Any other key must be
# empty: PEFT keeps adding variants, and one that is not known here would be computed wrongly.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "use_dora", "bias", "init_lora_weights", "exclude_modules", "layers_to_transform"}
_READ |= {"modules_to_save", "trainable_token_indices", "fan_in_fan_out"}
_HARMLESS = {"layers_pattern", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"}
_HARMLESS |= {"peft_version", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
_HARMLESS |= {"eva_config", "corda_config", "loftq_config", "lora_ga_config"}  # of init_lora_weights
_HEADS = {"score", "classifier", "qa_outputs", "pooler", "head"}  # PEFT names the first two for any classifier
_TASK_TYPES = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "answer": "QUESTION_ANS"}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights first

# ----------------------------------------------------------------------------------------------------- an adapter's files


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter's tensors, fp32, under PEFT's keys. They share memory with the model, which may be wrapped in DDP.

    base_model.model.PATH.lora_A.weight (rank, in), .lora_B.weight (out, rank) and for DoRA .lora_magnitude_vector (out,);
    heads that learn whole as well, such as a reward model's base_model.model.score.weight (1, H); with "default" the rows of
    tokens that learn, base_model.model.PATH.token_adapter.trainable_tokens_delta (n, H), the rows themselves.
    """
    _known_settings(model, name)
    rows = token_rows(model) if name == "default" else {}
    state = {_row_key(model, layer): held(adapter.trainable_tokens_delta) for layer, adapter in rows.items()}
    state |= _heads(model)
    for path, stored in block_linears(model).items():
        layer = unwrap(model).get_submodule(path)
        if isinstance(layer, LoraLinear) and name in layer.scales:
            state[f"{_PREFIX}{stored}.lora_A.weight"] = held(layer.lora_A[name])
            state[f"{_PREFIX}{stored}.lora_B.weight"] = held(layer.lora_B[name])
            if name in layer.lora_magnitude_vector:
                state[f"{_PREFIX}{stored}.lora_magnitude_vector"] = held(layer.lora_magnitude_vector[name])
    return state


def adapter_config(model: nn.Module, name: str, base_model: str | None) -> dict:
    """The contents of adapter_config.json. base_model: the folder or the name that the base was loaded from."""
    settings, inner = _known_settings(model, name), unwrap(model)
    heads = [stored_path(inner.config.family, path) for path in getattr(inner, "heads", ())]
    rows = {layer: adapter.ids.tolist() for layer, adapter in token_rows(model).items()}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(inner.config, bool(heads)),
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": _plain_number(settings.alpha),
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": {pattern: _plain_number(alpha) for pattern, alpha in settings.alpha_pattern.items()},
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "bias": "none",
        # whether the base stores the weights of these layers as (in, out): GPT-2's Conv1D
        "fan_in_fan_out": bool(FAMILIES[unwrap(model).config.family].TRANSPOSED),
        "init_lora_weights": True,
        # PEFT's own names end in the pooler, not in its dense layer
        "modules_to_save": [path.removesuffix(".dense").rpartition(".")[2] for path in heads] or None,
        # PEFT gives a tied head the embedding's by itself
        "trainable_token_indices": (rows if len(rows) > 1 else rows["embed_tokens"]) if rows else None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _task_type(config: Any, heads: bool) -> str | None:
    """PEFT's word for what the adapter is for. It has none for masked language models, and takes None for any class."""
    if heads:
        return _TASK_TYPES[config.task.stage if hasattr(config, "task") else "classify"]
    return "CAUSAL_LM" if config.causal else None


def peft_files(model: nn.Module, name: str, base_model: str | None) -> dict[str, Iterable[bytes | memoryview]]:
    """The two files of a PEFT folder by name, each as its bytes piece by piece: for any folder that also holds others."""
    metadata = {"format": "pt", _LEARNED_OVER: "nf4" if is_quantised(model) else "full"}
    return {
        ADAPTER_CONFIG: [json_bytes(adapter_config(model, name, base_model))],
        ADAPTER_WEIGHTS: TensorFile(adapter_state(model, name), metadata),
    }


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", base_model: str | None = None) -> None:
    """Write one adapter as a new PEFT folder; of several ranks, one calls it. UserError where `folder` exists."""
    with new_folder(folder) as temporary:
        for file_name, chunks in peft_files(model, name, base_model).items():
            write_file(temporary / file_name, chunks)


def _known_settings(model: nn.Module, name: str) -> AdapterSettings:
    settings = adapter_settings(model)
    if name not in settings:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(settings) or 'none'}")
    return settings[name]


def _heads(model: nn.Module) -> dict[str, Tensor]:
    """The heads that learn whole, under PEFT's keys."""
    state: dict[str, Tensor] = {}
    for name, parameter in head_parameters(model).items():
        state |= stored_views(unwrap(model).config.family, name, held(parameter))
    return {f"{_PREFIX}{stored}": tensor for stored, tensor in state.items()}


def _plain_number(value: float) -> float | int:
    return int(value) if value == int(value) else value


# ------------------------------------------------------------------------------------------------- an adapter from files


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Tensor | None:
    """Put the adapter of a PEFT folder on the model, or its values into the adapter `name` that is there already.

    A new one joins the active ones. One that is there must have the same layers, ranks, scales and kind; its parameters
    stay the same objects, so that an optimizer goes on with them. Returns the head (1, H) of a reward model's adapter
    where the model is a language model, which has no place for it; otherwise None.
    Rows of tokens that it trained (PEFT's trainable_token_indices) go where they learn, or else into the weights, which grow
    if need be.
    UserError, with the model as it was, for a folder that is broken, does not fit the model or holds what is not computed
    here: biases, whole trained layers other than the model's heads, layers outside of the blocks, variants other than rsLoRA and
    DoRA.
    """
    folder = Path(folder)
    config, state = read_adapter_config(folder), _read_tensors(folder)
    heads = _heads(model)
    head = None if heads else state.pop(_PREFIX + SCORE, None)
    trained_rows = _rows_from(config, state, model, name, folder)
    layers = _layers_by_stored_path(model)
    settings = _settings_from(config, folder, _paths(state, folder, model, layers))
    _check_targets(config["target_modules"], config, settings.targets, layers, folder, model)
    wanted: dict[str, tuple[int, ...]] = {key: tuple(tensor.shape) for key, tensor in heads.items()}
    learning = token_rows(model) if name == "default" else {}
    wanted |= {_row_key(model, layer): tuple(one.trainable_tokens_delta.shape) for layer, one in learning.items()}
    for path in settings.targets:
        rank, (rows, columns) = settings.rank_of(path), _shape(layers[path])
        wanted[f"{_PREFIX}{path}.lora_A.weight"] = (rank, columns)
        wanted[f"{_PREFIX}{path}.lora_B.weight"] = (rows, rank)
        if settings.dora:
            wanted[f"{_PREFIX}{path}.lora_magnitude_vector"] = (rows,)
    _check_tensors(wanted, state, folder / ADAPTER_WEIGHTS)
    if name not in adapter_settings(model):
        place_adapters(unwrap(model), name, settings)
    elif _computed(layers, name) != {path: (settings.scale_of(path), settings.dora) for path in settings.targets}:
        raise UserError(
            f"{folder}: its adapter has other layers, alpha, rsLoRA or DoRA than the one asked for here; "
            f"take the settings of its {ADAPTER_CONFIG}"
        )
    load_adapter_state(model, state, name)
    for layer, (ids, values) in trained_rows.items():
        write_rows(unwrap(model), layer, ids, values)
    return None if head is None else head.clone()


def _layers_by_stored_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module, by its path in the family's classes."""
    inner = unwrap(model)
    return {stored_path(inner.config.family, path): layer for path, layer in inner.named_modules()}


def _row_key(model: nn.Module, layer: str) -> str:
    path = stored_path(unwrap(model).config.family, f"model.{layer}" if layer == "embed_tokens" else layer)
    return f"{_PREFIX}{path}.token_adapter.trainable_tokens_delta"


def _rows_from(
    config: dict, state: dict[str, Tensor], model: nn.Module, name: str, folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (ids (n,), rows (n, H))} of the tokens that an adapter trained and that do not learn here; taken out of `state`.

    Those that learn stay in it. UserError for ones that do not fit the model.
    """
    given = config.get("trainable_token_indices") or {}
    given = given if isinstance(given, dict) else {"embed_tokens": given}
    layers, learning = vocabulary_layers(model), token_rows(model) if name == "default" else {}
    if not layers.keys() >= given.keys() and unwrap(model).config.tie_word_embeddings:
        given = {
            layer: ids for layer, ids in given.items() if layer != "lm_head"
        }  # the embedding's, under another name
    where = folder / ADAPTER_CONFIG
    if given and (name != "default" or not layers.keys() >= given.keys()):
        raise UserError(
            f"{where}: trainable_token_indices has {', '.join(given)}, which this model cannot take: merge it first"
        )
    found = {}
    for layer, ids in given.items():
        ids = torch.tensor(ids, dtype=torch.int64)
        if layer in learning:
            if learning[layer].ids.tolist() != ids.tolist():
                raise UserError(f"{where}: other tokens' rows were trained than the ones that learn in this run")
            continue
        values = state.pop(_row_key(model, layer), None)
        if values is None or values.shape != (len(ids), unwrap(model).config.hidden_size):
            raise UserError(
                f"{folder / ADAPTER_WEIGHTS}: the rows of trainable_token_indices in {layer} are missing or do not fit"
            )
        found[layer] = ids, values
    if missing := learning.keys() - given.keys():
        raise UserError(f"{where}: it trained no rows of {min(missing)}, and this run does; check --add_chat_tokens")
    return found


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy what `adapter_state` returned into the adapter `name`. UserError where names or shapes differ."""
    targets = adapter_state(model, name)
    _check_tensors({key: tuple(tensor.shape) for key, tensor in targets.items()}, state, f"the adapter {name}")
    for key, tensor in targets.items():
        tensor.copy_(state[key])
    store_learned(model)


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json. UserError where it is missing or describes what is not computed here."""
    path = Path(folder) / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f'{path}: peft_type is "{config.get("peft_type")}"; only "LORA" can be loaded')
    if config.get("bias", "none") != "none":
        raise UserError(f'{path}: bias is "{config["bias"]}"; only adapters without biases ("none") can be loaded')
    if other := set(config.get("modules_to_save") or ()) - _HEADS:
        raise UserError(f"{path}: modules_to_save has {min(other)}; only the head of a class can be trained whole")
    for key in sorted(config.keys() - _READ - _HARMLESS):
        if config[key]:
            raise UserError(
                f"{path}: {key} is {config[key]!r}, which is not computed here; train the adapter without it"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise UserError(
            f'{path}: init_lora_weights is "{config["init_lora_weights"]}", which changes the base weights, too; '
            "convert the adapter to plain LoRA with PEFT first"
        )
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not isinstance(config.get(key), kind):
            raise UserError(f"{path}: {key} is missing or not of the right type")
    return config


def learned_over(folder: str | Path) -> str | None:
    """What the adapter of a folder learned beside: "nf4" or "full" weights; None where its file does not say."""
    with open_safetensors(Path(folder) / ADAPTER_WEIGHTS) as tensors:
        return (tensors.metadata() or {}).get(_LEARNED_OVER)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder}: adapter_model.bin is a pickle, which is never loaded; save it as {ADAPTER_WEIGHTS}")
    with open_safetensors(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def _paths(
    state: Iterable[str], folder: Path, model: nn.Module, layers: Mapping[str, nn.Module]
) -> tuple[str, ...]:  # fmt: skip
    """The layers that have tensors in the file, in its order. UserError for one that takes no adapter here."""
    paths: dict[str, None] = {}  # a set that keeps its order
    names, heads = target_names(model), _heads(model)
    for key in state:
        if key in heads or key in (_row_key(model, "embed_tokens"), _row_key(model, "lm_head")):
            continue
        path, found, _ = key.removeprefix(_PREFIX).rpartition(".lora_A.")
        layer = key.removeprefix(_PREFIX).split(".lora_")[0]
        if not key.startswith(_PREFIX) or not any(layer.endswith(f".{name}") for name in names):
            known = ", ".join(names)
            raise UserError(f"{folder}: it trains {key.removeprefix(_PREFIX)}; only adapters on {known} can be loaded")
        if found:
            paths[path] = None
    return tuple(paths)


def _settings_from(config: dict, folder: Path, paths: tuple[str, ...]) -> AdapterSettings:
    """The settings, whose targets are whole paths: so a regular expression or a choice of layers needs no second rule."""
    if not paths:
        raise UserError(f"{folder}: {ADAPTER_WEIGHTS} holds no adapter")
    return AdapterSettings(
        config["r"],
        config["lora_alpha"],
        config.get("lora_dropout") or 0.0,
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        paths,
        config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {},
    )


def _check_targets(
    targets: str | list, config: dict, paths: Iterable[str], layers: dict, folder: Path, model: nn.Module
) -> None:  # fmt: skip
    """UserError where the configuration and the tensors speak of different layers, or the model lacks one."""
    if unknown := [path for path in paths if path not in layers]:
        raise UserError(f"{folder}: the model has no layer {unknown[0]}; name the base that the adapter was trained on")
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return
    linear = {path for path, layer in layers.items() if isinstance(layer, (nn.Linear, nn.Embedding, LoraLinear))}
    if targets == ALL_LINEAR:
        wanted = set(block_linears(model).values())
    elif isinstance(targets, str):
        wanted = {path for path in linear if re.fullmatch(targets, path)}
    else:
        wanted = {path for path in linear if any(path == name or path.endswith(f".{name}") for name in targets)}
    if different := sorted(wanted.symmetric_difference(paths)):
        raise UserError(
            f"{folder}: target_modules in {ADAPTER_CONFIG} and the tensors of {ADAPTER_WEIGHTS} disagree about "
            f"{different[0]}; save the adapter again"
        )


def _computed(layers: Mapping[str, nn.Module], name: str) -> dict[str, tuple[float, bool]]:
    """(scale, DoRA or not) of each layer that has the adapter."""
    found = {path: layer for path, layer in layers.items() if isinstance(layer, LoraLinear) and name in layer.scales}
    return {path: (layer.scales[name], name in layer.lora_magnitude_vector) for path, layer in found.items()}


def _shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = layer.shape if isinstance(layer, LoraLinear) else layer.get_parameter("weight").shape
    return rows, columns


def _check_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: str | Path) -> None:
    if missing := wanted.keys() - found.keys():
        raise UserError(f"{where}: {len(missing)} tensors of the adapter are missing, {min(missing)} first")
    if unexpected := found.keys() - wanted.keys():
        raise UserError(f"{where}: {len(unexpected)} tensors do not belong to the adapter, {min(unexpected)} first")
    for key, shape in wanted.items():
        if tuple(found[key].shape) != shape:
            raise UserError(f"{where}: {key} has the shape {tuple(found[key].shape)}, but {shape} fits the model")
