"""Do adapters learn what LoRA says, over whatever the frozen weights are kept in? Against full fine-tuning's gradients.

Beside PEFT they are put in test_adapter_files.py.
"""

import json
import math

import pytest
import torch

from adapters.lora import (
    BLOCK_LINEARS,
    LoraLinear,
    NormProjections,
    adapter_settings,
    adapters_active,
    adapters_off,
    add_adapters,
    join_projections,
    merged_state,
    store_after_steps,
    target_names,
)
from adapters.quantised_experts import NF4Experts
from errors import UserError
from kernels.choice import KernelChoice
from kernels.grouped_linear import grouped_linear
from kernels.jit import why_not_triton
from kernels.lora_linear import device_name
from kernels.nf4 import dequantise_nf4, quantise_nf4
from model import Transformer
from model_config import ModelConfig
from training.optimizers import build_optimizers

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
        for m in layer.lora_magnitude_vector.values():
            m.data *= 1 + 0.2 * torch.randn(m.shape, generator=generator)
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
    with pytest.raises(UserError, match="rank is 0"):
        add_adapters(a_model(), rank=0)
    with pytest.raises(UserError, match="dropout is 1"):
        add_adapters(a_model(), dropout=1.0)
    for name in ("default", "a.b", "values"):  # taken; a path; what a dictionary of parameters has already
        with pytest.raises(ValueError, match="name of an adapter"):
            add_adapters(an_adapted_model(), name=name)


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"]])
def test_all_linear_means_the_blocks_and_never_the_head(targets):
    model = a_model()
    add_adapters(model, targets=targets)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {path.rpartition(".")[2] for path in lora_layers(model)} == names == set(target_names(model))
    assert len(lora_layers(model)) == 2 * 7 and type(model.lm_head) is torch.nn.Linear
    assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad


def test_a_starts_uniform_and_b_at_zero():
    """A within ±1/√in with that distribution's variance, 1 / (3 in), to five standard errors, 10 %; the seed decides."""
    model, same, other = a_model(), a_model(), a_model()
    add_adapters(model, rank=32)
    add_adapters(same, rank=32)
    add_adapters(other, rank=32, seed=1)
    for path, layer in lora_layers(model).items():
        a, width = layer.lora_A["default"], layer.shape[1]
        assert a.abs().max() <= width**-0.5 and a.abs().max() > 0.99 * width**-0.5
        assert a.var().item() == pytest.approx(1 / (3 * width), rel=0.1)
        assert not layer.lora_B["default"].any()
        assert torch.equal(a, same.get_submodule(path).lora_A["default"])
        assert not torch.equal(a, other.get_submodule(path).lora_A["default"])


def test_the_optimizer_holds_the_adapters_alone():
    model = a_model()
    add_adapters(model, rank=RANK, dora=True)
    held = {id(p) for o in build_optimizers(model, name="adamw", learning_rate=1e-3, weight_decay=0.1)
            for group in o.param_groups for p in group["params"]}  # fmt: skip
    assert held == {id(p) for name, p in model.named_parameters() if ".lora_" in name}


def test_rslora_divides_by_the_root_of_the_rank():
    model, plain = an_adapted_model(rslora=True), an_adapted_model()
    assert {layer.scales["default"] for layer in lora_layers(model).values()} == {ALPHA / math.sqrt(RANK)}
    for layer in lora_layers(plain).values():
        layer.lora_B["default"].data *= math.sqrt(RANK)
    torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- DoRA


def dora_layer(quantise=None, dtype=torch.float32, dropout=0.0) -> LoraLinear:
    model = an_adapted_model(dora=True, quantise=quantise, dropout=dropout)
    layer = model.model.layers[0].self_attn.q_proj
    if not quantise:
        layer.weight.data = layer.weight.data.to(dtype)
    return layer


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_dora_is_the_papers_equation(quantise):
    """m (W + s B A) / |W + s B A| by rows, the length a constant: output and gradients in float64, to 1e-5."""
    layer = dora_layer(quantise)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    a, b, m = (
        part["default"].detach().double().requires_grad_()
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    weight = layer.frozen_weight().double() + ALPHA / RANK * b @ a
    wanted_x = x.detach().double().requires_grad_()
    wanted = wanted_x @ (m[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)).T
    wanted.square().sum().backward()
    found = y, x.grad, *(p["default"].grad for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    for ours, exact in zip(found, (wanted, wanted_x.grad, a.grad, b.grad, m.grad), strict=True):
        assert ((ours - exact).norm() / exact.norm()).item() < 1e-5


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_a_new_dora_adapter_has_the_rows_lengths_and_changes_nothing(quantise):
    model, plain = a_model(), a_model()
    add_adapters(model, rank=RANK, dora=True, quantise=quantise)
    add_adapters(plain, rank=RANK, quantise=quantise)
    torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-5, rtol=0)
    for layer in lora_layers(model).values():
        lengths = layer.frozen_weight().square().sum(1).sqrt()
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].data, lengths, atol=0, rtol=1e-6)


def test_doras_lengths_learn_over_bf16_weights():
    """A step of 1e-5 would be lost in bf16, whose numbers near 1 are 1/128 apart."""
    model = a_model().to(torch.bfloat16)
    add_adapters(model, rank=RANK, dora=True)
    lengths = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
    assert {p.dtype for p in lengths.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in lengths.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    loss(model).backward()
    optimizer.step()
    for name, p in lengths.items():
        assert (p != before[name]).float().mean() > 0.95


def test_doras_dropout_masks_what_the_adapter_and_its_frozen_part_see():
    layer = dora_layer(dropout=0.5).train()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    branch = torch.nn.functional.dropout(x, 0.5)
    weight = layer.weight + ALPHA / RANK * layer.lora_B["default"] @ layer.lora_A["default"]
    factor = layer.lora_magnitude_vector["default"] / weight.norm(dim=1)
    wanted = x @ layer.weight.T + branch @ (factor[:, None] * weight - layer.weight).T
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)


def test_dora_cannot_be_joint():
    with pytest.raises(ValueError, match="DoRA"):
        join_projections(an_adapted_model(dora=True), "torch")


# ------------------------------------------------------------------------------------------------------- several, and off


@pytest.mark.parametrize("path", ["torch", "augmented", "joint"])
def test_active_adapters_can_be_chosen_and_come_back(path):
    """Each set of active adapters computes what a model with these alone does, on each path, before and after a step."""
    model = an_adapted_model(path)
    add_adapters(model, rank=RANK, alpha=ALPHA, name="critic", seed=3, targets=("q_proj", "v_proj", "down_proj"))
    for layer in lora_layers(model).values():
        for b in (b for name, b in layer.lora_B.items() if name == "critic"):
            b.data = 0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(7))

    def alone(*names: str) -> torch.Tensor:
        plain = a_model()
        for layer_path, layer in lora_layers(model).items():
            for name in (name for name in names if name in layer.lora_A):
                product = layer.lora_B[name] @ layer.lora_A[name]
                plain.get_submodule(layer_path).weight.data += ALPHA / RANK * product.detach()
        return plain(IDS)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    store_after_steps(model, [optimizer])
    for _ in range(2):
        for names in ((), ("default",), ("critic",), ("critic", "default")):
            with adapters_active(model, names):
                torch.testing.assert_close(model(IDS), alone(*names), atol=2e-5, rtol=0)
        torch.testing.assert_close(model(IDS), alone("default", "critic"), atol=2e-5, rtol=0)
        with adapters_active(model, ["default"]):
            loss(model).backward()
        assert all(
            layer.lora_A["critic"].grad is None for layer in lora_layers(model).values() if "critic" in layer.lora_A
        )
        optimizer.step()
        optimizer.zero_grad()


def test_adapters_off_is_the_base_and_an_exception_leaves_them_on():
    model = an_adapted_model()
    before = model(IDS)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        assert torch.equal(model(IDS), a_model()(IDS))
        with adapters_active(model, ["default"]):
            assert torch.equal(model(IDS), before)
        assert torch.equal(model(IDS), a_model()(IDS))
        raise RuntimeError("inside")
    assert torch.equal(model(IDS), before)
    with pytest.raises(ValueError, match="'other'; it has default"), adapters_active(model, ["other"]):
        pass


def test_a_second_adapter_leaves_the_first_one_learning_with_its_own_dropout():
    model = an_adapted_model(dropout=0.5)
    add_adapters(model, rank=2, name="second")
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)
    assert {name: s.dropout for name, s in adapter_settings(model).items()} == {"default": 0.5, "second": 0.0}
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    with adapters_active(model, ["second"]):
        assert torch.equal(model(IDS), model(IDS))


# --------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}, {"quantise": "nf4"},
                                      {"quantise": "nf4", "dora": True}], ids=str)  # fmt: skip
def test_merged_weights_compute_what_the_adapters_do(settings):
    """To 1e-5 in fp32, also of what NF4 decodes to; the model keeps every bit."""
    model = an_adapted_model(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = a_model()
    merged.load_state_dict(merged_state(model))
    torch.testing.assert_close(merged(IDS), model(IDS), atol=2e-5, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with adapters_off(model):
        off = merged_state(model, names=["model.layers.0.mlp.up_proj.weight"])
    assert list(off) == ["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(*off.values(), model.model.layers[0].mlp.up_proj.frozen_weight())


def test_merging_rounds_once_to_the_frozen_weights_dtype():
    model = an_adapted_model()
    layer = model.model.layers[1].mlp.down_proj
    exact = layer.weight.double() + ALPHA / RANK * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    merged = merged_state(model, dtype=torch.bfloat16)
    assert torch.equal(merged["model.layers.1.mlp.down_proj.weight"], exact.float().to(torch.bfloat16))
    bf16 = a_model().to(torch.bfloat16)
    add_adapters(bf16)
    assert {tensor.dtype for tensor in merged_state(bf16).values()} == {torch.bfloat16}


def test_tied_embeddings_stay_one_tensor():
    config = ModelConfig(97, 64, 128, 1, 4, tie_word_embeddings=True)
    model = Transformer(config)
    model.init_weights(seed=1, zero_residual=False)
    add_adapters(model)
    assert "lm_head.weight" not in merged_state(model)
    assert merged_state(model)["model.embed_tokens.weight"].data_ptr() == model.head_weight.data_ptr()


def test_between_forward_and_backward_nf4_keeps_no_decoded_weight():
    """What autograd keeps of a QLoRA model beside the frozen tensors themselves, against one that lets it keep them decoded.

    The difference is all decoded block weights: 2 layers of (64·64·2 + 32·64·2 + 3·64·128) fp32 values.
    """
    model = an_adapted_model(quantise="nf4")
    ours = kept_bytes(model)
    for layer in lora_layers(model).values():
        layer.forward = naive_forward.__get__(layer)
    naive = kept_bytes(model)
    decoded = 4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert ours < 0.6 * naive and naive - ours > 0.8 * decoded


def test_nor_of_experts_whose_gradients_are_those_beside_decoded_weights():
    """2 layers of 8 experts of 3·64·32 fp32 values; the adapters' gradients are equal to the bit."""
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    parts = {"family": "mixtral", "num_experts": 8, "experts_per_token": 2, "expert_size": 32}
    model = Transformer(ModelConfig(vocab_size=97, **shape, **parts))
    model.init_weights(seed=1, zero_residual=False)
    add_adapters(model, rank=RANK, alpha=ALPHA, quantise="nf4")
    experts = [module for module in model.modules() if isinstance(module, NF4Experts)]
    found = []
    for way in (None, naive_product):
        for module in experts if way else ():
            module.product = way.__get__(module)
        model.zero_grad()
        loss(model).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((kept_bytes(model), gradients))
    (ours, gradients), (naive, wanted) = found
    # nor are their inputs kept, 2 copies of 24 tokens: a frozen weight has no gradient
    assert len(experts) == 2 and naive - ours == 4 * 2 * (8 * 3 * 64 * 32 + 2 * 24 * (64 + 32))
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def kept_bytes(model) -> int:
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(IDS)
    assert output.requires_grad
    return sum(kept.values())


def naive_product(experts, stack, x, ends, way):
    return grouped_linear(x, experts.decoded(stack, x.dtype), ends, implementation=way)


def naive_forward(layer, x):
    y = torch.nn.functional.linear(x, layer.frozen_weight())
    return y + layer.scales["default"] * (x @ layer.lora_A["default"].T) @ layer.lora_B["default"].T


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
    blocks = model.model.layers
    assert {block.self_attn.o_proj.path for block in blocks} == {fastest}
    assert {isinstance(block.input_layernorm, NormProjections) for block in blocks} == {fastest == "augmented"}
    torch.testing.assert_close(model(IDS), a_model()(IDS), atol=1e-5, rtol=0)
