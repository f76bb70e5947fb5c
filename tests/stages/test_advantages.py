"""Are advantages, whitening and KL what the papers' equations say? Term by term, in float64."""

import math

import numpy as np
import pytest
import torch

from stages.advantages import (
    adapted_kl_coefficient,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    kl_loss,
    pad_rows,
    whiten,
)

RANDOM = np.random.default_rng(0)
LENGTHS = [5, 1, 7, 3]


def ragged() -> list[np.ndarray]:
    return [RANDOM.normal(size=length) for length in LENGTHS]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_its_double_sum_for_each_answer_alone(discount, trace):
    """Σ_l (γλ)^l δ_{t+l}, written out; V after the last token is 0; more padding changes no bit."""
    rewards, values = ragged(), ragged()
    (padded_rewards, valid), (padded_values, _) = pad_rows(rewards), pad_rows(values)
    found = generalised_advantages(padded_rewards, padded_values, valid, discount=discount, trace=trace)
    for row, length in enumerate(LENGTHS):
        v = [*values[row], 0.0]
        delta = [rewards[row][t] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            wanted = math.fsum((discount * trace) ** i * delta[t + i] for i in range(length - t))
            assert abs(found[row, t] - wanted) < 1e-12
    wider, garbage = ((0, 0), (0, 3)), np.full((4, 10), 7.0)
    garbage[:, :7][valid] = padded_values[valid]
    more = generalised_advantages(
        np.pad(padded_rewards, wider), garbage, np.pad(valid, wider), discount=discount, trace=trace
    )
    assert np.array_equal(more, np.pad(found, wider))


def test_with_a_trace_of_1_returns_are_the_rewards_to_go():
    (rewards, valid), (values, _) = pad_rows(ragged()), pad_rows(ragged())
    advantages = generalised_advantages(rewards, values, valid, discount=1.0, trace=1.0)
    to_go = np.flip(np.cumsum(np.flip(rewards, 1), 1), 1)
    np.testing.assert_allclose((advantages + values)[valid], to_go[valid], atol=1e-12)


def test_gae_steps_over_what_an_environment_wrote():
    """A hole of three tokens within an answer: the advantages of the answer without it."""
    reward, value = RANDOM.normal(size=5), RANDOM.normal(size=5)
    alone = generalised_advantages(reward[None], value[None], np.ones((1, 5), bool), discount=0.9, trace=0.8)[0]
    places = np.array([0, 1, 5, 6, 7])
    rewards, values, valid = np.full((1, 8), 9.0), np.full((1, 8), 9.0), np.zeros((1, 8), bool)
    rewards[0, places], values[0, places], valid[0, places] = reward, value, True
    found = generalised_advantages(rewards, values, valid, discount=0.9, trace=0.8)[0]
    assert np.array_equal(found[places], alone) and not found[2:5].any()


def test_whitening_takes_out_mean_and_deviation_of_the_valid_tokens():
    """ddof 1; torchtune's "whitened" advantages keep their mean, which ours must not unless asked."""
    values, valid = pad_rows([row + 3 for row in ragged()])
    values[~valid] = 1e6
    found, kept = whiten(values, valid), whiten(values, valid, keep_mean=True)
    assert abs(found[valid].mean()) < 1e-12 and abs(found[valid].std(ddof=1) - 1) < 1e-6
    assert not found[~valid].any() and not kept[~valid].any()
    np.testing.assert_allclose(kept[valid] - values[valid].mean(), found[valid], atol=1e-12)
    one = np.array([[True, False]])
    assert whiten(np.array([[5.0, 2.0]]), one).tolist() == [[0, 0]]
    assert whiten(np.array([[5.0, 2.0]]), one, keep_mean=True).tolist() == [[5, 0]]


def test_group_advantages():
    rewards = RANDOM.normal(size=(5, 4))
    mean, deviation = rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(group_advantages(rewards), (rewards - mean) / (deviation + 1e-4), atol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, scale="none"), rewards - mean, atol=1e-12)
    whole = (rewards - mean) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, scale="batch"), whole, atol=1e-12)
    with pytest.raises(ValueError):
        group_advantages(rewards, scale="std")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_exactly_nothing(scale):
    """0.1 + 0.1 + 0.1 is not 0.3: a mean that rounds must not become a gradient, least of all divided by its deviation."""
    rewards = np.array([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7], [0.0, 1.0, 0.0]])
    assert (np.array([0.1] * 3) - np.array([0.1] * 3).mean() != 0).all()  # the case is a real one
    found = group_advantages(rewards, scale=scale)
    assert not found[:2].any() and found[2].all()


def test_what_could_not_be_judged_counts_nowhere():
    nan = np.nan
    found = group_advantages(np.array([[1.0, nan, 4.0, 7.0], [nan, nan, nan, nan], [nan, 2.0, nan, nan]]))
    np.testing.assert_allclose(found[0, [0, 2, 3]], group_advantages(np.array([[1.0, 4.0, 7.0]]))[0], atol=1e-12)
    assert found[0, 1] == 0 and not found[1:].any()


# ------------------------------------------------------------------------------------------------------------------- KL


def two_policies() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits[0].clone().requires_grad_(), logits[1].log_softmax(-1)


def exact_kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - reference)).sum()


def expected_gradient(estimate) -> torch.Tensor:
    """Σ_x p(x) d estimate(x) / d logits: what sampling x from the policy and differentiating gives on average."""
    logits, reference = two_policies()
    logp = logits.log_softmax(-1)
    (logp.exp().detach() * estimate(logp, reference)).sum().backward()
    return logits.grad


def test_values_of_the_estimates():
    """Over all tokens with their probabilities: k1 and k3 give the KL, k3 is nowhere negative, k2 is biased."""
    logits, reference = two_policies()
    logp = logits.detach().log_softmax(-1)
    means = {kind: (logp.exp() * kl_estimate(logp, reference, kind)).sum().item() for kind in ("k1", "k2", "k3")}
    kl = exact_kl(logits, reference).item()
    assert abs(means["k1"] - kl) < 1e-12 and abs(means["k3"] - kl) < 1e-12 and abs(means["k2"] - kl) > 1e-2
    assert (kl_estimate(logp, reference, "k1") < 0).any() and (kl_estimate(logp, reference, "k3") >= 0).all()
    with pytest.raises(ValueError):
        kl_estimate(logp, reference, "k4")


def test_gradients_of_the_estimates():
    """kl_loss and k2 have the KL's gradient; k1's is 0 on average, and plain k3's is that of KL(reference ‖ policy)."""
    logits, reference = two_policies()
    exact_kl(logits, reference).backward()
    kl = logits.grad
    right = expected_gradient(lambda logp, ref: kl_loss(logp, ref, (logp - logp.detach()).exp()))
    torch.testing.assert_close(right, kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient(lambda a, b: kl_estimate(a, b, "k2")), kl, atol=1e-12, rtol=0)
    assert expected_gradient(lambda a, b: kl_estimate(a, b, "k1")).abs().max() < 1e-12
    other, _ = two_policies()
    (reference.exp() * (reference - other.log_softmax(-1))).sum().backward()
    plain = expected_gradient(lambda a, b: kl_estimate(a, b, "k3"))
    torch.testing.assert_close(plain, other.grad, atol=1e-12, rtol=0)
    assert (plain - kl).abs().max() > 1e-2


def test_the_coefficient_moves_towards_the_target():
    """Ziegler et al. 2019: at most 20 % of answers / horizon a phase; unmoved at the target."""
    settings = {"target": 6.0, "answers": 100, "horizon": 1000.0}
    assert adapted_kl_coefficient(0.2, 6.0, **settings) == 0.2
    assert adapted_kl_coefficient(0.2, 6.6, **settings) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted_kl_coefficient(0.2, 60.0, **settings) == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    assert adapted_kl_coefficient(0.2, -3.0, **settings) == pytest.approx(0.2 * (1 - 0.2 * 0.1))
