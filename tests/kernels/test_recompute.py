"""Does what is computed again change nothing but memory and time? (--activation_checkpointing)

Gradients are compared bit by bit with those of a pass that keeps all. That they are so in every stage and on several ranks
is in tests/stages/test_every_stage.py, and what memory it takes in tests/training/test_plan.py.
"""

import shutil

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapters.lora import add_adapters, set_token_keys
from kernels.choice import OPERATIONS, KernelChoice
from kernels.jit import why_not_triton
from kernels.recompute import ways
from model import KVCache, Transformer
from model_config import ModelConfig
from ranks import Ranks
from tests.tiers import grid
from training.examples_data import without_dropout
from training.parallel import prepare_model

CPU = torch.device("cpu")
ONE = Ranks(0, 1, CPU)
SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": 64}
MODELS = {  # config.json of a folder
    "llama": {"model_type": "llama"},
    "windows": {"model_type": "gemma3_text", "query_pre_attn_scalar": 12, **MIXED},
    "softcaps": {"model_type": "gemma2", "query_pre_attn_scalar": 12, "attn_logit_softcapping": 1.5, **MIXED},
    "norms after": {"model_type": "olmo2"},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "encoder": {"model_type": "bert", "type_vocab_size": 2},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
ADAPTERS = {
    "all weights": None,
    "LoRA": {},
    "LoRA with dropout": {"dropout": 0.3},
    "LoRA over NF4": {"quantise": "nf4"},
    "LoRA with dropout over NF4": {"quantise": "nf4", "dropout": 0.3},
    "DoRA": {"dora": True},
}
SETTINGS = ("full", "selective", "0.4")
TRITON = KernelChoice(**dict.fromkeys(OPERATIONS, "triton"))


def a_model(again: str, model: str = "llama", adapters: str = "all weights", *, dropout=0.0, compiled=False, **kernels):
    made = Transformer(ModelConfig.from_hf(SIZES | MODELS[model]), **kernels)
    made.init_weights(0, zero_residual=False)
    made.dropout = dropout
    if ADAPTERS[adapters] is not None:
        add_adapters(made, rank=4, alpha=8.0, **ADAPTERS[adapters])
    generator = torch.Generator().manual_seed(2)
    for parameter in made.parameters():  # away from zeros, such as B's
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return prepare_model(made, ONE, compile_model=compiled, again=again)


def gradients(model: Transformer, *, packed: bool = True, bf16: bool = False) -> dict[str, Tensor]:
    """Of a loss that reads hidden states and routers; the model leaves training mode before its backward pass."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 131, (4, 32), generator=generator)
    set_token_keys(model, torch.randint(0, 2**40, (4, 32), generator=generator))
    documents = torch.tensor([0, 5, 32, 50, 64, 96, 128], dtype=torch.int32) if packed else None
    of_experts = model.config.num_experts is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(ids, cu_seqlens=documents, max_seqlen=32, with_routing=of_experts)
        hidden, routing = out if of_experts else (out, [])
        loss = hidden.float().square().sum()
        for layer in routing:
            loss = loss + layer.probs.square().sum() + 0.1 * layer.z.sum()
    assert len(routing) == (3 if of_experts else 0)
    with without_dropout(model):
        set_token_keys(model, torch.zeros(4, 32, dtype=torch.int64))
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 5
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(found[name], gradient), name


CELLS = [
    (model, adapters, bf16)
    for model in MODELS
    for adapters in (ADAPTERS if model == "llama" else ("all weights", "LoRA with dropout over NF4"))
    for bf16 in (False, True)
    if not (model == "encoder" and adapters != "all weights")
]
QUICK = [
    ("llama", "all weights", False), ("llama", "LoRA with dropout", True), ("llama", "DoRA", False),
    ("windows", "all weights", False), ("softcaps", "all weights", True), ("gpt2", "all weights", True),
    ("experts", "all weights", False), ("experts", "LoRA with dropout over NF4", True), ("encoder", "all weights", False),
]  # fmt: skip


@pytest.mark.parametrize(("model", "adapters", "bf16"), grid(CELLS, QUICK))
def test_gradients_have_the_same_bits(model, adapters, bf16):
    """Also with dropout, whose masks are made again; with documents and without."""
    for dropout in (0.0, 0.2):
        for packed in (True, False):
            expected = gradients(a_model("none", model, adapters, dropout=dropout), packed=packed, bf16=bf16)
            for again in SETTINGS:
                found = gradients(a_model(again, model, adapters, dropout=dropout), packed=packed, bf16=bf16)
                assert_the_same(found, expected)


@pytest.mark.skipif(why_not_triton(CPU) is not None, reason="triton is not installed")
@pytest.mark.parametrize(
    "adapters", grid(["all weights", "LoRA", "LoRA with dropout", "LoRA over NF4"], ["all weights"])
)
def test_so_do_those_of_triton_kernels(adapters):
    expected = gradients(a_model("none", adapters=adapters, kernels=TRITON))
    for again in ("full", "selective"):
        assert_the_same(gradients(a_model(again, adapters=adapters, kernels=TRITON)), expected)


@pytest.mark.parametrize(
    ("model", "adapters"),
    [("llama", "all weights"), ("llama", "LoRA over NF4"), ("gpt2", "LoRA"), ("experts", "all weights")],
)
def test_full_repeats_the_forward_pass_and_selective_no_product_of_it(model, adapters):
    """By torch's own counter. What is repeated of adapters, of rank 4, is a small part of a pass."""
    mapping = {
        torch.ops.groundup.nf4_linear: lambda x, *rest, **_: 2 * x[0] * x[1] * x[2] * rest[5][0],
        torch.ops.groundup.grouped_linear: lambda x, weight, *_, **__: 2 * x[0] * weight[1] * weight[2],
        torch.ops.groundup.attention_by_document: lambda q, k, *_, **__: 4 * q[0] * q[1] * q[1] * q[2] * q[3],
    }

    def counted(again: str) -> int:
        built = a_model(again, model, adapters)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            gradients(built)
        return counter.get_total_flops()

    def forward() -> int:
        built = a_model("none", model, adapters)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
            built(torch.zeros(4, 32, dtype=torch.int64), max_seqlen=32, cu_seqlens=torch.tensor([0, 32, 64, 96, 128]))
        return counter.get_total_flops()

    kept = counted("none")
    low_rank = 0.0 if ADAPTERS[adapters] is None else 0.2 * forward()
    assert kept <= counted("selective") <= kept + low_rank
    # the last product of a block, which nothing of it is computed from, need not be repeated
    assert kept + 0.6 * forward() <= counted("full") <= kept + 1.01 * forward() + low_rank


def test_a_share_is_of_whole_blocks_evenly_spread():
    assert ways("1.0", 4) == ["none"] * 4 and ways("0", 3) == ["full"] * 3
    assert ways("0.5", 6) == ["none", "full"] * 3
    assert ways("0.75", 8) == ["none", "none", "none", "full"] * 2
    assert ways("0.25", 4).count("full") == 3 and ways("selective", 2) == ["selective"] * 2


def test_nothing_is_kept_to_be_repeated_where_there_is_no_backward_pass():
    """Evaluated, and with a cache, with gradients or without: what the model gives is what it gives."""
    plain, again = (a_model(setting) for setting in ("none", "full"))
    ids = torch.arange(12).view(2, 6)
    for model in (plain, again):
        cache = KVCache(model.config, 2, 6)
        first, rest = model(ids[:, :4], cache=cache), model(ids[:, 4:], cache=cache)
        torch.testing.assert_close(torch.cat([first, rest], 1), plain(ids), atol=1e-5, rtol=0)
        assert cache.length == 6
    with torch.no_grad():
        assert torch.equal(plain(ids), again(ids))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in again.named_parameters()]


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize(
    ("model", "adapters", "again"),
    [("llama", "all weights", "0.4"), ("experts", "all weights", "full"), ("llama", "LoRA", "selective")],
)
def test_compiled_models_follow_eager_ones(model, adapters, again):
    """Fused fp32 sums in another order: 5e-4 of each gradient's largest value."""
    expected = gradients(a_model("none", model, adapters, dropout=0.2))
    torch._dynamo.reset()
    found = gradients(a_model(again, model, adapters, dropout=0.2, compiled=True))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 5e-4 * gradient.abs().max(), name
