"""Which families' folders can be loaded and saved? Each name is the `model_type` of its config.json."""

from typing import Any

from errors import UserError
from families import (
    bert,
    gemma2,
    gemma3,
    gpt2,
    granite,
    llama,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    smollm3,
)

FAMILIES: dict[str, Any] = {  # modules; families/common.py says what each defines
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "gpt2": gpt2,
    "qwen2": qwen2,
    "phi3": phi3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "granite": granite,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "bert": bert,
    "roberta": roberta,
    "modernbert": modernbert,
}


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
