"""Does the learning rate follow its closed form, and torch's and transformers' schedules, from the first step to the last?"""

import math

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from training.schedule import SCHEDULES, learning_rate_factor

DECAYING = ("cosine", "linear", "polynomial", "wsd")  # from the peak to the minimum, after a straight warm-up


def factors(max_steps, warmup_steps, schedule, decay_fraction=0.5, min_factor=0.1, **more):
    options = {"decay_fraction": decay_fraction, "min_factor": min_factor, **more}
    return [
        learning_rate_factor(step, max_steps=max_steps, warmup_steps=warmup_steps, schedule=schedule, **options)
        for step in range(max_steps)
    ]


@pytest.mark.parametrize("schedule", DECAYING)
def test_warms_up_in_a_line_from_above_zero_and_ends_at_the_minimum(schedule):
    values = factors(100, 10, schedule)
    assert values[:10] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.1, abs=1e-15)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_cosine_is_half_a_cosine_between_the_peak_and_the_last_step():
    values = factors(101, 0, "cosine", min_factor=0.2)
    for step in (0, 25, 50, 75, 100):
        assert values[step] == pytest.approx(0.6 + 0.4 * math.cos(math.pi * step / 100), abs=1e-15)


def test_linear_is_a_straight_line_after_the_warm_up():
    values = factors(111, 10, "linear", min_factor=0.0)
    assert values[10:] == pytest.approx([1 - step / 100 for step in range(101)], abs=1e-15)


def test_wsd_is_flat_and_then_straight_over_the_last_fraction():
    values = factors(100, 5, "wsd", decay_fraction=0.2, min_factor=0.0)
    assert values[4:80] == [1.0] * 76
    assert values[79:] == pytest.approx([1 - step / 20 for step in range(21)], abs=1e-15)
    assert factors(100, 5, "wsd", decay_fraction=0.0)[5:] == [1.0] * 95


def test_wsd_decay_longer_than_the_run_starts_right_after_the_warm_up():
    assert factors(50, 10, "wsd", decay_fraction=1.0) == pytest.approx(factors(50, 10, "linear"), abs=1e-15)


@pytest.mark.parametrize("schedule", DECAYING)
def test_runs_too_short_to_decay_never_stand_still(schedule):
    assert factors(1, 0, schedule, min_factor=0.0) == [1.0]
    assert factors(1, 1, schedule, min_factor=0.0) == [1.0]
    assert factors(4, 8, schedule, min_factor=0.0) == [0.125, 0.25, 0.375, 0.5]
    assert factors(4, 4, schedule, min_factor=0.0) == [0.25, 0.5, 0.75, 1.0]
    assert factors(5, 4, schedule, min_factor=0.0) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_past_the_end_the_minimum_stays():
    options = {"max_steps": 10, "warmup_steps": 2, "decay_fraction": 0.3, "min_factor": 0.05}
    for schedule in (*DECAYING, "one_cycle"):
        assert learning_rate_factor(500, schedule=schedule, **options) == pytest.approx(0.05, abs=1e-15)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="wobbly"):
        factors(10, 0, "wobbly")


# ---- beside torch and transformers -------------------------------------------------------------------------------------

STEPS, WARMUP = 100, 10


def peer(build, num_steps):
    """The factors that a scheduler of torch or transformers gives an optimizer whose rate is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer)
    values = []
    for _ in range(num_steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


# the last step of ours is the minimum; theirs get there one step later, so they are told of one less
THEIRS = {
    "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, WARMUP),
    "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, STEPS - 1),
    "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, STEPS - 1),
    "inverse_sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP),
    "polynomial": lambda o: transformers.get_polynomial_decay_schedule_with_warmup(
        o, WARMUP, STEPS - 1, lr_end=0.0, power=2.5
    ),
    "wsd": lambda o: transformers.get_wsd_schedule(
        o, WARMUP, 20, num_stable_steps=STEPS - 1 - WARMUP - 20, decay_type="linear"
    ),
}


@pytest.mark.parametrize("schedule", THEIRS)
def test_from_the_peak_on_as_in_transformers(schedule):
    """Their warm-up begins at 0, ours one step further on."""
    ours = factors(STEPS, WARMUP, schedule, decay_fraction=0.2, min_factor=0.0, power=2.5)
    theirs = peer(THEIRS[schedule], STEPS)
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], abs=1e-12)
    assert ours[: WARMUP - 1] == pytest.approx(theirs[1:WARMUP], abs=1e-12)


def test_inverse_sqrt_without_a_warm_up_is_theirs():
    assert factors(50, 0, "inverse_sqrt") == pytest.approx(
        peer(lambda o: transformers.get_inverse_sqrt_schedule(o, 0), 50), abs=1e-12
    )


def test_polynomial_to_a_minimum_is_torchs_scaled():
    ours = factors(51, 0, "polynomial", min_factor=0.2, power=3.0)
    theirs = peer(lambda o: lr_scheduler.PolynomialLR(o, total_iters=50, power=3.0), 51)
    assert ours == pytest.approx([0.2 + 0.8 * value for value in theirs], abs=1e-12)


def test_restarts_are_torchs():
    ours = factors(100, 0, "restarts", min_factor=0.1, cycle_steps=30)
    theirs = peer(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=30, eta_min=0.1), 100)
    assert ours == pytest.approx(theirs, abs=1e-12)
    warmed = factors(110, 10, "restarts", min_factor=0.1, cycle_steps=30)
    assert warmed[:10] == [(step + 1) / 10 for step in range(10)] and warmed[10:] == ours


def test_one_cycle_is_torchs():
    """Torch's up-phase ends one step before its share of the steps does, and its minimum is 1/(25 · final_div_factor)."""
    ours = factors(100, 30, "one_cycle", min_factor=1 / (25 * 1e4))
    theirs = peer(lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=100, pct_start=0.31), 99)
    assert ours[:99] == pytest.approx(theirs, abs=1e-12)
    assert ours[99] == pytest.approx(1 / (25 * 1e4), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rate_is_positive_and_at_most_the_peak(schedule):
    for max_steps, warmup in ((1, 0), (1, 1), (2, 1), (7, 3), (40, 0), (40, 39), (4, 8)):
        values = factors(max_steps, warmup, schedule, cycle_steps=5, power=2.0)
        assert all(0 < value <= 1 for value in values), (max_steps, warmup, values)
