"""Where is what the reference of DPO thinks of each answer kept, so that it is computed once for a model and its data?

Where all weights are trained the reference is the model at the start. Its log-probabilities of all answers are computed
before the first step and kept twice: in the run's folder, from where the run is resumed, and beside the data, from where
the next run with the same model, data and template takes them, such as one with another --learning_rate or --dpo_beta.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from errors import UserError
from model import weight_files
from stages.dpo import reference_logprobs, with_reference
from training.config import TrainConfig
from training.examples_data import ExampleData, ExampleFeed
from training.safetensors_writer import file_crc32
from training.save_folder import from_rank_0, list_checkpoints, temporary_path

REFERENCE_FILE = "reference_logprobs.safetensors"


def with_kept_reference(
    config: TrainConfig, feed: ExampleFeed, model: nn.Module, *, base: Path, order: dict
) -> ExampleFeed:
    """The feed, each sequence with its log-probability under the reference. model: the one that the run starts from.

    base: the folder it came from; order: what decides which examples these are, in which tokens. Every rank calls it.
    Raises UserError for a run whose own file is gone.
    """
    sets = {"train": feed.data} | ({"held_out": feed.validation} if feed.validation else {})
    own, said = Path(config.save_dir) / REFERENCE_FILE, None
    if list_checkpoints(config.save_dir):  # the model has learned since: only the file knows
        found = from_rank_0(lambda: _read(own, sets))
        if found is None:
            raise UserError(f"{own}, the reference of this run, is missing or broken: start a new run")
    else:
        shared = from_rank_0(lambda: _beside_the_data(config, base, order, feed))
        found = from_rank_0(lambda: _read(shared, sets))
        said = f"reference: log-probabilities taken from {shared}"
        if found is None:
            found = {
                name: reference_logprobs(
                    model, data, max_length=feed.max_length, micro_batch_size=feed.micro_batch_size, ranks=feed.ranks,
                    precision=feed.precision,
                )
                for name, data in sets.items()
            }  # fmt: skip
            said = from_rank_0(lambda: _keep(shared, found))
        from_rank_0(lambda: _write(own, found))
    if said and feed.ranks.is_main:
        print(said, flush=True)
    made = {name: with_reference(data, found[name]) for name, data in sets.items()}
    return replace(feed, data=made["train"], validation=made.get("held_out"))


def _beside_the_data(config: TrainConfig, base: Path, order: dict, feed: ExampleFeed) -> Path:
    """In --data_dir, or next to the first file of --train_data; the name says of which model, data and precision."""
    made_of = {
        "weights": {file.name: [file.stat().st_size, file_crc32(file)] for file in sorted(weight_files(base))},
        "order": {name: value for name, value in order.items() if name != "seed"},
        "eval_data": [file_crc32(Path(path)) for path in config.eval_data],
        "pairs": config.dpo_loss != "kto",
        "computed": [str(feed.precision.dtype), feed.ranks.device.type, config.kernels, config.attention],
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    if config.data_dir:
        return Path(config.data_dir[0]) / f"reference_{digest}.safetensors"
    return Path(f"{config.train_data[0]}.reference_{digest}.safetensors")


def _read(path: Path, sets: dict[str, ExampleData]) -> dict[str, np.ndarray] | None:
    """One array for each set, as long as it has sequences; None where the file is not there, or not whole."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    sizes = {name: sum(len(group) for group in data.groups) for name, data in sets.items()}
    return found if {name: len(array) for name, array in found.items()} == sizes else None


def _keep(path: Path, found: dict[str, np.ndarray]) -> str:
    """A sentence for the user. A folder of data may be read-only: then the next run computes them again, and says so."""
    try:
        _write(path, found)
    except OSError as error:
        return f"reference: log-probabilities computed; they cannot be kept beside the data ({error})"
    return f"reference: log-probabilities computed, and kept in {path}"


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    temporary = temporary_path(path.parent, "reference")
    try:
        temporary.write_bytes(save(found))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
