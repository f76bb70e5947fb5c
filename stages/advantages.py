"""By how much was what the policy did better than expected? Advantages, and the distance that it may go.

Pure functions, each with its equation, in float64 where they take arrays. Rows are answers, columns their tokens; `valid`
says which columns a row has. What is not valid decides nothing and gets 0.
"""

import numpy as np
from torch import Tensor


def generalised_advantages(
    rewards: np.ndarray, values: np.ndarray, valid: np.ndarray, *, discount: float, trace: float
) -> np.ndarray:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t (Schulman et al. 2016, eq. 16). All (rows, T).

    discount γ, trace λ. V after a row's last valid token is 0: the answer is over. Where `valid` has a hole, such as what
    an environment wrote between two turns, the next valid token follows directly.
    """
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    advantages = np.zeros_like(rewards)
    carried, next_value = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + discount * next_value - values[:, t] + discount * trace * carried
        carried = np.where(valid[:, t], advantage, carried)
        next_value = np.where(valid[:, t], values[:, t], next_value)
        advantages[:, t] = np.where(valid[:, t], advantage, 0.0)
    return advantages


def whiten(values: np.ndarray, valid: np.ndarray, *, keep_mean: bool = False) -> np.ndarray:
    """(x - mean) / √(variance + 1e-8) over the valid entries, the variance with n - 1. Hand in those of all ranks.

    keep_mean: the mean is put back, as for rewards, whose level means something; advantages have none.
    """
    chosen = values[valid].astype(np.float64)
    if len(chosen) < 2:
        return np.where(valid, values, 0.0) if keep_mean else np.zeros(values.shape)
    mean = chosen.mean()
    whitened = (values - mean) / np.sqrt(chosen.var(ddof=1) + 1e-8) + (mean if keep_mean else 0.0)
    return np.where(valid, whitened, 0.0)


def group_advantages(rewards: np.ndarray, *, scale: str = "group", epsilon: float = 1e-4) -> np.ndarray:
    """(r - mean of the group) / (standard deviation + epsilon), for rewards (groups, answers) (Shao et al. 2024, §4.1.2).

    scale: the deviation, with n - 1, of the "group", of the whole "batch", or "none" (Dr. GRPO; Liu et al. 2025).
    NaN is an answer that no reward could judge: it counts nowhere and gets 0. A group of equal rewards gets exactly 0,
    whatever its mean rounds to.
    """
    rewards = rewards.astype(np.float64)
    judged = ~np.isnan(rewards)
    known = np.where(judged, rewards, 0.0)
    counts = judged.sum(1, keepdims=True)
    centred = np.where(judged, known - known.sum(1, keepdims=True) / np.maximum(counts, 1), 0.0)
    highest = np.where(judged, rewards, -np.inf).max(1, keepdims=True)
    lowest = np.where(judged, rewards, np.inf).min(1, keepdims=True)
    centred = np.where(highest > lowest, centred, 0.0)
    if scale == "none":
        return centred
    if scale == "batch":
        deviation = rewards[judged].std(ddof=1) if judged.sum() > 1 else 0.0
    elif scale == "group":
        deviation = np.sqrt(np.square(centred).sum(1, keepdims=True) / np.maximum(counts - 1, 1))
    else:
        raise ValueError(f'advantages are scaled by "group", "batch" or "none", not {scale!r}')
    return centred / (deviation + epsilon)


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """An estimate of KL(policy ‖ reference) from each drawn token, given its log-probability under both (Schulman 2020).

    With ρ = log reference - log policy: k1 = -ρ, unbiased, of either sign: what PPO subtracts from rewards. k2 = ρ²/2,
    biased, but with the right gradient. k3 = e^ρ - 1 - ρ, unbiased and never negative: for reports. As a loss none is
    right by itself but k2; see kl_loss.
    """
    log_ratio = reference - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f'a KL estimate is "k1", "k2" or "k3", not {kind!r}')


def kl_loss(logprobs: Tensor, reference: Tensor, ratio: Tensor) -> Tensor:
    """k3 · ratio: its value and its gradient are unbiased for KL(policy ‖ reference).

    ratio: policy / the policy that drew, differentiable (1 with a gradient when they are the same). Without it the
    expected gradient of k3 is that of the other direction, KL(reference ‖ policy) (DeepSeek-V3.2, eq. 7).
    """
    return kl_estimate(logprobs, reference, "k3") * ratio


def adapted_kl_coefficient(coefficient: float, kl: float, *, target: float, answers: int, horizon: float) -> float:
    """β (1 + clip(kl / target - 1, ±0.2) · answers / horizon): towards a mean KL of an answer of `target` nats.

    Ziegler et al. 2019, §2.2; kl is the k1 of whole answers, averaged over `answers` of them.
    """
    return coefficient * (1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * answers / horizon)


def pad_rows(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """((rows, longest) float64 with zeros behind, (rows, longest) bool: what is valid)."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    valid = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros(valid.shape)
    padded[valid] = np.concatenate(rows) if rows else []
    return padded, valid
