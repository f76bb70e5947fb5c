"""How do examples of any length become the rows of a micro-batch?

Fine-tuning learns from sequences: a prompt and its answer, a chosen and a rejected answer, a rollout. They are laid one
after another into rows of at most `max_length` tokens, first fit in order. Attention does not cross them, positions start
anew at each, and no target lies across a boundary, so a packed sequence gives what it gives alone. What a stage knows of
each token or each sequence travels beside them.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from batches.micro_batch import IGNORE_INDEX, MicroBatch, pad_boundaries

_WIDTH_MULTIPLE = 64  # few widths occur, so kernels compile for few


@dataclass(frozen=True)
class Sequence:
    """tokens (n,) int64; learned (n,) bool, whether each token is a target (the first, which nothing precedes, never is).

    token_columns: {name: (n,) float32}, a figure of each token, such as its log-probability when it was drawn.
    columns: {name: number}, a figure of the whole sequence, such as its reward.
    """

    tokens: np.ndarray
    learned: np.ndarray
    token_columns: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        return int(self.learned[1:].sum())


def pack(
    groups: SequenceOf[SequenceOf[Sequence]], *, max_length: int, micro_batch_size: int, fixed_width: bool = False
) -> list[MicroBatch]:
    """Micro-batches of at most `micro_batch_size` rows that hold every sequence once, in order.

    The sequences of a group, such as a chosen and a rejected answer, come into the same micro-batch, one behind the
    other in its order. Its `weight` is its number of targets; a stage that counts otherwise replaces it. Rows are as wide
    as the longest of the micro-batch needs, or max_length wide with fixed_width. ValueError for a sequence longer than
    max_length or a group that does not fit into one micro-batch.
    """
    batches: list[MicroBatch] = []
    rows: list[list[tuple[int, Sequence]]] = []  # each row's (number in the micro-batch, sequence)
    free: list[int] = []
    count = 0
    for group in groups:
        placed = _place(group, free, max_length, micro_batch_size)
        if placed is None and rows:
            batches.append(_micro_batch(rows, max_length if fixed_width else None))
            rows, free, count = [], [], 0
            placed = _place(group, free, max_length, micro_batch_size)
        if placed is None:
            raise ValueError(f"{len(group)} sequences of one group do not fit {micro_batch_size} rows of {max_length}")
        for sequence, row in zip(group, placed, strict=True):
            while row >= len(rows):
                rows.append([])
                free.append(max_length)
            rows[row].append((count, sequence))
            free[row] -= len(sequence.tokens)
            count += 1
    if rows:
        batches.append(_micro_batch(rows, max_length if fixed_width else None))
    return batches


def _place(group: SequenceOf[Sequence], free: list[int], max_length: int, max_rows: int) -> list[int] | None:
    """The row of each sequence, the first with room; None where not all fit. `free` is the room in each row so far."""
    room, placed = list(free), []
    for sequence in group:
        size = len(sequence.tokens)
        if size > max_length:
            raise ValueError(f"a sequence of {size} tokens is longer than max_length {max_length}")
        row = next((index for index, left in enumerate(room) if left >= size), len(room))
        if row == max_rows:
            return None
        if row == len(room):
            room.append(max_length)
        room[row] -= size
        placed.append(row)
    return placed


def _micro_batch(rows: list[list[tuple[int, Sequence]]], width: int | None) -> MicroBatch:
    sequences = dict(entry for row in rows for entry in row)
    width = width or -(-max(sum(len(s.tokens) for _, s in row) for row in rows) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    shape = len(rows), width
    input_ids = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    sequence_ids = np.full(shape, len(sequences), dtype=np.int64)
    last_tokens = np.zeros(len(sequences), dtype=np.int64)
    token_columns = {name: np.zeros(shape, dtype=np.float32) for name in sequences[0].token_columns}
    boundaries = []
    for index, row in enumerate(rows):
        start = 0
        for number, sequence in row:
            end = start + len(sequence.tokens)
            boundaries.append(index * width + start)
            input_ids[index, start:end] = sequence.tokens
            targets[index, start : end - 1] = np.where(sequence.learned[1:], sequence.tokens[1:], IGNORE_INDEX)
            positions[index, start:end] = np.arange(end - start)
            sequence_ids[index, start:end] = number
            last_tokens[number] = index * width + end - 1
            for name, column in token_columns.items():  # beside the token that predicts, as the targets are
                column[index, start : end - 1] = sequence.token_columns[name][1:]
            start = end
        if start < width:
            # the padding is a document of its own; its positions stay 0, as it may be longer than a model has positions for
            boundaries.append(index * width + start)
    columns = {
        name: torch.tensor([sequences[number].columns[name] for number in range(len(sequences))], dtype=torch.float32)
        for name in sequences[0].columns
    }
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=pad_boundaries([*boundaries, shape[0] * width]) if len(boundaries) > len(rows) else None,
        weight=int((targets != IGNORE_INDEX).sum()),
        num_tokens=sum(len(sequence.tokens) for sequence in sequences.values()),
        sequence_ids=torch.from_numpy(sequence_ids),
        last_tokens=torch.from_numpy(last_tokens),
        token_columns={name: torch.from_numpy(column) for name, column in token_columns.items()},
        columns=columns,
    )


def sequence_sums(values: Tensor, batch: MicroBatch) -> Tensor:
    """(B, T) figures of tokens, summed over each sequence: (sequences,), in their dtype. Differentiable."""
    count = batch.num_sequences
    assert batch.sequence_ids is not None
    sums = values.new_zeros(count + 1)  # one more for the padding
    return sums.index_add(0, batch.sequence_ids.flatten(), values.flatten())[:count]
