"""Which rows of a file have what a task asks for (classification, tagging, answers), and which are left out and why?"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from errors import UserError
from finetune_data.example_files import read_rows, read_text, strings_in, type_in_words

T = TypeVar("T")
Rows = list[tuple[int, Any]]  # (number, from 1, columns), or a str that says why a row is none

_NAMED_ROWS = 5  # of each reason


class WrongRowError(Exception):
    """Why a row is no example, in a few words; such a row is left out, counted, and named."""


def read_task_rows(path: Path, rename: dict[str, str]) -> Rows:
    """The rows of a file by `read_rows`, their columns under our names. rename: {their column: ours}. Raises UserError."""
    rows = read_rows(path)
    known = {column for _, row in rows if isinstance(row, dict) for column in row}
    if not known:
        first = f"; row {rows[0][0]} is {rows[0][1]}" if rows else ""
        raise UserError(f"{path} holds no row with columns{first}")
    if missing := [column for column in rename if column not in known]:
        raise UserError(f"{path} has no column {missing[0]} to rename; it has {', '.join(sorted(known))}")
    return [(number, _renamed(row, rename) if isinstance(row, dict) else row) for number, row in rows]


def _renamed(row: dict[str, Any], rename: dict[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if name not in rename}
    return kept | {ours: row[theirs] for theirs, ours in rename.items() if theirs in row}


def convert_rows(path: Path, rows: Rows, convert: Callable[[int, dict[str, Any]], T]) -> tuple[list[T], list[str]]:
    """What `convert` makes of each row, in order, and sentences on those for which it raises WrongRowError.

    UserError where no row is right.
    """
    made: list[T] = []
    wrong: dict[str, list[int]] = {}  # reason -> rows
    for number, row in rows:
        try:
            if isinstance(row, str):
                raise WrongRowError(row)
            made.append(convert(number, row))
        except WrongRowError as reason:
            wrong.setdefault(str(reason), []).append(number)
    left_out = "; ".join(f"{len(numbers)} x {reason} ({_named(path, numbers)})" for reason, numbers in wrong.items())
    if not made:
        raise UserError(f"{path} has no right row: {left_out or 'it is empty'}")
    count = sum(map(len, wrong.values()))
    return made, [f"{path}: {count} of {len(rows)} rows are wrong and left out: {left_out}"] if count else []


def _named(path: Path, numbers: list[int]) -> str:
    first = ", ".join(f"{path.name}:{number}" for number in numbers[:_NAMED_ROWS])
    return first + (", ..." if len(numbers) > _NAMED_ROWS else "")


def text_in(row: dict[str, Any], column: str) -> str:
    """The text of a column. WrongRowError where there is none, or what is there is no text."""
    value = row.get(column)
    if value is None:
        raise WrongRowError(f"no {column}")
    if not isinstance(value, str):
        raise WrongRowError(f"{column} is {type_in_words(value)}, not text")
    check_text(value)
    if not value.strip():
        raise WrongRowError(f"empty {column}")
    return value


def check_text(value: Any) -> None:
    """WrongRowError where a string in `value` holds half of a surrogate pair, which no tokenizer takes."""
    for text in strings_in(value):
        if any("\ud800" <= character <= "\udfff" for character in ("" if text.isascii() else text)):
            raise WrongRowError("lone surrogates, which are not text")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file (also .gz) without their ends. Raises UserError."""
    return read_text(path).replace("\r\n", "\n").split("\n")


def in_label_order(names: set[str]) -> tuple[str, ...]:
    """Names of labels in the order of their ids: whole numbers by their size, others by their letters."""
    return tuple(sorted(names, key=int if all(map(is_whole, names)) else str))


def is_whole(name: str) -> bool:
    """Whether a label's name is a whole number."""
    return name.removeprefix("-").isdecimal()


def no_column(path: Path, columns: Iterable[str], missing: str) -> UserError:
    """For a file whose columns are these and not `missing`, the first word of which is our name for it."""
    held = list(columns)
    return UserError(
        f"{path} has the columns {', '.join(held)}; --rename_columns can say which is {missing}, such as "
        f"{held[0] if held else 'column'}={missing.split()[0]}"
    )


def stored_name(value: Any, names: Sequence[str]) -> Any:
    """A label, or labels, as they are; an integer for which its file keeps a name (`stored_names`) as that name."""
    if isinstance(value, list):
        return [stored_name(one, names) for one in value]
    is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if is_id else value


def stored_names(path: Path, column: str, rename: dict[str, str]) -> tuple[str, ...]:
    """The names that a .parquet file of the `datasets` library keeps for the integers of our column; () where it has none."""
    column = next((theirs for theirs, ours in rename.items() if ours == column), column)
    if not path.name.lower().endswith(".parquet"):
        return ()
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    feature = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {}).get(column, {})
    inner = feature.get("feature", feature) if isinstance(feature, dict) else feature  # a list of labels, or one label
    inner = inner[0] if isinstance(inner, list) and inner else inner
    return tuple(inner.get("names") or ()) if isinstance(inner, dict) else ()


def label_id(source: str, value: str, names: Sequence[str]) -> int:
    """The id of a label: its place in `names`, or the id that it spells where names are no numbers. Raises UserError."""
    if value in names:
        return names.index(value)
    if value.isdecimal() and int(value) < len(names) and not any(map(is_whole, names)):
        return int(value)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise UserError(f"{source} has the label {value!r}, which is none of {shown}; correct it, or name that label too")
