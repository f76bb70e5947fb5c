"""Do ranks that share the tokens of a row compute what one computes that has them all?

In float64, of every kind of model: hidden states, losses, statistics of tokens, what routers did, and all gradients. That
whole runs are the same is in test_strategies.py, and every stage in stages/test_every_stage.py.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from context import Context
from experts import balancing_losses, z_losses
from kernels.attention import attention
from kernels.attention_masks import document_mask, share_mask
from model import Transformer
from model_config import ModelConfig
from tests.ranks import run_ranks

LENGTH = 37  # no multiple of any number of chunks
DOCUMENTS = torch.tensor([0, 11, 12, LENGTH, LENGTH + 30, 2 * LENGTH, 2 * LENGTH], dtype=torch.int32)
QUICK = ["gemma2", "modernbert", "mixtral", "phi4 mini"]  # windows and softcaps, both directions, experts, long rows


def everything(model: Transformer, documents: Tensor | None, of_all: bool) -> list[Tensor]:
    """What a model says of two rows, and the gradients of a loss that all of it is in; of ranks that share rows, their sum."""
    generator = torch.Generator().manual_seed(5)
    ids, targets = (torch.randint(0, model.config.vocab_size, (2, LENGTH), generator=generator) for _ in range(2))
    targets[0, 3:9] = -100
    with_routing = model.config.num_experts is not None
    hidden = model(ids, cu_seqlens=documents, with_routing=with_routing)
    hidden, routing = hidden if with_routing else (hidden, [])
    sums = model.cross_entropy(hidden.flatten(0, 1), targets.flatten(), z_loss=0.1)
    found = model.token_statistics(hidden.flatten(0, 1), targets.flatten(), temperature=0.7, vocab_size=None)
    weights = torch.linspace(-1, 1, 2 * LENGTH, dtype=torch.float64)
    loss = (
        sums.total + (weights * found.logprobs).sum() + (weights.flip(0) * found.entropy).sum() + hidden.square().sum()
    )
    losses = [each(routing, model.config.experts_per_token) for each in (balancing_losses, z_losses) if routing]
    loss = loss + sum(each.sum() for each in losses)
    model.zero_grad()
    (loss if of_all else loss / dist.get_world_size()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not of_all:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return [hidden.detach(), sums.total.detach(), sums.cross_entropy, *found, *losses, *gradients]


def compare(rank: int, world_size: int, configs: dict[str, ModelConfig]) -> dict[str, float]:
    return {name: largest_difference(rank, world_size, config) for name, config in configs.items()}


def largest_difference(rank: int, world_size: int, config: ModelConfig) -> float:
    """As a share of what is compared."""
    model = Transformer(config).double()
    model.init_weights(1, zero_residual=False)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    worst = 0.0
    for documents in (None, DOCUMENTS):
        model.context = None
        wanted = everything(model, documents, of_all=True)
        model.context = Context(dist.group.WORLD.group_name, world_size, rank)
        for one, other in zip(wanted, everything(model, documents, of_all=False), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-3)))
    return worst


@pytest.mark.parametrize("world_size", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_every_kind_of_model_computes_the_same_of_shared_rows(world_size):
    from tests.family_models import ENCODERS, MODELS, peer_config  # here, as ranks would spend seconds on transformers

    names = QUICK if world_size == 3 else [*MODELS, *ENCODERS]
    configs = {name: ModelConfig.from_hf(peer_config(name).to_dict()) for name in names}
    for found in run_ranks(compare, world_size, configs):
        assert found.keys() == configs.keys() and max(found.values()) < 1e-9, found


def test_a_rank_meets_as_many_keys_as_any_other():
    """Of causal rows; with plain slices the last of 4 ranks would meet 7 times as many as the first."""
    met = []
    for place in range(4):
        places = Context("", 4, place).share(64, torch.device("cpu")).places
        met.append(int(share_mask(places, None, 1, 64, dtype=torch.float32).visible.sum()))
    assert len(set(met)) == 1 and sum(met) == 64 * 65 // 2


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_sees_what_the_boolean_mask_lets_see(window, causal):
    q, k, v = (torch.randn(2, LENGTH, heads, 16) for heads in (4, 2, 2))
    places = Context("", 2, 1).share(LENGTH, q.device).places
    for documents in (None, DOCUMENTS):
        settings = {"dtype": q.dtype, "window": window, "causal": causal}
        starts = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32) if documents is None else documents
        mask = document_mask(starts, 2, LENGTH, **settings, backend="sdpa")
        wanted = attention(q, k, v, mask=mask, causal=causal)[:, places]
        for backend in ("sdpa", "flex"):
            with torch.no_grad():
                mask = share_mask(places, documents, 2, LENGTH, **settings, backend=backend)
                torch.testing.assert_close(attention(q[:, places], k, v, mask=mask, causal=causal), wanted)
