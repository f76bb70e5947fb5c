"""Does `utils.py setup` tell what is here, and exit with 1, with a fix, where training cannot run?"""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch

import utils
from tools.setup import what_compile_lacks


def run_setup(root, *options: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *options, "utils.py", "setup"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_it_reports_what_is_here_and_trains_one_step(root):
    done = run_setup(root)
    assert done.returncode == 0, done.stdout + done.stderr
    for package in ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "rich", "matplotlib", "pyyaml"):
        version = re.escape(importlib.metadata.version(package))
        assert re.search(rf"^  {package} +{version}$", done.stdout, re.MULTILINE), package
    # ln 512 = 6.24 is what a model that knows nothing has, as this one has at first by its initialisation
    before, after = map(float, re.search(r"loss +(\S+) before, (\S+) after", done.stdout).groups())
    assert abs(before - 6.24) < 0.1
    assert after < before
    figures = re.findall(r"([\d.]+) (?:TFLOP/s|GB/s)", done.stdout)
    assert len(figures) == 3 and all(float(figure) > 0 for figure in figures)
    assert "training can run here" in done.stdout
    assert str(root) not in done.stdout  # it goes into public bug reports


def test_before_anything_is_installed_it_says_what_to_install(root):
    done = run_setup(root, "-S")  # without site-packages
    assert done.returncode == 1, done.stdout
    assert re.search(r"^  torch +not installed$", done.stdout, re.MULTILINE)
    assert "fix: python -m pip install -r requirements.txt" in done.stdout
    assert done.stderr == ""


def test_old_and_broken_packages_are_problems_with_a_fix_each(root, tmp_path):
    old = tmp_path / "tiktoken-0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: tiktoken\nVersion: 0.1\n")
    (tmp_path / "safetensors.py").write_text("raise ImportError('wrong architecture')")
    done = run_setup(root, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout
    problems = re.findall(r"^problem: (.+)\n    fix: (.+)$", done.stdout, re.MULTILINE)
    assert len(problems) == 2
    assert problems[0][0].startswith("tiktoken 0.1 is older than 0.8")
    assert "safetensors cannot be imported (ImportError: wrong architecture)" in problems[1][0]
    assert "--force-reinstall" in problems[1][1]
    assert "training cannot run here" in done.stdout


def test_a_step_that_fails_is_a_problem_with_its_traceback(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("tools.setup._MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    assert utils.main(["setup"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^problem: one training step.*no kernel image is available$", shown, re.MULTILINE)
    assert "Traceback" in shown
    assert "training cannot run here" in shown


@pytest.mark.gpu
def test_a_gpu_is_named_measured_and_trained_on(root):
    done = run_setup(root)
    assert done.returncode == 0, done.stdout + done.stderr
    gpu = re.search(r"^  cuda:0 +(.+?), [\d.]+ GiB .*compute capability (\d)\.(\d)", done.stdout, re.MULTILINE)
    assert gpu[1] == torch.cuda.get_device_name(0)
    assert (int(gpu[2]), int(gpu[3])) == torch.cuda.get_device_capability(0)
    assert "one training step on cuda:0" in done.stdout
    # GB/s: the slowest GPUs that training supports (compute capability 7 and up) copy faster than this
    assert float(re.search(r"([\d.]+) GB/s", done.stdout)[1]) > 100


def test_a_missing_compiler_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    what, fix = what_compile_lacks(torch.device("cpu"))
    assert "compiler" in what and "install" in fix
    compiler = tmp_path / "g++"
    compiler.touch()
    compiler.chmod(0o755)
    lacking = what_compile_lacks(torch.device("cpu"))
    assert lacking is None or "Python.h" in lacking[0]
