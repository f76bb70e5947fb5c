"""How are queries and keys turned by their token's place, both in one launch?

    (a, b) → (a·cos − b·sin, b·cos + a·sin)   for each pair of channels (RoFormer, Su et al. 2021)

Pairs are channels i and i + D/2 (Hugging Face's checkpoints) or, interleaved, 2i and 2i + 1 (Meta's). A gradient turns
back by the same angle, so the backward is the forward with −sin and keeps neither queries nor keys.

When Triton is chosen: without torch.compile on a GPU. The compiler fuses the reference as well (docs/kernels.md).
"""

import torch
from torch import Tensor

from kernels.jit import check_dtypes, jit, next_power_of_2, num_warps, tl

TILE = 2048  # channels a program turns: 16 a thread, one 16-byte load from each half in half precision


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    implementation: str = "torch",
) -> tuple[Tensor, Tensor]:
    """q (B, T, A, D) and k (B, T, K, D) turned by their tokens' angles, in fp32 with one rounding; contiguous.

    cos and sin: fp32, (B or 1, T, D/2) token by token; with positions (B or 1, T) int32 or int64, a table (P, D/2) in
    which these are looked up. They get no gradient. q and k may be views of one projection: any strides but the last
    one's 1 are read as they are. implementation: "triton" or "torch". ValueError for shapes that do not fit together.
    A position outside the table is an error of the reference and NaN from the kernel.
    """
    _check(q, k, cos, sin, positions)
    if implementation == "triton":
        return _rope(q, k, cos, sin, positions, interleaved, False)
    return rope_reference(q, k, cos, sin, positions=positions, interleaved=interleaved)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` in plain PyTorch: what the kernel is tested against and what torch.compile fuses."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B or 1, T, 1, D/2)

    def turn(x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        first, second = pairs.unbind(-1 if interleaved else -2)
        turned = first * cos - second * sin, second * cos + first * sin  # fp32 products, as the tables are
        return torch.stack(turned, dim=-1 if interleaved else -2).flatten(-2).to(x.dtype)

    return turn(q), turn(k)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    batch, length, _, width = q.shape
    if k.shape[:2] != q.shape[:2] or k.shape[3] != width or width % 2:
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, T, heads, D) with an even D")
    rows = cos if positions is None else positions  # what has one row or entry a token
    if rows.shape[:2] not in ((batch, length), (1, length)):
        raise ValueError(f"rope: angles of {tuple(rows.shape[:2])} do not fit tokens of {(batch, length)}")
    if cos.shape != sin.shape or cos.shape[-1] != width // 2 or cos.dim() != (3 if positions is None else 2):
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit a head of {width}")


# -------------------------------------------------------------------------------------------------------------- kernels


@jit
def _turn(
    X, Y, COS, SIN, POSITIONS, first_row, tokens, length, table_rows, angle_batch, x_batch, x_token, x_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LOOK_UP: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of (tokens · HEADS, D) from X, which has strides, to Y, which has none. BLOCK ≥ HALF = D/2."""
    row = first_row + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    batch, place = token // length, token % length
    inside = token < tokens
    angle = (batch * angle_batch + place).to(tl.int64)  # the row of COS and SIN
    known = inside
    if LOOK_UP:
        angle = tl.load(POSITIONS + angle, mask=inside, other=0).to(tl.int64)
        known = inside & (angle >= 0) & (angle < table_rows)
    pair = tl.arange(0, BLOCK)[None, :]
    at, known = angle[:, None] * HALF + pair, known[:, None] & (pair < HALF)
    cos = tl.load(COS + at, mask=known, other=float("nan"))
    sin = tl.load(SIN + at, mask=known, other=float("nan"))
    if BACK:
        sin = -sin
    x_at = (batch.to(tl.int64) * x_batch + place.to(tl.int64) * x_token + head.to(tl.int64) * x_head)[:, None]
    y_at = row.to(tl.int64)[:, None] * (2 * HALF)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK)[None, :]
        mask = inside[:, None] & (channel < 2 * HALF)
        x = tl.load(X + x_at + channel, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (ROWS, BLOCK, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        tl.store(Y + y_at + channel, tl.reshape(turned, (ROWS, 2 * BLOCK)).to(Y.dtype.element_ty), mask=mask)
    else:
        mask = inside[:, None] & (pair < HALF)
        first = tl.load(X + x_at + pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(X + x_at + HALF + pair, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + y_at + pair, (first * cos - second * sin).to(Y.dtype.element_ty), mask=mask)
        tl.store(Y + y_at + HALF + pair, (second * cos + first * sin).to(Y.dtype.element_ty), mask=mask)


@jit
def _rope_kernel(
    Q, K, Q_OUT, K_OUT, COS, SIN, POSITIONS, tokens, length, table_rows, angle_batch,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LOOK_UP: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The first programs turn queries, the rest keys."""
    program = tl.program_id(0)
    q_programs = tl.cdiv(tokens * Q_HEADS, ROWS)
    if program < q_programs:
        _turn(
            Q, Q_OUT, COS, SIN, POSITIONS, program * ROWS, tokens, length, table_rows, angle_batch,
            q_batch, q_token, q_head, Q_HEADS, HALF, BLOCK, ROWS, LOOK_UP, INTERLEAVED, BACK,
        )  # fmt: skip
    else:
        _turn(
            K, K_OUT, COS, SIN, POSITIONS, (program - q_programs) * ROWS, tokens, length, table_rows, angle_batch,
            k_batch, k_token, k_head, K_HEADS, HALF, BLOCK, ROWS, LOOK_UP, INTERLEAVED, BACK,
        )  # fmt: skip


def launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    """`rope`, or with `back` its inverse turn, of q and k with a last stride of 1; the other tensors contiguous."""
    check_dtypes("rope", q, k)
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"rope: cos and sin must be fp32, not {cos.dtype} and {sin.dtype}")
    batch, length, q_heads, width = q.shape
    k_heads, tokens = k.shape[2], batch * length
    q_out, k_out = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    block = next_power_of_2(width // 2)
    rows = max(1, TILE // (2 * block))
    by_token = cos if positions is None else positions
    if programs := -(-tokens * q_heads // rows) + -(-tokens * k_heads // rows):
        _rope_kernel[(programs,)](
            q, k, q_out, k_out, cos, sin, positions, tokens, length, cos.shape[0],
            length if by_token.shape[0] == batch else 0,  # one row of angles may serve the whole batch
            *q.stride()[:3], *k.stride()[:3],
            Q_HEADS=q_heads, K_HEADS=k_heads, HALF=width // 2, BLOCK=block, ROWS=rows,
            LOOK_UP=positions is not None, INTERLEAVED=interleaved, BACK=back, num_warps=num_warps(rows * 2 * block),
        )  # fmt: skip
    return q_out, k_out


# ------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("groundup::rope", mutates_args=())
def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    positions = None if positions is None else positions.contiguous()
    return launch(q, k, cos.contiguous(), sin.contiguous(), positions, interleaved, back)


@_rope.register_fake
def _(q, k, cos, sin, positions, interleaved, back):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _save(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.back), None, None, None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py): heads of 124M to 8B models."""

    def case(dtype: torch.dtype, q_heads: int, k_heads: int, width: int, interleaved: bool, look_up: bool) -> None:
        with torch.device("meta"):
            qkv = torch.empty(4, 1024, q_heads + 2 * k_heads, width, dtype=dtype)
            q, k, _ = qkv.split([q_heads, k_heads, k_heads], dim=2)
            angles = torch.empty(1024, width // 2) if look_up else torch.empty(1, 1024, width // 2)
            positions = torch.empty(4, 1024, dtype=torch.int64) if look_up else None
            launch(q, k, angles, angles, positions, interleaved, False)

    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [
        (bf16, 12, 12, 64, False, False),
        (fp32, 12, 12, 64, False, False),
        (bf16, 32, 8, 128, False, False),
        (bf16, 32, 8, 128, False, True),
        (bf16, 32, 8, 128, True, False),
        (bf16, 32, 8, 96, False, False),
    ]
    return [
        (
            f"{shape[3]} {shape[0]}{' interleaved' * shape[4]}{' table' * shape[5]}".replace("torch.", ""),
            "memory",
            lambda shape=shape: case(*shape),
        )
        for shape in shapes
    ]
