"""Which checkpoint is meant, is it whole, and how does what it holds come back?

A folder is verified to its last byte before anything is read of it, and no pickle is ever read.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from checkpointing.save_folder import (
    MANIFEST,
    OPTIMIZER,
    TRAINER_STATE,
    UNREADABLE,
    WEIGHTS,
    WEIGHTS_INDEX,
    from_rank_0,
    has_optimizer,
    list_checkpoints,
    read_json,
    read_pointer,
    verify_checkpoint,
)
from checkpointing.tensors import model_tensors, optimizer_names, parameter_names
from errors import UserError
from families.weights import stored_path
from paths import inside
from ranks import unwrap
from sharding import fill, like


@dataclass(frozen=True)
class Resolved:
    """The checkpoint to load (None: there is none) and the newer ones that were passed over, each with the reason."""

    path: Path | None
    skipped: list[tuple[Path, str]]

    @property
    def folder(self) -> Path:
        """`path`, for callers that did not ask for "latest": there is one then."""
        assert self.path is not None
        return self.path


def resolve_checkpoint(which: str | os.PathLike, save_dir: str | os.PathLike, to_go_on: bool = False) -> Resolved:
    """The checkpoint folder that `which` means, verified to the last byte. Every rank calls it; rank 0 looks.

    * "latest": the newest whole one in `save_dir`, by step; broken ones are passed over and reported, and without a
      whole one the path is None;
    * "best", a checkpoint folder, or NAME.pt where only the folder NAME exists: exactly that one;
    * any other folder, such as another run's --save_dir: the newest whole one inside.

    to_go_on: one without its optimizer state (--keep_optimizer last) is passed over, or refused, like a broken one.
    Raises UserError with the reason where the second or third finds nothing whole.
    """

    def look() -> Resolved:
        if str(which) == "latest":
            return _newest_whole(Path(save_dir), to_go_on)
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
            found = _newest_whole(path, to_go_on)
            if found.path is None:
                reasons = "; ".join(f"{skipped.name}: {reason}" for skipped, reason in found.skipped)
                raise UserError(f"no checkpoint in {path} is whole: {reasons}")
            return found
        if reason := _fault(path, to_go_on):
            raise UserError(f"checkpoint {path} cannot be used: {reason}")
        return Resolved(path, [])

    return from_rank_0(look)


def _fault(path: Path, to_go_on: bool) -> str | None:
    reason = verify_checkpoint(path)
    if reason is None and to_go_on and not has_optimizer(path):
        return (
            "its optimizer state was removed (--keep_optimizer last), so no run can go on from it; start a new one from its "
            f"weights with --init_from {path} and another --save_dir"
        )
    return reason


def _newest_whole(save_dir: Path, to_go_on: bool) -> Resolved:
    skipped: list[tuple[Path, str]] = []
    for _, path in reversed(list_checkpoints(save_dir)):
        reason = _fault(path, to_go_on)
        if reason is None:
            return Resolved(path, skipped)
        skipped.append((path, reason))
    return Resolved(None, skipped)


def load_model(path: str | os.PathLike, model: nn.Module) -> None:
    """Copy a checkpoint's weights into `model` (any device, in DDP, sharded or plain); every rank reads the files itself.

    Raises UserError naming the tensors that are missing, unexpected or of another shape; then `model` is untouched.
    """
    path = Path(path)
    targets = model_tensors(model)
    found: dict[str, tuple[int, ...]] = {}
    files = _weight_files(path)
    for file in files:
        with _open_tensors(file) as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    embedding = f"{stored_path(unwrap(model).config.family, 'model.embed_tokens')}.weight"
    _check_fit(path, {name: tuple(tensor.shape) for name, tensor in targets.items()}, found, embedding)
    for file in files:
        with torch.no_grad(), _open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                fill(targets[name], tensors.get_tensor(name))


def load_optimizers(path: str | os.PathLike, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restore each optimizer's state by parameter name; written by any number of ranks, every rank reads it itself.

    Learning rates and other options stay as they are. A state is 0-dimensional or has its parameter's shape and dtype, but
    where the optimizer has a method `state_shapes(parameter)` that gives others by name. Raises UserError if the
    checkpoint was written with other optimizers or has state that does not fit this model.
    """
    path = Path(path)
    names = parameter_names(model)
    by_name = {names[id(p)]: p for one in optimizers for group in one.param_groups for p in group["params"]}
    state: dict[str, dict[str, Tensor]] = {}
    for parameter_name, state_name, mapped in stored_states(path, optimizers):
        # A copy, because safetensors hands out memory that is mapped from the file.
        value, parameter = mapped.clone(), by_name.get(parameter_name)
        if parameter is not None and value.shape == parameter.shape:
            value = like(value, parameter)
        state.setdefault(parameter_name, {})[state_name] = value

    for optimizer in optimizers:
        packed = optimizer.state_dict()
        packed["state"] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            restored = state.pop(names[id(parameter)], None)
            if restored is None:  # it had no gradient when the checkpoint was written
                continue
            known = optimizer.state_shapes(parameter) if hasattr(optimizer, "state_shapes") else {}
            for state_name, tensor in restored.items():
                shape = known.get(state_name, parameter.shape if tensor.ndim else tensor.shape)
                if tensor.shape != shape:
                    shapes = f"{tuple(tensor.shape)} there, {tuple(shape)} here"
                    raise UserError(f"checkpoint {path}: {names[id(parameter)]}.{state_name} is {shapes}")
            packed["state"][index] = restored
        optimizer.load_state_dict(packed)
        if hasattr(optimizer, "state_shapes"):  # as written: torch would give bytes, too, their parameter's dtype
            for index, restored in packed["state"].items():
                device = parameters[index].device
                optimizer.state[parameters[index]] = {name: tensor.to(device) for name, tensor in restored.items()}
    if state:
        raise UserError(f"checkpoint {path} has optimizer state of what this model does not train: {_some(state)}")


def stored_states(path: Path, optimizers: list[Any]) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, state, value mapped from the file) of all that a checkpoint's optimizers hold. UserError for others."""
    with _open_tensors(path / OPTIMIZER) as tensors:
        written_with = (tensors.metadata() or {}).get("optimizers", "")
        if written_with != (here := optimizer_names(optimizers)):
            raise UserError(f"checkpoint {path} was written with {written_with}, this run uses {here}: set --optimizer")
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            parameter_name, _, state_name = key.rpartition(".")
            yield parameter_name, state_name, tensors.get_tensor(key)


def load_state(path: str | os.PathLike) -> dict:
    """What `save_checkpoint` was given as `state`, with "step", "world_size" and "rng" (a list, `rng_state` of each rank)."""
    state_file = Path(path) / TRAINER_STATE
    try:
        return read_json(state_file)
    except UNREADABLE as error:
        raise UserError(f"{state_file} cannot be read ({error})") from error


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


def _check_fit(path: Path, wanted: dict[str, tuple], found: dict[str, tuple], embedding: str) -> None:
    """Raise UserError unless names and shapes agree; the vocabulary, the usual cause, comes first."""
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    different = [name for name in wanted if name in found and wanted[name] != found[name]]
    problems = [
        f"its vocabulary has {found[name][0]} tokens and the model's {wanted[name][0]}"
        for name in different
        if name == embedding and found[name][0] != wanted[name][0]
    ]
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unexpected:
        problems.append(f"the model has no {_some(unexpected)}")
    if different:
        problems.append("shapes differ: " + _some(f"{n} is {found[n]} there, {wanted[n]} here" for n in different))
    if problems:
        raise UserError(f"checkpoint {path} does not fit this model: {'; '.join(problems)}")


def _some(names) -> str:
    """The first three of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
