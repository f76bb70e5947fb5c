"""Are the preference losses those of their papers? Against formulas in float64, against TRL's own code, and at known points."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.preference_losses import Pairs, hinge, ipo, kl_estimate, kto, log1mexp, orpo, sigmoid, simpo

BETA, SMOOTHING, GAMMA = 0.7, 0.15, 0.4
LN_2 = math.log(2)


def some_pairs(dtype=torch.float32, count=64) -> Pairs:
    """Log-probabilities of answers of 1 to 40 tokens, some nearly certain, and references near them."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low

    lengths = [torch.randint(1, 41, (count,), generator=generator).double() for _ in range(2)]
    policy = [-length * 10 ** uniform(-4, 0.7) for length in lengths]
    reference = [logprob + uniform(-3, 3) for logprob in policy]
    columns = [column.to(dtype) for column in (*policy, *lengths, *reference)]
    for column in columns[:2]:
        column.requires_grad_()
    return Pairs(*columns)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def arrays(pairs: Pairs) -> list[np.ndarray]:
    names = ("chosen", "rejected", "chosen_length", "rejected_length", "reference_chosen", "reference_rejected")
    return [getattr(pairs, name).detach().double().numpy() for name in names]


def paper_sigmoid(c, r, nc, nr, qc, qr):
    return -log_sigmoid(BETA * ((c - qc) - (r - qr)))


def paper_conservative(c, r, nc, nr, qc, qr):
    logits = BETA * ((c - qc) - (r - qr))
    return -(1 - SMOOTHING) * log_sigmoid(logits) - SMOOTHING * log_sigmoid(-logits)


def paper_ipo(c, r, nc, nr, qc, qr):
    return ((c - qc) / nc - (r - qr) / nr - 1 / (2 * BETA)) ** 2


def paper_hinge(c, r, nc, nr, qc, qr):
    return np.maximum(0, 1 - BETA * ((c - qc) - (r - qr)))


def paper_simpo(c, r, nc, nr, qc, qr):
    return -log_sigmoid(BETA / nc * c - BETA / nr * r - GAMMA)


def paper_orpo(c, r, nc, nr, qc, qr):
    def log_odds(mean):
        return mean - np.log(-np.expm1(mean))

    return -c / nc - BETA * log_sigmoid(log_odds(c / nc) - log_odds(r / nr))


LOSSES = {
    "sigmoid": (lambda pairs: sigmoid(pairs, beta=BETA), paper_sigmoid),
    "conservative": (lambda pairs: sigmoid(pairs, beta=BETA, label_smoothing=SMOOTHING), paper_conservative),
    "ipo": (lambda pairs: ipo(pairs, beta=BETA), paper_ipo),
    "hinge": (lambda pairs: hinge(pairs, beta=BETA), paper_hinge),
    "simpo": (lambda pairs: simpo(pairs, beta=BETA, gamma=GAMMA), paper_simpo),
    "orpo": (lambda pairs: orpo(pairs, beta=BETA), paper_orpo),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_papers(name):
    """In float64 to 1e-9; gradients against central differences of the paper's formula, exact to some 1e-6 there."""
    loss, paper = LOSSES[name]
    pairs = some_pairs(torch.float64)
    columns = arrays(pairs)
    losses = loss(pairs)
    np.testing.assert_allclose(losses.detach().numpy(), paper(*columns), rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    for place, gradient in ((0, pairs.chosen.grad), (1, pairs.rejected.grad)):
        step = 1e-6 * np.abs(columns[place])
        above, below = ([*columns] for _ in range(2))
        above[place], below[place] = columns[place] + step, columns[place] - step
        difference = (paper(*above) - paper(*below)) / (2 * step)
        np.testing.assert_allclose(gradient.numpy(), difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_fp32_are_those_in_float64(name):
    """To 1e-4 of the loss and its gradients: answers of 200 nats have 1e-5 in a difference that β then multiplies."""
    loss, _ = LOSSES[name]
    exact, single = some_pairs(torch.float64), some_pairs(torch.float32)
    for pairs in (exact, single):
        loss(pairs).sum().backward()
    torch.testing.assert_close(loss(single).double(), loss(exact), rtol=1e-4, atol=1e-4)
    for side in ("chosen", "rejected"):
        found, wanted = (getattr(pairs, side).grad.double() for pairs in (single, exact))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_model_that_is_its_reference_has_known_losses():
    """ln 2 to the bit for the logistic ones, 1/(2β)² for IPO, 1 for the hinge, λ/2 for KTO."""
    start = some_pairs()
    same = Pairs(start.chosen, start.rejected, start.chosen_length, start.rejected_length, start.chosen, start.rejected)
    assert (sigmoid(same, beta=BETA) == torch.tensor(LN_2)).all()
    torch.testing.assert_close(sigmoid(same, beta=BETA, label_smoothing=0.3), torch.full((64,), LN_2))
    assert (ipo(same, beta=BETA) == 1 / (2 * BETA) ** 2).all() and (hinge(same, beta=BETA) == 1).all()
    label = (torch.arange(64) % 2).float()
    losses = kto(start.chosen, start.chosen, label, torch.tensor(0.0), beta=BETA, desirable_weight=3.0)
    assert torch.equal(losses, torch.where(label > 0, 1.5, 0.5))


def test_lengths_matter_where_the_papers_say():
    """Twice as long at the same log-probability a token: IPO, SimPO and ORPO stay, DPO does not."""
    start = some_pairs(torch.float64)
    columns = arrays(start)
    longer = Pairs(*(torch.from_numpy(2 * column) for column in columns))
    for name in ("ipo", "simpo", "orpo"):
        torch.testing.assert_close(LOSSES[name][0](longer), LOSSES[name][0](start).detach())
    assert (LOSSES["sigmoid"][0](longer) - LOSSES["sigmoid"][0](start)).abs().max() > 0.1


def test_log1mexp_is_exact_at_both_ends_and_differentiable():
    """Against float64's log1p(-exp(x)), from probabilities of 1 - 1.1e-6 down to e^-80."""
    x = torch.tensor([-1.1e-6, -1e-3, -0.5, -LN_2, -0.7, -5.0, -80.0], requires_grad=True)
    wanted = np.log1p(-np.exp(x.detach().double().numpy()))
    np.testing.assert_allclose(log1mexp(x).detach().double().numpy(), wanted, rtol=2e-6, atol=1e-37)
    log1mexp(x).sum().backward()
    slope = 1 / -np.expm1(-x.detach().double().numpy())
    np.testing.assert_allclose(x.grad.double().numpy(), slope, rtol=1e-5, atol=1e-34)


def test_orpo_of_an_answer_that_is_certain_has_a_gradient():
    """Its odds are infinite and their logarithm has no derivative; the other answer is still to be made less probable."""
    certain, other = torch.zeros(2, requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
    losses = orpo(Pairs(certain, other, torch.ones(2), torch.ones(2)), beta=BETA)
    losses.sum().backward()
    assert losses.isfinite().all() and certain.grad.isfinite().all() and other.grad.isfinite().all()
    assert other.grad[0] > 0


# ---- KTO -------------------------------------------------------------------------------------------------------------


def test_kto_is_the_papers_and_its_kl_carries_no_gradient():
    """Kahneman-Tversky in float64: λ_D (1 − σ(β(ratio − KL))) and λ_U (1 − σ(β(KL − ratio)))."""
    pairs = some_pairs(torch.float64)
    policy, _, _, _, reference, _ = arrays(pairs)
    label = (torch.arange(64) % 3 == 0).double()
    kl = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    losses = kto(
        pairs.chosen, pairs.reference_chosen, label, kl, beta=BETA, desirable_weight=1.3, undesirable_weight=0.6
    )
    ratio = policy - reference
    good, bad = (1 - 1 / (1 + np.exp(-sign * BETA * (ratio - 0.8))) for sign in (1, -1))
    np.testing.assert_allclose(losses.detach().numpy(), np.where(label > 0, 1.3 * good, 0.6 * bad), rtol=1e-9)
    losses.sum().backward()
    assert kl.grad is None
    assert ((pairs.chosen.grad < 0) == (label > 0)).all()  # a desirable answer becomes more probable, another less


def test_the_kl_is_a_mean_that_is_never_negative():
    assert kl_estimate(6.0, 4) == 1.5 and kl_estimate(-6.0, 4) == 0.0 and kl_estimate(0.0, 0) == 0.0


# ---- beside TRL ------------------------------------------------------------------------------------------------------


def trl_trainer(kind: str, **settings):
    """TRL 1.16's trainer without a run: an object with what its loss reads. The rest of its set-up needs a dataset."""
    pytest.importorskip("trl")
    if kind == "cpo":
        from trl.experimental.cpo.cpo_trainer import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer as Trainer
    trainer = object.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer.__dict__.update(beta=BETA, alpha=0.0, label_smoothing=0.0, **settings)
    return trainer


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Losses, and gradients with respect to the same inputs, to 1e-5."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(losses.sum(), inputs) for losses in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_simpo_is_trls():
    trainer, pairs = trl_trainer("cpo", loss_type="simpo", simpo_gamma=GAMMA), some_pairs()
    theirs, _, _ = trainer.cpo_loss(pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length)
    assert_same(simpo(pairs, beta=BETA, gamma=GAMMA), theirs, [pairs.chosen, pairs.rejected])


def test_conservative_dpo_is_trls():
    """TRL 1.16 smooths labels in CPO only, whose logits are DPO's once the reference is taken off."""
    trainer, pairs = trl_trainer("cpo", loss_type="sigmoid"), some_pairs()
    trainer.label_smoothing = SMOOTHING
    theirs, _, _ = trainer.cpo_loss(pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected)
    assert_same(sigmoid(pairs, beta=BETA, label_smoothing=SMOOTHING), theirs, [pairs.chosen, pairs.rejected])


def test_orpo_is_trls():
    """Its odds ratio, to which the mean log-probability of the chosen answer is added as in the paper."""
    trainer, pairs = trl_trainer("orpo"), some_pairs()
    means = pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length
    ratio, *_ = trainer.odds_ratio_loss(*means)
    assert_same(orpo(pairs, beta=BETA), -means[0] - ratio, [pairs.chosen, pairs.rejected])
