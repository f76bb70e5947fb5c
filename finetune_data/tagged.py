"""How do the files of words with tags that people have become sentences to tag, and these sequences of tokens?

    CoNLL      a word a line, its tag in the last column, a blank line after each sentence; -DOCSTART- lines are passed over
    rows       .jsonl, .json or .parquet with tokens (or words) and tags (or ner_tags, pos_tags, chunk_tags, labels): names,
               or integers, whose names a .parquet of the `datasets` library keeps

A sentence's words are encoded as the text that they make with spaces between them, so that the pieces of a word are those it
has in running text. The first piece of a word carries its tag; the others, and special tokens, carry none.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from batches.micro_batch import IGNORE_INDEX, MicroBatch
from batches.packing import Sequence
from dataprep.tokenizers import Tokenizer
from errors import UserError
from finetune_data.example_files import type_in_words
from finetune_data.task_layout import Layout
from finetune_data.task_rows import (
    WrongRowError,
    check_text,
    convert_rows,
    in_label_order,
    label_id,
    no_column,
    read_lines,
    read_task_rows,
    stored_name,
    stored_names,
)

WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")
_ROW_FILES = (".jsonl", ".json", ".parquet")
_DOCUMENT = "-DOCSTART-"
TAG = "tag"  # the column of a token, see `encode_tagged`


@dataclass(frozen=True)
class TaggedWords:
    """A sentence: words, the id of each one's tag, and where it is from, "file:row" or "file:line"."""

    words: tuple[str, ...]
    tags: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class TaggedSet:
    """All sentences of some files, the tags' names in the order of their ids, and sentences on what was read and left out."""

    examples: list[TaggedWords]
    names: tuple[str, ...]
    report: list[str]


class _Row(NamedTuple):
    words: list[str]
    tags: list[str]
    source: str


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_tagged(
    paths: SequenceOf[str | Path], *, rename: dict[str, str] | None = None, names: SequenceOf[str] = ()
) -> TaggedSet:
    """The sentences of files, in their order.

    rename: {their column: the column it is to us}, for files of rows. names: the tags where they are known, as for held-out
    sentences. UserError for a file that cannot be read or has not these columns, for a sentence with more or fewer tags
    than words, and for a tag that is not among `names`.
    """
    rows: list[_Row] = []
    report: list[str] = []
    known = tuple(names)
    for path in map(Path, paths):
        if path.name.lower().removesuffix(".gz").endswith(_ROW_FILES):
            found, stored, left_out = _read_rows(path, rename or {})
            known = known or stored
        else:
            found, left_out = _read_conll(path), []
        rows += found
        report += [f"{path}: {len(found)} sentences of {sum(len(row.words) for row in found):,} words", *left_out]
    if not rows:
        raise UserError("no file of tagged words is named; name at least one")
    known = known or in_label_order({tag for row in rows for tag in row.tags})
    ids = {name: index for index, name in enumerate(known)}
    examples = []
    for row in rows:
        tags = tuple(ids[tag] if tag in ids else label_id(row.source, tag, known) for tag in row.tags)
        examples.append(TaggedWords(tuple(row.words), tags, row.source))
    return TaggedSet(examples, known, [*report, f"tags: {', '.join(known)}"])


def _read_conll(path: Path) -> list[_Row]:
    sentences: list[_Row] = []
    words: list[str] = []
    tags: list[str] = []
    starts = 0
    for number, line in enumerate([*read_lines(path), ""], start=1):
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
        if line.strip() and not line.startswith(_DOCUMENT):
            if len(fields) < 2 or not fields[-1]:
                raise UserError(
                    f"{path}:{number} has a word without a tag; each line is a word, a space or tab, its tag"
                )
            starts = starts if words else number
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            sentences.append(_Row(words, tags, f"{path}:{starts}"))
            words, tags = [], []
    if not sentences:
        raise UserError(f"{path} holds no word with a tag")
    return sentences


def _read_rows(path: Path, rename: dict[str, str]) -> tuple[list[_Row], tuple[str, ...], list[str]]:
    rows = read_task_rows(path, rename)
    present = {column: None for _, row in rows if isinstance(row, dict) for column in row}
    words = next((name for name in WORDS if name in present), None)
    tags = next((name for name in _TAGS if name in present), None)
    if words is None or tags is None:
        raise no_column(path, present, "tokens" if words is None else "tags")
    stored = stored_names(path, tags, rename)

    def convert(number: int, row: dict[str, Any]) -> _Row:
        held, marks = row.get(words), row.get(tags)
        for column, value in ((words, held), (tags, marks)):
            if not isinstance(value, list) or not value:
                raise WrongRowError(f"{column} is {type_in_words(value) if value else 'empty'}, not a list")
        assert held and marks
        if not all(isinstance(word, str) for word in held):
            raise WrongRowError(f"{words} are not all texts")
        check_text(held)
        if len(held) != len(marks):
            raise UserError(f"{path}:{number} has {len(held)} {words} but {len(marks)} {tags}; give each word one tag")
        return _Row(held, [_tag(path, number, mark, stored) for mark in marks], f"{path}:{number}")

    found, left_out = convert_rows(path, rows, convert)
    return found, stored, left_out


def _tag(path: Path, number: int, mark: Any, stored: tuple[str, ...]) -> str:
    if isinstance(mark, bool) or not isinstance(mark, str | int):
        raise UserError(f"{path}:{number} has {type_in_words(mark)} as a tag; give a name or an integer")
    return str(stored_name(mark, stored))


# ---- encoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedSentences:
    """A sequence for each sentence, in order, and the place in it of each word's first piece, (words,) int32, -1 for none.

    truncated: whether each was cut. words_without_place: words that were cut off, or of which the tokenizer leaves nothing.
    """

    sequences: list[Sequence]
    places: list[np.ndarray]
    truncated: list[bool]
    words_without_place: int


def encode_tagged(
    tokenizer: Tokenizer, layout: Layout, examples: SequenceOf[TaggedWords], *, max_length: int
) -> EncodedSentences:
    """Sentences as sequences of at most max_length tokens, their starts kept; `batch_tags` reads the tags off a micro-batch.

    The column "tag" of a token holds 1 + the tag of the token *before* it, or 0: packing.py lays a token's figure beside
    the one that predicts it, here its own. So a special token stands behind every sentence. Raises UserError.
    """
    layout = layout.closed
    room = layout.room(max_length, pair=False)
    encoded = tokenizer.encode_batch_with_offsets([" ".join(example.words) for example in examples])
    sequences, places = [], []
    for example, (ids, offsets) in zip(examples, encoded, strict=True):
        first = _first_pieces(example.words, offsets[:room])
        first[first >= 0] += len(layout.before)
        length = len(layout.before) + min(len(ids), room) + len(layout.after)
        marks = np.zeros(length, dtype=np.float32)
        marks[first[first >= 0] + 1] = np.array(example.tags)[first >= 0] + 1
        sequences.append(layout.sequence(ids[:room], token_columns={TAG: marks}))
        places.append(first)
    missing = sum(int((first < 0).sum()) for first in places)
    return EncodedSentences(sequences, places, [len(ids) > room for ids, _ in encoded], missing)


def _first_pieces(words: SequenceOf[str], offsets: np.ndarray) -> np.ndarray:
    """(words,) int32: the first piece of each word, -1 where there is none. The space before a word is part of it."""
    ends = np.cumsum([len(word) + 1 for word in words])  # behind the space
    starts = ends - [len(word) + 1 for word in words]
    text = " ".join(words)
    first = np.full(len(words), -1, dtype=np.int32)
    for piece in range(len(offsets) - 1, -1, -1):
        begin, end = map(int, offsets[piece])
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        first[int(np.searchsorted(starts, begin, side="right")) - 1] = piece
    return first


def batch_tags(batch: MicroBatch) -> Tensor:
    """(B, T) int64: the tag of each token that is a word's first piece, IGNORE_INDEX for the others."""
    marks = batch.token_columns[TAG].long()
    return (marks - 1).masked_fill(marks == 0, IGNORE_INDEX)


def outside(names: SequenceOf[str]) -> int:
    """The id of the tag of words that are nothing; -1 where there is none."""
    return names.index("O") if "O" in names else -1


def word_tags(predicted: np.ndarray, places: np.ndarray, *, missing: int) -> np.ndarray:
    """(words,) int64: of each word the tag that was predicted at its place in (n,) `predicted`, `missing` where it has none.

    So that figures are over all words: those beyond max_length count as `missing`, usually the id of "O".
    """
    tags = np.full(len(places), missing, dtype=np.int64)
    tags[places >= 0] = predicted[places[places >= 0]]
    return tags
