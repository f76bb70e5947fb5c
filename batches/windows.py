"""How do token shards on disk become the rows of an optimizer step?

In five steps, each a pure function, so that a run's only state is the number of samples it has consumed:

  1. a split is one long array of tokens (dataprep/shards.py); window w of it starts at w · (max_length - stride) and
     holds max_length + 1 tokens, the last one only as a target
  2. sample t of the run is window w of one source (sampler.py)
  3. step s takes the samples [first, first + batch_size); a rank takes its contiguous part of them, cut into
     micro-batches: ranks and micro-batches only divide the step's samples
  4. a row's documents are found from the index: positions restart at each, and the target that would predict the first
     token of the next document is masked
  5. rows become one `MicroBatch` with `cu_seqlens`, the document boundaries of the flattened rows
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from batches.micro_batch import IGNORE_INDEX, MicroBatch, pad_boundaries
from batches.sampler import SAMPLER_VERSION, Mixture, locate, passes
from dataprep.shards import TokenSplit
from dataprep.token_bytes import TokenBytes
from errors import UserError

BYTES = "bytes"  # the token column of an evaluation


@dataclass(frozen=True)
class Windows:
    """A split seen as windows of `max_length` inputs whose neighbours overlap by `stride` tokens."""

    split: TokenSplit
    max_length: int
    stride: int
    document_mask: bool = True

    @property
    def step(self) -> int:
        return self.max_length - self.stride

    def __len__(self) -> int:
        """Whole windows; the tokens after the last whole one (fewer than max_length) are not in any."""
        return max(0, (self.split.num_tokens - 1 - self.max_length) // self.step + 1)

    def row(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(max_length + 1,) int64 tokens of a window, and where in it documents begin (ascending, from 1 on)."""
        return self.tokens(window * self.step, self.max_length + 1)

    def evaluation_rows(self, max_tokens: int) -> int:
        """How many rows an evaluation on `max_tokens` targets (0: on all) reads, the last one perhaps shorter."""
        rows = -(-(self.split.num_tokens - 1) // self.max_length)
        return min(rows, -(-max_tokens // self.max_length)) if max_tokens else rows

    def tokens(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.split.document_starts(start, count) - start if self.document_mask else np.empty(0, np.int64)
        return self.split.read(start, count), starts


@dataclass(frozen=True)
class TrainingData:
    """The sources of a run and how they are mixed: by `weights`, and `later` on otherwise.

    sampler: the version of batches/sampler.py that the run began with.
    """

    sources: list[Windows]
    weights: list[float]
    seed: int
    sampler: int = SAMPLER_VERSION
    later: Mixture = ()

    def rows(self, first: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows of samples first … first+count-1, as `Windows.row` gives them."""
        sizes = [len(source) for source in self.sources]
        samples = locate(
            first, count, num_windows=sizes, weights=self.weights, seed=self.seed, version=self.sampler, later=self.later
        )  # fmt: skip
        for source, window in zip(samples.source.tolist(), samples.window.tolist(), strict=True):
            yield self.sources[source].row(window)

    def documents(self, first: int, count: int) -> list[str]:
        """From which documents these samples are, each by its file and place."""
        sizes = [len(source) for source in self.sources]
        samples = locate(
            first, count, num_windows=sizes, weights=self.weights, seed=self.seed, version=self.sampler
        )  # fmt: skip
        found: dict[str, None] = {}
        for source, window in zip(samples.source.tolist(), samples.window.tolist(), strict=True):
            windows = self.sources[source]
            position = window * windows.step
            end = position + windows.max_length + 1
            while position < end:
                origin = windows.split.document_at(position)
                found[origin.place] = None
                position = origin.stop
        return list(found)

    @property
    def num_samples(self) -> int:
        """Of one pass."""
        return sum(map(len, self.sources))

    def epoch(self, first: int) -> float:
        """How many times the first source's windows have been seen after `first` samples (as a fraction)."""
        return passes(first, num_windows=len(self.sources[0]), weights=self.weights, later=self.later)

    def micro_batches(
        self, first: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[MicroBatch]:
        """The micro-batches of one rank for the step whose samples are first … first+batch_size-1.

        Ranks take contiguous parts that differ by at most one row; the last micro-batch may be smaller.
        """
        begin, end = (first + batch_size * r // world_size for r in (rank, rank + 1))
        rows = list(self.rows(begin, end - begin))
        return [make_micro_batch(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]


def open_training_data(
    splits: list[TokenSplit], weights: list[float], *, max_length: int, stride: int, document_mask: bool, seed: int,
    sampler: int = SAMPLER_VERSION, later: Mixture = (),
) -> TrainingData:  # fmt: skip
    """Windows over opened splits, mixed by `weights` (empty: by their numbers of tokens), `later` on otherwise. UserError."""
    if stride >= max_length:
        raise UserError(f"--stride {stride} must be smaller than --max_length {max_length}: it is the rows' overlap")
    sources = [Windows(split, max_length, stride, document_mask) for split in splits]
    for source in sources:
        if len(source) == 0:
            raise UserError(
                f"the {source.split.split} split has {source.split.num_tokens:,} tokens, fewer than one row of --max_length "
                f"{max_length} + 1; lower --max_length or prepare more text"
            )
    return TrainingData(sources, weights or [float(split.num_tokens) for split in splits], seed, sampler, later)


def evaluation_micro_batches(
    windows: Windows, micro_batch_size: int, max_tokens: int, rank: int = 0, world_size: int = 1,
    token_bytes: TokenBytes | None = None, filler_id: int | None = None,
) -> Iterator[MicroBatch]:  # fmt: skip
    """This rank's part of a split, in order and without overlap: every target once, the last row padded.

    At most `max_tokens` targets (rounded up to whole rows) from the start of the split; 0 takes the whole split.
    token_bytes: of the split; what each target stands for comes with it then, as the token column BYTES. filler_id: see
    make_micro_batch.
    """
    length, num_rows = windows.max_length, windows.evaluation_rows(max_tokens)
    begin, end = (num_rows * r // world_size for r in (rank, rank + 1))
    for first in range(begin, end, micro_batch_size):
        rows, columns = [], np.zeros((min(end, first + micro_batch_size) - first, length), dtype=np.float32)
        for row, index in enumerate(range(first, min(end, first + micro_batch_size))):
            size = min(length + 1, windows.split.num_tokens - index * length)
            rows.append(windows.tokens(index * length, size))
            if token_bytes:
                columns[row, : size - 1] = token_bytes.of(index * length + 1, size - 1)
        batch = make_micro_batch(rows, length, filler_id)
        yield replace(batch, token_columns={BYTES: torch.from_numpy(columns)}) if token_bytes else batch


def make_micro_batch(
    rows: list[tuple[np.ndarray, np.ndarray]], length: int | None = None, filler_id: int | None = None
) -> MicroBatch:
    """Rows (tokens (T+1,), document starts in 1 … T) as one micro-batch; shorter rows are padded to `length` targets.

    filler_id: the padding, which is a document of its own then, for models that see both ways; to others nothing of it shows.
    """
    length = length or len(rows[0][0]) - 1
    input_ids = np.full((len(rows), length), filler_id or 0, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
    positions = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
    boundaries = []
    for index, (tokens, starts) in enumerate(rows):
        size = len(tokens) - 1
        input_ids[index, :size] = tokens[:-1]
        targets[index, :size] = tokens[1:]
        targets[index, starts - 1] = IGNORE_INDEX  # the first token of a document cannot be told from the one before
        inside = starts[starts < size]
        if filler_id is not None and size < length:
            inside = np.append(inside, size)
        for start in inside:
            positions[index, start:] = np.arange(length - start)
        boundaries.append(np.concatenate([[0], inside]) + index * length)
    cu_seqlens = None
    if sum(map(len, boundaries)) > len(rows):
        cu_seqlens = pad_boundaries([*np.concatenate(boundaries), len(rows) * length])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=cu_seqlens,
        weight=int((targets != IGNORE_INDEX).sum()),
        num_tokens=sum(len(tokens) - 1 for tokens, _ in rows),
    )
