"""Is it Llama, Qwen3 and Mistral, number for number, packed or not, cached or not, and does it say what it cannot load?"""

import itertools
import json
import math
import shutil
import statistics

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from adapters.lora import set_token_keys
from errors import UserError
from generation.sampling import generate
from kernels.choice import OPERATIONS, KernelChoice
from kernels.jit import why_not_triton
from kernels.rotary import rotary_tables
from model import (
    KVCache,
    Transformer,
    count_parameters,
    flops_per_token,
    load_pretrained,
)
from model_config import ModelConfig
from tests.tiers import grid

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # with head_dim 16: a channel above, one within, the rest below the band
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "rope_theta": 5e5},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn_tuned": {
        "rope_scaling": YARN
        | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.3}
    },
    "qwen3": {"qk_norm": True, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6},
    "qwen3_tied": {"qk_norm": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6},
    "mistral_wide": {"sliding_window": 500, "num_key_value_heads": 2},  # wider than the text
    "mistral_open": {
        "family": "mistral",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },  # version 0.3 has none
}
VOCAB, LENGTH = 199, 150


def config(**changes) -> ModelConfig:
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    return ModelConfig(**(base | changes))


def random_model(seed=0, **changes) -> Transformer:
    """Weights three times larger than at the start, so attention is sharp, and norms that are not one."""
    model = Transformer(config(**changes))
    model.init_weights(seed, zero_residual=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(3.0)
    return model


def random_ids(batch=2, length=LENGTH, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def write_folder(folder, model, config_json=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json or model.config.to_hf()))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("name", VARIANTS)
def test_our_folder_gives_the_same_logits_in_transformers(name, transformers, tmp_path):
    """1e-5 is the project's bound; logits reach 12 here, so it is a few units in the last place of fp32."""
    model = random_model(**VARIANTS[name])
    reader = transformers.AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", model))
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), reader(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_saved_by_transformers_loads(name, transformers, tmp_path):
    model = random_model(**VARIANTS[name])
    reader = transformers.AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", model))
    reader.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(tmp_path / "theirs")
    assert loaded.config == model.config
    for (name, found), (_, wanted) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("name", ["gqa", "qwen3", "mistral"])
def test_gradients_equal_those_of_transformers(name, transformers, tmp_path):
    model = random_model(**VARIANTS[name])
    peer = transformers.AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", model))
    ids = random_ids()
    F.cross_entropy(model.logits(model(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    peer(ids, labels=ids).loss.backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_sharded_folder_loads(transformers, tmp_path):
    model = random_model()
    peer = transformers.AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", model))
    peer.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = load_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    for found, wanted in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted.bfloat16())
    next((tmp_path / "shards").glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.*missing"):
        load_pretrained(tmp_path / "shards")


def test_version_4_and_version_5_configs_are_read_alike():
    ours = config(rope_theta=5e5, rope_scaling=LLAMA3)
    written = ours.to_hf()
    old = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    new = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new) == ModelConfig.from_hf(written) == ours
    oldest = old | {"rope_scaling": {"type": "linear", "factor": 2.0}}  # before 4.43
    assert ModelConfig.from_hf(oldest).rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(family, transformers):
    given = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    given |= {"num_attention_heads": 32, "model_type": family}
    theirs = transformers.AutoConfig.for_model(**given)
    ours = ModelConfig.from_hf(given)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.sliding_window == (theirs.sliding_window if family == "mistral" else None)


def test_a_window_that_a_family_does_not_read_is_none():
    """transformers' Llama ignores the field, and Qwen3 as long as use_sliding_window is false."""
    for changes in ({}, {"qk_norm": True}):
        written = config(**changes).to_hf() | {"sliding_window": 16}
        assert ModelConfig.from_hf(written).sliding_window is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bloom"}, "only llama, qwen3, mistral.* can be loaded"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
        ({"rope_theta": 5e5}, "rope_theta"),  # rope_parameters still says 10000
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf(config().to_hf() | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_an_impossible_shape_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        config(**change)


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json: the file is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: the file is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (_truncate, "model.safetensors: the file is not a whole safetensors file"),
        (_change_tensors(lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}), "lm_head.weight first"),
        (
            _change_tensors(lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}),
            "model.norm.weight first",
        ),
        (_change_tensors(lambda t: t | {"model.extra.bias": torch.ones(1)}), "model.extra.bias first"),
        (
            _change_tensors(lambda t: t | {"model.norm.weight": torch.ones(65)}),
            r"model.norm.weight has the shape \(65,\)",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(damage, named, tmp_path):
    folder = write_folder(tmp_path / "model", random_model())
    damage(folder)
    with pytest.raises(UserError, match=named):
        load_pretrained(folder)


# --------------------------------------------------------------------------------------------------- packing, precision


@pytest.mark.parametrize("name", ["gqa", "qwen3", "yarn", "mistral"])
def test_packed_documents_equal_the_documents_alone(name):
    """Forward and gradients, to 1e-5 (fp32 sums in another order). Two rows, five documents, one a single token."""
    model = random_model(**VARIANTS[name])
    ids = random_ids(batch=2, length=40)
    bounds = [0, 13, 14, 40, 69, 80]
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).flatten(0, 1)
    upstream = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    packed_grads = torch.autograd.grad((packed * upstream).sum(), list(model.parameters())[:-1])
    documents = [ids.flatten()[start:end][None] for start, end in itertools.pairwise(bounds)]
    alone = torch.cat([model(document)[0] for document in documents])
    alone_grads = torch.autograd.grad((alone * upstream).sum(), list(model.parameters())[:-1])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    for found, wanted in zip(packed_grads, alone_grads, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_empty_documents_at_the_end_change_nothing():
    """cu_seqlens is padded to a fixed length where shapes must not change from step to step."""
    model, ids = random_model(), random_ids(batch=2, length=20)
    bounds = torch.tensor([0, 7, 20, 33, 40], dtype=torch.int32)
    padded = torch.cat([bounds, torch.tensor([40, 40], dtype=torch.int32)])
    assert torch.equal(model(ids, cu_seqlens=bounds), model(ids, cu_seqlens=padded))


def test_rows_alone_are_plain_causal_attention():
    model, ids = random_model(), random_ids(batch=2, length=20)
    rows = torch.tensor([0, 20, 40], dtype=torch.int32)
    assert torch.equal(model(ids, cu_seqlens=rows), model(ids))


def test_the_future_is_invisible():
    model, ids = random_model(), random_ids(batch=1, length=30)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % VOCAB
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20], after[:, 20])


def test_rotary_tables_stay_fp32_in_a_bf16_model():
    """Scores depend on distances only, so moving all positions by 30,000 may cost no more than bf16 itself does."""
    model, ids = random_model(), random_ids(batch=1, length=64)
    near = torch.arange(64)[None]
    with torch.no_grad():
        exact = model(ids, positions=near)

        def error(positions, autocast):
            half = random_model().to(torch.float32 if autocast else torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return ((half(ids, positions=positions).float() - exact).norm() / exact.norm()).item()

        for autocast in (True, False):
            assert error(near + 30_000, autocast) < 1.5 * error(near, autocast) < 0.1
        with torch.autocast("cpu", torch.bfloat16):
            cos, sin = rotary_tables(near, width=16, theta=10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_compiled_forward_equals_eager():
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model = random_model(num_hidden_layers=1, qk_norm=True, num_key_value_heads=2)
    ids, bounds = random_ids(length=16), torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    compiled = torch.compile(model.forward, fullgraph=True)(ids, cu_seqlens=bounds)
    torch.testing.assert_close(compiled, model(ids, cu_seqlens=bounds), atol=1e-5, rtol=0)


ALL_TRITON = KernelChoice(**dict.fromkeys(OPERATIONS, "triton"))


def gradients_of(model, ids, bounds, half) -> dict[str, torch.Tensor]:
    """The hidden states, as "hidden", and every parameter's gradient of a weighted sum of them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = model(ids, cu_seqlens=bounds)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(
        (hidden.float() * weight).sum(), [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    )
    names = [name for name, _ in model.named_parameters() if name != "lm_head.weight"]
    return {"hidden": hidden.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.skipif(why_not_triton(torch.device("cpu")) is not None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("half", "compiled"), grid([(False, False), (True, False), (True, True)], quick=[(False, False), (True, False)])
)
def test_the_model_on_triton_kernels_equals_the_model_in_float64(half, compiled):
    """Packed documents through all kernels, and through torch.compile in one graph: no further from float64 than plain
    PyTorch (at most 1.25 times its own error, which in bf16 is 1 to 3 per cent after two blocks)."""
    shape = {"qk_norm": True, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = random_model(**shape)
    ids, bounds = random_ids(length=24), torch.tensor([0, 5, 24, 48], dtype=torch.int32)
    truth = gradients_of(random_model(**shape).double(), ids, bounds, False)
    plain = gradients_of(model, ids, bounds, half)
    model.kernels = ALL_TRITON
    if compiled:
        model.compile(fullgraph=True)
    found = gradients_of(model, ids, bounds, half)
    for name, wanted in truth.items():
        error, own = ((x[name].double() - wanted).norm() / wanted.norm() for x in (found, plain))
        assert error < 1.25 * own + 1e-6, f"{name}: {error:.2e}, plain PyTorch {own:.2e}"
        assert own < (0.05 if half else 1e-5)


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12])
@pytest.mark.parametrize("name", ["gqa", "llama3", "qwen3", "mistral"])
def test_cached_generation_equals_the_uncached(name, chunks):
    """Prefill in one or several pieces, then token by token: the same greedy tokens, logits to 1e-5."""
    model, prompt = random_model(**VARIANTS[name]), random_ids(batch=3, length=12)
    cache = KVCache(model.config, batch_size=3, max_length=40)
    with torch.inference_mode():
        for piece in prompt.split(chunks, dim=1):
            hidden = model(piece, cache=cache)
        ids = prompt
        while ids.shape[1] < 40:
            logits, wanted = model.logits(hidden[:, -1]), model.logits(model(ids)[:, -1])
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
            token = logits.argmax(-1, keepdim=True)
            assert torch.equal(token, wanted.argmax(-1, keepdim=True))
            ids = torch.cat([ids, token], dim=1)
            hidden = model(token, cache=cache)
        assert cache.length == 40
        with pytest.raises(ValueError, match="the cache holds 40 tokens; 41 are needed"):
            model(token, cache=cache)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_greedy_generation_is_that_of_transformers(name, transformers, tmp_path):
    """Token for token, with either one's cache, far beyond a window."""
    model, prompt = random_model(**VARIANTS[name]), random_ids(length=12)
    peer = transformers.AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", model))
    wanted = peer.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(model, prompt, max_new_tokens=40, temperature=0.0), wanted)


def test_shortening_the_cache_forgets():
    model, ids = random_model(), random_ids(batch=1, length=10)
    cache = KVCache(model.config, 1, 16)
    with torch.inference_mode():
        model(ids, cache=cache)
        cache.length = 4
        assert torch.allclose(model(ids[:, 4:6], cache=cache), model(ids[:, :6])[:, 4:], atol=1e-5)


# ------------------------------------------------------------------------------------------------------ initialisation


def cut_normal_std(cut=3.0):
    """Standard deviation of a unit normal cut at ±3: sqrt(1 - 2·3·φ(3) / (Φ(3) - Φ(-3)))."""
    normal = statistics.NormalDist()
    return math.sqrt(1 - 2 * cut * normal.pdf(cut) / (normal.cdf(cut) - normal.cdf(-cut)))


@pytest.mark.parametrize("zero_residual", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_standard_deviation_of_each_tensor(zero_residual, tied):
    """The sample's deviation is within 5 standard errors, σ/√(2n), of the one that init_weights promises."""
    shape = config(vocab_size=1000, hidden_size=128, num_hidden_layers=2, tie_word_embeddings=tied, qk_norm=True)
    model = Transformer(shape)
    model.init_weights(7, zero_residual)
    for name, weight in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert (weight == 1).all(), name
            continue
        expected = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected = 0.0 if zero_residual else 0.02 / math.sqrt(2 * 2)
        elif name == "lm_head.weight":
            expected = 0.001 if zero_residual else 128**-0.5
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected * cut_normal_std(), rel=error, abs=1e-12), name
        assert weight.abs().max() <= 3.0001 * expected and abs(weight.mean()) <= 5 * expected / weight.numel() ** 0.5


def test_initialisation_depends_on_seed_and_name_only():
    first, second = Transformer(config()), Transformer(config(num_hidden_layers=5))
    first.init_weights(3, zero_residual=True)
    torch.manual_seed(99)
    second.init_weights(3, zero_residual=True)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    second.init_weights(4, zero_residual=True)
    assert not torch.equal(first.head_weight, second.head_weight)
    layers = [layer["self_attn.q_proj.weight"] for layer in (x.state_dict() for x in first.model.layers)]
    assert not torch.equal(layers[0], layers[1])


def test_a_meta_model_is_wholly_initialised():
    with torch.device("meta"):
        model = Transformer(config(qk_norm=True, rope_scaling=YARN))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights(0, zero_residual=False)
    plain = Transformer(model.config)
    plain.init_weights(0, zero_residual=False)
    ids = random_ids()
    assert torch.equal(model(ids), plain(ids)) and model(ids).isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_pad_the_vocabulary_are_zero(tied):
    model = Transformer(config(tie_word_embeddings=tied))
    model.init_weights(0, zero_residual=False, num_real_tokens=150)
    for table in (model.model.embed_tokens.weight, model.head_weight):
        assert (table[150:] == 0).all() and (table[:150].abs().sum(-1) > 0).all()


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_without_building(name):
    model = Transformer(config(**VARIANTS[name]))
    count = count_parameters(model.config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.embedding == model.model.embed_tokens.weight.numel()
    assert count.embedding + count.non_embedding == count.total


def test_flops_are_those_that_torch_counts():
    """torch's own counter on forward and backward, with attention as explicit matrix products (so T² is counted)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = random_model(), random_ids(batch=1, length=64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(ids)).sum().backward()
    assert counter.get_total_flops() == 64 * flops_per_token(model.config, 64)
    windowed = config(sliding_window=16)  # no token meets more keys than its window holds
    assert flops_per_token(windowed, 64) == flops_per_token(config(), 16) < flops_per_token(config(), 64)


def test_dropout_zeroes_its_share_in_training_alone():
    """Of the embedding and of each sub-layer's result, the rest scaled up; the same keys zero the same elements."""
    config = ModelConfig(64, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = Transformer(config)
    model.init_weights(seed=0, zero_residual=True)  # so the residual stream is the embedding
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    whole = model.train()(ids)
    model.dropout = 0.25
    set_token_keys(model, torch.arange(4 * 32).view(4, 32))
    dropped = model(ids)
    assert torch.equal(dropped, model(ids)) and not torch.equal(dropped, whole)
    share = (dropped == 0).float().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / dropped.numel()) ** 0.5  # four standard deviations
    assert torch.equal(model.eval()(ids), whole)
