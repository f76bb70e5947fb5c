"""Which path of lora_linear is fastest here? Measures all of them and writes what kernels.lora_linear.choose_path reads.

    python bench/lora_paths.py                                   the shapes below, on the GPU if there is one
    python bench/lora_paths.py --shapes 8192x4096x4096x16 8192x6144x4096x48x3
    python bench/lora_paths.py --device cpu --dtype float32

A shape is rows x N x K x R, and optionally the number of adapters that share R and stand below each other in N (q, k, v:
3). Each path runs forward and backward: gradients of x and of the adapters, which are fp32. "base" is the frozen layer
alone. The fastest of the rounds counts. On a CPU the one-pass kernel would be interpreted, and is left out.

kernels/lora_measured.json keeps the other devices', dtypes' and shapes' figures; the same ones' are replaced.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.measure import input_sets, measuring, time_calls, write_results
from kernels.jit import why_not_triton
from kernels.lora_linear import MEASURED, PATHS, Adapter, augmented_weight, device_name, lora_linear

ROUNDS = {"cuda": 3, "cpu": 15}  # a CPU is shared with other work, which only ever slows a round
SHAPES = {
    # attention and MLP projections of 8B and 1B models, one by one and stacked; a short batch
    "cuda": [
        "8192x4096x4096x16", "8192x14336x4096x16", "8192x4096x14336x16", "2048x4096x4096x16", "8192x4096x4096x64",
        "8192x6144x4096x48x3", "8192x28672x4096x32x2", "16384x2048x2048x16", "16384x16384x2048x32x2",
    ],
    # a model of the size that one trains on a CPU
    "cpu": ["512x256x256x8", "512x768x256x24x3", "512x1536x256x16x2", "512x256x768x8", "512x768x768x16"],
}  # fmt: skip


def calls(path: str, shape: list[int], dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """Forward and backward by one path, on enough sets of inputs to outlast the cache."""
    rows, n, k, rank, count = shape
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
    adapters = [
        Adapter(
            torch.randn(rank // count, k, device=device).requires_grad_(),
            torch.randn(n // count, rank // count, device=device).requires_grad_(),
            2.0,
            i * (n // count),
        )
        for i in range(count)
    ]
    augmented = augmented_weight(weight, adapters)
    learned = [] if path == "base" else [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]

    def call(x: torch.Tensor, dy: torch.Tensor) -> object:
        if path == "base":
            y = F.linear(x, weight)
        else:
            y = lora_linear(x, augmented[:, :k], adapters, path=path, augmented=augmented)
        return torch.autograd.grad(y, [x, *learned], dy)

    sets = input_sets((k + n) * rows * dtype.itemsize, device)
    xs = [torch.randn(rows, k, device=device, dtype=dtype).requires_grad_() for _ in range(sets)]
    return [partial(call, x, torch.randn(rows, n, device=device, dtype=dtype)) for x in xs]


def measure(shape: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Microseconds of each path. In turn, so that all see the same machine."""
    ways = ["base", *PATHS]
    if device.type == "cpu" or why_not_triton(device):
        ways.remove("one_pass")
    best: dict[str, float] = {}
    with measuring(device):
        for _ in range(ROUNDS[device.type]):
            for path in ways:
                microseconds = 1000 * time_calls(calls(path, shape, dtype, device), device).ms
                best[path] = min(best.get(path, microseconds), microseconds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="rows x N x K x R [x adapters], as 8192x4096x4096x16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=MEASURED)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    keys = ("device", "dtype", "rows", "N", "K", "R")
    entries = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else []
    table = {tuple(entry[key] for key in keys): entry for entry in entries}
    print(f"{device_name(device)}, {dtype}: microseconds forward and backward, and what a path adds to the base")
    for text in args.shapes or SHAPES[device.type]:
        shape = [*map(int, text.split("x"))]
        shape = shape if len(shape) == 5 else [*shape, 1]
        times = measure(shape, getattr(torch, dtype), device)
        entry = dict(zip(keys, (device_name(device), dtype, *shape), strict=False))
        table[tuple(entry.values())] = {**entry, "adapters": shape[-1], "microseconds": times}
        write_results(args.output, [table[key] for key in sorted(table)])
        figures = (f"{path} {time:.0f} ({time / times['base'] - 1:+.1%})" for path, time in times.items())
        print(f"{text:<22}" + "   ".join(figures), flush=True)


if __name__ == "__main__":
    main()
