"""How long does a call take on a device, how much memory, and what is the most that the device itself can do?

On CUDA a call is timed by replaying a CUDA graph of many calls, each on inputs of its own that together are several
times larger than the L2 cache: what is left is the device's time, without Python's. Beside it stands the wall time of
the same calls made one after another from Python, where a slow host shows. On a CPU there is wall time only.

The ceilings, a large copy and a large matrix product, are measured in the process that measures the calls.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PEERS = ("liger-kernel", "unsloth", "bitsandbytes", "peft", "transformers", "flash-attn")
SAMPLES = 7  # timings of which the median counts
GRAPH_CALLS, GRAPH_MILLISECONDS = 20, 20.0  # a graph holds that many calls, or fewer that take that long
CACHE_MULTIPLE = 4  # inputs of all calls together, in sizes of the L2 cache

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """ms: device time of one call; wall_ms: of the same call from Python; how: what ms was taken with."""

    ms: float
    wall_ms: float
    how: str


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Inside, CUDA work goes to a stream of its own: the backward pass runs on the stream of its forward pass, and the
    default stream cannot be captured into a graph."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs of that size outlast the L2 cache. One on a CPU."""
    if device.type != "cuda":
        return 1
    wanted = CACHE_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-wanted // max(1, bytes_of_one)), 1), 16)


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """The time of one of `calls`, which do the same work on different data. They are warmed up here."""
    for _ in range(3 if device.type == "cuda" else 1):
        for call in calls:
            call()
    wall = wall_milliseconds(calls, device)
    if device.type != "cuda":
        return Timing(wall, wall, "wall")
    try:
        return Timing(_graph_milliseconds(calls, wall), wall, "graph")
    except RuntimeError as error:  # a call that waits for the device, by .item() say, cannot be captured
        reason = str(error).strip().splitlines()[0]
        return Timing(_event_milliseconds(calls, wall), wall, f"events, because it cannot be captured: {reason}")


def wall_milliseconds(calls: Sequence[Call], device: torch.device, seconds: float = 0.1) -> float:
    """Median over samples of the mean time of a call, from Python, the device awaited at the end of each sample."""
    start = time.perf_counter()
    calls[0]()
    synchronize(device)
    count = min(max(int(seconds / SAMPLES / (time.perf_counter() - start)), 1), 100)
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for number in range(count):
            calls[number % len(calls)]()
        synchronize(device)
        samples.append((time.perf_counter() - start) / count)
    return 1000 * statistics.median(samples)


def _graph_milliseconds(calls: Sequence[Call], wall: float) -> float:
    """`wall`, an upper bound of a call's milliseconds, says how many calls make a graph long enough."""
    wanted = min(GRAPH_CALLS, GRAPH_MILLISECONDS / wall)
    rounds = max(1, round(wanted / len(calls)))
    results: deque[Any] = deque(maxlen=len(calls))  # kept that long, so that each set of inputs has outputs of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rounds):
            for call in calls:
                results.append(call())
    results.clear()
    graph.replay()
    once = _between_events(graph.replay)
    replays = max(1, int(GRAPH_MILLISECONDS / 2 / once))

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    samples = [_between_events(replay) for _ in range(SAMPLES)]
    return statistics.median(samples) / (replays * rounds * len(calls))


def _event_milliseconds(calls: Sequence[Call], wall: float) -> float:
    torch.cuda.synchronize()
    rounds = max(1, round(GRAPH_MILLISECONDS / wall / len(calls)))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    return statistics.median(_between_events(run) for _ in range(SAMPLES)) / (rounds * len(calls))


def _between_events(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that tensors take during a call, beyond what is held before it. None on a CPU, where one process
    cannot tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def tensor_peak_bytes(call: Call, device: torch.device) -> int:
    """`peak_bytes` on a CPU too, where the profiler tells every allocation and release of tensors; a library's own
    working memory (oneDNN's, MKL's) is not among them. Takes far longer than the call, so it is for single ones."""
    if device.type == "cuda":
        peak = peak_bytes(call, device)
        assert peak is not None
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes, initial=0))


def saved_bytes(forward: Call, held: Iterable[Tensor]) -> int:
    """What autograd keeps for the backward pass of `forward`, each storage once, without those of `held`: weights, say.

    Counted is what operators save by PyTorch's own means (save_for_backward), bitsandbytes' among them.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result  # until here the graph holds what it keeps, so that no two have one address
    return sum(kept.values())


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in float64; inf where something is not finite; absolute where the truth is zero."""
    found, truth = found.detach().double(), truth.detach().double()
    if found.shape != truth.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found - truth).norm() / (truth.norm() or 1.0)).item()


# --------------------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: copy_gb_s counts bytes read and written, product_tflop_s is 2 n³ over time."""

    copy_gb_s: float
    product_tflop_s: float
    copied: str
    multiplied: str


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured now, on random data: zeros switch fewer transistors and run faster than real numbers."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**25, 512)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = time_calls([lambda: a @ b], device)
    return Ceilings(
        copy_gb_s=2 * size / copy.ms / 1e6,
        product_tflop_s=2 * side**3 / product.ms / 1e9,
        copied=f"{size / 2**20:g} MiB",
        multiplied=f"{side}x{side}x{side} {str(dtype).removeprefix('torch.')}",
    )


def device_slug(device: torch.device) -> str:
    """The device's name as a folder: nvidia-h100-80gb-hbm3, cpu-x86-64."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures were measured with: device, versions, commit. No date, so that the same run gives the same file."""
    from training.description import git_commit

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    described: dict[str, Any] = {
        "device": device_slug(device),
        "processor": processor(),
        "versions": versions,
        "git_commit": git_commit(),
    }
    if device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
        described["driver"] = _driver_version()
    else:
        described["threads"] = torch.get_num_threads()
    return described


def processor() -> str | None:
    """The CPU's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None


# ------------------------------------------------------------------------------------------------------------- results


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(path: Path, results: dict[str, Any] | list[Any], digits: int = 4) -> None:
    """Replace the file at once: a run that is stopped leaves all rows before it. More significant digits than a timing
    has would be noise in every diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_rounded(results, digits), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def first_line(error: BaseException) -> str:
    """An exception as one line of a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
