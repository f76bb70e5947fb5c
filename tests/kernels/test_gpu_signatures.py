"""Does the installed torch take the calls that only a GPU makes? Their signatures, operators and Triton functions, without a GPU.

Run with torch 2.11 and 2.13, the ends of what groundup supports; flash-attn's signature is that of its version 2.7 and later.
"""

import inspect
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch

from kernels.attention import attention
from kernels.attention_backends import activate
from kernels.attention_masks import row_mask
from kernels.jit import why_not_triton
from tests.kernels.attention_reference import BOUNDS, make, packed_mask

NO_TRITON = why_not_triton(torch.device("cpu"))


def a_call_of(function, result):
    """A stand-in that refuses what `function` would refuse, and gives the result of `result(*arguments)`."""
    return mock.create_autospec(function, side_effect=lambda *arguments, **_: result(*arguments))


@pytest.mark.parametrize(
    ("window", "causal", "reach"),
    [(None, True, (-1, 0)), (3, True, (2, 0)), (None, False, (-1, -1)), (3, False, (2, 2))],
)
def test_torchs_varlen_kernel_takes_our_arguments(window, causal, reach):
    from torch.nn.attention.varlen import varlen_attn

    stand_in = a_call_of(varlen_attn, lambda q, *_: torch.zeros_like(q))
    with mock.patch("torch.nn.attention.varlen.varlen_attn", stand_in):
        attention(*make(4, 2), mask=packed_mask("varlen", window, causal=causal), scale=0.5)
    inspect.signature(varlen_attn).bind(*stand_in.call_args.args, **stand_in.call_args.kwargs)
    assert stand_in.call_args.kwargs["window_size"] == reach and stand_in.call_args.kwargs["scale"] == 0.5


def test_flash_attns_varlen_kernel_takes_our_arguments(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
        block_table=None,
    ):  # fmt: skip
        return torch.zeros_like(q)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found = attention(*make(4, 2), mask=packed_mask("flash-attn", 3), scale=0.5, softcap=2.0)
    assert found.shape == make(4, 2)[0].shape


def test_flex_attention_takes_our_arguments():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    make_mask = mock.create_autospec(create_block_mask, side_effect=create_block_mask)
    call = a_call_of(flex_attention, lambda q, *_: torch.zeros_like(q))
    with (
        mock.patch("torch.nn.attention.flex_attention.create_block_mask", make_mask),
        mock.patch("torch.nn.attention.flex_attention.flex_attention", call),
    ):
        mask = row_mask(12, 12, BOUNDS.device, window=3, backend="flex")
        attention(*make(4, 2), mask=mask, scale=0.5, softcap=2.0)
    assert make_mask.called and call.call_args.kwargs["enable_gqa"] is True


@pytest.mark.parametrize("backend", ["fa3", "fa4"])
def test_torch_knows_the_flash_attention_that_is_asked_for(backend, monkeypatch):
    import torch.nn.attention as module

    assert f"'{backend.upper()}'" in str(inspect.signature(module.activate_flash_attention_impl))
    stand_in = mock.create_autospec(module.activate_flash_attention_impl)
    monkeypatch.setattr(module, "activate_flash_attention_impl", stand_in)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    activate(backend)
    stand_in.assert_called_once_with(backend.upper())


def test_a_product_is_added_in_fp32_to_what_it_is_summed_into():
    """kernels/linear_cross_entropy.py on a GPU: bf16 operands, an fp32 sum in place, rounded once."""
    schema = str(torch.ops.aten.addmm.dtype_out._schema)
    assert "ScalarType out_dtype" in schema and "Tensor(a!) out" in schema
    if torch.version.cuda:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmm.dtype_out", "CUDA")


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
def test_triton_has_what_the_descriptor_kernel_asks_for():
    import triton
    import triton.language as tl

    inspect.signature(triton.set_allocator).bind(lambda size, alignment, stream: None)
    parameters = inspect.signature(tl.make_tensor_descriptor).parameters
    assert list(parameters)[:4] == ["base", "shape", "strides", "block_shape"]


CALLS = {
    "torch.cuda.get_device_capability": "device", "torch.cuda.get_device_properties": "device",
    "torch.cuda.get_device_name": "device", "torch.cuda.set_device": "device", "torch.cuda.mem_get_info": "device",
    "torch.cuda.get_rng_state": "", "torch.cuda.set_rng_state": "state", "torch.cuda.max_memory_allocated": "device",
    "torch.cuda.max_memory_reserved": "device", "torch.cuda.synchronize": "", "torch.cuda.empty_cache": "",
    "torch.cuda.init": "", "torch.cuda.device_count": "", "torch.backends.cuda.enable_cudnn_sdp": "enabled",
    "torch.backends.cuda.cudnn_sdp_enabled": "", "torch.backends.cuda.is_flash_attention_available": "",
    "torch.backends.cudnn.version": "", "torch.nn.attention.current_flash_attention_impl": "",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_torch_is_asked_about_a_gpu_as_it_answers(name):
    function = torch
    for part in name.split(".")[1:]:
        function = getattr(function, part)
    inspect.signature(function).bind(*(CALLS[name].split()))
