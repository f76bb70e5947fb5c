"""What does the model's last matrix product cost when its result, the logits, is never whole in memory?

A vocabulary of 32,000 and 4,096 tokens make 0.5 GB of fp32 logits, and as much again for their gradient. Here they
exist a few rows at a time. `linear_cross_entropy` makes the gradients in the forward pass, while a chunk's logits are
at hand (Liger-Kernel, Hsu et al. 2024), so the loss must be summed, not returned per token. `token_logprobs` is per
token, and recomputes each chunk's logits in the backward pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of fp32 logits held at a time, unless the caller says. On CPU larger chunks fall out of the cache and come as
# fresh pages from the operating system each time (measured: bench/loss.py); on CUDA the products need this much work.
CPU_CHUNK_BYTES = 16 * 2**20
CUDA_CHUNK_BYTES = 512 * 2**20
MIN_CHUNK_ROWS = 256  # fewer rows starve the matrix products, and each chunk passes over the weight's gradient once


class LossSums(NamedTuple):
    """total: what to differentiate, cross-entropy and z-loss. cross_entropy: what to report; carries no gradient."""

    total: Tensor
    cross_entropy: Tensor


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
) -> LossSums:
    """Σ w (−log softmax(hidden weightᵀ)[target] + z_loss · logsumexp²) over the tokens, in nats, as fp32 scalars.

    hidden (N, H), weight (V, H), targets (N,) int64; token_weights (N,), 1 by default and never differentiated; tokens
    whose target is ignore_index weigh nothing, so a batch of them gives 0 and zero gradients. softcap: logits become
    softcap · tanh(logits / softcap) (Gemma 2). z_loss: PaLM's, which keeps logits from drifting (1e-4 there).

    The matrix products run in autocast's dtype if it is on, else in hidden's; softmax, sums and the accumulation of
    the weight's gradient in fp32 (fp64 for fp64 input). Gradients come for hidden and weight where they ask for one; a
    frozen one costs nothing. Targets outside 0…V-1 raise ValueError on CPU; on CUDA they trip a device assertion,
    because checking would make the host wait.
    """
    _check(hidden, weight, targets, ignore_index)
    grad = torch.is_grad_enabled()
    total, cross_entropy = _LinearCrossEntropy.apply(
        hidden,
        weight,
        targets,
        token_weights,
        ignore_index,
        z_loss,
        softcap,
        _rows_per_chunk(hidden, weight, chunk_bytes),
        _compute_dtype(hidden),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
    )
    return LossSums(total, cross_entropy)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor | None,
        ignore_index: int,
        z_loss: float,
        softcap: float,
        rows: int,
        dtype: torch.dtype,
        want_hidden: bool,
        want_weight: bool,
    ):
        with torch.autocast(hidden.device.type, enabled=False):
            stats = torch.promote_types(dtype, torch.float32)
            w = weight.to(dtype)
            kept = targets != ignore_index
            targets = targets.where(kept, 0)
            scale = kept.to(stats) if token_weights is None else token_weights.to(stats).where(kept, 0.0)
            losses = torch.empty(len(targets), device=hidden.device, dtype=stats)
            squares = torch.empty_like(losses)
            grad_hidden = torch.empty_like(hidden) if want_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=stats) if want_weight else None
            for part in _parts(len(targets), rows):
                h, target = hidden[part].to(dtype), targets[part, None]
                logits, slope = _logits(h, w, softcap, stats)  # (rows, V)
                peak = logits.amax(-1, keepdim=True)
                chosen = logits.gather(-1, target)
                p = logits.sub_(peak).exp_()
                norm = p.sum(-1, keepdim=True)
                lse = norm.log() + peak
                losses[part] = (lse - chosen)[:, 0]
                squares[part] = lse[:, 0].square()
                if not (want_hidden or want_weight):
                    continue
                # d/dlogits of w (lse - chosen + z lse²) = w ((1 + 2 z lse) p - onehot)
                share = scale[part, None]
                p.mul_(share * (1 + 2 * z_loss * lse) / norm)
                p.scatter_add_(-1, target, -share)
                grad = (p if slope is None else p.mul_(slope)).to(dtype)
                if want_hidden:
                    grad_hidden[part] = grad @ w
                if want_weight:
                    _accumulate(grad_weight, grad, h)
            cross_entropy = (losses * scale).sum()
            total = cross_entropy + z_loss * (squares * scale).sum() if z_loss else cross_entropy.clone()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return total, cross_entropy

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 9


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log softmax(hidden weightᵀ / temperature)[target] of each token, (N,) fp32, 0 where target is ignore_index.

    Shapes, dtypes, softcap and errors are those of `linear_cross_entropy`; any gradient may come from above.
    """
    _check(hidden, weight, targets, ignore_index)
    rows = _rows_per_chunk(hidden, weight, chunk_bytes)
    return _TokenLogprobs.apply(
        hidden, weight, targets, temperature, ignore_index, softcap, rows, _compute_dtype(hidden)
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        ignore_index: int,
        softcap: float,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            stats = torch.promote_types(dtype, torch.float32)
            w = weight.to(dtype)
            kept = targets != ignore_index
            targets = targets.where(kept, 0)
            lse = torch.empty(len(targets), device=hidden.device, dtype=stats)
            chosen = torch.empty_like(lse)
            for part in _parts(len(targets), rows):
                logits = _logits(hidden[part].to(dtype), w, softcap, stats)[0].div_(temperature)
                lse[part] = logits.logsumexp(-1)
                chosen[part] = logits.gather(-1, targets[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, targets, kept, lse)
        ctx.settings = temperature, softcap, rows, dtype
        return (chosen - lse).where(kept, 0.0)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        hidden, weight, targets, kept, lse = ctx.saved_tensors
        temperature, softcap, rows, dtype = ctx.settings
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            scale = upstream.where(kept, 0.0) / temperature
            grad_hidden = torch.empty_like(hidden) if want_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if want_weight else None
            for part in _parts(len(targets), rows):
                h, share = hidden[part].to(dtype), scale[part, None]
                logits, slope = _logits(h, w, softcap, lse.dtype)
                p = logits.div_(temperature).sub_(lse[part, None]).exp_()
                p.mul_(-share).scatter_add_(-1, targets[part, None], share)  # (onehot - p) · share
                grad = (p if slope is None else p.mul_(slope)).to(dtype)
                if want_hidden:
                    grad_hidden[part] = grad @ w
                if want_weight:
                    _accumulate(grad_weight, grad, h)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


def _logits(h: Tensor, w: Tensor, softcap: float, stats: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(rows, V) logits in the dtype of the statistics, and d logits / d raw logits where a softcap bends them."""
    logits = (h @ w.t()).to(stats)
    if not softcap:
        return logits, None
    bent = logits.div_(softcap).tanh_()
    slope = 1 - bent.square()
    return bent.mul_(softcap), slope


def _accumulate(grad_weight: Tensor, grad: Tensor, h: Tensor) -> None:
    """grad_weight += gradᵀ h, the sum in fp32: bf16 sums lose a bit for every fourfold number of chunks."""
    if grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.t(), h)
    else:
        grad_weight += grad.t() @ h


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _rows_per_chunk(hidden: Tensor, weight: Tensor, chunk_bytes: int | None) -> int:
    """As many rows as fit, then spread evenly, so the last chunk is not a sliver."""
    if chunk_bytes is None:
        rows = max(MIN_CHUNK_ROWS, (CUDA_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES) // (4 * len(weight)))
    else:
        rows = max(1, chunk_bytes // (4 * len(weight)))
    chunks = max(1, -(-len(hidden) // rows))
    return max(1, -(-len(hidden) // chunks))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"hidden, weight, targets must be (N, H), (V, H), (N,); they are {shapes}")
    if targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= len(weight))) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(f"target {targets[wrong][0].item()} is outside the vocabulary of {len(weight)}")
