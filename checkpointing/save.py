"""How does a run's state reach the disk so that it is either whole or absent?

A checkpoint is a folder, checkpoint_step_N, that Hugging Face tools open as it is:

    config.json, generation_config.json, model.safetensors (or shards and their index), the tokenizer's files
    optimizer.safetensors    "PARAMETER_NAME.STATE_NAME", so that any number of ranks loads it
    trainer_state.json       step, random number generators of each rank, and what the loop wants back
    manifest.json            size and CRC-32 of every file above, written last

The order that makes a crash harmless at any moment: files, manifest, all flushed to the disk, folder renamed, parent
flushed, pointer, old checkpoints deleted. No pickle is ever read. What surrounds the folder is in save_folder.py.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpointing.safetensors_writer import safetensors_chunks, write_file
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
    list_checkpoints,
    move_aside,
    read_json,
    read_pointer,
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


def save_checkpoint(
    save_dir: str | os.PathLike,
    step: int,
    *,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict,
    files: dict[str, bytes],
    keep_checkpoints: int | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    part: nn.Module | None = None,
    adapter: Files | None = None,
    beside: Files | None = None,
    stop_ids: Sequence[int] = (),
) -> SaveResult:
    """Publish `save_dir/checkpoint_step_{step}`. Every rank calls it; rank 0 writes; every rank gets the same result.

    `model` may be wrapped in DDP, sharded, and compiled in place; it has `.config.to_hf()`. What the ranks hold parts of is
    put together tensor by tensor, so that none has all of it in memory. `state` is what the loop wants back from
    `load_state`: JSON values, without the names that are added here: format, step, world_size, rng. `files` are further
    files by name, such as the tokenizer's. The newest `keep_checkpoints` whole checkpoints are kept (0 or None: all), and
    always the one just written and the one `best` points to.

    part: the module in `model` that config.json and the weights are of (default: all of it). adapter: files of a PEFT
    folder, which are written in place of these, whose weights are frozen and lie elsewhere. beside: further large files,
    such as a critic's weights. stop_ids: what ends an answer, beside the model's own end of text: for transformers'
    `generate`, which reads generation_config.json.

    A storage error (no space, quota, folder gone) never raises: the result says why, and nothing is left behind.
    A whole checkpoint of this step with the same weights and optimizer state stays as it is, and the result is ok; any
    other one of this step gives way. Raises ValueError for a `state` or `files` that cannot be written.
    """
    save_dir = Path(save_dir)
    inner = part or model
    weights = model_tensors(inner) if adapter is None else {}
    optimizer_state = optimizer_tensors(model, optimizers)
    config = unwrap(inner).config.to_hf() if adapter is None or stop_ids else None
    small_files = _small_files(step, state, files, config if adapter is None else None)
    if config is not None:
        small_files[GENERATION_CONFIG] = _json_bytes(_generation_config(config, stop_ids))

    described = {"format": "pt", "optimizers": optimizer_names(optimizers)}
    large_files = {**(adapter or {}), **(beside or {}), OPTIMIZER: safetensors_chunks(optimizer_state, described)}

    def write() -> SaveResult:
        temporary = temporary_path(save_dir, f"step_{step}")
        writer = Writer()
        try:
            writer.make(temporary)
            entries = _write_files(temporary, small_files, weights, large_files, max_shard_bytes, writer)
            writer.raise_error()
            write_file(temporary / MANIFEST, [_json_bytes({"format": FORMAT, "step": step, "files": entries})])
            fsync_folder(temporary)
            published = _publish(temporary, save_dir / f"checkpoint_step_{step}", entries)
        except OSError as error:
            needed = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer_state.values()))
            return SaveResult(False, None, _storage_message(error, save_dir, needed))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return SaveResult(True, published, _after_publishing(save_dir, published, keep_checkpoints))

    if not has_parts(model):
        return from_rank_0(write)
    if dist.get_rank() == 0:
        result = write()
    else:  # go through the tensors as rank 0 does, which then has each of them whole in its turn
        _write_files(save_dir, small_files, weights, large_files, max_shard_bytes, Writer(writes=False))
    return from_rank_0(lambda: result)


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
    return {**{name: _json_bytes(content) for name, content in described.items()}, **files}


def _write_files(
    folder: Path, small_files: dict[str, bytes], weights: dict[str, Tensor], large_files: Files, max_shard_bytes: int,
    writer: Writer,
) -> dict[str, dict]:  # fmt: skip
    """All files but the manifest, whose entries it returns."""
    entries = {name: writer(folder / name, [data]) for name, data in small_files.items()}
    if weights:
        sizes = {name: tensor.nbytes for name, tensor in weights.items()}
        entries |= write_weights(folder, sizes, lambda names: {n: weights[n] for n in names}, max_shard_bytes, writer)
    return entries | {name: writer(folder / name, chunks) for name, chunks in large_files.items()}


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
        entries[WEIGHTS_INDEX] = write(folder / WEIGHTS_INDEX, [_json_bytes(index)])
    return entries


def _publish(temporary: Path, final: Path, entries: dict[str, dict]) -> Path:
    """Rename into place. What is there stays if it holds the same tensors, else it gives way. Raises OSError."""
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


def _after_publishing(save_dir: Path, published: Path, keep_checkpoints: int | None) -> str:
    """Point `latest` here and delete old checkpoints. The new one is safe by now, so trouble is only a warning."""
    try:
        write_pointer(save_dir, "latest", published.name)
        _delete_old(save_dir, published, keep_checkpoints)
    except OSError as error:
        return f"saved, but then: {error}"
    return ""


def _delete_old(save_dir: Path, published: Path, keep_checkpoints: int | None) -> None:
    """Delete whole checkpoints beyond the newest `keep_checkpoints`. Broken ones are neither counted nor touched."""
    if not keep_checkpoints:
        return
    whole = [path for _, path in list_checkpoints(save_dir) if verify_checkpoint(path, deep=False) is None]
    kept = {*whole[-keep_checkpoints:], published, read_pointer(save_dir, "best")}
    for path in whole:
        if path not in kept:
            # Renamed first, so that a checkpoint is never seen half deleted.
            shutil.rmtree(move_aside(path, ".del"), ignore_errors=True)


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


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
