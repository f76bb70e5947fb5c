"""How is softmax(q kᵀ · scale) v computed, over the keys that a query may see?

A mask (kernels/attention_masks.py) says who sees whom and names the kernel, so nothing is decided here:

    plain causality        no mask: scaled_dot_product_attention, which is cuDNN or FlashAttention on CUDA
    all see all            the same without causality
    tokens after a cache   SDPA with a boolean mask (none for a single new token)
    documents, windows     on the back end that was chosen (kernels/attention_backends.py):
        sdpa               CPU: one call a document in long rows, which skips what no one sees; else a boolean mask
        varlen             torch's varlen kernel (CUDA, fp16/bf16)
        flash-attn         the same from the flash-attn package
        fa3, fa4           torch's varlen kernel on FlashAttention-3 or -4, after `activate`; SDPA runs on it as well
        flex               FlexAttention with a block mask, for rows alone too; trains on CUDA only

Causal or not, with any window and any scale, all of them compute the same. A softcap only some know:

    flash-attn, flex       within the kernel, for rows alone too
    sdpa, after a cache    plain PyTorch with the scores in memory; in long rows on a CPU those of one document at a time
    varlen, fa3, fa4       refused where the mask is built
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention_backends import TORCH_2_12
from kernels.attention_masks import AttentionMask, band, row_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_TORCH_2_13 = torch.__version__ >= "2.13"  # FlashAttention-2 learned num_splits, which 2.12 refuses it


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: AttentionMask | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, differentiable (Vaswani et al. 2017; grouped queries: Ainslie et al. 2023).

    q (B, T, H, D); k and v (B, S, KV, D) with H a multiple of KV: query heads share key heads in consecutive groups.
    Without `mask`, the T queries are the last of the S keys and each sees its past, no more than `window` keys of it;
    with causal=False what follows as well. A mask already holds its causality and its window.
    scale: by default 1/√D. softcap: scores s become softcap · tanh(s / softcap) before the mask and the softmax (Gemma 2;
    Gemma Team 2024, arXiv 2408.00118, section 2).
    Returns (B, T, H, D) in q's dtype. ValueError where `window` or `causal` is not the mask's, where the mask's kernel
    knows no softcap, and for a cache without causality.
    """
    if mask is None and (not causal or window is not None or softcap is not None or q.shape[1] != k.shape[1]):
        mask = row_mask(
            q.shape[1], k.shape[1], q.device, dtype=q.dtype, window=window, causal=causal, softcap=softcap is not None
        )
    if mask is None:
        return _sdpa(q, k, v, None, scale, is_causal=True)
    if window not in (None, mask.window):
        raise ValueError(f"the mask was built for window={mask.window}, not {window}")
    if mask.causal and not causal:
        raise ValueError("the mask was built with causality")
    if mask.kernel == "loop":
        starts = _document_starts(mask, q)
        return _attention_by_document(q, k, v, starts, mask.window, mask.causal, scale, softcap)[0]
    if mask.kernel in ("varlen", "flash-attn"):
        return _varlen(q, k, v, mask, scale, softcap)
    if mask.kernel == "flex":
        return _flex(q, k, v, mask.blocks, scale, softcap)
    if mask.window is not None and q.shape[1] != k.shape[1] and not _is_over_all(mask, k):  # keys before every window
        reach = mask.window + q.shape[1] - 1
        k, v = k[:, -reach:], v[:, -reach:]
    if softcap is not None:
        return _softcapped(q, k, v, mask.visible, scale, softcap)
    return _sdpa(q, k, v, mask.visible, scale, is_causal=False)


def _is_over_all(mask: AttentionMask, k: Tensor) -> bool:
    """Whether the mask speaks of every key, as that of a share of a row does."""
    return mask.visible is not None and mask.visible.shape[-1] == k.shape[1]


# --------------------------------------------------------------------------------------------------- SDPA, plain PyTorch


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None, *, is_causal: bool) -> Tensor:
    if visible is not None and q.is_cuda:  # with grouped heads it is mostly the math kernel, which holds all T*S
        k, v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, T, D)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None, softcap: float) -> Tensor:
    k, v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        one_q, one_k, one_v = (_at_least_fp32(x.transpose(1, 2)) for x in (q, k, v))  # (B, H, T, D)
        scores = softcap * _capped(one_q, one_k, scale, softcap)  # (B, H, T, S)
        out = _hidden(scores, visible).softmax(-1) @ one_v
    return out.transpose(1, 2).to(q.dtype)


def _capped(q: Tensor, k: Tensor, scale: float | None, softcap: float) -> Tensor:
    """tanh(scores / softcap)."""
    return (q @ k.mT * (_scale(q, scale) / softcap)).tanh()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _hidden(scores: Tensor, visible: Tensor | None) -> Tensor:
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, KV, D) → (B, S, H, D), each key head beside its copies."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


# ----------------------------------------------------------------------------------------------- one document at a time


@torch.library.custom_op("groundup::attention_by_document", mutates_args=())
def _attention_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Each document alone on the CPU. An operator, as a compiled graph cannot know the documents' lengths.

    Returns the output (B, T, H, D) and the logarithm of each softmax's denominator (H, B*T).
    """
    lengths = _lengths(cu_seqlens)
    k, v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    outputs, denominators = [], []
    for one_q, one_k, one_v in zip(*(_each_document(x, lengths) for x in (q, k, v)), strict=True):
        out, denominator = _one_document(one_q, one_k, one_v, window, causal, scale, softcap)
        outputs.append(out[0].transpose(0, 1))
        denominators.append(denominator[0])
    return torch.cat(outputs).contiguous().view(q.shape), torch.cat(denominators, dim=1).contiguous()


@torch.library.custom_op("groundup::attention_by_document_backward", mutates_args=())
def _attention_by_document_backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    denominators: Tensor,
    window: int | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _lengths(cu_seqlens)
    wide_k, wide_v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    tensors = [_each_document(x, lengths) for x in (upstream, q, wide_k, wide_v, out)]
    gradients = [
        _one_document_backward(one_upstream, one_q, one_k, one_v, one_out, denominator, window, causal, scale, softcap)
        for one_upstream, one_q, one_k, one_v, one_out, denominator in zip(
            *tensors, denominators[None].split(lengths, dim=2), strict=True
        )
    ]
    wide = (torch.cat([x[0].transpose(0, 1) for x in each]) for each in zip(*gradients, strict=True))  # (B*T, H, D)
    dq, dk, dv = (
        grad.view(len(grad), x.shape[2], -1, x.shape[3]).sum(2).view(x.shape)
        for grad, x in zip(wide, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _one_document(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, causal: bool, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(out (1, H, L, D), log of the softmax's denominator (1, H, L)) of q, k and v (1, H, L, D)."""
    if softcap is None:
        is_causal, term = _causality(q, window, causal)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=term, scale=scale
        )
    with torch.autocast("cpu", enabled=False):
        wide_q, wide_k, wide_v = (_at_least_fp32(x) for x in (q, k, v))
        scores = _hidden(softcap * _capped(wide_q, wide_k, scale, softcap), _visible(q, window, causal))
        denominator = scores.logsumexp(-1)
        out = (scores - denominator[..., None]).exp() @ wide_v
    return out.to(q.dtype), denominator


def _one_document_backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    denominator: Tensor,
    window: int | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; with a softcap by the formulas of FlashAttention (Dao et al. 2022, B.2)."""
    if softcap is None:
        is_causal, term = _causality(q, window, causal)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream, q, k, v, out, denominator, 0.0, is_causal, attn_mask=term, scale=scale
        )
    dtype = q.dtype
    with torch.autocast("cpu", enabled=False):
        upstream, q, k, v, out = (_at_least_fp32(x) for x in (upstream, q, k, v, out))
        capped = _capped(q, k, scale, softcap)
        weights = (
            _hidden(softcap * capped, _visible(q, window, causal)) - denominator[..., None]
        ).exp()  # (1, H, L, L)
        d_capped = weights * (upstream @ v.mT - (upstream * out).sum(-1, keepdim=True))
        d_scores = d_capped * (1 - capped.square()) * _scale(q, scale)
        return (d_scores @ k).to(dtype), (d_scores.mT @ q).to(dtype), (weights.mT @ upstream).to(dtype)


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return [length for length in cu_seqlens.diff().tolist() if length]


def _each_document(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """(B, T, H, D) → for each document (1, H, its length, D)."""
    return [document.transpose(0, 1)[None] for document in x.contiguous().flatten(0, 1).split(lengths)]


def _visible(q: Tensor, window: int | None, causal: bool) -> Tensor | None:
    """(L, L) bool for one document's queries (1, H, L, D): whom they see; None: all see all."""
    length = q.shape[2]
    if not causal and (window is None or window >= length):
        return None
    return band(length, length, window, causal, q.device)


def _causality(q: Tensor, window: int | None, causal: bool) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask as a term) for one document's queries (1, H, L, D)."""
    if causal and (window is None or window >= q.shape[2]):
        return True, None
    visible = _visible(q, window, causal)
    return False, None if visible is None else _hidden(torch.zeros(visible.shape, dtype=q.dtype), visible)


@_attention_by_document.register_fake
def _(q, k, v, cu_seqlens, window, causal, scale, softcap):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=dtype)


@_attention_by_document_backward.register_fake
def _(upstream, q, k, v, cu_seqlens, out, denominators, window, causal, scale, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.window, ctx.causal, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream, _):
    settings = (ctx.window, ctx.causal, ctx.scale, ctx.softcap)
    gradients = _attention_by_document_backward(upstream, *ctx.saved_tensors, *settings)
    return *gradients, None, None, None, None, None


_attention_by_document.register_autograd(_backward, setup_context=_save_for_backward)


# --------------------------------------------------------------------------------------------------------- varlen, flex


def _document_starts(mask: AttentionMask, q: Tensor) -> Tensor:
    if mask.cu_seqlens is not None:
        return mask.cu_seqlens
    batch, length = q.shape[:2]
    return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None, softcap: float | None) -> Tensor:
    """Documents through a varlen kernel: the batch as one long row, each document attended to on its own."""
    if softcap is not None and mask.kernel == "varlen":
        raise ValueError("torch's varlen kernel knows no softcap; build the mask with softcap=True")
    batch, length, heads, head_dim = q.shape
    starts, longest = _document_starts(mask, q), mask.max_seqlen or length
    q, k, v = (x.reshape(batch * length, -1, head_dim) for x in (q, k, v))
    before = -1 if mask.window is None else mask.window - 1  # keys before the query; -1: all
    reach = (before, 0 if mask.causal else before)  # and after it
    if mask.kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest,
            causal=mask.causal, window_size=reach, softmax_scale=scale, softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # torch's own kernel looks there itself
        )  # fmt: skip
    else:
        from torch.nn.attention.varlen import varlen_attn

        extra: dict[str, Any] = {"enable_gqa": k.shape[1] != heads} if TORCH_2_12 else {}
        if _TORCH_2_13:  # one split: a document's bits then do not depend on what else is in the batch
            extra["num_splits"] = 1
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torches that let varlen choose prefer cuDNN, slower on a GH200
            out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=reach, scale=scale, **extra)
    return out.view(batch, length, heads, head_dim)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask | None", scale: float | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    fuse = q.is_cuda and not torch.compiler.is_compiling()  # within a compiled model the compiler fuses it already
    run = _compiled_flex_attention() if fuse else flex_attention
    q, k, v, grouped = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[2] != k.shape[2]
    capped = None if softcap is None else _softcap_of_scores(softcap)
    out = run(q, k, v, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _softcap_of_scores(softcap: float):
    def capped(score, row, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
