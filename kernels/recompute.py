"""Which results of a block are kept for its backward pass, and how are the others computed again? (--activation_checkpointing)

    none        all that autograd asks for
    full        the block's inputs alone: all of it is computed again (Chen et al. 2016, https://arxiv.org/abs/1604.06174)
    selective   those of the operations in KEPT as well, matrix products and attention, which take long to compute for their
                size; norms, activations, rotations and dropout are computed again (Korthikanti et al. 2022, arXiv 2205.05198)

What is computed again has the same bits, and so have the gradients: nothing in a block draws from a generator
(kernels/dropout.py), and what it reads besides its inputs is put back as it was in the first pass.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# by name, as which of them there are depends on torch's version, and who imports what on whether ours are registered
KEPT = {
    "aten": (
        "mm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward",
    ),
    "torch_attn": ("_varlen_attn",),
    "flash_attn": ("_flash_attn_varlen_forward",),
    "higher_order": ("flex_attention",),
    "groundup": (
        "linear", "attention_by_document", "nf4_linear", "lora_augmented_product", "lora_one_pass",
        "lora_one_pass_given_low", "grouped_linear", "grouped_nf4_linear",
    ),
}  # fmt: skip
# What a module reads beside its inputs and may have changed by the backward pass, such as which adapters are active, it names
# in an attribute of this name.
READS = "read_in_a_pass"

NAMES = ("none", "selective", "full")

_products_are_kept = False


def products_are_kept() -> bool:
    """Whether this pass keeps what products gave, which then must not be changed in place."""
    return _products_are_kept


def share_kept(setting: str) -> float | None:
    """The number that a setting of --activation_checkpointing is, or None for one of NAMES. ValueError for neither."""
    if setting in NAMES:
        return None
    share = float(setting)
    if not 0 <= share <= 1:
        raise ValueError(f"{share} is no share")
    return share


def ways(setting: str, count: int) -> list[str]:
    """One of NAMES for each of `count` blocks: by a share so many of them keep all, and the others, evenly spread, nothing."""
    share = share_kept(setting)
    if share is None:
        return [setting] * count
    again = count - round(share * count)
    return ["full" if (block + 1) * again // count > block * again // count else "none" for block in range(count)]


def recomputed(compute: Callable[..., Any], block: nn.Module, how: str, *inputs: Any) -> Any:
    """compute(*inputs), a pass through `block` that keeps what `how`, "full" or "selective", says."""
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if torch.compiler.is_compiling():  # what is read is in the graph, and in place there is nothing
        if how == "selective":
            settings["context_fn"] = _selective_contexts
        return checkpoint(compute, *inputs, **settings)
    read = [
        (module, {name: getattr(module, name) for name in getattr(module, READS)})
        for module in block.modules()
        if hasattr(module, READS)
    ]

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        if how == "full":
            return contextlib.nullcontext(), _as_read(read)
        first, again = _selective_contexts()
        return _keeping_products(first), _both(_as_read(read), _keeping_products(again))

    return checkpoint(compute, *inputs, context_fn=contexts, **settings)


def is_kept(operation: Any, args: tuple) -> bool:
    """Whether "selective" keeps what this operation, of these arguments, gives."""
    namespace, name = operation.namespace, operation.__name__.partition(".")[0]
    if (namespace, name) == ("aten", "addmm"):  # of a layer's bias; not the sum with an adapter's small product
        return args[0].dim() == 1
    return name in KEPT.get(namespace, ())


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = is_kept(operation, args)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _keeping_products(mode: contextlib.AbstractContextManager) -> Iterator[None]:
    global _products_are_kept
    before, _products_are_kept = _products_are_kept, True
    try:
        with mode:
            yield
    finally:
        _products_are_kept = before


@contextlib.contextmanager
def _as_read(read: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Inside, modules have what they had when a pass read it."""
    now = [(module, {name: getattr(module, name) for name in values}) for module, values in read]
    try:
        _give(read)
        yield
    finally:
        _give(now)


def _give(values_of: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, values in values_of:
        for name, value in values.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _both(one: contextlib.AbstractContextManager, other: contextlib.AbstractContextManager) -> Iterator[None]:
    with one, other:
        yield
