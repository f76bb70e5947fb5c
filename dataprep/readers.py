"""How do the files of a folder become documents, one after another, without holding a file in memory?

    .txt .md, --text_extensions    one file is one document, exactly as it is (a byte order mark aside)
    .jsonl                         one line is one document: an object with the text key, or a string
    .json                          an array of such values, or such values one after another
    any of them + .gz              the same, decompressed on the way

What cannot be read is skipped with a reason (`Skipped`), never fatal: the reasons and their order depend on the files
alone. UTF-8 is expected; a byte order mark of UTF-8, UTF-16 or UTF-32 is obeyed.
"""

import codecs
import gzip
import hashlib
import json
import os
import re
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from errors import UserError

TEXT_EXTENSIONS = (".txt", ".md")
# a single record (a line of .jsonl, a value of .json) is parsed in memory; larger ones are skipped
MAX_RECORD_BYTES = 128 << 20
# a text document above this is read twice, once to check and hash it and once to encode it, instead of held
MAX_HELD_BYTES = 8 << 20
_BLOCK = 1 << 20

BINARY = "binary file (NUL bytes)"
BROKEN_GZIP = "broken gzip"
BROKEN_JSON = "broken JSON"
EMPTY = "empty document"
ENCODING = "invalid UTF-8"
LINK_LOOP = "folder reached twice by a link"
NOT_A_FILE = "not a regular file"
NO_TEXT = "no text under the text key"
SURROGATES = "lone surrogates"
TOO_LARGE = f"record over {MAX_RECORD_BYTES >> 20} MB"
UNREADABLE = "unreadable"

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class SourceFile:
    """A file to read. kind: "text", "jsonl" or "json"; size in bytes on disk; modified in ns, to notice changes."""

    path: str  # relative to the input folder, with forward slashes
    kind: str
    compressed: bool
    size: int
    modified: int
    wide: bool  # UTF-16 or UTF-32: lines cannot be found by bytes

    @property
    def unit(self) -> str:
        """What a document's position counts: bytes of the decompressed file, or records."""
        return "record" if self.kind == "json" or (self.kind == "jsonl" and self.wide) else "byte"


@dataclass(frozen=True)
class Skipped:
    """Something that was not read: `kind` is one of the reasons above, `line` its line (or record), from 1, or None."""

    kind: str
    path: str
    line: int | None = None


@dataclass
class Discovery:
    """What a folder holds: files to read in order of their path, what is skipped, and other files by their suffix.

    other_suffixes: how many there are; other_examples: the first of each.
    """

    files: list[SourceFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    other_suffixes: Counter[str] = field(default_factory=Counter)
    other_examples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A document: its text, or (`text` None) the way to read it again in chunks, since it is large.

    position: see SourceFile.unit; size and digest: length and blake2b-128 of its UTF-8 bytes.
    characters: the part [first, last) of a large document's file that is the document; None for all of it.
    """

    position: int
    size: int
    digest: bytes
    text: str | None
    file: "tuple[Path, SourceFile] | None" = None
    characters: tuple[int, int] | None = None

    def chunks(self) -> Iterator[str]:
        """The text in pieces of any size."""
        if self.text is not None:
            yield self.text
            return
        first, last = self.characters or (0, sys.maxsize)
        at = 0
        assert self.file is not None, "a document without its text is one of a file"
        with _open(*self.file) as source:
            for chunk in _decoded(source):
                wanted = chunk[max(0, first - at) : max(0, last - at)]
                if wanted:
                    yield wanted
                at += len(chunk)
                if at >= last:
                    return


def discover(input_dir: Path, text_extensions: tuple[str, ...] = (), exclude: Collection[Path] = ()) -> Discovery:
    """Find the files below `input_dir`, links followed, every folder once, the folders `exclude` left out.

    UserError when the folder is missing or cannot be listed.
    """
    try:
        if not input_dir.is_dir():
            what = "is not a folder" if input_dir.exists() else "does not exist"
            raise UserError(f"--input_dir {input_dir} {what}")
        os.scandir(input_dir).close()
    except PermissionError:
        raise UserError(f"--input_dir {input_dir} may not be read (permission denied)") from None
    found = Discovery()
    excluded = {_identity(one) for one in exclude if one.is_dir()}
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        identity = _identity(input_dir / folder)
        if identity in excluded:
            continue
        if identity in seen:
            found.skipped.append(Skipped(LINK_LOOP, folder))
            continue
        seen.add(identity)
        try:
            names = sorted(os.listdir(input_dir / folder), key=os.fsencode)
        except OSError:
            found.skipped.append(Skipped(UNREADABLE, folder))
            continue
        inner = []
        for name in names:
            path = f"{folder}/{name}" if folder else name
            if os.path.isdir(input_dir / path):
                inner.append(path)
            else:
                _add_file(found, input_dir, path, text_extensions)
        folders.extend(reversed(inner))
    found.files.sort(key=lambda file: os.fsencode(file.path))
    found.skipped.sort(key=lambda skipped: (skipped.kind, os.fsencode(skipped.path)))
    return found


def looks_like_text(path: Path) -> bool:
    """Whether the first kilobytes of a file are UTF-8 without NUL bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except (OSError, UnicodeError):
        return False
    return b"\0" not in head


def _identity(folder: Path) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def _add_file(found: Discovery, input_dir: Path, path: str, text_extensions: tuple[str, ...]) -> None:
    name = path.lower()
    compressed = name.endswith(".gz")
    suffix = os.path.splitext(name.removesuffix(".gz"))[1]
    kind = {".jsonl": "jsonl", ".json": "json"}.get(suffix)
    if kind is None and suffix in (*TEXT_EXTENSIONS, *text_extensions):
        kind = "text"
    if kind is None:
        suffix = suffix + ".gz" * compressed or "(no suffix)"
        found.other_suffixes[suffix] += 1
        found.other_examples.setdefault(suffix, path)
        return
    try:
        info = os.stat(input_dir / path)
        if not stat.S_ISREG(info.st_mode):
            found.skipped.append(Skipped(NOT_A_FILE, path))
            return
        with open(input_dir / path, "rb") as file:
            wide = not compressed and _bom(file.read(4))[1] != "utf-8"
    except OSError:
        found.skipped.append(Skipped(UNREADABLE, path))
        return
    found.files.append(SourceFile(path, kind, compressed, info.st_size, info.st_mtime_ns, wide))


def read_documents(
    input_dir: Path, file: SourceFile, start: int, stop: int, text_key: str
) -> Iterator[Document | Skipped]:
    """The documents of a file, or of the lines of a .jsonl file that begin in bytes [start, stop).

    Lines of `Skipped` count from `start`. OSError passes through, except for what is wrong with the file itself.
    """
    if file.compressed:
        stop = sys.maxsize  # positions count decompressed bytes
    try:
        if file.kind == "text":
            yield from _read_text(input_dir, file)
        elif file.kind == "jsonl" and not file.wide:
            yield from _read_lines(input_dir, file, start, stop, text_key)
        else:
            yield from _read_values(input_dir, file, text_key)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        yield Skipped(BROKEN_GZIP, file.path)
    except PermissionError:
        yield Skipped(UNREADABLE, file.path)


def _read_text(input_dir: Path, file: SourceFile) -> Iterator[Document | Skipped]:
    digest = hashlib.blake2b(digest_size=16)
    held: list[str] | None = []
    size = 0
    empty = True
    try:
        with _open(input_dir, file) as source:
            for chunk in _decoded(source):
                if "\0" in chunk:
                    yield Skipped(BINARY, file.path)
                    return
                encoded = chunk.encode()
                digest.update(encoded)
                size += len(encoded)
                empty = empty and not chunk.strip()
                if held is not None:
                    held.append(chunk)
                    held = held if size <= MAX_HELD_BYTES else None
    except UnicodeError:
        yield Skipped(ENCODING, file.path)
        return
    if empty:
        yield Skipped(EMPTY, file.path)
    elif held is None:
        yield Document(0, size, digest.digest(), None, (input_dir, file))
    else:
        yield Document(0, size, digest.digest(), "".join(held))


def _read_lines(
    input_dir: Path, file: SourceFile, start: int, stop: int, text_key: str
) -> Iterator[Document | Skipped]:
    with _open(input_dir, file) as source:
        position = start
        if start > 0:  # the line across `start` belongs to the range before, unless it begins exactly here
            position = start - 1
            source.seek(position)
            for part in _line_parts(source):
                position += len(part)
                if position >= stop:  # a line longer than the range: every line that begins here is another's
                    return
        line = 0
        while position < stop:
            raw, length = _read_line(source)
            if not length:
                break
            line += 1
            if raw is None:
                yield Skipped(TOO_LARGE, file.path, line)
            else:
                if position == 0:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                yield from _parse_line(raw, position, Skipped(BROKEN_JSON, file.path, line), text_key)
            position += length


def _line_parts(source: BinaryIO) -> Iterator[bytes]:
    while part := source.readline(_BLOCK):
        yield part
        if part.endswith(b"\n"):
            break


def _read_line(source: BinaryIO) -> tuple[bytes | None, int]:
    """The next line and its length with the newline; None for a line over MAX_RECORD_BYTES; length 0 at the end."""
    raw = source.readline(MAX_RECORD_BYTES + 1)
    if len(raw) <= MAX_RECORD_BYTES or raw.endswith(b"\n"):
        return raw, len(raw)
    return None, len(raw) + sum(len(part) for part in _line_parts(source))


def _parse_line(raw: bytes, position: int, where: Skipped, text_key: str) -> Iterator[Document | Skipped]:
    if not raw.strip():
        return  # blank lines separate, they are no documents
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        yield Skipped(ENCODING, where.path, where.line)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield where
        return
    yield _document(value, position, where, text_key)


def _document(value: object, position: int, where: Skipped, text_key: str) -> Document | Skipped:
    text = value.get(text_key) if isinstance(value, dict) else value
    if not isinstance(text, str):
        return Skipped(NO_TEXT, where.path, where.line)
    if not text.strip():
        return Skipped(EMPTY, where.path, where.line)
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return Skipped(SURROGATES, where.path, where.line)
    return Document(position, len(encoded), hashlib.blake2b(encoded, digest_size=16).digest(), text)


def _read_values(input_dir: Path, file: SourceFile, text_key: str) -> Iterator[Document | Skipped]:
    """The values of a .json file: the elements of each array at the top level, and each other value."""
    record = 0
    try:
        with _open(input_dir, file) as source:
            for value in _values(_decoded(source)):
                yield _document(value, record, Skipped(BROKEN_JSON, file.path, record + 1), text_key)
                record += 1
    except UnicodeError:
        yield Skipped(ENCODING, file.path, record + 1)
    except (ValueError, RecursionError):  # the rest of the file is lost: nothing says where the next record begins
        yield Skipped(BROKEN_JSON, file.path, record + 1)
    except _TooLargeError:
        yield Skipped(TOO_LARGE, file.path, record + 1)


class _TooLargeError(Exception):
    pass


_SPACE = re.compile(r"[ \t\r\n]*")


def _values(chunks: Iterator[str]) -> Iterator[object]:
    """Parse JSON values as they come, holding one at a time. ValueError where the text is not JSON."""
    decoder = json.JSONDecoder()
    buffer, at, ended = "", 0, False
    in_array = after_value = False

    def more(at_least: int) -> None:
        nonlocal buffer, at, ended
        parts, got = [buffer[at:]], 0
        while got < at_least and not ended:
            chunk = next(chunks, None)
            ended = chunk is None
            parts.append(chunk or "")
            got += len(parts[-1])
        buffer, at = "".join(parts), 0

    while True:
        space = _SPACE.match(buffer, at)
        at = space.end() if space else at
        if at == len(buffer):
            if ended:
                break
            more(1)
            continue
        character = buffer[at]
        if in_array and character == "]":
            in_array = after_value = False
            at += 1
        elif in_array and after_value:
            if character != ",":
                raise ValueError("a comma is missing between two elements")
            after_value = False
            at += 1
        elif not in_array and character == "[":
            in_array, after_value = True, False
            at += 1
        else:
            try:
                value, stop = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                stop = len(buffer)
                cut_off = error.pos > stop - 16 or error.msg.startswith("Unterminated string")
                if ended or not cut_off:
                    raise
            if stop < len(buffer) or ended:  # at the very end a number could go on in the next chunk
                yield value
                at, after_value = stop, True
            elif len(buffer) - at > MAX_RECORD_BYTES:
                raise _TooLargeError
            else:
                more(len(buffer) - at)  # doubling: a large value is parsed a few times, not once a block
    if in_array:
        raise ValueError("the array is not closed")


def _open(input_dir: Path, file: SourceFile) -> BinaryIO:
    path = input_dir / file.path
    info = os.stat(path)
    if (info.st_size, info.st_mtime_ns) != (file.size, file.modified):
        raise UserError(f"{path} was changed while it was being read; run the same command again")
    return cast(BinaryIO, gzip.open(path, "rb")) if file.compressed else open(path, "rb")


def _bom(head: bytes) -> tuple[int, str]:
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return len(mark), encoding
    return 0, "utf-8"


def _decoded(source: BinaryIO) -> Iterator[str]:
    block = source.read(_BLOCK)
    length, encoding = _bom(block)
    decoder = codecs.getincrementaldecoder(encoding)()
    block = block[length:]
    while block:
        text = decoder.decode(block)
        if text:
            yield text
        block = source.read(_BLOCK)
    text = decoder.decode(b"", final=True)
    if text:
        yield text
