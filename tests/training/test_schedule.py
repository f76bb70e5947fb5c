"""Does the learning rate follow its closed form, from the first step to the last?"""

import math

import pytest

from training.schedule import SCHEDULES, learning_rate_factor


def factors(max_steps, warmup_steps, schedule, decay_fraction=0.5, min_factor=0.1):
    options = {"decay_fraction": decay_fraction, "min_factor": min_factor}
    return [
        learning_rate_factor(step, max_steps=max_steps, warmup_steps=warmup_steps, schedule=schedule, **options)
        for step in range(max_steps)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_too_short_to_decay_never_stand_still(schedule):
    assert factors(1, 0, schedule, min_factor=0.0) == [1.0]
    assert factors(1, 1, schedule, min_factor=0.0) == [1.0]
    assert factors(4, 8, schedule, min_factor=0.0) == [0.125, 0.25, 0.375, 0.5]
    assert factors(4, 4, schedule, min_factor=0.0) == [0.25, 0.5, 0.75, 1.0]
    assert factors(5, 4, schedule, min_factor=0.0) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_past_the_end_the_minimum_stays():
    options = {"max_steps": 10, "warmup_steps": 2, "decay_fraction": 0.3, "min_factor": 0.05}
    for schedule in SCHEDULES:
        assert learning_rate_factor(500, schedule=schedule, **options) == pytest.approx(0.05, abs=1e-15)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="wobbly"):
        factors(10, 0, "wobbly")
