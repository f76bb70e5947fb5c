"""Which window of which source is sample number t of a run?

A pure function of (seed, t): no index, no shuffled copy, O(1) memory, O(1) resume. How t becomes a window:

  1. samples come in blocks of 4096; block b and place j in it are t // 4096 and t % 4096
  2. each source owns a fixed number of places in every block, so that after any number of blocks its count differs from
     its weight's share by less than one sample (cumulative weights in 32-bit fixed point: exact integers at any t)
  3. which places they are is a permutation of the block, keyed by (seed, b), and by a later mixture's number
  4. the source's samples are numbered i = 0, 1, 2, …; its epoch is i // windows and its place in the epoch i % windows
  5. the window is a permutation of the source's windows at that place, keyed by (seed, source, epoch)

A mixture may give way to another at a sample: its blocks are counted from there, and each source goes on where it was.

Ranks, micro-batches and accumulation do not enter: a run's position is one integer, the samples consumed.

Permutations of fewer than 4096 things are shuffles of a table since version 2. In version 1 they came from the cipher too,
which on so few bits is far from uniform; a run that began with it keeps its order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

SAMPLER_VERSION = 2
BLOCK_SIZE = 4096
_TABLE_SIZE = 4096  # below it a permutation is a table
_FIXED_POINT_BITS = 32
_MASK64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
_FEISTEL_ROUNDS = 4  # two fail chi-squared tests of neighbouring outputs, three are marginal


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of uint64 that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    state = 0x243F6A8885A308D3  # the fraction of pi, so that no argument gives a special value
    for part in parts:
        state = (state ^ (part & _MASK64)) * 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ (state >> 29)) * 0xBF58476D1CE4E5B9 & _MASK64
        state ^= state >> 32
    return state


def permute(indices: np.ndarray, size: int, key: int, version: int = SAMPLER_VERSION) -> np.ndarray:
    """Where a keyed permutation of range(size) sends `indices` (any shape, integers in [0, size)); int64.

    Small ones are the ranks of `size` hashes of the key: every permutation is equally likely. Others: a Feistel
    network on just enough bits to hold size - 1, walked again while the value falls outside (cycle walking;
    Black & Rogaway, "Ciphers with arbitrary finite domains", 2002): a bijection for every size.
    """
    if version > 1 and size < _TABLE_SIZE:
        return _table(size, key)[np.asarray(indices)]
    bits = max(2, (size - 1).bit_length())
    left_bits, right_bits = bits // 2, bits - bits // 2
    round_keys = [np.uint64(hash_key(key, round_number)) for round_number in range(_FEISTEL_ROUNDS)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        a, b = left_bits, right_bits
        left, right = x >> np.uint64(b), x & np.uint64((1 << b) - 1)
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(right + round_key) >> np.uint64(64 - a))
            a, b = b, a
        return (left << np.uint64(b)) | right

    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        values = encrypt(np.asarray(indices).astype(np.uint64))
        while (outside := values >= np.uint64(size)).any():
            values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


@lru_cache(maxsize=64)
def _table(size: int, key: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        hashes = splitmix64(np.uint64(hash_key(key)) + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
    return np.argsort(hashes, kind="stable")


@dataclass(frozen=True)
class Samples:
    """Where a range of samples lies; three int64 arrays of shape (count,)."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


# from which sample on the sources are mixed by which weights
Mixture = Sequence[tuple[int, Sequence[float]]]


def locate(
    first: int, count: int, *, num_windows: list[int], weights: Sequence[float], seed: int, version: int = SAMPLER_VERSION,
    later: Mixture = (),
) -> Samples:  # fmt: skip
    """Samples first … first+count-1 of a run over sources with `num_windows` windows each, mixed by `weights`.

    later: mixtures that take over at a sample, ascending. A source goes on where it was, so its epochs stay whole.
    version: the one that the run began with.
    """
    sources, numbers = [], []
    drawn = np.zeros(len(num_windows), dtype=np.int64)  # of each source, before the mixture in hand
    mixtures = [(0, weights), *later]
    for index, (begin, mixed) in enumerate(mixtures):
        end = mixtures[index + 1][0] if index + 1 < len(mixtures) else first + count
        keys = (seed, 0) if index == 0 else (seed, 0, index)
        start, stop = max(first, begin) - begin, min(first + count, end) - begin
        if start < stop:
            source, number = _mix(start, stop - start, mixed, keys)
            sources.append(source)
            numbers.append(number + drawn[source])
        if end >= first + count:
            break
        drawn += _drawn_before(end - begin, mixed, keys)
    source, number = np.concatenate(sources), np.concatenate(numbers)

    windows_of = np.asarray(num_windows, dtype=np.int64)[source]
    epoch, place = number // windows_of, number % windows_of
    window = np.empty(count, dtype=np.int64)
    for k, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
        chosen = (source == k) & (epoch == e)
        window[chosen] = permute(place[chosen], num_windows[k], hash_key(seed, 1, k, e), version)
    return Samples(source, epoch, window)


def passes(first: int, *, num_windows: int, weights: Sequence[float], later: Mixture = ()) -> float:
    """How many times the first source's windows have been seen after `first` samples, as a fraction, by its share."""
    mixtures = [(0, weights), *later, (first, weights)]
    seen = 0.0
    for (begin, mixed), (end, _) in pairwise(mixtures):
        seen += max(0, min(end, first) - begin) * mixed[0] / sum(mixed)
    return seen / num_windows


def share_bounds(weights: Sequence[float]) -> list[int]:
    """Where each source's share of all samples begins, and the last ends, in 32-bit fixed point: all that weights decide."""
    cumulative = np.cumsum(np.asarray(weights, dtype=np.float64)) / float(np.sum(weights))
    return [0, *(round(x * 2**_FIXED_POINT_BITS) for x in cumulative[:-1]), 2**_FIXED_POINT_BITS]


def _mix(first: int, count: int, weights: Sequence[float], keys: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of samples first … first+count-1 of one mixture: (source, its how many-th sample), int64 (count,) each."""
    sources, numbers = [], []
    for block in range(first // BLOCK_SIZE, (first + count - 1) // BLOCK_SIZE + 1):
        before, owner = _block(block, weights, keys)
        number = np.empty(BLOCK_SIZE, dtype=np.int64)
        for k in range(len(weights)):  # a source's own samples keep their order, so its epochs do not mix
            own = owner == k
            number[own] = before[k] + np.arange(own.sum())
        start = max(first, block * BLOCK_SIZE) - block * BLOCK_SIZE
        stop = min(first + count, (block + 1) * BLOCK_SIZE) - block * BLOCK_SIZE
        sources.append(owner[start:stop])
        numbers.append(number[start:stop])
    return np.concatenate(sources), np.concatenate(numbers)


def _drawn_before(count: int, weights: Sequence[float], keys: tuple[int, ...]) -> np.ndarray:
    """How many of the first `count` samples of a mixture each source has had, int64 (sources,)."""
    before, owner = _block(count // BLOCK_SIZE, weights, keys)
    return before + np.bincount(owner[: count % BLOCK_SIZE], minlength=len(weights))


def _block(block: int, weights: Sequence[float], keys: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(how many samples each source has before the block, int64; which source owns each of its places)."""
    bounds = share_bounds(weights)

    def samples_before(t: int) -> np.ndarray:
        """Exact, since Python's integers do not overflow."""
        return np.diff([(bound * t) >> _FIXED_POINT_BITS for bound in bounds])

    before, after = samples_before(block * BLOCK_SIZE), samples_before((block + 1) * BLOCK_SIZE)
    owner = np.repeat(np.arange(len(weights)), after - before)
    return before, owner[permute(np.arange(BLOCK_SIZE), BLOCK_SIZE, hash_key(*keys, block))]
