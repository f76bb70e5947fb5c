"""Does each group of rows meet its own weight? Against a product a group in float64, groups without rows among them."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import kernels.grouped_linear
from kernels.grouped_linear import grouped_implementation, grouped_linear, grouped_nf4_linear
from kernels.nf4 import dequantise_nf4, quantise_nf4
from tests.kernels.accuracy import BOUNDS, DTYPES, relative_error
from tests.kernels.mutants import load_mutant

SIZES = {
    "uneven": [3, 0, 1, 7, 0],
    "one has all": [0, 9, 0],
    "first and last": [4, 0, 0, 5],
    "no rows": [0, 0],
    "one group": [6],
}
IMPLEMENTATIONS = ["loop", "grouped_mm"]


def make(sizes, dtype=torch.float64, rows_in=16, rows_out=24):
    generator = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(sum(sizes), rows_in, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(sizes), rows_out, rows_in, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(sum(sizes), rows_out, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, torch.tensor(sizes).cumsum(0).int(), dy


def truth(x, weight, sizes, dy):
    """y, dx and dweight in float64, one group at a time."""
    x, weight, dy = x.double(), weight.double(), dy.double()
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    groups = [slice(start, end) for start, end in pairwise(bounds)]
    y = torch.cat([x[rows] @ weight[g].T for g, rows in enumerate(groups)])
    dx = torch.cat([dy[rows] @ weight[g] for g, rows in enumerate(groups)])
    return y, dx, torch.stack([dy[rows].T @ x[rows] for rows in groups])


def found_by(function, x, weight, ends, dy, implementation):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, ends, implementation=implementation)
    return (y, *torch.autograd.grad(y, (x, weight), dy.to(y.dtype)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients_equal_float64(sizes, dtype, implementation):
    x, weight, ends, dy = make(sizes, dtype)
    for found, wanted in zip(
        found_by(grouped_linear, x, weight, ends, dy, implementation), truth(x, weight, sizes, dy), strict=True
    ):
        assert found.dtype == dtype
        assert relative_error(found, wanted) < BOUNDS[dtype]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_float64_is_computed_in_float64(sizes):
    x, weight, ends, dy = make(sizes)
    torch.testing.assert_close(
        found_by(grouped_linear, x, weight, ends, dy, "loop"), truth(x, weight, sizes, dy), rtol=1e-14, atol=1e-13
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_4_bit_weight_is_the_decoded_one_bit_for_bit(sizes, dtype, implementation):
    x, weight, ends, dy = make(sizes, dtype)
    packed = quantise_nf4(weight.flatten(0, 1))
    decoded = dequantise_nf4(packed, dtype).view_as(weight)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = grouped_nf4_linear(found, packed, ends, implementation=implementation)
    expected = grouped_linear(wanted, decoded, ends, implementation=implementation)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, one, dy)[0] for out, one in ((y, found), (expected, wanted))))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[256, 0, 31, 1, 0, 900], [0, 5]], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_a_gpu_product_and_gradients_equal_float64_however_dirty_its_memory(implementation, sizes):
    x, weight, ends, dy = (part.cuda() for part in make(sizes, torch.bfloat16, 256, 512))
    torch.full((1 << 26,), torch.nan, device="cuda")  # freed, and handed out again
    for found, wanted in zip(
        found_by(grouped_linear, x, weight, ends, dy, implementation), truth(x, weight, sizes, dy), strict=True
    ):
        assert relative_error(found, wanted) < BOUNDS[torch.bfloat16]


def test_an_empty_groups_gradient_is_zero_where_torch_leaves_memory_as_it_was(monkeypatch):
    """As torch's kernel does on B200 (pytorch issue 172439)."""
    sound = torch.nn.functional.grouped_mm

    def leaves_memory(a, b, *, offs):
        out = sound(a, b, offs=offs)
        if out.dim() == 3:
            out[torch.tensor(SIZES["uneven"]) == 0] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_memory)
    x, weight, ends, dy = make(SIZES["uneven"], torch.float32)
    *_, dweight = found_by(grouped_linear, x, weight, ends, dy, "grouped_mm")
    assert relative_error(dweight, truth(x, weight, SIZES["uneven"], dy)[2]) < BOUNDS[torch.float32]


def test_inputs_may_lie_anyhow_in_memory():
    """Every second column of a wider tensor, a transposed weight, and gradients of a sum, which have no strides."""
    sizes = SIZES["uneven"]
    x, weight, ends, dy = make(sizes, torch.float32)
    wide = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    ones = torch.ones(()).expand(dy.shape)
    for found, wanted in zip(
        found_by(grouped_linear, wide, transposed, ends, ones, "loop"), truth(x, weight, sizes, ones), strict=True
    ):
        assert relative_error(found, wanted) < BOUNDS[torch.float32]


def test_only_what_learns_has_a_gradient():
    x, weight, ends, dy = make(SIZES["uneven"])
    for learns in (x, weight):
        learns.requires_grad_()
        y = grouped_linear(x, weight, ends)
        y.backward(dy)
        learns.requires_grad_(False)
    wanted = truth(x, weight, SIZES["uneven"], dy)
    torch.testing.assert_close((x.grad, weight.grad), wanted[1:], rtol=1e-14, atol=1e-13)


def test_autocast_multiplies_in_half_and_leaves_gradients_in_fp32():
    sizes = SIZES["uneven"]
    x, weight, ends, dy = make(sizes, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = found_by(grouped_linear, x, weight, ends, dy, "loop")
        assert grouped_linear(x.double(), weight.double(), ends).dtype == torch.float64
    assert y.dtype == torch.bfloat16 and {gradient.dtype for gradient in gradients} == {torch.float32}
    half = [part.bfloat16() for part in (x, weight)]
    torch.testing.assert_close(y, grouped_linear(*half, ends), rtol=0, atol=0)


def test_the_operators_obey_torchs_rules_and_compile_whole():
    x, weight, ends, dy = make(SIZES["uneven"], torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.groundup.grouped_linear, (x, weight, ends, "loop"))
    torch.library.opcheck(torch.ops.groundup.grouped_linear_weight_gradient, (dy, x.detach(), ends, "loop"))
    packed = quantise_nf4(weight.detach().flatten(0, 1))
    given = (x, *packed.tensors, packed.sizes, ends, "loop", "torch", False)
    torch.library.opcheck(torch.ops.groundup.grouped_nf4_linear, given)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        found_by(compiled, x, weight, ends, dy, "loop"),
        found_by(grouped_linear, x, weight, ends, dy, "loop"),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_the_one_launch_is_chosen_where_torch_has_it(monkeypatch):
    def chosen(capability, dtype, *widths, device="cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return grouped_implementation(torch.device(device), dtype, *widths)

    assert chosen((9, 0), torch.bfloat16, 512, 64) == chosen((10, 0), torch.bfloat16, 8) == "grouped_mm"
    for capability in ((7, 5), (8, 0), (12, 0)):
        assert chosen(capability, torch.bfloat16, 512, 64) == "loop"
    assert chosen((9, 0), torch.float32, 512) == chosen((9, 0), torch.float16, 512) == "loop"
    assert chosen((9, 0), torch.bfloat16, 512, 100) == "loop"  # rows of 200 bytes
    assert chosen((9, 0), torch.bfloat16, 512, device="cpu") == "loop"


def test_what_does_not_fit_is_refused():
    x, weight, ends, _ = make(SIZES["uneven"])
    for wrong in ((x[:, 1:], weight, ends), (x, weight, ends[1:]), (x, weight[0], ends), (x[None], weight, ends)):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_linear(*wrong)
    with pytest.raises(ValueError, match="must be the same"):
        grouped_linear(x, weight.float(), ends)


MUTANTS = [
    ("a group reads its neighbour's weight", "weight[group].t()", "weight[group - 1].t()"),
    ("a group's weight is not transposed back", "weight.transpose(1, 2), ends, ctx", "weight, ends, ctx"),
    (
        "empty groups end the loop",
        "yield group, slice(start, end)",
        "yield group, slice(start, end)\n        else: break",
    ),
    ("groups all begin at the first row", "        start = end\n", ""),
    ("empty groups' gradients are left as the memory was", "x.new_zeros(len", "7 + x.new_zeros(len"),
]


@pytest.mark.parametrize(("old", "new"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS])
def test_a_wrong_loop_is_noticed(old, new, tmp_path):
    sizes = [3, 0, 1, 7]
    mutant = load_mutant(Path(kernels.grouped_linear.__file__), {old: new}, tmp_path)
    x, weight, ends, dy = make(sizes, torch.float32, 16, 16)
    found = found_by(mutant.grouped_linear, x, weight, ends, dy, "loop")
    errors = [relative_error(*pair) for pair in zip(found, truth(x, weight, sizes, dy), strict=True)]
    assert not max(errors) < BOUNDS[torch.float32]
