"""Do adapters learn what LoRA says, over whatever the frozen weights are kept in? Against full fine-tuning's gradients."""

import json

import pytest
import torch

from errors import UserError
from kernels.choice import KernelChoice
from kernels.jit import why_not_triton
from kernels.lora_linear import device_name
from kernels.nf4 import dequantise_nf4, quantise_nf4
from model import ModelConfig, Transformer
from training.adapters import (
    BLOCK_LINEARS,
    LoraLinear,
    NormProjections,
    add_adapters,
    join_projections,
    store_after_steps,
)

RANK, ALPHA = 4, 6.0
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(5))


def a_model() -> Transformer:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(vocab_size=97, num_key_value_heads=2, **shape))
    model.init_weights(seed=1, zero_residual=False)
    return model


def an_adapted_model(path="torch", **settings) -> Transformer:
    """With adapters that add something: B is drawn, as if it had learned."""
    model = a_model()
    add_adapters(model, rank=RANK, alpha=ALPHA, **settings)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values():
            b.data = 0.05 * torch.randn(b.shape, generator=generator)
        if path != "joint":
            layer.take_path(path)
    if path == "joint":
        join_projections(model, "triton" if why_not_triton(torch.device("cpu")) is None else "torch")
    return model


def lora_layers(model) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def loss(model) -> torch.Tensor:
    weight = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))
    return (model(IDS) * weight).sum()


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_new_adapters_change_nothing(quantise):
    """Bit for bit: B is zero. Over NF4, nothing beyond what rounding the weights to NF4 changes."""
    plain, adapted = a_model(), a_model()
    add_adapters(adapted, rank=RANK, alpha=ALPHA, quantise=quantise)
    if quantise:
        for name, parameter in plain.named_parameters():
            if name.split(".")[-2] in BLOCK_LINEARS:
                parameter.data = dequantise_nf4(quantise_nf4(parameter.data), torch.float32)
    torch.testing.assert_close(adapted(IDS), plain(IDS), atol=0 if quantise is None else 1e-5, rtol=0)


@pytest.mark.parametrize("path", ["torch", "augmented", "joint"])
def test_gradients_are_those_of_full_fine_tuning_by_the_chain_rule(path):
    """W + s B A in place of W: the same output, and dB = s dW Aᵀ, dA = s Bᵀ dW for that weight's gradient dW, to 1e-5."""
    adapted, merged = an_adapted_model(path), a_model()
    scale = ALPHA / RANK
    layers = lora_layers(adapted)
    for name, layer in layers.items():
        weight = merged.get_submodule(name).weight
        weight.data = weight + scale * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(adapted(IDS), merged(IDS), atol=1e-5, rtol=1e-5)
    loss(adapted).backward()
    loss(merged).backward()
    for name, layer in layers.items():
        a, b, full = layer.lora_A["default"], layer.lora_B["default"], merged.get_submodule(name).weight.grad
        for found, wanted in ((a.grad, scale * b.T @ full), (b.grad, scale * full @ a.T)):
            assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5


def test_only_adapters_learn_and_they_are_fp32_over_bf16_weights():
    model = a_model().to(torch.bfloat16)
    add_adapters(model, rank=RANK, alpha=ALPHA, targets=("q_proj", "down_proj"))
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 2 * 2 and all(".lora_" in name and "_proj" in name for name in learning)
    assert {parameter.dtype for parameter in learning.values()} == {torch.float32}
    model(IDS).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(parameter.grad.dtype == torch.float32 for name, parameter in learning.items())


def test_every_way_of_computing_learns_the_same():
    """Five AdamW steps: the augmented buffer must follow B after each; losses to 1e-4."""
    curves = {}
    for path in ("torch", "augmented", "joint"):
        model = an_adapted_model(path)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        store_after_steps(model, [optimizer])
        curves[path] = []
        for _ in range(5):
            value = loss(model).square() / 1e4
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[path].append(value.item())
    assert abs(curves["torch"][0] - curves["torch"][4]) > 0.1 * curves["torch"][0]
    for path in ("augmented", "joint"):
        torch.testing.assert_close(torch.tensor(curves[path]), torch.tensor(curves["torch"]), atol=0, rtol=1e-4)


def test_joint_projections_keep_every_name_and_can_be_switched_off():
    plain, joint = an_adapted_model(), an_adapted_model("joint")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in joint.named_parameters()]
    for (_, wanted), (_, found) in zip(plain.named_parameters(), joint.named_parameters(), strict=True):
        assert torch.equal(found, wanted)
    for layer in lora_layers(joint).values():
        layer.active = ()
    torch.testing.assert_close(joint(IDS), a_model()(IDS), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="dropout"):
        join_projections(an_adapted_model(dropout=0.1), "torch")


def test_two_adapters_add_up_and_can_be_left_out():
    model = an_adapted_model()
    base = a_model()(IDS)
    first = model(IDS)
    add_adapters(model, rank=2, alpha=4.0, name="second", seed=9)
    torch.testing.assert_close(model(IDS), first, atol=1e-6, rtol=0)  # the second adds nothing yet
    for layer in lora_layers(model).values():
        assert [a.shape[0] for a in layer.lora_A.values()] == [RANK, 2]
        layer.active = ()
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_dropout_acts_in_training_alone_and_on_the_adapters_alone(quantise):
    model = an_adapted_model(quantise=quantise, dropout=0.5)
    still = an_adapted_model(quantise=quantise)
    torch.testing.assert_close(model.eval()(IDS), still(IDS), atol=1e-5, rtol=0)
    model.train()
    torch.manual_seed(1)
    once = model(IDS)
    torch.manual_seed(1)
    assert torch.equal(model(IDS), once) and not torch.equal(model(IDS), once)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.zero_()  # what is dropped then comes from the adapters' branch, which is zero
    zeroed = model(IDS)
    assert torch.equal(model(IDS), zeroed)


def test_a_target_that_no_block_has_is_named():
    with pytest.raises(UserError, match="lm_head"):
        add_adapters(a_model(), targets=("lm_head",))
    with pytest.raises(UserError, match="int3"):
        add_adapters(a_model(), quantise="int3")


@pytest.mark.skipif(why_not_triton(torch.device("cpu")) is not None, reason="triton is not installed")
@pytest.mark.parametrize("fastest", ["torch", "augmented"])
def test_layers_compute_in_the_way_that_was_measured_as_the_fastest(fastest, tmp_path, monkeypatch):
    """A table that says so of shapes like these, on a device of this name; without the number of rows none is read."""
    times = {"torch": 2.0, "augmented": 2.0, fastest: 1.0}
    shape = {"rows": 24, "K": 64, "R": 8, "adapters": 1, "dtype": "float32", "device": device_name(torch.device("cpu"))}
    table = [{**shape, "N": n, "microseconds": times} for n in (32, 128, 256)]
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr("kernels.lora_linear.MEASURED", tmp_path / "table.json")
    model = a_model()
    model.kernels = KernelChoice(lora="triton")
    add_adapters(model, rank=RANK, alpha=ALPHA, rows=24)
    blocks = model.model["layers"]
    assert {block.self_attn.o_proj.path for block in blocks} == {fastest}
    assert {isinstance(block.input_layernorm, NormProjections) for block in blocks} == {fastest == "augmented"}
    torch.testing.assert_close(model(IDS), a_model()(IDS), atol=1e-5, rtol=0)
