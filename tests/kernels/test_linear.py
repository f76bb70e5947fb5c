"""Is a product on oneDNN the product, with its gradients, wherever a linear layer asks for it?

oneDNN runs on any CPU; only what it is chosen for differs. So the choice is made here for both.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels.linear
from kernels.linear import linear, product, runs_on_onednn
from tests.kernels.accuracy import BOUNDS, relative_error

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def pays(request, monkeypatch):
    monkeypatch.setattr(kernels.linear, "onednn_pays", lambda: request.param)
    return request.param


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


def results(function, x, weight, bias, learning):
    """y and the gradients of those in `learning`, in x's dtype."""
    given = {
        name: None if value is None else value.detach().requires_grad_(name in learning)
        for name, value in {"x": x, "weight": weight, "bias": bias}.items()
    }
    y = function(*given.values())
    upstream = drawn(*y.shape, 2).to(y.dtype)[..., 0]  # strided
    return [y.detach(), *torch.autograd.grad(y, [given[name] for name in learning], upstream)]


@pytest.mark.parametrize("shape", [(37,), (3, 16), (2, 3, 9), (5,), (0,)], ids=str)
@pytest.mark.parametrize(
    "learning", [("x", "weight", "bias"), ("x", "weight"), ("x",), ("weight",), ("bias",)], ids=" ".join
)
def test_values_and_gradients_are_those_of_float64(pays, shape, learning):
    x, weight, bias = drawn(*shape, 24), drawn(40, 24), drawn(40) if "bias" in learning else None
    wide = (None if value is None else value.double() for value in (x, weight, bias))
    found, truth = results(linear, x, weight, bias, learning), results(F.linear, *wide, learning)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert relative_error(one, other) < BOUNDS[torch.float32]


def test_inputs_may_have_any_strides(pays):
    x, weight = drawn(24, 32).t(), drawn(24, 40).t()
    assert relative_error(product(x, weight), x.double() @ weight.double().t()) < BOUNDS[torch.float32]
    x = drawn(32, 48)[:, ::2]
    assert relative_error(linear(x, weight), x.double() @ weight.double().t()) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_stay_with_torch(pays, dtype):
    x, weight = drawn(32, 24, dtype=dtype), drawn(40, 24, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_holds(pays):
    x, weight = drawn(32, 24), drawn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_the_compiler_takes_it(pays):
    x, weight, bias = drawn(4, 16, 24), drawn(40, 24), drawn(40)
    compiled = torch.compile(lambda *given: linear(*given).relu(), fullgraph=True)
    eager = results(lambda *given: linear(*given).relu(), x, weight, bias, ("x", "weight", "bias"))
    for one, other in zip(results(compiled, x, weight, bias, ("x", "weight", "bias")), eager, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():  # as an evaluation compiles it
        torch.testing.assert_close(compiled(x, weight, bias), eager[0])


def test_the_result_may_be_added_to_in_place(pays):
    """As LoRA's update is; of a view, autograd would copy the gradient for that."""
    assert not linear(drawn(2, 16, 24).requires_grad_(), drawn(40, 24))._is_view()
    x, weight, low = drawn(32, 24), drawn(40, 24), drawn(32, 40)
    found = results(lambda x, weight, _: linear(x, weight).add_(low), x, weight, None, ("x", "weight"))
    wanted = results(lambda x, weight, _: F.linear(x, weight) + low, x, weight, None, ("x", "weight"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_torch_counts_its_operations(pays):
    x, weight = drawn(3, 16, 24).requires_grad_(), drawn(40, 24).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 48 * 24 * 40
    with FlopCounterMode(display=False) as counter:
        linear(x, weight.detach()).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 48 * 24 * 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 48 * 24 * 40


def test_what_goes_to_onednn(monkeypatch):
    """fp32 of enough rows on a CPU where it pays: an AMD processor whose torch knows AVX-512, and nothing else."""
    x, weight = drawn(32, 24), drawn(40, 24)
    monkeypatch.setattr(kernels.linear, "onednn_pays", lambda: True)
    assert runs_on_onednn(x, weight)
    assert not runs_on_onednn(x[:15], weight)
    assert not runs_on_onednn(x.double(), weight.double())
    assert not runs_on_onednn(x, weight.bfloat16())
    assert not runs_on_onednn(x.to("meta"), weight.to("meta"))


@pytest.mark.parametrize(
    ("processor", "capability", "wanted"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_where_it_pays(monkeypatch, tmp_path, processor, capability, wanted):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {processor}\n")
    monkeypatch.setattr(kernels.linear, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    kernels.linear._is_amd_with_avx512.cache_clear()
    try:
        assert kernels.linear.onednn_pays() is wanted
    finally:
        kernels.linear._is_amd_with_avx512.cache_clear()
