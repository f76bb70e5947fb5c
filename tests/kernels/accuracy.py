"""Is a kernel as exact as its dtype allows? The one check that all kernel tests share.

The truth is the plain PyTorch reference in float64 on the same, already rounded inputs. The error of a result is
‖result − truth‖ / ‖truth‖ (Frobenius). It must stay below BOUNDS[dtype], and below 1.25 times the error that the
reference itself makes in that dtype. The bounds: in fp32 sums of up to 16 thousand terms, in fp16 and bf16 the rounding
of inputs to intermediate products and of the result (half a unit in the last place is 2.4e-4 and 2.0e-3 at worst, 0.58
of that in the mean square), with room for two such roundings.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
DTYPES = tuple(BOUNDS)
RATIO, FLOOR = 1.25, 1e-7  # how much worse than the reference's own error, and what is noise


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in float64; inf where something is not finite; absolute where the truth is zero."""
    found, truth = found.detach().double(), truth.detach().double()
    if found.shape != truth.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found - truth).norm() / (truth.norm() or 1.0)).item()


def run(function: Callable, inputs: dict[str, Tensor], wanted: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Outputs "out0", "out1"… of function(**inputs), and "d<name>" for each name of `wanted`.

    The gradients that come from above are random, of the outputs' dtypes, and strided: every second column of a wider
    tensor. The same seed gives the same ones whatever the dtype.
    """
    inputs = {
        name: value.detach().requires_grad_(name in wanted) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    outputs = function(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    if wanted:
        generator = torch.Generator().manual_seed(seed)
        learned = [output for output in outputs if output.requires_grad]
        upstream = [
            torch.randn(*output.shape, 2, generator=generator).to(torch.bfloat16).to(output.device, output.dtype)[..., 0]
            for output in learned
        ]  # fmt: skip
        gradients = torch.autograd.grad(learned, [inputs[name] for name in wanted], upstream)
        results |= {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results


def errors(
    kernel: Callable, reference: Callable, inputs: dict[str, Tensor], wanted: Sequence[str] = (), seed: int = 1
) -> dict[str, tuple[float, float]]:
    """{output or gradient: (the kernel's error, the reference's own error in the same dtype)}."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    truth = run(reference, wide, wanted, seed)
    found = run(kernel, inputs, wanted, seed)
    plain = run(reference, inputs, wanted, seed)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.dtype == plain[name].dtype, f"{name} is {value.dtype}, the reference gives {plain[name].dtype}"
    return {
        name: (relative_error(found[name], truth[name]), relative_error(plain[name], truth[name])) for name in truth
    }


def failures(measured: dict[str, tuple[float, float]], dtype: torch.dtype) -> list[str]:
    """What breaks the bounds, one sentence each; empty for a sound kernel."""
    broken = []
    for name, (error, plain) in measured.items():
        bound = min(BOUNDS[dtype], RATIO * plain + FLOOR)
        if not error <= bound:
            broken.append(f"{name}: error {error:.2e}, bound {bound:.2e} (the reference's own error is {plain:.2e})")
    return broken


def check(
    kernel: Callable, reference: Callable, inputs: dict[str, Tensor], wanted: Sequence[str], dtype: torch.dtype
) -> None:
    """Assert that `kernel` is as exact as `dtype` allows and gives the same bits a second time."""
    assert not (broken := failures(errors(kernel, reference, inputs, wanted), dtype)), "; ".join(broken)
    once, again = run(kernel, inputs, wanted, 1), run(kernel, inputs, wanted, 1)
    for name in once:
        assert torch.equal(once[name], again[name]), f"{name} differs from one run to the next"


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between them in memory, in both the last two dimensions."""
    wide = torch.full(
        (*x.shape[:-2], x.shape[-2] * 2, x.shape[-1] * 2) if x.dim() > 1 else (len(x) * 2,), torch.nan
    ).to(x)
    view = wide[..., ::2, ::2] if x.dim() > 1 else wide[::2]
    return view.copy_(x)
