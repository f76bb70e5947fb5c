"""How does a weight fit in 4 bits, and how does it come back?

NF4 (Dettmers et al. 2023, QLoRA): a value is one of 16 quantiles of the normal distribution times the largest magnitude
of its block of 64. Those magnitudes, absmax, are stored in 8 bits in turn: one of 256 values of a dynamic code (Dettmers
2016) times the largest of 256 blocks, plus their mean. That makes 4.127 bits a value. Bits, order and names of the
tensors are bitsandbytes': what it saved is read, and what is saved here it reads.

When Triton is chosen: on a GPU, with or without torch.compile. Both levels come back in one launch, a value costs one
shuffle between the threads of a warp, and the result may go straight into a part of a wider buffer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from errors import UserError
from kernels.jit import check_dtypes, jit, tl

BLOCK, ABSMAX_BLOCK = 64, 256  # values that share an absmax; absmax that share a second one
# quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: the paper's appendix E
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
CHUNK = 2**22  # values that the PyTorch paths hold in fp32 at a time, when they quantise
DECODED = 2**19  # and when they decode: 2 MiB, which a processor's cache holds
TINY = 1e-38  # what a block of zeros is divided by


@dataclass(frozen=True)
class NF4Weight:
    """A (N, K) weight in 4 bits; bitsandbytes' name of each tensor behind it.

    packed (N·K/2,) uint8: two codes a byte, the first in the high half ("weight"). Blocks run over the flattened weight.
    absmax: uint8 codes of each block's largest magnitude ("weight.absmax"), with code (256,) fp32 what they stand for
    ("weight.nested_quant_map"), absmax2 fp32 ("weight.nested_absmax") and offset, an fp32 scalar ("nested_offset").
    Without double quantisation absmax is fp32 itself, and code, absmax2 and offset are None.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]  # (N, K)
    block: int = BLOCK
    absmax_block: int = ABSMAX_BLOCK

    @classmethod
    def of(
        cls, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
        sizes: Sequence[int],
    ) -> "NF4Weight":  # fmt: skip
        """From `tensors` and `sizes`, which are what operators pass on."""
        rows, width, block, absmax_block = sizes
        return cls(packed, absmax, code, absmax2, offset, (rows, width), block, absmax_block)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.code, self.absmax2, self.offset

    @property
    def sizes(self) -> list[int]:
        return [*self.shape, self.block, self.absmax_block]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors if tensor is not None)


def quantise_nf4(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
    """`weight` (N, K) of any float dtype in NF4, on its device.

    A value becomes the nearest code, the lower one of two equally near. UserError where K is not a multiple of 8 (the
    kernels read 8 codes at a time) or a value is not finite. Runs in chunks: its working memory is some 60 MiB.
    """
    _check_width(weight.shape[1])
    flat = weight.detach().reshape(-1)
    quantiles = torch.tensor(QUANTILES, device=flat.device)
    packed = torch.empty(len(flat) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // BLOCK), device=flat.device)
    for start in range(0, len(flat), CHUNK):
        values = flat[start : start + CHUNK].float()
        codes, largest = _quantise_blocks(values, quantiles, BLOCK)
        absmax[start // BLOCK :][: len(largest)] = largest
        packed[start // 2 :][: len(values) // 2] = codes[::2] << 4 | codes[1::2]
    if not absmax.isfinite().all():
        raise UserError("a weight to quantise has values that are not finite; check the checkpoint that it comes from")
    if not double_quant:
        return NF4Weight(packed, absmax, None, None, None, tuple(weight.shape))
    offset = absmax.mean()
    code = dynamic_code().to(flat.device)
    codes, absmax2 = _quantise_blocks(absmax - offset, code, ABSMAX_BLOCK)
    return NF4Weight(packed, codes, code, absmax2, offset, tuple(weight.shape))


def _quantise_blocks(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(index of the nearest entry of `code` as uint8, largest magnitude of each block) of a flat fp32 tensor."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1 / largest.clamp(min=TINY))[:, None]
    nearest = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    return nearest.view(-1)[: len(values)].to(torch.uint8), largest


def dynamic_code(signed: bool = True) -> Tensor:
    """The 256 values of the dynamic code: seven decades, each with twice the steps of the one below; 0 and 1.

    Without negative values each decade has twice as many steps.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centres.tolist(), *(-centres if signed else centres[:0]).tolist()]
    return torch.tensor(sorted(values))


def dequantise_nf4(
    weight: NF4Weight, dtype: torch.dtype, *, out: Tensor | None = None, implementation: str = "torch"
) -> Tensor:
    """The (N, K) weight in `dtype`: quantile · absmax in fp32, rounded once. Both implementations give the same bits.

    out: (N, K) of that dtype to write into, rows contiguous and any distance apart, such as the first K columns of a
    wider buffer. Without it a new tensor is returned, by an operator that torch.compile knows.
    """
    if out is None:
        return _dequantise(*weight.tensors, weight.sizes, dtype, implementation)
    if tuple(out.shape) != weight.shape or out.dtype != dtype or out.stride(1) != 1:
        raise ValueError(f"out must be {weight.shape} of {dtype} with contiguous rows")
    if implementation == "triton":
        launch_dequantise(weight, out)
    else:
        _dequantise_into(weight, out)
    return out


def dequantise_nf4_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """`dequantise_nf4` in plain PyTorch: what the kernel is tested against."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    _dequantise_into(weight, out)
    return out


def _dequantise_into(weight: NF4Weight, out: Tensor) -> None:
    """A few rows at a time, as many as begin and end with a block."""
    rows, width = weight.shape
    quantiles = torch.tensor(QUANTILES, device=out.device)
    pairs = torch.stack((quantiles.repeat_interleave(16), quantiles.repeat(16)), 1)  # (256, 2): what a byte stands for
    pairs = pairs.view(torch.int64).view(-1)  # looked up as one number, five times as fast on a CPU
    absmax = _decoded_absmax(weight)
    unit = weight.block // gcd(weight.block, width)
    step = unit * max(1, DECODED // (unit * width))
    for row in range(0, rows, step):
        first, last = row * width, min(row + step, rows) * width
        values = pairs.index_select(0, weight.packed[first // 2 : last // 2].int()).view(torch.float32)
        scales = absmax[first // weight.block : -(-last // weight.block)]
        blocks = values[: len(values) // weight.block * weight.block].view(-1, weight.block)
        blocks *= scales[: len(blocks), None]
        if blocks.numel() < len(values):  # the last block of the weight is not full
            values[blocks.numel() :] *= scales[-1]
        out[row : row + step] = values.view(-1, width)


def _decoded_absmax(weight: NF4Weight) -> Tensor:
    """The fp32 absmax of each block: the product rounded, then the sum."""
    if weight.code is None:
        return weight.absmax
    assert weight.absmax2 is not None and weight.offset is not None, "they come with the code"
    scales = weight.absmax2[:, None].expand(-1, weight.absmax_block).reshape(-1)[: len(weight.absmax)]
    return weight.code.index_select(0, weight.absmax.int()) * scales + weight.offset


def _check_width(width: int) -> None:
    if width % 8:
        raise UserError(f"an NF4 weight needs rows of a multiple of 8 values, not {width}; keep this layer unquantised")


# ---------------------------------------------------------------------------------------------- bitsandbytes' tensors


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str) -> NF4Weight:
    """The weight `name` ("….q_proj.weight") of a checkpoint of bitsandbytes' NF4 layers.

    Beside it lie `name`.absmax, .quant_map, .quant_state.bitsandbytes__nf4 and, with double quantisation, .nested_absmax
    and .nested_quant_map. UserError where they are missing or describe another format.
    """
    try:
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
        packed = tensors[name].contiguous().view(torch.uint8).reshape(-1)
        absmax, quantiles = tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
        nested = [tensors[f"{name}.nested_{part}"] for part in ("quant_map", "absmax") if "nested_offset" in state]
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing; this is no checkpoint of bitsandbytes' NF4 layers") from None
    rows, width = state["shape"]
    _check_width(width)
    known = torch.equal(quantiles.cpu(), torch.tensor(QUANTILES)) and absmax.dtype in (torch.uint8, torch.float32)
    if not known or len(packed) * 2 != rows * width:
        raise UserError(f"{name} is not in bitsandbytes' NF4 format; quantise the original weights instead")
    if not nested:
        return NF4Weight(packed, absmax, None, None, None, (rows, width), state["blocksize"])
    code, absmax2 = nested
    offset = torch.tensor(state["nested_offset"], device=packed.device)
    sizes = state["blocksize"], state["nested_blocksize"]
    return NF4Weight(packed, absmax, code, absmax2, offset, (rows, width), *sizes)


def to_bitsandbytes(weight: NF4Weight, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors from which bitsandbytes restores `weight`; dtype: what it will decode to."""
    state = {"quant_type": "nf4", "blocksize": weight.block, "dtype": str(dtype).removeprefix("torch.")}
    state["shape"] = list(weight.shape)
    tensors = {
        name: weight.packed[:, None],
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": torch.tensor(QUANTILES, device=weight.packed.device),
    }
    if weight.code is not None:
        assert weight.absmax2 is not None and weight.offset is not None, "they come with the code"
        state |= {"nested_blocksize": weight.absmax_block, "nested_dtype": "float32"}
        state["nested_offset"] = weight.offset.item()
        tensors |= {f"{name}.nested_absmax": weight.absmax2, f"{name}.nested_quant_map": weight.code}
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


# -------------------------------------------------------------------------------------------------------------- kernels


@jit
def quantile_table(LANES: tl.constexpr):
    """The 16 quantiles, again and again: one a lane, for `decode_words`."""
    lane = tl.arange(0, LANES)
    b0, b1, b2, b3 = (lane & 1) != 0, (lane & 2) != 0, (lane & 4) != 0, (lane & 8) != 0
    q0 = tl.where(b0, -0.6961928009986877, -1.0)
    q2 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    q4 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    q6 = tl.where(b0, 0.0, -0.09105003625154495)
    q8 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    q10 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    q12 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    q14 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, q6, q4), tl.where(b1, q2, q0))
    high = tl.where(b2, tl.where(b1, q14, q12), tl.where(b1, q10, q8))
    return tl.where(b3, high, low)


@jit
def _codes_at(words, table, scale, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """One of the 8 codes of each word, decoded: a warp's lanes read their quantile from one another's registers."""
    return (tl.gather(table, (words >> SHIFT) & 15, 1) * scale).to(dtype)


@jit
def decode_words(words, table, scale, dtype: tl.constexpr):
    """(R, L) words of 8 codes, (R, L) quantile table, (R, L) fp32 absmax of each word → (R, 8 L) values.

    Value j is in byte j // 2, its high half first. A thread joins the 8 values of its words without asking another.
    """
    j04 = tl.join(_codes_at(words, table, scale, 4, dtype), _codes_at(words, table, scale, 20, dtype))
    j15 = tl.join(_codes_at(words, table, scale, 0, dtype), _codes_at(words, table, scale, 16, dtype))
    j26 = tl.join(_codes_at(words, table, scale, 12, dtype), _codes_at(words, table, scale, 28, dtype))
    j37 = tl.join(_codes_at(words, table, scale, 8, dtype), _codes_at(words, table, scale, 24, dtype))
    values = tl.join(tl.join(j04, j26), tl.join(j15, j37))  # (R, L, j & 4, j & 2, j & 1)
    return tl.reshape(values, (words.shape[0], words.shape[1] * 8))


@jit
def load_absmax(
    ABSMAX, CODE, ABSMAX2, OFFSET, block, inside, ABSMAX_BLOCK: tl.constexpr, DOUBLE: tl.constexpr
):  # fmt: skip
    """The fp32 absmax of each block: the product rounded, then the sum (launch with enable_fp_fusion=False)."""
    absmax = tl.load(ABSMAX + block, mask=inside, other=0)
    if DOUBLE:
        absmax2 = tl.load(ABSMAX2 + block // ABSMAX_BLOCK, mask=inside, other=0.0)
        absmax = tl.load(CODE + absmax.to(tl.int32)) * absmax2 + tl.load(OFFSET)
    return absmax


@jit
def _dequantise_kernel(
    WORDS, ABSMAX, CODE, ABSMAX2, OFFSET, OUT, rows, row_words, pitch,
    BLOCK_WORDS: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, DOUBLE: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of TILE_ROWS rows and 32 words, a warp's width: 4-byte loads of 8 codes each, 16-byte stores."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    word = tl.program_id(1) * 32 + tl.arange(0, 32)
    inside = (row < rows)[:, None] & (word < row_words)[None, :]
    at = row[:, None] * row_words + word[None, :]
    words = tl.load(WORDS + tl.multiple_of(at, [1, 1]), mask=inside, other=0)  # the hint: one word a thread, not four
    absmax = load_absmax(ABSMAX, CODE, ABSMAX2, OFFSET, at // BLOCK_WORDS, inside, ABSMAX_BLOCK, DOUBLE)
    table = tl.broadcast_to(quantile_table(32)[None, :], (TILE_ROWS, 32))
    values = decode_words(words, table, absmax, OUT.dtype.element_ty)
    column = tl.program_id(1) * 256 + tl.arange(0, 256)
    inside = (row < rows)[:, None] & (column < row_words * 8)[None, :]
    tl.store(OUT + row[:, None] * pitch + column[None, :], values, mask=inside)


TILE_ROWS = 16


def launch_dequantise(weight: NF4Weight, out: Tensor) -> None:
    """Write the (N, K) weight into `out`, whose rows are contiguous."""
    check_dtypes("dequantise_nf4", out)
    rows, width = weight.shape
    if rows == 0:
        return
    _dequantise_kernel[(-(-rows // TILE_ROWS), -(-width // 256))](
        weight.packed.view(torch.int32), *weight.tensors[1:], out, rows, width // 8, out.stride(0),
        BLOCK_WORDS=weight.block // 8, ABSMAX_BLOCK=weight.absmax_block, DOUBLE=weight.code is not None,
        TILE_ROWS=TILE_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("groundup::dequantise_nf4", mutates_args=())
def _dequantise(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    weight = NF4Weight.of(packed, absmax, code, absmax2, offset, sizes)
    out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    return dequantise_nf4(weight, dtype, out=out, implementation=implementation)


@_dequantise.register_fake
def _(packed, absmax, code, absmax2, offset, sizes, dtype, implementation):
    return torch.empty(sizes[:2], dtype=dtype, device=packed.device)


def weight_without_memory(rows: int, width: int) -> NF4Weight:
    """A weight on the meta device, to compile kernels for."""
    with torch.device("meta"):
        blocks = rows * width // BLOCK
        return NF4Weight(
            torch.empty(rows * width // 2, dtype=torch.uint8), torch.empty(blocks, dtype=torch.uint8),
            torch.empty(256), torch.empty(blocks // ABSMAX_BLOCK), torch.empty(()), (rows, width),
        )  # fmt: skip


def resource_cases() -> list:
    """(name, bound, launch) of what to compile without a GPU (bench/resources.py)."""

    def launch(dtype: torch.dtype) -> None:
        launch_dequantise(weight_without_memory(4096, 4096), torch.empty(4096, 4112, dtype=dtype, device="meta"))

    return [
        (f"dequantise to {dtype}".replace("torch.", ""), "stores", lambda dtype=dtype: launch(dtype))
        for dtype in (torch.bfloat16, torch.float32)
    ]
