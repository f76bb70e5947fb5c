"""What does the model's last matrix product cost when its result, the logits, is never whole in memory?

A vocabulary of 32,000 and 4,096 tokens make 0.5 GB of fp32 logits, and as much again for their gradient. Here they
exist a few rows at a time, in one buffer. `linear_cross_entropy` makes the gradients in the forward pass, while a
chunk's logits are at hand (Liger-Kernel, Hsu et al. 2024), so the loss must be summed, not returned per token.
`token_statistics` is per token, and recomputes each chunk's logits in the backward pass.

When Triton is chosen: on a GPU, with torch.compile and without. The matrix products are the library's in both; between
them PyTorch passes over a chunk's logits about ten times in fp32, the kernels read it twice and write it once.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.jit import check_dtypes, jit, next_power_of_2, num_warps, tl
from kernels.linear import product, runs_on_onednn

# Bytes of fp32 logits held at a time, unless the caller says. On CPU larger chunks fall out of the cache and come as
# fresh pages from the operating system each time (measured: bench/loss.py); on CUDA the products need this much work.
CPU_CHUNK_BYTES = 16 * 2**20
CUDA_CHUNK_BYTES = 512 * 2**20
MIN_CHUNK_ROWS = 256  # fewer rows starve the matrix products, and each chunk passes over the weight's gradient once
PITCH = 16  # a row of the buffer starts at a multiple of this many logits, so that every load is whole and aligned
VOCABULARY_BLOCK = 4096  # logits that a program holds at a time: 16 a thread
NO_TOKEN = -1  # the best token of a row that is ignored


class LossSums(NamedTuple):
    """total: what to differentiate, cross-entropy and z-loss. cross_entropy: what to report; carries no gradient."""

    total: Tensor
    cross_entropy: Tensor


class TokenStatistics(NamedTuple):
    """Each token's log-probability of its target and entropy of its distribution, (N,) fp32 in nats, with gradients;
    the most probable token, (N,) int64. Where the target is ignored: 0, 0 and -1."""

    logprobs: Tensor
    entropy: Tensor
    top1: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_bytes: int | None = None,
    implementation: str = "torch",
) -> LossSums:
    """Σ w (−log softmax(hidden weightᵀ)[target] + z_loss · logsumexp²) over the tokens, in nats, as fp32 scalars.

    hidden (N, H), weight (V, H), targets (N,) int64; token_weights (N,), 1 by default and never differentiated; tokens
    whose target is ignore_index weigh nothing, so a batch of them gives 0 and zero gradients. softcap: logits become
    softcap · tanh(logits / softcap) (Gemma 2). z_loss: PaLM's, which keeps logits from drifting (1e-4 there).

    The matrix products run in autocast's dtype if it is on, else in hidden's; softmax, sums and the accumulation of
    the weight's gradient in fp32 (fp64 for fp64 input). Gradients come for hidden and weight where they ask for one; a
    frozen one costs nothing. Targets outside 0…V-1 raise ValueError on CPU. On CUDA checking would make the host wait:
    there they trip a device assertion ("torch") or make the sums and gradients NaN ("triton").
    """
    _check(hidden, weight, targets)
    grad = torch.is_grad_enabled()
    rows, dtype = _rows_per_chunk(hidden, weight, chunk_bytes), _compute_dtype(hidden)
    total, cross_entropy, _, _ = _linear_cross_entropy(
        hidden, weight, targets, token_weights, ignore_index, z_loss, softcap, rows, dtype, implementation,
        grad and hidden.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return LossSums(total, cross_entropy)


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    implementation: str = "torch",
) -> TokenStatistics:
    """What softmax(hidden weightᵀ / temperature) says of each token: the primitive of every fine-tuning stage.

    Shapes, dtypes, softcap (before the temperature) and errors are those of `linear_cross_entropy`; of equally probable
    tokens top1 is the first. Any gradient may come from above, one for each token, to logprobs and to entropy.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be above 0, it is {temperature}")
    _check(hidden, weight, targets)
    rows, dtype = _rows_per_chunk(hidden, weight, chunk_bytes), _compute_dtype(hidden)
    settings = temperature, softcap, ignore_index, rows, dtype, implementation
    return TokenStatistics(*_token_statistics(hidden, weight, targets, *settings)[:3])


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    fit = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fit or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"hidden, weight, targets must be (N, H), (V, H), (N,); they are {shapes}")


def _rows_per_chunk(hidden: Tensor, weight: Tensor, chunk_bytes: int | None) -> int:
    """As many rows as fit, then spread evenly, so the last chunk is not a sliver."""
    count, vocab = hidden.shape[0], weight.shape[0]
    least, budget = MIN_CHUNK_ROWS, CUDA_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES
    if chunk_bytes is not None:
        least, budget = 1, chunk_bytes
    rows = max(least, budget // (4 * vocab))
    chunks = max(1, -(-count // rows))
    return max(1, -(-count // chunks))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


# ------------------------------------------------------------------------------------------- a chunk in plain PyTorch


def _loss_chunk(
    logits: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, squares: Tensor,
    ignore_index: int, z_loss: float, softcap: float, want_gradient: bool,
) -> Tensor:  # fmt: skip
    """Fills losses and squares (of logsumexp), (rows,); returns d loss / d logits (rows, V) in the logits' dtype."""
    dtype = logits.dtype
    target = targets.where(targets != ignore_index, 0)[:, None]
    share = weights[:, None]  # 0 where ignored
    logits, slope = _capped(logits, softcap, losses.dtype)
    peak = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, target) - peak
    p = logits.sub_(peak).exp_()
    norm = p.sum(-1, keepdim=True)
    lse = norm.log() + peak
    losses.copy_((norm.log() - chosen)[:, 0])
    squares.copy_(lse[:, 0].square())
    if not want_gradient:
        return logits
    # of w (lse - chosen + z lse²): w ((1 + 2 z lse) p - onehot)
    p.mul_(share * (1 + 2 * z_loss * lse) / norm)
    p.scatter_add_(-1, target, -share)
    return (p if slope is None else p.mul_(slope)).to(dtype)


def _statistics_chunk(
    logits: Tensor, targets: Tensor, logprobs: Tensor, entropy: Tensor, top1: Tensor, lse: Tensor,
    temperature: float, softcap: float, ignore_index: int,
) -> None:  # fmt: skip
    """Fills the four statistics, (rows,) each."""
    kept = targets != ignore_index
    x = _capped(logits, softcap, lse.dtype)[0].div_(temperature)
    best = x.argmax(-1, keepdim=True)
    peak = x.gather(-1, best)
    chosen = x.gather(-1, targets.where(kept, 0)[:, None]) - peak
    p = x.sub_(peak).exp()
    norm = p.sum(-1, keepdim=True)
    log_norm = norm.log()
    mean = p.mul_(x).sum(-1, keepdim=True) / norm  # Σ p (x - peak)
    logprobs.copy_((chosen - log_norm)[:, 0].where(kept, 0.0))
    entropy.copy_((log_norm - mean)[:, 0].where(kept, 0.0))
    top1.copy_(best[:, 0].where(kept, NO_TOKEN))
    lse.copy_((log_norm + peak)[:, 0])


def _statistics_gradient_chunk(
    logits: Tensor, targets: Tensor, d_logprobs: Tensor, d_entropy: Tensor | None, lse: Tensor, entropy: Tensor,
    temperature: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """d / d logits (rows, V), in the logits' dtype, from the gradients with respect to the statistics."""
    dtype = logits.dtype
    kept = targets != ignore_index
    target = targets.where(kept, 0)[:, None]
    share = (d_logprobs.where(kept, 0.0) / temperature)[:, None]
    x, slope = _capped(logits, softcap, lse.dtype)
    logp = x.div_(temperature).sub_(lse[:, None])
    if d_entropy is None:
        grad = logp.exp_().mul_(-share)
    else:  # of the entropy: -p (log p + entropy)
        entropy_share = (d_entropy.where(kept, 0.0) / temperature)[:, None]
        p = logp.exp()
        grad = logp.add_(entropy[:, None]).mul_(-entropy_share).sub_(share).mul_(p)
    grad.scatter_add_(-1, target, share)
    return (grad if slope is None else grad.mul_(slope)).to(dtype)


def _capped(logits: Tensor, softcap: float, stats: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits in the dtype of the statistics, and d logits / d raw logits where a softcap bends them."""
    logits = logits.to(stats)
    if not softcap:
        return logits, None
    bent = logits.div_(softcap).tanh_()
    slope = 1 - bent.square()
    return bent.mul_(softcap), slope


# -------------------------------------------------------------------------------------------- a chunk in Triton kernels


@jit
def _tanh(x):
    shrunk = tl.exp(-2 * tl.abs(x))  # at most 1: never inf / inf
    size = (1 - shrunk) / (1 + shrunk)
    return tl.where(x < 0, -size, size)


@jit
def _logit(raw, softcap, inverse_temperature, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        raw = softcap * _tanh(raw / softcap)
    return raw * inverse_temperature


@jit
def _sweep(
    LOGITS, vocab, pitch, softcap, inverse_temperature,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """(peak, Σ exp(x - peak), Σ exp(x - peak) (x - peak), first column of the peak) of a row, read once.

    Each lane keeps its own running peak and sums, rescaled when the peak rises (Milakov & Gimelshein 2018), so the
    lanes meet only once, at the end. The last two are 0 unless STATISTICS.
    """
    LOWEST: tl.constexpr = -1e30  # finite: differences with it are too
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(LOGITS + column, mask=column < pitch, other=0.0).to(tl.float32)
        x = tl.where(column < vocab, _logit(raw, softcap, inverse_temperature, SOFTCAP), LOWEST)
        rise = x - peak
        ratio = tl.exp(-tl.abs(rise))
        if STATISTICS:
            moment = tl.where(rise > 0, ratio * (moment - norm * rise), moment + ratio * rise)
            best = tl.where(rise > 0, column, best)
        norm = tl.where(rise > 0, norm * ratio + 1, norm + ratio)
        peak = tl.maximum(peak, x)
    top = tl.max(peak, 0)
    ratio = tl.exp(peak - top)
    total_moment, first = 0.0, 0
    if STATISTICS:
        total_moment = tl.sum(ratio * (moment + norm * (peak - top)), 0)
        first = tl.min(tl.where(peak == top, best, vocab), 0)
    return top, tl.sum(norm * ratio, 0), total_moment, first


@jit
def _write_gradient(
    LOGITS, vocab, pitch, softcap, inverse_temperature, target, shift, p_share, logp_share, target_share,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Over a row of logits: (p (p_share + logp_share · log p) + target_share · onehot) · d logit / d raw logit.

    p is exp(x - shift): with another shift than logsumexp, the rest of the normalisation is in p_share.
    """
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(LOGITS + column, mask=column < pitch, other=0.0).to(tl.float32)
        logp = tl.where(column < vocab, _logit(raw, softcap, inverse_temperature, SOFTCAP) - shift, 0.0)
        if ENTROPY:
            grad = tl.exp(logp) * (p_share + logp_share * logp)
        else:
            grad = tl.exp(logp) * p_share
        grad += tl.where(column == target, target_share, 0.0)
        if SOFTCAP:
            bent = _tanh(raw / softcap)
            grad *= 1 - bent * bent
        tl.store(LOGITS + column, grad.to(LOGITS.dtype.element_ty), mask=column < pitch)


@jit
def _write_zeros(LOGITS, vocab, pitch, BLOCK: tl.constexpr):
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(LOGITS + column, tl.zeros((BLOCK,), LOGITS.dtype.element_ty), mask=column < pitch)


@jit
def _loss_kernel(
    LOGITS, TARGETS, WEIGHTS, LOSSES, SQUARES, vocab, pitch, ignore_index, z_loss, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A row: its loss and squared logsumexp, and with GRADIENT the loss's gradient in the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * pitch
    target = tl.load(TARGETS + row)
    if target == ignore_index:
        tl.store(LOSSES + row, 0.0)
        tl.store(SQUARES + row, 0.0)
        if GRADIENT:
            _write_zeros(LOGITS, vocab, pitch, BLOCK)
        return
    real = (target >= 0) & (target < vocab)  # any other is not read, and the row becomes NaN
    raw = tl.load(LOGITS + target, mask=real, other=float("nan")).to(tl.float32)
    chosen = _logit(raw, softcap, 1.0, SOFTCAP)  # before anything is written over it
    peak, norm, _, _ = _sweep(LOGITS, vocab, pitch, softcap, 1.0, BLOCK, SOFTCAP, False)
    lse = peak + tl.log(norm)
    tl.store(LOSSES + row, tl.log(norm) + (peak - chosen))
    tl.store(SQUARES + row, lse * lse)
    if GRADIENT:
        # of w (lse - chosen + z lse²): w ((1 + 2 z lse) p - onehot)
        share = tl.where(real, tl.load(WEIGHTS + row), float("nan"))
        p_share = share * (1 + 2 * z_loss * lse) / norm
        _write_gradient(LOGITS, vocab, pitch, softcap, 1.0, target, peak, p_share, 0.0, -share, BLOCK, SOFTCAP, False)


@jit
def _statistics_kernel(
    LOGITS, TARGETS, LOGPROBS, ENTROPY, TOP1, LSE, vocab, pitch, ignore_index, softcap, inverse_temperature,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, NO_TOKEN: tl.constexpr,
):  # fmt: skip
    """A row: the log-probability of its target, its entropy, its best token and its logsumexp."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * pitch
    target = tl.load(TARGETS + row)
    if target == ignore_index:
        tl.store(LOGPROBS + row, 0.0)
        tl.store(ENTROPY + row, 0.0)
        tl.store(TOP1 + row, NO_TOKEN)
        tl.store(LSE + row, 0.0)
        return
    real = (target >= 0) & (target < vocab)
    raw = tl.load(LOGITS + target, mask=real, other=float("nan")).to(tl.float32)
    chosen = _logit(raw, softcap, inverse_temperature, SOFTCAP)
    peak, norm, moment, best = _sweep(LOGITS, vocab, pitch, softcap, inverse_temperature, BLOCK, SOFTCAP, True)
    tl.store(LOGPROBS + row, (chosen - peak) - tl.log(norm))
    tl.store(ENTROPY + row, tl.log(norm) - moment / norm)
    tl.store(TOP1 + row, best.to(tl.int64))
    tl.store(LSE + row, peak + tl.log(norm))


@jit
def _statistics_gradient_kernel(
    LOGITS, TARGETS, D_LOGPROBS, D_ENTROPY, LSE, ENTROPY, vocab, pitch, ignore_index, softcap, inverse_temperature,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """A row's gradient in the place of its logits, from the gradients with respect to its statistics."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * pitch
    target = tl.load(TARGETS + row)
    if target == ignore_index:
        _write_zeros(LOGITS, vocab, pitch, BLOCK)
        return
    share = tl.load(D_LOGPROBS + row) * inverse_temperature
    share = tl.where((target >= 0) & (target < vocab), share, float("nan"))
    p_share, logp_share = -share, 0.0
    if HAS_ENTROPY:  # of the entropy: -p (log p + entropy)
        logp_share = -tl.load(D_ENTROPY + row) * inverse_temperature
        p_share += logp_share * tl.load(ENTROPY + row)
    _write_gradient(
        LOGITS, vocab, pitch, softcap, inverse_temperature, target, tl.load(LSE + row), p_share, logp_share, share,
        BLOCK, SOFTCAP, HAS_ENTROPY,
    )  # fmt: skip


def _layout(logits: Tensor, softcap: float) -> dict:
    """One program a row; the constants of every launch."""
    block = min(next_power_of_2(logits.shape[1]), VOCABULARY_BLOCK)
    return {"BLOCK": block, "SOFTCAP": softcap != 0, "num_warps": num_warps(block)}


def launch_loss(
    logits: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, squares: Tensor,
    ignore_index: int, z_loss: float, softcap: float, want_gradient: bool,
) -> Tensor:  # fmt: skip
    """As `_loss_chunk`, for logits whose rows are whole and apart by a stride; the gradient is written over them."""
    check_dtypes("linear_cross_entropy", logits)
    _loss_kernel[(len(logits),)](
        logits, targets, weights, losses, squares, logits.shape[1], logits.stride(0), ignore_index, z_loss, softcap,
        GRADIENT=want_gradient, **_layout(logits, softcap),
    )  # fmt: skip
    return logits


def launch_statistics(
    logits: Tensor, targets: Tensor, logprobs: Tensor, entropy: Tensor, top1: Tensor, lse: Tensor,
    temperature: float, softcap: float, ignore_index: int,
) -> None:  # fmt: skip
    """As `_statistics_chunk`."""
    check_dtypes("token_statistics", logits)
    _statistics_kernel[(len(logits),)](
        logits, targets, logprobs, entropy, top1, lse, logits.shape[1], logits.stride(0), ignore_index, softcap,
        1 / temperature, NO_TOKEN=NO_TOKEN, **_layout(logits, softcap),
    )  # fmt: skip


def launch_statistics_gradient(
    logits: Tensor, targets: Tensor, d_logprobs: Tensor, d_entropy: Tensor | None, lse: Tensor, entropy: Tensor,
    temperature: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """As `_statistics_gradient_chunk`; the gradient is written over the logits."""
    _statistics_gradient_kernel[(len(logits),)](
        logits, targets, d_logprobs, d_entropy, lse, entropy, logits.shape[1], logits.stride(0), ignore_index, softcap,
        1 / temperature, HAS_ENTROPY=d_entropy is not None, **_layout(logits, softcap),
    )  # fmt: skip
    return logits


# ------------------------------------------------------------------------------------------------- operators: the loss


def _on_onednn(hidden: Tensor, weight: Tensor, implementation: str) -> bool:
    """Whether the products run there; Triton's kernels want logits in rows that are padded."""
    return implementation == "torch" and runs_on_onednn(hidden, weight)


def _chunks(hidden: Tensor, weight: Tensor, rows: int, onednn: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(part of the rows, their hidden states in the weight's dtype, their logits), the logits always in one buffer; but
    oneDNN's are its own."""
    vocab = len(weight)
    buffer = None
    if not onednn:
        buffer = torch.empty(rows, -(-vocab // PITCH) * PITCH, device=weight.device, dtype=weight.dtype)
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        h = hidden[part].to(weight.dtype)
        yield part, h, product(h, weight) if buffer is None else torch.mm(h, weight.t(), out=buffer[: len(h), :vocab])


def _new_gradients(
    hidden: Tensor, weight: Tensor, stats: torch.dtype, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """Room for the gradients of hidden, in its dtype, and of weight, zeros; empty where nobody asks."""
    grad_hidden = torch.empty(hidden.shape if want_hidden else 0, device=hidden.device, dtype=hidden.dtype)
    return grad_hidden, torch.zeros(weight.shape if want_weight else 0, device=weight.device, dtype=stats)


def _add_gradients(
    gradients: tuple[Tensor, Tensor], part: slice, grad: Tensor, h: Tensor, w: Tensor, onednn: bool
) -> None:
    """From grad (rows, V) of the logits h wᵀ. The weight's is summed over the chunks in fp32: a bf16 sum loses a bit
    for every fourfold number of them."""
    grad_hidden, grad_weight = gradients
    if grad_hidden.numel():
        grad_hidden[part] = product(grad, w.t()) if onednn else grad @ w
    if not grad_weight.numel():
        return
    if onednn:
        grad_weight += product(grad.t(), h.t())
    elif grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.t(), h)
    elif grad.is_cuda and torch.version.hip is None:  # the product is added to the sum before anything is rounded
        torch.addmm(grad_weight, grad.t(), h, out_dtype=grad_weight.dtype, out=grad_weight)
    else:
        grad_weight += grad.t() @ h


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if targets.is_cpu and (wrong := ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)).any():
        raise ValueError(f"target {targets[wrong][0].item()} is outside the vocabulary of {vocab}")


@torch.library.custom_op("groundup::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None,
    ignore_index: int, z_loss: float, softcap: float, rows: int, dtype: torch.dtype, implementation: str,
    want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(total, cross-entropy, d total / d hidden, d total / d weight in fp32); a gradient not wanted is empty."""
    _check_targets(targets, len(weight), ignore_index)
    chunk = launch_loss if implementation == "triton" else _loss_chunk
    with torch.autocast(hidden.device.type, enabled=False):
        stats = torch.promote_types(dtype, torch.float32)
        w, targets = weight.to(dtype), targets.contiguous()
        onednn = _on_onednn(hidden, w, implementation)
        kept = targets != ignore_index
        scale = kept.to(stats) if token_weights is None else token_weights.to(stats).where(kept, 0.0)
        losses = torch.empty(len(targets), device=hidden.device, dtype=stats)
        squares = torch.empty_like(losses)
        gradients = _new_gradients(hidden, weight, stats, want_hidden, want_weight)
        want = want_hidden or want_weight
        for part, h, logits in _chunks(hidden, w, rows, onednn):
            row = targets[part], scale[part], losses[part], squares[part]
            grad = chunk(logits, *row, ignore_index, z_loss, softcap, want)
            if want:
                _add_gradients(gradients, part, grad, h, w, onednn)
        cross_entropy = (losses * scale).sum()
        total = cross_entropy + z_loss * (squares * scale).sum() if z_loss else cross_entropy.clone()
    return total, cross_entropy, *gradients


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, token_weights, ignore_index, z_loss, softcap, rows, dtype, _, want_hidden, want_weight):
    stats = torch.promote_types(dtype, torch.float32)
    total, cross_entropy = (hidden.new_empty((), dtype=stats) for _ in range(2))
    return total, cross_entropy, *_new_gradients(hidden, weight, stats, want_hidden, want_weight)


def _save_loss(ctx, inputs, output):
    ctx.weight_dtype, ctx.wants = inputs[1].dtype, inputs[-2:]
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_loss(ctx, upstream, *_):
    grad_hidden, grad_weight = ctx.saved_tensors
    want_hidden, want_weight = ctx.wants
    upstream = upstream[None, None]  # a scalar would be rounded to hidden's dtype, and overflow in fp16
    hidden = (grad_hidden * upstream).to(grad_hidden.dtype) if want_hidden else None
    weight = (grad_weight * upstream).to(ctx.weight_dtype) if want_weight else None
    return hidden, weight, *[None] * 10


_linear_cross_entropy.register_autograd(_differentiate_loss, setup_context=_save_loss)


# ------------------------------------------------------------------------------------------- operators: the statistics


def _new_statistics(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = torch.promote_types(dtype, torch.float32)
    new = partial(torch.empty, hidden.shape[0], device=hidden.device)
    return new(dtype=stats), new(dtype=stats), new(dtype=torch.int64), new(dtype=stats)


@torch.library.custom_op("groundup::token_statistics", mutates_args=())
def _token_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    temperature: float, softcap: float, ignore_index: int, rows: int, dtype: torch.dtype, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log-probabilities, entropies, best tokens, logsumexp for the backward pass)."""
    _check_targets(targets, len(weight), ignore_index)
    chunk = launch_statistics if implementation == "triton" else _statistics_chunk
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = logprobs, entropies, best, lse = _new_statistics(hidden, dtype)
        targets = targets.contiguous()
        w = weight.to(dtype)
        for part, _, logits in _chunks(hidden, w, rows, _on_onednn(hidden, w, implementation)):
            into = logprobs[part], entropies[part], best[part], lse[part]
            chunk(logits, targets[part], *into, temperature, softcap, ignore_index)
    return outputs


@torch.library.custom_op("groundup::token_statistics_backward", mutates_args=())
def _token_statistics_backward(
    d_logprobs: Tensor, d_entropy: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    entropy: Tensor, temperature: float, softcap: float, ignore_index: int, rows: int, dtype: torch.dtype,
    implementation: str, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients for hidden and for the weight, in their dtypes; one not wanted is empty."""
    chunk = launch_statistics_gradient if implementation == "triton" else _statistics_gradient_chunk
    with torch.autocast(hidden.device.type, enabled=False):
        w, targets, d_logprobs = weight.to(dtype), targets.contiguous(), d_logprobs.contiguous()
        onednn = _on_onednn(hidden, w, implementation)
        d_entropy = None if d_entropy is None else d_entropy.contiguous()
        gradients = _new_gradients(hidden, weight, lse.dtype, want_hidden, want_weight)
        for part, h, logits in _chunks(hidden, w, rows, onednn):
            above = d_logprobs[part], None if d_entropy is None else d_entropy[part]
            row = targets[part], *above, lse[part], entropy[part]
            grad = chunk(logits, *row, temperature, softcap, ignore_index)
            _add_gradients(gradients, part, grad, h, w, onednn)
    return gradients[0], gradients[1].to(weight.dtype)


@_token_statistics.register_fake
def _(hidden, weight, targets, temperature, softcap, ignore_index, rows, dtype, implementation):
    return _new_statistics(hidden, dtype)


@_token_statistics_backward.register_fake
def _(
    d_logprobs, d_entropy, hidden, weight, targets, lse, entropy,
    temperature, softcap, ignore_index, rows, dtype, implementation, want_hidden, want_weight,
):  # fmt: skip
    return _new_gradients(hidden, weight, weight.dtype, want_hidden, want_weight)


def _save_statistics(ctx, inputs, output):
    hidden, weight, targets, *ctx.settings = inputs
    _, entropy, top1, lse = output
    ctx.save_for_backward(hidden, weight, targets, lse, entropy)
    ctx.mark_non_differentiable(top1, lse)
    ctx.set_materialize_grads(False)  # no entropy, no work for it


def _differentiate_statistics(ctx, d_logprobs, d_entropy, *_):
    lse = ctx.saved_tensors[3]
    wants = ctx.needs_input_grad[:2]
    d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs
    gradients = _token_statistics_backward(d_logprobs, d_entropy, *ctx.saved_tensors, *ctx.settings, *wants)
    return *(gradient if wanted else None for gradient, wanted in zip(gradients, wants, strict=True)), *[None] * 7


_token_statistics.register_autograd(_differentiate_statistics, setup_context=_save_statistics)


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py): an odd vocabulary, a large one,
    full precision, and a softcap."""

    def launch(vocab: int, dtype: torch.dtype, softcap: float) -> None:
        with torch.device("meta"):
            logits = torch.empty(256, -(-vocab // PITCH) * PITCH, dtype=dtype)[:, :vocab]
            targets, rows = torch.empty(256, dtype=torch.int64), torch.empty(256)
        launch_loss(logits, targets, rows, rows, rows, -100, 1e-4, softcap, True)
        launch_statistics(logits, targets, rows, rows, targets, rows, 0.7, softcap, -100)
        launch_statistics_gradient(logits, targets, rows, rows, rows, rows, 0.7, softcap, -100)

    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [(50257, bf16, 0.0), (128256, bf16, 0.0), (32000, fp32, 0.0), (256000, bf16, 30.0)]
    return [
        (f"{vocab} {dtype}{' softcap' if cap else ''}".replace("torch.", ""), "memory",
         lambda vocab=vocab, dtype=dtype, cap=cap: launch(vocab, dtype, cap))
        for vocab, dtype, cap in shapes
    ]  # fmt: skip
