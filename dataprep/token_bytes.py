"""How many bytes of text does each token of a split stand for, so that they add up to the bytes that were encoded?

A byte-level token without normalisation stands for as many bytes as it has. Any other tokenizer changes the text before it
cuts it (NFC, lower case, a space put before the first word, an unknown character), so that a token has no length of its own.
Then a document's UTF-8 bytes, which the shards keep, are shared out among its tokens in proportion to what they spell: whole
numbers whose sum over the document is exact. Where a folder of an older version has no bytes of documents, those of the whole
split are shared out in the same way.
"""

from functools import cached_property

import numpy as np

from dataprep.shards import TokenSplit
from dataprep.tokenizers import Tokenizer

_BLOCK = 1 << 22


class TokenBytes:
    """The bytes of each token of `split`. exact: sums over documents are; False for a folder of an older version."""

    def __init__(self, split: TokenSplit, tokenizer: Tokenizer) -> None:
        self._split = split
        self._spelled = tokenizer.token_byte_lengths()  # (vocab,)
        self._end = tokenizer.eos_token_id
        self._own = tokenizer.byte_level
        self.exact = self._own or split.has_document_bytes
        self._known = (0, 0, np.empty(0, np.int64))  # the last document's start, stop and bytes

    def of(self, start: int, count: int) -> np.ndarray:
        """(count,) float64: of the tokens [start, start + count) of the split."""
        if self._own:
            return self._spelled[self._split.read(start, count)].astype(np.float64)
        if not self.exact:
            return self._spelled[self._split.read(start, count)] * self._scale
        found = np.empty(count, dtype=np.float64)
        at = start
        while at < start + count:
            begin, stop, shares = self._document(at)
            end = min(stop, start + count)
            found[at - start : end - start] = shares[at - begin : end - begin]
            at = end
        return found

    @cached_property
    def _scale(self) -> float:
        total = self._split.num_tokens
        blocks = (self._split.read(at, min(_BLOCK, total - at)) for at in range(0, total, _BLOCK))
        spelled = sum(int(self._spelled[block].sum(dtype=np.int64)) for block in blocks)
        return self._split.num_bytes / max(1, spelled)

    def _document(self, position: int) -> tuple[int, int, np.ndarray]:
        """(start, stop, bytes of each token) of the document that holds a position; the last one asked for is kept."""
        if not self._known[0] <= position < self._known[1]:
            start, stop, num_bytes = self._split.document_extent(position)
            tokens = self._split.read(start, stop - start)
            weights = self._spelled[tokens].astype(np.int64)
            if not weights.any():  # nothing that spells anything: all unknown, say
                weights = (tokens != self._end).astype(np.int64)
            if not weights.any():  # all of the text was lost on the way
                weights = np.ones(len(tokens), np.int64)
            self._known = start, stop, shared_out(num_bytes, weights)
        return self._known


def shared_out(total: int, weights: np.ndarray) -> np.ndarray:
    """int64 like `weights`, in proportion to them: the differences of rounded-down cumulative shares, so their sum is `total`.

    weights: int64, not negative, some above 0. In Python's integers where the product might not fit.
    """
    sums = np.cumsum(weights)
    whole = int(sums[-1])
    if total * whole < 2**62:
        edges = sums * total // whole
    else:
        edges = np.array([int(part) * total // whole for part in sums], dtype=np.int64)
    return np.diff(edges, prepend=0)
