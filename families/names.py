"""Which families' folders can be loaded and saved? Each name is the `model_type` of its config.json."""

from typing import Any

from errors import UserError
from families import llama, mistral, qwen3

FAMILIES: dict[str, Any] = {"llama": llama, "qwen3": qwen3, "mistral": mistral}  # modules: CLASS, read, write


def read_config(config: dict) -> dict[str, Any]:
    """ModelConfig's fields, `family` among them, from a config.json as transformers 4 or 5 writes it.

    Raises UserError, naming the field, for anything that the model would compute differently and for contradictions.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f'config.json: model_type is "{family}"; only {", ".join(FAMILIES)} can be loaded')
    return FAMILIES[family].read(config) | {"family": family}


def write_config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The contents of config.json, of fields["family"]. dtype: that of the saved weights, such as "float32"."""
    return FAMILIES[fields["family"]].write(fields, dtype)
