"""What do logits say of each token whose vocabulary several ranks share, without that any of them has all logits of a token?

Each rank computes the logits of its own tokens of the vocabulary, a few rows at a time, and keeps of each row the largest, the
sums over exponentials and the target's, if that is its own. These few figures are gathered, and give the whole row's
(Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, §3). Logits are computed again in the backward pass. Plain PyTorch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from context import collectives
from kernels.linear_cross_entropy import (
    NO_TOKEN,
    _add_gradients,
    _capped,
    _chunks,
    _compute_dtype,
    _new_gradients,
    _on_onednn,
    _rows_per_chunk,
)


class SplitStatistics(NamedTuple):
    """As linear_cross_entropy.TokenStatistics, and the logsumexp of each token's logits (N,), with a gradient, too."""

    logprobs: Tensor
    entropy: Tensor
    top1: Tensor
    lse: Tensor


def split_token_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    group: str, size: int, first: int, temperature: float = 1.0, softcap: float = 0.0, ignore_index: int = -100,
) -> SplitStatistics:  # fmt: skip
    """Of hidden states (N, H), the same on all ranks, and of this rank's rows `first` … of the head's weight (V, H).

    targets (N,) are tokens of the whole vocabulary. Any gradient may come from above to logprobs, entropy and lse, the same on
    all ranks; what hidden gets is this rank's part of its gradient, to be summed. Where the target is ignored all are 0.
    """
    rows, dtype = _rows_per_chunk(hidden, weight, None) if len(weight) else 1, _compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return SplitStatistics(
            *_Statistics.apply(
                hidden, weight, targets, first, group, size, temperature, softcap, ignore_index, rows, dtype
            )
        )


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, group: str, size: int, *settings: Any
    ):
        temperature, softcap, ignore_index, rows, dtype = settings
        stats = torch.promote_types(dtype, torch.float32)
        # of each token: the largest logit of this part and its number, Σ exp, Σ exp · x, the target's logit if it is here
        found = torch.zeros(5, len(targets), dtype=torch.float64, device=hidden.device)
        found[0] = -torch.inf
        w = weight.to(dtype)
        if len(w):
            for part, _, logits in _chunks(hidden, w, rows, _on_onednn(hidden, w, "torch")):
                x = _capped(logits, softcap, stats)[0].div_(temperature)
                peak, best = x.max(-1)
                place = (targets[part] - first)[:, None]
                inside = (place >= 0) & (place < len(w))
                chosen = torch.where(inside, x.gather(-1, place.where(inside, 0)), 0.0)[:, 0]
                p = x.sub_(peak[:, None]).exp()
                found[:, part] = torch.stack(
                    [one.double() for one in (peak, best + first, p.sum(-1), p.mul_(x).sum(-1), chosen)]
                )
        parts = collectives.wait_tensor(collectives.all_gather_into_tensor(found, size, group)).view(size, 5, -1)
        peaks, best, sums, moments, chosen = parts.unbind(1)  # (size, N) each
        peak, holder = peaks.max(0)  # of equal ones the first, as one rank would
        share = (peaks - peak).exp()
        norm = (share * sums).sum(0)
        moment = (share * (moments + torch.where(sums > 0, peaks - peak, 0.0) * sums)).sum(0) / norm  # Σ p (x - peak)
        lse = (norm.log() + peak).to(stats)
        kept = targets != ignore_index
        logprobs = torch.where(kept, (chosen.sum(0) - peak) - norm.log(), 0.0).to(stats)
        entropy = torch.where(kept, norm.log() - moment, 0.0).to(stats)
        top1 = torch.where(kept, best.gather(0, holder[None])[0].long(), NO_TOKEN)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.first, ctx.settings = first, settings
        ctx.mark_non_differentiable(top1)
        return logprobs, entropy, top1, lse.where(kept, 0.0)

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor, _: Any, d_lse: Tensor):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, softcap, ignore_index, rows, dtype = ctx.settings
        kept = targets != ignore_index
        ups = [up.where(kept, 0.0)[:, None] / temperature for up in (d_logprobs, d_entropy, d_lse)]
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            onednn = _on_onednn(hidden, w, "torch")
            gradients = _new_gradients(hidden, weight, lse.dtype, *ctx.needs_input_grad[:2])
            if not len(w) and gradients[0].numel():
                gradients[0].zero_()
            for part, h, logits in _chunks(hidden, w, rows, onednn) if len(w) else ():
                x, slope = _capped(logits, softcap, lse.dtype)
                logp = x.div_(temperature).sub_(lse[part, None])
                up, up_entropy, up_lse = (each[part] for each in ups)
                grad = logp.exp() * (up_lse - up - up_entropy * (logp + entropy[part, None]))
                place = (targets[part] - ctx.first)[:, None]
                inside = (place >= 0) & (place < len(w))
                grad.scatter_add_(-1, place.where(inside, 0), up.where(inside, 0.0))
                grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
                _add_gradients(gradients, part, grad, h, w, onednn)
        of_hidden, of_weight = (
            gradient if wanted else None for gradient, wanted in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), *[None] * 9
