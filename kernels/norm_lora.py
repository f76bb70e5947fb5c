"""How are a norm and the adapters of the linear layer behind it made in one pass over the residual stream?

    s = x + update                                (where there is one)
    n = s / sqrt(mean(s²) + eps) · norm_weight    (rms_norm.py)
    y = n Wᵀ + Σ scale · n Aᵀ Bᵀ                  (lora_linear.py)

One kernel writes [n | scale · n Aᵀ], for the adapters of q, k and v together, or of gate and up, and one product with
[W | B] follows. Beside the norm and the frozen layer's product, which are there anyway, the adapters then read nothing
that is not in a cache and add R to K.

When Triton is chosen: on a GPU where bench/lora_paths.py measured "augmented" as the fastest path, with torch.compile
or without: the compiler cannot put a product into a norm.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.jit import check_dtypes, jit, multiprocessors, next_power_of_2, tl
from kernels.lora_linear import (
    Adapter,
    augment_backward,
    augmented_product,
    check_adapters,
    lora_linear,
    padded_rank,
    stacked_a,
)
from kernels.rms_norm import add_rms_norm, rms_norm

MAX_RANK = {2: 256, 4: 32}  # by bytes of an element: all ranks of a wider stack do not fit a tile
STRIP = 256  # columns that the first sweep reads at once: many loads in flight, since no product hides their latency


def norm_lora_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    augmented: Tensor,
    adapters: list[Adapter],
    *,
    update: Tensor | None = None,
    gemma: bool = False,
    dropout: float = 0.0,
    implementation: str = "torch",
) -> tuple[Tensor, Tensor]:
    """(lora_linear(rms_norm(s)), s) with s = x + update, or x.

    x and update (..., K), norm_weight (K,), augmented (N, K + R) of `augmented_weight`; returns y (..., N) in its dtype
    and s. eps and gemma as in rms_norm.py. Gradients go to x, update, norm_weight and the adapters. implementation:
    "triton" or "torch". ValueError for dropout: its masks belong between the norm and A, which are one here.
    """
    if dropout:
        raise ValueError("norm_lora_linear has no dropout; take rms_norm and then lora_linear")
    weight = augmented[:, : x.shape[-1]]
    check_adapters(weight, adapters)
    rank = padded_rank(x.shape[-1], adapters, augmented.element_size())
    if implementation == "torch" or rank > MAX_RANK.get(augmented.element_size(), 0):
        settings: dict[str, Any] = {"gemma": gemma, "out_dtype": augmented.dtype, "implementation": implementation}
        if update is None:
            normed, s = rms_norm(x, norm_weight, eps, **settings), x
        else:
            normed, s = add_rms_norm(x, update, norm_weight, eps, **settings)
        path = "torch" if implementation == "torch" else "augmented"
        return lora_linear(normed, weight, adapters, path=path, augmented=augmented), s
    a = stacked_a(adapters, augmented.dtype, rank)
    x_aug, _, s = _norm_augment(x, update, norm_weight, a, eps, gemma)
    y = augmented_product(x_aug, augmented, adapters).view(*x.shape[:-1], len(weight))
    return y, x if update is None else s


@jit
def _norm_augment_kernel(
    X, UPDATE, WEIGHT, A, S, OUT, RSTD, rows, eps,
    WIDTH: tl.constexpr, PITCH: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr, ADD: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of OUT: first their sums of squares, then once more over K, the norm and its product with A."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k, rank = tl.arange(0, BLOCK_K), tl.arange(0, RANK)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, STRIP):
        column = start + tl.arange(0, STRIP)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        s = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            s = (s + tl.load(UPDATE + at, mask=inside, other=0.0).to(tl.float32)).to(S.dtype.element_ty)
            tl.store(S + at, s, mask=inside)
            s = s.to(tl.float32)
        squares += tl.sum(s * s, 1)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    if ADD:
        tl.debug_barrier()  # S is read by other threads than those that wrote it
    low = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        column = start + k
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        s = tl.load((S if ADD else X) + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        normed = s.to(tl.float32) * rstd[:, None]
        if GEMMA:
            normed = normed * (1 + weight)[None, :]
        else:
            normed = normed.to(S.dtype.element_ty).to(tl.float32) * weight[None, :]
        normed = normed.to(OUT.dtype.element_ty)
        tl.store(OUT + row[:, None] * PITCH + column[None, :], normed, mask=inside)
        in_a = (rank < PITCH - WIDTH)[:, None] & (column < WIDTH)[None, :]
        a = tl.load(A + rank[:, None] * WIDTH + column[None, :], mask=in_a, other=0.0)
        low = tl.dot(normed, tl.trans(a), low, input_precision="ieee")
    in_low = (row < rows)[:, None] & (rank < PITCH - WIDTH)[None, :]
    tl.store(OUT + row[:, None] * PITCH + WIDTH + rank[None, :], low.to(OUT.dtype.element_ty), mask=in_low)


def launch_norm_augment(
    x: Tensor, update: Tensor | None, weight: Tensor, a: Tensor, eps: float, gemma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """([n | n aᵀ] (M, K + R) in a's dtype, rstd (M,), s) of contiguous tensors; s is x itself without an update."""
    check_dtypes("norm_lora_linear", x, weight, a, *([] if update is None else [update]))
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    s = x if update is None else torch.empty(x.shape, dtype=torch.result_type(x, update), device=x.device)
    x_aug = a.new_empty(rows, width + len(a))
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    rank, size = max(16, next_power_of_2(len(a))), a.element_size()
    # 64 rows fill a tensor core and read A seldom, where there are enough of them to give each multiprocessor a tile
    block_m = 64 if size == 2 and rows >= 32 * multiprocessors(x.device) else 16
    block_k = 32 if size == 4 else 128 if rank <= 64 else 64
    if rows:
        _norm_augment_kernel[(-(-rows // block_m),)](
            x, update, weight, a, s, x_aug, rstd, rows, eps,
            WIDTH=width, PITCH=width + len(a), RANK=rank, BLOCK_M=block_m, BLOCK_K=block_k, STRIP=STRIP,
            ADD=update is not None, GEMMA=gemma, num_warps=8 if block_m == 64 else 4, num_stages=3,
        )  # fmt: skip
    return x_aug, rstd, s


@torch.library.custom_op("groundup::norm_augment", mutates_args=())
def _norm_augment(
    x: Tensor, update: Tensor | None, weight: Tensor, a: Tensor, eps: float, gemma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_aug, rstd, s); s is empty without an update, since an operator may not return what it was given."""
    update = None if update is None else update.contiguous()
    x_aug, rstd, s = launch_norm_augment(x.contiguous(), update, weight.contiguous(), a.contiguous(), eps, gemma)
    return x_aug, rstd, x.new_empty(0) if update is None else s


@_norm_augment.register_fake
def _(x, update, weight, a, eps, gemma):
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    rstd = x.new_empty(rows, dtype=torch.float32)
    if update is None:
        s = x.new_empty(0)
    else:
        s = torch.empty(x.shape, dtype=torch.result_type(x, update), device=x.device)
    return a.new_empty(rows, width + len(a)), rstd, s


def _save_norm_augment(ctx, inputs, output):
    x, update, weight, a, _, ctx.gemma = inputs
    x_aug, rstd, s = output
    ctx.dtypes = x.dtype, None if update is None else update.dtype
    ctx.save_for_backward(x_aug, rstd, x if update is None else s, weight, a)


def _differentiate_norm_augment(ctx, d_aug, _, ds):
    x_aug, rstd, s, weight, a = ctx.saved_tensors
    d_normed, d_a = augment_backward(d_aug, x_aug, a)
    added = ctx.dtypes[1] is not None
    dx, dw = torch.ops.groundup.rms_norm_backward(
        d_normed.view(s.shape), ds if added else None, s, weight, rstd, ctx.gemma
    )
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]) if added else None, dw, d_a, None, None


_norm_augment.register_autograd(_differentiate_norm_augment, setup_context=_save_norm_augment)


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py): q, k, v of rank 16, and of rank 64."""

    def launch(rows: int, rank: int, residual: torch.dtype) -> None:
        bf16 = torch.bfloat16
        with torch.device("meta"):
            x, update = torch.empty(rows, 4096, dtype=residual), torch.empty(rows, 4096, dtype=bf16)
            weight, a = torch.empty(4096, dtype=residual), torch.empty(rank, 4096, dtype=bf16)
        launch_norm_augment(x, update, weight, a, 1e-6, False)

    return [
        (f"{rows} rows, rank {rank}, {residual}".replace("torch.", ""), "products",
         lambda m=rows, r=rank, d=residual: launch(m, r, d))
        for rows, rank, residual in (
            (8192, 48, torch.bfloat16), (8192, 192, torch.bfloat16), (8192, 48, torch.float32), (32, 48, torch.bfloat16),
        )
    ]  # fmt: skip
