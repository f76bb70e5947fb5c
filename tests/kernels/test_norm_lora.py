"""Is the norm with the adapters inside, and the product behind it, the norm and then the adapted layer?

Two operations, one after the other: each may err by accuracy.BOUNDS, and independent errors add up in squares. The
composed reference makes the same five roundings (s, normed row, times weight, A's product, result) or more.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels.norm_lora
from kernels.jit import multiprocessors
from kernels.lora_linear import Adapter, augmented_weight
from kernels.norm_lora import norm_lora_linear
from tests.kernels.accuracy import BOUNDS, DTYPES, FLOOR, RATIO, errors, failures, relative_error, run, strided
from tests.kernels.mutants import load_mutant

EPS = 1e-6
QKV = [(24, 4, 2.0, 0), (8, 6, 0.5, 24), (8, 4, 2.0, 32)]  # rows of B, rank, scale, first row


def make(dtype, rows, width, device, layout=QKV, residual=None, master=None):
    generator = torch.Generator().manual_seed(rows * width)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    size = torch.logspace(-2, 1, rows)[:, None]
    inputs = {"x": (draw(rows, width) * size).to(device, residual or dtype)}
    inputs["update"] = (draw(rows, width) * size).to(device, dtype)
    inputs["norm_weight"] = (1 + 0.3 * draw(width)).to(device, residual or dtype)
    inputs["weight"] = (draw(sum(entry[0] for entry in layout), width) / width**0.5).to(device, dtype)
    for i, (height, rank, _, _) in enumerate(layout):
        inputs[f"a{i}"] = (draw(rank, width) / width**0.5).to(device, master or dtype)
        inputs[f"b{i}"] = (draw(height, rank) / rank**0.5).to(device, master or dtype)
    return inputs


def adapters_of(low_rank, layout=QKV):
    return [Adapter(low_rank[f"a{i}"], low_rank[f"b{i}"], scale, row) for i, (_, _, scale, row) in enumerate(layout)]


def call(implementation, module=kernels.norm_lora, gemma=False, layout=QKV):
    """norm_lora_linear as a function of tensors alone; without an update it returns y alone."""

    def function(x, norm_weight, weight, update=None, **low_rank):
        adapters = adapters_of(low_rank, layout)
        y, s = module.norm_lora_linear(
            x, norm_weight, EPS, augmented_weight(weight, adapters), adapters,
            update=update, gemma=gemma, implementation=implementation,
        )  # fmt: skip
        return y if update is None else (y, s)

    return function


def learned(inputs):
    return [name for name in inputs if name != "weight"]


def check(inputs, dtype, **settings):
    """accuracy.check of the kernel against the reference, for two operations."""
    kernel, reference = call("triton", **settings), call("torch", **settings)
    for name, (error, plain) in errors(kernel, reference, inputs, learned(inputs)).items():
        assert error <= min(2**0.5 * BOUNDS[dtype], RATIO * plain + FLOOR), (name, error, plain)
    once, again = (run(kernel, inputs, learned(inputs), 1) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(7, 33), (1, 300), (70, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_norm_layer_and_gradients_equal_float64(device, dtype, rows, width, gemma):
    inputs = make(dtype, rows, width, device)
    check(inputs, dtype, gemma=gemma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_an_addition_it_returns_the_stream_itself(device, dtype):
    inputs = make(dtype, 19, 48, device)
    del inputs["update"]
    check(inputs, dtype)
    adapters = adapters_of(inputs)
    w_aug = augmented_weight(inputs["weight"], adapters)
    assert norm_lora_linear(inputs["x"], inputs["norm_weight"], EPS, w_aug, adapters)[1] is inputs["x"]


def rstd_error(module, inputs):
    """Of the scale that is kept for the backward, in fp32 whatever the dtype."""
    x = inputs["x"]
    rstd = module.launch_norm_augment(x, None, inputs["norm_weight"], inputs["a0"], EPS, False)[1]
    return relative_error(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_of_a_row_is_kept_in_fp32(device, dtype):
    assert rstd_error(kernels.norm_lora, make(dtype, 20, 300, device)) < 1e-6


@pytest.mark.parametrize("rows", [12, 140])  # tiles of 16 rows, and of 64
def test_a_wide_residual_stream_and_adapters_in_fp32(device, rows):
    """Under autocast: the stream, the norm's weight and the adapters in fp32, the layer in half precision."""
    rows = rows if rows < 64 else 32 * multiprocessors(device) + 12
    inputs = make(torch.bfloat16, rows, 64, device, residual=torch.float32, master=torch.float32)
    check(inputs, torch.bfloat16)
    assert torch.equal(call("triton")(**inputs)[1], inputs["x"] + inputs["update"])  # the sum is fp32's


def test_it_is_llamas_norm_and_the_merged_layer(device):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    inputs = make(torch.float32, 9, 40, device)
    merged = inputs["weight"].clone()
    for adapter in adapters_of(inputs):
        rows = slice(adapter.first_row, adapter.first_row + len(adapter.b))
        merged[rows] += adapter.scale * adapter.b @ adapter.a
    norm = LlamaRMSNorm(40, EPS).to(device)
    norm.weight.data = inputs["norm_weight"]
    s = inputs["x"] + inputs["update"]
    shaped = {name: inputs[name].view(3, 3, 40) for name in ("x", "update")}
    for implementation in ("torch", "triton"):
        y, found = call(implementation)(**{**inputs, **shaped})
        assert y.shape == (3, 3, 40) and torch.equal(found.view(9, 40), s)
        assert relative_error(y.view(9, 40), F.linear(norm(s), merged)) < 1e-6


def test_inputs_and_gradients_may_have_gaps_in_memory(device):
    inputs = {name: strided(value) for name, value in make(torch.float32, 6, 48, device).items()}
    check(inputs, torch.float32)


def test_ranks_too_many_for_a_tile_take_the_norm_and_then_the_product(device):
    layout = [(8, 40, 1.0, 0)]
    inputs = make(torch.float32, 5, 48, device, layout)
    check(inputs, torch.float32, layout=layout)


def test_no_rows_give_no_rows_and_zero_gradients(device):
    inputs = make(torch.float32, 0, 16, device)
    results = run(call("triton"), inputs, learned(inputs), 1)
    assert results["out0"].shape == (0, 40) and (results["dnorm_weight"] == 0).all() and (results["da0"] == 0).all()


def test_dropout_and_double_precision_are_refused(device):
    inputs = make(torch.float32, 2, 16, device)
    adapters = adapters_of(inputs)
    settings = inputs["norm_weight"], EPS, augmented_weight(inputs["weight"], adapters), adapters
    with pytest.raises(ValueError, match="dropout"):
        norm_lora_linear(inputs["x"], *settings, dropout=0.1)
    with pytest.raises(ValueError, match="float64"):
        norm_lora_linear(inputs["x"].double(), *settings, implementation="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_obeys_torchs_rules_and_compiles_whole(device, dtype):
    inputs = make(dtype, 4, 16, device, master=torch.float32)
    for name in learned(inputs):
        inputs[name].requires_grad_()
    x, update, norm_weight = inputs["x"], inputs["update"], inputs["norm_weight"]
    a = torch.randn(16, 16).to(x).requires_grad_()
    for added in (update, None):
        torch.library.opcheck(torch.ops.groundup.norm_augment, (x, added, norm_weight, a, EPS, False))

    adapters = adapters_of(inputs)
    augmented = augmented_weight(inputs["weight"], adapters)
    function = partial(norm_lora_linear, update=update, implementation="triton")
    results = []
    for way in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y, s = way(x, norm_weight, EPS, augmented, adapters)
        results.append([y, s, *torch.autograd.grad(y.sum(), [inputs[name] for name in learned(inputs)])])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype and relative_error(found, wanted) < (
            1e-6 if dtype == torch.float32 else 4e-3
        )


# what is wrong, the text to replace, with what, and a dtype in which it shows
MUTANTS = [
    ("no eps", "WIDTH + eps", "WIDTH + 0 * eps", torch.float32),
    ("mean over n - 1", "squares / WIDTH", "squares / (WIDTH - 1)", torch.float32),
    ("squares of the last strip alone", "squares += tl.sum(s * s, 1)", "squares = tl.sum(s * s, 1)", torch.float32),
    ("rstd rounded", " + eps)", " + eps).to(S.dtype.element_ty).to(tl.float32)", torch.bfloat16),
    ("gemma's weight counts from zero", "normed * (1 + weight)[None, :]", "normed * weight[None, :]", torch.float32),
    ("the norm of x without the update", "(S if ADD else X) +", "X +", torch.float32),
    ("A's product of the last block alone", "tl.trans(a), low,", "tl.trans(a), 0 * low,", torch.float32),
    ("A's product not with the norm", "low = tl.dot(normed,", "low = tl.dot(s.to(OUT.dtype.element_ty),", torch.float32),
    ("the last row is not stored", "in_low = (row < rows)", "in_low = (row < rows - 1)", torch.float32),
    ("ds forgotten", "ds if added else None", "None", torch.float32),
    ("Gemma forgotten backward", "rstd, ctx.gemma", "rstd, False", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "dtype"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS])
def test_a_wrong_kernel_is_noticed(old, new, dtype, tmp_path, device):
    mutant = load_mutant(Path(kernels.norm_lora.__file__), {old: new}, tmp_path)
    inputs = make(dtype, 20, 300, device)
    inputs["x"][:3] *= 1e-2  # rows in which eps counts
    inputs["update"][:3] *= 1e-2
    found = failures(errors(call("triton", mutant, True), call("torch", gemma=True), inputs, learned(inputs)), dtype)
    assert found if dtype == torch.float32 else rstd_error(mutant, inputs) > 1e-6
