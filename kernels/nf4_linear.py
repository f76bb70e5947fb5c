"""How does a linear layer train adapters over a weight that stays in 4 bits?

    y = x Ŵᵀ + Σ scale · (x Aᵀ) Bᵀ            (QLoRA, Dettmers et al. 2023)

Ŵ is decoded for one product and dropped: the backward decodes it again, so that between the two there is nothing but x
and x Aᵀ. The forward decodes into the left part of one buffer, [Ŵ | scale · B], and multiplies it with [x | x Aᵀ]: one
product, one rounding. For the few rows of a generation step that would be mostly decoding, so there a kernel of its own
decodes inside the product.

When Triton is chosen: on a GPU, with or without torch.compile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.jit import jit, multiprocessors, next_power_of_2, tl
from kernels.lora_linear import Adapter
from kernels.nf4 import (
    NF4Weight,
    decode_words,
    dequantise_nf4,
    dequantise_nf4_reference,
    load_absmax,
    quantile_table,
    weight_without_memory,
)

FEW_ROWS = 64  # up to here reading the weight takes longer than multiplying, so it is read in 4 bits
RANK_MULTIPLE = 16  # of the adapters' columns in the wide buffer: rows begin at multiples of 16 bytes


def nf4_linear(
    x: Tensor, weight: NF4Weight, adapters: Sequence[Adapter] = (), *, implementation: str = "torch"
) -> Tensor:
    """x Ŵᵀ and what the adapters add: x (..., K), weight (N, K), returns (..., N) in x's dtype, or autocast's.

    Ŵ is rounded to that dtype, as are the adapters, which may be fp32 masters; gradients go to x and to each adapter's
    a and b in their own dtypes, never to the weight. Both implementations keep no decoded weight: "torch" decodes and
    multiplies with PyTorch, "triton" decodes in one launch.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    a, b = [adapter.a for adapter in adapters], [adapter.b for adapter in adapters]
    scales, first_rows = [adapter.scale for adapter in adapters], [adapter.first_row for adapter in adapters]
    arguments = (x, *weight.tensors, weight.sizes, a, b, scales, first_rows)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *a, *b))
    if implementation == "triton" and not learns and _few_rows(x, weight):
        return _nf4_linear_few_rows(*arguments)
    return _nf4_linear(*arguments, implementation)[0]


def nf4_linear_reference(x: Tensor, weight: NF4Weight, adapters: Sequence[Adapter] = ()) -> Tensor:
    """`nf4_linear` in plain PyTorch. Autograd keeps its decoded weight: for tests."""
    y = F.linear(x, dequantise_nf4_reference(weight, x.dtype))
    for adapter in adapters:
        update = F.linear(F.linear(x, adapter.a.to(x.dtype)), adapter.b.to(x.dtype)) * adapter.scale
        below = y.shape[-1] - adapter.first_row - len(adapter.b)
        y = y + F.pad(update, (adapter.first_row, below))
    return y


def _few_rows(x: Tensor, weight: NF4Weight) -> bool:
    """Whether the kernel for few rows takes this: whole blocks of 64 a row, and a dtype that tensor cores multiply."""
    rows = x.numel() // x.shape[-1]
    return (
        0 < rows <= FEW_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.block == 64
        and weight.shape[1] % 64 == 0
    )


# -------------------------------------------------------------------------------------------------- PyTorch's products


def _down(a: Sequence[Tensor], like: Tensor) -> Tensor:
    """All adapters' a one below the other (R, K) in x's dtype; R is a multiple of 16, zeros below."""
    parts = [part.to(like.dtype) for part in a]
    if missing := -sum(map(len, a)) % RANK_MULTIPLE:
        parts.append(like.new_zeros(missing, like.shape[-1]))
    return torch.cat(parts)


def _up(b: Sequence[Tensor], scales: Sequence[float], first_rows: Sequence[int], out: Tensor) -> Tensor:
    """scale · b of each adapter at its rows and its columns of out (N, R), zeros elsewhere."""
    out.zero_()
    for rows, columns, part, scale in _places(b, scales, first_rows):
        out[rows, columns] = part * scale
    return out


def _places(b: Sequence[Tensor], scales: Sequence[float], first_rows: Sequence[int]) -> list[tuple]:
    """(rows of the weight, columns among all adapters' ranks, b, scale) of each adapter."""
    places, column = [], 0
    for part, scale, row in zip(b, scales, first_rows, strict=True):
        places.append((slice(row, row + len(part)), slice(column, column + part.shape[1]), part, scale))
        column += part.shape[1]
    return places


def _rank(b: Sequence[Tensor]) -> int:
    rank = sum(part.shape[1] for part in b)
    return rank + -rank % RANK_MULTIPLE


@torch.library.custom_op("groundup::nf4_linear", mutates_args=())
def _nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    sizes: list[int],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    first_rows: list[int],
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(y, x Aᵀ of all adapters)."""
    weight = NF4Weight.of(packed, absmax, code, absmax2, offset, sizes)
    rows, width = weight.shape
    flat = x.reshape(-1, width)
    buffer = x.new_empty(rows, width + _rank(b))
    dequantise_nf4(weight, x.dtype, out=buffer[:, :width], implementation=implementation)
    low = x.new_empty(len(flat), 0)
    if b:
        _up(b, scales, first_rows, buffer[:, width:])
        low = flat @ _down(a, flat).t()
        flat = torch.cat((flat, low), 1)
    return (flat @ buffer.t()).view(*x.shape[:-1], rows), low


@torch.library.custom_op("groundup::nf4_linear_backward", mutates_args=())
def _nf4_linear_backward(
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    sizes: list[int],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    first_rows: list[int],
    implementation: str,
    x_learns: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx, each da, each db); dx is empty where x wants none."""
    weight = NF4Weight.of(packed, absmax, code, absmax2, offset, sizes)
    rows, width = weight.shape
    flat, dy = x.reshape(-1, width), dy.reshape(-1, rows).contiguous()
    dx, da, db = x.new_empty(0), [], []
    if b:
        down, up = _down(a, flat), _up(b, scales, first_rows, x.new_empty(rows, _rank(b)))
        d_low = dy @ up
    if x_learns:
        dx = dy @ dequantise_nf4(weight, x.dtype, implementation=implementation)
        if b:
            dx.addmm_(d_low, down)
        dx = dx.view(x.shape)
    if b:
        d_down, d_up = d_low.t() @ flat, dy.t() @ low
        for part, (span, columns, like, scale) in zip(a, _places(b, scales, first_rows), strict=True):
            da.append(d_down[columns].to(part.dtype, copy=True))
            db.append(d_up[span, columns].to(like.dtype) * scale)
    return dx, da, db


@_nf4_linear.register_fake
def _(x, packed, absmax, code, absmax2, offset, sizes, a, b, scales, first_rows, implementation):
    rows = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], sizes[0]), x.new_empty(rows, _rank(b))


@_nf4_linear_backward.register_fake
def _(
    dy, x, low, packed, absmax, code, absmax2, offset, sizes, a, b, scales, first_rows, implementation, x_learns
):  # fmt: skip
    dx = x.new_empty(x.shape if x_learns else 0)
    return dx, [part.new_empty(part.shape) for part in a], [part.new_empty(part.shape) for part in b]


def _save(ctx, inputs, output):
    x, *weight, ctx.sizes, a, b, ctx.scales, ctx.first_rows, ctx.implementation = inputs
    ctx.adapters = len(a)
    ctx.save_for_backward(x, output[1], *weight, *a, *b)


def _differentiate(ctx, dy, _):
    x, low, packed, absmax, code, absmax2, offset, *parts = ctx.saved_tensors
    a, b = parts[: ctx.adapters], parts[ctx.adapters :]
    dx, da, db = _nf4_linear_backward(
        dy, x, low, packed, absmax, code, absmax2, offset, ctx.sizes, a, b, ctx.scales, ctx.first_rows,
        ctx.implementation, ctx.needs_input_grad[0],
    )  # fmt: skip
    # torch takes an empty list of numbers for one of tensors, and wants one back
    no_list: list | None = None if a else []
    return dx if ctx.needs_input_grad[0] else None, *[None] * 6, da, db, no_list, no_list, None


_nf4_linear.register_autograd(_differentiate, setup_context=_save)


# -------------------------------------------------------------------------------------- few rows: decode and multiply


@jit
def _few_rows_kernel(
    X, WORDS, ABSMAX, CODE, ABSMAX2, OFFSET, LOW, UP, OUT, rows, columns, row_words, rank, tiles_per_split,
    ABSMAX_BLOCK: tl.constexpr, DOUBLE: tl.constexpr, ADAPTERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORD_TILE: tl.constexpr, RANK_TILE: tl.constexpr,
):  # fmt: skip
    """COLUMNS outputs of all rows, over one part of K: OUT (splits, rows, columns). The weight is the left operand:
    tensor cores want 64 rows there, and it has them. The first part adds the adapters, of RANK_TILE · n ranks."""
    dtype: tl.constexpr = X.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.arange(0, ROWS)
    split = tl.program_id(1)
    table = tl.broadcast_to(quantile_table(WORD_TILE)[None, :], (COLUMNS, WORD_TILE))
    y = tl.zeros((COLUMNS, ROWS), tl.float32)
    end = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(row_words, WORD_TILE))
    for tile in range(split * tiles_per_split, end):
        word = tile * WORD_TILE + tl.arange(0, WORD_TILE)
        inside = (n < columns)[:, None] & (word < row_words)[None, :]
        at = n[:, None] * row_words + word[None, :]
        words = tl.load(WORDS + tl.multiple_of(at, [1, 1]), mask=inside, other=0)
        block = tile * (WORD_TILE // 8) + tl.arange(0, WORD_TILE // 8)
        inside = (n < columns)[:, None] & (block < row_words // 8)[None, :]
        block = n[:, None] * (row_words // 8) + block[None, :]
        absmax = load_absmax(ABSMAX, CODE, ABSMAX2, OFFSET, block, inside, ABSMAX_BLOCK, DOUBLE)
        absmax = tl.broadcast_to(absmax[:, :, None], (COLUMNS, WORD_TILE // 8, 8))
        weight = decode_words(words, table, tl.reshape(absmax, (COLUMNS, WORD_TILE)), dtype)
        k = tile * (WORD_TILE * 8) + tl.arange(0, WORD_TILE * 8)
        inside = (k < row_words * 8)[:, None] & (m < rows)[None, :]
        x = tl.load(X + k[:, None] + m[None, :] * (row_words * 8), mask=inside, other=0.0)
        y = tl.dot(weight, x, y)
    if ADAPTERS:
        for first in range(0, tl.where(split == 0, rank, 0), RANK_TILE):
            r = first + tl.arange(0, RANK_TILE)
            up = tl.load(UP + n[:, None] * rank + r[None, :], mask=(n < columns)[:, None], other=0.0)
            low = tl.load(LOW + r[:, None] + m[None, :] * rank, mask=(m < rows)[None, :], other=0.0)
            y = tl.dot(up, low, y)
    at = (split.to(tl.int64) * rows + m)[None, :] * columns + n[:, None]
    tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=(m < rows)[None, :] & (n < columns)[:, None])


FEW_ROWS_COLUMNS, FEW_ROWS_WORDS = 64, 16  # the tile of the weight: 64 x 128 values


def _splits(rows: int, columns: int, width: int, device: torch.device) -> int:
    """In how many parts K is summed: enough that four programs a multiprocessor read, and yet so few that the partial
    sums weigh no more than half of the weight, and that each part has four tiles to load ahead of each other."""
    tiles = -(-width // (FEW_ROWS_WORDS * 8))
    wanted = 4 * multiprocessors(device) // -(-columns // FEW_ROWS_COLUMNS)
    return max(1, min(wanted, tiles // 4, width // (32 * rows)))


def launch_few_rows(x: Tensor, weight: NF4Weight, low: Tensor | None, up: Tensor | None) -> Tensor:
    """x Ŵᵀ + low upᵀ for contiguous x (M, K), low (M, R) and up (N, R), M ≤ FEW_ROWS. The same bits each time: the
    parts of K are added in a fixed order, and how many there are does not depend on the values."""
    rows, (columns, width) = len(x), weight.shape
    block = max(16, next_power_of_2(rows))
    splits = _splits(block, columns, width, x.device)
    out = torch.empty(splits, rows, columns, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    tiles = -(-width // (FEW_ROWS_WORDS * 8))
    _few_rows_kernel[(-(-columns // FEW_ROWS_COLUMNS), splits)](
        x, weight.packed.view(torch.int32), *weight.tensors[1:], low, up, out,
        rows, columns, width // 8, 0 if low is None else low.shape[1], -(-tiles // splits),
        ABSMAX_BLOCK=weight.absmax_block, DOUBLE=weight.code is not None, ADAPTERS=low is not None,
        ROWS=block, COLUMNS=FEW_ROWS_COLUMNS, WORD_TILE=FEW_ROWS_WORDS, RANK_TILE=RANK_MULTIPLE,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return out.sum(0).to(x.dtype) if splits > 1 else out[0]


@torch.library.custom_op("groundup::nf4_linear_few_rows", mutates_args=())
def _nf4_linear_few_rows(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    sizes: list[int],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    first_rows: list[int],
) -> Tensor:
    weight = NF4Weight.of(packed, absmax, code, absmax2, offset, sizes)
    flat, low, up = x.reshape(-1, weight.shape[1]).contiguous(), None, None
    if b:
        low = flat @ _down(a, flat).t()
        up = _up(b, scales, first_rows, x.new_empty(weight.shape[0], _rank(b)))
    return launch_few_rows(flat, weight, low, up).view(*x.shape[:-1], weight.shape[0])


@_nf4_linear_few_rows.register_fake
def _(x, packed, absmax, code, absmax2, offset, sizes, a, b, scales, first_rows):
    return x.new_empty(*x.shape[:-1], sizes[0])


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py)."""

    def launch(rows: int, columns: int) -> None:
        weight = weight_without_memory(columns, 4096)
        x, low = (torch.empty(rows, width, dtype=torch.bfloat16, device="meta") for width in (4096, 16))
        launch_few_rows(x, weight, low, torch.empty(columns, 16, dtype=torch.bfloat16, device="meta"))

    shapes = [(16, 4096), (64, 4096), (16, 64)]  # the last one is narrow: K is split, the partial sums are fp32
    return [
        (f"{rows} rows to {columns} bfloat16", "products", lambda rows=rows, columns=columns: launch(rows, columns))
        for rows, columns in shapes
    ]
