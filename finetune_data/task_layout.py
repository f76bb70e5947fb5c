"""Which special tokens stand around a text, or around two, and what is cut where these are longer than a model takes?

                    one text          two texts
    BERT            [CLS] a [SEP]     [CLS] a [SEP] b [SEP]     token type 1 from b on
    RoBERTa         <s> a </s>        <s> a </s></s> b </s>     no token types
    a decoder       (bos) a           (bos) a \\n b             bos where its tokenizer.json adds one

An encoder's tokens are those of the template (post_processor) of its tokenizer.json; without one [CLS] and [SEP] as BERT's,
and where the vocabulary lacks these, the end-of-text token in their places.
"""

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from batches.micro_batch import MicroBatch
from batches.packing import Sequence
from dataprep.tokenizers import Tokenizer
from errors import UserError

SECOND_STARTS = "second_starts"  # the column of a sequence: the place of its first token of type 1


@dataclass(frozen=True)
class Layout:
    """The ids before, between and after texts; typed: whether a second text, and what is behind it, has token type 1.

    causal: whether the model reads from left to right, so that only the last token has read everything.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    typed: bool
    causal: bool
    eos_token_id: int

    @property
    def closed(self) -> "Layout":
        """A copy in which something stands behind the last text: the end-of-text token where nothing did."""
        return replace(self, after=self.after or (self.eos_token_id,))

    def room(self, max_length: int, *, pair: bool) -> int:
        """How many tokens of texts fit into max_length. UserError where none do."""
        room = max_length - len(self.before) - len(self.after) - (len(self.between) if pair else 0)
        if room < 1 + pair:
            raise UserError(f"--max_length {max_length} has no room for text beside the special tokens; raise it")
        return room

    def framed(
        self, firsts: SequenceOf[np.ndarray], seconds: SequenceOf[np.ndarray | None], max_length: int
    ) -> tuple[list[Sequence], list[bool]]:
        """(a sequence of at most max_length tokens for each text or pair, whether it was cut).

        The starts of texts are kept; of a pair the longer is cut first. A text of which no token is left is the
        end-of-text token.
        """
        sequences, cut = [], []
        for first, second in zip(firsts, seconds, strict=True):
            room = self.room(max_length, pair=second is not None)
            cut.append(len(first) + (0 if second is None else len(second)) > room)
            if second is None:
                first = first[:room]
            else:
                first, second = cut_longest_first(first, second, room)
            sequence = self.sequence(first, second)
            if not len(sequence.tokens):
                sequence = self.sequence(np.array([self.eos_token_id], dtype=np.int32))
            sequences.append(sequence)
        return sequences, cut

    def second_at(self, first: SequenceOf[int] | np.ndarray) -> int:
        """Where a second text begins in a sequence."""
        return len(self.before) + len(first) + len(self.between)

    def sequence(
        self,
        first: np.ndarray,
        second: np.ndarray | None = None,
        columns: dict[str, float] | None = None,
        token_columns: dict[str, np.ndarray] | None = None,
    ) -> Sequence:
        """One text or two, (n,) int32 each, with the special tokens; no token is a target of the language model's."""
        parts = [self.before, first, *([] if second is None else [self.between, second]), self.after]
        tokens = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        types_from = len(tokens) if second is None or not self.typed else self.second_at(first)
        return Sequence(
            tokens,
            np.zeros(len(tokens), dtype=bool),
            token_columns=token_columns or {},
            columns={SECOND_STARTS: float(types_from), **(columns or {})},
        )


def find_layout(tokenizer: Tokenizer, *, causal: bool) -> Layout:
    """The layout for models of this tokenizer. causal: whether the model is a decoder. Raises UserError."""
    eos = tokenizer.eos_token_id
    processor = tokenizer.definition.get("post_processor")
    before, _, after = _around(processor, ["a"])
    if after:  # a template that closes a text
        pair_before, between, pair_after = _around(processor, ["a", "a"])
        types = _probe(processor, ["a", "a"]).type_ids
        starts = len(pair_before) + 1 + len(between)
        typed = types[starts] == 1
        expected = [0] * starts + [int(typed)] * (len(types) - starts)
        if (pair_before, pair_after) != (before, after) or types != expected:
            raise UserError(
                "the template in tokenizer.json writes two texts in a way that is not known here; "
                "use a tokenizer with BERT's or RoBERTa's"
            )
        return Layout(before, between, after, typed, causal, eos)
    if causal:
        return Layout(before, tuple(tokenizer.encode("\n")), (), False, True, eos)
    ids = {token["content"]: token["id"] for token in tokenizer.definition["added_tokens"]}
    cls, sep = ids.get("[CLS]", eos), ids.get("[SEP]", eos)
    return Layout((cls,), (sep,), (sep,), "[SEP]" in ids, False, eos)


def _probe(processor: dict[str, Any] | None, texts: list[str]) -> Any:
    """What a post-processor makes of one or two texts of one token."""
    definition: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": processor, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }  # fmt: skip
    return HFTokenizer.from_str(json.dumps(definition)).encode(texts[0], texts[1] if len(texts) == 2 else None)


def _around(
    processor: dict[str, Any] | None, texts: list[str]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The special ids before, between and after texts."""
    encoded = _probe(processor, texts)
    places = [place for place, number in enumerate(encoded.sequence_ids) if number is not None]
    first, last = places[0], places[-1]
    between = encoded.ids[first + 1 : last] if len(texts) == 2 else []
    return tuple(encoded.ids[:first]), tuple(between), tuple(encoded.ids[last + 1 :])


def ids_of(ids: list[int]) -> np.ndarray:
    """(n,) int32: a text's ids as a sequence holds them."""
    return np.array(ids, dtype=np.int32)


def cut_longest_first(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Two texts cut to `room` tokens together, the longer one first, their starts kept (transformers' longest_first)."""
    shorter = min(len(first), len(second), room // 2)
    longer = room - shorter
    if len(first) <= len(second):
        return first[:shorter], second[:longer]
    return first[:longer], second[:shorter]


def token_types(batch: MicroBatch) -> Tensor:
    """(B, T) int64: 1 from where the second text of a sequence begins, in models that tell the two apart; else 0."""
    assert batch.sequence_ids is not None
    starts = batch.columns[SECOND_STARTS]
    starts = torch.cat([starts, starts.new_full((1,), torch.inf)])  # one more for the padding
    return (batch.positions >= starts[batch.sequence_ids]).long()
