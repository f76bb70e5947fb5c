"""How does a run's state reach the disk so that it is either whole or absent, and how does it come back?

A checkpoint is a folder, checkpoint_step_N, that Hugging Face tools open as it is:

    config.json, generation_config.json, model.safetensors (or shards and their index), the tokenizer's files
    optimizer.safetensors    "PARAMETER_NAME.STATE_NAME", so that any number of ranks loads it
    trainer_state.json       step, random number generators of each rank, and what the loop wants back
    manifest.json            size and CRC-32 of every file above, written last

The order that makes a crash harmless at any moment: files, manifest, all flushed to the disk, folder renamed, parent
flushed, pointer, old checkpoints deleted. No pickle is ever read. What surrounds the folder is in save_folder.py.
"""

import base64
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from paths import inside, is_plain_name
from ranks import unwrap
from training.safetensors_writer import safetensors_chunks, write_file
from training.save_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    FORMAT,
    GENERATION_CONFIG,
    MANIFEST,
    OPTIMIZER,
    TRAINER_STATE,
    UNREADABLE,
    WEIGHTS,
    WEIGHTS_INDEX,
    clean,
    from_rank_0,
    fsync_folder,
    list_checkpoints,
    lock,
    move_aside,
    read_json,
    read_pointer,
    temporary_path,
    verify_checkpoint,
    write_pointer,
    write_probe,
)

# One door: what a script needs of save_folder.py is reached through this file as well.
__all__ = [
    "Resolved",
    "SaveResult",
    "clean",
    "list_checkpoints",
    "load_model",
    "load_optimizers",
    "load_state",
    "lock",
    "mark_best",
    "model_tensors",
    "optimizer_tensors",
    "resolve",
    "rng_state",
    "save",
    "set_rng_state",
    "unwrap",
    "verify_checkpoint",
    "write_probe",
    "write_weights",
]

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


@dataclass(frozen=True)
class Resolved:
    """The checkpoint to load (None: there is none) and the newer ones that were passed over, each with the reason."""

    path: Path | None
    skipped: list[tuple[Path, str]]


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(
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

    `model` may be wrapped in DDP and compiled in place; it has `.config.to_hf()`. `state` is what the loop wants back
    from `load_state`: JSON values, without the names that are added here: format, step, world_size, rng. `files` are
    further files by name, such as the tokenizer's. The newest `keep_checkpoints` whole checkpoints are kept (0 or None:
    all), and always the one just written and the one `best` points to.

    part: the module in `model` that config.json and the weights are of (default: all of it). adapter: files of a PEFT
    folder, which are written in place of these, whose weights are frozen and lie elsewhere. beside: further large files,
    such as a critic's weights. stop_ids: what ends an answer, beside the model's own end of text: for transformers'
    `generate`, which reads generation_config.json.

    A storage error (no space, quota, folder gone) never raises: the result says why, and nothing is left behind.
    A whole checkpoint of this step with the same weights and optimizer state stays as it is, and the result is ok; any
    other one of this step gives way. Raises ValueError for a `state` or `files` that cannot be written.
    """
    save_dir = Path(save_dir)
    weights = model_tensors(part or model) if adapter is None else {}
    optimizer_state = optimizer_tensors(model, optimizers)
    if unfit := [name for name in files if not is_plain_name(name) or name in _RESERVED]:
        raise ValueError(f"{unfit[0]!r} cannot be a further file of a checkpoint")
    rng = _gather_from_ranks(rng_state())
    added = {"format": FORMAT, "step": step, "world_size": len(rng), "rng": rng}
    if taken := added.keys() & state.keys():
        raise ValueError(f"state may not hold {sorted(taken)}: save adds them")
    config = unwrap(part or model).config.to_hf()
    described = {TRAINER_STATE: {**state, **added}}
    if adapter is None:
        described[CONFIG] = config
    if adapter is None or stop_ids:
        described[GENERATION_CONFIG] = _generation_config(config, stop_ids)
    small_files = {**{name: _json_bytes(content) for name, content in described.items()}, **files}

    def write() -> SaveResult:
        temporary = temporary_path(save_dir, f"step_{step}")
        entries: dict[str, dict] = {}

        def put(name: str, chunks) -> None:
            entries[name] = write_file(temporary / name, chunks)

        try:
            temporary.mkdir()
            for name, data in small_files.items():
                put(name, [data])
            if adapter is None:
                sizes = {name: tensor.nbytes for name, tensor in weights.items()}
                entries.update(
                    write_weights(temporary, sizes, lambda names: {n: weights[n] for n in names}, max_shard_bytes)
                )
            for name, chunks in {**(adapter or {}), **(beside or {})}.items():
                put(name, chunks)
            metadata = {"format": "pt", "optimizers": _optimizer_names(optimizers)}
            put(OPTIMIZER, safetensors_chunks(optimizer_state, metadata))
            write_file(temporary / MANIFEST, [_json_bytes({"format": FORMAT, "step": step, "files": entries})])
            fsync_folder(temporary)
            published = _publish(temporary, save_dir / f"checkpoint_step_{step}", entries)
        except OSError as error:
            needed = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer_state.values()))
            return SaveResult(False, None, _storage_message(error, save_dir, needed))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return SaveResult(True, published, _after_publishing(save_dir, published, keep_checkpoints))

    return from_rank_0(write)


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    build: Callable[[list[str]], dict[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, dict]:
    """model.safetensors, or shards of at most `max_shard_bytes` (a larger weight has its own) and their index, in `folder`.

    sizes: the bytes of each weight, in the model's order. build: the tensors of some weights; it is called for one shard
    after another, so that no more than one is in memory. Returns the entries of the manifest. Raises OSError.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    entries, weight_map = {}, {}
    for number, names in enumerate(shards, start=1):
        file_name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = build(names)
        entries[file_name] = write_file(folder / file_name, safetensors_chunks(tensors, {"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        entries[WEIGHTS_INDEX] = write_file(folder / WEIGHTS_INDEX, [_json_bytes(index)])
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


# ---- finding ---------------------------------------------------------------------------------------------------------


def resolve(which: str | os.PathLike, save_dir: str | os.PathLike) -> Resolved:
    """The checkpoint folder that `which` means, verified to the last byte. Every rank calls it; rank 0 looks.

    * "latest": the newest whole one in `save_dir`, by step; broken ones are passed over and reported, and without a
      whole one the path is None;
    * "best", a checkpoint folder, or NAME.pt where only the folder NAME exists: exactly that one;
    * any other folder, such as another run's --save_dir: the newest whole one inside.

    Raises UserError with the reason where the second or third finds nothing whole.
    """

    def look() -> Resolved:
        if str(which) == "latest":
            return _newest_whole(Path(save_dir))
        path = read_pointer(Path(save_dir), "best") if str(which) == "best" else Path(which)
        if path is None:
            raise UserError(f"{save_dir} has no best checkpoint yet")
        if path.suffix == ".pt" and not path.exists():
            path = path.with_suffix("")
        if path.is_file():
            raise UserError(
                f"{path} is a file, but a checkpoint is a folder; "
                "pickle files such as .pt can run code when they are read and are never loaded"
            )
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {path}")
        if not (path / MANIFEST).exists() and list_checkpoints(path):
            found = _newest_whole(path)
            if found.path is None:
                reasons = "; ".join(f"{skipped.name}: {reason}" for skipped, reason in found.skipped)
                raise UserError(f"no checkpoint in {path} is whole: {reasons}")
            return found
        if reason := verify_checkpoint(path):
            raise UserError(f"checkpoint {path} cannot be used: {reason}")
        return Resolved(path, [])

    return from_rank_0(look)


def _newest_whole(save_dir: Path) -> Resolved:
    skipped = []
    for _, path in reversed(list_checkpoints(save_dir)):
        reason = verify_checkpoint(path)
        if reason is None:
            return Resolved(path, skipped)
        skipped.append((path, reason))
    return Resolved(None, skipped)


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_model(path: str | os.PathLike, model: nn.Module) -> None:
    """Copy a checkpoint's weights into `model` (any device, DDP or not); every rank reads the files itself.

    Raises UserError naming the tensors that are missing, unexpected or of another shape; then `model` is untouched.
    """
    path = Path(path)
    targets = model_tensors(model)
    found: dict[str, tuple[int, ...]] = {}
    files = _weight_files(path)
    for file in files:
        with _open_tensors(file) as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    _check_fit(path, {name: tuple(tensor.shape) for name, tensor in targets.items()}, found)
    for file in files:
        with torch.no_grad(), _open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                targets[name].copy_(tensors.get_tensor(name))


def load_optimizers(path: str | os.PathLike, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restore each optimizer's state by parameter name; written by any number of ranks, every rank reads it itself.

    Learning rates and other options stay as they are. Raises UserError if the checkpoint was written with other
    optimizers or has state that does not fit this model.
    """
    path = Path(path)
    names = _parameter_names(model)
    state: dict[str, dict[str, Tensor]] = {}
    with _open_tensors(path / OPTIMIZER) as tensors:
        written_with = (tensors.metadata() or {}).get("optimizers", "")
        if written_with != (here := _optimizer_names(optimizers)):
            raise UserError(f"checkpoint {path} was written with {written_with}, this run uses {here}: set --optimizer")
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            parameter_name, _, state_name = key.rpartition(".")
            # A copy, because safetensors hands out memory that is mapped from the file.
            state.setdefault(parameter_name, {})[state_name] = tensors.get_tensor(key).clone()

    for optimizer in optimizers:
        packed = optimizer.state_dict()
        packed["state"] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            restored = state.pop(names[id(parameter)], None)
            if restored is None:  # it had no gradient when the checkpoint was written
                continue
            for state_name, tensor in restored.items():
                if tensor.ndim and tensor.shape != parameter.shape:
                    shapes = f"{tuple(tensor.shape)} there, {tuple(parameter.shape)} here"
                    raise UserError(f"checkpoint {path}: {names[id(parameter)]}.{state_name} is {shapes}")
            packed["state"][index] = restored
        optimizer.load_state_dict(packed)
    if state:
        raise UserError(f"checkpoint {path} has optimizer state of what this model does not train: {_some(state)}")


def load_state(path: str | os.PathLike) -> dict:
    """What `save` was given as `state`, with "step", "world_size" and "rng" (a list, `rng_state` of each rank)."""
    state_file = Path(path) / TRAINER_STATE
    try:
        return read_json(state_file)
    except UNREADABLE as error:
        raise UserError(f"{state_file} cannot be read ({error})") from error


def rng_state() -> dict[str, object]:
    """This process's random generators (torch CPU, current CUDA device, Python, NumPy) as JSON values, no pickle."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": _encode(torch.get_rng_state().numpy()),
        "python": [version, _encode(np.array(words, dtype="<u8")), gauss],
        "numpy": [algorithm, _encode(keys.astype("<u4")), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state().numpy())
    return state


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` returned. The CUDA part is used only where there is CUDA."""
    torch.set_rng_state(torch.from_numpy(_decode(state["torch"], "u1")))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_decode(words, "<u8").tolist()), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, _decode(keys, "<u4"), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_decode(state["cuda"], "u1")))


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)


def _weight_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint: those its index names, never others that happen to lie there."""
    index_file = path / WEIGHTS_INDEX
    if not index_file.exists():
        return [path / WEIGHTS]
    try:
        return [inside(path, name, WEIGHTS_INDEX) for name in sorted(set(read_json(index_file)["weight_map"].values()))]
    except UNREADABLE as error:
        raise UserError(f"{index_file} cannot be read ({type(error).__name__}: {error})") from error


def _open_tensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error


def _check_fit(path: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raise UserError unless names and shapes agree; the vocabulary, the usual cause, comes first."""
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    different = [name for name in wanted if name in found and wanted[name] != found[name]]
    problems = [
        f"its vocabulary has {found[name][0]} tokens and the model's {wanted[name][0]}"
        for name in different
        if "embed_tokens" in name and found[name][0] != wanted[name][0]
    ]
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unexpected:
        problems.append(f"the model has no {_some(unexpected)}")
    if different:
        problems.append("shapes differ: " + _some(f"{n} is {found[n]} there, {wanted[n]} here" for n in different))
    if problems:
        raise UserError(f"checkpoint {path} does not fit this model: {'; '.join(problems)}")


# ---- what a model and its optimizers hold, by name -------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by Hugging Face name, in the model's order; of tied weights only the first.

    Raises ValueError for a model that was replaced by its compiled copy: such names load nowhere.
    """
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in unwrap(model).state_dict().items():
        if "_orig_mod." in name:
            raise ValueError(f"{name}: compile in place, model.compile(); torch.compile(model) renames the weights")
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        tensors[name] = tensor
    return tensors


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every optimizer state as "PARAMETER_NAME.STATE_NAME"; a step counter is a 0-dimensional tensor."""
    names = _parameter_names(model)
    return {
        f"{names[id(parameter)]}.{state_name}": torch.as_tensor(value)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for state_name, value in optimizer.state.get(parameter, {}).items()
    }


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in unwrap(model).named_parameters()}


def _optimizer_names(optimizers: list[torch.optim.Optimizer]) -> str:
    return "+".join(type(optimizer).__name__ for optimizer in optimizers)


def _generation_config(config: dict, stop_ids: Sequence[int]) -> dict:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    written = {name: config[name] for name in names if config.get(name) is not None}
    own = written.get("eos_token_id", [])
    ends = sorted({*(own if isinstance(own, list) else [own]), *stop_ids})
    return written | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


# ---- small tools -----------------------------------------------------------------------------------------------------


def _gather_from_ranks(value) -> list:
    """`value` of every rank, in order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _some(names) -> str:
    """The first three of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
