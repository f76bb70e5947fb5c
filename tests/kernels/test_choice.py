"""Which kernels does a run get? The rule of kernels/choice.py, flag by flag."""

import importlib.util

import pytest
import torch

from errors import UserError
from kernels.choice import OPERATIONS, KernelChoice, choose_kernels, describe_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def a_gpu(monkeypatch):
    """Triton could run on the device: what the rule does with it is decided without touching one."""
    monkeypatch.setattr("kernels.choice.why_not_triton", lambda device: None)


def test_without_a_gpu_everything_is_pytorch():
    assert choose_kernels(["auto"], CPU, compiled=False) == KernelChoice()
    assert {getattr(KernelChoice(), name) for name in OPERATIONS} == {"torch"}


def test_eager_on_a_gpu_everything_is_triton(a_gpu):
    choice = choose_kernels(["auto"], CUDA, compiled=False)
    assert {getattr(choice, name) for name in OPERATIONS} == {"triton"}


def test_compiled_on_a_gpu_the_compiler_keeps_what_it_fuses(a_gpu):
    choice = choose_kernels(["auto"], CUDA, compiled=True)
    assert choice == KernelChoice(linear_cross_entropy="triton", lora="triton", nf4="triton")
    assert "rms_norm, rope, swiglu (fused by the compiler)" in describe_kernels(choice, CUDA, compiled=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_operation_can_be_overridden(a_gpu, compiled):
    choice = choose_kernels(["triton", "swiglu=torch"], CUDA, compiled)
    assert choice.swiglu == "torch" and [getattr(choice, name) for name in OPERATIONS].count("triton") == 5
    assert choose_kernels(["swiglu=torch"], CUDA, False) == choose_kernels(["auto", "swiglu=torch"], CUDA, False)
    assert choose_kernels(["torch"], CUDA, compiled) == KernelChoice()


@interpreted
def test_triton_on_a_cpu_runs_under_the_interpreter_and_is_refused_without_it(monkeypatch):
    choice = choose_kernels(["triton"], CPU, compiled=False)
    assert {getattr(choice, name) for name in OPERATIONS} == {"triton"}
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="need a GPU, not cpu"):
        choose_kernels(["auto", "rope=triton"], CPU, compiled=False)


@pytest.mark.parametrize("request_", [["fast"], ["auto", "rope"], ["auto", "rope=fast"], ["auto", "gelu=torch"]])
def test_a_word_that_is_no_choice_is_named(request_):
    with pytest.raises(UserError, match=request_[-1].split("=")[0]):
        choose_kernels(request_, CPU, compiled=False)
