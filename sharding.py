"""How is a model handled of whose parameters each rank holds a part? Filled, read whole, gathered, and gone through together.

Its parameters are DTensors (FSDP2, https://arxiv.org/abs/2304.11277 and torch.distributed.fsdp.fully_shard), or DeepSpeed's,
whose engine is then the model's attribute ZERO (training/deepspeed.py). Of a plain model all of this is what it always was:
nothing is gathered, and no rank waits for another.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ranks import Ranks, move_on

T = TypeVar("T")
ZERO = "zero"


class Deferred(Tensor):
    """A tensor without values, and what gives them: the ranks' parts put together, when `whole` asks for it.

    Views of it (a transpose, one of several experts) are views of what will be put together.
    """

    build: Callable[[], Tensor]
    _meta: Tensor

    @classmethod
    def like(cls, meta: Tensor, build: Callable[[], Tensor]) -> "Deferred":
        """meta: on "meta", with the shape, strides and dtype of what `build` returns. Every rank calls `build`."""
        made = cls._make_wrapper_subclass(cls, meta.shape, meta.stride(), dtype=meta.dtype)
        made.build, made._meta = build, meta
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first, *others = args
        seen = func(first._meta, *others, **(kwargs or {}))

        def build() -> Any:
            return func(first.build(), *others, **(kwargs or {}))

        if isinstance(seen, Tensor):
            return cls.like(seen, build)
        return [cls.like(one, lambda place=place: build()[place]) for place, one in enumerate(seen)]  # type: ignore[misc]


def is_part(tensor: Tensor) -> bool:
    """Whether `tensor` has to be put together. Where nobody imported DTensors' module, which takes a second, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, Deferred) or (module is not None and isinstance(tensor, module.DTensor))


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are gathered for a pass, which is then one of all ranks (FSDP2, ZeRO)."""
    return bool(_sharded_modules(model)) or ZERO in vars(model)


def held(parameter: Tensor) -> Tensor:
    """The parameter's values; of one that DeepSpeed shares out (ZeRO 3) what stands for them until `whole` is asked."""
    shape = getattr(parameter, "ds_shape", None)
    if shape is None:
        return parameter.detach()

    def build() -> Tensor:
        import deepspeed

        if parameter.numel() == shape.numel():  # it stays gathered
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    return Deferred.like(torch.empty(shape, dtype=parameter.dtype, device="meta"), build)


def has_parts(model: nn.Module) -> bool:
    """Whether ranks hold parts of the model, gathered for a pass or not, so that it takes all of them to save it."""
    return ZERO in vars(model) or any(is_part(parameter) for parameter in model.parameters())


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors, those together that are shared out over the same ranks: one operation takes no others at once."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(mesh_of(tensor), []).append(tensor)
    return list(found.values())


def mesh_of(tensor: Tensor) -> Any:
    """Over which ranks a tensor is shared out: a DeviceMesh, or None."""
    return tensor.device_mesh if is_part(tensor) else None  # type: ignore[attr-defined]


def norm_of_all(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, with the parts of all ranks, on each of them; every rank calls it."""
    norms = [whole(torch.nn.utils.get_total_norm(some)) for some in alike(tensors)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def gives_up_blocks(model: nn.Module) -> bool:
    """Of a sharded model: whether a block's weights are given up after its forward pass (training/parallel.py)."""
    return any(module.reshards for module in _sharded_modules(model))


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, on each of them, so every rank calls it; a plain one as it is."""
    if isinstance(tensor, Deferred):
        return tensor.build()
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def like(values: Tensor, other: Tensor) -> Tensor:
    """Of a whole tensor the part that this rank holds of `other`; the tensor itself where `other` is plain. No rank waits."""
    if not is_part(other):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(values.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor's values into `target`, of which this rank may hold a part only."""
    target.copy_(like(values, target))


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, each rank has all of the model, and rows to itself, so that it may use it alone, as to draw answers. Every rank
    enters.

    It costs the memory of all weights. Nothing may be trained inside.
    """
    if ZERO in vars(model):
        with vars(model)[ZERO].gathered():
            yield
        return
    modules = _sharded_modules(model)
    if modules:  # all of one root, though a part of it, such as PPO's policy, may be the first to compute
        modules[0]._get_fsdp_state()._lazy_init()
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    put_back = _stand_alone(model)
    try:
        yield
    finally:
        put_back()
        for module in modules:
            module.set_reshard_after_forward(module.reshards, recurse=False)
            module.reshard()


def _stand_alone(model: nn.Module) -> Callable[[], None]:
    """Let the model share neither rows nor matrices with other ranks. Returns what puts all back."""
    groups = [
        (module, name, value)
        for module in model.modules()
        for name in ("context", "group")
        if (value := getattr(module, name, None)) is not None
    ]
    parts = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_part(parameter)
    ]
    wholes: dict[int, nn.Parameter] = {}  # of what is tied, one
    for parameters, name, parameter in parts:
        if id(parameter) not in wholes:
            wholes[id(parameter)] = nn.Parameter(whole(parameter.detach()), requires_grad=False)
        parameters[name] = wholes[id(parameter)]
    for module, name, _ in groups:
        setattr(module, name, None)

    def put_back() -> None:
        for parameters, name, parameter in parts:
            parameters[name] = parameter
        for module, name, value in groups:
            setattr(module, name, value)

    return put_back


def in_step(batches: Iterable[T], model: nn.Module, ranks: Ranks, idle: Callable[[], T]) -> Iterator[tuple[T, bool]]:
    """Each batch, and that it counts. Where the model is sharded a pass is one of all ranks: those whose batches are through
    go on with their last one, or with what `idle` gives where there was none, and it does not count.
    """
    if not is_sharded(model):
        for one in batches:
            move_on()
            yield one, True
        return
    own, last = iter(batches), None
    while True:
        batch = next(own, None)
        if not ranks.sum([float(batch is not None)])[0]:
            break
        move_on()
        last = batch if batch is not None else last if last is not None else idle()
        yield last, batch is not None
    reshard(model)


def padded(batches: list[T], model: nn.Module, ranks: Ranks) -> list[tuple[T, bool]]:
    """As `in_step` gives them, of batches that are all there; of each rank at least one."""
    missing = ranks.largest(len(batches)) - len(batches) if is_sharded(model) else 0
    return [*((batch, True) for batch in batches), *[(batches[-1], False)] * missing]


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass without a backward pass has left gathered."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
