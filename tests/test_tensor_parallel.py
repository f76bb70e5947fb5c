"""Do ranks that share matrices and the vocabulary compute what one computes that has them whole?

In float64, of every kind of model that can be shared: hidden states, losses, statistics of tokens and all gradients, with
adapters too; with FSDP over it; and what a model says that is put together for a while. That whole runs are the same is in
test_strategies.py, and stages in stages/test_every_stage.py.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from adapters.lora import add_adapters
from errors import UserError
from model import Transformer
from model_config import ModelConfig
from sharding import fill, gathered, is_part, like, whole
from tests.ranks import run_ranks
from training.parallel import shard_model
from training.splitting import check_splits, split_matrices

LENGTH = 12
VOCABULARY = 131  # which no number of ranks divides
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK = (
    "qwen2",
    "gemma2",
    "bert",
)  # biases and one weight for embedding and head; norms and softcaps; biases of all kinds
ALL = (*QUICK, "llama", "mistral", "qwen3", "gemma3", "smollm3", "granite", "roberta")


def a_model(config: ModelConfig, adapters: bool = False) -> Transformer:
    model = Transformer(config)
    model.init_weights(1, zero_residual=False)
    if adapters:
        add_adapters(model, rank=3, alpha=6.0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def everything(model: Transformer) -> dict[str, Tensor]:
    """What the model says of two rows, and the gradients of a loss that all of it is in."""
    generator = torch.Generator().manual_seed(5)
    ids, targets = (torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator) for _ in range(2))
    targets[0, 3:5] = -100
    model.zero_grad()
    hidden = model(ids)
    sums = model.cross_entropy(hidden.flatten(0, 1), targets.flatten(), z_loss=0.1)
    found = model.token_statistics(hidden.flatten(0, 1), targets.flatten(), temperature=0.7)
    few = model.token_statistics(hidden.flatten(0, 1), targets.flatten().clamp(max=69), vocab_size=70)
    weights = torch.linspace(-1, 1, 2 * LENGTH, dtype=torch.float64)
    loss = sums.total + (weights * found.logprobs).sum() + (weights.flip(0) * found.entropy).sum()
    loss = loss + hidden.square().sum() + few.logprobs.sum()
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    said = {
        "hidden": hidden,
        "total": sums.total,
        "cross entropy": sums.cross_entropy,
        **found._asdict(),
        "few": few.logprobs,
    }
    return {name: value.detach().clone() for name, value in (said | gradients).items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-3)) for n in one)


def compare(rank: int, world_size: int, copies: int, kinds: list[ModelConfig]) -> float:
    """The largest difference, as a share of what is compared. copies: over how many ranks FSDP shares out what is split."""
    mesh = init_device_mesh("cpu", (copies, world_size // copies), mesh_dim_names=("parts", "matrices"))
    worst = 0.0
    for kind in kinds:
        for adapters in (False, True):
            model = a_model(kind, adapters)
            wanted = everything(model)
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            split_matrices(model, mesh["matrices"])
            if copies > 1:
                shard_model(model, mesh["parts"], reshard_after_forward=True, offload="none")
            worst = max(worst, difference(wanted, everything(model)))
            with gathered(model), torch.no_grad():
                ids = torch.arange(9)[None] + rank  # another text on each rank
                alone = model.logits(model(ids))
            plain = a_model(kind, adapters)
            worst = max(worst, float((alone - plain.logits(plain(ids))).abs().max()))
            for name, parameter in model.named_parameters():
                assert torch.equal(whole(parameter.detach()), weights[name]), name
                parameter.data.zero_()
                fill(parameter, weights[name])
                assert torch.equal(whole(parameter.detach()), weights[name]), name
                assert torch.equal(whole(like(weights[name], parameter)), weights[name]), name
            worst = max(worst, difference(wanted, everything(model)))
            assert held(model) < held(plain)
    return worst


def held(model: nn.Module) -> int:
    return sum((p.to_local() if is_part(p) else p).numel() for p in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize(("names", "copies"), [(QUICK, 1), pytest.param(ALL, 2, marks=pytest.mark.exhaustive)])
def test_every_kind_of_model_computes_the_same_of_shared_matrices(names, copies):
    from tests.family_models import peer_config  # here, as ranks would spend seconds on transformers

    kinds = [ModelConfig.from_hf(peer_config(name).to_dict()) for name in names]
    bound = 1e-9 if copies == 1 else 1e-6  # FSDP reduces in fp32
    assert max(run_ranks(compare, 2 * copies, copies, kinds)) < bound


def bits(rank: int, world_size: int) -> bytes:
    """Of everything that the split model says and learns: all ranks must go on alike."""
    model = a_model(ModelConfig(VOCABULARY, **SHAPE)).float()
    split_matrices(model, init_device_mesh("cpu", (world_size,), mesh_dim_names=("matrices",)))
    ids = torch.arange(24).view(2, 12)
    model.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not is_part(p)]
    assert any(is_part(p) for p in model.parameters()) and gradients and dist.get_world_size() == world_size
    return b"".join(gradient.numpy().tobytes() for gradient in gradients)


def test_what_every_rank_has_whole_gets_the_same_gradient_on_all_of_them_bit_for_bit():
    assert len(set(run_ranks(bits, 2))) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral", "is not for mixtures of experts"),
        ("gpt2", "is not for a gpt2, which has several matrices in one"),
        ("olmo2", "norms the queries of all heads together"),
        ("llama", "does not divide the model's 2 key/value heads"),
    ],
)
def test_models_that_cannot_be_shared_are_refused(name, words):
    from tests.family_models import peer_config

    with pytest.raises(UserError, match=words):
        check_splits(ModelConfig.from_hf(peer_config(name).to_dict()), 4)
