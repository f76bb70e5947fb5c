"""How does AdamW keep its two moments in a byte each?

Blocks of 256 values share their largest magnitude; each value is the nearest of 256 steps of the dynamic code times that
(Dettmers et al., arXiv 2110.02861). Codes, blocks and what is too small for 8 bits are bitsandbytes'. A block goes along
the flat tensor, so a part of a tensor that begins at a block can be updated by itself, and any other cannot.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.nf4 import dynamic_code
from training.update_rules import Group, Rule, State, counter, decayed

BLOCK = 256
SMALLEST = 4096  # values; what has fewer keeps its moments in fp32
_AT_ONCE = 2**22  # values whose fp32 moments are in memory at a time


def _adamw8bit(weight: Tensor, gradient: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    step = state["step"] + 1
    if "mean" in state:
        updated, mean, square = _adamw(weight, gradient, state["mean"], state["square"], step, group)
        return updated, {"step": step, "mean": mean, "square": square}
    signed, unsigned = tables(True, weight.device), tables(False, weight.device)
    values = {name: torch.empty_like(value) for name, value in state.items()} | {"step": step}
    weight = weight.contiguous()
    updated = torch.empty_like(weight)
    for first in range(0, weight.numel(), _AT_ONCE):
        part, blocks = slice(first, first + _AT_ONCE), slice(first // BLOCK, (first + _AT_ONCE) // BLOCK)
        mean = _decode(state["mean_code"].view(-1)[part], state["mean_largest"][blocks], signed)
        square = _decode(state["square_code"].view(-1)[part], state["square_largest"][blocks], unsigned)
        moved, mean, square = _adamw(weight.view(-1)[part], gradient.reshape(-1)[part], mean, square, step, group)
        updated.view(-1)[part] = moved
        for name, moment, table in (("mean", mean, signed), ("square", square, unsigned)):
            codes, largest = encode(moment, table)
            values[f"{name}_code"].view(-1)[part] = codes
            values[f"{name}_largest"][blocks] = largest
    return updated, values


def _adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.lerp(mean, gradient, 1.0 - group["beta1"])
    square = torch.lerp(square, gradient.square(), 1.0 - group["beta2"])
    denominator = (square / (1 - group["beta2"] ** step)).sqrt_().add_(group["eps"])
    update = mean / denominator * (group["lr"] / (1 - group["beta1"] ** step))
    return decayed(weight, group).sub_(update), mean, square


class Tables(NamedTuple):
    """code (256,): what a byte stands for, ascending. edges (256,): the value midway to the next code, infinity at last.
    first (65536,) int32: for the upper 16 bits of an fp32 number, the code of the smallest number that has them."""

    code: Tensor
    edges: Tensor
    first: Tensor


@cache
def tables(signed: bool, device: torch.device) -> Tables:
    code = dynamic_code(signed)
    edges = torch.cat([(code[:-1] + code[1:]) / 2, torch.tensor([torch.inf])])
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    smallest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    first = torch.bucketize(smallest, edges[:-1], out_int32=True)
    return Tables(code.to(device), edges.to(device), first.to(device))


def encode(values: Tensor, table: Tables) -> tuple[Tensor, Tensor]:
    """(n,) fp32 → ((n,) uint8 codes, the nearest; the largest magnitude of each block).

    Numbers with the same upper 16 bits lie closer together than two codes, so an edge is between them once at most: a
    look-up and a comparison find what a search would, in a tenth of the time.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = (blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(values)]
    first = table.first.index_select(0, (scaled.view(torch.int32) >> 16) & 0xFFFF)
    return (first + (scaled > table.edges.index_select(0, first))).to(torch.uint8), largest


def _decode(codes: Tensor, largest: Tensor, table: Tables) -> Tensor:
    """(n,) uint8 and the largest magnitude of each block → (n,) fp32."""
    values = table.code.index_select(0, codes.int())
    return values.mul_(largest.repeat_interleave(BLOCK, output_size=len(largest) * BLOCK)[: len(values)])


def _start(parameter: Tensor) -> State:
    if parameter.numel() < SMALLEST:
        zeros = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
        return {"step": counter(parameter)} | zeros
    blocks = -(-parameter.numel() // BLOCK)
    state = {"step": counter(parameter)}
    for name in ("mean", "square"):
        state[f"{name}_code"] = torch.zeros_like(parameter, dtype=torch.uint8, memory_format=torch.contiguous_format)
        state[f"{name}_largest"] = parameter.new_zeros(blocks)
    return state


ADAMW_8BIT = Rule("AdamW8bit", _start, _adamw8bit)
