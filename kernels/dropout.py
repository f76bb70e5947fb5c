"""Which elements of an activation does dropout zero? A pure function of a key for each row: no generator is drawn from.

A row is a token, and its key is made of its sample's number and its position, so that the same tokens lose the same elements
on any rank, in any micro-batch or packing, after a resume, and when an activation is computed again for the backward pass.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment (Steele et al. 2014), as int64, whose sums wrap around
_MULTIPLIERS_64 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_GOLDEN_32 = 0x9E3779B9 - 2**32
_MULTIPLIERS_32 = 0x21F0AAAD, 0xD35A2D97 - 2**32  # of a 32-bit finaliser with little bias (Wellons & Mulvey 2018)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose shift must be kept from copying the sign."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS_64, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return x ^ ((x >> 31) & (2**33 - 1))


def keyed_dropout(x: Tensor, probability: float, keys: Tensor, stream: int) -> Tensor:
    """x with each element zeroed with `probability` and the others scaled by 1 / (1 − probability); differentiable.

    x (..., K), keys (...) int64, one for each row of K. stream: which use of the same rows this is, below 2**63; each has a
    mask of its own. The probability is exact to 2**-32. Kept for the backward pass is one byte an element.
    """
    return torch.where(kept(keys, x.shape[-1], probability, stream), x * (1.0 / (1.0 - probability)), 0.0)


# an operator of its own, because inductor fuses the hash with an embedding's look-up and then takes the one for the other
@torch.library.custom_op("groundup::dropout_kept", mutates_args=())
def kept(keys: Tensor, width: int, probability: float, stream: int) -> Tensor:
    """(..., width) bool: the elements that are not zeroed. Hashes in int32, and in place: the mask is the size of the input."""
    row = mix64(keys + mix64(torch.tensor(stream, dtype=torch.int64, device=keys.device)))
    low, high = row.to(torch.int32), (row >> 32).to(torch.int32)
    columns = torch.arange(1, width + 1, dtype=torch.int32, device=keys.device) * _GOLDEN_32
    bits = low[..., None] + columns
    for half in (None, high):
        if half is not None:
            bits ^= half[..., None]  # without it the rows that agree in `low` would have one mask
        bits ^= (bits >> 16) & 0xFFFF
        bits *= _MULTIPLIERS_32[0]
        bits ^= (bits >> 15) & 0x1FFFF
        bits *= _MULTIPLIERS_32[1]
        bits ^= (bits >> 15) & 0x1FFFF
    return bits >= round(probability * 2**32) - 2**31


@kept.register_fake
def _kept(keys: Tensor, width: int, probability: float, stream: int) -> Tensor:
    return keys.new_empty((*keys.shape, width), dtype=torch.bool)
