"""How do the files of texts with labels that people have become examples to classify, and these sequences of tokens?

    text         text or sentence; or a pair: text_a + text_b, sentence1 + sentence2, premise + hypothesis, … (PAIRS)
    label        one in `label` (or labels, gold_label, score, Quality); several as a list, or in `labels` as "a|b"

    kind         labels of the rows
    single       texts, integers, true and false: one of several classes
    multi        lists of texts or integers, or of as many 0 and 1 as there are labels: any of them, also none
    regression   numbers with a fraction part, one or a list of as many in each row: figures to predict

Files: those of example_files.py; a .tsv or .csv of two columns without a header, one of them the label; and .txt whose lines
begin with the label (SST-2: "1 a fine film", fastText: "__label__good a fine film").
"""

import json
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batches.micro_batch import MicroBatch
from batches.packing import Sequence
from dataprep.tokenizers import Tokenizer
from errors import UserError
from finetune_data.example_files import type_in_words
from finetune_data.task_layout import Layout, ids_of
from finetune_data.task_rows import (
    Rows,
    WrongRowError,
    convert_rows,
    in_label_order,
    is_whole,
    label_id,
    no_column,
    read_lines,
    read_task_rows,
    stored_name,
    stored_names,
    text_in,
)

KINDS = ("single", "multi", "regression")

PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("#1 String", "#2 String"),  # the paraphrase corpus of Microsoft Research as it was published
)
TEXTS = ("text", "sentence")
_LABELS = ("label", "labels", "gold_label", "score", "Quality")
_FASTTEXT = "__label__"
_DETECTION_ROWS = 20  # a column may be empty in the first row

Label = int | tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True)
class Labels:
    """What is to be predicted. names: of the classes, in the order of their ids; none in a regression.

    num_outputs: classes, or figures of a regression. flags: several labels are said as a list of 0 and 1, one for each.
    Where it is given to `read_labelled`, what is empty is found.
    """

    kind: str = ""
    names: tuple[str, ...] = ()
    num_outputs: int = 0
    flags: bool = False


@dataclass(frozen=True)
class LabelledText:
    """A row. second: of a pair, else None. source: "file:row", from 1.

    label: a class's id (single), the ids of all that hold (multi), or the figures (regression).
    """

    text: str
    second: str | None
    label: Label
    source: str


@dataclass(frozen=True)
class LabelledSet:
    """All examples of some files, what their labels are, and sentences on what was read and left out."""

    examples: list[LabelledText]
    labels: Labels
    report: list[str]


class _Row(NamedTuple):
    text: str
    second: str | None
    value: Any  # the label as it is in the file
    source: str


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_labelled(
    paths: SequenceOf[str | Path], *, rename: dict[str, str] | None = None, wanted: Labels | None = None
) -> LabelledSet:
    """The examples of files, in their order.

    rename: {their column: the column it is to us}. wanted: what the labels are, as far as it is known: all of it for held-out
    examples, the names for a model that has them. Rows that are no examples are left out and named in the report. UserError
    for a file that cannot be read or has not these columns, and for a label that is not among the wanted ones.
    """
    wanted = wanted or Labels()
    if wanted.kind not in ("", *KINDS):
        raise UserError(f"labels of kind {wanted.kind!r} are not known; choose {', '.join(KINDS)}")
    rows: list[_Row] = []
    report: list[str] = []
    for path in map(Path, paths):
        found, columns, names, left_out = _read_file(path, rename or {})
        if names and not wanted.names:
            wanted = replace(wanted, names=names)
        rows += _with_lists(found, is_several=columns.endswith("labels"))
        report += [f"{path}: {len(found)} examples ({columns})", *left_out]
    if not rows:
        raise UserError("no file of labelled texts is named; name at least one")
    kind = wanted.kind or _kind_of(rows)
    if kind == "regression":
        labels, values = _figures(rows, wanted)
    elif kind == "multi":
        labels, values = _classes_of_each(rows, wanted)
    else:
        labels, values = _one_class_each(rows, wanted)
    examples = [LabelledText(row.text, row.second, value, row.source) for row, value in zip(rows, values, strict=True)]
    shown = ", ".join(labels.names[:10]) + (", ..." if len(labels.names) > 10 else "")
    report.append(f"labels: {kind}, {labels.num_outputs} {f'({shown})' if shown else 'figures'}")
    return LabelledSet(examples, labels, report)


def _read_file(path: Path, rename: dict[str, str]) -> tuple[list[_Row], str, tuple[str, ...], list[str]]:
    """The rows of a file; the columns they are from, the label's last; names that it keeps for its labels; a report."""
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        rows: Rows = _labelled_lines(path)
    else:
        rows = _without_header(path, read_task_rows(path, rename))
    present = {column: None for _, row in _first_columns(rows) for column, value in row.items() if value is not None}
    texts: tuple[str, ...] | None = next((pair for pair in PAIRS if all(side in present for side in pair)), None)
    texts = texts or next(((name,) for name in TEXTS if name in present), None)
    label = next((name for name in _LABELS if name in present), None)
    if texts is None or label is None:
        missing = "text (or text_a and text_b)" if texts is None else "label"
        raise no_column(path, present, missing)
    names = stored_names(path, label, rename)

    def convert(number: int, row: dict[str, Any]) -> _Row:
        first, *second = (text_in(row, column) for column in texts)
        value = row.get(label)
        if value is None or value == "" or value != value:  # nan, what pandas writes for none
            raise WrongRowError(f"no {label}")
        if names and value == -1:  # what `datasets` writes for a class that nobody knows
            raise WrongRowError(f"{label} -1, which is that of unlabelled rows")
        return _Row(first, second[0] if second else None, stored_name(value, names), f"{path}:{number}")

    found, left_out = convert_rows(path, rows, convert)
    return found, ", ".join((*texts, label)), names, left_out


def _first_columns(rows: Rows) -> Rows:
    return [row for row in rows if isinstance(row[1], dict)][:_DETECTION_ROWS]


def _without_header(path: Path, rows: Rows) -> Rows:
    """The rows of a table of two columns whose header is itself an example: one of its fields is a label of rows below."""
    known = {*TEXTS, *_LABELS, *(side for pair in PAIRS for side in pair)}
    good = [row for _, row in rows if isinstance(row, dict)]
    header = list(good[0])
    is_table = path.name.lower().removesuffix(".gz").endswith((".tsv", ".csv"))
    if not is_table or len(header) != 2 or known & set(header):
        return rows
    distinct = {column: {row[column] for row in good} for column in header}
    text, label = sorted(header, key=lambda column: len(distinct[column]), reverse=True)
    if label not in distinct[label]:
        return rows
    first = (1, {"text": text, "label": label})
    return [
        first,
        *((n + 1, {"text": row[text], "label": row[label]} if isinstance(row, dict) else row) for n, row in rows),
    ]


def _labelled_lines(path: Path) -> Rows:
    lines = [(number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty")
    if any(word.startswith(_FASTTEXT) for word in lines[0][1].split()):
        parts = [(number, line.split()) for number, line in lines]
        marks = [(n, [word for word in words if word.startswith(_FASTTEXT)], words) for n, words in parts]
        several = any(len(names) != 1 for _, names, _ in marks)
        return [
            (n, {"text": " ".join(word for word in words if word not in names), **_fasttext_label(names, several)})
            for n, names, words in marks
        ]
    pairs = [(number, line.split(maxsplit=1)) for number, line in lines]
    if len({pair[0] for _, pair in pairs}) > max(2, len(pairs) / 2):
        raise UserError(
            f"{path} does not begin each line with a label; give lines such as '1 a fine film' or '__label__good a fine "
            "film', or a .tsv, .csv or .jsonl file with the columns text and label"
        )
    return [(n, {"label": pair[0], "text": pair[1]} if len(pair) == 2 else "a label alone") for n, pair in pairs]


def _fasttext_label(marks: list[str], several: bool) -> dict[str, Any]:
    names = [mark.removeprefix(_FASTTEXT) for mark in marks]
    return {"labels": names} if several else {"label": names[0]}


# ---- labels ----------------------------------------------------------------------------------------------------------


def _with_lists(rows: list[_Row], is_several: bool) -> list[_Row]:
    """Rows in which a label that says several is a list: JSON's in a table's cell, and "a|b" in the column `labels`."""

    def parsed(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            try:
                return json.loads(value)
            except ValueError:
                return value
        return value

    rows = [row._replace(value=parsed(row.value)) for row in rows]
    if is_several and any(isinstance(row.value, str) and "|" in row.value for row in rows):
        return [
            row._replace(value=[part.strip() for part in row.value.split("|") if part.strip()])
            if isinstance(row.value, str)
            else row
            for row in rows
        ]
    return rows


def _kind_of(rows: list[_Row]) -> str:
    values = [row.value for row in rows]
    if any(isinstance(value, list) for value in values):
        inner = [one for value in values if isinstance(value, list) for one in value]
        return "regression" if any(isinstance(one, float) and one not in (0, 1) for one in inner) else "multi"
    if all(isinstance(value, str) for value in values):
        figures = all(_is_figure(value) for value in values)
        return "regression" if figures and not all(is_whole(value.strip()) for value in values) else "single"
    is_number = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    return "regression" if all(is_number) and any(isinstance(value, float) for value in values) else "single"


def _is_figure(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _name(source: str, value: Any) -> str:
    """A label's name: a text as it is, a whole number's digits, true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise UserError(f"{source} has as its label {type_in_words(value)}; give a text or a number")


def _one_class_each(rows: list[_Row], wanted: Labels) -> tuple[Labels, list[Label]]:
    names = [_name(row.source, row.value) for row in rows]
    known = wanted.names or in_label_order(set(names))
    if len(known) < 2:
        raise UserError(
            f"every row of {rows[0].source.rpartition(':')[0]} has the label {known[0]!r}; give two or more"
        )
    ids: list[Label] = [label_id(row.source, name, known) for row, name in zip(rows, names, strict=True)]
    return Labels("single", known, len(known)), ids


def _classes_of_each(rows: list[_Row], wanted: Labels) -> tuple[Labels, list[Label]]:
    lists = [row.value if isinstance(row.value, list) else [row.value] for row in rows]
    width = _multi_hot_width(lists, wanted.num_outputs if wanted.flags else 0)
    if width and len(wanted.names or range(width)) != width:
        raise UserError(f"{rows[0].source} says 0 or 1 of {width} labels, but {len(wanted.names)} are named")
    if width:
        known = wanted.names or tuple(map(str, range(width)))
        return Labels("multi", known, width, flags=True), [
            tuple(i for i, one in enumerate(held) if one) for held in lists
        ]
    names = [[_name(row.source, one) for one in held] for row, held in zip(rows, lists, strict=True)]
    known = wanted.names or in_label_order({name for held in names for name in held})
    ids: list[Label] = [
        tuple(sorted({label_id(row.source, name, known) for name in held}))
        for row, held in zip(rows, names, strict=True)
    ]
    return Labels("multi", known, len(known)), ids


def _multi_hot_width(lists: list[list[Any]], wanted: int) -> int:
    """The labels of lists that say 0 or 1 of each; 0 for lists of ids, which differ in length or name none twice.

    wanted: how many labels the lists that were learned from spoke of, if these did so; 0 where that is not known.
    """
    width = len(lists[0])
    flags = all(
        len(held) == width and all(isinstance(one, int | float) and one in (0, 1) for one in held) for held in lists
    )
    return width if flags and (width == wanted or any(len(set(held)) < width for held in lists)) else 0


def _figures(rows: list[_Row], wanted: Labels) -> tuple[Labels, list[Label]]:
    made: list[Label] = []
    count = wanted.num_outputs
    for row in rows:
        held = row.value if isinstance(row.value, list) else [row.value]
        if not all(_is_figure(str(one)) for one in held):
            raise UserError(
                f"{row.source} has the label {row.value!r}, which is no number; correct it or leave the row out"
            )
        count = count or len(held)
        if len(held) != count:
            raise UserError(
                f"{row.source} has {len(held)} figures as its label, but others {count}; give as many in each"
            )
        made.append(tuple(map(float, held)))
    return Labels("regression", (), count), made


# ---- encoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTexts:
    """A sequence for each example, in order, with its labels as columns (see `batch_labels`); truncated: how many were cut."""

    sequences: list[Sequence]
    truncated: int


def encode_labelled(
    tokenizer: Tokenizer, layout: Layout, examples: SequenceOf[LabelledText], labels: Labels, *, max_length: int
) -> EncodedTexts:
    """Examples as sequences of at most max_length tokens, the starts of texts kept; of a pair the longer is cut first."""
    firsts = tokenizer.encode_batch([example.text for example in examples])
    of_pairs = iter(tokenizer.encode_batch([example.second for example in examples if example.second is not None]))
    seconds = [None if example.second is None else ids_of(next(of_pairs)) for example in examples]
    framed, cut = layout.framed([ids_of(one) for one in firsts], seconds, max_length)
    sequences = [
        replace(sequence, columns=sequence.columns | _columns(example, labels))
        for sequence, example in zip(framed, examples, strict=True)
    ]
    return EncodedTexts(sequences, sum(cut))


def _columns(example: LabelledText, labels: Labels) -> dict[str, float]:
    if isinstance(example.label, int):
        return {"label": float(example.label)}
    if labels.kind == "multi":
        return {f"label_{index}": float(index in example.label) for index in range(labels.num_outputs)}
    return {f"label_{index}": value for index, value in enumerate(example.label)}


def batch_labels(batch: MicroBatch, labels: Labels) -> Tensor:
    """The labels of a micro-batch's sequences: (sequences,) int64 ids, or (sequences, num_outputs) float32.

    The latter are 1.0 and 0.0 (multi) or the figures (regression).
    """
    if labels.kind == "single":
        return batch.columns["label"].long()
    return torch.stack([batch.columns[f"label_{index}"] for index in range(labels.num_outputs)], dim=1)
