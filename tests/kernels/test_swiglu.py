"""Is the fused gate the gate? Against float64 in every dtype, packed and apart, and against deliberate faults."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels.swiglu
from kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.accuracy import DTYPES, check, errors, failures, strided
from tests.kernels.mutants import load_mutant

REFERENCE = swiglu_reference
TRITON = partial(swiglu, implementation="triton")


def make(dtype, *shape, device, up_dtype=None):
    """Gates from deep in silu's flat side to its straight one."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate = 3 * torch.randn(shape, generator=generator)
    up = torch.randn(shape, generator=generator)
    return {"gate": gate.to(device, dtype), "up": up.to(device, up_dtype or dtype)}


def packed(inputs):
    return {"gate": torch.cat((inputs["gate"], inputs["up"]), dim=-1)}


SHAPES = [(7, 33), (2, 3, 64), (3, 2056), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_gradients_equal_float64(device, dtype, shape):
    check(TRITON, REFERENCE, make(dtype, *shape, device=device), ["gate", "up"], dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_gate_and_up_have_one_packed_gradient(device, dtype, shape):
    check(TRITON, REFERENCE, packed(make(dtype, *shape, device=device)), ["gate"], dtype)


def test_inputs_may_have_gaps_in_memory(device):
    inputs = make(torch.float32, 2, 3, 20, device=device)
    check(TRITON, REFERENCE, {name: strided(x) for name, x in inputs.items()}, ["gate", "up"], torch.float32)
    check(TRITON, REFERENCE, {"gate": strided(packed(inputs)["gate"])}, ["gate"], torch.float32)


def test_halves_of_one_projection_are_read_where_they_lie(device):
    whole = packed(make(torch.float32, 2, 3, 16, device=device))["gate"]
    gate, up = whole.chunk(2, dim=-1)
    check(TRITON, REFERENCE, {"gate": gate, "up": up}, ["gate", "up"], torch.float32)
    for halves in (kernels.swiglu._halves(whole, None), kernels.swiglu._halves(gate, up)):
        assert [half.data_ptr() for half in halves] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("pack", [False, True])
def test_gradients_from_a_sum_have_no_strides(device, pack):
    inputs = make(torch.float32, 4, 24, device=device)
    inputs = packed(inputs) if pack else inputs
    leaves = [x.requires_grad_() for x in inputs.values()]
    found = torch.autograd.grad(TRITON(*leaves).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(REFERENCE(*leaves).sum(), leaves))


def wrongly_rounded(function, half, device):
    """Which results are not rounded as said: y as Hugging Face's models do, silu first, and the gradients once."""
    gate, up = make(half, 4, 256, device=device).values()
    dy = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(device, half)
    found = function(gate.requires_grad_(), up.requires_grad_())
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    exact = torch.autograd.grad(REFERENCE(*wide), wide, dy.double())
    wanted = {
        "y": (found, (F.silu(wide[0]).to(half).double() * wide[1]).to(half)),
        **dict(zip(("dgate", "dup"), zip(torch.autograd.grad(found, (gate, up), dy), exact, strict=True), strict=True)),
    }
    # once in a thousand times fp32 and fp64 fall on different sides of a tie
    return [name for name, (ours, theirs) in wanted.items() if (ours == theirs.to(half)).float().mean() < 0.995]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_where_hugging_faces_are_and_gradients_once(device, half):
    assert not wrongly_rounded(TRITON, half, device)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's; sigmoid is 0 there
def test_gates_of_any_size_stay_finite(device):
    gate = torch.tensor([-3e38, -1e4, -100.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 100.0, 1e4, 3e38], device=device)
    leaf, wide = gate.clone().requires_grad_(), gate.double().requires_grad_()
    for x, implementation in ((leaf, "triton"), (wide, "torch")):
        y = swiglu(x, torch.full_like(x, 0.5), implementation=implementation)
        y.sum().backward()
        x.y = y.detach()
    torch.testing.assert_close(leaf.y.double(), wide.y, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-30)


def test_dtypes_may_differ(device):
    """Under autocast a stream in fp32 may meet a projection in half precision."""
    inputs = make(torch.bfloat16, 4, 40, device=device, up_dtype=torch.float32)
    assert TRITON(**inputs).dtype == torch.float32
    assert not failures(errors(TRITON, REFERENCE, inputs, ["gate", "up"]), torch.bfloat16)


def test_the_reference_is_the_formula():
    from transformers.activations import ACT2FN

    gate, up = make(torch.float64, 5, 6, device="cpu").values()
    torch.testing.assert_close(REFERENCE(gate, up), gate / (1 + torch.exp(-gate)) * up, rtol=1e-14, atol=0)
    assert torch.equal(REFERENCE(torch.cat((gate, up), -1)), ACT2FN["silu"](gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))


def test_no_rows_give_no_rows(device):
    for shape in ((0, 8), (2, 0, 8), (3, 0)):
        gate, up = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
        y = TRITON(gate, up)
        y.sum().backward()
        assert y.shape == gate.grad.shape == up.grad.shape == shape
        assert TRITON(torch.zeros(*shape[:-1], 2 * shape[-1], device=device)).shape == shape


def test_what_does_not_fit_is_refused(device):
    x = torch.ones(2, 9, device=device)
    for implementation in ("torch", "triton"):
        with pytest.raises(ValueError, match="even"):
            swiglu(x, implementation=implementation)
        with pytest.raises(ValueError, match="same shape"):
            swiglu(x, x[:1], implementation=implementation)
    with pytest.raises(ValueError, match="float64"):
        TRITON(x.double(), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", [False, True])
def test_the_operator_obeys_torchs_rules_and_compiles_whole(device, dtype, pack):
    inputs = make(dtype, 2, 3, 16, device=device)
    inputs = list((packed(inputs) if pack else inputs).values())
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.groundup.swiglu, (*leaves, None)[:2])
    dy = torch.randn(2, 3, 16).to(device, dtype)
    torch.library.opcheck(torch.ops.groundup.swiglu_backward, (dy, *(x.detach() for x in leaves), None)[:3])

    compiled = torch.compile(TRITON, fullgraph=True)
    assert torch.equal(compiled(*leaves), TRITON(*leaves))
    eager = torch.autograd.grad(TRITON(*leaves).sum(), leaves)
    for found, wanted in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), eager, strict=True):
        assert torch.equal(found, wanted)


# what is wrong, the text to replace, with what, and a dtype in which it shows
MUTANTS = [
    ("gelu's sigmoid", "(gate * tl.sigmoid(gate))", "(gate * tl.sigmoid(1.702 * gate))", torch.float32),
    ("gate and up swapped", "(silu * up)", "(up * tl.sigmoid(up) * gate)", torch.float32),
    ("silu not rounded", ".to(GATE.dtype.element_ty).to(tl.float32)", "", torch.bfloat16),
    ("product of rounded factors", "tl.sigmoid(gate))", "tl.sigmoid(gate).to(tl.bfloat16))", torch.bfloat16),
    ("the derivative of the sigmoid alone", "(1 + gate * (1 - sigmoid))", "(1 - sigmoid)", torch.float32),
    ("the derivative without its product", "(1 + gate * (1 - sigmoid))", "1", torch.float32),
    ("the derivative's sign", "(1 + gate *", "(1 - gate *", torch.float32),
    ("dgate without up", "dy * up * sigmoid", "dy * sigmoid", torch.float32),
    ("dup without silu", "dup = dy * gate * sigmoid", "dup = dy * gate", torch.float32),
    ("sigmoid rounded", "sigmoid = tl.sigmoid(gate)", "sigmoid = tl.sigmoid(gate).to(tl.bfloat16)", torch.bfloat16),
    ("up read where gate lies", "UP + row * up_stride", "GATE + row * up_stride", torch.float32),
    ("rows packed without their strides", "row * gate_stride", "row * width", torch.float32),
    ("gradients written without strides", "row * dup_stride", "row * width", torch.float32),
    ("the last row is forgotten", "(row < rows)", "(row < rows - 1)", torch.float32),
    ("the last column is forgotten", "(column < width)", "(column < width - 1)", torch.float32),
    ("one tile a row", "(tl.program_id(0) % blocks)", "0", torch.float32),
]


@pytest.mark.parametrize(("old", "new", "dtype"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS])
def test_a_wrong_kernel_is_noticed(old, new, dtype, tmp_path, device):
    mutant = load_mutant(Path(kernels.swiglu.__file__), {old: new}, tmp_path)
    inputs = packed(make(dtype, 3, 2056, device=device))  # more columns than a tile, more rows than one
    function = partial(mutant.swiglu, implementation="triton")
    found = failures(errors(function, REFERENCE, inputs, ["gate"]), dtype)
    assert found or wrongly_rounded(function, torch.bfloat16, device)
