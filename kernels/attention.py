"""Which tokens may a token look at, and which kernel computes it?

`causal_mask` and `document_mask` say who sees whom; a forward builds one of them once and every layer shares it.
`attention` computes softmax(q kᵀ / √D) v with the fastest kernel that is exact for that mask:

    no mask                scaled_dot_product_attention(is_causal=True), which is cuDNN or FlashAttention on CUDA
    packed documents       flash-attn's varlen kernel, else torch's own varlen kernel (both CUDA, fp16/bf16),
                           else scaled_dot_product_attention with a boolean mask
    tokens after a cache   scaled_dot_product_attention with a boolean mask (or none for a single new token)
"""

import importlib.metadata
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Who may see whom beyond "the past of one's own row". Exactly one of the two forms is set.

    cu_seqlens: (num_docs + 1,) int32, where each document starts in the flattened B*T tokens; for varlen kernels.
    max_seqlen: an upper bound of the documents' lengths; goes with cu_seqlens.
    visible:    bool, broadcasts to (B, 1, T, S), True where the query may see the key; for SDPA.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    visible: Tensor | None = None


def document_ids(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int64: the document each token belongs to. Empty documents (repeated entries) are harmless padding."""
    token = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens, token, right=True) - 1).view(batch, length)


def document_positions(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int64: each token's place within its document, from 0."""
    token = torch.arange(batch * length, device=cu_seqlens.device).view(batch, length)
    return token - cu_seqlens[document_ids(cu_seqlens, batch, length)]


def document_mask(
    cu_seqlens: Tensor, batch: int, length: int, *, dtype: torch.dtype, max_seqlen: int | None = None
) -> AttentionMask | None:
    """The mask of packed documents: a token sees itself and what precedes it in its own document.

    cu_seqlens: (num_docs + 1,) int32 from 0 to B*T over the flattened tokens. Every row starts a document, so with as
    many documents as rows there is nothing to mask beyond causality, and the answer is None (the fast path).
    dtype is the one that the attention will compute in (under autocast: autocast's); it decides which kernel can run.
    max_seqlen defaults to `length`: a document never crosses a row.
    """
    if cu_seqlens.numel() - 1 == batch:
        return None
    if _varlen_kernel(cu_seqlens.device, dtype) is not None:
        return AttentionMask(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen or length)
    document = document_ids(cu_seqlens, batch, length)
    same_document = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    past = torch.ones(length, length, dtype=torch.bool, device=cu_seqlens.device).tril()
    return AttentionMask(visible=same_document & past)


def causal_mask(query_length: int, key_length: int, device: torch.device) -> AttentionMask | None:
    """The mask of T queries that are the last of S keys (a cache in front). None where plain causality says it all."""
    if query_length == key_length:
        return None
    past = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return AttentionMask(visible=past.tril(diagonal=key_length - query_length))  # (T, S)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: AttentionMask | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v, differentiable (Vaswani et al. 2017; grouped queries: Ainslie et al. 2023).

    q (B, T, H, D); k and v (B, S, KV, D) with H a multiple of KV: query heads share key heads in consecutive groups.
    Without `mask`, causal=True is the past of one's own row (T must be S). A mask already holds its causality.
    Returns (B, T, H, D) in q's dtype.
    """
    if mask is not None and mask.cu_seqlens is not None:
        return _varlen(q, k, v, mask)
    visible = None if mask is None else mask.visible
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, T, D)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        is_causal=causal and visible is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Packed documents through a varlen kernel: the batch as one long row, each document attended to on its own."""
    batch, length, heads, head_dim = q.shape
    q, k, v = (x.reshape(batch * length, -1, head_dim) for x in (q, k, v))
    starts, longest = mask.cu_seqlens, mask.max_seqlen
    if _varlen_kernel(q.device, q.dtype) == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)
    else:
        from torch.nn.attention.varlen import varlen_attn

        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return out.view(batch, length, heads, head_dim)


# ------------------------------------------------------------------------------------------ what is here, what is used


def attention_backends(device: str | torch.device) -> dict[str, str]:
    """Each back end of `attention` and "available", or the reason why it is not, for this device."""
    device = torch.device(device)
    return {
        "sdpa": "available",
        "flash-attn varlen": _why_not_flash_attn(device) or "available",
        "torch varlen": _why_not_torch_varlen(device) or "available",
    }


def chosen_backend(device: str | torch.device, dtype: torch.dtype) -> str:
    """What packed documents run on, in words for a start-up line; names the reason where it is the slower way."""
    device = torch.device(device)
    kernel = _varlen_kernel(device, dtype)
    if kernel == "flash-attn":
        return f"flash-attn {importlib.metadata.version('flash-attn')} varlen"
    if kernel == "torch":
        return f"torch {torch.__version__} varlen (flash-attn is not installed)"
    reason = _why_not_torch_varlen(device) or f"varlen kernels take fp16 or bf16, not {dtype}".replace("torch.", "")
    return f"SDPA with a document mask ({reason})"


def _varlen_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """ "flash-attn", "torch", or None when neither can run here."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if _why_not_flash_attn(device) is None:
        return "flash-attn"
    return "torch" if _why_not_torch_varlen(device) is None else None


# what torch.compiler.assume_constant_result sets; calling it would import the compiler, a second at every start
_varlen_kernel._dynamo_marked_constant = True


def _why_not_flash_attn(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "varlen kernels need CUDA"
    try:  # the distribution, because flash-attn-4 has a module of the same name without this function
        importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs compute capability 8.0"
    return None


def _why_not_torch_varlen(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "varlen kernels need CUDA"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's varlen kernel needs compute capability 8.0"
    return None
