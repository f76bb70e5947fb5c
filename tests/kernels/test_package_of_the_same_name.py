"""Do transformers and the package named `kernels` work from the project's folder, whether that package is there or not?"""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import transformers, transformers.integrations.hub_kernels as hub
from transformers.utils.import_utils import is_kernels_available
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
import kernels, kernels.rms_norm, kernels.choice
from kernels.rms_norm import rms_norm
try:
    from kernels import get_kernel
    print("get_kernel", get_kernel("a", version=3))
except ImportError:
    print("none")
print(is_kernels_available(), kernels.__doc__.startswith("What must be fast"))
"""
OTHER = {
    "__init__.py": "from kernels.hub import get_kernel\nfrom .layer import *\n__doc__ = 'other'\n" + "".join(
        f"class {name}: pass\n" for name in ("CUDAProperties", "Device", "KernelizeFallback", "LayerRepository",
        "LocalLayerRepository", "Mode", "ROCMProperties")
    ) + "".join(
        f"def {name}(*a, **k): return lambda cls: cls\n" for name in ("register_kernel_mapping", "kernelize",
        "replace_kernel_forward_from_hub", "use_kernel_mapping", "use_kernel_forward_from_hub", "use_kernelized_func")
    ),
    "hub.py": "def get_kernel(name, version): return f'{name} {version}'\n",
    "layer.py": "answer = 42\n",
}  # fmt: skip


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_finds_what_it_looks_for(installed, root, tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    if installed:
        (tmp_path / "kernels").mkdir()
        for name, text in OTHER.items():
            (tmp_path / "kernels" / name).write_text(text)
        (tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        (tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA").write_text(metadata)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
    assert done.stdout.split("\n")[:2] == (["get_kernel a 3", "True True"] if installed else ["none", "False True"])
