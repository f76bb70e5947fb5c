"""Is the fused norm the norm? Against float64, in every dtype and cast order, and against deliberate faults."""

from functools import partial
from pathlib import Path

import pytest
import torch

import kernels.rms_norm
from kernels.rms_norm import MAX_WIDTH, add_rms_norm, rms_norm, rms_norm_reference
from tests.kernels.accuracy import DTYPES, check, errors, failures, strided
from tests.kernels.mutants import load_mutant

EPS = 1e-6


def make(dtype, rows, width, device, residual_dtype=None):
    """Rows of very different size, and a weight around one."""
    generator = torch.Generator().manual_seed(rows * width)
    size = torch.logspace(-3, 1, rows)[:, None]
    x = torch.randn(rows, width, generator=generator) * size
    update = torch.randn(rows, width, generator=generator) * size
    weight = 1 + 0.3 * torch.randn(width, generator=generator)
    return {
        "x": x.to(device, residual_dtype or dtype), "update": update.to(device, dtype), "weight": weight.to(device, dtype)
    }  # fmt: skip


def pair(module=kernels.rms_norm, gemma=False, out_dtype=None):
    """(kernel, reference) of the fused addition and norm."""
    settings = {"eps": EPS, "gemma": gemma, "out_dtype": out_dtype}
    return partial(module.add_rms_norm, implementation="triton", **settings), partial(add_rms_norm, **settings)


def plain_pair(module=kernels.rms_norm, gemma=False):
    settings = {"eps": EPS, "gemma": gemma}
    return partial(module.rms_norm, implementation="triton", **settings), partial(rms_norm, **settings)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(7, 33), (1, 768), (100, 64), (5, 1000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_norm_and_gradients_equal_float64(device, dtype, rows, width, gemma):
    check(*pair(gemma=gemma), make(dtype, rows, width, device), ["x", "update", "weight"], dtype)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_without_an_addition_equals_float64(device, dtype, gemma):
    inputs = make(dtype, 19, 200, device)
    del inputs["update"]
    check(*plain_pair(gemma=gemma), inputs, ["x", "weight"], dtype)


def test_inputs_and_gradients_may_have_gaps_in_memory(device):
    inputs = {name: strided(value) for name, value in make(torch.float32, 6, 48, device).items()}
    check(*pair(), inputs, ["x", "update", "weight"], torch.float32)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_a_wide_residual_stream_with_half_precision_updates(device, half):
    """Under autocast: the stream in fp32, what is added and what is read in half precision."""
    inputs = make(half, 9, 128, device, residual_dtype=torch.float32)
    kernel, reference = pair(out_dtype=half)
    measured = errors(kernel, reference, inputs, ["x", "update", "weight"])
    assert measured["out1"][0] < 1e-7  # the sum is fp32's
    assert not failures(measured, half)


def test_the_reference_is_hugging_face_llamas_norm():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(dtype, 11, 96, "cpu")
        for peer, gemma in ((LlamaRMSNorm(96, EPS), False), (Gemma2RMSNorm(96, EPS), True)):
            peer.weight.data = inputs["weight"]
            assert torch.equal(rms_norm_reference(inputs["x"], inputs["weight"], EPS, gemma=gemma), peer(inputs["x"]))


def test_rows_too_wide_for_registers_take_the_reference(device):
    x, weight = torch.randn(1, MAX_WIDTH + 1, device=device), torch.ones(MAX_WIDTH + 1, device=device)
    assert torch.equal(rms_norm(x, weight, EPS, implementation="triton"), rms_norm(x, weight, EPS))


def test_no_rows_give_no_rows_and_a_zero_gradient(device):
    x, weight = torch.zeros(0, 8, device=device), torch.ones(8, device=device, requires_grad=True)
    y, s = add_rms_norm(x, x, weight, EPS, implementation="triton")
    y.sum().backward()
    assert y.shape == s.shape == (0, 8) and (weight.grad == 0).all()


def test_double_precision_is_refused(device):
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.ones(1, 8, device=device).double(), torch.ones(8, device=device), EPS, implementation="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_obey_torchs_rules_and_compile_whole(device, dtype):
    inputs = make(dtype, 4, 16, device)
    x, update, weight = (value.requires_grad_() for value in inputs.values())
    torch.library.opcheck(torch.ops.groundup.add_rms_norm, (x, update, weight, EPS, False, dtype))
    torch.library.opcheck(torch.ops.groundup.rms_norm, (x, weight, EPS, True, dtype))

    kernel, _ = pair()
    compiled = torch.compile(kernel, fullgraph=True)
    for found, wanted in zip(compiled(**inputs), kernel(**inputs), strict=True):
        assert torch.equal(found, wanted)
    eager = torch.autograd.grad(kernel(**inputs)[0].sum(), list(inputs.values()))
    for found, wanted in zip(
        torch.autograd.grad(compiled(**inputs)[0].sum(), list(inputs.values())), eager, strict=True
    ):
        assert torch.equal(found, wanted)


# what is wrong, the text to replace, with what, and a dtype in which it shows
MUTANTS = [
    ("no eps", "WIDTH + eps", "WIDTH + 0 * eps", torch.float32),
    ("eps ten times too large", "WIDTH + eps", "WIDTH + 10 * eps", torch.float32),
    ("mean over n - 1", "tl.sum(x * x, 1) / WIDTH", "tl.sum(x * x, 1) / (WIDTH - 1)", torch.float32),
    ("rstd rounded", " + eps)", " + eps).to(S.dtype.element_ty).to(tl.float32)", torch.bfloat16),
    ("gemma's weight counts from zero", "normed * (1 + weight)[None, :]", "normed * weight[None, :]", torch.float32),
    ("gemma's weight counts from zero backward", "(1 + weight if GEMMA else weight)", "weight", torch.float32),
    ("dx without the mean", "normed * (tl.sum(g * normed, 1) / WIDTH)[:, None]", "0.0", torch.float32),
    ("dx's mean over n - 1", "tl.sum(g * normed, 1) / WIDTH", "tl.sum(g * normed, 1) / (WIDTH - 1)", torch.float32),
    ("ds forgotten", "dx += tl.load(DS", "dx += 0 * tl.load(DS", torch.float32),
    ("dW of the last tile alone", "dw += tl.sum(dy", "dw = tl.sum(dy", torch.float32),
    ("the last row is not stored", "inside = (row < rows)", "inside = (row < rows - 1)", torch.float32),
]


@pytest.mark.parametrize(("old", "new", "dtype"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS])
def test_a_wrong_kernel_is_noticed(old, new, dtype, tmp_path, device):
    mutant = load_mutant(Path(kernels.rms_norm.__file__), {old: new}, tmp_path)
    inputs = make(dtype, 100, 64, device)  # more tiles than programs
    # a single rounding, behind which a second one cannot hide
    plain = {"x": inputs["x"], "weight": torch.ones_like(inputs["weight"])}
    found = failures(errors(*pair(mutant, gemma=True), inputs, list(inputs)), dtype)
    found += failures(errors(*plain_pair(mutant), plain, list(plain)), dtype)
    assert found
