"""What are the rows of a file of examples, as dicts by column, and which of its rows are none?

.json (an array of objects), .jsonl, .csv, .tsv, each of them also + .gz, and .parquet. UTF-8, or UTF-16 with its mark.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

Row = tuple[int, dict[str, Any] | str]  # its number, from 1, and what it holds, or a str that says why it is no row


def type_in_words(value: Any) -> str:
    """What a value from JSON is, such as "a list"."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a value from JSON, the names of its fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings_in(inner)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, each with its number (a .jsonl's is its line), from 1; a str says why one is no row.

    UserError when the file cannot be read at all.
    """
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet" and not name.endswith(".gz"):
        return _read_parquet(path)
    if kind not in ("json", "jsonl", "csv", "tsv"):
        raise UserError(f"{path} is of no kind that holds examples: .json, .jsonl, .csv, .tsv (also .gz) or .parquet")
    if kind == "jsonl":
        return rows_of_lines(read_text(path, errors="surrogateescape"))
    text = read_text(path)
    return _read_json(path, text) if kind == "json" else _read_table(path, text, "\t" if kind == "tsv" else ",")


def read_text(path: Path, errors: str = "strict") -> str:
    """What a file (also .gz) in UTF-8, or in UTF-16 with its mark, says. Raises UserError."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path} is broken gzip; make it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16") if wide else data.decode("utf-8-sig", errors)
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it in that encoding") from None


def rows_of_lines(text: str) -> list[Row]:
    """The rows of a .jsonl's text."""
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split at U+2028 inside a string
        if not line.strip():
            continue
        try:
            line.encode()
            value = json.loads(line)
        except UnicodeEncodeError:
            rows.append((number, "not UTF-8"))
        except (ValueError, RecursionError):
            rows.append((number, "broken JSON"))
        else:
            rows.append((number, value if isinstance(value, dict) else f"{type_in_words(value)}, not an object"))
    return rows


def _read_json(path: Path, text: str) -> list[Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        rows = rows_of_lines(text)
        if sum(isinstance(row, dict) for _, row in rows) > len(rows) / 2:  # a .jsonl under another name
            return rows
        raise UserError(f"{path} is not JSON: {error}") from None
    values = value if isinstance(value, list) else [value]
    return [
        (number, row if isinstance(row, dict) else f"{type_in_words(row)}, not an object")
        for number, row in enumerate(values, start=1)
    ]


def _read_table(path: Path, text: str, delimiter: str) -> list[Row]:
    """Rows below a header. A .tsv with quotes that do not enclose whole fields has none that mean anything."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        try:
            table = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=delimiter == "\t"))
        except csv.Error:
            lines = io.StringIO(text, newline="")
            table = list(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE))
    finally:
        csv.field_size_limit(limit)
    table = [fields for fields in table if fields]
    if not table:
        raise UserError(f"{path} is empty")
    header, *body = table
    rows: list[Row] = []
    for number, fields in enumerate(body, start=1):
        if len(fields) == len(header):
            rows.append((number, dict(zip(header, map(_cell, fields), strict=True))))
        else:
            rows.append((number, f"{len(fields)} fields instead of {len(header)}"))
    return rows


def _cell(text: str) -> Any:
    """A field: text, or the messages of which it is the JSON."""
    if text.lstrip().startswith("[{"):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value):
            return value
    return text


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow, which is not installed; run: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a parquet file that pyarrow reads ({error})") from None
    return list(enumerate(rows, start=1))
