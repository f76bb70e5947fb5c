"""How do the parts of many tasks become shards, in the order of the tasks whoever wrote them?

Shards are written under the state folder, each followed by a mark with its ShardInfo; the tokens of parts that are in
marked shards are deleted on the way, so the tokens are on disk about once. `publish` moves the shards into place.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataprep.holdout import LARGEST_SHARE, lowest_hash
from dataprep.shards import (
    BYTES_DTYPE,
    BYTES_EXTENSION,
    DATASET_FOLDER,
    EXTENSIONS,
    METADATA_FILE,
    SOURCE_DTYPE,
    SPLITS,
    FileInfo,
    ShardInfo,
    SplitInfo,
    write_index,
)
from dataprep.tasks import LENGTH_DTYPE, TaskResult, part_stem, sync_folder, write_atomic

SHARDS_FOLDER = "shards"
_SHARD_FILE = re.compile(r"(train|val)_\d{5}\.(bin|idx|src|bytes)")
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Segment:
    """Documents [first, last) of a part, which lie at tokens [token_first, token_last) of it."""

    stem: str
    first: int
    last: int
    token_first: int
    token_last: int


def assemble(
    state: Path, results: list[TaskResult], *, dtype: str, shard_tokens: int, val_fraction: float
) -> dict[str, SplitInfo]:
    """Join all parts into shards of at most `shard_tokens` tokens (a longer document has its own shard)."""
    (state / SHARDS_FOLDER).mkdir(exist_ok=True)
    segments = {
        split: [_whole(part_stem(state, task, split)) for task, result in enumerate(results) if result.documents[split]]
        for split in SPLITS
    }
    if not segments["train"]:  # a handful of documents, all held out by chance
        segments = {"train": segments["val"], "val": []}
    if val_fraction > 0 and not segments["val"]:
        segments = _hold_out_one(segments["train"])
    # parts may be deleted only when nothing unwritten needs them, and a part can be in both splits after holding out
    split_infos = {}
    for split in reversed(SPLITS):
        shards = []
        for number, shard in enumerate(_shards(segments[split], shard_tokens)):
            shards.append(_write_shard(state, f"{split}_{number:05d}", shard, dtype))
            if split == "train":
                _delete_used(shard)
        split_infos[split] = SplitInfo(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
        )
    return split_infos


def _whole(stem: str) -> Segment:
    lengths = _lengths(stem)
    return Segment(stem, 0, len(lengths), 0, int(lengths["tokens"].sum(dtype=np.int64)))


def _hold_out_one(train: list[Segment]) -> dict[str, list[Segment]]:
    """Move the document of the lowest hash from the train segments to validation, if there is a suitable one."""
    total = sum(int(_lengths(segment.stem)["bytes"].sum()) for segment in train)
    hashes = (np.fromfile(segment.stem + ".src", dtype=SOURCE_DTYPE)["hash"] for segment in train)
    sizes = (_lengths(segment.stem)["bytes"] for segment in train)
    chosen = lowest_hash(hashes, sizes, total * LARGEST_SHARE)
    if chosen is None:
        return {"train": train, "val": []}
    number, index = chosen
    whole = train[number]
    start = int(_lengths(whole.stem)["tokens"][:index].sum(dtype=np.int64))
    stop = start + int(_lengths(whole.stem)["tokens"][index])
    rest = [
        Segment(whole.stem, 0, index, 0, start),
        Segment(whole.stem, index + 1, whole.last, stop, whole.token_last),
    ]
    return {
        "train": [*train[:number], *(part for part in rest if part.first < part.last), *train[number + 1 :]],
        "val": [Segment(whole.stem, index, index + 1, start, stop)],
    }


def _shards(segments: Iterable[Segment], shard_tokens: int) -> Iterator[list[Segment]]:
    """Fill shards with documents in order; each shard is the list of its segments."""
    shard: list[Segment] = []
    filled = 0
    for segment in segments:
        ends = np.cumsum(_lengths(segment.stem)["tokens"][segment.first : segment.last], dtype=np.int64)
        at = base = 0
        while at < len(ends):
            stop = int(np.searchsorted(ends, base + shard_tokens - filled, side="right"))
            if stop == at and filled == 0:
                stop = at + 1  # one document longer than a shard
            if stop > at:
                shard.append(
                    Segment(
                        segment.stem,
                        segment.first + at,
                        segment.first + stop,
                        segment.token_first + base,
                        segment.token_first + int(ends[stop - 1]),
                    )
                )
                filled += int(ends[stop - 1]) - base
                at, base = stop, int(ends[stop - 1])
            if at < len(ends):
                yield shard
                shard, filled = [], 0
    if shard:
        yield shard


def _write_shard(state: Path, name: str, segments: list[Segment], dtype: str) -> ShardInfo:
    folder = state / SHARDS_FOLDER
    mark = folder / f"{name}.json"
    if mark.exists():  # written before the run was interrupted
        raw = json.loads(mark.read_bytes())
        return ShardInfo(**{**raw, "files": {file: FileInfo(**info) for file, info in raw["files"].items()}})
    size = np.dtype(dtype).itemsize
    lengths = np.concatenate([_lengths(segment.stem)[segment.first : segment.last] for segment in segments])
    files = {}
    for suffix in (*EXTENSIONS, BYTES_EXTENSION):
        with open(folder / (name + suffix), "wb") as file:
            target = _Checksummed(file)
            if suffix == ".idx":
                write_index(target, lengths["tokens"], dtype)
            elif suffix == BYTES_EXTENSION:
                target.write(lengths["bytes"].astype(BYTES_DTYPE).tobytes())
            for segment in segments:
                if suffix == ".bin":
                    _copy(segment.stem + suffix, segment.token_first * size, segment.token_last * size, target)
                elif suffix == ".src":
                    record = SOURCE_DTYPE.itemsize
                    _copy(segment.stem + suffix, segment.first * record, segment.last * record, target)
            file.flush()
            os.fsync(file.fileno())
        files[name + suffix] = FileInfo(target.bytes, target.crc32)
    info = ShardInfo(
        name=name,
        tokens=int(lengths["tokens"].sum(dtype=np.int64)),
        documents=len(lengths),
        bytes=int(lengths["bytes"].sum()),
        files=files,
    )
    write_atomic(mark, json.dumps(asdict(info)).encode())
    return info


def _delete_used(shard: list[Segment]) -> None:
    """Delete the tokens of the parts that end in this shard; lengths stay, a continued run counts with them."""
    for segment in shard:
        if segment.last == len(_lengths(segment.stem)):
            Path(segment.stem + ".bin").unlink(missing_ok=True)


class _Checksummed:
    """A file to write to that counts its bytes and their CRC32."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.crc32 = 0

    def write(self, block: bytes) -> int:
        self._file.write(block)
        self.bytes += len(block)
        self.crc32 = zlib.crc32(block, self.crc32)
        return len(block)


def _copy(path: str, start: int, stop: int, target: _Checksummed) -> None:
    with open(path, "rb") as source:
        source.seek(start)
        while start < stop:
            block = source.read(min(_BLOCK, stop - start))
            if not block:
                raise EOFError(f"{path} is shorter than its index")
            target.write(block)
            start += len(block)


def _lengths(stem: str) -> np.ndarray:
    return np.fromfile(stem + ".len", dtype=LENGTH_DTYPE)


def publish(state: Path, output_dir: Path, files: Iterable[str], folders: Iterable[Path]) -> None:
    """Move finished files into `output_dir`, replacing a dataset that is there; metadata.json is the caller's, last.

    files: shard files, from the state's shards folder into dataset/; folders: whole files of each go to the top.
    Can be interrupted and called again.
    """
    target = output_dir / DATASET_FOLDER
    target.mkdir(exist_ok=True)
    (output_dir / METADATA_FILE).unlink(missing_ok=True)  # from here on the old dataset is no dataset
    for name in files:
        source = state / SHARDS_FOLDER / name
        if source.exists():  # otherwise it was moved before an interruption
            os.replace(source, target / name)
    for path in target.iterdir():
        if _SHARD_FILE.fullmatch(path.name) and path.name not in set(files):
            path.unlink()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            write_atomic(output_dir / path.name, path.read_bytes())
    sync_folder(target)
    sync_folder(output_dir)
