"""What are the rows that `utils.py predict` reads, and how do their texts go through a model together?

    .txt            a text a line
    others          the columns text (or sentence), or a pair such as text_a and text_b (finetune_data/labelled.py)
    stdin           JSON objects, one a line, if the first line is one; else a text a line

Texts of a batch lie one behind another in rows as long as the longest of them. Attention does not cross them, so that a text
gives what it gives alone.
"""

import json
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from batches.packing import Sequence, pack
from dataprep.tokenizers import Tokenizer
from finetune_data.example_files import Row, read_rows, rows_of_lines
from finetune_data.labelled import PAIRS, TEXTS
from finetune_data.task_layout import Layout, ids_of, token_types
from finetune_data.task_rows import WrongRowError, read_lines, text_in
from model import Transformer

T = TypeVar("T")
Result = dict[str, Any]  # what is known of a row, by names that JSON takes


@dataclass(frozen=True)
class Reader:
    """A model, and how texts become its tokens: at most max_length of them, special ones included."""

    model: Transformer
    tokenizer: Tokenizer
    layout: Layout
    max_length: int


@dataclass(frozen=True)
class Predictor(Generic[T]):
    """prepare: what is read of a row's columns, or WrongRowError. predict: a result for each of some such, in order."""

    prepare: Callable[[dict[str, Any]], T]
    predict: Callable[[list[T]], list[Result]]


class Texts(NamedTuple):
    """A text, or two that belong together."""

    first: str
    second: str | None = None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_input(where: str) -> list[Row]:
    """The rows of a file, or of stdin where it is "-", each with its number from 1; a str says why one is no row."""
    if where == "-":
        text = sys.stdin.read()
        return rows_of_lines(text) if _is_object(text.lstrip().partition("\n")[0]) else _rows_of_texts(text.split("\n"))
    path = Path(where)
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        return _rows_of_texts(read_lines(path))
    return read_rows(path)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _rows_of_texts(lines: list[str]) -> list[Row]:
    lines = lines[:-1] if lines[-1] == "" else lines  # what is behind the last line's end
    return [(number, {"text": line}) for number, line in enumerate(lines, start=1)]


def read_texts(row: dict[str, Any]) -> Texts:
    """The text of a row, or both. Raises WrongRowError."""
    if pair := next((pair for pair in PAIRS if all(side in row for side in pair)), None):
        return Texts(*(text_in(row, side) for side in pair))
    if text := next((name for name in TEXTS if name in row), None):
        return Texts(text_in(row, text))
    raise WrongRowError(f"no column text, or text_a and text_b, among {', '.join(row) or 'none'}")


# ---- through the model -----------------------------------------------------------------------------------------------


def encode_texts(reader: Reader, texts: list[Texts], *, masks: bool = False) -> tuple[list[Sequence], list[Result]]:
    """A sequence for each, and {"truncated": True} for each that was cut, else {}. masks: whether texts spell masks.

    Of a pair the longer text is cut first. A text of which no token is left is the end-of-text token.
    """
    encode = reader.tokenizer.encode_batch_with_masks if masks else reader.tokenizer.encode_batch
    firsts = [ids_of(ids) for ids in encode([one.first for one in texts])]
    of_pairs = iter(encode([one.second for one in texts if one.second is not None]))
    seconds = [None if one.second is None else ids_of(next(of_pairs)) for one in texts]
    sequences, cut = reader.layout.framed(firsts, seconds, reader.max_length)
    return sequences, [{"truncated": True} if one else {} for one in cut]


@torch.inference_mode()
def outputs(reader: Reader, sequences: SequenceOf[Sequence]) -> list[Tensor]:
    """What the model gives for each token of each sequence: hidden states (n, H), or a task's logits (n, K)."""
    model = reader.model
    longest = max(len(sequence.tokens) for sequence in sequences)
    # rows no wider than that: nothing is compiled, so that few widths would gain nothing
    (batch,) = pack([[one] for one in sequences], max_length=longest, micro_batch_size=len(sequences), fixed_width=True)
    batch = batch.to(next(model.parameters()).device)
    types = token_types(batch) if model.config.type_vocab_size > 1 else None
    found = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=longest, token_types=types)
    return [found.flatten(0, 1)[place] for place in batch.places]


def numbers(values: Tensor) -> list[float]:
    """(n,) floats with the fewest digits that give the same float32 again."""
    return [float(str(value)) for value in values.float().cpu().numpy()]
