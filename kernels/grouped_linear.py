"""How do rows that belong to different weights meet them in one product? Rows come sorted by group: experts' tokens.

torch's own grouped product (CUTLASS on a GPU from compute capability 8.0, one product a group elsewhere) is taken where it
has the dtype and the alignment, and one product a group in the rest. There is no kernel of ours: the operator is only there
because torch.compile knows torch's in bf16 alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 16  # bytes of which a row's length must be a multiple


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """(N, M): the first counts[0] rows of x (N, K) times weight[0]ᵀ, the next counts[1] times weight[1]ᵀ, and so on.

    weight (E, M, K) in x's dtype; counts (E,) int64, whose sum is N. Differentiable in x and weight.
    """
    return _grouped_linear(x, weight, counts)


def _has_kernel(*tensors: Tensor) -> bool:
    if tensors[0].dtype == torch.float64:
        return False
    return all((x.shape[-1] * x.element_size()) % _ALIGNED == 0 for x in tensors)


@torch.library.custom_op("groundup::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if _has_kernel(x, weight, weight[0, :, :1].t()):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    groups = zip(x.split(counts.tolist()), weight, strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in groups])


@torch.library.custom_op("groundup::grouped_linear_weight_gradient", mutates_args=())
def _weight_gradient(upstream: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """(E, M, K): of each group's rows upsᵀ x, for upstream (N, M) and x (N, K)."""
    if _has_kernel(upstream, x):
        return F.grouped_mm(upstream.t(), x, offs=counts.cumsum(0).to(torch.int32))
    sizes = counts.tolist()
    return torch.stack([a.t() @ b for a, b in zip(upstream.split(sizes), x.split(sizes), strict=True)])


@_grouped_linear.register_fake
def _(x, weight, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@_weight_gradient.register_fake
def _(upstream, x, counts):
    return x.new_empty(counts.shape[0], upstream.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, upstream):
    x, weight, counts = ctx.saved_tensors
    upstream = upstream.contiguous()
    dx = _grouped_linear(upstream, weight.transpose(-2, -1).contiguous(), counts) if ctx.needs_input_grad[0] else None
    dw = _weight_gradient(upstream, x, counts) if ctx.needs_input_grad[1] else None
    return dx, dw, None


_grouped_linear.register_autograd(_backward, setup_context=_save)
