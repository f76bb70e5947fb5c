"""What does groundup say and choose on a machine with GPUs? torch answers here as it would on one; nothing is computed.

The answers are torch's (torch.cuda, torch.version), in the form that torch 2.11 to 2.13 give them. What computes on a GPU
is in tests/kernels/test_fake_cuda.py.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch

from checkpointing.tensors import rng_state, set_rng_state
from errors import UserError
from kernels.attention_backends import choose_attention, describe_attention, why_not
from kernels.choice import choose_kernels, describe_kernels
from kernels.jit import multiprocessors, why_not_triton
from kernels.lora_linear import device_name as measured_name
from kernels.lora_linear import has_tma
from ranks import choose_device
from tools.setup import cuda_problem, device_rows
from training.description import device_memory_gb, device_name
from training.metrics import memory_gb, peak_tflops

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """An H100 where nothing else is said: call it with another capability, or other answers of torch.cuda."""

    def answer(capability=(9, 0), **others):
        about = SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", major=capability[0], minor=capability[1], multi_processor_count=132,
            total_memory=80 * 2**30,
        )  # fmt: skip
        answers = {
            "is_available": True, "device_count": 2, "get_device_capability": capability,
            "get_device_properties": about, "get_device_name": about.name, "mem_get_info": (60 * 2**30, 80 * 2**30),
            "max_memory_allocated": 3e9, "max_memory_reserved": 4e9, **others,
        }  # fmt: skip
        for name, value in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    answer()
    return answer


def test_a_run_knows_its_device(gpu):
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert (device_name(CUDA), measured_name(CUDA)) == ("NVIDIA H100 80GB HBM3",) * 2
    assert device_memory_gb(CUDA) == pytest.approx(85.9, abs=0.01)
    assert memory_gb(CUDA) == (3.0, 4.0)
    assert peak_tflops(CUDA, torch.bfloat16) == 989
    assert multiprocessors(CUDA) == 132 and has_tma(CUDA)


def test_more_ranks_than_gpus_are_refused(gpu):
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU: it has 2; lower --nproc_per_node"):
        choose_device("cuda", 2)


@pytest.mark.parametrize(
    ("capability", "compiled", "on_triton"),
    [
        ((9, 0), False, "Triton: rms_norm, rope, swiglu, linear_cross_entropy, lora, nf4"),
        ((9, 0), True, "Triton: linear_cross_entropy, lora, nf4; PyTorch: rms_norm, rope, swiglu (fused by the compiler)"),
        ((7, 5), False, "the Triton kernels need compute capability 8.0"),
    ],
)  # fmt: skip
def test_kernels_are_chosen_by_what_the_gpu_can(capability, compiled, on_triton, gpu):
    if "not installed" in (why_not_triton(torch.device("cpu")) or ""):
        pytest.skip("triton is not installed")
    gpu(capability)
    said = describe_kernels(choose_kernels(["auto"], CUDA, compiled), CUDA, compiled)
    assert on_triton in said, said


def test_attention_is_chosen_and_said(gpu, monkeypatch):
    assert choose_attention("auto", CUDA, torch.bfloat16, head_dim=128) == "varlen"
    assert choose_attention("auto", CUDA, torch.float32, head_dim=128) == "sdpa"
    assert choose_attention("flex", CUDA, torch.float32, head_dim=128) == "flex"
    assert describe_attention("flex", CUDA, torch.float32).startswith("FlexAttention of torch ")
    assert "from 16 wide" in why_not("flex", CUDA, torch.bfloat16, 8)
    assert "fp32, fp16 and bf16" in why_not("flex", CUDA, torch.float64)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert why_not("varlen", CUDA, torch.bfloat16) == "this torch was built without FlashAttention"


@pytest.mark.parametrize("chosen", ["sdpa", "varlen", "fa3", "flash-attn"])
def test_what_sdpa_falls_back_to_is_asked_of_torch(chosen, gpu, monkeypatch):
    """torch's own choice needs the driver, so it is given here; an old cuDNN on Hopper is told."""
    empty, ones = torch.empty, torch.ones
    monkeypatch.setattr(torch, "empty", lambda *size, device, **rest: empty(*size, device="meta", **rest))
    monkeypatch.setattr(torch, "ones", lambda *size, device, **rest: ones(*size, device="meta", **rest))
    monkeypatch.setattr(
        torch, "_fused_sdp_choice", lambda *_, **__: torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.3")
    said = describe_attention(chosen, CUDA, torch.bfloat16, head_dim=128)
    name = {"sdpa": "SDPA on", "varlen": "varlen", "fa3": "FlashAttention-3 in torch", "flash-attn": "flash-attn 2.8.3"}
    assert name[chosen] in said and "cuDNN 9.10.2 is too old" in said, said


def test_setup_lists_each_gpu(gpu, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")  # nvidia-smi is there
    rows = dict(device_rows([]))
    assert rows["cuda:1"] == ("NVIDIA H100 80GB HBM3, 80.0 GiB (60.0 free), compute capability 9.0, bf16, fp16, fp32")
    assert rows["torch's build"] == "CUDA 13.0, NVIDIA driver of unknown version"


@pytest.mark.parametrize(
    ("cuda", "visible", "words"),
    [
        (None, None, "built for the CPU only"),
        ("13.0", "", 'CUDA_VISIBLE_DEVICES=""'),
        ("13.0", None, "cannot use the GPU"),
    ],
)
def test_setup_says_why_a_gpu_is_not_used(cuda, visible, words, gpu, monkeypatch):
    gpu(is_available=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")  # nvidia-smi is there
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def refuse():
        raise RuntimeError("the driver is too old\nand more")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    problems = []
    assert dict(device_rows(problems))["cuda"] == "not usable, though NVIDIA driver of unknown version is here"
    assert problems == [cuda_problem()] and words in problems[0].what


def test_the_random_state_of_a_gpu_goes_into_a_checkpoint_and_back(gpu, monkeypatch):
    state, put = torch.arange(16, dtype=torch.uint8), []
    gpu(get_rng_state=state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    set_rng_state(rng_state())
    assert torch.equal(put[0], state)
