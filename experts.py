"""How does an MLP of many experts work, of which each token meets a few?

A router gives every token a share of each expert; the experts with the largest shares work on it, and their results are
summed by these shares (Shazeer et al. 2017; Mixtral, Jiang et al. 2024; Qwen3-MoE, Qwen Team 2025).

Two losses keep routers in order. Balancing (Switch, Fedus et al. 2021, eq. 4): experts are met about equally often. The
z-loss (ST-MoE, Zoph et al. 2022, eq. 5): the router's logits stay small. Both are means over rows of a batch, each row
balanced for itself (DeepSeek-V3, 2024, eq. 17): a loss over a whole batch would depend on how it is cut into micro-batches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped_linear import grouped_implementation, grouped_linear, product_dtype
from kernels.swiglu import swiglu


class Routing(NamedTuple):
    """What one layer's router did in each row: counts (B, E), how many of its tokens met each expert; probs (B, E), the sum
    of their shares, which has a gradient; z (B,), the sum of the squared logsumexp of their logits. All fp32."""

    counts: Tensor
    probs: Tensor
    z: Tensor


class Experts(nn.Module):
    """SwiGLU experts and their router. Parameters: gate.weight (E, H); gate_up_proj (E, 2F, H), gate first; down_proj (E, H, F).

    normalise: the shares of the experts that work on a token sum to one.
    """

    def __init__(self, hidden_size: int, expert_size: int, num_experts: int, experts_per_token: int, normalise: bool):
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.expert_size, self.experts_per_token, self.normalise = expert_size, experts_per_token, normalise

    def forward(
        self, x: Tensor, implementation: str, with_routing: bool, num_real: int | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(B, T, H) of x (B, T, H), and what the router did, with_routing. implementation: of SwiGLU. num_real: how many tokens
        of a row, the first, are none that another stands for; None: all."""
        batch, length, hidden = x.shape
        shares, chosen, routing = self.route(x, with_routing, num_real)  # (B·T, k) twice
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts = counts.index_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        order = chosen.flatten().argsort(stable=True)  # the copies of tokens, by expert
        copies = x.reshape(-1, 1, hidden).expand(-1, self.experts_per_token, -1).reshape(-1, hidden)  # (B·T·k, H)
        dtype = product_dtype(x)
        grouped = Permuted.apply(copies.to(dtype), order)
        way = grouped_implementation(x.device, dtype, hidden, self.expert_size)
        ends = counts.cumsum(0).to(torch.int32)
        ends = ends.cpu() if way == "loop" else ends  # which asks for the numbers in each product
        packed = self.product("gate_up_proj", grouped, ends, way)  # (B·T·k, 2F)
        out = self.product("down_proj", swiglu(packed, implementation=implementation), ends, way)
        out = Permuted.apply(out, order.argsort()).view(-1, self.experts_per_token, hidden)
        return (out * shares[..., None].to(dtype)).sum(1).view(batch, length, hidden), routing

    @property
    def num_experts(self) -> int:
        return self.gate.out_features

    def product(self, stack: str, x: Tensor, ends: Tensor, way: str) -> Tensor:
        """`grouped_linear` of x with "gate_up_proj" or "down_proj" in x's dtype."""
        return grouped_linear(x, getattr(self, stack).to(x.dtype), ends, implementation=way)

    def route(
        self, x: Tensor, with_routing: bool, num_real: int | None = None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """(shares, experts), each (B·T, k), of the experts that work on each token, the largest share first."""
        batch, length, _ = x.shape
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.gate.weight.to(wide))  # (B, T, E)
        probs = logits.softmax(-1)
        shares, chosen = probs.topk(self.experts_per_token, dim=-1)
        routing = None
        if with_routing:
            met = chosen[:, :num_real].flatten(1)  # (B, T·k)
            counts = torch.zeros_like(probs[:, 0]).scatter_add(1, met, torch.ones_like(met, dtype=probs.dtype))
            z = logits[:, :num_real].logsumexp(-1).square().sum(1)
            routing = Routing(counts.detach(), probs[:, :num_real].sum(1), z)
        if self.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.view(batch * length, -1), chosen.view(batch * length, -1), routing


class Permuted(torch.autograd.Function):
    """Rows of x (N, H) in this order, each once: the gradient comes back by the inverse order, and nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient[order.argsort()], None


# -------------------------------------------------------------------------------------------------------- router losses


def balancing_losses(routing: Sequence[Routing], experts_per_token: int) -> Tensor:
    """(B,): for each row E · Σ_e f_e P_e over the tokens of all layers, k where all experts are met equally often.

    f_e: the share of tokens that met expert e, a constant to the gradient; P_e: its mean share. transformers'
    load_balancing_loss_func of that row alone.
    """
    counts = torch.stack([layer.counts for layer in routing]).sum(0)  # (B, E)
    probs = torch.stack([layer.probs for layer in routing]).sum(0)
    tokens = counts.sum(1, keepdim=True) / experts_per_token
    return counts.shape[1] * (counts / tokens * (probs / tokens)).sum(1)


def z_losses(routing: Sequence[Routing], experts_per_token: int) -> Tensor:
    """(B,): for each row the mean squared logsumexp of its tokens' router logits, over all layers."""
    tokens = torch.stack([layer.counts for layer in routing]).sum((0, 2)) / experts_per_token
    return torch.stack([layer.z for layer in routing]).sum(0) / tokens


def expert_figures(routing: Sequence[Routing]) -> dict[str, Tensor]:
    """{name: (B,)} of each row, a mean over layers: how many times its even share the busiest expert had, and the share of
    experts that no token met."""
    counts = torch.stack([layer.counts for layer in routing])  # (L, B, E)
    return {
        "experts/busiest": (counts.amax(2) / counts.mean(2)).mean(0),
        "experts/idle": (counts == 0).float().mean((0, 2)),
    }
