"""Are the four bits bitsandbytes' bits, and does a layer over them compute and learn what one over their values would?"""

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.nf4
import kernels.nf4_linear
from errors import UserError
from kernels.lora_linear import Adapter
from kernels.nf4 import (
    QUANTILES,
    dequantise_nf4,
    dequantise_nf4_reference,
    dynamic_code,
    from_bitsandbytes,
    quantise_nf4,
    to_bitsandbytes,
)
from kernels.nf4_linear import nf4_linear, nf4_linear_reference
from tests.kernels.accuracy import DTYPES, check, errors, failures, relative_error, strided
from tests.kernels.mutants import load_mutant

HALVES = [torch.float16, torch.bfloat16]


def make_weight(rows, width, device="cpu", dtype=torch.float32):
    """Rows of very different size, a block of zeros among them."""
    generator = torch.Generator().manual_seed(rows * width)
    weight = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    weight.view(-1)[:64] = 0
    return weight.to(device, dtype)


# ------------------------------------------------------------------------------------------------------------ the format


def test_codes_are_two_a_byte_high_half_first_and_ties_go_down():
    middles = [(low + high) / 2 for low, high in pairwise(QUANTILES)]
    block = torch.tensor([*QUANTILES, 0.0, *middles, *QUANTILES, *[0.0] * 16])
    weight = quantise_nf4(torch.stack((block, 4 * block, 0 * block)), double_quant=False)
    counted = bytes.fromhex("0123456789abcdef")
    row = counted + bytes.fromhex("70123456789abcde") + counted + b"\x77" * 8
    assert bytes(weight.packed.tolist()) == row + row + b"\x77" * 32
    assert weight.absmax.tolist() == [1.0, 4.0, 0.0]


def test_the_dynamic_code_has_seven_decades_of_doubling_steps():
    code = dynamic_code()
    assert len(code) == 256 and (code.diff() > 0).all()
    assert code[-1] == 1 and code[127] == 0 and torch.equal(code[:127], -code[128:255].flip(0))
    assert code[128].item() == pytest.approx(0.55e-6) and code[254].item() == pytest.approx(1 - 0.9 / 128)
    for decade in range(7):
        assert ((code > 10.0 ** (decade - 7)) & (code < 10.0 ** (decade - 6))).sum() == 2**decade


def test_absmax_is_quantised_around_its_mean_in_blocks_of_256():
    weight = make_weight(300, 72, dtype=torch.bfloat16)
    plain, double = quantise_nf4(weight, double_quant=False), quantise_nf4(weight)
    assert torch.equal(plain.packed, double.packed) and double.absmax.dtype == torch.uint8
    assert len(plain.absmax) == len(double.absmax) == 338 and len(double.absmax2) == 2  # 337.5 blocks
    offset = plain.absmax.mean()
    assert torch.equal(double.offset, offset)
    assert torch.equal(double.absmax2, torch.stack([(part - offset).abs().max() for part in plain.absmax.split(256)]))
    for i, value in enumerate((plain.absmax - offset).tolist()):
        distance = (dynamic_code() * double.absmax2[i // 256] - value).abs()
        assert distance[int(double.absmax[i])] <= distance.min() + 1e-6


def test_a_value_takes_an_eighth_over_four_bits_and_loses_a_tenth():
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    packed = quantise_nf4(weight)
    assert packed.nbytes == 512 * 1024 // 2 + 8192 + 4 * 32 + 4 * 256 + 4
    error = dequantise_nf4_reference(packed, torch.float32) - weight
    assert error.abs().mean().item() == pytest.approx(0.0728, rel=0.01)
    assert (error.norm() / weight.norm()).item() == pytest.approx(0.092, rel=0.01)


def test_chunks_and_strides_change_nothing(monkeypatch):
    weight = make_weight(37, 72)
    whole = quantise_nf4(weight)
    decoded = dequantise_nf4_reference(whole, torch.bfloat16)
    monkeypatch.setattr(kernels.nf4, "CHUNK", 64 * 9)
    again = quantise_nf4(strided(weight))
    for found, wanted in zip(again.tensors, whole.tensors, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(dequantise_nf4_reference(again, torch.bfloat16), decoded)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_bitsandbytes_bits(dtype, double_quant):
    """Rows of multiples of 64: its CPU decoder misreads others. Its CPU encoder of absmax looks up a rounded position,
    so that a code next to a tie may be off by one."""
    functional = pytest.importorskip("bitsandbytes").functional
    for rows, width in ((128, 256), (7, 192), (300, 64)):
        weight = make_weight(rows, width, dtype=dtype)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        ours = quantise_nf4(weight, double_quant=double_quant)
        theirs = {"w": packed} | {f"w.{name}": value for name, value in state.as_dict(packed=True).items()}
        read = from_bitsandbytes(theirs, "w")
        assert torch.equal(ours.packed, read.packed) and ours.sizes == read.sizes
        if double_quant:
            assert torch.equal(ours.code, read.code) and torch.equal(ours.absmax2, read.absmax2)
            assert torch.equal(ours.offset, read.offset)
            off = (ours.absmax.int() - read.absmax.int()).abs()
            assert off.max() <= 1 and off.count_nonzero() <= 0.01 * len(off) + 1
        else:
            assert torch.equal(ours.absmax, read.absmax)
        for out in DTYPES:
            state.dtype = out
            assert torch.equal(dequantise_nf4(read, out), functional.dequantize_4bit(packed, state))
        tensors = to_bitsandbytes(ours, "w", dtype)
        packed = tensors.pop("w")
        state = functional.QuantState.from_dict(tensors, torch.device("cpu"))
        assert torch.equal(functional.dequantize_4bit(packed, state), dequantise_nf4(ours, dtype))


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_tensors_come_back_and_faulty_ones_are_named(double_quant):
    weight = quantise_nf4(make_weight(9, 64), double_quant=double_quant)
    tensors = to_bitsandbytes(weight, "q.weight", torch.bfloat16)
    assert tensors["q.weight"].shape == (9 * 32, 1)
    again = from_bitsandbytes(tensors, "q.weight")
    assert again.shape == weight.shape and torch.equal(*(dequantise_nf4(w, torch.float32) for w in (weight, again)))
    with pytest.raises(UserError, match=r"q\.weight\.quant_map is missing"):
        from_bitsandbytes({name: tensors[name] for name in tensors if "weight.quant_map" not in name}, "q.weight")
    with pytest.raises(UserError, match="not in bitsandbytes' NF4 format"):
        from_bitsandbytes(tensors | {"q.weight.quant_map": torch.linspace(-1, 1, 16)}, "q.weight")


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="multiple of 8 values, not 20"):
        quantise_nf4(torch.ones(4, 20))
    with pytest.raises(UserError, match="not finite"):
        quantise_nf4(torch.tensor([1.0, torch.nan]).repeat(2, 32))


# ------------------------------------------------------------------------------------------------------------- decoding


def decoded_differs(module, dtype, device) -> bool:
    """Whether the kernel's bits are not the reference's, for whole rows, short last blocks and blocks across rows."""
    for rows, width, double_quant in ((17, 1024, True), (35, 72, True), (3, 24, False)):
        weight = quantise_nf4(make_weight(rows, width, device), double_quant=double_quant)
        wide = torch.full((rows, width + 16), 7, dtype=dtype, device=device)
        module.dequantise_nf4(weight, dtype, out=wide[:, :width], implementation="triton")
        found, beside = wide.split((width, 16), 1)
        if not torch.equal(found, dequantise_nf4_reference(weight, dtype)) or not (beside == 7).all():
            return True
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_into_a_part_of_a_buffer_gives_the_references_bits(device, dtype):
    assert not decoded_differs(kernels.nf4, dtype, device)


def test_decoding_as_an_operator(device):
    weight = quantise_nf4(make_weight(5, 64, device))
    torch.library.opcheck(torch.ops.groundup.dequantise_nf4, (*weight.tensors, weight.sizes, torch.float16, "triton"))
    compiled = torch.compile(partial(dequantise_nf4, implementation="triton"), fullgraph=True)
    assert torch.equal(compiled(weight, torch.float16), dequantise_nf4_reference(weight, torch.float16))
    with pytest.raises(ValueError, match="float64"):
        dequantise_nf4(weight, torch.float64, implementation="triton")
    with pytest.raises(ValueError, match="contiguous rows"):
        dequantise_nf4(weight, torch.float32, out=torch.empty(64, 5, device=device).t())


# ------------------------------------------------------------------------------------------------------------ the layer

# (rank, first row, rows, scale): two stacked projections, one of them fed twice, and rows that no adapter feeds
PLACES = [(3, 0, 20, 2.0), (8, 24, 20, 0.7), (4, 24, 24, 1.3)]
LEARNED = ["x", *(f"{part}{i}" for i in range(len(PLACES)) for part in "ab")]


def make(dtype, rows, device, masters=None, columns=48, width=72):
    """(4-bit weight, {"x", "a0", "b0", …})."""
    generator = torch.Generator().manual_seed(rows)
    inputs = {"x": torch.randn(rows, width, generator=generator).to(device, dtype)}
    for i, (rank, _, height, _) in enumerate(PLACES):
        a, b = torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator)
        inputs |= {f"a{i}": (a * 0.3).to(device, masters or dtype), f"b{i}": b.to(device, masters or dtype)}
    return quantise_nf4(make_weight(columns, width, device)), inputs


def layer(function, weight):
    """A function of make's inputs."""

    def compute(x, **parts):
        adapters = [
            Adapter(parts[f"a{i}"], parts[f"b{i}"], scale, row)
            for i, (_, row, _, scale) in enumerate(PLACES) if f"a{i}" in parts
        ]  # fmt: skip
        return function(x, weight, adapters)

    return compute


def pair(weight, implementation="triton", module=kernels.nf4_linear):
    return layer(partial(module.nf4_linear, implementation=implementation), weight), layer(nf4_linear_reference, weight)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_equal_float64(device, dtype, implementation):
    weight, inputs = make(dtype, 9, device)
    check(*pair(weight, implementation), inputs, LEARNED, dtype)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_adapters_may_be_wide_masters(device, half):
    weight, inputs = make(half, 70, device, masters=torch.float32)
    check(*pair(weight), inputs, LEARNED, half)


def test_inputs_may_have_gaps_in_memory_and_more_dimensions(device):
    weight, inputs = make(torch.float32, 12, device)
    inputs = {name: strided(value) for name, value in inputs.items()}
    check(*pair(weight), inputs, LEARNED, torch.float32)
    kernel, reference = pair(weight)
    inputs = {name: value.contiguous().requires_grad_() for name, value in inputs.items()}
    inputs["x"] = inputs["x"].detach().view(3, 4, 72).requires_grad_()
    for found, wanted in zip(
        torch.autograd.grad(kernel(**inputs).sum(), list(inputs.values())),  # a gradient of stride 0
        torch.autograd.grad(reference(**inputs).sum(), list(inputs.values())),
        strict=True,
    ):
        assert found.shape == wanted.shape and relative_error(found, wanted) < 2e-6


@pytest.mark.parametrize("wanted", [["x"], LEARNED[1:]], ids=["x", "adapters"])
def test_what_is_frozen_gets_no_gradient(device, wanted):
    weight, inputs = make(torch.float32, 6, device)
    check(*pair(weight), inputs, wanted, torch.float32)


def test_a_layer_without_adapters(device):
    weight, inputs = make(torch.bfloat16, 6, device)
    check(*pair(weight), {"x": inputs["x"]}, ["x"], torch.bfloat16)


def test_no_rows_give_no_rows_and_zero_gradients(device):
    weight, inputs = make(torch.bfloat16, 0, device)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    y = pair(weight)[0](**inputs)
    y.sum().backward()
    assert y.shape == (0, 48) and all((inputs[name].grad == 0).all() for name in LEARNED)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_between_forward_and_backward_there_is_no_decoded_weight(device, implementation):
    weight, inputs = make(torch.bfloat16, 6, device)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    given = {tensor.data_ptr() for tensor in (*inputs.values(), *weight.tensors)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernel, reference = pair(weight, implementation)
        kernel(**inputs)
        extra = [tensor for tensor in kept if tensor.data_ptr() not in given]
        assert [tensor.shape for tensor in extra] == [(6, 16)]  # x Aᵀ, the ranks' sum of 15 rounded up
        assert sum(tensor.untyped_storage().nbytes() for tensor in extra) == 6 * 16 * 2
        kept.clear()
        reference(**inputs)
        assert any(tensor.shape in ((48, 72), (72, 48)) for tensor in kept)  # so it would be seen


def test_autocast_chooses_the_dtype(device):
    weight, inputs = make(torch.float32, 5, device)
    kernel, _ = pair(weight)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = kernel(**{name: value.requires_grad_() for name, value in inputs.items()})
    assert torch.equal(y, kernel(inputs["x"].bfloat16(), **{name: inputs[name] for name in LEARNED[1:]}))
    y.sum().backward()
    assert inputs["x"].grad.dtype == torch.float32


def test_double_precision_is_refused(device):
    weight, inputs = make(torch.float64, 2, device)
    with pytest.raises(ValueError, match="float64"):
        pair(weight)[0](**inputs)


@pytest.mark.parametrize("rows", [4, 70])
def test_operators_obey_torchs_rules_and_compile_whole(device, rows):
    weight, inputs = make(torch.float32, rows, device)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    kernel, _ = pair(weight)
    a, b = ([inputs[f"{part}{i}"] for i in range(len(PLACES))] for part in "ab")
    scales, first_rows = [place[3] for place in PLACES], [place[1] for place in PLACES]
    arguments = (inputs["x"], *weight.tensors, weight.sizes, a, b, scales, first_rows, "triton")
    if rows == 4:
        torch.library.opcheck(torch.ops.groundup.nf4_linear, arguments)
    compiled = torch.compile(kernel, fullgraph=True)
    assert torch.equal(compiled(**inputs), kernel(**inputs))
    for found, wanted in zip(
        torch.autograd.grad(compiled(**inputs).sum(), list(inputs.values())),
        torch.autograd.grad(kernel(**inputs).sum(), list(inputs.values())),
        strict=True,
    ):
        assert torch.equal(found, wanted)


# ------------------------------------------------------------------------------------------------------------- few rows


class Seen(TorchDispatchMode):
    """The names of the project's operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "groundup":
            self.names.append(function.name().removeprefix("groundup::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 70, 64), (5, 48, 1088), (33, 64, 320)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_rows_decode_inside_the_product(device, dtype, rows, columns, width):
    weight, inputs = make(dtype, rows, device, torch.float32, columns, width)
    with Seen() as seen:
        check(*pair(weight), inputs, [], dtype)
    assert set(seen.names) == {"nf4_linear_few_rows"}


def test_few_rows_without_adapters_or_double_quantisation(device):
    _, inputs = make(torch.bfloat16, 3, device, None, 48, 128)
    weight = quantise_nf4(make_weight(48, 128, device), double_quant=False)
    check(*pair(weight), {"x": strided(inputs["x"])}, [], torch.bfloat16)


def test_few_rows_as_an_operator(device):
    weight, inputs = make(torch.bfloat16, 2, device, torch.float32, 48, 64)
    compiled = torch.compile(pair(weight)[0], fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), pair(weight)[0](**inputs))
    arguments = (inputs["x"], *weight.tensors, weight.sizes, [inputs["a0"]], [inputs["b0"]], [2.0], [0])
    torch.library.opcheck(torch.ops.groundup.nf4_linear_few_rows, arguments)


def test_the_kernel_for_few_rows_steps_aside_where_it_does_not_fit(device):
    def ran(dtype, rows, width, learns=False, **changes):
        weight, inputs = make(dtype, rows, device, None, 48, width)
        with Seen() as seen:
            nf4_linear(inputs["x"].requires_grad_(learns), weight, **({"implementation": "triton"} | changes))
        return seen.names

    assert ran(torch.bfloat16, 1, 64) == ["nf4_linear_few_rows"]
    for case in (
        (torch.bfloat16, 65, 64), (torch.float32, 1, 64), (torch.bfloat16, 1, 72), (torch.bfloat16, 1, 64, True)
    ):  # fmt: skip
        assert ran(*case) == ["nf4_linear"]
    assert ran(torch.bfloat16, 1, 64, implementation="torch") == ["nf4_linear"]


# -------------------------------------------------------------------------------------------------------------- mutants

# what is wrong, the text to replace, with what
DECODING_MUTANTS = [
    ("low half first", "scale, 4, dtype)", "scale, 0, dtype)"),
    ("two bytes swapped", "scale, 12, dtype)", "scale, 28, dtype)"),
    ("a wrong quantile", "tl.where(b0, 1.0, 0.7229568362236023)", "tl.where(b0, 1.0, 0.7229569)"),
    ("no exact zero", "tl.where(b0, 0.0,", "tl.where(b0, 1e-9,"),
    ("absmax of the next block", "OFFSET, at // BLOCK_WORDS", "OFFSET, (at + 1) // BLOCK_WORDS"),
    ("blocks end with rows", "OFFSET, at //", "OFFSET, row[:, None] * (row_words // BLOCK_WORDS) + word[None, :] //"),
    ("no offset", "absmax2 + tl.load(OFFSET)", "absmax2"),
    ("absmax2 of one block for all", "block // ABSMAX_BLOCK, mask", "0 * block, mask"),
    ("scaled after rounding", "& 15, 1) * scale).to(dtype)", "& 15, 1).to(dtype) * scale).to(dtype)"),
    ("absmax rounded", "table, absmax, OUT", "table, absmax.to(OUT.dtype.element_ty).to(tl.float32), OUT"),
    ("rows packed", "row[:, None] * pitch", "row[:, None] * (row_words * 8)"),
    ("the last columns are not stored", "(column < row_words * 8)", "(column < row_words * 8 - 8)"),
    ("the last row is not stored", "(row < rows)[:, None] & (column", "(row < rows - 1)[:, None] & (column"),
]


@pytest.mark.parametrize(("old", "new"), [f[1:] for f in DECODING_MUTANTS], ids=[f[0] for f in DECODING_MUTANTS])
def test_a_wrong_decoder_is_noticed(old, new, tmp_path, device):
    mutant = load_mutant(Path(kernels.nf4.__file__), {old: new}, tmp_path)
    assert decoded_differs(mutant, torch.bfloat16, device) or decoded_differs(mutant, torch.float32, device)


LAYER_MUTANTS = [
    ("the scale left out", "= part * scale", "= part"),
    ("the scale twice in dB", ".to(like.dtype) * scale", ".to(like.dtype) * scale * scale"),
    ("dB without the scale", ".to(like.dtype) * scale", ".to(like.dtype) * 1"),
    ("dx without the adapters", "dx.addmm_(d_low, down)", "pass"),
    ("dA from one row fewer", "d_low.t() @ flat", "d_low[1:].t() @ flat[1:]"),
    ("every adapter at the first row", "slice(row, row + len(part))", "slice(0, len(part))"),
    ("adapters over one another", "column += part.shape[1]", "column += 0"),
    ("the buffer's right part not cleared", "out.zero_()", "pass"),
]


@pytest.mark.parametrize(("old", "new"), [f[1:] for f in LAYER_MUTANTS], ids=[f[0] for f in LAYER_MUTANTS])
def test_a_wrong_layer_is_noticed(old, new, tmp_path, device):
    mutant = load_mutant(Path(kernels.nf4_linear.__file__), {old: new}, tmp_path)
    weight, inputs = make(torch.float32, 6, device)
    assert failures(errors(*pair(weight, "torch", mutant), inputs, LEARNED), torch.float32)


FEW_ROWS_MUTANTS = [
    ("every part of K adds the adapters", "tl.where(split == 0, rank, 0)", "rank"),
    ("only the first part of K counts", "out.sum(0)", "out[0]"),
    ("a part of K begins too late", "range(split * tiles_per_split", "range(split * tiles_per_split + 1"),
    ("the last words are not read", "(word < row_words)", "(word < row_words - 1)"),
    ("the last row is not read", "& (m < rows)[None, :]\n        x", "& (m < rows - 1)[None, :]\n        x"),
    ("absmax of the next block", "block[None, :]\n        absmax", "block[None, :] + 1\n        absmax"),
    ("only the first 16 ranks", "0, rank, 0), RANK_TILE", "0, RANK_TILE, 0), RANK_TILE"),
]


@pytest.mark.parametrize(("old", "new"), [f[1:] for f in FEW_ROWS_MUTANTS], ids=[f[0] for f in FEW_ROWS_MUTANTS])
def test_a_wrong_product_of_few_rows_is_noticed(old, new, tmp_path, device):
    mutant = load_mutant(Path(kernels.nf4_linear.__file__), {old: new}, tmp_path)
    weight, inputs = make(torch.bfloat16, 5, device, torch.float32, 48, 1088)
    inputs["a1"], inputs["b1"] = inputs["a1"].repeat(4, 1), inputs["b1"].repeat(1, 4)  # 39 ranks in all
    assert failures(errors(*pair(weight, module=mutant), inputs), torch.bfloat16)
