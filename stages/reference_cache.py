"""Where is what the reference of DPO thinks of each answer kept, so that it is computed once for a model and its data?

Where all weights are trained the reference is the model at the start. Its log-probabilities of all answers are computed
before the first step and kept twice: in the run's folder, from where the run is resumed, and beside the data or in
--reference_cache, from where the next run with the same model and data takes them, such as one with another
--learning_rate or --dpo_beta. What is the same is decided by digests of what is fed in, the tokens of every sequence and the
weights, never by the names of files and options.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from checkpointing.save_folder import from_rank_0, list_checkpoints, temporary_path
from errors import UserError
from stages.dpo import reference_logprobs, with_reference
from training.config import TrainConfig
from training.examples_data import ExampleData, ExampleFeed

REFERENCE_FILE = "reference_logprobs.safetensors"
NO_CACHE = "none"  # as --reference_cache: only the run's own file is kept


def with_kept_reference(
    config: TrainConfig, feed: ExampleFeed, model: nn.Module, *, base: dict[str, str]
) -> ExampleFeed:  # fmt: skip
    """The feed, each sequence with its log-probability under the reference. model: the one that the run starts from.

    base: the digests of the folder it came from (training/standing.py). Every rank calls it. Raises UserError for a run
    whose own file is gone, or was made for other examples.
    """
    sets = {"train": feed.data} | ({"held_out": feed.validation} if feed.validation else {})
    keys = from_rank_0(lambda: {name: examples_digest(data) for name, data in sets.items()})
    own, said = Path(config.save_dir) / REFERENCE_FILE, None
    if list_checkpoints(config.save_dir):  # the model has learned since: only the file knows
        found = from_rank_0(lambda: _read_own(own, sets, keys))
    else:
        shared = _shared_file(config, base, keys, feed)
        found = from_rank_0(lambda: _read(shared, sets, keys)) if shared else None
        said = f"reference: log-probabilities taken from {shared}"
        if found is None:
            found = {
                name: reference_logprobs(
                    model, data, max_length=feed.max_length, micro_batch_size=feed.micro_batch_size, ranks=feed.ranks,
                    precision=feed.precision,
                )
                for name, data in sets.items()
            }  # fmt: skip
            said = from_rank_0(lambda: _keep(shared, found, keys))
        from_rank_0(lambda: _write(own, found, keys))
    if said and feed.ranks.is_main:
        print(said, flush=True)
    made = {name: with_reference(data, found[name]) for name, data in sets.items()}
    return replace(feed, data=made["train"], validation=made.get("held_out"))


def examples_digest(data: ExampleData) -> str:
    """SHA-256 over the tokens of every sequence and which of them are learned, in order."""
    digest = hashlib.sha256()
    for group in data.groups:
        digest.update(f"{len(group)} ".encode())
        for sequence in group:
            digest.update(f"{len(sequence.tokens)} ".encode())
            digest.update(np.ascontiguousarray(sequence.tokens, dtype=np.int64).data)
            digest.update(np.ascontiguousarray(sequence.learned, dtype=np.uint8).data)
    return digest.hexdigest()


def _shared_file(
    config: TrainConfig, base: dict[str, str], keys: dict[str, str], feed: ExampleFeed
) -> Path | None:  # fmt: skip
    """In --reference_cache, or beside the data; None for no such file. The name says what it was computed of and with."""
    if config.reference_cache == NO_CACHE:
        return None
    made_of = {
        "model": [base["weights"], base["config"]],
        "examples": keys,
        "computed": [str(feed.precision.dtype), feed.ranks.device.type, config.kernels, config.attention],
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    if config.reference_cache or config.data_dir:
        return Path(config.reference_cache or config.data_dir[0]) / f"reference_{digest}.safetensors"
    return Path(f"{config.train_data[0]}.reference_{digest}.safetensors")


def _read_own(path: Path, sets: dict[str, ExampleData], keys: dict[str, str]) -> dict[str, np.ndarray]:
    found = _read(path, sets, {})
    if found is None:
        raise UserError(f"{path}, the reference of this run, is missing or broken: start a new run")
    if _read(path, sets, keys) is None:
        raise UserError(
            f"{path} is the reference for other examples than this run is given now: give the same --train_data, "
            "--eval_data and options, or start a new run"
        )
    return found


def _read(path: Path, sets: dict[str, ExampleData], keys: dict[str, str]) -> dict[str, np.ndarray] | None:
    """One array for each set, as long as it has sequences; None where the file is not there, not whole, or of others.

    keys: digests of the sets that it must not contradict; an older version's file has none.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found, made_for = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    sizes = {name: sum(len(group) for group in data.groups) for name, data in sets.items()}
    fits = {name: len(array) for name, array in found.items()} == sizes
    return found if fits and all(made_for.get(name, key) == key for name, key in keys.items()) else None


def _keep(path: Path | None, found: dict[str, np.ndarray], keys: dict[str, str]) -> str:
    """A sentence for the user. A folder of data may be read-only: then the next run computes them again, and says so."""
    if path is None:
        return "reference: log-probabilities computed, and kept in the run's folder only (--reference_cache none)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, found, keys)
    except OSError as error:
        return (
            f"reference: log-probabilities computed; {path.parent} cannot be written ({error.strerror}), so they are kept "
            "in the run's folder only: --reference_cache DIR keeps them for the next run"
        )
    return f"reference: log-probabilities computed, and kept in {path}"


def _write(path: Path, found: dict[str, np.ndarray], keys: dict[str, str]) -> None:
    temporary = temporary_path(path.parent, "reference")
    try:
        temporary.write_bytes(save(found, keys))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
