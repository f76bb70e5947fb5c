"""How do several ranks share the tokens of a row (context parallelism), so that a row may be longer than one device holds?

Each rank computes its own tokens through all layers. In attention their queries meet the keys and values of the whole row,
which are gathered from all ranks that share it (Llama 3, Grattafiori et al. 2024, §3.3.2): exact, whatever the mask. Behind
the last layer the hidden states are gathered, and the head's product is shared out again, so a loss sees whole rows.

A row is cut into twice as many chunks as there are ranks, and a rank has one from the front and its mirror image from the
back: a causal query late in a row meets more keys than an early one, and so all ranks meet as many.

Gradients: what each rank differentiates is its share of one sum, Σ over ranks of loss / ranks. The gradient of what was
gathered is then summed over the ranks, and of what was summed as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The ranks that share rows: the name of their process group, how many they are, and this one's place among them."""

    group: str
    size: int
    place: int

    def share(self, length: int, device: torch.device) -> "RowShare":
        """This rank's share of rows of `length` tokens."""
        chunk = -(-length // (2 * self.size))
        mine = (self.place, 2 * self.size - 1 - self.place)  # chunks
        within = torch.arange(chunk, device=device)
        places = torch.cat([number * chunk + within for number in mine])
        token = torch.arange(length, device=device)
        number = token // max(1, chunk)
        holder = torch.minimum(number, 2 * self.size - 1 - number)
        order = holder * 2 * chunk + token % max(1, chunk) + chunk * (number >= self.size)
        num_real = sum(min(chunk, max(0, length - number * chunk)) for number in mine)
        return RowShare(self.group, self.size, places.clamp(max=length - 1), num_real, order)

    def sum(self, x: Tensor) -> Tensor:
        """x of all ranks, summed; differentiable."""
        return _sum(x, self.group)


@dataclass(frozen=True)
class RowShare:
    """One rank's share of rows of T tokens.

    places: (n,) int64, which tokens of a row are this rank's; as every rank has as many, a row's last token may stand there
    again, at the end. num_real: how many stand there for the first time. order: (T,) int64, where each token of the row
    stands among the n tokens of each rank, one rank after another.
    """

    group: str
    size: int
    places: Tensor
    num_real: int
    order: Tensor

    def take(self, x: Tensor) -> Tensor:
        """(B, n, …): this rank's tokens of x (B, T, …)."""
        return x[:, self.places]

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, …): all ranks' tokens x (B, n, …), in their order; differentiable."""
        return _gather(x, self.order, self.group, self.size)


# ----------------------------------------------------------------------------------------------------------- operators

collectives = torch.ops._c10d_functional  # torch's own, which know groups by name


@torch.library.custom_op("groundup::gather_tokens", mutates_args=())
def _gather(x: Tensor, order: Tensor, group: str, size: int) -> Tensor:
    """(B, n, …) → (B, T, …). An operator, as a compiled graph cannot know whom it waits for."""
    batch, count, *rest = x.shape
    parts = collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), size, group))  # (size·B, n, …)
    return parts.view(size, batch, count, *rest).transpose(0, 1).reshape(batch, size * count, *rest)[:, order]


@torch.library.custom_op("groundup::gather_tokens_backward", mutates_args=())
def _gather_backward(upstream: Tensor, order: Tensor, group: str, size: int, count: int) -> Tensor:
    """(B, T, …) → (B, n, …), summed over the ranks in fp32 at least."""
    batch, _, *rest = upstream.shape
    dtype = torch.promote_types(upstream.dtype, torch.float32)
    parts = torch.zeros(batch, size * count, *rest, dtype=dtype, device=upstream.device)
    parts[:, order] = upstream.to(dtype)
    parts = parts.view(batch, size, count, *rest).transpose(0, 1).reshape(size * batch, count, *rest)
    mine = collectives.wait_tensor(collectives.reduce_scatter_tensor(parts, "sum", size, group))
    return mine.to(upstream.dtype)


@_gather.register_fake
def _(x, order, group, size):
    return x.new_empty(x.shape[0], len(order), *x.shape[2:])


@_gather_backward.register_fake
def _(upstream, order, group, size, count):
    return upstream.new_empty(upstream.shape[0], count, *upstream.shape[2:])


def _save_gather(ctx, inputs, output):
    x, order, ctx.group, ctx.size = inputs
    ctx.count = x.shape[1]
    ctx.save_for_backward(order)


def _differentiate_gather(ctx, upstream):
    (order,) = ctx.saved_tensors
    return _gather_backward(upstream, order, ctx.group, ctx.size, ctx.count), None, None, None


_gather.register_autograd(_differentiate_gather, setup_context=_save_gather)


@torch.library.custom_op("groundup::sum_over_ranks", mutates_args=())
def _sum(x: Tensor, group: str) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


@_sum.register_fake
def _(x, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_sum(ctx, inputs, output):
    ctx.group = inputs[1]


def _differentiate_sum(ctx, upstream):
    return _sum(upstream, ctx.group), None


_sum.register_autograd(_differentiate_sum, setup_context=_save_sum)
