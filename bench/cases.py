"""What is an operation to be measured, at which shapes, and on which random inputs?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
IGNORED = -100
RANK, SCALE = 16, 2.0
NF4_BYTES = 1 / 2 + 1 / 64  # of a value: its code, and its part of its block's scale
ERROR_ROWS = 256  # tokens of which the error is taken


@dataclass(frozen=True)
class Size:
    """A shape of the model that an operation runs in: `rows` sequences of `length` tokens."""

    rows: int
    length: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


SIZES = {
    "tiny": Size(2, 32, 64, 96, 4, 2, 16, 211),
    "124m": Size(32, 1024, 768, 2048, 12, 12, 64, 50304),
    "1b": Size(4, 4096, 2048, 8192, 32, 8, 64, 128256),
    "8b": Size(1, 8192, 4096, 14336, 32, 8, 128, 128256),
    "4096x4096": Size(1, 4096, 4096, 14336, 32, 8, 128, 128256),  # of the norms: a shape others have published
}
MODELS = ("124m", "1b", "8b")
# rows, outputs, inputs of an adapted linear layer: 8B's attention output, MLP up and down; few rows
PRODUCTS = {
    "tiny": (64, 96, 64),
    "8192x4096x4096": (8192, 4096, 4096),
    "8192x14336x4096": (8192, 14336, 4096),
    "8192x4096x14336": (8192, 4096, 14336),
    "2048x4096x4096": (2048, 4096, 4096),
}
FEW_ROWS = {"tiny": (4, 96, 64), **{f"{rows}x4096x4096": (rows, 4096, 4096) for rows in (1, 16, 64)}}
# rows, heads, tokens, head size: every head with keys of its own, causal
ATTENTIONS = {
    "tiny": (2, 2, 32, 16),
    "8x16x2048x128": (8, 16, 2048, 128),
    "2x32x8192x128": (2, 32, 8192, 128),
    "8x32x2048x64": (8, 32, 2048, 64),
}


@dataclass
class Draw:
    """Random tensors of one set of inputs, drawn on the device."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, device=self.device, dtype=dtype or self.dtype, generator=self.generator)
        return drawn.mul_(scale)

    def weights(self, *shape: int) -> Tensor:
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def gains(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(width, scale=0.1, dtype=dtype).add_(1.0)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, device=self.device, generator=self.generator)


Inputs = dict[str, Any]
Way = Callable[..., Any]


@dataclass(frozen=True)
class Prepared:
    """A way that first turns the inputs into its own (packs a weight, builds a module), which is not timed."""

    prepare: Callable[[Inputs], Inputs]
    call: Way


@dataclass(frozen=True)
class Operation:
    """inputs(size, draw) gives named tensors; each way takes them by name and returns a tensor or a tuple.

    work(size, itemsize): bytes (bound "memory") or floating-point operations (bound "products"), forward and backward.
    learned: the inputs that get gradients. tokens: those that carry tokens, (N, …) or, with sequences=True, (B, T, …).
    `reference` in float64 is the truth of the errors. summed: the output is a sum over the tokens, whose gradients may be
    made in the forward pass, so only both passes together have a rate. floors: what computes less, to see what the rest
    costs.
    """

    name: str
    sizes: dict[str, Any]
    bound: str
    work: Callable[[Any, int], tuple[float, float]]
    inputs: Callable[[Any, Draw], Inputs]
    reference: Way
    ways: dict[str, Way | Prepared]
    floors: dict[str, Way] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    sequences: bool = False
    summed: bool = False
    compiled: bool = True

    def part(self, value: Tensor) -> Tensor:
        """The tokens whose error is taken. The last rows, where offsets are largest; or a sequence's first tokens, which
        causal attention lets depend on nothing else."""
        return value[-1:, :ERROR_ROWS] if self.sequences else value[-ERROR_ROWS:]

    def part_of_inputs(self, inputs: Inputs) -> Inputs:
        """Those tokens alone, in float64: what the reference is given for the truth."""
        chosen = {name: self.part(value) if name in self.tokens else value for name, value in inputs.items()}
        return {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in chosen.items()
        }


def without_other_targets(inputs: Inputs) -> Inputs:
    """For the error of a sum over a part of the tokens: the other tokens' targets are ignored."""
    targets = inputs["targets"].clone()
    targets[:-ERROR_ROWS] = IGNORED
    return {**inputs, "targets": targets}
