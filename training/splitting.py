"""Which parameters of a model do ranks share under --tensor_parallel, and along which dimension? (tensor_parallel.py)

    q, k, v; gate, up      the rows: some heads, some channels            with adapters: B's rows; A whole, for these heads
    o; down                the columns, which read these                  with adapters: A's columns; B whole, for these
    embedding, head        the rows: some tokens of the vocabulary
    norms of single heads  whole, for some heads

All else is whole on every rank.
"""

from typing import Any

import torch
from torch import nn

from adapters.lora import LoraLinear
from errors import UserError
from layers import Attention, Block, Linear
from model import Transformer
from model_config import ModelConfig
from tensor_parallel import TensorGroup

_MAKE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # make what is shared out
_READ = ("o_proj", "down_proj")


def check_splits(model: ModelConfig, size: int) -> None:
    """UserError for a model whose parts `size` ranks cannot share."""
    flag = f"--tensor_parallel {size}"
    if model.num_experts:
        raise UserError(f"{flag} is not for mixtures of experts: use --strategy fsdp, which shares them out")
    if model.fused_qkv or model.fused_gate_up:
        raise UserError(f"{flag} is not for a {model.family}, which has several matrices in one: use --strategy fsdp")
    if model.qk_norm and not model.qk_norm_per_head:
        raise UserError(f"{flag} is not for a {model.family}, which norms the queries of all heads together")
    for words, count in (("attention", model.num_attention_heads), ("key/value", model.num_key_value_heads)):
        if count % size:
            raise UserError(f"{flag} does not divide the model's {count} {words} heads: give a number that does")


def split_matrices(model: nn.Module, mesh: Any) -> None:
    """Leave each rank of `mesh` its part of the matrices, in place. The model may be on the meta device."""
    group = TensorGroup(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    for module in list(model.modules()):
        if isinstance(module, Transformer):
            _split_vocabulary(module, group, mesh)
        if isinstance(module, Block):
            module.self_attn.group = module.mlp.group = group
            for part in (module.self_attn, module.mlp):
                for name in (*_MAKE, *_READ):
                    if hasattr(part, name):
                        _split_layer(getattr(part, name), name in _READ, group, mesh)
            _share_norms(module.self_attn, group, mesh)


def _split_layer(layer: Linear | LoraLinear, reads: bool, group: TensorGroup, mesh: Any) -> None:
    layer.group, layer.sums = group, reads
    _share(layer, "weight", mesh, 1 if reads else 0)
    if not reads:
        _share(layer, "bias", mesh, 0)
    if isinstance(layer, LoraLinear):
        for name in layer.lora_A:
            _share(layer.lora_A, name, mesh, 1 if reads else None)
            _share(layer.lora_B, name, mesh, None if reads else 0)


def _share_norms(attention: Attention, group: TensorGroup, mesh: Any) -> None:
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.group = group
            _share(norm, "weight", mesh, None)


def _split_vocabulary(model: Transformer, group: TensorGroup, mesh: Any) -> None:
    model.group = group
    embedding = model.model.embed_tokens
    embedding.group = group
    _share(embedding, "weight", mesh, 0)
    if hasattr(model, "lm_head"):
        _share(model.lm_head, "weight", mesh, 0)
    if model.config.head_bias:
        _share(model.head, "bias", mesh, 0)


@torch.no_grad()
def _share(module: nn.Module, name: str, mesh: Any, dim: int | None) -> None:
    """The parameter, of which each rank keeps its part along `dim`, or with None all of it. One that is not there stays so."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    parameter = module._parameters.get(name)
    if parameter is None:
        return
    local, placement = parameter.data, Replicate() if dim is None else Shard(dim)
    if dim is not None:
        count = -(-parameter.shape[dim] // mesh.size())
        first = min(parameter.shape[dim], count * mesh.get_local_rank())
        local = local.narrow(dim, first, min(count, parameter.shape[dim] - first)).clone()  # so that the rest is let go
    shared = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    module._parameters[name] = nn.Parameter(shared, requires_grad=parameter.requires_grad)
