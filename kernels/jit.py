"""What do the files with Triton kernels share: loading where Triton is missing, and the facts of a launch?"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, a CPU build of torch: the kernel files still load, for their PyTorch references
    from types import SimpleNamespace

    triton, tl = None, SimpleNamespace(constexpr=int)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read and write; they compute in fp32


def jit(function):
    """triton.jit, or the function as it is where there is no Triton (it is never called there)."""
    return triton.jit(function) if triton else function


def why_not_triton(device: torch.device) -> str | None:
    """None where Triton kernels can run on this device, else the reason why not, in words."""
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":  # as Triton itself asks; for tests
        return None
    return f"Triton kernels need a GPU, not {device.type}"


def multiprocessors(device: torch.device) -> int:
    """How many blocks of programs run side by side; a small number where there is no GPU, so that loops loop."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def num_warps(block: int) -> int:
    """Warps for a block of that many elements: 16 a thread and more, which compiles without spills (RESOURCES.txt)."""
    return min(max(next_power_of_2(block // 512), 1), 32)


def check_dtypes(name: str, *tensors: torch.Tensor) -> None:
    """ValueError where a kernel would compute in fp32 what the caller has in fp64."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: the Triton kernel takes fp32, fp16 and bf16, not {tensor.dtype}")
