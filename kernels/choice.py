"""Which implementation does each operation run on, and why?

The one rule, for `--kernels auto`:

    no GPU, no Triton         the plain PyTorch references
    a GPU, eager              Triton for everything
    a GPU, --compile_model    Triton for what the compiler cannot do as well: the chunked loss, LoRA and NF4. It fuses norms,
                              SwiGLU and RoPE itself, with their neighbours, which a kernel of ours would cut apart

`--kernels triton` and `--kernels torch` choose for all; `--kernels auto swiglu=torch` overrides one. Attention has its own
back ends and its own flag (kernels/attention_backends.py); LoRA's three ways are chosen by measurement (kernels/lora_linear.py).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from errors import UserError
from kernels.jit import why_not_triton
from kernels.linear import onednn_pays

OPERATIONS = ("rms_norm", "rope", "swiglu", "linear_cross_entropy", "lora", "nf4")
_BETTER_THAN_THE_COMPILER = ("linear_cross_entropy", "lora", "nf4")


@dataclass(frozen=True)
class KernelChoice:
    """ "triton" or "torch" for each of OPERATIONS, and attention's back end. The default runs everywhere."""

    rms_norm: str = "torch"
    rope: str = "torch"
    swiglu: str = "torch"
    linear_cross_entropy: str = "torch"
    lora: str = "torch"
    nf4: str = "torch"
    attention: str = "auto"


def choose_kernels(
    request: Sequence[str], device: torch.device, compiled: bool, attention: str = "auto"
) -> KernelChoice:
    """The choice for a --kernels flag: "auto", "triton" or "torch", then any number of "operation=triton|torch".

    attention: what `choose_attention` chose.

    Raises UserError for a word that is none of these, and where Triton is asked for and cannot run on `device`.
    """
    general, *overrides = request if request and "=" not in request[0] else ("auto", *request)
    chosen = dict.fromkeys(OPERATIONS, general)
    for override in overrides:
        operation, _, value = override.partition("=")
        if operation not in OPERATIONS or value not in ("auto", "triton", "torch"):
            raise UserError(
                f"--kernels {override}: give auto, triton or torch, then operation=triton or operation=torch for any of "
                + ", ".join(OPERATIONS)
            )
        chosen[operation] = value
    if general not in ("auto", "triton", "torch"):
        raise UserError(f"--kernels {general}: choose auto, triton or torch")
    reason = why_not_triton(device)
    if reason and (asked := [operation for operation, value in chosen.items() if value == "triton"]):
        raise UserError(f"--kernels asks for Triton for {asked[0]}, but {reason}; leave it at auto")
    for operation, value in chosen.items():
        if value == "auto":
            wanted = device.type == "cuda" and (not compiled or operation in _BETTER_THAN_THE_COMPILER)
            chosen[operation] = "triton" if wanted and not reason else "torch"
    return KernelChoice(**chosen, attention=attention)


def describe_kernels(choice: KernelChoice, device: torch.device, compiled: bool) -> str:
    """The choice in words for a start-up line, with the reason for what is left to PyTorch."""
    chosen = asdict(choice)
    on_triton, on_torch = (
        ", ".join(operation for operation in OPERATIONS if chosen[operation] == kind) for kind in ("triton", "torch")
    )
    if not on_torch:
        return f"Triton: {on_triton}"
    products = "; fp32 products: oneDNN (AMD with AVX-512)" if device.type == "cpu" and onednn_pays() else ""
    reason = why_not_triton(device) or (
        "fused by the compiler" if compiled else "the interpreter is for tests" if device.type == "cpu" else "as asked"
    )
    return (f"Triton: {on_triton}; " if on_triton else "") + f"PyTorch: {on_torch} ({reason}){products}"
