"""Do the rows of a step hold exactly the tokens they should, whoever shares them?"""

import numpy as np
import pytest
import torch

from batches.micro_batch import IGNORE_INDEX
from batches.windows import Windows, evaluation_micro_batches, make_micro_batch, open_training_data
from dataprep.shards import open_split


@pytest.fixture(scope="module")
def split(tiny_data):
    return open_split(tiny_data, "train")


def data_of(split, length=32, stride=0, **more):
    settings = {"max_length": length, "stride": stride, "document_mask": True, "seed": 1} | more
    return open_training_data([split], [], **settings)


def test_an_epoch_reads_every_token_once(split):
    data = data_of(split)
    windows = len(data.sources[0])
    rows = [tokens for tokens, _ in data.rows(0, windows)]
    firsts = sorted(rows, key=lambda row: row.tobytes())
    expected = sorted((split.read(w * 32, 33) for w in range(windows)), key=lambda row: row.tobytes())
    assert all(np.array_equal(a, b) for a, b in zip(firsts, expected, strict=True))
    assert windows == (split.num_tokens - 1) // 32


@pytest.mark.parametrize("stride", [0, 8, 31])
def test_stride_is_the_overlap_of_neighbouring_windows(split, stride):
    windows = Windows(split, 32, stride)
    for w in (0, 5, len(windows) - 1):
        assert np.array_equal(windows.row(w)[0], split.read(w * (32 - stride), 33))
    # one more window would run past the end
    assert (len(windows) - 1) * (32 - stride) + 33 <= split.num_tokens < len(windows) * (32 - stride) + 33


@pytest.mark.parametrize("world_size,micro", [(1, 12), (1, 5), (2, 3), (3, 4), (5, 1)])
def test_ranks_and_micro_batches_only_divide_the_step(split, world_size, micro):
    data = data_of(split)
    whole = data.micro_batches(24, 12, 12)[0]
    parts = [batch for rank in range(world_size) for batch in data.micro_batches(24, 12, micro, rank, world_size)]
    assert torch.equal(torch.cat([batch.input_ids for batch in parts]), whole.input_ids)
    assert torch.equal(torch.cat([batch.targets for batch in parts]), whole.targets)
    assert sum(batch.weight for batch in parts) == whole.weight
    assert max(len(batch.input_ids) for batch in parts) <= micro


def test_documents_are_found_masked_and_numbered(split):
    """Against a scan for the end-of-text token, which is how documents end."""
    eos = split.metadata.tokenizer.eos_token_id
    batch = data_of(split).micro_batches(0, 16, 16)[0]
    starts = {0, batch.input_ids.numel()}
    for row in range(16):
        position = 0
        for column in range(32):
            if column and batch.input_ids[row, column - 1] == eos:
                position = 0
                starts.add(row * 32 + column)
            if column == 0:
                starts.add(row * 32)
            assert batch.positions[row, column] == position
            position += 1
            masked = batch.input_ids[row, column] == eos
            assert (batch.targets[row, column] == IGNORE_INDEX) == masked
    assert sorted(set(batch.cu_seqlens.tolist())) == sorted(starts)
    assert batch.weight == (batch.targets != IGNORE_INDEX).sum()


def test_without_the_document_mask_rows_are_plain_text(split):
    batch = data_of(split, document_mask=False).micro_batches(0, 8, 8)[0]
    assert batch.cu_seqlens is None and batch.weight == 8 * 32
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_every_target_once(tiny_data, world_size):
    split = open_split(tiny_data, "val")
    seen = []
    for rank in range(world_size):
        for batch in evaluation_micro_batches(Windows(split, 32, 0), 4, 0, rank, world_size):
            seen.append(batch.targets[batch.targets != IGNORE_INDEX])
    tokens = split.read(0, split.num_tokens)
    begins = set(split.document_starts(0, split.num_tokens).tolist())
    expected = [token for place, token in enumerate(tokens.tolist()) if place and place not in begins]
    assert torch.cat(seen).tolist() == expected


def test_the_last_row_of_an_evaluation_is_padded():
    batch = make_micro_batch([(np.array([5, 6, 7]), np.array([], dtype=np.int64))], length=4)
    assert batch.input_ids.tolist() == [[5, 6, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX]] and batch.weight == 2
