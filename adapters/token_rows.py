"""How does a model get rows for tokens that it had not, and how do these learn where all else is frozen?

The rows of new tokens begin as the mean of all (Hewitt 2021: https://nlp.stanford.edu/~johnhew/vocab-expansion.html). A run
that trains all weights trains them as any other. Beside adapters they are fp32 parameters of their own, PEFT's
`trainable_token_indices`; after each optimizer step they are copied into the frozen weight, so that whoever computes with
the model takes that weight as it is, and only the gradients know of the parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model import Transformer
from ranks import unwrap

VOCAB_MULTIPLE = 128  # rows of the embedding and head: whole tiles for the matrix units


def padded(vocab_size: int) -> int:
    """The rows of a model that is made for so many ids."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def vocabulary_layers(model: nn.Module) -> dict[str, nn.Embedding | nn.Linear]:
    """The layers with a row for each id, by name: "embed_tokens", and "lm_head" where it is another weight."""
    inner = unwrap(model)
    head = {"lm_head": inner.lm_head} if hasattr(inner, "lm_head") else {}
    return {"embed_tokens": inner.model.embed_tokens, **head}


@torch.no_grad()
def grow_vocabulary(model: Transformer, num_rows: int) -> None:
    """Give embedding and head `num_rows` rows; those that are new are zero, as the padding of a new model's are."""
    for layer in vocabulary_layers(model).values():
        rows = layer.weight.new_zeros(num_rows - len(layer.weight), layer.weight.shape[1])
        layer.weight = nn.Parameter(torch.cat([layer.weight, rows]), requires_grad=layer.weight.requires_grad)
    model.config.vocab_size = num_rows


@torch.no_grad()
def start_rows(model: Transformer, first: int, count: int) -> None:
    """Let the rows of `count` ids from `first` on begin as the mean of those before `first`."""
    for layer in vocabulary_layers(model).values():
        layer.weight[first : first + count] = layer.weight[:first].float().mean(0).to(layer.weight.dtype)


@torch.no_grad()
def write_rows(model: Transformer, layer: str, ids: Tensor, rows: Tensor) -> None:
    """Put rows (n, H) in the place of those of `ids` (n,) in "embed_tokens" or "lm_head", which grow if need be."""
    if (last := int(ids.max())) >= model.config.vocab_size:
        grow_vocabulary(model, padded(last + 1))
    weight = vocabulary_layers(model)[layer].weight
    weight[ids.to(weight.device)] = rows.to(weight.device, weight.dtype)


# ------------------------------------------------------------------------------------------- rows of a frozen model learn


class TokenRows(nn.Module):
    """The rows (n, H) fp32 of some ids of a layer, under PEFT's names: LAYER.token_adapter.trainable_tokens_delta."""

    ids: Tensor

    def __init__(self, layer: nn.Embedding | nn.Linear, ids: Tensor):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)  # (n,) int64, ascending
        self.trainable_tokens_delta = nn.Parameter(layer.weight.detach()[ids].float())


def learn_rows(model: Transformer, ids: Sequence[int]) -> None:
    """Let these rows of embedding and head learn, whose weights are frozen. The model computes what it did."""
    for layer in vocabulary_layers(model).values():
        layer.token_adapter = TokenRows(layer, torch.tensor(sorted(ids), device=layer.weight.device))
    model.model.embed_tokens.register_forward_hook(_embedded)
    model.head_gradient = _head_gradient


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """The rows that learn, by the name of their layer; empty for a model in which none do."""
    layers = vocabulary_layers(model)
    return {name: rows for name, layer in layers.items() if (rows := getattr(layer, "token_adapter", None)) is not None}


@torch.no_grad()
def store_rows(model: nn.Module) -> None:
    """Copy what the rows learned into the weights that they are rows of."""
    for layer in model.modules():
        if isinstance(rows := getattr(layer, "token_adapter", None), TokenRows):
            weight = layer.get_parameter("weight")
            weight[rows.ids] = rows.trainable_tokens_delta.to(weight.dtype)


def _embedded(layer: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return output
    rows = layer.token_adapter
    return _RowsOfEmbedding.apply(output, arguments[0], rows.trainable_tokens_delta, rows.ids)


def _head_gradient(layer: Any) -> Tensor:
    rows = layer.token_adapter
    return _RowsOfHead.apply(layer.weight, rows.trainable_tokens_delta, rows.ids)


class _RowsOfEmbedding(torch.autograd.Function):
    """The output as it is; its gradient (B, T, H) goes to the rows of the ids that were looked up."""

    @staticmethod
    def forward(ctx, output: Tensor, input_ids: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids, ids)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        input_ids, ids = ctx.saved_tensors
        looked_up = (input_ids.flatten()[None] == ids[:, None]).float()  # (n, N): a product sums in a fixed order
        return None, None, looked_up @ gradient.flatten(0, -2).float(), None


class _RowsOfHead(torch.autograd.Function):
    """The weight (V, H) as it is; of its gradient the rows are kept."""

    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (ids,) = ctx.saved_tensors
        return None, gradient[ids].float(), None
