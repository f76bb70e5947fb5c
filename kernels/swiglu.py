"""How does an MLP's gate open, h = silu(gate) · up (Shazeer 2020), in one pass over memory?

Keeps gate and up alone: the backward makes the activation again on its way to both gradients. gate and up may be the
halves of one stacked projection, which are read, and their gradients written, where they lie.

When Triton is chosen: without torch.compile on a GPU. The compiler fuses the reference as well (docs/kernels.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import check_dtypes, jit, next_power_of_2, num_warps, tl

TILE = 2048  # elements a program makes: two 16-byte loads a thread from each tensor in half precision


def swiglu(gate: Tensor, up: Tensor | None = None, *, implementation: str = "torch") -> Tensor:
    """silu(gate) · up, of gate and up (..., F); with up=None gate is (..., 2F) and holds gate, then up.

    silu is computed in fp32 and rounded to gate's dtype before the product, as in Hugging Face's models. The result is
    contiguous, in the dtype torch gives the product. implementation: "triton" or "torch". ValueError where shapes
    differ, or a packed last dimension is odd.
    """
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"swiglu: a packed gate and up have an even last dimension, not {gate.shape[-1]}")
    if up is not None and gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape")
    if implementation == "triton":
        return _swiglu(gate, up)
    return swiglu_reference(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`swiglu` in plain PyTorch: what the kernel is tested against and what torch.compile fuses."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


# -------------------------------------------------------------------------------------------------------------- kernels


@jit
def _place(rows, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(row, column, inside) of this program's tile, columns first so that neighbours read neighbouring memory."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < width)


@jit
def _forward_kernel(GATE, UP, Y, rows, width, gate_stride, up_stride, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, column, inside = _place(rows, width, BLOCK, ROWS)
    gate = tl.load(GATE + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(GATE.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * width + column, (silu * up).to(Y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    DY, GATE, UP, DGATE, DUP, rows, width, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(rows, width, BLOCK, ROWS)
    gate = tl.load(GATE + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(DGATE + row * dgate_stride + column, dgate.to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * dup_stride + column, dup.to(DUP.dtype.element_ty), mask=inside)


def _launch(kernel, rows: int, width: int, *arguments) -> None:
    block = min(next_power_of_2(width), TILE)
    tile = TILE // block  # rows: narrow ones share a program
    if rows and width:
        programs = -(-rows // tile) * -(-width // block)
        kernel[(programs,)](*arguments, BLOCK=block, ROWS=tile, num_warps=num_warps(TILE))


def _rows(x: Tensor) -> Tensor:
    """x as (rows, width) with a last stride of 1; a copy only where no such view exists."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gate, up) as rows; of a packed tensor, as views of it."""
    if up is None:
        gate, up = _rows(gate).chunk(2, dim=1)
        return gate, up
    return _rows(gate), _rows(up)


def launch_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    check_dtypes("swiglu", *(x for x in (gate, up) if x is not None))
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
    y = torch.empty(shape, dtype=dtype, device=gate.device)
    gate, up = _halves(gate, up)
    _launch(_forward_kernel, *gate.shape, gate, up, y, *gate.shape, gate.stride(0), up.stride(0))
    return y


def launch_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    """[dgate, dup], or one packed gradient."""
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up) if x is not None]
    dgate, dup = _halves(*out, *([None] if up is None else []))
    dy, (gate, up) = _rows(dy), _halves(gate, up)
    strides = [x.stride(0) for x in (dy, gate, up, dgate, dup)]
    _launch(_backward_kernel, *gate.shape, dy, gate, up, dgate, dup, *gate.shape, *strides)
    return out


# ------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("groundup::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    return launch_forward(gate, up)


@torch.library.custom_op("groundup::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    return launch_backward(dy, gate, up)


@_swiglu.register_fake
def _(gate, up):
    if up is None:
        return torch.empty((*gate.shape[:-1], gate.shape[-1] // 2), dtype=gate.dtype, device=gate.device)
    return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


@_swiglu_backward.register_fake
def _(dy, gate, up):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up) if x is not None]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    dgate, *dup = _swiglu_backward(dy, *ctx.saved_tensors)
    return dgate, dup[0] if dup else None


_swiglu.register_autograd(_differentiate, setup_context=_save)


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py)."""

    def case(dtype: torch.dtype, width: int) -> None:
        with torch.device("meta"):
            packed, dy = torch.empty(4096, 2 * width, dtype=dtype), torch.empty(4096, width, dtype=dtype)
            launch_forward(packed, None)
            launch_backward(dy, packed, None)

    shapes = [(768, torch.bfloat16), (14336, torch.bfloat16), (14336, torch.float32)]
    return [
        (f"{width} {dtype}".replace("torch.", ""), "memory", lambda w=width, d=dtype: case(d, w))
        for width, dtype in shapes
    ]
