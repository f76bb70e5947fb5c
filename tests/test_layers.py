"""Are the parts of a block that are torch's own operators as exact as our kernels are held to? LayerNorm, activations, GeGLU.

The truth is their definition in float64 on the same inputs; the bounds are those of tests/kernels/accuracy.py.
"""

import math

import pytest
import torch
from torch import Tensor

from layers import LayerNorm, activation
from tests.kernels.accuracy import BOUNDS, relative_error, run

SHAPES = [(3, 17, 64), (1, 1, 7), (129, 300)]


def gelu(x: Tensor) -> Tensor:
    """x Φ(x) (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


DEFINITIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": lambda x: x.clamp_min(0) ** 2,
    "silu": lambda x: x / (1 + (-x).exp()),
}


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within_bounds(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == truth.keys()
    for name in truth:
        assert relative_error(found[name], truth[name]) < BOUNDS[dtype], name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_and_its_gradients_are_the_definition(dtype, shape, bias):
    """(x − mean) / √(variance + eps) · weight + bias (Ba et al., arXiv 1607.06450), with fp32 weights under autocast."""
    size = shape[-1]
    given = {"x": drawn(*shape, dtype=dtype), "weight": drawn(size, dtype=torch.float32, seed=1)}
    given |= {"bias": drawn(size, dtype=torch.float32, seed=2)} if bias else {}

    def ours(x: Tensor, **parameters: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = torch.func.functional_call(LayerNorm(size, 1e-5, bias), parameters, (x,))
        assert found.dtype == dtype
        return found

    def definition(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    wide = {name: value.double() for name, value in given.items()}
    within_bounds(run(ours, given, list(given), 3), run(definition, wide, list(given), 3), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_and_gates_are_the_definition(dtype, name, gated):
    """act(x), and act(gate) · up, which with gelu is GeGLU (Shazeer, arXiv 2002.05202)."""
    given = {"x": 2 * drawn(129, 300, dtype=dtype)} | ({"up": drawn(129, 300, dtype=dtype, seed=1)} if gated else {})

    def of(act):
        return lambda x, up=None: act(x) if up is None else act(x) * up

    wide = {key: value.double() for key, value in given.items()}
    found = run(of(lambda x: activation(x, name)), given, list(given), 3)
    within_bounds(found, run(of(DEFINITIONS[name]), wide, list(given), 3), dtype)
