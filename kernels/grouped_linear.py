"""How does each group of rows meet a weight of its own, y = x[group] · weight[group]ᵀ, as tokens do their experts?

    grouped_mm    torch's kernel, one launch for all groups. It is there for bf16 on Hopper and on B200
    loop          one product a group. It runs everywhere; the host has to know where the groups end

Off that hardware and that dtype torch's grouped_mm is a loop as well, without fp64 and with a wait for the device in each
call. On a CPU the two take the same time and give the same bits.

Weights in 4 bits are decoded for one product and dropped, as in kernels/nf4_linear.py: the backward decodes them again.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.nf4 import NF4Weight, dequantise_nf4

ALIGNED = 8  # elements of bf16 in the 16 bytes at which grouped_mm wants every row to begin


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, *, implementation: str = "loop") -> Tensor:
    """Row i of the result is x[i] · weight[g]ᵀ where ends[g - 1] <= i < ends[g]; x (N, K), weight (G, M, K), returns (N, M).

    ends (G,) int32: where each group of rows ends, never falling, N at last; a group may be empty. For "loop" it is best
    on the CPU: on a device each product, and each gradient, waits for it. implementation: "loop" or "grouped_mm"
    (`grouped_implementation`). The result is in x's dtype, or in autocast's; gradients in the inputs' own. The gradient
    of an empty group's weight is zero. ValueError where shapes or dtypes do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = product_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and ends {tuple(ends.shape)}"
        raise ValueError(f"grouped_linear: {shapes} do not fit; they are (N, K), (G, M, K) and (G,)")
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_linear: x is {x.dtype} and weight {weight.dtype}; they must be the same")
    return _grouped_linear(x, weight, ends, implementation)


def grouped_nf4_linear(
    x: Tensor, weight: NF4Weight, ends: Tensor, *, implementation: str = "loop", decode: str = "torch"
) -> Tensor:
    """`grouped_linear` with a frozen weight (G·M, K), the groups' rows below one another; the gradient goes to x alone.

    decode: the implementation of `dequantise_nf4`.
    """
    x = x.to(product_dtype(x))
    return _grouped_nf4_linear(x, *weight.tensors, weight.sizes, ends, implementation, decode, False)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype x is multiplied: autocast's where it is on, which leaves fp64 alone, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def grouped_implementation(device: torch.device, dtype: torch.dtype, *widths: int) -> str:
    """The one that is fast for products in `dtype` with weights of these sides."""
    fits = device.type == "cuda" and dtype == torch.bfloat16 and not any(width % ALIGNED for width in widths)
    if not fits or torch.version.hip is not None:
        return "loop"
    return "grouped_mm" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "loop"


# what torch.compiler.assume_constant_result sets; calling it would import the compiler, a second at every start
grouped_implementation._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(group, its rows) of those that have some."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


# ------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("groundup::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, implementation: str) -> Tensor:
    x = x.contiguous()
    if implementation == "grouped_mm" and len(x):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    y = x.new_empty(len(x), weight.shape[1])
    for group, rows in _groups(ends):
        torch.mm(x[rows], weight[group].t(), out=y[rows])
    return y


@torch.library.custom_op("groundup::grouped_linear_weight_gradient", mutates_args=())
def _weight_gradient(dy: Tensor, x: Tensor, ends: Tensor, implementation: str) -> Tensor:
    """(G, M, K): dy[group]ᵀ · x[group]."""
    dy, x = dy.contiguous(), x.contiguous()
    if implementation == "grouped_mm" and len(x):
        dweight = F.grouped_mm(dy.t(), x, offs=ends)
        # on B200 an empty group's part is left as the memory was (pytorch issue 172439)
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return dweight.masked_fill_(empty[:, None, None], 0.0)
    dweight = x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    for group, rows in _groups(ends):
        torch.mm(dy[rows].t(), x[rows], out=dweight[group])
    return dweight


@_grouped_linear.register_fake
def _(x, weight, ends, implementation):
    return x.new_empty(x.shape[0], weight.shape[1])


@_weight_gradient.register_fake
def _(dy, x, ends, implementation):
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    x, weight, ends, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, ends)


def _differentiate(ctx, dy):
    x, weight, ends = ctx.saved_tensors
    learns_x, learns_weight, *_ = ctx.needs_input_grad
    dx = _grouped_linear(dy, weight.transpose(1, 2), ends, ctx.implementation) if learns_x else None
    dweight = _weight_gradient(dy, x, ends, ctx.implementation) if learns_weight else None
    return dx, dweight, None, None


_grouped_linear.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("groundup::grouped_nf4_linear", mutates_args=())
def _grouped_nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
    sizes: list[int], ends: Tensor, implementation: str, decode: str, transposed: bool,
) -> Tensor:  # fmt: skip
    """transposed: x[i] · weight[g] instead of x[i] · weight[g]ᵀ, which is the gradient of the input."""
    weight = NF4Weight.of(packed, absmax, code, absmax2, offset, sizes)
    stack = dequantise_nf4(weight, x.dtype, implementation=decode).unflatten(0, (len(ends), -1))
    return _grouped_linear(x, stack.transpose(1, 2) if transposed else stack, ends, implementation)


@_grouped_nf4_linear.register_fake
def _(x, packed, absmax, code, absmax2, offset, sizes, ends, implementation, decode, transposed):
    return x.new_empty(x.shape[0], sizes[1] if transposed else sizes[0] // ends.shape[0])


def _save_nf4(ctx, inputs, output):
    _, *weight, ctx.sizes, ends, ctx.implementation, ctx.decode, ctx.transposed = inputs
    ctx.save_for_backward(*weight, ends)


def _differentiate_nf4(ctx, dy):
    *weight, ends = ctx.saved_tensors
    settings = ctx.implementation, ctx.decode, not ctx.transposed
    return _grouped_nf4_linear(dy, *weight, ctx.sizes, ends, *settings), *[None] * 10


_grouped_nf4_linear.register_autograd(_differentiate_nf4, setup_context=_save_nf4)
