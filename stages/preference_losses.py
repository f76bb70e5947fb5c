"""Which loss makes a model prefer one answer to another? Six answers, each a line on the same columns.

All are functions of log-probabilities of whole answers, log π(y|x) = Σ_t log π(y_t | x, y_<t), under the model that
learns and under the reference it started from. Shapes are (N,), dtype fp32; each returns N losses, to be summed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAIR_LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")
_LN_2 = 0.6931471805599453
_ALMOST_ZERO = -1e-6


@dataclass(frozen=True)
class Pairs:
    """N pairs of answers to the same prompt: log-probabilities of the model, numbers of tokens, and log-probabilities of
    the reference (None for losses in WITHOUT_REFERENCE)."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """log π/π_ref of the chosen answers."""
        assert self.reference_chosen is not None, "this loss needs a reference"
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        assert self.reference_rejected is not None, "this loss needs a reference"
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """log π a token of the chosen answers."""
        return self.chosen / self.chosen_length

    @property
    def rejected_mean(self) -> Tensor:
        return self.rejected / self.rejected_length


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): −log σ(β Δ), Δ the difference of the log-ratios.

    With label_smoothing ε, conservative DPO (Mitchell 2023), for labels wrong with probability ε:
    −(1−ε) log σ(β Δ) − ε log σ(−β Δ). "Robust" DPO, (−(1−ε) log σ(β Δ) + ε log σ(−β Δ)) / (1−2ε), is another loss.
    """
    logits = beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): (Δ − 1/(2β))², β being τ there, of log-ratios a token.

    The paper does not speak of lengths; its authors told TRL's that its results are with means, not sums.
    """
    chosen = pairs.chosen_ratio / pairs.chosen_length
    return (chosen - pairs.rejected_ratio / pairs.rejected_length - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023) on DPO's rewards (Liu et al. 2023, RSO's hinge-norm): max(0, 1 − β Δ)."""
    return torch.relu(1 - beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def simpo(pairs: Pairs, *, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): −log σ(β (mean_chosen − mean_rejected) − γ). No reference."""
    return -F.logsigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean) - gamma)


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6 and 7): −mean_chosen − λ log σ(log odds_chosen − log odds_rejected), β being λ there.

    P is the geometric mean of the tokens' probabilities and odds = P / (1 − P). No reference. The first term is SFT on
    the chosen answer, without its prompt, as the paper has it (TRL's includes the prompt).
    """
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def kto(
    logprobs: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor,
    *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """KTO (Ethayarajh et al. 2024, §4.1): λ (1 − σ(±β (log π/π_ref − KL))), + and λ_D for desirable answers, − and λ_U
    for others.

    desirable (N,): 1 or 0. kl: how far the model is from the reference, at least 0, estimated on answers to other
    prompts (`kl_estimate`); a scalar or (N,), never differentiated.
    """
    sign = 2 * desirable - 1
    weight = desirable_weight * desirable + undesirable_weight * (1 - desirable)
    return weight * (1 - torch.sigmoid(sign * beta * (logprobs - reference - kl.detach())))


def kl_estimate(log_ratio_sum: float, count: float) -> float:
    """KTO's KL: the mean of log π/π_ref over mismatched pairs of prompt and answer of the whole batch, at least 0."""
    return max(0.0, log_ratio_sum / max(1.0, count))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x ≤ 0 without cancellation (Mächler 2012).

    An x above −1e-6, where fp32 soon cannot tell exp(x) from 1, counts as that, since −∞ has no gradient.
    """
    x = x.clamp(max=_ALMOST_ZERO)
    return torch.where(x > -_LN_2, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
