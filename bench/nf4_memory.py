"""What does QLoRA keep for its backward pass, and at most, where a 4-bit weight is decoded again and where it is kept?

    python bench/nf4_memory.py                 a layer of width 1024 on a CPU; on a GPU one of an 8B model too

One step, forward and backward, of an MLP (SwiGLU) and of a whole block: weights in NF4 with double quantisation, fp32
adapters of rank 16 on every linear layer, under bf16 autocast as in training, gradients of the input and of the adapters.

    ours                  kernels/nf4_linear.py: the backward pass decodes the weight again
    naive                 the same layers with a decoded weight multiplied by F.linear: autograd keeps it decoded
    peft + bitsandbytes   transformers' layers, where these can be imported; they decode again, too

"saved" is what autograd keeps between forward and backward, each storage once, without weights and adapters; the input
counts. "peak" is the most that tensors take in the step beyond what is there before it. The time is the device's on a GPU,
and the processor's on a CPU. Rows go to bench/results/DEVICE/nf4_memory.json.
"""

import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters.lora import LoraLinear, add_adapters  # noqa: E402
from arguments import ArgumentParser  # noqa: E402
from bench.measure import (  # noqa: E402
    device_slug,
    environment,
    first_line,
    read_results,
    saved_bytes,
    tensor_peak_bytes,
    time_calls,
    write_results,
)
from bench.peers import linear_4bit, with_peft  # noqa: E402
from bench.step import ALPHA, LINEAR_LAYERS, RANK, Shape, Skipped, draw, llama  # noqa: E402
from errors import run_script  # noqa: E402
from kernels.choice import choose_kernels  # noqa: E402
from kernels.nf4_linear import nf4_linear_reference  # noqa: E402
from kernels.rotary import rotary_tables  # noqa: E402
from layers import Shared  # noqa: E402
from model import Transformer  # noqa: E402
from model_config import FULL  # noqa: E402

PARTS = ("mlp", "block")
WAYS = ("ours", "naive", "peft + bitsandbytes")
SHAPES = {
    "1024": Shape(llama(1024, 2816, 1, 16, 4, 64), 1, 1024),
    "8b": Shape(llama(4096, 14336, 1, 32, 8, 64), 1, 4096),
}

Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]


def draw_adapters(part: nn.Module) -> None:
    """The same A and B for the same layer in every library; B is not zero, so that the adapters count."""
    for name, parameter in part.named_parameters():
        if ".lora_" in name:
            seed = zlib.crc32(name.partition(".default")[0].encode())
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_(drawn * parameter.shape[1] ** -0.5)


def own_layer(part: str, shape: Shape, way: str, device: torch.device, dtype: torch.dtype) -> Layer:
    """The MLP or the whole block of our model, and its forward pass."""
    kernels = choose_kernels(["auto"], device, compiled=False)
    model = Transformer(shape.model, kernels).to(device, dtype)
    block: Any = model.model.layers[0]
    draw(block, device)
    add_adapters(model, rank=RANK, alpha=ALPHA, quantise="nf4")
    if way == "naive":
        for layer in block.modules():
            if isinstance(layer, LoraLinear):
                layer.forward = partial(keeping_the_decoded_weight, layer)  # type: ignore[method-assign]
    positions = torch.arange(shape.length, device=device)[None]
    tables = rotary_tables(positions, shape.model.head_dim, shape.model.rope_theta, shape.model.rope_scaling)
    shared = Shared({FULL: tables}, {FULL: None}, None, kernels)
    if part == "mlp":
        return block.mlp, lambda x: block.mlp(x, shared)
    return block, lambda x: torch.add(*block(x, None, shared)[:2])


def keeping_the_decoded_weight(layer: LoraLinear, x: Tensor) -> Tensor:
    return nf4_linear_reference(x, layer.nf4_weight(), layer.adapters())


def peer_layer(part: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Layer:
    """The same of transformers, quantised by bitsandbytes, with peft's adapters."""
    try:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama
    except ImportError as error:
        raise Skipped(first_line(error)) from error
    config = LlamaConfig.from_dict(shape.model.to_hf())
    config._attn_implementation = "sdpa"
    block = modeling_llama.LlamaDecoderLayer(config, 0).to(device, dtype)
    draw(block, device)
    for parent in (block.self_attn, block.mlp):
        for name, layer in list(parent.named_children()):
            if name in LINEAR_LAYERS:
                setattr(parent, name, linear_4bit(layer.get_parameter("weight")))
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    with_peft(block, LINEAR_LAYERS, RANK, ALPHA, fp32_adapters=True)
    if part == "mlp":
        return block.mlp, block.mlp
    positions = torch.arange(shape.length, device=device)[None]
    tables = modeling_llama.LlamaRotaryEmbedding(config).to(device)(
        torch.empty(1, device=device, dtype=dtype), positions
    )
    return block, partial(block, attention_mask=None, position_ids=positions, position_embeddings=tables)


def prepared(part: str, shape: Shape, way: str, device: torch.device, dtype: torch.dtype) -> Layer:
    """The layer and its forward pass with the same weights and adapters whatever the way. Skipped where it cannot run."""
    if way in ("ours", "naive"):
        layer, forward = own_layer(part, shape, way, device, dtype)
    else:
        layer, forward = peer_layer(part, shape, device, dtype)
    draw_adapters(layer)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return forward(x)

    return layer, under_autocast


def measure(part: str, shape: Shape, way: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """{saved_mib, peak_mib, step_ms} of one way."""
    layer, forward = prepared(part, shape, way, device, dtype)
    x, upstream = (
        torch.randn(shape.rows, shape.length, shape.model.hidden_size, generator=torch.Generator().manual_seed(seed))
        .to(device, dtype)
        .requires_grad_(seed == 0)
        for seed in (0, 1)
    )
    learned = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x), learned, upstream)

    return {
        "step_ms": milliseconds(step, device),  # first, as it also warms up
        "saved_mib": saved_bytes(lambda: forward(x), [*layer.parameters(), *layer.buffers()]) / 2**20,
        "peak_mib": tensor_peak_bytes(step, device) / 2**20,
    }


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Of a step: the device's time on a GPU; on a CPU, which others may be using, the processor's, the least of nine."""
    if device.type == "cuda":
        return time_calls([step], device).ms
    found = []
    for _ in range(9):
        start = time.process_time()
        step()
        found.append(1000 * (time.process_time() - start))
    return min(found)


def describe(row: dict) -> str:
    if "skipped" in row:
        return f"left out: {row['skipped']}"
    return f"{row['saved_mib']:.1f} MiB saved, {row['peak_mib']:.1f} MiB peak, {row['step_ms']:.1f} ms"


def main(argv: list[str] | None = None) -> int:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    parser = ArgumentParser(prog="bench/nf4_memory.py", description=__doc__)
    parser.add_argument("--size", nargs="+", choices=tuple(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--out", type=Path, help="folder of nf4_memory.json (default: bench/results/DEVICE)")
    args = parser.parse_args(argv)
    path = (args.out or ROOT / "bench" / "results" / device_slug(device)) / "nf4_memory.json"
    results = read_results(path)
    results["environment"] = environment(device)
    for size in args.size or (SHAPES if device.type == "cuda" else ("1024",)):
        shape = SHAPES[size]
        config = shape.model
        print(f"width {config.hidden_size}, MLP {config.intermediate_size}, {shape.rows * shape.length} tokens, bf16")
        for part in PARTS:
            rows: dict[str, dict] = {}
            for way in WAYS:
                try:
                    rows[way] = measure(part, shape, way, device, torch.bfloat16)
                except Skipped as reason:
                    rows[way] = {"skipped": str(reason)}
                print(f"{part} {way}: {describe(rows[way])}", flush=True)
            results.setdefault(size, {})[part] = rows
            write_results(path, results)
    return 0


if __name__ == "__main__":
    run_script(main)
