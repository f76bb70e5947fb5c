"""What is a dataset on disk, and how is any token of it read and traced to its document?

A data folder (train.py's `--data_dir`) holds

    tokenizer.json, tokenizer_config.json        see tokenizers.py
    dataset/{train,val}_00000.bin                token ids, little-endian uint16 (vocabulary up to 65,536) or int32
    dataset/{train,val}_00000.idx                Megatron-LM's MMIDIDX version 1: where each document is
    dataset/{train,val}_00000.src                one SOURCE_DTYPE record a document: where it came from
    dataset/{train,val}_00000.bytes              one int64 a document, of text: its UTF-8 bytes (since format version 2)
    metadata.json                                the manifest, written last: a folder without it is not a dataset

A document never crosses a shard, and its last token is the end-of-text token. The shards of a split, in order, are one
long array of tokens (`TokenSplit`). Everything is read in pieces (file_array.py): opening costs nothing that grows with the
corpus, and a lookup is a binary search on the pointers in the file.
"""

import json
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataprep.file_array import FileArray, count_up_to
from errors import UserError
from paths import inside

FORMAT = "groundup-dataset"
FORMAT_VERSION = 2
METADATA_FILE = "metadata.json"
DATASET_FOLDER = "dataset"
SPLITS = ("train", "val")
EXTENSIONS = (".bin", ".idx", ".src")
BYTES_EXTENSION, BYTES_DTYPE = ".bytes", np.dtype("<i8")

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_DTYPE_CODES = {"uint16": 8, "int32": 4}
# file: index in metadata's `sources`; position: byte offset in the decompressed file, or record number in a .json file
SOURCE_DTYPE = np.dtype([("file", "<u4"), ("position", "<u8"), ("hash", "V16")])
_SHARD_NAME = re.compile(r"(train|val)_\d{5}")
_READ_BYTES = 8 << 20
_POINTERS = 64  # that are read at a time: most rows hold fewer documents


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer of a dataset: `sha256` is of tokenizer.json, `vocab_size` the largest id + 1."""

    type: str
    vocab_size: int
    sha256: str
    eos_token: str
    eos_token_id: int


@dataclass(frozen=True)
class FileInfo:
    """Size and zlib.crc32 of one file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard; `bytes` are UTF-8 bytes of its text, `files` its three files by name."""

    name: str
    tokens: int
    documents: int
    bytes: int
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class SplitInfo:
    """One split; `bytes` are UTF-8 bytes of its text."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Metadata:
    """The manifest of a dataset. `to_json` gives the same bytes on every machine and at every time."""

    dtype: str
    max_length: int
    stride: int
    tokenizer: TokenizerInfo
    splits: dict[str, SplitInfo]
    sources: list[dict[str, Any]]
    skipped: dict[str, dict[str, Any]]
    options: dict[str, Any]
    fingerprint: str
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class DocumentOrigin:
    """A document of a split: its number, its tokens [start, stop) in the split, and where its text came from.

    position: byte offset in the (decompressed) source file, or, where `unit` is "record", the record's number from 0.
    content_hash: hexadecimal blake2b-128 of the text's UTF-8 bytes.
    """

    document: int
    start: int
    stop: int
    source: str
    position: int
    unit: str
    content_hash: str

    @property
    def place(self) -> str:
        """Where the text came from, for people."""
        return f"{self.source}, {self.unit} {self.position:,}"


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype of MMIDIDX that holds every id: "uint16" or "int32"."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def load_metadata(data_dir: str | Path) -> Metadata:
    """Read and check OUT/metadata.json. UserError when it is missing, broken, or of a newer version."""
    path = Path(data_dir) / METADATA_FILE
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist: {data_dir} is not a finished dataset; make one with data_prep_tool.py"
        ) from None
    except ValueError:
        raise UserError(f"{path} is not readable JSON; prepare the data again with data_prep_tool.py") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a dataset of groundup; prepare the data with data_prep_tool.py")
    if raw["format_version"] > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer version (format {raw['format_version']}); update groundup")
    try:
        raw["tokenizer"] = TokenizerInfo(**raw["tokenizer"])
        raw["splits"] = {name: _parse_split(split) for name, split in raw["splits"].items()}
        metadata = Metadata(**raw)
        if metadata.dtype not in _DTYPE_CODES or set(metadata.splits) != set(SPLITS):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; prepare the data again with data_prep_tool.py") from None
    return metadata


def _parse_split(raw: dict[str, Any]) -> SplitInfo:
    shards = []
    for shard in raw["shards"]:
        name = shard["name"]
        # names are checked so that a manifest from elsewhere cannot point outside its folder
        files = set(shard["files"]) - {name + BYTES_EXTENSION}
        if not _SHARD_NAME.fullmatch(name) or files != {name + suffix for suffix in EXTENSIONS}:
            raise ValueError(name)
        infos = {file: FileInfo(**info) for file, info in shard["files"].items()}
        shards.append(ShardInfo(**{**shard, "files": infos}))
    return SplitInfo(**{**raw, "shards": tuple(shards)})


def open_split(data_dir: str | Path, split: str) -> "TokenSplit":
    """Open the split "train" or "val" of a data folder for reading.

    Checks the size of every file against the manifest, the headers, and a few thousand ids of every shard against the
    vocabulary. UserError names the file that is wrong.
    """
    metadata = load_metadata(data_dir)
    if split not in metadata.splits:
        raise UserError(f"{data_dir} has no split {split!r}; it has {', '.join(metadata.splits)}")
    return TokenSplit(Path(data_dir), split, metadata)


class TokenSplit:
    """All shards of one split as one array of `num_tokens` tokens in `num_documents` documents.

    Reading raises UserError where a file is no more what it was when this was opened.
    """

    def __init__(self, data_dir: Path, split: str, metadata: Metadata) -> None:
        self.metadata = metadata
        self.split = split
        self._shards = [_open_shard(data_dir, shard, metadata) for shard in metadata.splits[split].shards]
        self._token_starts = _starts(len(shard.tokens) for shard in self._shards)
        self._document_starts = _starts(len(shard.lengths) for shard in self._shards)
        self.num_tokens: int = self._token_starts[-1]
        self.num_documents: int = self._document_starts[-1]
        self.num_bytes: int = metadata.splits[split].bytes  # UTF-8, of the text
        self.has_document_bytes = all(shard.num_bytes is not None for shard in self._shards)

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the tokens [start, start + count) of the split, over as many shards as it takes.

        IndexError when the range does not lie inside the split.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start}..{start + count} of a split of {self.num_tokens}")
        out = np.empty(count, dtype=np.int64)
        filled = 0
        index = bisect_right(self._token_starts, start) - 1
        while filled < count:
            offset = start + filled - self._token_starts[index]
            piece = self._shards[index].tokens[offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        return out

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """int64 positions p, ascending, with start < p < start + count, at which a document begins."""
        stop = start + count
        found = []
        for shard, base in zip(self._shards, self._token_starts, strict=False):
            if base >= stop or base + len(shard.tokens) <= start:
                continue
            size = shard.tokens.itemsize
            first = count_up_to(shard.pointers, (start - base) * size)
            while len(following := shard.pointers[first : first + _POINTERS]):
                within = following[: np.searchsorted(following, (stop - base) * size)]
                found.append(within // size + base)
                if len(within) < len(following):
                    break
                first += len(following)
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, dtype=np.int64)

    def document_at(self, position: int) -> DocumentOrigin:
        """The document that holds token `position` of the split. IndexError outside the split."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"token {position} of a split of {self.num_tokens}")
        index = bisect_right(self._token_starts, position) - 1
        shard, base = self._shards[index], self._token_starts[index]
        size = shard.tokens.itemsize
        local = count_up_to(shard.pointers, (position - base) * size) - 1
        return self._origin(index, local)

    def document_extent(self, position: int) -> tuple[int, int, int]:
        """(start, stop, UTF-8 bytes of the text) of the document that holds token `position`; of a split with these bytes."""
        index = bisect_right(self._token_starts, position) - 1
        shard, base = self._shards[index], self._token_starts[index]
        local = count_up_to(shard.pointers, (position - base) * shard.tokens.itemsize) - 1
        start = base + int(shard.pointers[local]) // shard.tokens.itemsize
        assert shard.num_bytes is not None, "of older shards the bytes are not known; the caller looks first"
        return start, start + int(shard.lengths[local]), int(shard.num_bytes[local])

    def document(self, number: int) -> DocumentOrigin:
        """Document `number` of the split, from 0. IndexError outside the split."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of a split of {self.num_documents}")
        index = bisect_right(self._document_starts, number) - 1
        return self._origin(index, number - self._document_starts[index])

    def _origin(self, index: int, local: int) -> DocumentOrigin:
        shard = self._shards[index]
        start = self._token_starts[index] + int(shard.pointers[local]) // shard.tokens.itemsize
        record = shard.sources[local]
        source = self.metadata.sources[int(record["file"])]
        return DocumentOrigin(
            document=self._document_starts[index] + local,
            start=start,
            stop=start + int(shard.lengths[local]),
            source=source["path"],
            position=int(record["position"]),
            unit=source["unit"],
            content_hash=record["hash"].tobytes().hex(),
        )


@dataclass(frozen=True)
class _Shard:
    tokens: FileArray  # (tokens,) uint16 or int32
    lengths: FileArray  # (documents,) int32, tokens of each document
    pointers: FileArray  # (documents,) int64, byte offset of each document in the .bin
    boundaries: FileArray  # (documents + 1,) int64, Megatron's document index: here every sequence is a document
    sources: FileArray  # (documents,) SOURCE_DTYPE
    num_bytes: FileArray | None  # (documents,) int64, UTF-8; None in a folder of version 1 and of examples


def _starts(sizes: Iterator[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts


def _open_shard(data_dir: Path, shard: ShardInfo, metadata: Metadata) -> _Shard:
    folder = data_dir / DATASET_FOLDER
    for name, expected in shard.files.items():
        problem = _size_problem(inside(folder, name, f"../{METADATA_FILE}"), expected)
        if problem:
            raise UserError(f"{problem}; prepare the data again with data_prep_tool.py")
    opened = _shard_files(folder / shard.name, shard, metadata.dtype)
    bad = _bad_id(_spot_checks(opened.tokens), metadata.tokenizer.vocab_size)
    if bad is not None:
        raise UserError(
            f"{folder / shard.name}.bin holds token id {bad}, but the vocabulary has "
            f"{metadata.tokenizer.vocab_size} ids; the file is damaged: prepare the data again"
        )
    return opened


def _shard_files(stem: Path, shard: ShardInfo, dtype: str) -> _Shard:
    index = stem.with_suffix(".idx")
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    expected = (_MAGIC, 1, _DTYPE_CODES[dtype], shard.documents, shard.documents + 1)
    documents = shard.documents
    size = _HEADER.size + documents * 12 + (documents + 1) * 8
    if len(header) != _HEADER.size or _HEADER.unpack(header) != expected or index.stat().st_size != size:
        raise UserError(f"{index} does not match {METADATA_FILE}; prepare the data again with data_prep_tool.py")
    num_bytes = stem.with_suffix(BYTES_EXTENSION)
    lengths_at, pointers_at = _HEADER.size, _HEADER.size + 4 * documents
    return _Shard(
        tokens=FileArray(stem.with_suffix(".bin"), f"<{'u2' if dtype == 'uint16' else 'i4'}"),
        lengths=FileArray(index, "<i4", lengths_at, documents),
        pointers=FileArray(index, "<i8", pointers_at, documents),
        boundaries=FileArray(index, "<i8", pointers_at + 8 * documents, documents + 1),
        sources=FileArray(stem.with_suffix(".src"), SOURCE_DTYPE),
        num_bytes=FileArray(num_bytes, BYTES_DTYPE) if num_bytes.name in shard.files else None,
    )


def _size_problem(path: Path, expected: FileInfo) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    if size != expected.bytes:
        return f"{path} has {size:,} bytes, but {METADATA_FILE} says {expected.bytes:,}"
    return None


def _spot_checks(tokens: FileArray, blocks: int = 32, block: int = 256) -> Iterator[np.ndarray]:
    for start in np.linspace(0, max(0, len(tokens) - block), blocks).astype(np.int64):
        yield tokens[start : start + block]


def _bad_id(blocks: Iterator[np.ndarray], vocab_size: int) -> int | None:
    for block in blocks:
        if block.max() >= vocab_size or block.min() < 0:
            return int(block[(block >= vocab_size) | (block < 0)][0])
    return None


def verify_dataset(data_dir: str | Path) -> list[str]:
    """Read every byte of a dataset and return its problems, one sentence each that names the file; [] when it is whole.

    Checks sizes, checksums, indexes, ids, the end-of-text token of every document, the counts, and tokenizer.json.
    """
    data_dir = Path(data_dir)
    try:
        metadata = load_metadata(data_dir)
    except UserError as error:
        return [str(error)]
    from dataprep.tokenizers import tokenizer_sha256  # here: it loads the tokenizers library, and reading needs none

    problems = []
    try:
        if tokenizer_sha256(data_dir) != metadata.tokenizer.sha256:
            problems.append(f"{data_dir / 'tokenizer.json'} is not the tokenizer that {METADATA_FILE} names")
    except UserError as error:
        problems.append(str(error))
    for name, info in metadata.options.get("further_files", {}).items():  # of examples: masks, labels
        path, expected = data_dir / DATASET_FOLDER / name, FileInfo(**info)
        problem = _size_problem(path, expected)
        if problem is None and checksum_file(path) != expected:
            problem = f"{path}: the checksum differs from {METADATA_FILE}; the file is damaged"
        problems += [problem] if problem else []
    for name, split in metadata.splits.items():
        for shard in split.shards:
            problems += _verify_shard(data_dir / DATASET_FOLDER, shard, metadata)
        for field in ("tokens", "documents", "bytes"):
            if sum(getattr(shard, field) for shard in split.shards) != getattr(split, field):
                problems.append(f"{data_dir / METADATA_FILE}: the {field} of the {name} shards do not add up")
    return problems


def _verify_shard(folder: Path, shard: ShardInfo, metadata: Metadata) -> list[str]:
    problems = []
    for name, expected in shard.files.items():
        problem = _size_problem(inside(folder, name, f"../{METADATA_FILE}"), expected)
        if problem is None and checksum_file(folder / name) != expected:
            problem = f"{folder / name}: the checksum differs from {METADATA_FILE}; the file is damaged"
        if problem:
            problems.append(problem)
    if problems:
        return problems
    try:
        opened = _shard_files(folder / shard.name, shard, metadata.dtype)
    except UserError as error:
        return [str(error)]
    stem = folder / shard.name
    lengths = opened.lengths[:]
    ends = np.cumsum(lengths, dtype=np.int64)
    size = opened.tokens.itemsize
    if (
        np.any(lengths <= 0)
        or not np.array_equal(opened.pointers[:], (ends - lengths) * size)
        or not np.array_equal(opened.boundaries[:], np.arange(shard.documents + 1))
        or ends[-1] != len(opened.tokens)
        or len(opened.tokens) != shard.tokens
    ):
        return [f"{stem}.idx does not match {shard.name}.bin"]
    num_bytes = None if opened.num_bytes is None else opened.num_bytes[:]
    if num_bytes is not None and (
        len(num_bytes) != shard.documents or num_bytes.sum() != shard.bytes or num_bytes.min() < 0
    ):
        problems.append(f"{stem}{BYTES_EXTENSION} does not add up to the bytes of text in {METADATA_FILE}")
    # an answer may end in a token of the chat template's own, and one that was cut off ends anywhere
    text = "further_files" not in metadata.options
    unended, bad = False, None
    for at in range(0, len(opened.tokens), _READ_BYTES):
        block = opened.tokens[at : at + _READ_BYTES]
        first, last = np.searchsorted(ends, [at, at + len(block)], side="right")
        unended |= text and bool(np.any(block[ends[first:last] - 1 - at] != metadata.tokenizer.eos_token_id))
        bad = _bad_id(iter([block]), metadata.tokenizer.vocab_size) if bad is None else bad
    if unended:
        problems.append(f"{stem}.bin: a document does not end in {metadata.tokenizer.eos_token}")
    if bad is not None:
        problems.append(f"{stem}.bin holds token id {bad} outside the vocabulary of {metadata.tokenizer.vocab_size}")
    if opened.sources[:]["file"].max() >= len(metadata.sources):
        problems.append(f"{stem}.src names a source file that {METADATA_FILE} does not list")
    return problems


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, block: bytes, /) -> int: ...


def write_index(file: Writable, lengths: Sequence[int] | np.ndarray, dtype: str) -> None:
    """Write the MMIDIDX version 1 index of documents of `lengths` tokens (int32) each, one after another in the .bin.

    The format is that of Megatron-LM's `_IndexWriter` (megatron/core/datasets/indexed_dataset.py).
    """
    lengths = np.asarray(lengths, dtype="<i4")
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    file.write(_HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
    file.write(lengths.tobytes())
    file.write(pointers.astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def checksum_file(path: Path) -> FileInfo:
    """Size and CRC32 of a file, read in blocks."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return FileInfo(bytes=size, crc32=crc)
