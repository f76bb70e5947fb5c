"""Do PEFT and bitsandbytes open our folders, and we theirs, with the same numbers on both sides? And is a base read frugally?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters.base_models import load_base, load_quantised, quantised_state, save_quantised, stored_dtype
from adapters.lora import (
    BLOCK_LINEARS,
    LoraLinear,
    adapter_settings,
    adapters_active,
    add_adapters,
    merged_state,
    target_names,
)
from adapters.peft_files import (
    adapter_config,
    adapter_state,
    learned_over,
    load_adapter,
    load_adapter_state,
    read_adapter_config,
    save_adapter,
)
from adapters.scalar_head import RewardModel
from errors import UserError
from kernels.nf4 import dequantise_nf4, quantise_nf4
from model import Transformer, load_pretrained
from model_config import ModelConfig

# bitsandbytes 0.50's CPU decoder is wrong for widths that are multiples of 16 but not of 64; so all widths here are
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(5))
KINDS = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True, "targets": ("q_proj", "down_proj")}]


def a_model(**changes) -> Transformer:
    model = Transformer(ModelConfig(**{"vocab_size": 97, "num_key_value_heads": 2, **SHAPE, **changes}))
    model.init_weights(seed=1, zero_residual=False)
    return model


def save_base(model: Transformer, folder: Path, dtype=torch.float32) -> Path:
    """A Hugging Face folder of the model, written without our own writers."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(dtype)))
    tensors = {name: parameter.detach().to(dtype).contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(a_model(), tmp_path_factory.mktemp("base") / "model")


def train(model, name="default") -> Transformer:
    """Values for an adapter as if it had learned."""
    generator = torch.Generator().manual_seed(2)
    state = {key: tensor.clone() for key, tensor in adapter_state(model, name).items()}
    for key, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor * (1 + 0.2 * noise) if "magnitude" in key else tensor + 0.05 * noise)
    load_adapter_state(model, state, name)
    return model


def an_adapted_model(base, **settings) -> Transformer:
    model = load_base(base)
    add_adapters(model, **{"rank": 4, "alpha": 6.0, **settings})
    return train(model)


def logits(model) -> torch.Tensor:
    return model.logits(model(IDS)) if isinstance(model, Transformer) else model(IDS).logits


def of_peft(folder, base):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    # training mode: out of it bitsandbytes repacks its weights on some CPUs and rounds their scales to bf16
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).train()


def gradients_of_peft(model) -> dict[str, torch.Tensor]:
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = {name: name.replace(".default", "") for name in named}
    return {new.removesuffix(".weight") if "magnitude" in new else new: named[old] for old, new in names.items()}


def gradients(model) -> dict[str, torch.Tensor]:
    for layer in (module for module in model.modules() if isinstance(module, LoraLinear)):
        for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for parameter in parts.values():
                parameter.data = parameter.grad
    return adapter_state(model)


# ------------------------------------------------------------------------------------------------------------ beside PEFT


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_peft_loads_our_folder_and_computes_the_same(base, tmp_path, settings):
    """Output and every gradient to 1e-5 of the largest, and PEFT's own merge is ours."""
    ours = an_adapted_model(base, **settings)
    save_adapter(ours, tmp_path / "adapter", base_model=str(base))
    theirs = of_peft(tmp_path / "adapter", base)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    merged = merged_state(ours)
    for model in (ours, theirs):
        (logits(model) * torch.randn(2, 12, 97, generator=torch.Generator().manual_seed(3))).sum().backward()
    found, wanted = gradients(ours), gradients_of_peft(theirs)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r"model\.layers\.0\.(mlp\.gate|self_attn\.[kv])_proj"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "use_rslora": True, "exclude_modules": ["v_proj"]},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
        {
            "target_modules": list(BLOCK_LINEARS),
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 8},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 20, "down_proj": 3},
        },
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_we_load_pefts_folder_and_compute_the_same(base, tmp_path, settings):
    """And what we save of it PEFT loads again, to the same output."""
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_base(base)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert (logits(ours) - logits(load_base(base))).abs().max() > 1e-3
    assert learned_over(tmp_path / "theirs") is None
    save_adapter(ours, tmp_path / "again", base_model=str(base))
    again = of_peft(tmp_path / "again", base)
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-6, rtol=0)
    same = load_file(tmp_path / "again" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert same.keys() == wanted.keys() and all(torch.equal(same[key], wanted[key]) for key in wanted)


def test_new_adapters_are_drawn_as_peft_draws_them(base):
    """A: the same bounds, and the same variance to five standard errors (10 %); B: zero."""
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=32, target_modules="all-linear"))
    ours = load_base(base)
    add_adapters(ours, rank=32)
    wanted = peft.get_peft_model_state_dict(theirs)
    for key, tensor in adapter_state(ours).items():
        if "lora_A" in key:
            assert tensor.var().item() == pytest.approx(wanted[key].var().item(), rel=0.14)
            bound = tensor.shape[1] ** -0.5
            assert max(tensor.abs().max(), wanted[key].abs().max()) <= bound
            assert min(tensor.abs().max(), wanted[key].abs().max()) > 0.99 * bound
        else:
            assert not tensor.any() and not wanted[key].any()


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=str)
def test_qlora_computes_what_peft_does_over_bitsandbytes(base, tmp_path, settings):
    """Output and every gradient to 1e-5 of the largest, over the same 4 bits, which they load from our folder."""
    pytest.importorskip("bitsandbytes")
    ours = load_base(base, quantise="nf4")
    save_quantised(ours, tmp_path / "four", {})
    add_adapters(ours, rank=4, alpha=6.0, **settings)
    train(ours)
    save_adapter(ours, tmp_path / "adapter", base_model=str(base))
    assert learned_over(tmp_path / "adapter") == "nf4"
    theirs = of_peft(tmp_path / "adapter", tmp_path / "four")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        (logits(model) * torch.randn(2, 12, 97, generator=torch.Generator().manual_seed(3))).sum().backward()
    found, wanted = gradients(ours), gradients_of_peft(theirs)
    for key, gradient in wanted.items():
        assert (found[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


def test_a_reward_models_adapter_goes_with_its_head_to_peft_and_back(base, tmp_path):
    """The head learns beside the adapter and is saved with it; a language model that takes the adapter gives it back."""
    peft = pytest.importorskip("peft")
    ours = RewardModel.from_pretrained(base, seed=4)
    add_adapters(ours, rank=4, alpha=6.0)
    learning = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert "score.weight" in learning and all(".lora_" in name for name in learning - {"score.weight"})
    train(ours)
    save_adapter(ours, tmp_path / "reward", base_model=str(base))
    model = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "reward")
    ids = IDS.clamp(min=1)
    torch.testing.assert_close(ours(ids)[:, -1:], theirs(ids).logits, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("reward", "theirs"):
        again = RewardModel.from_pretrained(base, seed=5)
        assert load_adapter(again, tmp_path / folder) is None
        assert torch.equal(again(ids), ours(ids))
        policy = load_base(base)
        head = load_adapter(policy, tmp_path / folder, "reward")
        torch.testing.assert_close(policy(ids) @ head[0], ours(ids), atol=1e-6, rtol=0)
    save_adapter(an_adapted_model(base), tmp_path / "language")
    with pytest.raises(UserError, match=r"score\.weight"):
        load_adapter(RewardModel.from_pretrained(base, seed=4), tmp_path / "language")


# ------------------------------------------------------------------------------------------------------- the PEFT folder


def test_keys_and_configuration_are_pefts(base, tmp_path):
    model = an_adapted_model(base, targets=["q_proj"], dropout=0.25, rslora=True, dora=True)
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter_state(model).items() if key.startswith(layer)}
    assert shapes == {
        f"{layer}.lora_A.weight": (4, 64), f"{layer}.lora_B.weight": (64, 4), f"{layer}.lora_magnitude_vector": (64,)
    }  # fmt: skip
    save_adapter(model, tmp_path / "adapter", base_model="some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == adapter_config(model, "default", "some/base")
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["q_proj"]}
    given |= {"use_rslora": True, "use_dora": True, "base_model_name_or_path": "some/base", "bias": "none"}
    assert given.items() <= config.items()
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt", "base_weights": "full"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]  # no temporary folder is left
    with pytest.raises(UserError, match="exists"):
        save_adapter(model, tmp_path / "adapter")


def test_several_named_adapters_come_from_their_folders(base, tmp_path):
    """Loaded side by side over one base each computes what it did alone."""
    for name, settings in (("policy", {}), ("critic", {"dora": True, "rank": 2, "targets": ["v_proj"]})):
        save_adapter(an_adapted_model(base, **settings), tmp_path / name)
    model = load_base(base)
    load_adapter(model, tmp_path / "policy", "policy")
    load_adapter(model, tmp_path / "critic", "critic")
    assert set(adapter_settings(model)) == {"policy", "critic"}
    for name in ("policy", "critic"):
        alone = load_base(base)
        load_adapter(alone, tmp_path / name)
        with adapters_active(model, [name]):
            assert torch.equal(logits(model), logits(alone))
        found, wanted = adapter_state(model, name), adapter_state(alone)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("path", ["torch", "augmented"])
def test_an_adapter_that_is_there_takes_the_values_and_keeps_its_parameters(base, tmp_path, path):
    """As when training goes on: the optimizer's parameters stay the same objects, and the next forward uses the values."""
    saved = an_adapted_model(base)
    save_adapter(saved, tmp_path / "adapter")
    model = load_base(base).double()
    add_adapters(model, rank=4, alpha=6.0, seed=8)
    for layer in (module for module in model.modules() if isinstance(module, LoraLinear)):
        layer.take_path(path)
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    load_adapter(model, tmp_path / "adapter")
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in before.items())
    # over float64 weights, since the augmented path sums its terms in another order
    torch.testing.assert_close(logits(model), logits(saved.double()), atol=1e-6, rtol=0)
    for other in ({"alpha": 7.0}, {"rslora": True}, {"dora": True}, {"targets": ["q_proj"]}, {"rank": 2, "alpha": 3.0}):
        model = load_base(base)
        add_adapters(model, **{"rank": 4, "alpha": 6.0, **other})
        with pytest.raises(UserError, match=r"settings of its adapter_config|has the shape"):
            load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"velora_config": {"rank": 1}}, "velora_config"),
        ({"a_variant_of_tomorrow": {"x": 1}}, "a_variant_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": None}, "r is missing"),
        ({"r": 5}, "shape"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": r".*\.v_proj"}, "target_modules"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(base, tmp_path, changes, message):
    save_adapter(an_adapted_model(base, targets=["q_proj"]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = load_base(base)
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path / "adapter")
    assert not adapter_settings(model) and torch.equal(logits(model), logits(load_base(base)))


def test_an_adapter_of_another_model_or_of_other_layers_is_refused(base, tmp_path):
    save_adapter(an_adapted_model(base), tmp_path / "adapter")
    for other, message in (({"num_hidden_layers": 1}, "no layer model.layers.1"), ({"hidden_size": 128}, "shape")):
        with pytest.raises(UserError, match=message):
            load_adapter(a_model(**other), tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors |= {f"base_model.model.lm_head.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}
    save_file(tensors, weights)
    with pytest.raises(UserError, match="lm_head"):
        load_adapter(load_base(base), tmp_path / "adapter")
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(UserError, match="pickle"):
        load_adapter(load_base(base), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter_config\.json: the file is missing"):
        read_adapter_config(base)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        adapter_state(a_model(), "other")


# ---------------------------------------------------------------------------------------------------------- 4-bit folders


def four_bits(**changes):
    pytest.importorskip("bitsandbytes")
    settings = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32, **changes}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_transformers_loads_our_4_bit_folder(base, tmp_path, shard_bytes):
    """Its layers are bitsandbytes' and decode to our bits; the head, the embedding and the norms are not quantised."""
    bnb = pytest.importorskip("bitsandbytes")
    ours = load_base(base, quantise="nf4")
    save_quantised(ours, tmp_path / "four", {"note.txt": b"a further file"}, max_shard_bytes=shard_bytes)
    assert (tmp_path / "four" / "note.txt").read_bytes() == b"a further file"
    assert (tmp_path / "four" / "model.safetensors").exists() == (shard_bytes == 10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    for path, layer in ours.named_modules():
        if isinstance(layer, LoraLinear):
            their_layer = theirs.get_submodule(path)
            assert isinstance(their_layer, bnb.nn.Linear4bit)
            decoded = bnb.functional.dequantize_4bit(their_layer.weight.data, their_layer.weight.quant_state)
            torch.testing.assert_close(decoded, layer.frozen_weight(), atol=1e-7, rtol=1e-6)
    assert type(theirs.lm_head) is torch.nn.Linear and theirs.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    again = load_quantised(tmp_path / "four")
    assert torch.equal(logits(again), logits(ours))
    assert stored_dtype(tmp_path / "four") == torch.float32


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.0.mlp.up_proj"]], ids=["all", "some"])
def test_we_load_transformers_4_bit_folder_and_give_it_back(base, tmp_path, double, skipped):
    """With both kinds of absmax, and where some layers were left out; an adapter learns over it; PEFT agrees."""
    settings = four_bits(bnb_4bit_use_double_quant=double, llm_int8_skip_modules=skipped)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_base(tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    quantised = {path for path, layer in ours.named_modules() if isinstance(layer, LoraLinear)}
    assert len(quantised) == (13 if skipped else 14)
    save_quantised(ours, tmp_path / "ours", {})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), logits(theirs))
    add_adapters(ours, rank=2, targets=["up_proj"])
    logits(train(ours)).sum().backward()
    assert all(tensor.abs().sum() > 0 for tensor in gradients(ours).values())


def test_only_block_linears_are_quantised_and_other_4_bit_formats_are_refused(base, tmp_path):
    model = load_base(base, quantise="nf4", dtype=torch.bfloat16)
    state = quantised_state(model)
    packed = {name for name in state if f"{name}.absmax" in state}
    assert {name.split(".")[-2] for name in packed} == set(target_names(model)) and len(packed) == 14
    plain = {name for name in state if "_proj" not in name}
    assert {state[name].dtype for name in plain} == {torch.bfloat16} and "lm_head.weight" in plain
    with pytest.raises(ValueError, match="no 4-bit layers"):
        quantised_state(load_base(base))
    with pytest.raises(UserError, match="int3"):
        load_base(base, quantise="int3")
    config = json.loads((base / "config.json").read_text())
    save_base(a_model(), tmp_path / "model")
    for settings in ({"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(UserError, match="quantization_config"):
            load_base(tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------ base models


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qk_norm": True, "head_dim": 32}], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_quantised_as_it_would_be_in_memory(tmp_path, changes, stored, dtype):
    """Bit for bit what quantising the loaded model gives; and without quantisation what load_pretrained gives."""
    folder = save_base(a_model(**changes), tmp_path / "model", stored)
    plain, found = load_pretrained(folder, dtype=dtype), load_base(folder, quantise="nf4", dtype=dtype)
    for name, parameter in plain.named_parameters():
        layer = found.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, LoraLinear):
            wanted = dequantise_nf4(quantise_nf4(parameter.data), torch.float32)
            assert torch.equal(layer.frozen_weight(), wanted)
        else:
            assert torch.equal(layer.weight, parameter) and layer.weight.dtype == dtype
    assert torch.equal(logits(load_base(folder, dtype=dtype)), logits(plain))
    add_adapters(found)
    assert logits(found).isfinite().all()


def test_a_base_may_be_in_shards_and_its_faults_are_named(tmp_path):
    model = a_model()
    folder = save_base(model, tmp_path / "model")
    whole = load_base(folder, quantise="nf4")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{position % 3}.safetensors" for position, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load_base(folder, quantise="nf4")), logits(whole))

    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_base(folder, quantise="nf4")

    (folder / "part-3.safetensors").write_bytes(b"")
    save_file({"model.stray.weight": torch.zeros(1)}, folder / "part-3.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map | {"model.stray.weight": "part-3.safetensors"}}))
    fails("do not belong to the model, model.stray.weight")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != "model.norm.weight"}}))
    fails("model.norm.weight of the model is missing")
    index.write_text(json.dumps({"weight_map": weight_map}))
    config = model.config.to_hf() | {"intermediate_size": 192}
    (folder / "config.json").write_text(json.dumps(config))
    fails("asks for")


@pytest.mark.exhaustive
def test_loading_a_base_in_4_bits_never_needs_its_full_weights(tmp_path):
    """The peak of a process's resident memory above what the same process had before, mapped pages of files included.

    Four layers of 7.1 million weights: 113 MB in the file, 15 MB in NF4. Allowed beside those 15 MB: four times the
    largest weight (768·2304 in fp32: 7.1 MB), which is itself mapped and, in chunks, scaled and compared on the way to
    4 bits, and 8 MB for the rest. Freed blocks go back to the system at once, or the peak would depend on which of them the
    allocator happened to keep: from 45 to 95 MB.
    """
    shape = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = ModelConfig(vocab_size=128, **shape)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    large, small = save_base(model, tmp_path / "large"), save_base(a_model(), tmp_path / "small")
    program = """
import sys
from model import load_pretrained
from adapters.base_models import load_base
from adapters.lora import add_adapters

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

way, small, large = sys.argv[1:]
for folder in (small, large):  # the first time for what stays allocated
    before = peak()
    model = load_base(folder, quantise="nf4") if way == "streamed" else load_pretrained(folder)
    if way == "whole":
        add_adapters(model, quantise="nf4")
print(peak() - before, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
"""
    root = Path(__file__).resolve().parents[2]

    def measure(way: str) -> tuple[int, int]:
        command = [sys.executable, "-c", program, way, small, large]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        peak, held = done.stdout.split()
        return int(peak), int(held)

    stored = (large / "model.safetensors").stat().st_size
    peak, held = measure("streamed")
    assert held < 0.15 * stored
    assert peak < held + 4 * (4 * 768 * 2304) + 8e6 < 0.7 * stored
    assert measure("whole")[0] > stored  # so the measure sees full weights where there are some
