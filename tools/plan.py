"""What would this run be, and how long would it take? The table that train.py prints, from the same flags, without training."""

import argparse
import time

import torch

from arguments import ArgumentParser
from dataprep.shards import load_metadata, open_split
from errors import UserError
from training.batches import Windows
from training.config import add_options, resolve_config
from training.metrics import peak_tflops
from training.parallel import choose_device
from training.plan import GIB, format_plan, model_shape, plan_run
from training.precision import choose_precision
from training.run_files import duration

_VOCAB_SIZE, _MAX_LENGTH = 32_000, 2048  # data_prep_tool.py's defaults, for a plan without data
_ASSUMED_MFU = 0.4  # of a GPU's data sheet; what well-tuned dense models of 0.1 to 10 B parameters reach
_ASSUMED_SHARE = 0.5  # of the rate that this machine's matrix product reaches


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--world_size", type=int, default=1, help="number of devices to plan for")
    add_options(parser)


def main(args: argparse.Namespace) -> int:
    """Print the plan, with the memory by part and the estimated time."""
    given = vars(args).copy()
    world_size = given.pop("world_size")
    config, _ = resolve_config(given, validate=False)
    config.validate(data_needed=False)
    if not 1 <= world_size <= config.batch_size:
        raise UserError(f"--world_size must lie between 1 and --batch_size {config.batch_size}, and is {world_size}")
    device = choose_device(config.device)
    precision = choose_precision(config.mixed_precision, device)

    windows, vocab_size, length, stride, eos = None, config.vocab_size or _VOCAB_SIZE, _MAX_LENGTH, 0, None
    if config.data_dir:
        metadata = load_metadata(config.data_dir[0])
        vocab_size, eos = metadata.tokenizer.vocab_size, metadata.tokenizer.eos_token_id
        length, stride = metadata.max_length, metadata.stride
    if config.max_length:
        length, stride = config.max_length, 0
    stride = stride if config.stride is None else config.stride
    if config.data_dir:
        windows = sum(len(Windows(open_split(folder, "train"), length, stride)) for folder in config.data_dir)
    model = model_shape(config, vocab_size, length, eos)
    half = precision.dtype != torch.float32
    plan = plan_run(config, model, max_length=length, world_size=world_size, half_precision=half, train_windows=windows)

    peak = config.peak_tflops or peak_tflops(device, precision.dtype)
    if peak:
        rate, basis = peak * 1e12 * _ASSUMED_MFU, f"{_ASSUMED_MFU:.0%} of {peak:g} TFLOP/s"
    else:
        measured = _matmul_flops(device, precision.dtype)
        rate = measured * _ASSUMED_SHARE
        basis = f"{_ASSUMED_SHARE:.0%} of the {measured / 1e12:.2f} TFLOP/s that a matrix product reaches here"
    speed = rate * world_size / plan.flops_per_token
    extra = {
        "precision": precision.reason,
        "time estimate": f"{duration(plan.seconds(rate))} at {speed:,.0f} tokens/s ({basis})",
    }
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        extra["device memory"] = f"{total / GIB:.1f} GiB" + (
            "" if plan.memory_total < total else ": TOO SMALL; lower --micro_batch_size"
        )
    if not config.data_dir:
        extra["data"] = "none given: rows of 2,048 tokens are assumed; name it with --data_dir"
    print(format_plan(plan, config, model, extra))
    return 0


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 1024-wide matrix product, the best of those that fit into half a second."""
    a, b = (torch.randn(1024, 1024, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
