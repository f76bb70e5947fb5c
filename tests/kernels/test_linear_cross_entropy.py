"""Is the chunked loss the loss? Against float64, against the full computation, and by what it allocates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear_cross_entropy import linear_cross_entropy, token_logprobs

N, H, V = 45, 16, 67  # no size divides another
ROW = 4 * V  # bytes of one row of logits


def make(dtype=torch.float64, seed=0, n=N, h=H, v=V):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::7] = -100
    token_weights = torch.rand(n, generator=generator)
    return hidden, weight, targets, token_weights


def full(hidden, weight, targets, token_weights=None, z_loss=0.0, softcap=0.0):
    """(total, cross-entropy) with all logits in memory, in the dtype of the input."""
    logits = hidden @ weight.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    kept = (targets != -100).to(logits.dtype)
    w = kept if token_weights is None else kept * token_weights.to(logits.dtype)
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return (w * (losses + z_loss * logits.logsumexp(-1) ** 2)).sum(), (w * losses).sum()


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (0.01, 0.0), (0.0, 3.0), (0.01, 3.0)])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_loss_and_gradients_equal_float64(rows, z_loss, softcap, weighted):
    hidden, weight, targets, token_weights = make()
    token_weights = token_weights if weighted else None
    wanted, wanted_ce = full(hidden, weight, targets, token_weights, z_loss, softcap)
    wanted_grads = torch.autograd.grad(3.0 * wanted, (hidden, weight))
    found = linear_cross_entropy(
        hidden, weight, targets, token_weights=token_weights, z_loss=z_loss, softcap=softcap, chunk_bytes=rows * ROW
    )
    grads = torch.autograd.grad(3.0 * found.total, (hidden, weight))  # an upstream gradient that is not 1
    assert relative(found.total, wanted) < 1e-13
    assert relative(found.cross_entropy, wanted_ce) < 1e-13  # the z-loss is not in the reported figure
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative(grad, wanted_grad) < 1e-13
    assert not found.cross_entropy.requires_grad


def test_ignored_rows_have_no_gradient_and_weigh_nothing():
    hidden, weight, targets, _ = make()
    total = linear_cross_entropy(hidden, weight, targets, z_loss=0.1).total
    total.backward()
    ignored = targets == -100
    assert ignored.any() and (hidden.grad[ignored] == 0).all() and (hidden.grad[~ignored].abs().sum(-1) > 0).all()
    kept = linear_cross_entropy(hidden[~ignored], weight, targets[~ignored], z_loss=0.1).total
    assert relative(total, kept) < 1e-13


@pytest.mark.parametrize("count", [N, 0])
def test_a_batch_without_targets_gives_zero(count):
    hidden, weight, _, _ = make()
    hidden = hidden.detach()[:count].requires_grad_()
    total = linear_cross_entropy(hidden, weight, torch.full((count,), -100), z_loss=0.1).total
    total.backward()
    assert total.item() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_huge_logits_stay_finite():
    """exp of 1e4 overflows fp32; the largest logit is taken out first."""
    hidden, weight, targets, _ = make(torch.float32)
    total = linear_cross_entropy(hidden * 1e4, weight, targets).total
    wanted, _ = full(hidden.double() * 1e4, weight.double(), targets)
    assert relative(total, wanted) < 1e-6


def test_only_what_asks_gets_a_gradient():
    hidden, weight, targets, _ = make()
    linear_cross_entropy(hidden, weight.detach(), targets).total.backward()
    frozen_weight_grad = hidden.grad.clone()
    assert weight.grad is None
    hidden.grad = None
    linear_cross_entropy(hidden.detach(), weight, targets).total.backward()
    assert hidden.grad is None and weight.grad is not None
    weight.grad = None
    linear_cross_entropy(hidden, weight, targets).total.backward()
    assert torch.equal(hidden.grad, frozen_weight_grad)


@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns", "products"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_a_gradient_that_nobody_asks_for_costs_nothing(hidden_learns, weight_learns, products):
    """By torch's own count of operations: the logits, and one more product of that size for each gradient.

    Under autocast, because torch does not count the in-place product that fp32 uses.
    """
    hidden, weight, targets, _ = make(torch.float32)
    hidden, weight = hidden.requires_grad_(hidden_learns), weight.requires_grad_(weight_learns)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, targets).total
        assert total.requires_grad == (hidden_learns or weight_learns)
        if total.requires_grad:
            total.backward()
    assert counter.get_total_flops() == products * 2 * N * H * V
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * N * H * V


def test_bfloat16_is_as_close_to_float64_as_the_full_computation():
    """Bounds: twice bf16's spacing (2^-8) for the gradients, and no worse than eager by more than a quarter."""
    hidden, weight, targets, _ = make(torch.float32, n=512, h=64, v=512)
    hidden, weight = ((0.3 * x).detach().requires_grad_() for x in (hidden, weight))
    reference = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted, _ = full(*reference, targets)
    wanted_grads = torch.autograd.grad(wanted, reference)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, chunk_bytes=16 * 4 * 512).total
        eager = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    assert ours.dtype == torch.float32 and relative(ours, wanted) < 1e-3
    for grad, eager_grad, wanted_grad in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(eager, (hidden, weight)),
        wanted_grads,
        strict=True,
    ):
        assert grad.dtype == torch.float32
        assert 0 < relative(grad, wanted_grad) < min(2 * 2**-8, 1.25 * relative(eager_grad, wanted_grad))


@pytest.mark.parametrize("loss", [linear_cross_entropy, token_logprobs])
@pytest.mark.parametrize("target", [V, V + 1000, -1])
def test_a_target_outside_the_vocabulary_is_named(loss, target):
    hidden, weight, targets, _ = make()
    targets[3] = target
    with pytest.raises(ValueError, match=f"target {target} is outside the vocabulary of {V}"):
        loss(hidden, weight, targets)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 0.0), (1.3, 3.0)])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_token_logprobs_equal_log_softmax(rows, temperature, softcap):
    hidden, weight, targets, upstream = make()
    logits = hidden @ weight.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    wanted = (logits / temperature).log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    wanted = wanted * (targets != -100)
    found = token_logprobs(hidden, weight, targets, temperature=temperature, softcap=softcap, chunk_bytes=rows * ROW)
    assert relative(found, wanted) < 1e-13
    wanted_grads = torch.autograd.grad(wanted @ upstream.double(), (hidden, weight))
    grads = torch.autograd.grad(found @ upstream.double(), (hidden, weight))  # a gradient of its own for each token
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative(grad, wanted_grad) < 1e-13


_PEAK = """
import sys, torch
import torch.nn.functional as F
from kernels.linear_cross_entropy import linear_cross_entropy, token_logprobs
torch.set_num_threads(1)
hidden = torch.randn(2048, 32, requires_grad=True)
weight = torch.randn(16384, 32, requires_grad=True)
targets = torch.randint(0, 16384, (2048,))
way = {
    "full": lambda rows: F.cross_entropy(F.linear(hidden[:rows], weight), targets[:rows], reduction="sum"),
    "chunked": lambda rows: linear_cross_entropy(hidden[:rows], weight, targets[:rows], chunk_bytes=2**22).total,
    "logprobs": lambda rows: token_logprobs(hidden[:rows], weight, targets[:rows], chunk_bytes=2**22).sum(),
}[sys.argv[1]]
def high_water():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB
way(8).backward()  # libraries' own work space
before = high_water()
way(2048).backward()
print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_a_fraction_of_the_full_computation(root):
    """The logits are 128 MiB and the full way holds at least two such; ours holds a few chunks of 4 MiB: an eighth."""

    def peak_mib(way):
        run = subprocess.run([sys.executable, "-c", _PEAK, way], cwd=root, capture_output=True, text=True, check=True)
        return int(run.stdout) / 1024

    full = peak_mib("full")
    assert full > 256
    assert peak_mib("chunked") < full / 8
    assert peak_mib("logprobs") < full / 8
