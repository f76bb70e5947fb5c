"""Is the data order what DESIGN promises: exact permutations, exact mixtures, a pure function of (seed, sample)?"""

from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batches.sampler import BLOCK_SIZE, hash_key, locate, passes, permute

OLD_ORDERS = {
    (5, 7): [2, 3, 4, 1, 0],
    (12, 99): [4, 5, 10, 6, 2, 3, 9, 11, 0, 7, 1, 8],
    "locate": [3, 1, 0, 2, 0, 2, 3, 1, 3, 1, 0, 2],
}


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_every_size(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_works_beyond_32_bits_and_element_by_element():
    size = 3_000_000_019
    indices = np.array([0, 1, 2**31, 2**32 - 1 - 2**30, size - 1])
    together = permute(indices, size, 7)
    assert together.max() < size and len(set(together.tolist())) == len(indices)
    assert together.tolist() == [permute(np.array([index]), size, 7)[0] for index in indices]


def test_a_permutation_looks_random():
    """Serial correlation and the chi-squared of neighbouring outputs, both within 5 standard deviations of a true shuffle's."""
    size = 200_000
    for key in (1, 2, 3):
        y = permute(np.arange(size), size, hash_key(key)) / size
        assert abs(np.corrcoef(y[:-1], y[1:])[0, 1]) * np.sqrt(size) < 5
        counts, _, _ = np.histogram2d(y[:-1], y[1:], bins=50, range=[[0, 1], [0, 1]])
        expected = (size - 1) / 2500
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - 2500) / np.sqrt(2 * 2500) < 5


def test_every_epoch_shows_every_window_once_and_in_another_order():
    windows = 700
    samples = locate(0, 3 * windows, num_windows=[windows], weights=[1.0], seed=5)
    assert np.array_equal(samples.epoch, np.repeat(np.arange(3), windows))
    by_epoch = [samples.window[samples.epoch == e] for e in range(3)]
    for order in by_epoch:
        assert np.array_equal(np.sort(order), np.arange(windows))
    assert not np.array_equal(by_epoch[0], by_epoch[1])


def test_mixture_counts_stay_within_one_sample_at_every_block_edge():
    weights, total = [0.9, 0.0999, 0.0001], 40 * BLOCK_SIZE
    samples = locate(0, total, num_windows=[100_003, 5000, 77], weights=weights, seed=3)
    for edge in range(BLOCK_SIZE, total + 1, BLOCK_SIZE):
        counts = np.bincount(samples.source[:edge], minlength=3)
        assert np.abs(counts - np.array(weights) * edge).max() <= 1 + 1e-6
    small = samples.window[(samples.source == 1) & (samples.epoch == 0)]
    assert np.array_equal(np.sort(small), np.arange(5000))


@pytest.mark.parametrize("first", [0, 4000, 123_456_789, 10**12])
def test_any_part_of_the_order_can_be_read_alone(first):
    settings = {"num_windows": [1000, 333], "weights": [2.0, 1.0], "seed": 11}
    whole = locate(first, 300, **settings)
    for begin, count in ((0, 1), (7, 100), (107, 193)):
        part = locate(first + begin, count, **settings)
        for name in ("source", "epoch", "window"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[begin : begin + count])


def test_seeds_give_different_orders():
    a, b = (locate(0, 500, num_windows=[500], weights=[1.0], seed=seed).window for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7])
def test_every_permutation_of_few_things_is_equally_likely(size):
    """Chi-squared over all permutations, a hundred keys for each: within 5 standard deviations of a true shuffle's."""
    keys = 100 * factorial(size)
    drawn = keys if size < 7 else keys // 10
    counts = Counter(tuple(permute(np.arange(size), size, hash_key(3, key)).tolist()) for key in range(drawn))
    freedom, expected = factorial(size) - 1, drawn / factorial(size)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    chi_squared += (factorial(size) - len(counts)) * expected
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_version_1_is_the_cipher_at_every_size():
    """Known values: the order of a run that began before there were versions."""
    assert permute(np.arange(5), 5, 7, version=1).tolist() == OLD_ORDERS[5, 7]
    assert permute(np.arange(12), 12, 99, version=1).tolist() == OLD_ORDERS[12, 99]
    old = locate(0, 12, num_windows=[4], weights=[1.0], seed=0, version=1).window.tolist()
    assert old == OLD_ORDERS["locate"] != locate(0, 12, num_windows=[4], weights=[1.0], seed=0).window.tolist()
    large = np.arange(5000)
    assert np.array_equal(permute(large, 5000, 7, version=1), permute(large, 5000, 7))


LATER = [(5000, [0.2, 0.8, 0.0]), (9001, [0.0, 0.5, 0.5])]


def test_a_later_mixture_begins_at_its_sample_and_every_source_goes_on_where_it_was():
    first, sizes = [0.9, 0.1, 0.0], [3001, 2003, 500]
    samples = locate(0, 15_000, num_windows=sizes, weights=first, seed=4, later=LATER)
    bounds, mixtures = [0, 5000, 9001, 15_000], [first, *(weights for _, weights in LATER)]
    for begin, end, weights in zip(bounds, bounds[1:], mixtures, strict=False):
        counts = np.bincount(samples.source[begin:end], minlength=3)
        # a mixture's last block is cut short: what a shuffled part of it has is off by its places' spread
        assert np.abs(counts - np.array(weights) * (end - begin)).max() < 5 * np.sqrt(BLOCK_SIZE / 4)
        assert not counts[np.array(weights) == 0].any()
    for source, size in enumerate(sizes):
        own, epochs = samples.window[samples.source == source], samples.epoch[samples.source == source]
        assert np.array_equal(epochs, np.arange(len(own)) // size)
        for epoch in range(len(own) // size):
            assert np.array_equal(np.sort(own[epochs == epoch]), np.arange(size))
    before = locate(0, 5000, num_windows=sizes, weights=first, seed=4)
    for name in ("source", "epoch", "window"):
        assert np.array_equal(getattr(samples, name)[:5000], getattr(before, name))


@pytest.mark.parametrize("first", [0, 4990, 8990, 14_000])
def test_any_part_of_a_changing_order_can_be_read_alone(first):
    settings = {"num_windows": [70, 30, 20], "weights": [1.0, 1.0, 0.0], "seed": 2, "later": LATER}
    whole = locate(0, 15_000, **settings)
    for count in (1, 30, 1000):
        part = locate(first, count, **settings)
        for name in ("source", "epoch", "window"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[first : first + count])


def test_passes_are_counted_by_each_mixtures_share():
    settings = {"num_windows": 1000, "weights": [3.0, 1.0], "later": [(4000, [0.0, 1.0]), (6000, [0.5, 0.5])]}
    assert [passes(first, **settings) for first in (2000, 5000, 8000)] == [1.5, 3.0, 4.0]
