"""Is a packed sequence what it is alone: its own tokens, positions, targets and figures, and nobody else's?"""

import numpy as np
import pytest
import torch

from batches.micro_batch import IGNORE_INDEX
from batches.packing import Sequence, pack, sequence_sums
from model import Transformer
from model_config import ModelConfig


def sequences(*lengths: int, seed=0) -> list[Sequence]:
    """Of these lengths, every token with a figure of its own, and a number for each sequence."""
    random = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        learned = random.random(length) < 0.6
        figures = random.random(length).astype(np.float32)
        made.append(Sequence(random.integers(1, 97, length), learned, {"old": figures}, {"number": float(number)}))
    return made


def own(batch, number: int) -> torch.Tensor:
    """(tokens,) where in the flattened micro-batch the sequence of this number lies."""
    return (batch.sequence_ids.flatten() == number).nonzero()[:, 0]


def test_hidden_states_of_packed_sequences_are_those_of_each_alone():
    """Attention crosses no boundary and positions start anew, at any place in any row: to 1e-5."""
    model = Transformer(ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                    num_attention_heads=2))  # fmt: skip
    model.init_weights(0, zero_residual=False)
    made = sequences(20, 9, 30, 1, 17, 12)
    (batch,) = pack([[sequence] for sequence in made], max_length=48, micro_batch_size=3)
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
    for number, sequence in enumerate(made):
        alone = model(torch.from_numpy(sequence.tokens)[None])[0]
        torch.testing.assert_close(hidden.flatten(0, 1)[own(batch, number)], alone, atol=1e-5, rtol=1e-5)


def test_every_sequence_lies_there_once_with_its_own_targets_and_figures():
    made = sequences(20, 9, 30, 1, 17, 12, 2, 48)
    batches = pack([[sequence] for sequence in made], max_length=48, micro_batch_size=2)
    assert len(batches) > 1
    left = iter(made)
    for batch in batches:
        tokens, targets = batch.input_ids.flatten(), batch.targets.flatten()
        count = len(batch.last_tokens)
        assert batch.weight == (targets != IGNORE_INDEX).sum() and len(batch.input_ids) <= 2
        for number in range(count):
            sequence, place = next(left), own(batch, number)
            assert tokens[place].tolist() == sequence.tokens.tolist()
            assert (
                place.tolist() == list(range(place[0], place[0] + len(place)))
                and batch.last_tokens[number] == place[-1]
            )
            assert batch.positions.flatten()[place].tolist() == list(range(len(place)))
            # a token's target and figure stand at the token before it; the last has none, and the first is none
            expected = [
                t if l else IGNORE_INDEX for t, l in zip(sequence.tokens[1:], sequence.learned[1:], strict=True)
            ]
            assert targets[place].tolist() == [*expected, IGNORE_INDEX]
            assert (
                batch.token_columns["old"].flatten()[place[:-1]].tolist() == sequence.token_columns["old"][1:].tolist()
            )
            assert batch.columns["number"][number] == sequence.columns["number"]
            assert sequence.num_targets == (targets[place] != IGNORE_INDEX).sum()
        padding = own(batch, count)
        assert (targets[padding] == IGNORE_INDEX).all() and batch.num_tokens == len(tokens) - len(padding)
    assert next(left, None) is None


def test_rows_are_documents_apart_and_padding_is_one_too():
    (batch,) = pack([[s] for s in sequences(40, 20, 64)], max_length=64, micro_batch_size=2)
    assert batch.input_ids.shape == (2, 64)
    assert sorted(set(batch.cu_seqlens.tolist())) == [0, 40, 60, 64, 128]
    (single,) = pack([sequences(64)], max_length=64, micro_batch_size=1)
    assert single.cu_seqlens is None  # a row of one document, without padding


def test_groups_stay_together_and_in_order():
    """Also where their second sequence no longer fits into the micro-batch of the first."""
    random = np.random.default_rng(0)
    groups = [sequences(*random.integers(2, 33, 2), seed=n) for n in range(12)]
    seen = []
    for batch in pack(groups, max_length=32, micro_batch_size=3):
        assert len(batch.last_tokens) % 2 == 0
        seen += [batch.input_ids.flatten()[own(batch, n)].tolist() for n in range(len(batch.last_tokens))]
    assert seen == [sequence.tokens.tolist() for group in groups for sequence in group]


def test_packing_saves_room():
    """64 sequences of a quarter of a row need a quarter of the rows."""
    batches = pack([[s] for s in sequences(*[16] * 64)], max_length=64, micro_batch_size=4)
    assert sum(len(batch.input_ids) for batch in batches) == 16


def test_rows_are_no_wider_than_needed_unless_asked():
    (narrow,), (wide,) = (
        pack([sequences(10)], max_length=1024, micro_batch_size=1, fixed_width=fixed) for fixed in (False, True)
    )
    assert narrow.input_ids.shape == (1, 64) and wide.input_ids.shape == (1, 1024)


def test_sequence_sums_are_of_each_sequence_and_have_gradients():
    made = sequences(20, 9, 30, 12)
    (batch,) = pack([[sequence] for sequence in made], max_length=48, micro_batch_size=2)
    values = torch.randn(batch.input_ids.shape, dtype=torch.float64, requires_grad=True)
    sums = sequence_sums(values, batch)
    expected = torch.stack([values.flatten()[own(batch, number)].sum() for number in range(4)])
    torch.testing.assert_close(sums, expected)
    (sums * torch.arange(1.0, 5)).sum().backward()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0], dtype=torch.float64)  # padding counts for nobody
    assert torch.equal(values.grad, weights[batch.sequence_ids])


def test_what_cannot_be_packed_is_a_mistake():
    with pytest.raises(ValueError, match="longer than max_length"):
        pack([sequences(33)], max_length=32, micro_batch_size=1)
    with pytest.raises(ValueError, match="do not fit"):
        pack([sequences(20, 20)], max_length=32, micro_batch_size=1)
    assert pack([], max_length=32, micro_batch_size=1) == []
