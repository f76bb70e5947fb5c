"""What does a run stand on, and is it still the same when the run goes on?

A run's model is not in its data alone: adapters are a difference from a base, a reference is the base itself, a reward
model is the judge. Each folder that is named by a flag is resolved to one checkpoint when the run begins and pinned, by its
path and by SHA-256 of what is in it, in every checkpoint. A resumed run stands on the same folder, though RUN in
`--init_from RUN` has trained on since, and reads all of it once to see that it is the same; the digest, not the name, is
what must agree, so a folder that was moved may be named anew. Data is pinned in `data_order`, see training/resume.py. Files
of the user's own code are pinned too; a run may go on with others, and says so.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpointing.save_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, from_rank_0
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError
from model import weight_files
from training.config import TrainConfig
from training.loading import find_base, find_model_or_adapter
from training.user_code import read_hooks, read_loss, read_optimizer

Pins = dict[str, dict[str, str]]

_FOLDERS: dict[str, Callable[[str, str], Path]] = {"init_from": find_base, "reward_model": find_model_or_adapter}
# keys of a config.json that say who wrote it, and nothing of what is computed
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
# what decides how the weights of a run's checkpoints are read; anything else may change when a run goes on
_KEPT_OPTIONS = (
    "stage", "lora", "lora_r", "lora_alpha", "lora_target_modules", "rslora", "dora", "load_in_4bit", "optimizer",
    "optimizer_file", "ema", "add_chat_tokens",
    "model", "next_sentence", "hidden_size", "num_layers", "num_heads", "rope_theta", "qk_norm", "tie_word_embeddings",
)  # fmt: skip


def stand_on(
    config: TrainConfig, saved: dict[str, Any], checkpoint: Path | None
) -> tuple[TrainConfig, Pins, list[str]]:
    """(config with the pinned folders in place of what was named, the pins for the next checkpoint, sentences to say).

    saved: the state in `checkpoint`, from which the run goes on; {} and None at its start. Every rank calls it. Raises
    UserError, naming flag and file, where the run would go on over something else than it began with.
    """
    options = saved.get("options", {})
    for name in _KEPT_OPTIONS:
        if name in options and options[name] != getattr(config, name):
            raise UserError(
                f"{checkpoint} was trained with --{name} {_shown(options[name])}, and this run has "
                f"{_shown(getattr(config, name))}: leave the flag out, or start a new run in another --save_dir"
            )
    before, pins, said = saved.get("stands_on", {}), {}, []
    for name in _FOLDERS:
        named = getattr(config, name)
        if checkpoint and bool(named) != bool(options.get(name)):
            began = f"with --{name} {options[name]}" if options.get(name) else f"without --{name}"
            raise UserError(
                f"{checkpoint} was trained {began}: give the same, or start a new run in another --save_dir"
            )
        if not named:
            continue
        pin, words = _pin(name, named, before.get(name), checkpoint)
        pins[name] = pin
        said += words
        paths: dict[str, Any] = {name: pin["path"]}
        config = replace(config, **paths)
    functions = {name: [value] if (value := getattr(config, name)) else [] for name in ("loss_file", "optimizer_file")}
    for name, files in {"hooks": config.hooks, **functions}.items():
        pins[name] = {path: _digest_code(name, path) for path in files}
        said += _changed_code(name, pins[name], before.get(name, {}), checkpoint)
    return config, pins, said


def _digest_code(name: str, path: str) -> str:
    """SHA-256 of a file of the user's code, without what it imports."""
    if name == "hooks":
        return read_hooks(path).sha256
    return (read_loss if name == "loss_file" else read_optimizer)(path)[0].sha256


def _changed_code(name: str, now: dict[str, str], before: dict[str, str], checkpoint: Path | None) -> list[str]:
    """A sentence where the code is not what `checkpoint` was trained with; a file that was only moved is."""
    if checkpoint is None or list(now.values()) == list(before.values()):
        return []
    changed = [path for path in now if path in before and now[path] != before[path]]
    parts = {"changed": changed, "new": now.keys() - before.keys(), "left out": before.keys() - now.keys()}
    words = "; ".join(f"{what}: {', '.join(sorted(paths))}" for what, paths in parts.items() if paths)
    return [f"--{name} is not what {checkpoint} was trained with ({words or 'another order'})"]


def _pin(
    name: str, named: str, before: dict[str, str] | None, checkpoint: Path | None
) -> tuple[dict[str, str], list[str]]:
    """(the pin of the folder that --name means, what to say of it)."""
    folder = _FOLDERS[name](_which(name, named, before, checkpoint), f"--{name}")
    digests = from_rank_0(lambda: folder_digests(folder))
    pin = {"given": named if before is None else before["given"], "path": str(folder), **digests}
    if before is None:
        words = "is not pinned in it, which is of an older version: taken as it is now, and pinned from here on"
        return pin, [f"--{name} {folder} of {checkpoint} {words}"] if checkpoint else []
    for part in ("weights", "config", "tokenizer"):
        if pin[part] != before[part]:
            raise UserError(
                f"--{name} {folder} is not what {checkpoint} was trained on: its {part} differs from that of "
                f"{before['path']} when the run began; name a folder that holds the same, or start a new run in another "
                "--save_dir"
            )
    moved = pin["path"] != before["path"]
    return pin, [f"--{name}: {folder} is the same as {before['path']}, on which the run began"] if moved else []


def _which(name: str, named: str, before: dict[str, str] | None, checkpoint: Path | None) -> str:
    """The pinned folder where the flag names it, or names the run that it is a checkpoint of; else what the flag names."""
    if before is None:
        return named
    pinned, here = Path(before["path"]), Path(named).resolve()
    if here not in (Path(before["given"]).resolve(), pinned.resolve(), pinned.resolve().parent):
        return named
    if not pinned.is_dir():
        raise UserError(
            f"{checkpoint} was trained on {pinned}, which is not there any more: name a copy of that checkpoint with "
            f"--{name}"
        )
    return str(pinned)


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what is computed with in a model's or an adapter's folder: its weights, its config and its tokenizer.

    Reads every byte of them, about a gigabyte a second: a size or a date proves nothing. UserError where weights are missing.
    """
    adapter = (folder / ADAPTER_CONFIG).exists()
    weights = [folder / ADAPTER_WEIGHTS] if adapter else sorted(weight_files(folder))
    config = json.loads((folder / (ADAPTER_CONFIG if adapter else "config.json")).read_bytes())
    computed = {name: value for name, value in config.items() if name not in _NOT_COMPUTED}
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    return {
        "weights": _digest_files(weights),
        "config": hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest(),
        "tokenizer": _digest_files(tokenizer),
    }


def _digest_files(paths: list[Path]) -> str:
    """Of their names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); the run needs it") from error
    return digest.hexdigest()


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
