"""How do several ranks share the matrices of a block and the vocabulary (tensor parallelism, Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053)?

Each rank has some heads of attention and some channels of the MLP: of the matrices that make them some rows (columns of the
product), of those that read them the columns. It computes with these alone, and the products are summed over the ranks,
once for attention and once for the MLP. Of the embedding and the head it has some tokens. What is as wide as the residual
stream, such as norms, each has whole.

A parameter of which ranks have parts is a DTensor (Shard); one that all have, but use for their own heads alone, is a DTensor
as well (Replicate), and its gradient is summed. All others are plain, and their gradients agree on all ranks by themselves.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from context import collectives
from sharding import is_part


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share matrices: the name of their process group, how many they are, and this one's place among them."""

    group: str
    size: int
    place: int

    def entering(self, x: Tensor) -> Tensor:
        """x, which is the same on all ranks and of which each computes something else: the gradient is summed."""
        return _Entering.apply(x, self.group)

    def leaving(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, with which each goes on alike: the gradient is that of each."""
        return _Leaving.apply(x, self.group)

    def first(self, count: int) -> int:
        """Where this rank's part of `count` rows begins, as DTensor cuts them."""
        return min(count, -(-count // self.size) * self.place)


def own(parameter: Any) -> Any:
    """What this rank computes with of a parameter: of a shared one its part, of any other, None too, all."""
    if parameter is None or not is_part(parameter):
        return parameter
    local = parameter.to_local()
    if parameter.placements[0].is_replicate():
        return _Entering.apply(local, parameter.device_mesh.get_group().group_name)
    return local


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _summed(x: Tensor, group: str) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))
