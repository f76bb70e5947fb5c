"""How does a linear layer multiply in 8 bits? Rows of both factors scaled to e4m3's range, each by its own largest value.

Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433) describe the format. Of the three products of a layer two are in fp8:
x·Wᵀ and, in the backward pass, that of x's gradient. The weight's gradient sums over tokens, where rounding adds up; it stays
in bf16. Scales are of the numbers at hand, so nothing is remembered from step to step, and a resumed run needs nothing.

The product is torch's `_scaled_mm`, which wants Hopper or newer for scales by row, and factors whose sizes are multiples of 16.
On a CPU the same operator computes the same, slowly: for tests. Finding scales and rounding are passes over memory of their own
unless --compile_model fuses them.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa, no infinity
LARGEST = torch.finfo(FP8).max  # 448
SIZE_MULTIPLE = 16  # of the inputs and outputs of a layer
CAPABILITY = (9, 0)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in bf16 (…, N), for x (…, K), weight (N, K) and bias (N,) in any floating dtype.

    Every rounding to e4m3 is off by at most 1/16 of a value that is not among the smallest of its row.
    """
    y = _Fp8Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias.to(y.dtype)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight, fast=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad
        d_x = _product(upstream, weight.t(), fast=False).to(x.dtype) if want_x else None
        d_weight = (upstream.t() @ x.to(upstream.dtype)).to(weight.dtype) if want_weight else None
        return d_x, d_weight


def _product(a: Tensor, b: Tensor, fast: bool) -> Tensor:
    """a bᵀ in bf16 (M, N), for (M, K) and (N, K). fast: sums have fewer bits than fp32's, as is usual in the forward pass."""
    (a8, a_scale), (b8, b_scale) = rows_to_fp8(a), rows_to_fp8(b)
    return torch._scaled_mm(
        a8, b8.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) as e4m3 (R, K), contiguous, and what each row is to be multiplied with, fp32 (R, 1).

    A row with a NaN or an infinity becomes NaN throughout.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x / scale).to(FP8).contiguous(), scale


def why_not_fp8(device: torch.device) -> str | None:
    """Why products cannot be in fp8 on `device`; None where they can."""
    if device.type != "cuda":
        return f"{device.type} multiplies no fp8"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"this GPU's compute capability is {capability[0]}.{capability[1]}, and a scale for each row needs 9.0 (Hopper)"
    return None
