"""What is learned from single answers? To do what turned out better than a critic expected.

PPO (Schulman et al. 2017) for language models (Ziegler et al. 2019; Huang et al. 2024, "The N+ Implementation Details of
RLHF with PPO"). A phase, in the order in which it happens:

  1. answers are drawn, nothing cut from the distribution; the old log-probabilities and values V are computed in the very
     forward pass that the loss uses, so the first ratio is 1
  2. the reward of each token is -β k1 = -β (log p - log reference); the score goes on the answer's last token, which is
     the stop token if there is one, and an answer without it loses missing_eos_penalty
  3. advantages by GAE, 0 after the last token; returns = advantages + V; then advantages are whitened over all tokens of
     all ranks
  4. epochs · minibatches optimizer steps on Σ max(-r A, -clip(r) A) + value_coefficient · ½ max((V - R)², (clip(V) - R)²)
     over the response tokens of the minibatch, divided by their number, on all ranks, once
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from adapters.actor_critic import ActorCritic, reference_policy
from adapters.lora import adapter_settings
from batches.micro_batch import IGNORE_INDEX, MicroBatch
from batches.packing import Sequence
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
from stages.advantages import adapted_kl_coefficient, generalised_advantages, kl_estimate, pad_rows, whiten
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


@dataclass
class PPO:
    """Proximal policy optimisation of `model` on `prompts`; eval_prompts are held out.

    decode: token ids to text. schedule.batch_size counts prompts, each with one answer. micro_batch_size rows of max_length
    tokens go through the model at once. reference: a frozen copy of the policy, None for the model with its adapters off.
    kl_target: None keeps β = kl_coefficient; else β is adapted to a KL of so many nats an answer (kl_horizon answers).
    whiten_rewards keeps their mean. eval_samples: 0 takes all prompts.

    Dropout is off: `model` is put into evaluation mode. β is state: save `state()`, hand it to `load_state` on resuming.
    Raises UserError for prompts that do not fit.
    """

    model: ActorCritic
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: list[Reward]
    decode: Callable[[list[int]], str]
    ranks: Ranks
    precision: Precision
    sampling: Sampling
    schedule: RolloutSchedule
    micro_batch_size: int
    max_length: int
    reference: Transformer | None = None
    discount: float = 1.0
    trace: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    kl_coefficient: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    missing_eos_penalty: float = 0.0
    whiten_rewards: bool = False
    reward_timeout: float = 60.0
    eval_samples: int = 0
    unscored: UnscoredPhases = field(default_factory=UnscoredPhases)
    _next_kl_coefficient: float = field(init=False)  # of the phase after the present one

    def __post_init__(self) -> None:
        if self.reference is None and not adapter_settings(self.model.policy):
            raise ValueError("without adapters PPO needs a frozen copy of the model as reference")
        if self.kl_target is not None and not self.kl_target > 0:
            raise UserError(f"--kl_target {self.kl_target}: it is a number of nats above 0")
        check_prompts([*self.prompts, *self.eval_prompts], self.model.policy, self.sampling, self.max_length)
        self._next_kl_coefficient = self.kl_coefficient
        self.model.eval()

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold beside weights, optimizer and position."""
        return {
            "kl_coefficient": self.kl_coefficient,
            "next_kl_coefficient": self._next_kl_coefficient,
            "unscored_phases": self.unscored.in_a_row,
        }

    def load_state(self, state: dict[str, float]) -> None:
        self.kl_coefficient, self._next_kl_coefficient = state["kl_coefficient"], state["next_kl_coefficient"]
        self.unscored.in_a_row = int(state.get("unscored_phases", 0))

    # -------------------------------------------------------------------------------------------------------- batches

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches.

        When a rollout phase begins, answers are drawn with the weights as they are at that moment.
        """
        phase, first_step = self.schedule.locate(first_sample)
        while True:
            if first_step == 0:  # else the phase was begun before, with the β that was restored
                self.kl_coefficient = self._next_kl_coefficient
            with gathered(self.model):
                sequences = self._roll_out(phase)
            for step in range(first_step, self.schedule.steps_per_phase):
                yield own_micro_batches(
                    [sequences[place] for place in self.schedule.members(phase, step)], self.ranks.data,
                    max_length=self.max_length, micro_batch_size=self.micro_batch_size,
                )  # fmt: skip
            phase, first_step = phase + 1, 0

    def _roll_out(self, phase: int) -> list[Sequence]:
        """Everyone's answers of a phase as sequences to learn from."""
        prompts = [self.prompts[number] for number in self.schedule.prompt_numbers(phase, len(self.prompts))]
        part = self.ranks.part(len(prompts))
        own, seeds = prompts[part], self.schedule.seeds(phase, 1)[part]
        with self.precision.autocast(self.ranks.device), self.model.acting() as policy:
            rollouts = roll_out(policy, [prompt.tokens for prompt in own], seeds, self.sampling)
        samples: dict[str, str] = {}
        scores = judge(self.rewards, own, rollouts, self.decode, timeout=self.reward_timeout, samples=samples)
        figures = figures_of(
            [Sequence(rollout.tokens, rollout.is_response) for rollout in rollouts], self._figures,
            device=self.ranks.device, max_length=self.max_length, micro_batch_size=self.micro_batch_size,
        )  # fmt: skip
        answers = gather_parts(list(zip(rollouts, figures, scores, strict=True)), self.ranks)
        self.unscored.see(combine(np.array([scores for _, _, scores in answers]), self.rewards), self.rewards, samples)
        return self._experience(*map(list, zip(*answers, strict=True)))

    def _figures(self, batch: MicroBatch) -> dict[str, Tensor]:
        """(B, T) of each: log-probabilities now and of the reference, values."""
        with self.precision.autocast(self.ranks.device):
            logprobs, _, values = self._forward(self.model, batch)
            with reference_policy(self.model.policy, self.reference) as reference:
                hidden = reference(batch.input_ids, batch.positions, batch.cu_seqlens, batch.input_ids.shape[1])
                reference_logprobs = self._statistics(hidden, reference, batch)[0]
        return {"old_logprobs": logprobs, "old_values": values, "reference_logprobs": reference_logprobs}

    def _experience(
        self, rollouts: list[Rollout], figures: list[dict[str, np.ndarray]], scores: list[np.ndarray]
    ) -> list[Sequence]:
        """The phase's answers with what the loss compares them with. Steps 2 and 3 of the file's docstring."""

        def of_responses(name: str) -> tuple[np.ndarray, np.ndarray]:
            return pad_rows(
                [one[name][rollout.prompt_length :] for one, rollout in zip(figures, rollouts, strict=True)]
            )

        score = combine(np.array(scores), self.rewards)
        judged = ~np.isnan(score)
        finished = np.array([rollout.finished for rollout in rollouts])
        logprobs, valid = of_responses("old_logprobs")
        log_ratio = logprobs - of_responses("reference_logprobs")[0]  # k1
        values = of_responses("old_values")[0]

        rewards = -self.kl_coefficient * log_ratio
        rewards[np.arange(len(rollouts)), valid.sum(1) - 1] += np.where(
            judged, score - self.missing_eos_penalty * ~finished, 0.0
        )
        taught = valid & judged[:, None]  # nothing is known of the others
        if self.whiten_rewards:
            rewards = whiten(rewards, taught, keep_mean=True)
        advantages = generalised_advantages(rewards, values, valid, discount=self.discount, trace=self.trace)
        returns = advantages + values
        advantages = whiten(advantages, taught)

        kl = float(log_ratio.sum(1).mean())
        report = describe_phase(rollouts, np.array(scores), score, self.rewards)
        report |= {"kl": kl, "kl_coefficient": self.kl_coefficient}
        if self.kl_target is not None:
            self._next_kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient, kl, target=self.kl_target, answers=len(rollouts), horizon=self.kl_horizon
            )
        sequences = []
        for row, rollout in enumerate(rollouts):
            columns = {name: figures[row][name] for name in ("old_logprobs", "old_values")}
            for name, array in (("advantages", advantages), ("returns", returns)):
                columns[name] = np.zeros(len(rollout.tokens), dtype=np.float32)
                columns[name][rollout.prompt_length :] = array[row, valid[row]]
            sequences.append(Sequence(rollout.tokens, rollout.is_response & judged[row], columns, report))
        return sequences

    # ----------------------------------------------------------------------------------------------------------- loss

    def _forward(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability, entropy) of each target and the value before it, (B, T)."""
        hidden, values = model(
            batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1]
        )  # fmt: skip
        return *self._statistics(hidden, unwrap(model).policy, batch), values

    def _statistics(self, hidden: Tensor, policy: Transformer, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        temperature, vocab_size = self.sampling.temperature, self.sampling.vocab_size
        found = response_statistics(hidden, policy, batch.targets, temperature=temperature, vocab_size=vocab_size)
        return found[:2]

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss to differentiate, {metric: (sum, weight)} to report); `batch.weight` is its weight, the tokens.

        Means over tokens: loss and its two parts, entropy, ratio, approx_kl (k3 of the policy that drew against this one),
        clip_fraction and value_clip_fraction (where clipping decides). The other metrics are those of the rollout phase.
        """
        logprobs, entropy, values = self._forward(model, batch)
        learned = (batch.targets != IGNORE_INDEX).to(logprobs.dtype)
        columns = batch.token_columns
        old, advantages, returns, old_values = (
            columns[name] for name in ("old_logprobs", "advantages", "returns", "old_values")
        )
        ratio = ((logprobs - old) * learned).exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        near = old_values + (values - old_values).clamp(-self.value_clip, self.value_clip)
        value_plain, value_clipped = (values - returns).square(), (near - returns).square()

        policy_loss = (torch.maximum(plain, clipped) * learned).sum()
        value_loss = (0.5 * torch.maximum(value_plain, value_clipped) * learned).sum()
        total = policy_loss + self.value_coefficient * value_loss
        weight = float(batch.weight)
        sums = {
            "loss": total,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": (entropy * learned).sum(),
            "ratio": (ratio * learned).sum(),
            "approx_kl": (kl_estimate(old, logprobs, "k3") * learned).sum(),
            "clip_fraction": ((clipped > plain) * learned).sum(),
            "value_clip_fraction": ((value_clipped > value_plain) * learned).sum(),
        }
        metrics: Metrics = {name: (value.detach(), weight) for name, value in sums.items()}
        return total, metrics | phase_metrics(batch.columns)

    # ----------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """The rewards of one answer to each held-out prompt, of `eval_samples` or of all, as `some_and_all` says."""
        with gathered(self.model):
            return some_and_all(self._evaluate, self.eval_prompts, self.eval_samples, everything)

    def _evaluate(self, prompts: SequenceOf[Prompt]) -> Figures:
        with self.precision.autocast(self.ranks.device), self.model.acting() as policy:
            return evaluate_rewards(
                policy, prompts, self.rewards, self.decode, self.sampling, self.ranks,
                seed=self.schedule.seed, timeout=self.reward_timeout,
            )  # fmt: skip

    def epoch(self, first_sample: int) -> float:
        """How many times each prompt has been answered, after `first_sample` samples."""
        return first_sample / self.schedule.epochs / len(self.prompts)
