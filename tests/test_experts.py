"""Do experts, their router and its losses compute what they say? transformers' blocks and functions are the truth.

Logits and gradients of whole models are compared in tests/test_family_parity.py.
"""

import pytest
import torch
from torch import nn

from experts import Experts, Permuted, Routing, balancing_losses, expert_figures, z_losses

HIDDEN, SIZE, EXPERTS, CHOSEN = 16, 24, 5, 2


def an_mlp(dtype: torch.dtype = torch.float64, **changes) -> Experts:
    settings = {"num_experts": EXPERTS, "experts_per_token": CHOSEN, "normalise": True} | changes
    mlp = Experts(HIDDEN, SIZE, **settings).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mlp


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def one_by_one(mlp: Experts, x: torch.Tensor) -> torch.Tensor:
    """The definition, token by token."""
    results = []
    for token in x.flatten(0, 1):
        probs = (mlp.gate.weight @ token).softmax(-1)
        chosen = probs.argsort(descending=True, stable=True)[: mlp.experts_per_token]
        whole = probs[chosen].sum() if mlp.normalise else 1.0
        outcome = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (mlp.gate_up_proj[expert] @ token).chunk(2)
            outcome = outcome + probs[expert] / whole * (mlp.down_proj[expert] @ (nn.functional.silu(gate) * up))
        results.append(outcome)
    return torch.stack(results).view_as(x)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("chosen", [1, 2, EXPERTS])
def test_outputs_and_gradients_are_the_definitions(chosen, normalise):
    mlp = an_mlp(experts_per_token=chosen, normalise=normalise)
    x = rows(2, 9, HIDDEN).requires_grad_()
    upstream = rows(2, 9, HIDDEN)
    found = []
    for compute in (lambda: mlp(x, "torch", False)[0], lambda: one_by_one(mlp, x)):
        mlp.zero_grad()
        x.grad = None
        out = compute()
        out.backward(upstream)
        # with one normalised share the router has no gradient: it is one whatever the router says
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (x, *mlp.parameters())]
        found.append([out.detach(), *gradients])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_experts_without_tokens_and_one_with_all():
    mlp = an_mlp(torch.float32, experts_per_token=1)
    with torch.no_grad():
        mlp.gate.weight.zero_()
        mlp.gate.weight[3] = 1.0
    x = rows(2, 6, HIDDEN, dtype=torch.float32).abs()
    mlp(x, "torch", False)[0].sum().backward()
    met = mlp.down_proj.grad.abs().amax((1, 2)) > 0
    assert met.tolist() == [False, False, False, True, False]
    torch.testing.assert_close(mlp(x, "torch", False)[0], one_by_one(mlp, x), atol=1e-5, rtol=0)


def test_a_token_does_not_depend_on_its_neighbours():
    """The same bits in another order of rows."""
    mlp, x = an_mlp(torch.float32), rows(6, 8, HIDDEN, dtype=torch.float32)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(mlp(x[order], "torch", False)[0], mlp(x, "torch", False)[0][order], atol=1e-6, rtol=0)


def test_compiled_is_eager():
    mlp, x = an_mlp(torch.float32), rows(2, 8, HIDDEN, dtype=torch.float32)
    compiled = torch.compile(lambda x: mlp(x, "torch", False)[0], fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x, "torch", False)[0], atol=1e-5, rtol=0)


def test_the_gradient_of_a_permutation_is_its_inverse():
    order = torch.tensor([2, 0, 3, 1])
    assert torch.autograd.gradcheck(lambda x: Permuted.apply(x, order), rows(4, 3).requires_grad_())


def routed(mlps: list[Experts], x: torch.Tensor) -> list[Routing]:
    return [mlp(x, "torch", True)[1] for mlp in mlps]


def test_the_balancing_loss_is_transformers_of_each_row():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    mlps = [an_mlp(torch.float32), an_mlp(torch.float32, normalise=False)]
    with torch.no_grad():
        mlps[1].gate.weight.mul_(-0.3)
    x = rows(3, 11, HIDDEN, dtype=torch.float32)
    ours = balancing_losses(routed(mlps, x), CHOSEN)
    theirs = torch.stack(
        [load_balancing_loss_func(tuple(row @ mlp.gate.weight.T for mlp in mlps), EXPERTS, CHOSEN) for row in x]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(loss.sum(), [mlp.gate.weight for mlp in mlps]) for loss in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_z_loss_is_its_closed_form():
    mlp, x = an_mlp(), rows(3, 11, HIDDEN)
    logits = x @ mlp.gate.weight.T
    expected = logits.exp().sum(-1).log().square().mean(1)
    torch.testing.assert_close(z_losses(routed([mlp], x), CHOSEN), expected)


def test_figures_of_experts():
    """A router that sends all to two of five, and one that is even."""
    two = Routing(torch.tensor([[4.0, 4.0, 0.0, 0.0, 0.0]]), torch.ones(1, 5), torch.ones(1))
    even = Routing(torch.tensor([[2.0, 2.0, 2.0, 1.0, 1.0]]), torch.ones(1, 5), torch.ones(1))
    figures = {name: value.item() for name, value in expert_figures([two, even]).items()}
    assert figures == pytest.approx({"experts/busiest": (4 / 1.6 + 2 / 1.6) / 2, "experts/idle": 0.3})
