"""How do documents become BERT's pairs, of which the second part follows the first in half of the cases?

Next sentence prediction (Devlin et al. 2019, §3.1 and A.2): a row is [CLS] A [SEP] B [SEP]. A is a span of a document. B is what
follows A there (label 0), or a span of another document (label 1). Everything is a function of the sample's number:

  1. a source is cut into windows of as many tokens as a row has room for; sample t is a window of one source (sampler.py),
     so that an epoch begins in every part of the text once
  2. a token of the window is drawn; the span of its document around it that fills the row, or the whole document, is cut
     at a drawn place: A, and what follows A
  3. for label 1, the span of another document, found by tokens drawn from the whole source, is cut after as many tokens,
     and B is its rest

Both kinds of rows so have parts that begin and end alike, and as long as each other: only what they say tells the label. BERT
takes sentences, and makes a tenth of the rows shorter on purpose; here a cut may fall within a sentence, and rows are shorter
where documents are. A document of one token, of which nothing could follow, is no A.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from batches.micro_batch import IGNORE_INDEX, MicroBatch, pad_boundaries
from batches.sampler import SAMPLER_VERSION, Mixture, hash_key, locate, passes
from dataprep.shards import TokenSplit
from dataprep.tokenizers import Tokenizer
from errors import UserError

TOKEN_TYPES = "token_types"  # token column, int64: 0 for [CLS] A [SEP], 1 for B [SEP]
NOT_NEXT = "not_next"  # column, int64: 0 where B follows A, else 1, as in BERT and transformers

_NUM_SPECIAL = 3  # of a row
_PAIR_KEY = 2  # the sampler's keys of the same seed begin with 0 and 1
_TOKEN, _CUT, _LABEL, _OTHER = range(4)  # what a draw is for
_NUM_DRAWN = 16  # documents that are drawn in search of one
_WIDTH_MULTIPLE = 64  # few widths occur, so kernels compile for few


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) of a split, all of document `document`, without its [CLS] and its end-of-text token."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pair:
    """Parts of one split, each of a token at least. label: 0 where `second` follows `first`, else 1."""

    source: int
    first: Span
    second: Span
    label: int


@dataclass(frozen=True)
class SentencePairs:
    """The sources of a run, mixed by `weights`, `later` on otherwise, as rows of at most `max_length` tokens."""

    sources: list[TokenSplit]
    weights: list[float]
    max_length: int
    seed: int
    cls_id: int
    sep_id: int
    pad_id: int
    sampler: int = SAMPLER_VERSION
    later: Mixture = ()

    @property
    def room(self) -> int:
        """Tokens of A and B together."""
        return self.max_length - _NUM_SPECIAL

    @property
    def num_samples(self) -> int:
        """Of one pass."""
        return sum(map(self.num_windows, range(len(self.sources))))

    def num_windows(self, source: int) -> int:
        return -(-self.sources[source].num_tokens // self.room)

    def epoch(self, first: int) -> float:
        """How many times the first source's windows have been seen after `first` samples (as a fraction)."""
        return passes(first, num_windows=self.num_windows(0), weights=self.weights, later=self.later)

    def pairs(self, first: int, count: int) -> Iterator[Pair]:
        """The pairs of samples first … first+count-1."""
        sizes = [self.num_windows(source) for source in range(len(self.sources))]
        samples = locate(
            first, count, num_windows=sizes, weights=self.weights, seed=self.seed, version=self.sampler, later=self.later
        )  # fmt: skip
        places = zip(samples.source.tolist(), samples.window.tolist(), strict=True)
        for sample, (source, window) in enumerate(places, first):
            yield self._pair(hash_key(self.seed, _PAIR_KEY, sample), source, window)

    def documents(self, first: int, count: int) -> list[str]:
        """From which documents these samples are, each by its file and place."""
        parts = [(pair.source, part) for pair in self.pairs(first, count) for part in (pair.first, pair.second)]
        return list(dict.fromkeys(self.sources[source].document(part.document).place for source, part in parts))

    def micro_batches(
        self, first: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[MicroBatch]:
        """The micro-batches of one rank for the step whose samples are first … first+batch_size-1, as windows.py shares them.

        Their targets are IGNORE_INDEX and their weight is 0 until masks are drawn (masking.py); TOKEN_TYPES and NOT_NEXT are
        among their columns. [CLS] is the first token of each row, and padding after a pair is a document of its own.
        """
        begin, end = (first + batch_size * r // world_size for r in (rank, rank + 1))
        return [
            self._micro_batch(list(self.pairs(at, min(micro_batch_size, end - at))))
            for at in range(begin, end, micro_batch_size)
        ]

    def evaluation_rows(self, max_tokens: int) -> int:
        """How many rows of a single source an evaluation on `max_tokens` tokens (0: on all) reads."""
        rows = self.num_windows(0)
        return min(rows, -(-max_tokens // self.max_length)) if max_tokens else rows

    def evaluation_micro_batches(
        self, micro_batch_size: int, max_tokens: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[MicroBatch]:
        """This rank's part of the first epoch of a single source, or of its first rows, for max_tokens tokens (0: all)."""
        num_rows = self.evaluation_rows(max_tokens)
        begin, end = (num_rows * r // world_size for r in (rank, rank + 1))
        for at in range(begin, end, micro_batch_size):
            yield self._micro_batch(list(self.pairs(at, min(micro_batch_size, end - at))))

    def _pair(self, key: int, source: int, window: int) -> Pair:
        split = self.sources[source]
        begin = window * self.room
        token = begin + hash_key(key, _TOKEN) % min(self.room, split.num_tokens - begin)
        drawn = chain([self._span(split, token, key)], self._drawn_spans(split, hash_key(key, _TOKEN)))
        span = next((span for span in drawn if len(span) >= 2), None)
        span = span or self._next_document(split, token, key, lambda span: len(span) >= 2)
        cut = 1 + hash_key(key, _CUT) % (len(span) - 1)
        first, second = replace(span, stop=span.start + cut), replace(span, start=span.start + cut)
        label = hash_key(key, _LABEL) & 1
        return Pair(source, first, self._second_of_another(split, key, first) if label else second, label)

    def _second_of_another(self, split: TokenSplit, key: int, first: Span) -> Span:
        """What is left of another document's span after as many tokens as `first` has.

        A true pair of m tokens is cut after so many of them with the chance 1 / (m - 1). So of the spans that are drawn, one of
        m tokens has this weight, and what `first` has tells as much of B's length as in a true pair (importance resampling).
        Where none is long enough, B is the second half of the longest, or its end where less has room.
        """
        cut, key = len(first), hash_key(key, _OTHER)
        spans = [span for span in self._drawn_spans(split, key) if span.document != first.document and len(span) > 0]
        if longer := [span for span in spans if len(span) > cut]:
            shares = np.cumsum([1.0 / (len(span) - 1) for span in longer])
            drawn = (hash_key(key, _CUT) >> 11) / 2**53 * shares[-1]
            span = longer[min(int(np.searchsorted(shares, drawn, side="right")), len(longer) - 1)]
            return replace(span, start=span.start + cut)
        span = max(spans, key=len, default=None) or self._next_document(
            split, first.start, key, lambda span: span.document != first.document and len(span) > 0
        )
        return replace(span, start=span.stop - min(len(span) - len(span) // 2, self.room - cut))

    def _drawn_spans(self, split: TokenSplit, key: int) -> Iterator[Span]:
        """Spans around tokens that are drawn from the whole split."""
        for number in range(_NUM_DRAWN):
            yield self._span(split, hash_key(key, _TOKEN, number) % split.num_tokens, key)

    def _next_document(self, split: TokenSplit, position: int, key: int, fits: Callable[[Span], bool]) -> Span:
        """A span of the first document after that at `position` of which one fits; where none does that was drawn."""
        number = split.document_at(position).document
        for step in range(1, split.num_documents):
            document = split.document((number + step) % split.num_documents)
            if fits(span := self._span(split, document.start, key)):
                return span
        raise AssertionError("makes_pairs said that there is one")

    def _span(self, split: TokenSplit, position: int, key: int) -> Span:
        """Up to `room` tokens around `position`, all of its document."""
        document = split.document_at(position)
        start, stop = document.start, document.stop - 1
        start += int(split.read(start, 1)[0] == self.cls_id)
        if stop - start > self.room:
            position = min(max(position, start), stop - 1)
            low, high = max(start, position - self.room + 1), min(position, stop - self.room)
            start = low + hash_key(key, _CUT, position) % (high - low + 1)
            stop = start + self.room
        return Span(document.document, start, stop)

    def _micro_batch(self, pairs: list[Pair]) -> MicroBatch:
        sizes = [len(pair.first) + len(pair.second) + _NUM_SPECIAL for pair in pairs]
        width = min(self.max_length, -(-max(sizes) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)
        shape = len(pairs), width
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        positions = np.tile(np.arange(width, dtype=np.int64), (len(pairs), 1))
        token_types = np.zeros(shape, dtype=np.int64)
        boundaries = []
        for row, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
            split = self.sources[pair.source]
            first, second = (split.read(part.start, len(part)) for part in (pair.first, pair.second))
            input_ids[row, :size] = [self.cls_id, *first, self.sep_id, *second, self.sep_id]
            token_types[row, len(first) + 2 : size] = 1
            boundaries.append(row * width)
            if size < width:
                boundaries.append(row * width + size)
                positions[row, size:] = np.arange(width - size)
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            targets=torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            cu_seqlens=pad_boundaries([*boundaries, shape[0] * width]) if len(boundaries) > len(pairs) else None,
            weight=0,
            num_tokens=sum(sizes),
            token_columns={TOKEN_TYPES: torch.from_numpy(token_types)},
            columns={NOT_NEXT: torch.tensor([pair.label for pair in pairs])},
        )


def makes_pairs(split: TokenSplit, tokenizer: Tokenizer) -> bool:
    """Whether one document has two tokens, a part and what follows it, and another has one."""
    with_one = with_two = 0
    for number in range(split.num_documents):
        start, stop = split.document(number).start, split.document(number).stop - 1
        size = stop - start - int(split.read(start, 1)[0] == tokenizer.cls_token_id)
        with_one, with_two = with_one + (size >= 1), with_two + (size >= 2)
        if with_one >= 2 and with_two:
            return True
    return False


def open_sentence_pairs(
    splits: list[TokenSplit], weights: list[float], tokenizer: Tokenizer, *, max_length: int, seed: int,
    sampler: int = SAMPLER_VERSION, later: Mixture = (),
) -> SentencePairs:  # fmt: skip
    """Pairs of opened splits, mixed by `weights` (empty: by their numbers of tokens), `later` on otherwise. UserError."""
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError(
            "the tokenizer has no [CLS] and [SEP], which sentence pairs need; prepare the data with --tokenizer_type wordpiece, "
            "or bpe and --encoder_tokens"
        )
    if max_length < _NUM_SPECIAL + 2:
        raise UserError(f"--max_length {max_length} has no room for a pair; the least is {_NUM_SPECIAL + 2}")
    for split in splits:
        if not makes_pairs(split, tokenizer):
            raise UserError(
                f"the {split.split} split has no two documents of which pairs can be made; prepare more text, or train "
                "without --next_sentence"
            )
    return SentencePairs(
        sources=splits,
        weights=weights or [float(split.num_tokens) for split in splits],
        max_length=max_length,
        seed=seed,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.filler_id,
        sampler=sampler,
        later=later,
    )
