"""How much does a low-rank adapter add to a frozen linear layer?

    y = x Wᵀ + Σ scale · dropout(x) Aᵀ Bᵀ        (Hu et al. 2021)

W is frozen: its gradient is never computed. One path of three, the same sum on each:

    torch      the product with W, then each adapter's two small ones added to its rows
    augmented  the adapters lie along K: y = [x | scale · x Aᵀ] [W | B]ᵀ is one product, and its backward gives dy W and
               dy B at once. The buffer [W | B] is kept from step to step, W a view of it, B stored anew when it learned.
               norm_lora.py makes the left factor inside the norm that comes before
    one_pass   a Triton product with two accumulators, x Wᵀ and x Aᵀ, while x is read once

Which one is chosen: the fastest in lora_measured.json at a shape like this on this device (`choose_path`), otherwise
"torch". On every path A and B are rounded to x's dtype for the products, whose sums are fp32, and learn in their own.
"""

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import keyed_dropout
from kernels.jit import check_dtypes, jit, multiprocessors, next_power_of_2, tl, triton, why_not_triton
from kernels.linear import linear
from kernels.recompute import products_are_kept

PATHS = ("torch", "augmented", "one_pass")
MEASURED = Path(__file__).with_name("lora_measured.json")  # written by bench/lora_paths.py
NEAR = 4.0  # a measured shape speaks for those within this factor in each of rows, N, K and R
GROUP = 8  # of the one-pass product: so many tiles downwards share a tile of W while it is in the L2 cache

# The one-pass product's tiles by kernel and bytes of an element: the largest padded rank, then rows, columns, K, warps and
# stages. Free of spills and within shared memory; a larger rank than the last has no such tile.
TILES = {
    ("descriptors", 2): [(16, 128, 256, 64, 8, 3), (64, 128, 128, 64, 8, 4), (128, 128, 128, 64, 8, 3)],
    ("pointers", 2): [(64, 128, 128, 32, 8, 4), (128, 128, 64, 32, 8, 4)],
    ("pointers", 4): [(32, 64, 64, 32, 8, 3)],
}

Keys = tuple[Tensor, int] | None  # of dropout: one for each row, and the stream of the first adapter


@dataclass(frozen=True)
class Adapter:
    """scale · B A, added to `len(b)` rows of a frozen weight from `first_row` on (Hu et al. 2021).

    a (r, K) and b (n, r), of any float dtype: they are used in the input's and learn in their own. Projections that read
    the same input (q, k, v; gate, up) are one stacked weight, and each one's adapter names its first row there. Several
    adapters may feed the same rows; their sum is added.
    """

    a: Tensor
    b: Tensor
    scale: float
    first_row: int = 0


def lora_linear(
    x: Tensor,
    weight: Tensor,
    adapters: list[Adapter],
    *,
    dropout: float = 0.0,
    keys: Keys = None,
    path: str = "torch",
    augmented: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + Σ scale · dropout(x) Aᵀ Bᵀ; x (..., K), weight (N, K), returns (..., N) in x's dtype.

    dropout: the probability with which an element of an adapter's input is zeroed and the others scaled by 1/(1 − p),
    for each adapter anew; x Wᵀ sees all of x. keys: (those of the rows (...) int64, the stream of the first adapter), which
    decide on the masks (kernels/dropout.py); without them they are drawn from torch's generator. path: see the
    file's docstring. augmented: what `augmented_weight` made of this weight and these adapters, for that path.
    ValueError: an unknown path, a path that cannot take these tensors, an adapter that does not fit the weight.
    """
    if path not in PATHS:
        raise ValueError(f"lora_linear: the path is one of {', '.join(PATHS)}, not {path!r}")
    check_adapters(weight, adapters)
    if path == "torch" or not adapters:
        return lora_linear_reference(x, weight, adapters, dropout=dropout, keys=keys)
    if x.dtype != weight.dtype:
        raise ValueError(f"lora_linear: x is {x.dtype} and the weight {weight.dtype}; path {path!r} wants one dtype")
    flat = x.reshape(-1, x.shape[-1])
    if path == "augmented":
        if augmented is None:
            raise ValueError("lora_linear: path 'augmented' needs augmented=augmented_weight(weight, adapters)")
        y = augmented_product(_augmented_input(flat, adapters, dropout, keys), augmented, adapters)
    else:
        y = _one_pass_linear(flat, weight, adapters, dropout, keys)
    return y.view(*x.shape[:-1], len(weight))


def lora_linear_reference(
    x: Tensor, weight: Tensor, adapters: list[Adapter], *, dropout: float = 0.0, keys: Keys = None
) -> Tensor:  # fmt: skip
    """`lora_linear` in plain PyTorch: what the other paths are tested against and what torch.compile fuses."""
    flat = x.reshape(-1, x.shape[-1])
    y = linear(flat, weight.detach())
    y = y.clone() if products_are_kept() else y
    for adapter, branch in zip(adapters, branches(flat, adapters, dropout, keys), strict=True):
        low = F.linear(branch, adapter.a.to(y.dtype))
        rows = slice(adapter.first_row, adapter.first_row + len(adapter.b))
        part = y if len(adapter.b) == len(weight) else y[:, rows]  # in place: the sum makes no second y
        part.addmm_(low, adapter.b.to(y.dtype).t(), alpha=adapter.scale)
    return y.view(*x.shape[:-1], len(weight))


def branches(x: Tensor, adapters: list[Adapter], dropout: float, keys: Keys = None) -> list[Tensor]:
    """Each adapter's input: x (M, K), or x with a mask of its own. Autograd keeps the masks; recomputation makes the same."""
    return [masked(x, dropout, keys, number) if dropout else x for number in range(len(adapters))]


def masked(x: Tensor, dropout: float, keys: Keys, number: int) -> Tensor:
    """x (..., K) under the dropout of adapter `number`."""
    if keys is None:
        return F.dropout(x, dropout)
    rows, stream = keys
    return keyed_dropout(x, dropout, rows.view(x.shape[:-1]), stream + number)


def check_adapters(weight: Tensor, adapters: list[Adapter]) -> None:
    """ValueError where an adapter has other than the weight's columns, or rows that the weight has not."""
    for adapter in adapters:
        (rank, width), (rows, columns) = adapter.a.shape, adapter.b.shape
        if columns != rank or width != weight.shape[1]:
            raise ValueError(f"lora_linear: A is {(rank, width)} and B {(rows, columns)}, W is {tuple(weight.shape)}")
        if not 0 <= adapter.first_row <= len(weight) - rows:
            raise ValueError(f"lora_linear: {rows} rows from row {adapter.first_row} on, of a weight of {len(weight)}")


def total_rank(adapters: list[Adapter]) -> int:
    return sum(len(adapter.a) for adapter in adapters)


def stacked_a(adapters: list[Adapter], dtype: torch.dtype, rows: int) -> Tensor:
    """(rows, K): scale · A of all adapters, rounded once, then zeros. Differentiable."""
    parts = [(adapter.scale * adapter.a).to(dtype) for adapter in adapters]
    if padding := rows - total_rank(adapters):
        parts.append(parts[0].new_zeros(padding, parts[0].shape[1]))
    return torch.cat(parts)


def _place_b(block: Tensor, b: list[Tensor], first_rows: list[int]) -> None:
    """Write each B to its rows and to the next columns of `block` (N, R or more); what lies between stays zero."""
    column = 0
    for part, row in zip(b, first_rows, strict=True):
        block[row : row + part.shape[0], column : column + part.shape[1]] = part
        column += part.shape[1]


def _pick_b(block: Tensor, b: list[Tensor], first_rows: list[int]) -> list[Tensor]:
    """The gradient of each B, in its dtype, out of that of the block."""
    picked, column = [], 0
    for part, row in zip(b, first_rows, strict=True):
        picked.append(block[row : row + part.shape[0], column : column + part.shape[1]].to(part.dtype))
        column += part.shape[1]
    return picked


# -------------------------------------------------------------------------------------------------------- augmented: K + R


def padded_rank(width: int, adapters: list[Adapter], itemsize: int) -> int:
    """The columns beside W's: the adapters' ranks, and zeros up to rows of a multiple of 16 bytes (16-byte loads)."""
    unit = max(1, 16 // itemsize)
    return -(-(width + total_rank(adapters)) // unit) * unit - width


@torch.no_grad()
def augmented_weight(weight: Tensor, adapters: list[Adapter]) -> Tensor:
    """[W | B] (N, K + R) in the weight's dtype: W's columns, then each adapter's B at its rows and zeros elsewhere.

    Keep it in place of the weight, which is its first K columns, and call `store_adapters` after each optimizer step.
    """
    check_adapters(weight, adapters)
    rows, width = weight.shape
    w_aug = weight.new_zeros(rows, width + padded_rank(width, adapters, weight.element_size()))
    w_aug[:, :width] = weight
    store_adapters(w_aug, adapters)
    return w_aug


@torch.no_grad()
def store_adapters(w_aug: Tensor, adapters: list[Adapter]) -> None:
    """Write the adapters' B, as they are now, into the buffer that `augmented_weight` made for them."""
    width = adapters[0].a.shape[1]
    _place_b(w_aug[:, width:], [adapter.b for adapter in adapters], [adapter.first_row for adapter in adapters])


def _augmented_input(x: Tensor, adapters: list[Adapter], dropout: float, keys: Keys) -> Tensor:
    """[x | scale · dropout(x) Aᵀ | 0] (M, K + R)."""
    rows = padded_rank(x.shape[1], adapters, x.element_size())
    a = stacked_a(adapters, x.dtype, rows)
    if not dropout:
        return _augment(x, a)
    return torch.cat([x, _low_of_branches(x, a, adapters, dropout, keys)], 1)


def _low_of_branches(x: Tensor, a: Tensor, adapters: list[Adapter], dropout: float, keys: Keys) -> Tensor:
    """[scale · dropout(x) Aᵀ of each adapter | 0] (M, R), of `stacked_a`. Autograd keeps each masked input."""
    *parts, padding = a.split([*(len(adapter.a) for adapter in adapters), len(a) - total_rank(adapters)])
    low = [F.linear(branch, part) for branch, part in zip(branches(x, adapters, dropout, keys), parts, strict=True)]
    return torch.cat([*low, x.new_zeros(len(x), len(padding))], 1)


def augmented_product(x_aug: Tensor, w_aug: Tensor, adapters: list[Adapter]) -> Tensor:
    """x_aug w_augᵀ (M, N): the gradients go to x_aug and to the adapters' own B, of which w_aug holds a copy."""
    if w_aug.shape[1] != x_aug.shape[1]:
        raise ValueError(f"lora_linear: the augmented weight has {w_aug.shape[1]} columns, not {x_aug.shape[1]}")
    b, first_rows = [adapter.b for adapter in adapters], [adapter.first_row for adapter in adapters]
    return _augmented_product(x_aug, w_aug.detach(), b, first_rows, adapters[0].a.shape[1])


@torch.library.custom_op("groundup::lora_augment", mutates_args=())
def _augment(x: Tensor, a: Tensor) -> Tensor:
    """[x | x aᵀ]. An operator because its gradient needs only what it returned: autograd would keep x as well."""
    x_aug = x.new_empty(len(x), x.shape[1] + len(a))
    x_aug[:, : x.shape[1]] = x
    torch.mm(x, a.t(), out=x_aug[:, x.shape[1] :])
    return x_aug


@_augment.register_fake
def _(x, a):
    return x.new_empty(len(x), x.shape[1] + len(a))


def _save_augment(ctx, inputs, output):
    ctx.save_for_backward(output, inputs[1])


def augment_backward(d_aug: Tensor, x_aug: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dA) of x_aug = [x | x aᵀ]."""
    width = a.shape[1]
    d_low = d_aug[:, width:]
    return torch.addmm(d_aug[:, :width], d_low, a), d_low.t() @ x_aug[:, :width]


def _differentiate_augment(ctx, d_aug):
    return augment_backward(d_aug, *ctx.saved_tensors)


_augment.register_autograd(_differentiate_augment, setup_context=_save_augment)


@torch.library.custom_op("groundup::lora_augmented_product", mutates_args=())
def _augmented_product(x_aug: Tensor, w_aug: Tensor, b: list[Tensor], first_rows: list[int], width: int) -> Tensor:
    y = x_aug.new_empty(len(x_aug), len(w_aug))
    return torch.mm(x_aug, w_aug.t(), out=y)  # out=: autocast leaves it in this dtype


@_augmented_product.register_fake
def _(x_aug, w_aug, b, first_rows, width):
    return x_aug.new_empty(len(x_aug), len(w_aug))


def _save_augmented_product(ctx, inputs, output):
    x_aug, w_aug, b, ctx.first_rows, ctx.width = inputs
    ctx.save_for_backward(x_aug, w_aug, *b)


def _differentiate_augmented_product(ctx, dy):
    x_aug, w_aug, *b = ctx.saved_tensors
    dy = dy.contiguous()
    d_block = dy.t() @ x_aug[:, ctx.width :]  # the blocks that no adapter has cost less than a product for each adapter
    return dy @ w_aug, None, _pick_b(d_block, b, ctx.first_rows), None, None


_augmented_product.register_autograd(_differentiate_augmented_product, setup_context=_save_augmented_product)


# ------------------------------------------------------------------------------------------- one pass: two accumulators


@jit
def _tile_at(index, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a tile: GROUP tiles downwards before the next column, so that W's stay in L2."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = index % (GROUP * across)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@jit
def _pointer_kernel(
    X, WEIGHT, A, B, LOW, Y, rows, columns,
    WIDTH: tl.constexpr, PITCH: tl.constexpr, RANK: tl.constexpr, HAS_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of Y a program. LOW (M, RANK) = X Aᵀ is written by the first column of tiles, or read if HAS_LOW."""
    m, n = _tile_at(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row, column = m + tl.arange(0, BLOCK_M).to(tl.int64), n + tl.arange(0, BLOCK_N).to(tl.int64)
    k, rank = tl.arange(0, BLOCK_K), tl.arange(0, RANK)
    at_low = row[:, None] * RANK + rank[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        inside = (start + k < WIDTH)[None, :]
        x = tl.load(X + row[:, None] * WIDTH + (start + k)[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        w_at = WEIGHT + column[:, None] * PITCH + (start + k)[None, :]
        w = tl.load(w_at, mask=(column < columns)[:, None] & inside, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if not HAS_LOW:
            a = tl.load(A + rank[:, None] * WIDTH + (start + k)[None, :], mask=inside, other=0.0)
            low = tl.dot(x, tl.trans(a), low, input_precision="ieee")
    if HAS_LOW:
        rounded = tl.load(LOW + at_low, mask=(row < rows)[:, None], other=0.0)
    else:
        rounded = low.to(LOW.dtype.element_ty)
        if n == 0:
            tl.store(LOW + at_low, rounded, mask=(row < rows)[:, None])
    b = tl.load(B + column[:, None] * RANK + rank[None, :], mask=(column < columns)[:, None], other=0.0)
    acc = tl.dot(rounded, tl.trans(b), acc, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(Y + row[:, None] * columns + column[None, :], acc.to(Y.dtype.element_ty), mask=inside)


@jit
def _descriptor_kernel(
    X, WEIGHT, A, B, LOW, Y, rows, columns, width, pitch,
    RANK: tl.constexpr, HAS_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same; tiles move by TMA, outside of a matrix they are zero, and each program makes every PROGRAMS-th tile."""
    x_tiles = tl.make_tensor_descriptor(X, [rows, width], [width, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(WEIGHT, [columns, width], [pitch, 1], [BLOCK_N, BLOCK_K])
    a_tiles = tl.make_tensor_descriptor(A, [RANK, width], [width, 1], [RANK, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(B, [columns, RANK], [RANK, 1], [BLOCK_N, RANK])
    low_tiles = tl.make_tensor_descriptor(LOW, [rows, RANK], [RANK, 1], [BLOCK_M, RANK])
    y_tiles = tl.make_tensor_descriptor(Y, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_N])
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = _tile_at(tl.cast(index, tl.int32), rows, columns, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        low = tl.zeros((BLOCK_M, RANK), tl.float32)
        for start in range(0, width, BLOCK_K):
            x = x_tiles.load([m, start])
            acc = tl.dot(x, tl.trans(w_tiles.load([n, start])), acc, input_precision="ieee")
            if not HAS_LOW:
                low = tl.dot(x, tl.trans(a_tiles.load([0, start])), low, input_precision="ieee")
        if HAS_LOW:
            rounded = low_tiles.load([m, 0])
        else:
            rounded = low.to(LOW.dtype.element_ty)
            if n == 0:
                low_tiles.store([m, 0], rounded)
        acc = tl.dot(rounded, tl.trans(b_tiles.load([n, 0])), acc, input_precision="ieee")
        y_tiles.store([m, n], acc.to(Y.dtype.element_ty))


def has_tma(device: torch.device) -> bool:
    """Does the GPU move tiles by descriptors (Hopper and later)?"""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _one_pass_rank(adapters: list[Adapter], itemsize: int) -> int:
    """The ranks of all adapters padded to a tile's side. ValueError where no tile holds them."""
    rank = max(16, next_power_of_2(total_rank(adapters)))
    largest = TILES["pointers", itemsize][-1][0]
    if rank > largest:
        raise ValueError(
            f"lora_linear: path 'one_pass' holds ranks up to {largest} in all at {itemsize} bytes an element, "
            f"not {total_rank(adapters)}; take path 'torch' or 'augmented'"
        )
    return rank


def _one_pass_linear(x: Tensor, weight: Tensor, adapters: list[Adapter], dropout: float, keys: Keys) -> Tensor:
    check_dtypes("lora_linear", x)
    a = stacked_a(adapters, x.dtype, _one_pass_rank(adapters, x.element_size()))
    b, first_rows = [adapter.b for adapter in adapters], [adapter.first_row for adapter in adapters]
    if not dropout:
        return _one_pass(x, weight.detach(), a, b, first_rows)[0]
    low = _low_of_branches(x, a, adapters, dropout, keys)  # masked inputs, of which the kernel reads none
    return _one_pass_given_low(x, weight.detach(), low, b, first_rows)


def launch_one_pass(
    x: Tensor, weight: Tensor, a: Tensor | None, low: Tensor | None, b: Tensor, descriptors: bool
) -> tuple[Tensor, Tensor]:
    """(y, low = x aᵀ) from x (M, K), weight (N, K) with rows of any pitch, b (N, RANK) and a (RANK, K) or low (M, RANK)."""
    (rows, width), columns, rank = x.shape, len(weight), b.shape[1]
    tiles = TILES["descriptors" if descriptors else "pointers", x.element_size()]
    block_m, block_n, block_k, warps, stages = next(tile[1:] for tile in tiles if rank <= tile[0])
    y, given = x.new_empty(rows, columns), low is not None
    low = x.new_empty(rows, rank) if low is None else low
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    programs = -(-rows // block_m) * -(-columns // block_n)
    if not programs:
        return y, low
    if not descriptors:
        _pointer_kernel[(programs,)](
            x, weight, a, b, low, y, rows, columns,
            WIDTH=width, PITCH=weight.stride(0), RANK=rank, HAS_LOW=given, GROUP=GROUP, **tile,
        )  # fmt: skip
        return y, low
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
    _descriptor_kernel[(min(programs, multiprocessors(x.device)),)](
        x, weight, b if a is None else a, b, low, y, rows, columns, width, weight.stride(0),
        RANK=rank, HAS_LOW=given, GROUP=GROUP, **tile,
    )  # fmt: skip
    return y, low


def _launch(
    x: Tensor, weight: Tensor, a: Tensor | None, low: Tensor | None, b: list[Tensor], first_rows: list[int], rank: int
) -> tuple[Tensor, Tensor]:
    """`launch_one_pass` of any strides, with the kernel that these tensors and this device allow."""
    if reason := why_not_triton(x.device):
        raise ValueError(f"lora_linear: path 'one_pass' cannot run, {reason}")
    x = x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    block = x.new_zeros(len(weight), rank)
    _place_b(block, b, first_rows)
    sides = (x.shape[1], len(weight), weight.stride(0))  # TMA: rows of a multiple of 16 bytes, from such an address on
    aligned = not any(side % 8 for side in sides) and not (x.data_ptr() % 16 or weight.data_ptr() % 16)
    descriptors = has_tma(x.device) and aligned and x.element_size() == 2
    return launch_one_pass(x, weight, a, low, block, descriptors)


@torch.library.custom_op("groundup::lora_one_pass", mutates_args=())
def _one_pass(x: Tensor, weight: Tensor, a: Tensor, b: list[Tensor], first_rows: list[int]) -> tuple[Tensor, Tensor]:
    return _launch(x, weight, a.contiguous(), None, b, first_rows, len(a))


@torch.library.custom_op("groundup::lora_one_pass_given_low", mutates_args=())
def _one_pass_given_low(x: Tensor, weight: Tensor, low: Tensor, b: list[Tensor], first_rows: list[int]) -> Tensor:
    return _launch(x, weight, None, low.contiguous(), b, first_rows, low.shape[1])[0]


@_one_pass.register_fake
def _(x, weight, a, b, first_rows):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(a))


@_one_pass_given_low.register_fake
def _(x, weight, low, b, first_rows):
    return x.new_empty(len(x), len(weight))


def _save_one_pass(ctx, inputs, output):
    x, weight, a, b, ctx.first_rows = inputs
    ctx.save_for_backward(x, weight, a, output[1], *b)


def _save_one_pass_given_low(ctx, inputs, output):
    _, weight, low, b, ctx.first_rows = inputs
    ctx.save_for_backward(weight, low, *b)


def _low_backward(dy: Tensor, low: Tensor, b: list[Tensor], first_rows: list[int]) -> tuple[Tensor, list[Tensor]]:
    """(the gradient of low, those of each B) of low Bᵀ."""
    d_low = torch.zeros_like(low)
    column = 0
    for part, row in zip(b, first_rows, strict=True):
        rows, rank = part.shape
        d_low[:, column : column + rank] = dy[:, row : row + rows] @ part.to(dy.dtype)
        column += rank
    return d_low, _pick_b(dy.t() @ low, b, first_rows)


def _differentiate_one_pass(ctx, dy, _):
    x, weight, a, low, *b = ctx.saved_tensors
    dy = dy.contiguous()
    d_low, d_b = _low_backward(dy, low, b, ctx.first_rows)
    return (dy @ weight).addmm_(d_low, a), None, d_low.t() @ x, d_b, None


def _differentiate_one_pass_given_low(ctx, dy):
    weight, low, *b = ctx.saved_tensors
    dy = dy.contiguous()
    d_low, d_b = _low_backward(dy, low, b, ctx.first_rows)
    return dy @ weight, None, d_low, d_b, None


_one_pass.register_autograd(_differentiate_one_pass, setup_context=_save_one_pass)
_one_pass_given_low.register_autograd(_differentiate_one_pass_given_low, setup_context=_save_one_pass_given_low)


# ------------------------------------------------------------------------------------------------- which path to choose


def device_name(device: torch.device) -> str:
    """What the measurements call a device: the GPU's name, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def choose_path(device_name: str, dtype: torch.dtype, rows: int, n: int, k: int, r: int) -> str:
    """The fastest path, forward and backward, of the nearest measured shape; "torch" where none is near.

    Near: the same device and dtype, and each of rows, N, K and R (the ranks of all adapters) within NEAR times the
    measured one either way; the nearest has the smallest sum of squared logarithms of these four ratios.
    """
    nearest, fastest = math.inf, "torch"
    for entry in json.loads(MEASURED.read_text(encoding="utf-8")):
        if (entry["device"], entry["dtype"]) != (device_name, str(dtype).removeprefix("torch.")):
            continue
        sides = zip((rows, n, k, r), (entry["rows"], entry["N"], entry["K"], entry["R"]), strict=True)
        logarithms = [math.log(asked / measured) for asked, measured in sides]
        distance = sum(logarithm**2 for logarithm in logarithms)
        if max(map(abs, logarithms)) <= math.log(NEAR) and distance < nearest:
            times = {path: entry["microseconds"][path] for path in PATHS if path in entry["microseconds"]}
            nearest, fastest = distance, min(times, key=times.__getitem__)
    return fastest


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py): the kernel each architecture takes."""

    def launch(rank: int, given: bool) -> None:
        bf16 = torch.bfloat16
        with torch.device("meta"):
            x, weight = torch.empty(8192, 4096, dtype=bf16), torch.empty(4096, 4096, dtype=bf16)
            a, low = torch.empty(rank, 4096, dtype=bf16), torch.empty(8192, rank, dtype=bf16)
            b = torch.empty(4096, rank, dtype=bf16)
        descriptors = triton.runtime.driver.active.get_current_target().arch >= 90
        launch_one_pass(x, weight, None if given else a, low if given else None, b, descriptors)

    return [
        (f"rank {rank}" + given * " given x Aᵀ", "products", lambda r=rank, g=given: launch(r, g))
        for rank, given in ((16, False), (64, False), (128, False), (128, True))
    ]
