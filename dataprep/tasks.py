"""What is the work of preparing data, cut into tasks, and what does one task do?

A plan is a pure function of the listed files and the options: tasks are byte ranges, in order of path and position.
A task reads its ranges, encodes, and writes part files in order; they mean nothing until its done mark, written last,
is there. So tasks can run in any order, on any number of processes, be killed and be done again.

    parts/000012.train.bin   token ids, each document ending in the end-of-text token (an encoder's begins with [CLS])
    parts/000012.train.len   one LENGTH_DTYPE record a document
    parts/000012.train.src   one shards.SOURCE_DTYPE record a document
    parts/000012.done        TaskResult as JSON
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataprep.encoding import Encoder, split_pieces
from dataprep.holdout import hold_out_tail, split_of
from dataprep.readers import Document, Skipped, SourceFile, read_documents
from dataprep.shards import SOURCE_DTYPE, SPLITS
from dataprep.tokenizers import Tokenizer
from errors import UserError

PARTS_FOLDER = "parts"
LENGTH_DTYPE = np.dtype([("tokens", "<i4"), ("bytes", "<i8")])
EXAMPLES = 5  # of each kind of skipped thing that are named
_BATCH_BYTES = 1 << 20
_MAX_DOCUMENT_TOKENS = 2**31 - 1
_PART_SUFFIXES = (".bin", ".len", ".src")
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRange:
    """Bytes [start, stop) on disk of file number `file` of the plan."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """All that the output depends on besides the tokenizer: files, options that matter, and the tasks they make."""

    input_dir: Path
    files: tuple[SourceFile, ...]
    options: dict[str, Any]
    tasks: tuple[tuple[FileRange, ...], ...]

    @property
    def holds_out_tail(self) -> bool:
        """A corpus of one text file has one document: then its end is the validation text."""
        return len(self.files) == 1 and self.files[0].kind == "text" and self.options["val_fraction"] > 0

    @property
    def identity(self) -> str:
        """Hexadecimal digest of what an interrupted run must have in common with this one to be continued."""
        content = json.dumps([self.options, [asdict(file) for file in self.files], len(self.tasks)], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def task_bytes(self, task: int) -> int:
        """Size on disk of what a task reads."""
        return sum(part.stop - part.start for part in self.tasks[task])


@dataclass
class SkippedKind:
    """How often one kind of thing was skipped; the first few as (path, line counted from the range, range's start)."""

    count: int
    examples: list[tuple[str, int | None, int]]


@dataclass
class TaskResult:
    """What a task wrote and skipped. digests: of the bytes of each range, to tell later whether the input changed."""

    documents: dict[str, int]
    tokens: dict[str, int]
    skipped: dict[str, SkippedKind]
    digests: list[str]


def default_task_bytes(total: int) -> int:
    """Bytes a task: small enough to share a small corpus out, large enough not to drown a large one in files."""
    return min(max(total // 64, 1 << 20), 64 << 20)


def make_tasks(files: Iterable[SourceFile], task_bytes: int) -> tuple[tuple[FileRange, ...], ...]:
    """Cut files into tasks of about `task_bytes`: small files together, large .jsonl files at lines near multiples."""
    tasks: list[tuple[FileRange, ...]] = []
    group: list[FileRange] = []
    grouped = 0
    for number, file in enumerate(files):
        splittable = file.kind == "jsonl" and not file.compressed and not file.wide
        step = task_bytes if splittable and file.size > task_bytes else max(1, file.size)
        for start in range(0, file.size, step):
            group.append(FileRange(number, start, min(start + step, file.size)))
            grouped += group[-1].stop - start
            if grouped >= task_bytes:
                tasks.append(tuple(group))
                group, grouped = [], 0
        if file.size == 0:
            group.append(FileRange(number, 0, 0))
    if group:
        tasks.append(tuple(group))
    return tuple(tasks)


def digest_range(input_dir: Path, files: tuple[SourceFile, ...], part: FileRange) -> str:
    """Hexadecimal blake2b-128 of the bytes of a range."""
    digest = hashlib.blake2b(digest_size=16)
    with open(input_dir / files[part.file].path, "rb") as file:
        file.seek(part.start)
        left = part.stop - part.start
        while left and (block := file.read(min(left, _READ_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def done_mark(state: Path, task: int) -> Path:
    """The file whose presence says that a task is done."""
    return state / PARTS_FOLDER / f"{task:06d}.done"


def load_result(state: Path, task: int) -> TaskResult:
    """The result of a done task."""
    raw = json.loads(done_mark(state, task).read_bytes())
    return TaskResult(**{**raw, "skipped": {kind: SkippedKind(**one) for kind, one in raw["skipped"].items()}})


def part_stem(state: Path, task: int, split: str) -> str:
    """The path of a part without `.bin`, `.len` or `.src`."""
    return str(state / PARTS_FOLDER / f"{task:06d}.{split}")


def run_task(
    plan: Plan,
    state: Path,
    task: int,
    encoder: Encoder,
    tokenizer: Tokenizer,
    dtype: str,
    report: Callable[[int], None],
) -> None:
    """Read, encode and write one task. `report` is called now and then with the text bytes encoded so far."""
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    skipped: dict[str, SkippedKind] = {}
    writers = {
        split: _PartWriter(part_stem(state, task, split), begin, [tokenizer.eos_token_id], np.dtype(dtype))
        for split in SPLITS
    }
    encoded_bytes = 0
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abandon)
        for batch in _batches(_documents(plan, task, skipped)):
            for (document, split, file), ids in zip(batch, _encoded(encoder, batch), strict=True):
                writers[split].add(file, document, ids)
                encoded_bytes += document.size
            report(encoded_bytes)
        result = TaskResult(
            documents={split: writer.documents for split, writer in writers.items()},
            tokens={split: writer.tokens for split, writer in writers.items()},
            skipped=skipped,
            digests=[digest_range(plan.input_dir, plan.files, part) for part in plan.tasks[task]],
        )
        for writer in writers.values():
            writer.commit()
    write_atomic(done_mark(state, task), json.dumps(asdict(result), sort_keys=True).encode())


def read_range(plan: Plan, part: FileRange) -> Iterator[tuple[Document, str] | Skipped]:
    """The documents of a range, each with its split, and what is skipped."""
    fraction, val_subdir = plan.options["val_fraction"], plan.options["val_subdir"]
    for item in read_documents(plan.input_dir, plan.files[part.file], part.start, part.stop, plan.options["text_key"]):
        if isinstance(item, Skipped):
            yield item
        elif val_subdir:
            yield item, "val" if plan.files[part.file].path.startswith(f"{val_subdir}/") else "train"
        elif plan.holds_out_tail:
            yield from hold_out_tail(item, fraction)
        else:
            yield item, split_of(item.digest, fraction)


def _documents(plan: Plan, task: int, skipped: dict[str, SkippedKind]) -> Iterator[tuple[Document, str, int]]:
    """(document, split, file number) of every range of a task; what is skipped is counted."""
    for part in plan.tasks[task]:
        for item in read_range(plan, part):
            if not isinstance(item, Skipped):
                yield *item, part.file
                continue
            kind = skipped.setdefault(item.kind, SkippedKind(0, []))
            kind.count += 1
            if len(kind.examples) < EXAMPLES:
                kind.examples.append((item.path, item.line, part.start))


def _batches(documents: Iterator[tuple[Document, str, int]]) -> Iterator[list[tuple[Document, str, int]]]:
    """Documents in order, about _BATCH_BYTES at a time; a large one (text None, over _BATCH_BYTES) alone."""
    batch: list[tuple[Document, str, int]] = []
    size = 0
    for item in documents:
        if item[0].text is None and batch:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[0].size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(encoder: Encoder, batch: list[tuple[Document, str, int]]) -> Iterator[Iterable[np.ndarray]]:
    """The ids of each document of a batch, as one array a piece."""
    if batch[0][0].text is None:
        yield (encoder.encode_batch([piece])[0] for piece in split_pieces(batch[0][0].chunks()))
        return
    pieces = [list(split_pieces(document.chunks())) for document, _, _ in batch]
    ids = iter(encoder.encode_batch([piece for one in pieces for piece in one]))
    for one in pieces:
        yield [next(ids) for _ in one]


class _PartWriter:
    """Writes one split's part files of a task under temporary names; `commit` gives them their own."""

    def __init__(self, stem: str, begin: list[int], end: list[int], dtype: np.dtype) -> None:
        self.documents = 0
        self.tokens = 0
        self._stem = stem
        self._dtype = dtype.newbyteorder("<")
        self._begin, self._end = (np.array(ids, dtype=self._dtype) for ids in (begin, end))
        self._files: dict[str, BinaryIO] = {}

    def add(self, file: int, document: Document, ids: Iterable[np.ndarray]) -> None:
        """Append a document given as arrays of ids, between what begins and what ends every one."""
        if not self._files:  # most tasks have no validation document: then there are no files
            for suffix in _PART_SUFFIXES:
                self._files[suffix] = open(self._temporary(suffix), "wb", buffering=1 << 20)  # noqa: SIM115
        count = 0
        for piece in chain([self._begin], ids, [self._end]):
            self._files[".bin"].write(piece.astype(self._dtype).tobytes())
            count += len(piece)
        if count > _MAX_DOCUMENT_TOKENS:
            raise UserError(f"a document has {count:,} tokens, more than an .idx file can say; split the file")
        self._files[".len"].write(np.array((count, document.size), dtype=LENGTH_DTYPE).tobytes())
        source = np.array((file, document.position, document.digest), dtype=SOURCE_DTYPE)
        self._files[".src"].write(source.tobytes())
        self.documents += 1
        self.tokens += count

    def commit(self) -> None:
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary(suffix), self._stem + suffix)
        self._files = {}

    def abandon(self) -> None:
        """Remove what was not committed."""
        for suffix, file in self._files.items():
            try:
                file.close()
            finally:  # closing writes the rest of the buffer, which fails again on a full disk
                Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> str:
        # the process number keeps a left-over worker of a killed run and its successor apart
        return f"{self._stem}{suffix}.{os.getpid()}.tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
