"""Does dropout by keys zero what dropout should, independently of everything but the token, and the same every time?"""

import numpy as np
import pytest
import torch

from kernels.dropout import kept, keyed_dropout, mix64

KEYS = mix64(torch.arange(1, 2001))


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.5, 0.9])
def test_the_share_of_zeros_is_the_probability_and_the_mean_stays(probability):
    """Within 5 standard deviations of a binomial, over all elements and in each row and column."""
    mask = ~kept(KEYS, 512, probability, stream=7).numpy()
    spread = (probability * (1 - probability)) ** 0.5
    assert abs(mask.mean() - probability) < 5 * spread / mask.size**0.5
    for axis, count in ((0, 2000), (1, 512)):
        shares = mask.mean(axis)
        assert abs(shares - probability).max() < 5 * spread / count**0.5
        assert 0.8 < shares.std() / (spread / count**0.5) < 1.2
    x = torch.ones(2000, 512)
    out = keyed_dropout(x, probability, KEYS, 7)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - probability)).item()}


def test_masks_of_rows_columns_and_streams_are_independent():
    """Correlations of neighbouring rows, columns, streams and keys, within 5 standard deviations of 0."""
    bits = [kept(KEYS, 512, 0.5, stream).numpy() * 2.0 - 1 for stream in (0, 1, 2, 2**62)]
    pairs = [
        (bits[0][:-1], bits[0][1:]), (bits[0][:, :-1], bits[0][:, 1:]), (bits[0], bits[1]), (bits[1], bits[2]),
        (bits[0], bits[3]), (bits[0][:, ::-1], bits[0]),
    ]  # fmt: skip
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)
    assert len({row.tobytes() for row in bits[0]}) == 2000


def test_rows_that_share_half_a_key_do_not_share_a_mask():
    low, high = KEYS & 0xFFFFFFFF, KEYS.roll(1) & ~0xFFFFFFFF
    assert not torch.equal(kept(low, 256, 0.5, 0), kept(low | high, 256, 0.5, 0))


def test_a_row_is_the_same_wherever_it_stands_and_the_gradient_sees_the_same_mask():
    x = torch.randn(2000, 64, dtype=torch.float64, requires_grad=True)
    out = keyed_dropout(x, 0.3, KEYS, 5)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keyed_dropout(x[order], 0.3, KEYS[order], 5), out[order])
    assert torch.equal(keyed_dropout(x[:8].view(2, 4, 64), 0.3, KEYS[:8].view(2, 4), 5).view(8, 64), out[:8])
    weight = torch.randn_like(x)
    (out * weight).sum().backward()
    assert torch.equal(x.grad, torch.where(out != 0, weight / 0.7, 0.0)) or torch.allclose(
        x.grad, torch.where(out != 0, weight / 0.7, 0.0), rtol=1e-14
    )


def test_it_draws_nothing_and_compiles_whole():
    state = torch.get_rng_state()
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    eager = keyed_dropout(x, 0.3, KEYS[:16], 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.compile(keyed_dropout, fullgraph=True)(x, 0.3, KEYS[:16], 5), eager)


def test_it_compiles_together_with_the_embedding_whose_rows_it_drops():
    table = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(16) % 50

    def both(ids: torch.Tensor, keys: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return keyed_dropout(torch.nn.functional.embedding(ids, table), 0.1, keys, 2)

    expected = both(ids, KEYS[:16], table)
    assert torch.equal(torch.compile(both, fullgraph=True)(ids, KEYS[:16], table), expected)
