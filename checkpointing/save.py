"""How does a run's state reach the disk so that it is either whole or absent?

A checkpoint is a folder, checkpoint_step_N, that Hugging Face tools open as it is:

    config.json, generation_config.json, model.safetensors (or shards and their index), the tokenizer's files
    optimizer.safetensors    "PARAMETER_NAME.STATE_NAME", so that any number of ranks loads it
    trainer_state.json       step, random number generators of each rank, and what the loop wants back
    manifest.json            size and CRC-32 of every file above, written last

The order that makes a crash harmless at any moment: files, manifest, all flushed to the disk, folder renamed, parent
flushed, pointer, old checkpoints deleted. No pickle is ever read. What surrounds the folder is in save_folder.py.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpointing.background import HostRoom, InFlight
from checkpointing.retention import Retention, retire_old
from checkpointing.safetensors_writer import TensorFile, safetensors_chunks, write_file
from checkpointing.save_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    FORMAT,
    GENERATION_CONFIG,
    MANIFEST,
    OPTIMIZER,
    TRAINER_STATE,
    WEIGHTS,
    WEIGHTS_INDEX,
    from_rank_0,
    fsync_folder,
    json_bytes,
    move_aside,
    read_json,
    temporary_path,
    verify_checkpoint,
    write_pointer,
)
from checkpointing.tensors import model_tensors, optimizer_names, optimizer_tensors, rng_state
from paths import is_plain_name
from ranks import unwrap
from sharding import has_parts

MAX_SHARD_BYTES = 5_000_000_000  # where Hugging Face tools split
Files = dict[str, Iterable[bytes | memoryview]]  # by name, each as its bytes piece by piece
_RESERVED = {
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX, OPTIMIZER, TRAINER_STATE,
    MANIFEST,
}  # fmt: skip


@dataclass(frozen=True)
class SaveResult:
    """`ok` and the published folder; or not ok and the reason. Of a good save, `message` holds a warning or nothing."""

    ok: bool
    path: Path | None
    message: str = ""


@dataclass
class Checkpoint:
    """What one checkpoint is to hold, its tensors those that training works with; nothing of it is on the disk yet."""

    save_dir: Path
    step: int
    small_files: dict[str, bytes]
    weights: dict[str, Tensor]
    large_files: Files
    retention: Retention
    max_shard_bytes: int
    in_parts: bool  # whether each rank holds a part of its tensors

    def write(self) -> SaveResult:
        """Publish it. Every rank calls it; rank 0 writes; every rank gets the same result.

        What the ranks hold parts of is put together tensor by tensor, so that none has all of it in memory. A storage
        error (no space, quota, folder gone) never raises: the result says why, and nothing is left behind. A whole
        checkpoint of this step with the same weights and optimizer state stays as it is, and the result is ok; any other
        one of this step gives way.
        """
        if not self.in_parts:
            return from_rank_0(self._publish)
        if dist.get_rank() == 0:
            result = self._publish()
        else:  # go through the tensors as rank 0 does, which then has each of them whole in its turn
            self._write_files(self.save_dir, Writer(writes=False))
        return from_rank_0(lambda: result)

    def start_writing(self, room: HostRoom) -> InFlight[SaveResult]:
        """The same by a thread of rank 0, from copies of all tensors in `room`: they may change as soon as this returns.

        Every rank calls it. What it comes to is what `write` would have returned.
        """
        writes = not dist.is_initialized() or dist.get_rank() == 0
        if not (writes or self.in_parts):
            return InFlight(None)
        files = {name: file for name, file in self.large_files.items() if isinstance(file, TensorFile)}
        groups = [self.weights, *(file.tensors for file in files.values())]
        weights, *others = room.copies(groups, keep=writes)
        copied = {
            name: TensorFile(tensors, file.metadata)
            for (name, file), tensors in zip(files.items(), others, strict=True)
        }
        frozen = replace(self, weights=weights, large_files={**self.large_files, **copied})
        return InFlight(frozen._publish if writes else None)

    def _publish(self) -> SaveResult:
        temporary = temporary_path(self.save_dir, f"step_{self.step}")
        writer = Writer()
        try:
            writer.make(temporary)
            entries = self._write_files(temporary, writer)
            writer.raise_error()
            write_file(temporary / MANIFEST, [json_bytes({"format": FORMAT, "step": self.step, "files": entries})])
            fsync_folder(temporary)
            published = _rename(temporary, self.save_dir / f"checkpoint_step_{self.step}", entries)
        except OSError as error:
            return SaveResult(False, None, _storage_message(error, self.save_dir, self._num_bytes()))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return SaveResult(True, published, _after_publishing(self.save_dir, published, self.retention))

    def _write_files(self, folder: Path, writer: "Writer") -> dict[str, dict]:
        """All files but the manifest, whose entries it returns."""
        entries = {name: writer(folder / name, [data]) for name, data in self.small_files.items()}
        if self.weights:
            sizes = {name: tensor.nbytes for name, tensor in self.weights.items()}
            entries |= write_weights(
                folder, sizes, lambda names: {n: self.weights[n] for n in names}, self.max_shard_bytes, writer
            )
        return entries | {name: writer(folder / name, chunks) for name, chunks in self.large_files.items()}

    def _num_bytes(self) -> int:
        """Of all tensors."""
        files = [file.tensors for file in self.large_files.values() if isinstance(file, TensorFile)]
        return sum(tensor.nbytes for tensors in (self.weights, *files) for tensor in tensors.values())


def collect(
    save_dir: str | os.PathLike,
    step: int,
    *,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict,
    files: dict[str, bytes],
    keep_checkpoints: int | None,
    keep_every: int | None = None,
    keep_optimizer: str = "all",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    part: nn.Module | None = None,
    adapter: Files | None = None,
    beside: Files | None = None,
    stop_ids: Sequence[int] = (),
) -> Checkpoint:
    """What `save_dir/checkpoint_step_{step}` is to hold. Every rank calls it.

    `model` may be wrapped in DDP, sharded, and compiled in place; it has `.config.to_hf()`. `state` is what the loop wants
    back from `load_state`: JSON values, without the names that are added here: format, step, world_size, rng. `files` are
    further files by name, such as the tokenizer's. The newest `keep_checkpoints` whole checkpoints are kept (0 or None:
    all), those whose step is a multiple of `keep_every`, and always the one just written and the one `best` points to;
    under `keep_optimizer` "last" the newest alone with its optimizer state.

    part: the module in `model` that config.json and the weights are of (default: all of it). adapter: files of a PEFT
    folder, which are written in place of these, whose weights are frozen and lie elsewhere. beside: further large files,
    such as a critic's weights. stop_ids: what ends an answer, beside the model's own end of text: for transformers'
    `generate`, which reads generation_config.json. Raises ValueError for a `state` or `files` that cannot be written.
    """
    inner = part or model
    config = unwrap(inner).config.to_hf() if adapter is None or stop_ids else None
    small_files = _small_files(step, state, files, config if adapter is None else None)
    if config is not None:
        small_files[GENERATION_CONFIG] = json_bytes(_generation_config(config, stop_ids))
    described = {"format": "pt", "optimizers": optimizer_names(optimizers)}
    optimizer_state = TensorFile(optimizer_tensors(model, optimizers), described)
    return Checkpoint(
        Path(save_dir), step, small_files, weights=model_tensors(inner) if adapter is None else {},
        large_files={**(adapter or {}), **(beside or {}), OPTIMIZER: optimizer_state},
        retention=Retention(keep_checkpoints, keep_every, keep_optimizer),
        max_shard_bytes=max_shard_bytes, in_parts=has_parts(model),
    )  # fmt: skip


def save_checkpoint(save_dir: str | os.PathLike, step: int, **contents: Any) -> SaveResult:
    """`collect`, which has these arguments, and `write`. Every rank calls it."""
    return collect(save_dir, step, **contents).write()


@dataclass
class Writer:
    """Writes files, or only goes through what they hold: always, or from the first error on, which it keeps.

    Other ranks wait at each tensor that is put together of their parts: none may be left out.
    """

    writes: bool = True
    error: OSError | None = None

    def make(self, folder: Path) -> None:
        try:
            folder.mkdir()
        except OSError as error:
            self.error = error

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def __call__(self, path: Path, chunks: Iterable[bytes | memoryview]) -> dict:
        chunks = iter(chunks)
        if self.writes and self.error is None:
            try:
                return write_file(path, chunks)
            except OSError as error:
                self.error = error
        for _ in chunks:
            pass
        return {}


def _small_files(step: int, state: dict, files: dict[str, bytes], config: dict | None) -> dict[str, bytes]:
    """trainer_state.json, config.json where there is one, and the further files. Every rank calls it. ValueError."""
    if unfit := [name for name in files if not is_plain_name(name) or name in _RESERVED]:
        raise ValueError(f"{unfit[0]!r} cannot be a further file of a checkpoint")
    rng = _gather_from_ranks(rng_state())
    added = {"format": FORMAT, "step": step, "world_size": len(rng), "rng": rng}
    if taken := added.keys() & state.keys():
        raise ValueError(f"state may not hold {sorted(taken)}: save_checkpoint adds them")
    described = {TRAINER_STATE: {**state, **added}, **({} if config is None else {CONFIG: config})}
    return {**{name: json_bytes(content) for name, content in described.items()}, **files}


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    build: Callable[[list[str]], dict[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    write: Callable[[Path, Iterable[bytes | memoryview]], dict] = write_file,
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, dict]:
    """model.safetensors, or shards of at most `max_shard_bytes` (a larger weight has its own) and their index, in `folder`.

    sizes: the bytes of each weight, in the model's order. build: the tensors of some weights; it is called for one shard
    after another, so that no more than one is in memory. read: as in `safetensors_chunks`, so that no more than a tensor is.
    write: what writes a file. Returns the entries of the manifest. Raises OSError, if `write` does.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    entries: dict[str, dict] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = build(names)
        entries[file_name] = write(folder / file_name, safetensors_chunks(tensors, {"format": "pt"}, read))
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        entries[WEIGHTS_INDEX] = write(folder / WEIGHTS_INDEX, [json_bytes(index)])
    return entries


def _rename(temporary: Path, final: Path, entries: dict[str, dict]) -> Path:
    """To its own name. What is there stays if it holds the same tensors, else it gives way. Raises OSError."""
    aside = None
    if final.exists():
        broken = verify_checkpoint(final)
        if not broken and _tensor_files(entries) == _tensor_files(read_json(final / MANIFEST)["files"]):
            return final
        # ".old": killed between the two renames, `clean` puts it back.
        aside = move_aside(final, ".del" if broken else ".old")
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    fsync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _tensor_files(entries: dict[str, dict]) -> dict[str, dict]:
    return {name: entry for name, entry in entries.items() if name.endswith(".safetensors")}


def _after_publishing(save_dir: Path, published: Path, retention: Retention) -> str:
    """Point `latest` here and let old checkpoints go. The new one is safe by now, so trouble is only a warning."""
    try:
        write_pointer(save_dir, "latest", published.name)
        retire_old(save_dir, published, retention)
    except OSError as error:
        return f"saved, but then: {error}"
    return ""


def mark_best(save_dir: str | os.PathLike, path: str | os.PathLike) -> None:
    """Point `best` to the checkpoint folder `path`; retention spares it. Every rank calls it. Raises OSError."""
    from_rank_0(lambda: write_pointer(Path(save_dir), "best", Path(path).name))


def _storage_message(error: OSError, save_dir: Path, needed: int) -> str:
    if not save_dir.is_dir():
        return f"{save_dir}: the folder is gone"
    free = shutil.disk_usage(save_dir).free
    return f"{save_dir}: {error.strerror} (the checkpoint needs {needed:,} bytes, {free:,} are free)"


def _generation_config(config: dict, stop_ids: Sequence[int]) -> dict:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    written = {name: config[name] for name in names if config.get(name) is not None}
    own = written.get("eos_token_id", [])
    ends = sorted({*(own if isinstance(own, list) else [own]), *stop_ids})
    return written | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _gather_from_ranks(value) -> list:
    """`value` of every rank, in order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
