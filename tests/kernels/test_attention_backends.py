"""Is the attention back end that is chosen one that can run, and is it said why not a faster one?"""

import importlib.util
import sys

import pytest
import torch

import kernels.attention_backends
from errors import UserError
from kernels.attention import attention
from kernels.attention_backends import (
    ATTENTION_BACKENDS,
    activate,
    attention_backends,
    choose_attention,
    chosen_backend,
    describe_attention,
    sdpa_kernel_taken,
    why_not,
)
from tests.kernels.attention_reference import make, packed_mask


def test_the_cpu_says_what_it_has_and_why_not_more():
    backends = attention_backends("cpu")
    assert tuple(backends) == ATTENTION_BACKENDS[1:]
    assert backends.pop("sdpa") == "available"
    assert backends.pop("flex") == "FlexAttention trains on CUDA only"
    assert set(backends.values()) == {"varlen kernels need CUDA"}
    assert choose_attention("auto", "cpu", torch.bfloat16, head_dim=64) == "sdpa"
    assert chosen_backend("cpu", torch.float32) == (
        "SDPA on the flash attention kernel for cpu; documents one by one in rows of 256 tokens and more "
        "(varlen kernels need CUDA)"
    )


@pytest.mark.parametrize("backend", ["varlen", "flash-attn", "fa3", "fa4"])
def test_a_request_that_cannot_run_names_the_reason(backend):
    with pytest.raises(UserError, match=f"{backend} here: varlen kernels need CUDA; choose auto or sdpa"):
        choose_attention(backend, "cpu", torch.bfloat16, head_dim=64)


def test_an_unknown_request_lists_the_choices():
    with pytest.raises(UserError, match="no attention back end 'fa2'; choose one of auto, sdpa, varlen"):
        choose_attention("fa2", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="fa2"):
        why_not("fa2", "cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "installed", "wanted"),
    [((8, 0), [], "varlen"), ((8, 0), ["flash-attn"], "flash-attn"), ((7, 5), ["flash-attn"], "sdpa")],
)
def test_on_a_gpu_documents_get_a_varlen_kernel(capability, installed, wanted, monkeypatch):
    pretend_gpu(monkeypatch, capability, installed)
    assert choose_attention("auto", "cuda", torch.bfloat16, head_dim=64) == wanted
    assert choose_attention("auto", "cuda", torch.float32, head_dim=64) == "sdpa"
    assert choose_attention("auto", "cuda", torch.bfloat16, head_dim=20) == "sdpa"
    assert choose_attention("auto", "cuda", torch.bfloat16, head_dim=512) == "sdpa"


@pytest.mark.parametrize(
    ("backend", "capability", "installed", "reason"),
    [
        ("flash-attn", (8, 0), ["flash-attn-4"], "flash-attn is not installed"),
        ("fa3", (8, 0), [], "FlashAttention-3 needs compute capability 9.0, not 8.0"),
        ("fa3", (9, 0), [], "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu128"),
        ("fa4", (8, 0), [], "FlashAttention-4 needs compute capability 9.0 or 10.0, not 8.0"),
        ("fa4", (9, 0), ["flash-attn"], r"pip install flash-attn-4\)"),
    ],
)
def test_what_is_missing_is_named_with_its_package(backend, capability, installed, reason, monkeypatch):
    pretend_gpu(monkeypatch, capability, installed)
    with pytest.raises(UserError, match=f"{reason}.*; choose auto or sdpa"):
        choose_attention(backend, "cuda", torch.bfloat16, head_dim=64)


def test_an_installed_flash_attention_4_needs_a_torch_that_knows_documents(monkeypatch):
    pretend_gpu(monkeypatch, (9, 0), ["flash-attn-4"])
    for new_torch in (True, False):
        monkeypatch.setattr(kernels.attention_backends, "TORCH_2_12", new_torch)
        assert (why_not("fa4", "cuda", torch.bfloat16) is None) == new_torch


def pretend_gpu(monkeypatch, capability, installed, triton=True):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: triton or None if name == "triton" else find_spec(name)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(kernels.attention_backends, "_installed", lambda name: name in installed)
    monkeypatch.setattr(kernels.attention_backends, "TORCH_2_12", True)


def test_activating_asks_torch_once_and_keeps_cudnn_away(monkeypatch):
    asked, cudnn = [], []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    for backend in ("sdpa", "varlen", "flash-attn", "flex"):
        activate(backend)
    assert not asked and not cudnn
    activate("fa3")
    activate("fa4")
    assert asked == ["FA3", "FA4"] and cudnn == [False, False]


@pytest.mark.parametrize("backend", ["fa3", "fa4"])
def test_a_package_that_does_not_load_is_named(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=rf"{backend} does not load \(.+\); reinstall flash-attn-{backend[2]}"):
        activate(backend)


def test_the_kernel_that_torch_takes_is_the_one_that_runs():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inputs = make(4, 4, dtype=torch.float32)
    for backends, words, operator in (
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], "flash attention", "flash_attention_for_cpu"),
        ([SDPBackend.MATH], "math", "attention_math"),
    ):
        with sdpa_kernel(backends):
            for masked in (False, True):
                assert sdpa_kernel_taken("cpu", torch.float32, masked=masked) == f"the {words} kernel for cpu"
                with torch.profiler.profile() as profile:
                    attention(*inputs, mask=packed_mask("mask") if masked else None)
                assert any(event.key.endswith(operator) for event in profile.key_averages())


@pytest.mark.parametrize(
    ("taken", "version", "wanted"),
    [
        (3, 91501, "cuDNN 9.15.1"),
        (1, 91501, "FlashAttention-2"),
        (1, 90701, "FlashAttention-2, as cuDNN 9.7.1 is too old: is one in LD_LIBRARY_PATH found before torch's?"),
        (2, 91501, "memory-efficient"),
    ],
)
def test_a_cudnn_that_hides_torchs_own_is_named(taken, version, wanted, monkeypatch):
    pretend_gpu(monkeypatch, (9, 0), [])
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: taken)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert sdpa_kernel_taken("cuda", torch.bfloat16) == wanted
    described = describe_attention("varlen", "cuda", torch.bfloat16)
    assert described == (
        f"torch {torch.__version__} varlen (flash-attn is not installed) for documents and windows; "
        f"SDPA on {wanted} for the rest"
    )


def test_flex_trains_on_cuda_only_and_says_so_when_it_is_chosen():
    with pytest.raises(UserError, match="flex here: FlexAttention trains on CUDA only; choose auto or sdpa"):
        choose_attention("flex", "cpu", torch.float32, head_dim=64)
    assert choose_attention("flex", "cpu", torch.float32, head_dim=64, training=False) == "flex"


# -------------------------------------------------------------------------------------------------------------- softcap


@pytest.mark.parametrize(
    ("capability", "installed", "triton", "wanted"),
    [
        ((9, 0), ["flash-attn"], True, "flash-attn"),
        ((9, 0), ["flash-attn-4"], True, "flex"),
        ((7, 5), ["flash-attn"], True, "flex"),
        ((9, 0), [], False, "sdpa"),
    ],
)
def test_scores_with_a_softcap_get_a_kernel_that_knows_it(capability, installed, triton, wanted, monkeypatch):
    pretend_gpu(monkeypatch, capability, installed, triton)
    assert choose_attention("auto", "cuda", torch.bfloat16, head_dim=256, softcap=True) == wanted
    assert choose_attention("auto", "cpu", torch.bfloat16, head_dim=256, softcap=True) == "sdpa"
    assert choose_attention("sdpa", "cuda", torch.bfloat16, head_dim=256, softcap=True) == "sdpa"


@pytest.mark.parametrize("backend", ["varlen", "fa3", "fa4"])
def test_a_softcap_on_a_kernel_without_one_is_refused(backend, monkeypatch):
    pretend_gpu(monkeypatch, (9, 0), ["flash-attn-4"])
    with pytest.raises(UserError, match=f"{backend} here: torch's varlen kernels know no softcap; choose auto or sdpa"):
        choose_attention(backend, "cuda", torch.bfloat16, head_dim=64, softcap=True)


def test_what_computes_a_softcap_is_said_and_why(monkeypatch):
    said = {"head_dim": 64, "softcap": True}
    assert describe_attention("sdpa", "cpu", torch.bfloat16, **said) == (
        "plain PyTorch, as SDPA knows no softcap; documents one by one in rows of 512 tokens and more"
    )
    pretend_gpu(monkeypatch, (9, 0), [], triton=False)
    assert describe_attention("sdpa", "cuda", torch.bfloat16, **said) == (
        "plain PyTorch with all scores in memory, as SDPA knows no softcap "
        "(flash-attn is not installed; FlexAttention needs triton, which is not installed)"
    )
    pretend_gpu(monkeypatch, (9, 0), [])
    assert describe_attention("sdpa", "cuda", torch.bfloat16, **said).endswith("knows no softcap (as asked)")
    flex = f"FlexAttention of torch {torch.__version__}"
    assert describe_attention("flex", "cuda", torch.bfloat16, **said) == f"{flex} (flash-attn is not installed)"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.3")
    assert describe_attention("flash-attn", "cuda", torch.bfloat16, **said) == (
        "flash-attn 2.8.3; plain PyTorch after a cache"
    )


# -------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_the_kernels_of_this_gpu_are_named():
    assert attention_backends("cuda")["sdpa"] == "available"
    described = chosen_backend("cuda", torch.bfloat16)
    assert "SDPA on " in described and ("varlen" in described or "flash-attn" in described)
    assert sdpa_kernel_taken("cuda", torch.float32, masked=True) in ("memory-efficient", "math")
