"""How do the models of PPO share one set of weights?

PPO has a policy that acts, a critic that predicts what is still to be gained, a reference that the policy must stay near,
and a judge. With adapters they are one frozen base: "policy", "value" and "reward" are adapters over it, the latter two
with a head of one row, and the reference is the base with its adapters off. With full fine-tuning the critic is a model of
its own and the reference a frozen one. Either way one module holds what learns, and one forward pass computes both, so that
DDP's hooks see every parameter once.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from adapters.lora import adapter_settings, adapters_active, adapters_off
from adapters.scalar_head import RewardModel
from batches.micro_batch import MicroBatch
from kernels.choice import KernelChoice
from model import Transformer
from model_config import ModelConfig

POLICY_ADAPTER, VALUE_ADAPTER, REWARD_ADAPTER = "policy", "value", "reward"
REWARD_HEAD = "reward_head"  # the buffer of a model with REWARD_ADAPTER: (1, H)


class ActorCritic(nn.Module):
    """A policy, and a critic whose value of a place is a linear function of its hidden state there.

    critic: a model of its own, or None where the policy's has the adapters "policy" and "value"; their head, `value_head`
    (1, H) in fp32, starts at `head` or at zero, so that the first values are 0. ValueError where the critic is missing or
    there twice.
    """

    def __init__(self, policy: Transformer, critic: RewardModel | None = None, head: Tensor | None = None):
        super().__init__()
        shared = {POLICY_ADAPTER, VALUE_ADAPTER}.issubset(adapter_settings(policy))
        if shared == (critic is not None):
            raise ValueError('the critic is either a model of its own or the adapter "value" beside "policy"')
        self.policy, self.critic = policy, critic
        if shared:
            zero = torch.zeros(1, policy.config.hidden_size, device=policy.head_weight.device)
            self.value_head = nn.Parameter(zero if head is None else zero + head.to(zero.device))

    @property
    def config(self) -> ModelConfig:
        return self.policy.config

    @property
    def kernels(self) -> KernelChoice:
        return self.policy.kernels

    def forward(
        self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the policy's hidden states (B, T, H), the values (B, T) fp32 of what is still to come after each token)."""
        documents = input_ids, positions, cu_seqlens, max_seqlen
        if self.critic is not None:
            return self.policy(*documents), self.critic(*documents)
        with adapters_active(self.policy, (POLICY_ADAPTER,)):
            hidden = self.policy(*documents)
        return hidden, adapter_scores(self.policy, VALUE_ADAPTER, self.value_head, *documents)

    @contextlib.contextmanager
    def acting(self) -> Iterator[Transformer]:
        """Inside, the policy as a model by itself, to draw answers with."""
        with adapters_active(self.policy, (POLICY_ADAPTER,)) if self.critic is None else contextlib.nullcontext():
            yield self.policy


def new_critic(policy: Transformer) -> RewardModel:
    """A copy of the policy that gives 0 everywhere, for full fine-tuning without a reward model to start from."""
    critic = RewardModel(policy.config, policy.kernels).to(policy.head_weight.device)
    critic.model.load_state_dict(policy.model.state_dict())
    nn.init.zeros_(critic.score.weight)
    return critic


def adapter_scores(
    model: Transformer, adapter: str, head: Tensor, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:  # fmt: skip
    """(B, T) fp32: the score of each token's prefix, by one adapter of `model` and its head (1, H)."""
    with adapters_active(model, (adapter,)):
        hidden = model(input_ids, positions, cu_seqlens, max_seqlen)
    with torch.autocast(hidden.device.type, enabled=False):  # returns are regressed on in fp32
        return hidden.float() @ head[0].float()


@contextlib.contextmanager
def reference_policy(policy: Transformer, reference: Transformer | None) -> Iterator[Transformer]:
    """Inside, what the policy is compared with: `reference`, or the policy's model with its adapters off."""
    with contextlib.nullcontext() if reference is not None else adapters_off(policy):
        yield policy if reference is None else reference


def scores_of(model: RewardModel | Transformer, adapter: str | None = None, head: Tensor | None = None) -> Callable:
    """MicroBatch -> (B, T) scores of prefixes: a reward model's, or those of an adapter of `model` with its head (1, H)."""

    def scores(batch: MicroBatch) -> Tensor:
        documents = batch.input_ids, batch.positions, batch.cu_seqlens, batch.input_ids.shape[1]
        if adapter is None:
            return model(*documents)
        assert head is not None, "an adapter scores with its head"
        return adapter_scores(model, adapter, head, *documents)

    return scores
