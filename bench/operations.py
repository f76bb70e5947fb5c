"""What is measured: each kernel's inputs, plain PyTorch reference and ways to run it, and the work it must do.

The work is the least that any implementation can do: every input read once, every output written once, and the products
of the mathematics. Rates and shares are this work over the time taken, so one that does more shows a lower rate.

    operation                  forward                          backward                            bound by
    rms_norm                   x → y: 2 n                       x, dy → dx: 3 n                     memory
    add_rms_norm               x, u → s, y: 4 n                 s, dy, ds → dx: 4 n                 memory
    add_rms_norm_fp32_stream   as above, x and s in fp32        as above, s, ds and dx in fp32      memory
    swiglu                     g, u → h: 3 m                    g, u, dh → dg, du: 5 m              memory
    rope                       q, k → q, k: 2 h                 the same                            memory
    linear_cross_entropy       2 N H V                          4 N H V                             products
    token_statistics           2 N H V                          4 N H V                             products
    lora_linear                2 M K N + 2 M r (K + N)          the same + 2 M r (K + N)            products
    norm_lora_linear           the same                         the same                            products
    nf4_dequantise             ½ byte + 1/64 → one number       none                                memory
    nf4_linear                 as lora_linear                   as lora_linear                      products
    nf4_few_rows               the weight in NF4, x, y          none                                memory
    attention                  2 B A T² D (causal: half of 4)   5/2 of it                           products

n = tokens · hidden, m = tokens · mlp, h = tokens · (heads + key-value heads) · head size, each times the element's size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import (
    ATTENTIONS,
    EPS,
    FEW_ROWS,
    IGNORED,
    MODELS,
    NF4_BYTES,
    PRODUCTS,
    RANK,
    SCALE,
    SIZES,
    Draw,
    Inputs,
    Operation,
    Prepared,
    Size,
    Way,
)
from kernels.attention import attention
from kernels.linear_cross_entropy import linear_cross_entropy, token_statistics
from kernels.lora_linear import Adapter, augmented_weight, lora_linear
from kernels.nf4 import dequantise_nf4, quantise_nf4
from kernels.nf4_linear import nf4_linear, nf4_linear_reference
from kernels.norm_lora import norm_lora_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu

# ------------------------------------------------------------------------------------------------ bound by memory


def _norm_inputs(size: Size, draw: Draw) -> Inputs:
    return {"x": draw.normal(size.tokens, size.hidden), "weight": draw.gains(size.hidden)}


def _add_norm_inputs(size: Size, draw: Draw) -> Inputs:
    x, update = (draw.normal(size.tokens, size.hidden) for _ in range(2))
    return {"x": x, "update": update, "weight": draw.gains(size.hidden)}


def _add_norm_fp32_inputs(size: Size, draw: Draw) -> Inputs:
    x = draw.normal(size.tokens, size.hidden, dtype=torch.float32)
    weight = draw.gains(size.hidden, dtype=torch.float32)
    return {"x": x, "update": draw.normal(size.tokens, size.hidden), "weight": weight}


def _add_norm(implementation: str, fp32_stream: bool = False) -> Way:
    """With an fp32 residual stream, as the model trains under autocast, y has the update's dtype."""

    def call(x: Tensor, update: Tensor, weight: Tensor):
        out_dtype = update.dtype if fp32_stream else None
        return add_rms_norm(x, update, weight, EPS, out_dtype=out_dtype, implementation=implementation)

    return call


def _swiglu_inputs(size: Size, draw: Draw) -> Inputs:
    return {name: draw.normal(size.tokens, size.mlp) for name in ("gate", "up")}


def _rope_inputs(size: Size, draw: Draw) -> Inputs:
    """cos and sin (1, T, D/2) fp32; q and k (B, T, heads, D)."""
    frequencies = 10000.0 ** -(torch.arange(0, size.head_dim, 2, device=draw.device) / size.head_dim)
    angles = (torch.arange(size.length, device=draw.device)[:, None] * frequencies)[None].float()
    return {
        "q": draw.normal(size.rows, size.length, size.heads, size.head_dim),
        "k": draw.normal(size.rows, size.length, size.kv_heads, size.head_dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def _memory_operations() -> list[Operation]:
    def elements(forward: float, backward: float, width: str = "hidden"):
        return lambda size, itemsize: tuple(
            count * size.tokens * getattr(size, width) * itemsize for count in (forward, backward)
        )

    def fp32_stream(size: Size, itemsize: int) -> tuple[float, float]:
        count = size.tokens * size.hidden
        return count * (4 + itemsize + 4 + itemsize), count * (4 + itemsize + 4 + 4 + itemsize)

    def heads(size: Size, itemsize: int) -> tuple[float, float]:
        moved = 2 * size.tokens * (size.heads + size.kv_heads) * size.head_dim * itemsize
        return moved, moved

    sizes = {name: SIZES[name] for name in ("tiny", *MODELS)}
    with_published = {**sizes, "4096x4096": SIZES["4096x4096"]}
    return [
        Operation(
            "rms_norm", with_published, "memory", elements(2, 3), _norm_inputs,
            reference=lambda x, weight: rms_norm(x, weight, EPS),
            ways={
                "torch": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
                "ours": lambda x, weight: rms_norm(x, weight, EPS, implementation="triton"),
            },
            learned=("x", "weight"), tokens=("x",),
        ),
        Operation(
            "add_rms_norm", with_published, "memory", elements(4, 4), _add_norm_inputs,
            reference=_add_norm("torch"), ways={"ours": _add_norm("triton")},
            learned=("x", "update", "weight"), tokens=("x", "update"),
        ),
        Operation(
            "add_rms_norm_fp32_stream", sizes, "memory", fp32_stream, _add_norm_fp32_inputs,
            reference=_add_norm("torch", True), ways={"ours": _add_norm("triton", True)},
            learned=("x", "update", "weight"), tokens=("x", "update"),
        ),
        Operation(
            "swiglu", sizes, "memory", elements(3, 5, "mlp"), _swiglu_inputs,
            reference=lambda gate, up: swiglu(gate, up),
            ways={"ours": lambda gate, up: swiglu(gate, up, implementation="triton")},
            learned=("gate", "up"), tokens=("gate", "up"),
        ),
        Operation(
            "rope", sizes, "memory", heads, _rope_inputs,
            reference=lambda q, k, cos, sin: rope(q, k, cos, sin),
            ways={"ours": lambda q, k, cos, sin: rope(q, k, cos, sin, implementation="triton")},
            learned=("q", "k"), tokens=("q", "k", "cos", "sin"), sequences=True,
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- bound by products: head


def _head_inputs(size: Size, draw: Draw) -> Inputs:
    hidden, weight = draw.normal(size.tokens, size.hidden), draw.weights(size.vocabulary, size.hidden)
    return {"hidden": hidden, "weight": weight, "targets": draw.integers(size.vocabulary, size.tokens)}


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N, V) in at least fp32, which is what the chunked ways never hold."""
    logits = F.linear(hidden, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _whole_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(whole_logits(hidden, weight, targets), targets, reduction="sum", ignore_index=IGNORED)


def _whole_statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = whole_logits(hidden, weight, targets).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def chunked_loss(implementation: str, chunk_rows: int | None = None) -> Way:
    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunk_bytes = None if chunk_rows is None else chunk_rows * 4 * len(weight)
        sums = linear_cross_entropy(
            hidden, weight, targets, ignore_index=IGNORED, chunk_bytes=chunk_bytes, implementation=implementation
        )
        return sums.total

    return call


def _chunked_statistics(implementation: str) -> Way:
    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        statistics = token_statistics(hidden, weight, targets, implementation=implementation)
        return statistics.logprobs, statistics.entropy

    return call


def _torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own chunked loss, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def _head_operations() -> list[Operation]:
    def work(size: Size, itemsize: int) -> tuple[float, float]:
        product = 2.0 * size.tokens * size.hidden * size.vocabulary
        return product, 2 * product

    sizes = {name: SIZES[name] for name in ("tiny", *MODELS)}
    common: dict[str, Any] = {"learned": ("hidden", "weight"), "tokens": ("hidden", "targets")}
    torch_way = {"torch": _torch_loss} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {}
    loss_ways: dict[str, Way | Prepared] = {
        "chunked torch": chunked_loss("torch"),
        **torch_way,
        "ours": chunked_loss("triton"),
    }
    statistics_ways: dict[str, Way | Prepared] = {
        "chunked torch": _chunked_statistics("torch"),
        "ours": _chunked_statistics("triton"),
    }
    return [
        Operation(
            "linear_cross_entropy",
            sizes,
            "products",
            work,
            _head_inputs,
            _whole_loss,
            loss_ways,
            summed=True,
            **common,
        ),
        Operation(
            "token_statistics", sizes, "products", work, _head_inputs, _whole_statistics, statistics_ways, **common
        ),
    ]


# ---------------------------------------------------------------------------------------------- bound by products: LoRA


def _lora_inputs(shape: tuple[int, int, int], draw: Draw) -> Inputs:
    rows, outputs, inputs = shape
    x, weight = draw.normal(rows, inputs), draw.weights(outputs, inputs)
    return {"x": x, "weight": weight, "a": draw.weights(RANK, inputs), "b": draw.weights(outputs, RANK)}


def _adapters(weight_rows: int, named: Inputs) -> list[Adapter]:
    """The adapters of a stacked weight (a0, b0, a1, b1, …), one below the other, or the only one (a, b)."""
    if "a" in named:
        return [Adapter(named["a"], named["b"], SCALE)]
    adapters, row = [], 0
    for number in range(sum(name.startswith("a") and name[1:].isdigit() for name in named)):
        adapters.append(Adapter(named[f"a{number}"], named[f"b{number}"], SCALE, row))
        row += len(named[f"b{number}"])
    assert row == weight_rows
    return adapters


def _lora(path: str) -> Way:
    def call(x: Tensor, weight: Tensor, augmented: Tensor | None = None, **named: Tensor) -> Tensor:
        return lora_linear(x, weight, _adapters(len(weight), named), path=path, augmented=augmented)

    return call


def _with_augmented(inputs: Inputs) -> Inputs:
    """The buffer [W | B] that training keeps from step to step."""
    return {**inputs, "augmented": augmented_weight(inputs["weight"], _adapters(len(inputs["weight"]), inputs))}


def _norm_lora_inputs(size: Size, draw: Draw) -> Inputs:
    """The norm before attention and the stacked q, k, v projection, an adapter on each."""
    parts = [size.heads * size.head_dim, size.kv_heads * size.head_dim, size.kv_heads * size.head_dim]
    inputs = {**_add_norm_inputs(size, draw), "projection": draw.weights(sum(parts), size.hidden)}
    for number, part in enumerate(parts):
        inputs |= {f"a{number}": draw.weights(RANK, size.hidden), f"b{number}": draw.weights(part, RANK)}
    return inputs


def _norm_then_lora(norm: str, path: str) -> Way:
    def call(x, update, weight, projection, augmented=None, **named):
        y, s = add_rms_norm(x, update, weight, EPS, implementation=norm)
        adapters = _adapters(len(projection), named)
        return lora_linear(y, projection, adapters, path=path, augmented=augmented), s

    return call


def _fused_norm_lora(x, update, weight, projection, augmented, **named):
    adapters = _adapters(len(projection), named)
    return norm_lora_linear(x, weight, EPS, augmented, adapters, update=update, implementation="triton")


def _norm_then_linear(x, update, weight, projection, **named):
    """Without adapters: what they are measured against."""
    y, s = add_rms_norm(x, update, weight, EPS, implementation="triton" if x.is_cuda else "torch")
    return F.linear(y, projection.detach()), s


def _with_augmented_projection(inputs: Inputs) -> Inputs:
    adapters = _adapters(len(inputs["projection"]), inputs)
    return {**inputs, "augmented": augmented_weight(inputs["projection"], adapters)}


def _lora_work(rows: int, outputs: int, inputs: int, ranks: float, itemsize: int = 0) -> tuple[float, float]:
    base, adapter = 2.0 * rows * outputs * inputs, 2.0 * rows * ranks
    return base + adapter, base + 2 * adapter


def _lora_operations() -> list[Operation]:
    def work(shape: tuple[int, int, int], itemsize: int) -> tuple[float, float]:
        return _lora_work(*shape, RANK * (shape[1] + shape[2]))

    def norm_work(size: Size, itemsize: int) -> tuple[float, float]:
        outputs = (size.heads + 2 * size.kv_heads) * size.head_dim
        return _lora_work(size.tokens, outputs, size.hidden, RANK * (3 * size.hidden + outputs))

    parts = tuple(f"{letter}{number}" for number in range(3) for letter in "ab")
    return [
        Operation(
            "lora_linear", PRODUCTS, "products", work, _lora_inputs,
            reference=_lora("torch"),
            ways={"ours augmented": Prepared(_with_augmented, _lora("augmented")), "ours one_pass": _lora("one_pass")},
            floors={"base": lambda x, weight, a, b: F.linear(x, weight)},
            learned=("x", "a", "b"), tokens=("x",),
        ),
        Operation(
            "norm_lora_linear", {name: SIZES[name] for name in ("tiny", *MODELS)}, "products", norm_work,
            _norm_lora_inputs, reference=_norm_then_lora("torch", "torch"),
            ways={
                "ours": Prepared(_with_augmented_projection, _fused_norm_lora),
                "ours, norm apart": Prepared(_with_augmented_projection, _norm_then_lora("triton", "augmented")),
            },
            floors={"base": _norm_then_linear},
            learned=("x", "update", "weight", *parts), tokens=("x", "update"),
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ NF4, attention


def _nf4_inputs(shape: tuple[int, int, int], draw: Draw) -> Inputs:
    """`like` carries the dtype to decode to: float64 where the truth is wanted."""
    weight = draw.weights(shape[1], shape[2])
    return {"packed": quantise_nf4(weight), "plain": weight, "like": draw.normal(1)}


def _nf4_linear_inputs(shape: tuple[int, int, int], draw: Draw) -> Inputs:
    inputs = _lora_inputs(shape, draw)
    return {**inputs, "packed": quantise_nf4(inputs["weight"])}


def _decode(implementation: str) -> Way:
    return lambda packed, plain, like: dequantise_nf4(packed, like.dtype, implementation=implementation)


def _nf4_lora(x, weight, packed, a, b):
    return nf4_linear(x, packed, [Adapter(a, b, SCALE)], implementation="triton")


def _nf4_few_rows(shape: tuple[int, int, int], draw: Draw) -> Inputs:
    """The layer in generation: a token of each of a few sequences, no gradients."""
    weight = draw.weights(*shape[1:])
    return {"x": draw.normal(shape[0], shape[2]), "weight": weight, "packed": quantise_nf4(weight)}


def _naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v with all scores in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _sdpa(backend: str) -> Way:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def _attention_inputs(shape: tuple[int, int, int, int], draw: Draw) -> Inputs:
    rows, heads, length, width = shape
    return {name: draw.normal(rows, length, heads, width) for name in ("q", "k", "v")}


def _other_operations() -> list[Operation]:
    def decoded(shape: tuple[int, int, int], itemsize: int) -> tuple[float, float]:
        return shape[1] * shape[2] * (NF4_BYTES + itemsize), 0.0

    def read(shape: tuple[int, int, int], itemsize: int) -> tuple[float, float]:
        rows, outputs, inputs = shape
        return outputs * inputs * NF4_BYTES + rows * (inputs + outputs) * itemsize, 0.0

    def products(shape: tuple[int, int, int], itemsize: int) -> tuple[float, float]:
        return _lora_work(*shape, RANK * (shape[1] + shape[2]))

    def scores(shape: tuple[int, int, int, int], itemsize: int) -> tuple[float, float]:
        rows, heads, length, width = shape
        forward = 2.0 * rows * heads * length**2 * width
        return forward, 2.5 * forward

    backends = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return [
        Operation(
            "nf4_dequantise", PRODUCTS, "memory", decoded, _nf4_inputs,
            reference=_decode("torch"), ways={"ours": _decode("triton")},
        ),
        Operation(
            "nf4_linear", PRODUCTS, "products", products, _nf4_linear_inputs,
            reference=lambda x, weight, packed, a, b: nf4_linear_reference(x, packed, [Adapter(a, b, SCALE)]),
            ways={"ours": _nf4_lora}, floors={"base": lambda x, weight, packed, a, b: F.linear(x, weight)},
            learned=("x", "a", "b"), tokens=("x",),
        ),
        Operation(
            "nf4_few_rows", FEW_ROWS, "memory", read, _nf4_few_rows,
            reference=lambda x, weight, packed: nf4_linear_reference(x, packed),
            ways={"ours": lambda x, weight, packed: nf4_linear(x, packed, implementation="triton")},
            floors={"base": lambda x, weight, packed: F.linear(x, weight)}, tokens=("x",),
        ),
        Operation(
            "attention", ATTENTIONS, "products", scores, _attention_inputs,
            reference=_naive_attention,
            ways={
                **{f"sdpa {name}": _sdpa(constant) for name, constant in backends.items()},
                "chosen": lambda q, k, v: attention(q, k, v, causal=True),
            },
            learned=("q", "k", "v"), tokens=("q", "k", "v"), sequences=True, compiled=False,
        ),
    ]  # fmt: skip


def operations() -> dict[str, Operation]:
    everything = [*_memory_operations(), *_head_operations(), *_lora_operations(), *_other_operations()]
    return {operation.name: operation for operation in everything}
