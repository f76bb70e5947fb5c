"""What does a checkpoint hold of a model, its optimizers and the random generators, and under which names?"""

import base64
import random
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from families.weights import stored_views
from ranks import unwrap
from sharding import ZERO, held, is_part


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers as the family's folder holds them, in the model's order; of tied ones only the first.

    By the folder's names, and as views of the model's, of experts and transposed weights too (families/weights.py).

    Raises ValueError for a model that was replaced by its compiled copy: such names load nowhere.
    """
    tensors: dict[str, Tensor] = {}
    seen = set()
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for name, tensor in unwrap(model).state_dict().items():
        if "_orig_mod." in name:
            raise ValueError(f"{name}: compile in place, model.compile(); torch.compile(model) renames the weights")
        if tensor.numel() and not is_part(tensor):  # whose parts may be empty, and of which no two are tied
            identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if identity in seen:
                continue
            seen.add(identity)
        values = held(parameters[name]) if name in parameters else tensor
        tensors |= stored_views(unwrap(model).config.family, name, values)
    return tensors


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every optimizer state as "PARAMETER_NAME.STATE_NAME"; a step counter is a 0-dimensional tensor.

    What torch's optimizers hold as None, such as the momentum of an SGD without one, is left out.
    """
    names = parameter_names(model)
    if ZERO in vars(model):
        return vars(model)[ZERO].named_states()
    return {
        f"{names[id(parameter)]}.{state_name}": torch.as_tensor(value)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for state_name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in unwrap(model).named_parameters()}


def optimizer_names(optimizers: list[torch.optim.Optimizer]) -> str:
    return "+".join(getattr(optimizer, "name", type(optimizer).__name__) for optimizer in optimizers)


def rng_state() -> dict[str, object]:
    """This process's random generators (torch CPU, current CUDA device, Python, NumPy) as JSON values, no pickle."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    state: dict[str, object] = {
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
