"""What does the chunked loss cost and save against the full logits and against PyTorch's own chunked loss?

    python bench/loss.py [--tokens 4096] [--hidden_size 256] [--vocab_size 4096 32000] [--bf16] [--device cpu]

Each way runs forward and backward in a process of its own, round after round in turn, so that all see the same
machine; the fastest round counts. Time and peak memory are printed beside the full computation's (a ratio below 1 is
better), with how far the norms of the gradients are from its.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.linear_cross_entropy import linear_cross_entropy

ROUNDS = 3


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets).total


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


WAYS = {"full": full, "ours": ours}
if hasattr(nn, "LinearCrossEntropyOptions"):  # torch 2.13
    WAYS["torch"] = torch_chunked


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of tensors on CUDA, of the process on CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(way: str, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Seconds and peak bytes of one forward and backward in this process, and a fingerprint of the gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    hidden = torch.randn(args.tokens, args.hidden_size, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocab_size, args.hidden_size, device=device)).requires_grad_()
    targets = torch.randint(vocab_size, (args.tokens,), device=device)

    def run(tokens: int) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = WAYS[way](hidden[:tokens], weight, targets[:tokens])
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run(16)  # libraries' own work space
    before = peak_bytes(device)
    run(args.tokens)
    peak = peak_bytes(device) - before
    seconds = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run(args.tokens)
        seconds = min(seconds, time.perf_counter() - start)
    norms = [grad.norm().item() for grad in (hidden.grad, weight.grad) if grad is not None]
    return {"seconds": seconds, "peak": peak, "norms": norms}


def compare(args: argparse.Namespace, vocab_size: int) -> None:
    best: dict[str, dict] = {}
    for _ in range(ROUNDS):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way, "--one_vocab_size", str(vocab_size)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            if way not in best or found["seconds"] < best[way]["seconds"]:
                best[way] = found
    dtype = "bf16" if args.bf16 else "fp32"
    print(f"{args.tokens} tokens, hidden {args.hidden_size}, vocabulary {vocab_size}, {dtype}, {args.device}")
    base = best["full"]
    for way, found in best.items():
        error = max(abs(a / b - 1) for a, b in zip(found["norms"], base["norms"], strict=True))
        print(
            f"  {way:<6} {1000 * found['seconds']:>9.0f} ms  x{found['seconds'] / base['seconds']:.2f}"
            f"   peak {found['peak'] / 2**20:>8.0f} MiB  x{found['peak'] / base['peak']:.3f}"
            f"   gradient norms differ by {error:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # the child process of one measurement
    parser.add_argument("--one_vocab_size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args, args.one_vocab_size)))
        return
    for vocab_size in args.vocab_size:
        compare(args, vocab_size)


if __name__ == "__main__":
    main()
