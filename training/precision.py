"""In which number format does the model compute, and how is a step that overflowed left out?

Weights, optimizer state, gradient reduction, softmax and loss are fp32; matrix products are bf16, or fp16 with a loss
scaler, under autocast; those of the blocks may be fp8 (kernels/fp8.py).
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from kernels.fp8 import why_not_fp8


@dataclass(frozen=True)
class Precision:
    """The dtype of matrix products, and why it was chosen (for the start-up table)."""

    dtype: torch.dtype
    reason: str
    fp8: bool = False  # whether the blocks' products are in fp8, beside what is in dtype

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision for --mixed_precision auto, bf16, fp16, fp8 or none. Raises UserError for what the device lacks."""
    if name == "none":
        return Precision(torch.float32, "fp32 (--mixed_precision none)")
    if name == "auto" and device.type != "cuda":
        return Precision(torch.float32, f"fp32 (the default on {device.type})")
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        if has_bf16:
            return Precision(torch.bfloat16, "bf16 with fp32 master weights")
        return Precision(torch.float16, "fp16 with a loss scaler (this GPU has no bf16)")
    if name == "bf16" and not has_bf16:
        raise UserError("--mixed_precision bf16: this GPU has no bf16 arithmetic; use fp16")
    if name == "fp8":
        if reason := why_not_fp8(device):
            raise UserError(f"--mixed_precision fp8: {reason}; use bf16")
        return Precision(torch.bfloat16, "fp8 products in the blocks, bf16 else, fp32 master weights", fp8=True)
    if name == "bf16":
        return Precision(torch.bfloat16, "bf16 with fp32 master weights (--mixed_precision bf16)")
    return Precision(torch.float16, "fp16 with fp32 master weights and a loss scaler (--mixed_precision fp16)")


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, §3.2), without a word to the host.

    torch.amp.GradScaler judges each optimizer by its own gradients, so that with two of them one may step while the
    other does not; here one verdict, on the norm of all gradients, holds for both. When disabled the scale is 1 for ever.
    """

    GROWTH_INTERVAL = 2000
    INITIAL_SCALE = 2.0**16

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(self.INITIAL_SCALE if enabled else 1.0, device=device)
        self._good_steps = torch.tensor(0, device=device)

    def update(self, finite: Tensor) -> None:
        """Halve the scale after a step whose gradients overflowed (`finite`: 0-dim bool), double it after 2000 good ones."""
        if not self.enabled:
            return
        self._good_steps = torch.where(finite, self._good_steps + 1, 0)
        grow = self._good_steps == self.GROWTH_INTERVAL
        self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
        self._good_steps = torch.where(grow, 0, self._good_steps)

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good_steps": self._good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self._good_steps.fill_(state["good_steps"])
