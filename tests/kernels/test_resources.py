"""Does every kernel compile for real GPUs, within their limits, and as the committed table says?"""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_without_spills_within_limits_and_as_committed(root):
    """Compiled for sm_80 and sm_90, in a process of its own: this one has the interpreter in place of the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "bench/resources.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    assert done.stdout.count("kernel") > 10, done.stdout
