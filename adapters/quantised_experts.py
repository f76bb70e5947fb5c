"""How do a mixture's experts lie in 4 bits? Each of the two stacks as one NF4 weight, decoded for each product and dropped.

Frozen, as every 4-bit weight is: adapters learn beside the attention of the same block.
"""

import torch
from torch import Tensor, nn

from kernels.grouped_linear import grouped_nf4_linear
from kernels.nf4 import NF4Weight, dequantise_nf4, quantise_nf4
from layers import MixtureMLP

_NF4_TENSORS = ("packed", "absmax", "code", "absmax2", "offset")
STACKS = ("gate_up_proj", "down_proj")


class NF4Experts(MixtureMLP):
    """As layers.MixtureMLP, whose router it takes; weights: of each of STACKS, all experts' rows below one another."""

    def __init__(self, mlp: MixtureMLP, weights: dict[str, NF4Weight], implementation: str):
        nn.Module.__init__(self)
        self.gate, self.expert_size = mlp.gate, mlp.expert_size
        self.experts_per_token, self.normalise = mlp.experts_per_token, mlp.normalise
        self.implementation, self.sizes = implementation, {}
        for stack, weight in weights.items():
            self.sizes[stack] = weight.sizes
            for name, tensor in zip(_NF4_TENSORS, weight.tensors, strict=True):
                self.register_buffer(f"{stack}_{name}", tensor)

    def nf4_weight(self, stack: str) -> NF4Weight:
        packed, absmax, code, absmax2, offset = (getattr(self, f"{stack}_{name}") for name in _NF4_TENSORS)
        return NF4Weight.of(packed, absmax, code, absmax2, offset, self.sizes[stack])

    def decoded(self, stack: str, dtype: torch.dtype) -> Tensor:
        """(E, …, …): one of STACKS in `dtype`."""
        flat = dequantise_nf4(self.nf4_weight(stack), dtype, implementation=self.implementation)
        return flat.view(self.num_experts, -1, flat.shape[1])

    def product(self, stack: str, x: Tensor, ends: Tensor, way: str) -> Tensor:
        return grouped_nf4_linear(x, self.nf4_weight(stack), ends, implementation=way, decode=self.implementation)


def quantise_experts(model: nn.Module, implementation: str) -> None:
    """Put the experts of every block in NF4, one stack after another."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, MixtureMLP) or isinstance(module, NF4Experts):
            continue
        weights = {stack: quantise_nf4(getattr(module, stack).data.flatten(0, 1)) for stack in STACKS}
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Experts(module, weights, implementation))
