"""How is a row scaled to unit root mean square, together with the addition that always comes before it?

    s = x + update                        (add_rms_norm only; stored in its dtype, and the norm reads what was stored)
    y = s / sqrt(mean(s²) + eps) · weight (Zhang & Sennrich 2019)

A block's output is added to the residual stream and the sum normed at once: one pass over memory instead of three. The
backward makes dx and the weight's gradient in one pass too; each program keeps its share of the latter in registers.

When Triton is chosen: without torch.compile on a GPU. The compiler fuses the reference as well (docs/kernels.md).
"""

import torch
from torch import Tensor

from kernels.jit import check_dtypes, jit, multiprocessors, next_power_of_2, num_warps, tl

MAX_WIDTH = 32768  # a row is held in registers whole; wider ones take the reference
PROGRAMS_PER_MULTIPROCESSOR = 2  # of the backward: more hide latency, and each writes one more row of partial sums


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    gemma: bool = False,
    out_dtype: torch.dtype | None = None,
    implementation: str = "torch",
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, fp32 inside.

    x (..., D), weight (D,); returns x's shape in out_dtype (default: x's dtype). Rounding follows Hugging Face's Llama:
    the normed row is rounded to x's dtype before the weight. With gemma=True nothing is rounded until the end and the
    weight counts from one: · (1 + weight). implementation: "triton" or "torch".
    """
    if implementation == "triton" and x.shape[-1] <= MAX_WIDTH:
        return _rms_norm(x, weight, eps, gemma, out_dtype or x.dtype)[0]
    return rms_norm_reference(x, weight, eps, gemma=gemma, out_dtype=out_dtype)


def add_rms_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    *,
    gemma: bool = False,
    out_dtype: torch.dtype | None = None,
    implementation: str = "torch",
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + update, in the dtype that torch gives that sum. Otherwise as `rms_norm`."""
    if implementation == "triton" and x.shape[-1] <= MAX_WIDTH:
        out_dtype = out_dtype or torch.promote_types(x.dtype, update.dtype)
        return _add_rms_norm(x, update, weight, eps, gemma, out_dtype)[:2]
    s = x + update
    return rms_norm_reference(s, weight, eps, gemma=gemma, out_dtype=out_dtype), s


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, gemma: bool = False, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`rms_norm` in plain PyTorch: what the kernel is tested against and what torch.compile fuses."""
    stats = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(stats)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if gemma:
        y = normed * (1 + weight.to(stats))
    else:
        y = normed.to(x.dtype).to(stats) * weight.to(stats)
    return y.to(out_dtype or x.dtype)


# -------------------------------------------------------------------------------------------------------------- kernels


@jit
def _forward_kernel(
    X, UPDATE, WEIGHT, S, Y, RSTD, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows, each whole in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        s = (x + tl.load(UPDATE + at, mask=inside, other=0.0).to(tl.float32)).to(S.dtype.element_ty)
        tl.store(S + at, s, mask=inside)
        x = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = x * rstd[:, None]
    if GEMMA:
        y = normed * (1 + weight)[None, :]
    else:
        y = normed.to(S.dtype.element_ty).to(tl.float32) * weight[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    DY, DS, S, WEIGHT, RSTD, DX, DW, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_DS: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th tile of rows: dx of each, and the sum of their shares of dW in one row of DW (programs, D)."""
    column = tl.arange(0, BLOCK)
    dw = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        s = tl.load(S + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        normed = s * rstd[:, None]
        if GEMMA:
            dw += tl.sum(dy * normed, 0)
        else:
            dw += tl.sum(dy * normed.to(S.dtype.element_ty).to(tl.float32), 0)
        weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(
            tl.float32
        )  # again, to keep registers free
        g = dy * (1 + weight if GEMMA else weight)[None, :]
        dx = rstd[:, None] * (g - normed * (tl.sum(g * normed, 1) / WIDTH)[:, None])
        if HAS_DS:
            dx += tl.load(DS + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DW + tl.program_id(0).to(tl.int64) * WIDTH + column, dw, mask=column < WIDTH)


def _tile(width: int) -> tuple[int, int]:
    """(BLOCK, ROWS): narrow rows, the heads of a QK-norm, share a program."""
    block = next_power_of_2(width)
    return block, max(1, 1024 // block)


def launch_forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, gemma: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, rstd) of contiguous x; s is x itself without an update."""
    check_dtypes("rms_norm", x, weight, *([] if update is None else [update]))
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    s = x if update is None else torch.empty(x.shape, dtype=torch.result_type(x, update), device=x.device)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, tile = _tile(width)
    if rows:
        _forward_kernel[(-(-rows // tile),)](
            x, update, weight, s, y, rstd, rows, eps,
            WIDTH=width, BLOCK=block, ROWS=tile, ADD=update is not None, GEMMA=gemma, num_warps=num_warps(block * tile),
        )  # fmt: skip
    return y, s, rstd


def launch_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, gemma: bool
) -> tuple[Tensor, Tensor]:
    """(dx in s's dtype, dW in the weight's) from contiguous tensors."""
    width, rows = s.shape[-1], s.numel() // s.shape[-1]
    block, tile = _tile(width)
    programs = max(1, min(-(-rows // tile), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(s.device)))
    dx = torch.empty_like(s)
    dw = torch.empty(programs, width, dtype=torch.float32, device=s.device)
    _backward_kernel[(programs,)](
        dy, ds, s, weight, rstd, dx, dw, rows,
        WIDTH=width, BLOCK=block, ROWS=tile, HAS_DS=ds is not None, GEMMA=gemma, num_warps=num_warps(block * tile),
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype)  # in a fixed order, without atomics: the same bits each time


# ------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("groundup::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, _, rstd = launch_forward(x.contiguous(), None, weight.contiguous(), eps, gemma, out_dtype)
    return y, rstd


@torch.library.custom_op("groundup::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, gemma: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x.contiguous(), update.contiguous(), weight.contiguous(), eps, gemma, out_dtype)


@torch.library.custom_op("groundup::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, gemma: bool
) -> tuple[Tensor, Tensor]:
    ds = None if ds is None else ds.contiguous()
    return launch_backward(dy.contiguous(), ds, s.contiguous(), weight.contiguous(), rstd, gemma)


@_rms_norm.register_fake
def _(x, weight, eps, gemma, out_dtype):
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), rstd


@_add_rms_norm.register_fake
def _(x, update, weight, eps, gemma, out_dtype):
    s = torch.empty(x.shape, dtype=torch.result_type(x, update), device=x.device)
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), s, rstd


@_rms_norm_backward.register_fake
def _(dy, ds, s, weight, rstd, gemma):
    return torch.empty(s.shape, dtype=s.dtype, device=s.device), torch.empty_like(weight)


def _save_rms_norm(ctx, inputs, output):
    x, weight, _, ctx.gemma, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _differentiate_rms_norm(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dw = _rms_norm_backward(dy, None, x, weight, rstd, ctx.gemma)
    return dx, dw, None, None, None


def _save_add_rms_norm(ctx, inputs, output):
    x, update, weight, _, ctx.gemma, _ = inputs
    ctx.dtypes = x.dtype, update.dtype
    ctx.save_for_backward(output[1], weight, output[2])


def _differentiate_add_rms_norm(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    dx, dw = _rms_norm_backward(dy, ds, s, weight, rstd, ctx.gemma)
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw, None, None, None


_rms_norm.register_autograd(_differentiate_rms_norm, setup_context=_save_rms_norm)
_add_rms_norm.register_autograd(_differentiate_add_rms_norm, setup_context=_save_add_rms_norm)


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py): the widths of 124M to 8B models."""

    def launch(dtype: torch.dtype, width: int, residual: torch.dtype) -> None:
        with torch.device("meta"):
            x, update = torch.empty(4096, width, dtype=residual), torch.empty(4096, width, dtype=dtype)
            weight = torch.empty(width, dtype=residual)
            y, s, rstd = launch_forward(x, update, weight, 1e-6, False, dtype)
            launch_backward(y, s, s, weight, rstd, False)

    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [(128, bf16), (768, bf16), (768, fp32), (4096, bf16), (4096, fp32), (8192, bf16), (16384, bf16)]
    return [
        (f"{width} {residual}".replace("torch.", ""), "memory", lambda w=width, r=residual: launch(bf16, w, r))
        for width, residual in shapes
    ]
