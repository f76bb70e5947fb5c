"""Where do the kernel tests run? Interpreted on the CPU; with `pytest -m gpu`, the same tests on the GPU."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _compiler_forgets():
    """torch.compile counts how often it compiled a function anew, over all tests of a process, and gives up at eight."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The device of a kernel test. Outputs are poisoned: memory that torch.empty hands out is filled with NaN."""
    from kernels.jit import why_not_triton  # here: this file is read before tests/conftest.py chooses the interpreter

    device = torch.device(request.param)
    if reason := why_not_triton(device):
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True, warn_only=True)  # it is what turns the filling on
    yield device
    torch.use_deterministic_algorithms(False)
