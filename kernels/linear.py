"""What does a matrix product in fp32 run on, on a CPU?

torch multiplies fp32 matrices with MKL, which keeps AVX-512 from processors that are not Intel's. oneDNN, which torch brings as
well, uses it: on an AMD EPYC a product takes 0.3 to 0.9 times the time (docs/RESULTS.md). So on AMD's processors with AVX-512
products go to oneDNN, as fp32 as before; everywhere else, and in other dtypes, they stay where torch has them.
"""

import functools
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_CPUINFO = Path("/proc/cpuinfo")
_LEAST_ROWS = 16  # fewer, as of tokens that are drawn one at a time, do not repay the call


def onednn_pays() -> bool:
    """Whether this machine's fp32 products are faster in oneDNN than in what torch takes."""
    return _is_amd_with_avx512()


# as kernels/attention_backends.py marks backend_that_runs: the compiler takes the answer as a constant
onednn_pays._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _is_amd_with_avx512() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _CPUINFO.is_file():
        return False
    return "AuthenticAMD" in _CPUINFO.read_text(encoding="utf-8", errors="replace")


def runs_on_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x (…, K) and weight (N, K) goes there."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return onednn_pays() and not torch.is_autocast_enabled("cpu") and x.numel() >= _LEAST_ROWS * x.shape[-1]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias (…, N) for x (…, K), weight (N, K) and bias (N,), without gradients, in any strides."""
    if runs_on_onednn(x, weight):
        y = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), weight, bias, "none", [], "")
        # no view, as torch's own: what is added to one in place, such as LoRA's update, would cost its gradient a copy
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` with gradients; what F.linear is, on any device and in any dtype."""
    if not runs_on_onednn(x, weight):
        return F.linear(x, weight, bias)
    # the compiler takes oneDNN's own operator for one of its fusions, and fails on it
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return product(x, weight, bias)
    return _linear(x, weight, bias)


@torch.library.custom_op("groundup::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, K), weight (N, K), bias (N,) → (…, N)."""
    return product(x, weight, bias)


def _product_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * prod(x_shape) * weight_shape[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in builds without oneDNN
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_product_flops)


@register_flop_formula(torch.ops.groundup.linear)
def _linear_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return _product_flops(x_shape, weight_shape)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("groundup::linear_backward", mutates_args=())
def _linear_backward(
    upstream: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; one not wanted is empty."""
    d_x = product(upstream, weight.t()) if want_x else x.new_empty(0)
    d_weight = product(upstream.flatten(0, -2).t(), x.flatten(0, -2).t()) if want_weight else x.new_empty(0)
    return d_x, d_weight


@register_flop_formula(torch.ops.groundup.linear_backward)
def _linear_backward_flops(upstream_shape, x_shape, weight_shape, want_x, want_weight, out_shape=None, **_) -> int:
    return 2 * prod(x_shape) * weight_shape[0] * (want_x + want_weight)


@_linear_backward.register_fake
def _(upstream, x, weight, want_x, want_weight):
    return x.new_empty(x.shape if want_x else 0), x.new_empty(weight.shape if want_weight else 0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, upstream):
    want_x, want_weight, want_bias = ctx.needs_input_grad
    d_x, d_weight = _linear_backward(upstream, *ctx.saved_tensors, want_x, want_weight)
    return (
        d_x if want_x else None,
        d_weight if want_weight else None,
        upstream.flatten(0, -2).sum(0) if want_bias else None,
    )


_linear.register_autograd(_backward, setup_context=_save)
