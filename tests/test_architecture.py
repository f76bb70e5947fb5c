"""Does the code keep to the house's layers, and does importing a module do no work?"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The rooms from the ground up. A file imports from its own room and from those of lower lines, never from one beside its own.
LAYERS = [
    {"errors"},
    {"arguments", "paths", "limits", "ranks"},
    {"sharding", "context"},
    {"tensor_parallel"},
    {"kernels"},
    {"families"},
    {"model_config"},
    {"experts"},
    {"layers"},
    {"model"},
    {"dataprep", "checkpointing"},
    {"batches"},
    {"finetune_data"},
    {"adapters", "generation"},
    {"training"},
    {"stages", "tools"},
    {"data_prep_tool", "train", "utils"},
]
LINE = {room: line for line, rooms in enumerate(LAYERS) for room in rooms}
PROJECT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path.relative_to(PROJECT)
    for path in PROJECT.rglob("*.py")
    if path.relative_to(PROJECT).parts[0].removesuffix(".py") in LINE and "__pycache__" not in path.parts
)


def top(module: str) -> str:
    return module.split(".")[0]


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the module"
            found.add(node.module)
    return found


def test_the_walk_sees_the_whole_house():
    assert {top(path.as_posix().removesuffix(".py").replace("/", ".")) for path in MODULES} == set(LINE)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_dependencies_point_down_only(path):
    own = path.parts[0].removesuffix(".py")
    for module in imported_modules(PROJECT / path):
        other = top(module)
        if other in LINE and other != own:
            assert LINE[other] < LINE[own], f"{path} imports {module}, which does not lie below it"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_file_says_which_question_it_answers(path):
    if path.name == "__init__.py" and path.parent.name != "kernels":  # which shares its name with another package
        assert not (PROJECT / path).read_text(), f"{path} is there only to make a package"
        return
    docstring = ast.get_docstring(ast.parse((PROJECT / path).read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"


def test_importing_does_no_work(tmp_path):
    """Importing every module, with arguments that no parser knows, leaves the environment, the folder, the threads, the
    torch settings, the random state and the terminal as they were, and starts no process group and no CUDA."""
    names = [path.as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in MODULES]
    program = f"""
import os, sys, threading, signal
sys.path.insert(0, {str(PROJECT)!r})
import torch, numpy, matplotlib, tokenizers, safetensors.torch
import torch.distributed.checkpoint  # some of these set things of their own; ours must not
environment, threads = dict(os.environ), threading.active_count()
settings = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                    torch.is_grad_enabled(), torch.get_rng_state().sum().item(), signal.getsignal(signal.SIGTERM),
                    signal.getsignal(signal.SIGINT))
before = settings()
import importlib
for name in {names!r}:
    importlib.import_module(name)
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert threading.active_count() == threads
assert settings() == before
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert os.listdir(".") == [], os.listdir(".")
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, "--no-such-flag"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["data_prep_tool.py", "train.py", "utils.py"])
def test_scripts_run_from_any_folder(script, tmp_path):
    done = subprocess.run([sys.executable, PROJECT / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr
