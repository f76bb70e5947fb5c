"""How is each kernel called in the libraries that groundup is measured against, where they are installed?

Liger-Kernel (0.8), Unsloth (2026), bitsandbytes (0.50), peft (0.21) and transformers (5). `way` gives a library's own
function for an operation of operations.py, called as the library calls it in training. `Missing` says why there is none.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import EPS, IGNORED, SCALE, Inputs, Prepared, Way

LIBRARIES = ("liger", "unsloth", "bitsandbytes", "peft")
_MODULES = {"liger": "liger_kernel.ops", "unsloth": "unsloth.kernels", "bitsandbytes": "bitsandbytes", "peft": "peft"}


class Missing(Exception):
    """Why a library cannot be measured here."""


def offers(library: str, operation: str) -> bool:
    return operation in _WAYS[library]


def way(library: str, operation: str) -> Way | Prepared:
    """The library's function for an operation that it `offers`. Missing, with the reason, where it is not installed."""
    try:
        import_module(_MODULES[library])
    except Exception as error:  # a library for GPUs may raise anything on import where there is none
        raise Missing(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return _WAYS[library][operation]()


# -------------------------------------------------------------------------------------------------------- Liger-Kernel


def _liger_rms_norm() -> Way:
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)  # not in place: dy stays


def _liger_add_rms_norm() -> Way:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return lambda x, update, weight: LigerFusedAddRMSNormFunction.apply(x, update, weight, EPS, 0.0, "llama", False)


def _liger_swiglu() -> Way:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def _doubled_angles(inputs: Inputs) -> Inputs:
    """cos and sin (1, T, D) in the activations' dtype, as transformers makes them."""
    return inputs | {name: torch.cat([inputs[name]] * 2, -1).to(inputs["q"].dtype) for name in ("cos", "sin")}


def _heads_first(rotate: Way) -> Prepared:
    """transformers keeps (B, heads, T, D), a view of (B, T, heads, D)."""

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return Prepared(_doubled_angles, call)


def _liger_rope() -> Prepared:
    from liger_kernel.ops import LigerRopeFunction

    return _heads_first(lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos, sin))


def _liger_loss() -> Way:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="sum")

    return call


# ------------------------------------------------------------------------------------------------------------- Unsloth


def _unsloth_rms_norm() -> Way:
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

    return lambda x, weight: Fast_RMS_Layernorm.apply(x, weight, EPS, False)  # it makes no gradient of the weight


def _unsloth_swiglu() -> Way:
    from unsloth.kernels import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

    class Swiglu(torch.autograd.Function):
        """Unsloth has the two kernels inside its whole-MLP function only."""

        @staticmethod
        def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return swiglu_fg_kernel(gate[None], up[None])[0]

        @staticmethod
        def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:
            _, d_up, d_gate = swiglu_DWf_DW_dfg_kernel(dh, *ctx.saved_tensors)
            return d_gate, d_up

    return lambda gate, up: Swiglu.apply(gate, up)


def _unsloth_rope() -> Prepared:
    from unsloth.kernels import fast_rope_embedding

    return _heads_first(lambda q, k, cos, sin: fast_rope_embedding(q, k, cos, sin))


def _unsloth_lora() -> Way:
    from unsloth.kernels.fast_lora import LoRA_W

    return lambda x, weight, a, b: LoRA_W.apply(x[None], weight, None, a, b, SCALE)[0]


def _unsloth_dequantise() -> Prepared:
    from unsloth.kernels import fast_dequantize

    return Prepared(_bnb_packed("plain"), lambda codes, state, **_: fast_dequantize(codes, state))


def _unsloth_nf4_linear() -> Prepared:
    from unsloth.kernels.fast_lora import LoRA_W

    def call(x: Tensor, codes: Tensor, state, a: Tensor, b: Tensor, **_) -> Tensor:
        return LoRA_W.apply(x[None], codes, state, a, b, SCALE)[0]

    return Prepared(_bnb_packed("weight"), call)


# -------------------------------------------------------------------------------------------------- bitsandbytes, peft


def _bnb_packed(name: str):
    """A `prepare` that packs the weight of that name as QLoRA does: NF4 with double quantisation, blocks of 64."""

    def prepare(inputs: Inputs) -> Inputs:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(inputs[name].detach(), quant_type="nf4", compress_statistics=True)
        kept = {key: value for key, value in inputs.items() if key not in (name, "packed")}
        return {**kept, "codes": codes, "state": state}

    return prepare


def _bnb_dequantise() -> Prepared:
    import bitsandbytes.functional as bnb

    return Prepared(_bnb_packed("plain"), lambda codes, state, **_: bnb.dequantize_4bit(codes, state))


def _bnb_nf4_linear() -> Prepared:
    import bitsandbytes

    def call(x: Tensor, codes: Tensor, state, a: Tensor, b: Tensor) -> Tensor:
        return bitsandbytes.matmul_4bit(x, codes.t(), state) + SCALE * F.linear(F.linear(x, a), b)

    return Prepared(_bnb_packed("weight"), call)


def _bnb_few_rows() -> Prepared:
    import bitsandbytes

    return Prepared(_bnb_packed("weight"), lambda x, codes, state: bitsandbytes.matmul_4bit(x, codes.t(), state))


def linear_4bit(weight: Tensor) -> nn.Module:
    """A frozen bitsandbytes layer that holds `weight` (N, K) in NF4 with double quantisation; packed on its device."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4",
        compress_statistics=True, device="meta",
    )  # fmt: skip
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to(weight.device)


def with_peft(model: nn.Module, targets: list[str], rank: int, alpha: float, *, fp32_adapters: bool = False) -> Any:
    """peft's adapters on the named layers: in fp32 as it trains them under autocast, or in the layers' dtype, which is
    the fastest for it outside of autocast."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=int(alpha), lora_dropout=0.0, target_modules=targets, bias="none")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)


def _peft_prepare(inputs: Inputs, packed: bool) -> Inputs:
    weight = inputs["weight"].detach()
    holder = nn.Module()
    if packed:
        holder.linear = linear_4bit(weight)
    else:
        holder.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        holder.linear.weight = nn.Parameter(weight, requires_grad=False)
    rank = len(inputs["a"])
    layer = with_peft(holder, ["linear"], rank, SCALE * rank).base_model.model.linear
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, value in ((a, inputs["a"]), (b, inputs["b"])):
        parameter.data = value.detach().clone()
    return {"x": inputs["x"], "a": a, "b": b, "layer": layer}


def _peft_lora(packed: bool) -> Prepared:
    return Prepared(lambda inputs: _peft_prepare(inputs, packed), lambda x, a, b, layer: layer(x))


_WAYS: dict[str, dict[str, Callable[[], Any]]] = {
    "liger": {
        "rms_norm": _liger_rms_norm,
        "add_rms_norm": _liger_add_rms_norm,
        "swiglu": _liger_swiglu,
        "rope": _liger_rope,
        "linear_cross_entropy": _liger_loss,
    },
    "unsloth": {
        "rms_norm": _unsloth_rms_norm,
        "swiglu": _unsloth_swiglu,
        "rope": _unsloth_rope,
        "lora_linear": _unsloth_lora,
        "nf4_dequantise": _unsloth_dequantise,
        "nf4_linear": _unsloth_nf4_linear,
    },
    "bitsandbytes": {"nf4_dequantise": _bnb_dequantise, "nf4_linear": _bnb_nf4_linear, "nf4_few_rows": _bnb_few_rows},
    "peft": {"lora_linear": lambda: _peft_lora(False), "nf4_linear": lambda: _peft_lora(True)},
}
