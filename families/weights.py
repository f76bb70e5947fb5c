"""Under which name, and in which layout, does a folder hold each weight of the model?

The model's own names are Hugging Face's Llama's. A family's file lists those modules that its folder calls otherwise, `N`
standing for a layer's number and `E` for an expert's, and those whose weight it stores as (in, out).
"""

import re

from torch import Tensor

from families.names import FAMILIES

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the first number between dots


def stored_path(family: str, path: str) -> str:
    """The folder's name of a module, such as "model.layers.3.self_attn.o_proj" → "transformer.h.3.attn.c_proj"."""
    found = _LAYER.search(path)
    pattern = path if found is None else f"{path[: found.start()]}N{path[found.end() :]}"
    stored = FAMILIES[family].NAMES.get(pattern, pattern)
    return stored if found is None else stored.replace(".N.", f".{found.group()}.", 1)


def is_transposed(family: str, path: str) -> bool:
    """Whether the folder stores the weight of the model's module `path` as (in, out)."""
    return _LAYER.sub("N", path, count=1) in FAMILIES[family].TRANSPOSED


def canonical_name(family: str, name: str) -> str | None:
    """The family's own name for a tensor that a file calls `name`; None for a buffer that is no weight."""
    if name.endswith("rotary_emb.inv_freq"):  # which transformers before 4.32 saved
        return None
    return FAMILIES[family].canonical(name)


def stored_views(family: str, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors that a folder holds for the model's parameter `name`, by their names there, as views of it.

    So loading copies into them and saving writes them. Mostly one; of stacked experts three for each.
    """
    module, _, leaf = name.rpartition(".")
    if leaf in ("gate_up_proj", "down_proj"):
        return _of_experts(family, module, leaf, parameter)
    if name in FAMILIES[family].NAMES or leaf not in ("weight", "bias"):
        return {FAMILIES[family].NAMES.get(name, name): parameter}
    transposed = leaf == "weight" and is_transposed(family, module)
    return {f"{stored_path(family, module)}.{leaf}": parameter.t() if transposed else parameter}


def _of_experts(family: str, module: str, leaf: str, stacked: Tensor) -> dict[str, Tensor]:
    """Of gate_up_proj (E, 2F, H), gate first, or down_proj (E, H, F)."""
    gate, up, down = FAMILIES[family].EXPERTS
    layer = _LAYER.search(module)
    assert layer is not None, "experts stand in layers"
    views: dict[str, Tensor] = {}
    for expert, weight in enumerate(stacked):
        parts = {down: weight} if leaf == "down_proj" else dict(zip((gate, up), weight.chunk(2), strict=True))
        for pattern, part in parts.items():
            stored = pattern.replace(".N.", f".{layer.group()}.").replace(".E.", f".{expert}.")
            # the body has another name in some classes (families/task_names.py)
            views[f"{module.partition('.')[0]}.{stored.partition('.')[2]}"] = part
    return views
