"""Is every path of an adapted linear layer W + scale · B A? Against float64, merged weights, and deliberate faults."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels.lora_linear
from kernels.lora_linear import (
    PATHS,
    Adapter,
    augmented_weight,
    check_adapters,
    choose_path,
    device_name,
    lora_linear,
    store_adapters,
)
from tests.kernels.accuracy import DTYPES, check, errors, failures, relative_error, run, strided
from tests.kernels.mutants import load_mutant

FUSED = ["augmented", "one_pass"]
# (rows of B, rank, scale, first row) of each adapter, and the rows of the weight
SINGLE = ([(264, 5, 2.0, 0)], 264)
STACKED = ([(80, 4, 2.0, 0), (40, 8, 0.5, 80), (32, 4, 2.0, 120)], 152)  # q, k, v
SHARED = ([(48, 4, 2.0, 0), (48, 6, 0.7, 0)], 48)  # two adapters over the same rows
PARTIAL = ([(16, 8, 1.5, 24)], 48)  # rows 0..23 and 40..47 have none


def make(layout, dtype, rows, width, device, master=None):
    """x, weight, a0, b0, a1, … of sizes at which the adapters' share is as large as the base layer's."""
    adapters, n = layout
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(n, width, generator=generator) / width**0.5
    inputs = {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}
    for i, (height, rank, _, _) in enumerate(adapters):
        inputs[f"a{i}"] = (torch.randn(rank, width, generator=generator) / width**0.5).to(device, master or dtype)
        inputs[f"b{i}"] = (torch.randn(height, rank, generator=generator) / rank**0.5).to(device, master or dtype)
    return inputs


def adapters_of(layout, low_rank):
    return [
        Adapter(low_rank[f"a{i}"], low_rank[f"b{i}"], scale, first_row)
        for i, (_, _, scale, first_row) in enumerate(layout[0])
    ]


def call(layout, path, module=kernels.lora_linear, dropout=0.0):
    """lora_linear as a function of tensors alone."""

    def function(x, weight, **low_rank):
        adapters = adapters_of(layout, low_rank)
        augmented = module.augmented_weight(weight, adapters) if path == "augmented" else None
        return module.lora_linear(x, weight, adapters, dropout=dropout, path=path, augmented=augmented)

    return function


def learned(inputs):
    return [name for name in inputs if name != "weight"]


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def taken(request, monkeypatch, device):
    """Both kernels of the one-pass product, on a GPU the one that suits it; {"descriptors": what was launched last}."""
    if device.type == "cpu":
        monkeypatch.setattr(kernels.lora_linear, "has_tma", lambda device: request.param)
    elif request.param != kernels.lora_linear.has_tma(device):
        pytest.skip("this GPU takes the other kernel")
    launch, taken = kernels.lora_linear.launch_one_pass, {"wanted": request.param}

    def noting(*arguments):
        taken["descriptors"] = arguments[-1]
        return launch(*arguments)

    monkeypatch.setattr(kernels.lora_linear, "launch_one_pass", noting)
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("layout", [STACKED, SHARED, PARTIAL], ids=["stacked", "shared", "partial"])
def test_sum_and_gradients_equal_float64(device, layout, path, dtype):
    inputs = make(layout, dtype, 21, 50, device)
    check(call(layout, path), call(layout, "torch"), inputs, learned(inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(150, 72), (1, 64), (131, 33)], ids=str)
def test_one_pass_over_many_tiles(device, taken, shape, dtype):
    inputs = make(SINGLE, dtype, *shape, device)
    check(call(SINGLE, "one_pass"), call(SINGLE, "torch"), inputs, learned(inputs), dtype)
    assert taken["descriptors"] == (taken["wanted"] and dtype != torch.float32 and shape[1] % 8 == 0)


@pytest.mark.parametrize("path", FUSED)
def test_adapters_in_fp32_beside_a_bf16_layer(device, path, taken):
    inputs = make(STACKED, torch.bfloat16, 30, 64, device, master=torch.float32)
    measured = errors(call(STACKED, path), call(STACKED, "torch"), inputs, learned(inputs))  # also compares the dtypes
    assert not failures(measured, torch.bfloat16)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", [SINGLE, STACKED, SHARED, PARTIAL], ids=["single", "stacked", "shared", "partial"])
def test_it_is_the_layer_with_the_adapters_merged_into_its_weight(device, layout, path):
    """PEFT's forward in closed form (Hu et al. 2021, §4.1)."""
    inputs = make(layout, torch.float32, 9, 20, device)
    merged = inputs["weight"].double()
    for adapter in adapters_of(layout, inputs):
        rows = slice(adapter.first_row, adapter.first_row + len(adapter.b))
        merged[rows] += adapter.scale * adapter.b.double() @ adapter.a.double()
    x = inputs["x"].view(3, 3, -1)  # any number of dimensions
    found = call(layout, path)(**{**inputs, "x": x})
    assert found.shape == (3, 3, len(merged))
    assert relative_error(found, F.linear(x.double(), merged)) < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_double_precision_is_exact_where_it_is_taken(path):
    inputs = make(STACKED, torch.float64, 9, 20, "cpu")
    if path == "one_pass":
        with pytest.raises(ValueError, match="float64"):
            call(STACKED, path)(**inputs)
    else:
        for error, _ in errors(call(STACKED, path), call(STACKED, "torch"), inputs, learned(inputs)).values():
            assert error < 1e-14


@pytest.mark.parametrize("path", PATHS)
def test_a_new_adapter_changes_no_bit_and_the_weight_has_no_gradient(device, path):
    inputs = make(STACKED, torch.float32, 9, 20, device)
    for name in inputs:
        if name.startswith("b"):
            inputs[name].zero_()
        inputs[name].requires_grad_()
    y = call(STACKED, path)(**inputs)
    base = F.linear(inputs["x"], inputs["weight"])
    assert torch.equal(y, base) if path == "torch" else torch.allclose(y, base, rtol=1e-6, atol=1e-6)
    y.sum().backward()  # a gradient of stride 0
    assert inputs["weight"].grad is None
    assert inputs["b0"].grad.abs().sum() > 0 and (inputs["a0"].grad == 0).all()


@pytest.mark.parametrize("path", FUSED)
def test_gaps_in_memory_and_gradients_of_stride_zero(device, path, taken):
    inputs = {name: strided(value) for name, value in make(STACKED, torch.float32, 10, 24, device).items()}
    check(call(STACKED, path), call(STACKED, "torch"), inputs, learned(inputs), torch.float32)

    def summed(path):
        return lambda **tensors: call(STACKED, path)(**tensors).sum(0)

    assert not failures(errors(summed(path), summed("torch"), inputs, learned(inputs)), torch.float32)


@pytest.mark.parametrize(("path", "wanted"), [("augmented", {(41, 88)}), ("one_pass", {(41, 72), (41, 16)})])
def test_what_is_kept_for_the_backward(device, path, wanted):
    """[x | x Aᵀ] and not x beside it; or x and the narrow x Aᵀ."""
    inputs = make(STACKED, torch.float32, 41, 72, device)
    for name in learned(inputs):
        inputs[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda _: None):
        call(STACKED, path)(**inputs)
    assert {shape for shape in kept if shape[0] == 41} == wanted


@pytest.mark.parametrize("path", FUSED)
def test_no_rows_and_no_adapters(device, path):
    inputs = make(SHARED, torch.float32, 0, 24, device)
    results = run(call(SHARED, path), inputs, learned(inputs), 1)
    assert results["out0"].shape == (0, 48) and (results["da0"] == 0).all() and (results["db0"] == 0).all()
    x, weight = torch.ones(2, 24, device=device), inputs["weight"]
    assert torch.equal(lora_linear(x, weight, [], path=path), F.linear(x, weight))


# ------------------------------------------------------------------------------------------------------ the augmented weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_augmented_weight_holds_w_and_each_b_at_its_rows(device, dtype):
    inputs = make(PARTIAL, dtype, 4, 20, device)
    (adapter,) = adapters_of(PARTIAL, inputs)
    w_aug = augmented_weight(inputs["weight"], [adapter])
    assert w_aug.stride(0) * w_aug.element_size() % 16 == 0
    assert torch.equal(w_aug[:, :20], inputs["weight"]) and torch.equal(w_aug[24:40, 20:28], adapter.b)
    w_aug[:, :20], w_aug[24:40, 20:28] = 0, 0
    assert not w_aug.any()


def test_a_stored_adapter_is_used_and_its_layer_may_be_a_view(device):
    inputs = make(STACKED, torch.bfloat16, 4, 24, device, master=torch.float32)
    adapters = adapters_of(STACKED, inputs)
    w_aug = augmented_weight(inputs["weight"], adapters)
    for adapter in adapters:
        adapter.b.mul_(-3)  # an optimizer step
    store_adapters(w_aug, adapters)
    assert torch.equal(w_aug, augmented_weight(inputs["weight"], adapters))
    wanted = lora_linear(inputs["x"], inputs["weight"], adapters)
    for path in FUSED:
        found = lora_linear(inputs["x"], w_aug[:, :24], adapters, path=path, augmented=w_aug)
        assert relative_error(found, wanted) < 4.5e-3


def test_storing_between_forward_and_backward_is_noticed(device):
    inputs = make(SHARED, torch.float32, 4, 24, device)
    inputs["x"].requires_grad_()
    adapters = adapters_of(SHARED, inputs)
    w_aug = augmented_weight(inputs["weight"], adapters)
    y = lora_linear(inputs["x"], inputs["weight"], adapters, path="augmented", augmented=w_aug)
    store_adapters(w_aug, adapters)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------------------------------- dropout


def seeded(function, seed=5):
    """The function after a seed."""

    def call_seeded(**inputs):
        torch.manual_seed(seed)
        return function(**inputs)

    return call_seeded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_dropout_masks_each_adapters_input_and_nothing_else(device, path, dtype):
    """With masks drawn as PEFT draws them, one nn.Dropout an adapter: y = x Wᵀ + Σ scale · (m/(1 − p) · x) Aᵀ Bᵀ."""
    inputs = make(STACKED, dtype, 21, 50, device)
    torch.manual_seed(5)
    masks = [F.dropout(torch.ones_like(inputs["x"]), 0.3) for _ in STACKED[0]]
    assert not torch.equal(masks[0], masks[1])

    def written_out(x, weight, **low_rank):
        y = x @ weight.t()
        for adapter, mask in zip(adapters_of(STACKED, low_rank), masks, strict=True):
            low = (mask.to(x.dtype) * x) @ adapter.a.t()
            rows = (adapter.first_row, len(weight) - adapter.first_row - len(adapter.b))
            y = y + F.pad(adapter.scale * low @ adapter.b.t(), rows)
        return y

    measured = errors(seeded(call(STACKED, path, dropout=0.3)), written_out, inputs, learned(inputs))
    assert not failures(measured, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_checkpointing_draws_the_same_masks_again(device, path):
    inputs = make(STACKED, torch.float32, 12, 24, device)
    function = call(STACKED, path, dropout=0.5)

    def checkpointed(**tensors):
        return checkpoint(function, use_reentrant=False, **tensors)

    plain = run(seeded(function), inputs, learned(inputs), 1)
    again = run(seeded(checkpointed), inputs, learned(inputs), 1)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", PATHS)
def test_forward_and_backward_share_a_mask_when_compiled(device, path):
    """W = 0, A = B = I: y is scale · the masked x, and the gradient of its sum names the elements that were kept."""
    eye = torch.eye(16, device=device)
    x = torch.ones(40, 16, device=device, requires_grad=True)
    weight = torch.zeros_like(eye)
    w_aug = augmented_weight(weight, [Adapter(eye, eye, 2.0)])

    @torch.compile(fullgraph=True)
    def function(x, a):
        adapters = [Adapter(a, eye, 2.0)]
        return lora_linear(x, weight, adapters, dropout=0.5, path=path, augmented=w_aug)

    y = function(x, eye)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, gradient) and y.unique().tolist() == [0.0, 4.0]
    assert not torch.equal(function(x, eye), y)  # another call, another mask


# ------------------------------------------------------------------------------------------------------- rules and refusals


@pytest.mark.parametrize("path", FUSED)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_paths_compile_whole(device, path, dropout):
    inputs = make(STACKED, torch.bfloat16, 12, 24, device, master=torch.float32)
    for name in learned(inputs):
        inputs[name].requires_grad_()
    adapters = adapters_of(STACKED, inputs)
    w_aug = augmented_weight(inputs["weight"], adapters)
    function = partial(lora_linear, path=path, augmented=w_aug, dropout=dropout)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for way in (function, compiled):
        torch.manual_seed(3)
        y = way(inputs["x"], inputs["weight"], adapters)
        results.append([y, *torch.autograd.grad(y.sum(), [inputs[name] for name in learned(inputs)])])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_obey_torchs_rules(device, dtype):
    inputs = make(STACKED, dtype, 4, 24, device, master=torch.float32)
    adapters = adapters_of(STACKED, inputs)
    x, weight, w_aug = inputs["x"].requires_grad_(), inputs["weight"], augmented_weight(inputs["weight"], adapters)
    a = torch.randn(16, 24).to(x).requires_grad_()
    low = torch.randn(4, 16).to(x).requires_grad_()
    b, first_rows = [adapter.b.requires_grad_() for adapter in adapters], [0, 80, 120]
    ops, x_aug = torch.ops.groundup, torch.randn(4, w_aug.shape[1]).to(x).requires_grad_()
    torch.library.opcheck(ops.lora_augment, (x, a))
    torch.library.opcheck(ops.lora_augmented_product, (x_aug, w_aug, b, first_rows, 24))
    torch.library.opcheck(ops.lora_one_pass, (x, weight, a, b, first_rows))
    torch.library.opcheck(ops.lora_one_pass_given_low, (x, weight, low, b, first_rows))


@pytest.mark.parametrize("path", FUSED)
def test_autocast_leaves_the_paths_their_dtype(device, path):
    inputs = make(SHARED, torch.float32, 5, 24, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(SHARED, path)(**inputs)
        assert call(SHARED, "torch")(**inputs).dtype == torch.bfloat16
    assert y.dtype == torch.float32 and relative_error(y, call(SHARED, "torch")(**inputs)) < 1e-6


def test_where_triton_cannot_run_the_kernel_says_why(monkeypatch):
    monkeypatch.setattr(kernels.lora_linear, "why_not_triton", lambda device: "triton is not installed")
    inputs = make(SHARED, torch.float32, 2, 16, "cpu")
    with pytest.raises(ValueError, match="triton is not installed"):
        call(SHARED, "one_pass")(**inputs)


def test_what_cannot_be_is_refused_by_name(device):
    x, weight = torch.zeros(2, 16, device=device), torch.zeros(32, 16, device=device)
    adapter = Adapter(torch.zeros(4, 16, device=device), torch.zeros(32, 4, device=device), 1.0)
    wide = Adapter(torch.zeros(40, 16, device=device), torch.zeros(32, 40, device=device), 1.0)
    with pytest.raises(ValueError, match="torch, augmented, one_pass"):
        lora_linear(x, weight, [adapter], path="triton")
    with pytest.raises(ValueError, match="augmented_weight"):
        lora_linear(x, weight, [adapter], path="augmented")
    with pytest.raises(ValueError, match="columns"):
        lora_linear(x, weight, [adapter], path="augmented", augmented=augmented_weight(weight, [wide]))
    with pytest.raises(ValueError, match="'torch' or 'augmented'"):
        lora_linear(x, weight, [wide], path="one_pass")
    with pytest.raises(ValueError, match="bfloat16"):
        lora_linear(x.bfloat16(), weight, [adapter], path="one_pass")
    with pytest.raises(ValueError, match="32 rows from row 1"):
        check_adapters(weight, [Adapter(adapter.a, adapter.b, 1.0, 1)])
    with pytest.raises(ValueError, match="A is"):
        check_adapters(weight, [Adapter(adapter.a[:, :8], adapter.b, 1.0)])


# ------------------------------------------------------------------------------------------------------------ the choice


def test_the_nearest_measured_shape_of_the_same_device_and_dtype_chooses(tmp_path, monkeypatch):
    def entry(device, rows, fastest, dtype="bfloat16"):
        times = {"base": 1.0, "norm_augmented": 1.0} | {path: 3.0 for path in PATHS} | {fastest: 2.0}
        return {"device": device, "dtype": dtype, "rows": rows, "N": 64, "K": 64, "R": 16, "microseconds": times}

    table = tmp_path / "measured.json"
    monkeypatch.setattr(kernels.lora_linear, "MEASURED", table)
    entries = [entry("H100", 1000, "augmented"), entry("H100", 4000, "one_pass"), entry("A100", 100, "one_pass")]
    table.write_text(json.dumps(entries))

    def choose(device, rows, dtype=torch.bfloat16):
        return choose_path(device, dtype, rows, 64, 64, 16)

    assert choose("H100", 1900) == "augmented" and choose("H100", 2100) == "one_pass"
    assert choose("H100", 250) == "augmented" and choose("H100", 249) == "torch"  # a factor of four, no further
    assert choose("H100", 16000) == "one_pass" and choose("H100", 16001) == "torch"
    assert choose("H200", 1000) == "torch" and choose("H100", 1000, torch.float16) == "torch"


def test_the_committed_table_is_whole():
    table = json.loads(kernels.lora_linear.MEASURED.read_text())
    keys = [tuple(entry[key] for key in ("device", "dtype", "rows", "N", "K", "R")) for entry in table]
    assert keys == sorted(set(keys))
    for entry in table:
        assert entry["microseconds"].keys() >= {"base", "torch", "augmented"}
        assert all(time > 0 for time in entry["microseconds"].values())
        dtype = getattr(torch, entry["dtype"])
        times = {path: time for path, time in entry["microseconds"].items() if path in PATHS}
        shape = (entry["rows"], entry["N"], entry["K"], entry["R"])
        assert times[choose_path(entry["device"], dtype, *shape)] == min(times.values())


def test_a_device_has_a_name(device):
    assert device_name(device)


# what is wrong, the text to replace, with what, the path and a dtype in which it shows
MUTANTS = [
    ("unscaled", "(adapter.scale * adapter.a).to", "(adapter.a).to", "augmented", torch.float32),
    ("scaled twice", "(adapter.scale * adapter.a).to", "(adapter.scale**2 * adapter.a).to", "one_pass", torch.float32),
    ("dA not of x alone", "d_low.t() @ x_aug[:, :width]", "d_low.t() @ x_aug[:, -width:]", "augmented", torch.float32),
    ("dx without the adapters", "torch.addmm(d_aug[:, :width], d_low, a)", "d_aug[:, :width] + 0", "augmented",
     torch.float32),
    ("dB of other rows", "block[row : row + part.shape[0], column", "block[: part.shape[0], column", "augmented",
     torch.float32),
    ("dB of the first columns", "column : column + part.shape[1]].to", ": part.shape[1]].to", "one_pass", torch.float32),
    ("B at other rows", "block[row : row + part.shape[0], column : column + part.shape[1]] = part",
     "block[: part.shape[0], column : column + part.shape[1]] = part", "one_pass", torch.float32),
    ("dx without the adapters in one pass", ".addmm_(d_low, a)", "", "one_pass", torch.float32),
    ("low of the last columns alone", "tl.trans(a), low,", "tl.trans(a), 0 * low,", "one_pass", torch.float32),
    ("B forgotten", "acc = tl.dot(rounded, tl.trans(b), acc", "tl.dot(rounded, tl.trans(b), acc", "one_pass",
     torch.float32),
    ("low kept from the first rows alone", "at_low = row[:, None]", "at_low = (row % BLOCK_M)[:, None]", "one_pass",
     torch.float32),
    ("tiles in the wrong order", "(first + within % height)", "(first + within // height)", "one_pass", torch.float32),
    ("K's last column is not read", "inside = (start + k < WIDTH)", "inside = (start + k < WIDTH - 1)", "one_pass",
     torch.float32),
    ("descriptors: low of the last columns alone", "tl.trans(a_tiles.load([0, start])), low,",
     "tl.trans(a_tiles.load([0, start])), 0 * low,", "descriptors", torch.float16),
    ("descriptors: B of the first rows", "b_tiles.load([n, 0])", "b_tiles.load([0, 0])", "descriptors", torch.float16),
    ("descriptors: low is not stored", "low_tiles.store([m, 0], rounded)", "pass", "descriptors", torch.float16),
    ("descriptors: the sum goes on into the next tile", "        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n        low",
     "        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + n\n        low", "descriptors", torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "path", "dtype"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS]
)
def test_a_wrong_kernel_is_noticed(old, new, path, dtype, tmp_path, device):
    replacements = {old: new}
    if path == "descriptors":
        path, replacements['return device.type == "cuda" and'] = "one_pass", "return True or"
    mutant = load_mutant(Path(kernels.lora_linear.__file__), replacements, tmp_path)
    layout = SINGLE if dtype == torch.float16 else STACKED  # several tiles of the larger kind, or several adapters
    inputs = make(layout, dtype, 70, 72, device)
    assert failures(errors(call(layout, path, mutant), call(layout, "torch"), inputs, learned(inputs)), dtype)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("torch", "return F.dropout(x, dropout)", "return x"),
        ("augmented", "if not dropout:\n        return _augment", "if True:\n        return _augment"),
        ("one_pass", "if not dropout:\n        return _one_pass", "if True:\n        return _one_pass"),
        ("torch", "return [masked(x, dropout, keys, number) if dropout else x for number in range(len(adapters))]",
         "return [F.dropout(x, dropout)] * len(adapters)"),
    ],
    ids=["ignored", "ignored augmented", "ignored in one pass", "one mask for all"],
)  # fmt: skip
def test_wrong_dropout_is_noticed(path, old, new, tmp_path, device):
    mutant = load_mutant(Path(kernels.lora_linear.__file__), {old: new}, tmp_path)
    inputs = make(STACKED, torch.float32, 21, 50, device)
    functions = [seeded(call(STACKED, path, module, dropout=0.3)) for module in (mutant, kernels.lora_linear)]
    found, wanted = (run(function, inputs, learned(inputs), 1) for function in functions)
    assert relative_error(found["out0"], wanted["out0"]) > 1e-3
