"""What does a `--config` file set? A YAML, TOML or JSON file of options, with our names or with those of other tools."""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from arguments import did_you_mean
from errors import UserError
from training.foreign_config import NAMES, Translation, is_foreign, translate
from training.option import coerce_option
from training.option_groups import SPECS


def read_config_content(path: str) -> dict[str, Any]:
    """What a .yaml, .yml, .toml or .json file holds, its names and values as they are written. Raises UserError."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({error}); name a YAML, TOML or JSON file") from error
    try:
        if file.suffix == ".toml":
            content = tomllib.loads(text)
        elif file.suffix == ".json":
            content = json.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            import yaml  # the only reader here that is not in the standard library

            content = yaml.safe_load(text)
        else:
            raise UserError(f"--config {path}: the name must end in .yaml, .yml, .toml or .json")
    except ImportError as error:
        raise UserError(f"--config {path} needs PyYAML (pip install pyyaml), or write it as .toml or .json") from error
    except (ValueError, tomllib.TOMLDecodeError) as error:  # JSON's and YAML's decoding errors are ValueErrors
        raise UserError(f"--config {path} is not valid {file.suffix[1:].upper()}: {_one_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"--config {path} is not valid YAML: {_one_line(error)}") from error
        raise
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold option: value pairs")
    return content


def translated(path: str, stage: str | None) -> Translation:
    """What a file without stages sets, in our words where it has others; stage: of the command line. Raises UserError."""
    content = read_config_content(path)
    if not is_foreign(content, list(SPECS)):
        return Translation(content)
    return translate(content, path, world_size=int(os.environ.get("WORLD_SIZE", 1)), stage=stage)


def read_config_file(path: str, stage: str | None = None, resumed: bool = False) -> dict[str, Any]:
    """The options that a .yaml, .yml, .toml or .json file sets, each coerced to its option's type. Raises UserError.

    resumed: without what follows from the number of ranks, for a run keeps its batch.
    """
    options, found = {}, translated(path, stage)
    for key, value in found.options.items():
        name = str(key).replace("-", "_")
        if resumed and name in found.derived:
            continue
        if name not in SPECS:
            known = did_you_mean(name, [*SPECS, *NAMES])
            raise UserError(f"--config {path} sets {key!r}, which is not an option{known}")
        options[name] = coerce_option(SPECS[name], value, path)
    return options


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
