"""Where does the model that adapters learn beside come from, and how does a 4-bit one go to a folder?

    any Hugging Face folder of a family                    `load_base`; to quantise it no more than one of its weights is
                                                           in memory at a time
    config.json with quantization_config, *.safetensors    a model whose block linears are NF4, as transformers with
                                                           bitsandbytes writes and reads it

New folders appear whole or not at all.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.lora import BLOCK_LINEARS, QUANTISATIONS, LoraLinear, block_linears, is_quantised, plain_shapes
from adapters.quantised_experts import NF4Experts
from checkpointing.safetensors_writer import write_file
from checkpointing.save import MAX_SHARD_BYTES, write_weights
from checkpointing.save_folder import CONFIG, fsync_folder, temporary_path
from errors import UserError
from families.weights import is_transposed, stored_path, stored_views
from kernels.nf4 import NF4Weight, from_bitsandbytes, quantise_nf4, to_bitsandbytes
from layers import MixtureMLP
from model import Transformer, load_pretrained, open_safetensors, read_json, stored_names
from model_config import ModelConfig
from ranks import unwrap

# ----------------------------------------------------------------------------------------------------------- base models


def load_base(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantise: str | None = None,
    device: torch.device | str = "cpu",
    spread: Callable[[nn.Module], None] | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, to put adapters on: in `dtype`, its block linears in NF4 if quantise="nf4".

    Weights are rounded to `dtype` before they are quantised, one at a time, so that beside the quantised model never
    more than one weight is in memory. A folder whose layers are 4-bit already stays so. UserError as in
    `model.load_pretrained`.
    """
    folder = Path(folder)
    if quantise not in QUANTISATIONS:
        raise UserError(f"weights can be quantised to nf4, not {quantise}")
    config = read_json(folder / CONFIG)
    if config.get("quantization_config"):
        return load_quantised(folder, dtype=dtype, device=device)
    if quantise is None:
        return load_pretrained(folder, device, dtype, spread)
    shape = ModelConfig.from_hf(config)
    holders, family = stored_names(folder, shape), shape.family

    def read(name: str, parameter: Tensor) -> Tensor | NF4Weight:
        weight = _read_weight(holders, family, name, parameter)
        if _is_block_linear(name) or parameter.dim() == 3:
            return quantise_nf4(weight.to(device, dtype).flatten(0, -2))
        return weight.to(device, dtype, copy=True)

    return _assemble(folder, shape, holders, read)


def load_quantised(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """A folder that transformers saved with bitsandbytes' NF4 layers, or `save_quantised` did, as a Transformer.

    dtype: of what is not quantised, by default as the embedding is stored. UserError for another quantisation, and as in
    `model.load_pretrained`.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    settings = config.pop("quantization_config", None) or {}
    if not (settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") == "nf4"):
        raise UserError(
            f"{folder / CONFIG}: quantization_config does not describe bitsandbytes' NF4; take the base model"
        )
    shape = ModelConfig.from_hf(config)
    holders, family = stored_names(folder, shape), shape.family
    dtype = dtype or stored_dtype(folder)

    def read(name: str, parameter: Tensor) -> Tensor | NF4Weight:
        path, _, leaf = name.rpartition(".")
        stored = f"{stored_path(family, path)}.{leaf}"
        if f"{stored}.absmax" not in holders:
            return _read_weight(holders, family, name, parameter).to(device, dtype, copy=True)
        parts = [key for key in holders if key == stored or key.startswith(f"{stored}.")]
        return from_bitsandbytes({key: _read_tensor(holders, key).to(device, copy=True) for key in parts}, stored)

    return _assemble(folder, shape, holders, read)


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype in which a folder holds the embedding, which stands for all that is not quantised."""
    config = read_json(Path(folder) / CONFIG)
    config.pop("quantization_config", None)
    shape = ModelConfig.from_hf(config)
    embedding = torch.empty(0, 0, device="meta")
    return _read_weight(stored_names(Path(folder), shape), shape.family, "model.embed_tokens.weight", embedding).dtype


Holders = Mapping[str, tuple[Path, str]]  # the file that holds each tensor, and its name there


def _read_weight(holders: Holders, family: str, name: str, parameter: Tensor) -> Tensor:
    """The model's parameter `name` as the folder holds it, mapped where it is one tensor. parameter: on "meta", its shape."""
    views = stored_views(family, name, parameter)
    weight = _read_tensor(holders, next(iter(views)))
    if len(views) > 1:  # stacked experts
        stacked = torch.empty(parameter.shape, dtype=weight.dtype)
        for stored, view in stored_views(family, name, stacked).items():
            view.copy_(_read_tensor(holders, stored))
        return stacked
    return weight.t() if name.endswith(".weight") and is_transposed(family, name.removesuffix(".weight")) else weight


def _read_tensor(holders: Holders, name: str) -> Tensor:
    """One tensor, mapped. The file is opened for each: pages read through a mapping count as memory until it is closed."""
    if name not in holders:
        raise UserError(f"{next(iter(holders.values()))[0].parent}: the weight {name} of the model is missing")
    path, found_as = holders[name]
    with open_safetensors(path) as tensors:
        return tensors.get_tensor(found_as)


def _assemble(
    folder: Path, config: ModelConfig, holders: Holders, read: Callable[[str, Tensor], Tensor | NF4Weight]
) -> Transformer:
    """The model with the weights that `read` returns by name, put in one after another."""
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())
    known = {stored: name for name, one in parameters.items() for stored in stored_views(config.family, name, one)}
    left_over = [name for name in holders if name not in known and not _is_part_of_nf4(name, holders, known)]
    if left_over:
        raise UserError(f"{folder}: {len(left_over)} weights do not belong to the model, {min(left_over)} first")
    stacks: dict[str, dict[str, NF4Weight]] = {}  # of experts, by the path of their MLP
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        weight = read(name, parameter)
        if isinstance(weight, NF4Weight) and parameter.dim() == 3:
            stacks.setdefault(path, {})[leaf] = weight
            continue
        if tuple(weight.shape) != tuple(parameter.shape):
            shapes = f"{tuple(weight.shape)}, but config.json asks for {tuple(parameter.shape)}"
            raise UserError(f"{folder}: {name} has the shape {shapes}")
        if isinstance(weight, NF4Weight):
            parent, _, child = path.rpartition(".")
            bias = parameters.get(f"{path}.bias")  # which is read after its weight
            setattr(model.get_submodule(parent), child, LoraLinear(weight, model.kernels.nf4, bias))
        else:
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight))
    for path, weights in stacks.items():
        parent, _, child = path.rpartition(".")
        mlp = model.get_submodule(path)
        assert isinstance(mlp, MixtureMLP)
        setattr(model.get_submodule(parent), child, NF4Experts(mlp, weights, model.kernels.nf4))
    return model


def _is_block_linear(name: str) -> bool:
    """Whether the model's parameter `name` is the weight of a linear layer in a block."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path.rpartition(".")[2] in BLOCK_LINEARS


def _is_part_of_nf4(stored: str, holders: Holders, known: Mapping[str, str]) -> bool:
    """Whether it lies beside a 4-bit weight of a block: "….q_proj.weight.absmax" and the like."""
    weight, _, part = stored.partition(".weight.")
    return bool(part) and _is_block_linear(known.get(f"{weight}.weight", "")) and f"{weight}.weight.absmax" in holders


# --------------------------------------------------------------------------------------------------------- 4-bit folders


def refuse_experts(config: ModelConfig) -> None:
    """UserError for a model that has no 4-bit folder."""
    if config.num_experts:
        raise UserError(
            "a mixture of experts cannot be saved in 4 bits: no other tool reads its stacked experts; use --load_in_4bit"
        )


def quantised_state(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The frozen model under the names that transformers and bitsandbytes load; adapters are not among it.

    names: of these weights of the plain model only, by its own names, by default of all. ValueError for a model without
    NF4 layers.
    """
    inner = unwrap(model)
    refuse_experts(inner.config)
    if not is_quantised(inner):
        raise ValueError("the model has no 4-bit layers; load it with load_base(quantise='nf4')")
    parameters, dtype = dict(inner.named_parameters()), inner.model.embed_tokens.weight.dtype
    state: dict[str, Tensor] = {}
    for name in plain_shapes(inner) if names is None else names:
        path, _, leaf = name.rpartition(".")
        layer = inner.get_submodule(path)
        if isinstance(layer, LoraLinear) and layer.quantised and leaf == "weight":
            state |= to_bitsandbytes(layer.nf4_weight(), f"{stored_path(inner.config.family, path)}.weight", dtype)
        else:
            state |= stored_views(inner.config.family, name, parameters[name].detach())
    return state


def quantised_config(model: nn.Module) -> dict:
    """config.json of a model with NF4 layers, as transformers reads it."""
    inner = unwrap(model)
    dtype = inner.model.embed_tokens.weight.dtype
    plain = []
    for path, stored in block_linears(inner).items():
        layer = inner.get_submodule(path)
        if not (isinstance(layer, LoraLinear) and layer.quantised):
            plain.append(stored)
    double = any(isinstance(m, LoraLinear) and m.quantised and m.code is not None for m in inner.modules())
    return inner.config.to_hf(dtype) | {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            # None: all linear layers but the head
            "llm_int8_skip_modules": [*plain, "lm_head"] if plain else None,
        }
    }


def save_quantised(
    model: nn.Module, folder: str | Path, files: Mapping[str, bytes], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a new folder that transformers with bitsandbytes loads; `files` are further ones, such as the tokenizer's."""
    sizes = {}
    for name in plain_shapes(model):
        sizes[name] = sum(tensor.nbytes for tensor in quantised_state(model, [name]).values())
    with new_folder(folder) as temporary:
        for file_name, data in {CONFIG: json_bytes(quantised_config(model)), **files}.items():
            write_file(temporary / file_name, [data])
        write_weights(temporary, sizes, lambda names: quantised_state(model, names), max_shard_bytes)


# ----------------------------------------------------------------------------------------------------------- new folders


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder, which has the name `folder` once the block is left without an exception, and is gone otherwise.

    UserError where `folder` exists: nothing is ever overwritten.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder.parent, folder.name)
    temporary.mkdir()
    try:
        yield temporary
        fsync_folder(temporary)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
