"""Can training run on this machine, and how fast? Plain text, made to be copied into a bug report.

Versions, machine, devices, which kernels and back ends are there and why others are not, three seconds of measuring,
and one real training step. Each problem comes with its fix. Exit code 1 if training cannot run.
"""

# It has to work where nothing is installed yet, so only the standard library is imported at the top.
import argparse
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import ArgumentParser

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30

Rows = list[tuple[str, str]]

_OPTIONAL = {
    "triton": "torch.compile on a GPU needs it",
    "flash-attn": "a GPU's attention over packed documents is faster with it",
    "transformers": "only the tests use it",
}
_IMPORT_NAMES = {"pyyaml": "yaml"}
_REINSTALL = "python -m pip install -r requirements.txt"
_MEASURE_SECONDS = 1.0  # for each of the three figures


@dataclass(frozen=True)
class Problem:
    """What is wrong, the one thing to do about it, and whether training is impossible until then."""

    what: str
    fix: str
    stops_training: bool = False


def add_arguments(parser: ArgumentParser) -> None:
    """There is nothing to choose."""


def main(args: argparse.Namespace) -> int:
    """Print the report; 0 if training can run here, else 1."""
    problems: list[Problem] = []
    show("versions", version_rows(problems))
    show("machine", machine_rows())
    if not problems:
        from ranks import choose_device

        device = choose_device("auto")
        attempt("devices", lambda: device_rows(problems), problems)
        attempt(f"kernels and back ends on {device}", lambda: backend_rows(device, problems), problems)
        attempt(f"speed of {device}", lambda: speed_rows(device), problems)
        attempt(f"one training step on {device}", lambda: step_rows(device, problems), problems)
    for problem in problems:
        print(f"problem: {problem.what}\n    fix: {problem.fix}")
    able = not any(problem.stops_training for problem in problems)
    print("training can run here" if able else "training cannot run here")
    return 0 if able else 1


def attempt(title: str, rows: Callable[[], Rows], problems: list[Problem]) -> None:
    """Show what `rows` finds. Whatever it raises is what this command has to tell: it becomes a problem."""
    try:
        show(title, rows())
    except Exception as error:
        print(f"{title}\n{traceback.format_exc()}")
        what = f"{title}: {type(error).__name__}: {error}".splitlines()[0]
        fix = "if the device is short of memory, free some; otherwise report this whole text"
        problems.append(Problem(what, fix, stops_training=True))


def show(title: str, rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    print(f"{title}\n" + "".join(f"  {name:<{width}}  {value}\n" for name, value in rows), flush=True)


# ---------------------------------------------------------------------------------------------------- versions, machine


def version_rows(problems: list[Problem]) -> Rows:
    """Python, groundup, and every package of requirements.txt, tried by importing it; then the optional ones."""
    rows, missing = [("python", platform.python_version()), ("groundup", commit())], []
    if sys.version_info < (3, 11):  # noqa: UP036 - to tell those who have not read it
        problems.append(Problem("Python is older than 3.11", "install Python 3.11 or newer", stops_training=True))
    for name, minimum in re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        version = version_of(name)
        rows.append((name, version or "not installed"))
        if version is None:
            missing.append(name)
        elif release(version) < release(minimum):
            problems.append(Problem(f"{name} {version} is older than {minimum}", _REINSTALL, stops_training=True))
        elif reason := why_not_importable(_IMPORT_NAMES.get(name, name)):
            fix = f"python -m pip install --force-reinstall --no-deps {name}=={version}"
            problems.append(Problem(f"{name} cannot be imported ({reason})", fix, stops_training=True))
    if missing:
        problems.append(Problem(f"{', '.join(missing)} not installed", _REINSTALL, stops_training=True))
    for name, use in _OPTIONAL.items():
        rows.append((name, version_of(name) or f"not installed ({use})"))
    return rows


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def why_not_importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary package can raise anything, and the point is to tell what
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def commit() -> str:
    """The commit of this copy, with "-dirty" where files were changed."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        answer = ""
    return f"commit {answer}" if answer else "not a git checkout"


def machine_rows() -> Rows:
    """Operating system, processor, memory, and room on the disk of the current folder."""
    model, flags = cpu_model_and_flags()
    features = {"AVX2": "avx2", "AVX-512": "avx512f", "AMX": "amx_tile", "NEON": "asimd", "SVE": "sve"}
    found = [name for name, flag in features.items() if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{model}, {cores} usable cores, {', '.join(found) or 'features unknown'}"),
        ("memory", memory()),
        ("free disk", f"{shutil.disk_usage('.').free / GIB:.0f} GiB where this command runs"),
    ]


def cpu_model_and_flags() -> tuple[str, set[str]]:
    """The processor's name and feature flags, the latter on Linux only."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown", set()
    model = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)", text, re.MULTILINE)
    return model[1] if model else platform.machine(), set(flags[1].split()) if flags else set()


def memory() -> str:
    """Total and free memory, and the container's limit where that is lower."""
    if not hasattr(os, "sysconf"):
        return "unknown"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{total / GIB:.1f} GiB"
    try:
        if available := re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE):
            text += f", {int(available[1]) * 1024 / GIB:.1f} GiB free"
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max" and int(limit) < total:
            text += f", this container's limit is {int(limit) / GIB:.1f} GiB"
    except OSError:  # not Linux, or another version of control groups
        pass
    return text


# ------------------------------------------------------------------------------------------------ devices and back ends


def device_rows(problems: list[Problem]) -> Rows:
    """Each device that torch can use, and, where a GPU is there that it cannot use, the reason."""
    import torch

    _, flags = cpu_model_and_flags()
    bf16 = "bf16 in hardware" if any("bf16" in flag for flag in flags) else "bf16 emulated, so slow"
    formats = f"fp32, {bf16}" if flags else "fp32"
    rows = [("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {formats}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            free, total = (size / GIB for size in torch.cuda.mem_get_info(index))
            formats = "bf16, fp16, fp32" if gpu.major >= 8 else "fp16, fp32 (no bf16)"
            capability = f"compute capability {gpu.major}.{gpu.minor}"
            rows.append((f"cuda:{index}", f"{gpu.name}, {total:.1f} GiB ({free:.1f} free), {capability}, {formats}"))
        toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        rows.append(("torch's build", f"{toolkit}, NVIDIA driver {nvidia_driver() or 'unknown'}"))
    elif driver := nvidia_driver():
        rows.append(("cuda", f"not usable, though NVIDIA driver {driver} is here"))
        problems.append(cuda_problem())
    else:
        rows.append(("cuda", "no NVIDIA driver"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU, fp32"))
    return rows


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, "of unknown version" where only its tool is there, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "of unknown version" if shutil.which("nvidia-smi") else None
    number = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return number[0] if number else "of unknown version"


def cuda_problem() -> Problem:
    """Why torch sees no GPU on a machine with an NVIDIA driver."""
    import torch

    if torch.version.cuda is None:
        return Problem(
            "there is an NVIDIA driver, but this torch was built for the CPU only",
            "python -m pip uninstall torch, then install a build for your CUDA: https://pytorch.org/get-started/locally",
        )
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return Problem(f'CUDA_VISIBLE_DEVICES="{visible}" leaves no GPU visible', "unset CUDA_VISIBLE_DEVICES")
    try:
        torch.cuda.init()
        reason = "it found no device"
    except Exception as error:  # torch raises several types, and the message is what helps
        reason = str(error).splitlines()[0]
    return Problem(
        f"torch (CUDA {torch.version.cuda}) cannot use the GPU: {reason}",
        "update the NVIDIA driver, or install a torch built for an older CUDA: https://pytorch.org/get-started/locally",
    )


def backend_rows(device: "torch.device", problems: list[Problem]) -> Rows:
    """What attention runs on, whether torch.compile can work, and how ranks can talk to each other."""
    import torch.distributed as dist

    from kernels.attention_backends import attention_backends, chosen_backend
    from kernels.jit import why_not_triton
    from training.precision import choose_precision

    precision = choose_precision("auto", device)
    rows = [("precision", precision.reason)]
    rows += [(f"attention: {name}", state) for name, state in attention_backends(device).items()]
    rows.append(("attention: chosen", chosen_backend(device, precision.dtype)))
    rows.append(
        ("Triton kernels", why_not_triton(device) or f"available (triton {importlib.metadata.version('triton')})")
    )
    if lacking := what_compile_lacks(device):
        problems.append(Problem(f"--compile_model cannot work: {lacking[0]}", f"{lacking[1]}, or train without it"))
    rows.append(("torch.compile", lacking[0] if lacking else "available"))
    built = {"gloo": dist.is_available() and dist.is_gloo_available()}
    built["nccl"] = dist.is_available() and dist.is_nccl_available()
    for name, there in built.items():
        rows.append((f"torch.distributed: {name}", "available" if there else "not in this build of torch"))
    return rows


def what_compile_lacks(device: "torch.device") -> tuple[str, str] | None:
    """(what torch.compile would miss on this device, how to get it), or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed", "python -m pip install triton"
    # the CPU's kernels are C++; a GPU's are Triton's, which compiles a launcher in C
    names = ["cc", "gcc", "clang"] if device.type == "cuda" else [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    if not any(map(shutil.which, names)):
        return "there is no C++ compiler", "install one (Debian, Ubuntu: sudo apt install g++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h is missing", "install Python's headers (Debian, Ubuntu: sudo apt install python3-dev)"
    return None


# ---------------------------------------------------------------------------------------------------------------- speed


def speed_rows(device: "torch.device") -> Rows:
    """What a matrix product and a copy reach, the best of as many as fit into a second each."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    rows = []
    for dtype in (torch.float32, torch.float16 if lacks_bf16(device) else torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = best_time(partial(torch.matmul, a, b), device)
        name = str(dtype).removeprefix("torch.")
        rows.append((f"{name} matrix product", f"{2 * size**3 / seconds / 1e12:.2f} TFLOP/s ({size} wide)"))
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = best_time(lambda: target.copy_(source), device)
    rows.append(("memory bandwidth", f"{2 * source.nbytes / seconds / 1e9:.1f} GB/s (copy, read and write counted)"))
    return rows


def lacks_bf16(device: "torch.device") -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def best_time(work: Callable[[], object], device: "torch.device") -> float:
    """The shortest of the times that `work` takes, repeated for _MEASURE_SECONDS, after one that does not count."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    work()
    wait()
    best, end = math.inf, time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


# ------------------------------------------------------------------------------------------------------ a training step


def step_rows(device: "torch.device", problems: list[Problem]) -> Rows:
    """The loss before and after one training step."""
    before, after = losses_around_a_step(device)
    if not (math.isfinite(before) and after < before):
        what = f"the training step took the loss from {before:.4f} to {after:.4f}, and it should fall"
        problems.append(Problem(what, "report this whole text", stops_training=True))
    return [("loss", f"{before:.4f} before, {after:.4f} after")]


def losses_around_a_step(device: "torch.device") -> tuple[float, float]:
    """Train a tiny model for one step on packed documents of random tokens; its loss on them before and after."""
    import torch

    from kernels.linear_cross_entropy import linear_cross_entropy
    from model import Transformer
    from model_config import ModelConfig
    from training.optimizers import build_optimizers
    from training.precision import choose_precision

    precision = choose_precision("auto", device)
    shape = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    model = Transformer(shape)
    model.init_weights(seed=0, zero_residual=True)
    model.to(device)
    optimizers = build_optimizers(model, name="muon", learning_rate=1e-2, weight_decay=0.1)
    tokens = torch.randint(512, (2, 129), generator=torch.Generator().manual_seed(0)).to(device)
    documents = torch.tensor([0, 50, 128, 200, 256], dtype=torch.int32, device=device)

    def loss() -> torch.Tensor:
        with precision.autocast(device):
            hidden = model(tokens[:, :-1], cu_seqlens=documents)
            targets = tokens[:, 1:].reshape(-1)
            return linear_cross_entropy(*model.head_inputs(hidden.flatten(0, 1)), targets).total / targets.numel()

    before = loss()
    before.backward()
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        return before.item(), loss().item()
