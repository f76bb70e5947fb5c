"""What is learned from comparing a group of answers with each other? To give those that beat the group's average.

GRPO (Shao et al. 2024) draws several answers to a prompt and takes as each answer's advantage its reward against those of
its group. Its relatives differ in the ratio that is clipped and in what the sum over tokens is divided by:

    loss      per token (A advantage, r = policy / policy that drew)     divided by
    grpo      -min(r A, clip(r, 1 - low, 1 + high) A)                    the answer's tokens, then answers
    dr_grpo   the same; A without the deviation (Liu et al. 2025)        answers · max_new_tokens
    dapo      the same; high > low (Yu et al. 2025)                      tokens
    gspo      the same; r = exp(mean of log r) (Zheng et al. 2025)       answers
    cispo     -min(r, 1 + high) without gradient · A log p               tokens (MiniMax-M1, 2025)

"answers" and "tokens" are those of the whole optimizer step, on all ranks: they are the micro-batch's weight, and the loop
divides by their sum. What else divides is in the share of each token. With a coefficient of KL, β k3 r is added to each
token (see stages/advantages.py).
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from adapters.actor_critic import reference_policy
from adapters.lora import adapter_settings
from batches.micro_batch import IGNORE_INDEX, MicroBatch
from batches.packing import Sequence, sequence_sums
from errors import UserError
from generation.rollouts import (
    Prompt,
    Rollout,
    RolloutSchedule,
    Sampling,
    check_prompts,
    figures_of,
    gather_parts,
    own_micro_batches,
    response_statistics,
    roll_out,
)
from model import Transformer
from ranks import Ranks, unwrap
from sharding import gathered
from stages.advantages import group_advantages, kl_estimate, kl_loss
from stages.rewards import (
    Reward,
    UnscoredPhases,
    combine,
    describe_phase,
    evaluate_rewards,
    judge,
    phase_metrics,
    some_and_all,
)
from training.metrics import Figures, Metrics
from training.precision import Precision

# how far r may go below and above 1: each paper's; cispo's upper one is TRL's advice, from ScaleRL
CLIPS = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}
_PER_TOKEN = ("dapo", "cispo")  # weighed by tokens; the others by answers
_LOSS_COLUMNS = ("advantage",)


@dataclass
class GRPO:
    """Group-relative policy optimisation of `model` on `prompts`; eval_prompts are held out.

    decode: token ids to text. schedule.batch_size counts prompts, each with group_size answers. micro_batch_size rows of
    max_length tokens go through the model at once. clip_low, clip_high: None takes the loss's own (CLIPS). ratio_cap: r is
    capped where A is negative (two-sided clip; INTELLECT-2). kl_coefficient: β; the reference is `reference`, or the model
    with its adapters off. advantage_scale: see group_advantages. mask_truncated: answers that did not end are compared, but
    nothing is learned from them, and no denominator counts them. eval_samples: 0 takes all prompts.

    Dropout is off: `model` is put into evaluation mode. Raises UserError for prompts that do not fit and options that
    contradict each other.
    """

    model: Transformer
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: list[Reward]
    decode: Callable[[list[int]], str]
    ranks: Ranks
    precision: Precision
    sampling: Sampling
    schedule: RolloutSchedule
    group_size: int
    micro_batch_size: int
    max_length: int
    loss_type: str = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    ratio_cap: float | None = None
    kl_coefficient: float = 0.0
    reference: Transformer | None = None
    advantage_scale: str = "group"
    mask_truncated: bool = False
    reward_timeout: float = 60.0
    eval_samples: int = 0
    unscored: UnscoredPhases = field(default_factory=UnscoredPhases)

    def __post_init__(self) -> None:
        if self.loss_type not in CLIPS:
            raise UserError(f"--grpo_loss {self.loss_type}: choose from {', '.join(CLIPS)}")
        if self.group_size < 2:
            raise UserError(f"--group_size {self.group_size}: an answer is compared with its group; take at least 2")
        if self.kl_coefficient and self.reference is None and not adapter_settings(self.model):
            raise ValueError("a KL coefficient without adapters needs a frozen copy of the model as reference")
        check_prompts([*self.prompts, *self.eval_prompts], self.model, self.sampling, self.max_length)
        low, high = CLIPS[self.loss_type]
        self.clip_low = low if self.clip_low is None else self.clip_low
        self.clip_high = high if self.clip_high is None else self.clip_high
        if self.loss_type == "dr_grpo":
            self.advantage_scale = "none"
        self.model.eval()

    def state(self) -> dict[str, int]:
        """What a checkpoint must hold beside weights, optimizer and position."""
        return {"unscored_phases": self.unscored.in_a_row}

    def load_state(self, state: dict[str, int]) -> None:
        self.unscored.in_a_row = state.get("unscored_phases", 0)

    # -------------------------------------------------------------------------------------------------------- batches

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches.

        When a rollout phase begins, answers are drawn with the weights as they are at that moment.
        """
        phase, first_step = self.schedule.locate(first_sample)
        while True:
            with gathered(self.model):
                groups = self._roll_out(phase)
            for step in range(first_step, self.schedule.steps_per_phase):
                chosen = [one for place in self.schedule.members(phase, step) for one in groups[place]]
                yield self._micro_batches(chosen)
            phase, first_step = phase + 1, 0

    def _roll_out(self, phase: int) -> list[list[Sequence]]:
        """For each prompt of the phase, everyone's, the list of its answers as sequences to learn from."""
        numbers = self.schedule.prompt_numbers(phase, len(self.prompts))
        prompts = [self.prompts[number] for number in numbers for _ in range(self.group_size)]
        part = self.ranks.part(len(prompts))
        own, seeds = prompts[part], self.schedule.seeds(phase, self.group_size)[part]
        with self.precision.autocast(self.ranks.device):
            rollouts = roll_out(self.model, [prompt.tokens for prompt in own], seeds, self.sampling)
        samples: dict[str, str] = {}
        scores = judge(self.rewards, own, rollouts, self.decode, timeout=self.reward_timeout, samples=samples)
        figures = self._logprobs(rollouts)
        answers = gather_parts(list(zip(rollouts, figures, scores, strict=True)), self.ranks)

        all_scores = np.array([scores for _, _, scores in answers])
        rewards = combine(all_scores, self.rewards).reshape(-1, self.group_size)
        self.unscored.see(rewards, self.rewards, samples)
        advantages = group_advantages(rewards, scale=self.advantage_scale).ravel()
        report = describe_phase([rollout for rollout, _, _ in answers], all_scores, rewards.ravel(), self.rewards)
        equal = [len(set(group[~np.isnan(group)])) < 2 for group in rewards]
        report["equal_groups"] = float(np.mean(equal))  # these teach nothing
        sequences = []
        for (rollout, columns, _), advantage, reward in zip(answers, advantages, rewards.ravel(), strict=True):
            # of an answer that nothing could judge nothing is known: it has no place in a denominator either
            learned = rollout.is_response & (rollout.finished or not self.mask_truncated) & (not np.isnan(reward))
            sequences.append(Sequence(rollout.tokens, learned, columns, {"advantage": float(advantage), **report}))
        starts = range(0, len(sequences), self.group_size)
        return [sequences[start : start + self.group_size] for start in starts]

    def _logprobs(self, rollouts: list[Rollout]) -> list[dict[str, np.ndarray]]:
        """The token columns of each rollout: old log-probabilities where it is used for several steps, the reference's."""
        wanted = ["old_logprobs"] if self.schedule.steps_per_phase > 1 else []
        wanted += ["reference_logprobs"] if self.kl_coefficient else []

        def logprobs(batch: MicroBatch) -> dict[str, Tensor]:
            figures = {}
            with self.precision.autocast(self.ranks.device):
                if "old_logprobs" in wanted:
                    figures["old_logprobs"] = self._statistics(self.model, batch)[0]
                if "reference_logprobs" in wanted:
                    with reference_policy(self.model, self.reference) as reference:
                        figures["reference_logprobs"] = self._statistics(reference, batch)[0]
            return figures

        sequences = [Sequence(rollout.tokens, rollout.is_response) for rollout in rollouts]
        if not wanted:
            return [{} for _ in sequences]
        return figures_of(
            sequences, logprobs, device=self.ranks.device, max_length=self.max_length,
            micro_batch_size=self.micro_batch_size,
        )  # fmt: skip

    def _micro_batches(self, sequences: list[Sequence]) -> list[MicroBatch]:
        batches = own_micro_batches(
            sequences, self.ranks.data, max_length=self.max_length, micro_batch_size=self.micro_batch_size
        )
        if self.loss_type in _PER_TOKEN:
            return batches
        return [replace(batch, weight=batch.num_sequences if batch.weight else 0) for batch in batches]

    # ----------------------------------------------------------------------------------------------------------- loss

    def _statistics(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(log-probability, entropy) of each target, (B, T)."""
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
        return response_statistics(
            hidden, unwrap(model), batch.targets,
            temperature=self.sampling.temperature, vocab_size=self.sampling.vocab_size,
        )[:2]  # fmt: skip

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss to differentiate, {metric: (sum, weight)} to report); `batch.weight` is its weight.

        loss, entropy, clip_fraction (of the tokens, those whose ratio decides nothing) and kl (k3) are averaged as the loss
        is over answers and tokens; the other metrics are those of the rollout phase.
        """
        logprobs, entropy = self._statistics(model, batch)
        learned = (batch.targets != IGNORE_INDEX).to(logprobs.dtype)  # (B, T)
        lengths = sequence_sums(learned, batch).clamp(min=1)  # (sequences,)
        old = batch.token_columns.get("old_logprobs", logprobs.detach())
        advantages = _of_tokens(batch.columns["advantage"], batch)

        log_ratio = (logprobs - old) * learned
        if self.loss_type == "gspo":
            log_ratio = _of_tokens(sequence_sums(log_ratio, batch) / lengths, batch)
        ratio = log_ratio.exp()
        per_token = self._surrogate(ratio, advantages, logprobs)
        kl = torch.zeros_like(logprobs)
        if self.kl_coefficient:
            reference = batch.token_columns["reference_logprobs"]
            per_token = per_token + self.kl_coefficient * kl_loss(logprobs, reference, ratio)
            kl = kl_estimate(logprobs.detach(), reference, "k3")

        mean_share = learned if self.loss_type in _PER_TOKEN else learned / _of_tokens(lengths, batch).clamp(min=1)
        share = learned / self.sampling.max_new_tokens if self.loss_type == "dr_grpo" else mean_share
        total = (per_token * share).sum()
        outside = self._clipped(ratio.detach(), advantages)
        weight = float(batch.weight)
        metrics: Metrics = {
            "loss": (total.detach(), weight),
            "entropy": ((entropy.detach() * mean_share).sum(), weight),
            "clip_fraction": ((outside * mean_share).sum(), weight),
        }
        if self.kl_coefficient:
            metrics["kl"] = ((kl * mean_share).sum(), weight)
        reported = {name: column for name, column in batch.columns.items() if name not in _LOSS_COLUMNS}
        return total, metrics | phase_metrics(reported)

    @property
    def _lowest(self) -> float:
        """The ratio below which a token with a negative advantage counts no further."""
        assert self.clip_low is not None  # __post_init__ takes the loss's own
        return 1 - self.clip_low

    @property
    def _highest(self) -> float:
        assert self.clip_high is not None
        return 1 + self.clip_high

    def _surrogate(self, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        if self.loss_type == "cispo":
            return -ratio.detach().clamp(max=self._highest) * advantages * logprobs
        capped = ratio if self.ratio_cap is None else ratio.clamp(max=self.ratio_cap)
        clipped = ratio.clamp(self._lowest, self._highest)
        return -torch.minimum(capped * advantages, clipped * advantages)

    def _clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        above = (ratio > self._highest) & (advantages > 0)
        if self.loss_type == "cispo":
            return above
        return above | (ratio < self._lowest) & (advantages < 0)

    # ----------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """The rewards of one answer to each held-out prompt, of `eval_samples` or of all, as `some_and_all` says."""
        with gathered(self.model):
            return some_and_all(self._evaluate, self.eval_prompts, self.eval_samples, everything)

    def _evaluate(self, prompts: SequenceOf[Prompt]) -> Figures:
        with self.precision.autocast(self.ranks.device):
            return evaluate_rewards(
                self.model, prompts, self.rewards, self.decode, self.sampling, self.ranks,
                seed=self.schedule.seed, timeout=self.reward_timeout,
            )  # fmt: skip

    def epoch(self, first_sample: int) -> float:
        """How many times each prompt has been answered by a group, after `first_sample` samples."""
        return first_sample / self.schedule.epochs / len(self.prompts)


def _of_tokens(values: Tensor, batch: MicroBatch) -> Tensor:
    """(sequences,) figures beside each of their tokens, (B, T); 0 beside padding."""
    return torch.cat([values, values.new_zeros(1)])[batch.sequence_ids]
