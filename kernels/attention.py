"""Which tokens may a token look at, and which kernel computes it?

`document_mask` and `causal_mask` say who sees whom; a forward builds one of them once and every layer shares it. The mask
also carries what its kernel needs, so `attention`, which computes softmax(q kᵀ / √D) v, has nothing to decide:

    plain causality        no mask: scaled_dot_product_attention, which is cuDNN or FlashAttention on CUDA
    tokens after a cache   SDPA with a boolean mask (none for a single new token)
    documents, windows     on the back end that was chosen:
        sdpa               CPU: one call a document in long rows, which skips what no one sees; else a boolean mask
        varlen             torch's varlen kernel (CUDA, fp16/bf16)
        flash-attn         the same from the flash-attn package
        fa3, fa4           torch's varlen kernel on FlashAttention-3 or -4, after `activate`; SDPA runs on it as well
        flex               FlexAttention with a block mask, for plain causality too; trains on CUDA only

When "auto" chooses: flash-attn where it is installed, else varlen, both where they can run; sdpa elsewhere.
"""

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ATTENTION_BACKENDS = ("auto", "sdpa", "varlen", "flash-attn", "fa3", "fa4", "flex")
HALF = (torch.float16, torch.bfloat16)

# On a CPU, rows from this many tokens are faster as one call a document: 1.06 to 15 times in the shapes tried with fp32,
# 0.98 to 8 with bf16; fp16 gains more
LOOP_FROM, LOOP_FROM_BF16 = 256, 512

_TORCH_2_12 = torch.__version__ >= "2.12"  # varlen_attn learned enable_gqa, and FA4 learned windows
_TORCH_2_13 = torch.__version__ >= "2.13"  # FlashAttention-2 learned num_splits, which 2.12 refuses it


@dataclass(frozen=True)
class AttentionMask:
    """Who may see whom beyond "the past of one's own row", in the form that one kernel reads.

    kernel:     "mask" (SDPA with `visible`), "loop" (SDPA, a call a document), "varlen", "flash-attn" or "flex".
    visible:    mask: bool, broadcasts to (B, 1, T, S), True where the query may see the key; None: all see all. After a
                cache, S is cut to the last window + T - 1 keys, which are all that anyone sees.
    cu_seqlens: loop, varlen, flash-attn: (num_docs + 1,) int32, where each document starts in the flattened B*T tokens;
                None: each row is a document.
    max_seqlen: varlen, flash-attn: an upper bound of the documents' lengths; goes with cu_seqlens.
    window:     how many keys a query sees at most, itself included; None: all of its past.
    blocks:     flex: the block mask.
    """

    kernel: str = "mask"
    visible: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    window: int | None = None
    blocks: "BlockMask | None" = None


def document_ids(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int64: the document each token belongs to. Empty documents (repeated entries) are harmless padding."""
    token = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens, token, right=True) - 1).view(batch, length)


def document_positions(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int64: each token's place within its document, from 0."""
    token = torch.arange(batch * length, device=cu_seqlens.device).view(batch, length)
    return token - cu_seqlens[document_ids(cu_seqlens, batch, length)]


def document_mask(
    cu_seqlens: Tensor,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    max_seqlen: int | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> AttentionMask | None:
    """The mask of packed documents: a token sees itself and what precedes it in its own document.

    cu_seqlens: (num_docs + 1,) int32 from 0 to B*T over the flattened tokens. Every row starts a document, so with as
    many documents as rows there is nothing to mask beyond causality, and the answer is `causal_mask`'s.
    dtype is the one that the attention will compute in (under autocast: autocast's); it decides which kernel can run.
    max_seqlen defaults to `length`: a document never crosses a row.
    window: a token sees itself and the window-1 tokens before it (Mistral's sliding_window; Jiang et al. 2023).
    backend: one of ATTENTION_BACKENDS. ValueError where it cannot run; `choose_attention` tells the user beforehand.
    """
    if cu_seqlens.numel() - 1 == batch:
        return causal_mask(length, length, cu_seqlens.device, dtype=dtype, window=window, backend=backend)
    _check_window(window)
    kernel = _backend_that_runs(backend, cu_seqlens.device, dtype)
    if kernel in ("varlen", "flash-attn"):
        return AttentionMask(kernel, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen or length, window=window)
    if kernel == "sdpa" and _loop_pays(cu_seqlens.device, dtype, length):
        return AttentionMask("loop", cu_seqlens=cu_seqlens, window=window)
    document = document_ids(cu_seqlens, batch, length)
    if kernel == "flex":
        return AttentionMask("flex", window=window, blocks=_block_mask(document, length, window, cu_seqlens.device))
    same_document = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    return AttentionMask(visible=same_document & _band(length, length, window, cu_seqlens.device), window=window)


def causal_mask(
    query_length: int,
    key_length: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    backend: str = "auto",
) -> AttentionMask | None:
    """The mask of T queries that are the last of S keys (a cache in front). None where plain causality says it all.

    window, dtype and backend as in `document_mask`; queries after a cache run on SDPA whatever the back end.
    """
    _check_window(window)
    reach = key_length if window is None else window
    plain = reach >= key_length
    if query_length != key_length:
        if query_length == 1:  # sees every key of its window
            return AttentionMask(window=window)
        keys = min(key_length, reach + query_length - 1)
        return AttentionMask(visible=_band(query_length, keys, window, device), window=window)
    kernel = _backend_that_runs(backend, device, dtype)
    if kernel == "flex":
        return AttentionMask("flex", window=window, blocks=_block_mask(None, key_length, window, device))
    if plain:
        return None
    if kernel in ("varlen", "flash-attn"):
        return AttentionMask(kernel, window=window)
    return AttentionMask(visible=_band(query_length, key_length, window, device), window=window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    mask: AttentionMask | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D) v, differentiable (Vaswani et al. 2017; grouped queries: Ainslie et al. 2023).

    q (B, T, H, D); k and v (B, S, KV, D) with H a multiple of KV: query heads share key heads in consecutive groups.
    Without `mask`, the T queries are the last of the S keys and each sees its past, no more than `window` keys of it;
    with causal=False all see all. A mask already holds its causality and its window.
    Returns (B, T, H, D) in q's dtype. ValueError where `window` is not the mask's, or there is one without causality.
    """
    if mask is not None and window not in (None, mask.window):
        raise ValueError(f"the mask was built for window={mask.window}, not {window}")
    if mask is None and causal and (window is not None or q.shape[1] != k.shape[1]):
        mask = causal_mask(q.shape[1], k.shape[1], q.device, dtype=q.dtype, window=window)
    elif mask is None and window is not None:
        raise ValueError("a window needs causal=True")
    if mask is None:
        return _sdpa(q, k, v, None, is_causal=causal)
    if mask.kernel == "loop":
        return _attention_by_document(q, k, v, mask.cu_seqlens, mask.window)[0]
    if mask.kernel in ("varlen", "flash-attn"):
        return _varlen(q, k, v, mask)
    if mask.blocks is not None:
        return _flex(q, k, v, mask.blocks)
    if mask.window is not None and q.shape[1] != k.shape[1]:  # keys before every query's window
        reach = mask.window + q.shape[1] - 1
        k, v = k[:, -reach:], v[:, -reach:]
    return _sdpa(q, k, v, mask.visible, is_causal=False)


# ----------------------------------------------------------------------------------------------------- who may see whom


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the token itself, so it cannot be {window}")


def _band(query_length: int, key_length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S) bool: the last T of S tokens, each seeing itself and what is before it, `window` keys at most."""
    query = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    key = torch.arange(key_length, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _block_mask(document: Tensor | None, length: int, window: int | None, device: torch.device) -> "BlockMask":
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row, head, query, key):
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        if document is not None:
            visible = visible & (document[row, query] == document[row, key])
        return visible

    return create_block_mask(seen, None if document is None else len(document), None, length, length, device=device)


def _loop_pays(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    return device.type == "cpu" and length >= (LOOP_FROM_BF16 if dtype == torch.bfloat16 else LOOP_FROM)


# -------------------------------------------------------------------------------------------------------------- kernels


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, is_causal: bool) -> Tensor:
    if visible is not None and q.is_cuda:  # with grouped heads it is mostly the math kernel, which holds all T*S
        k, v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, T, D)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        is_causal=is_causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@torch.library.custom_op("groundup::attention_by_document", mutates_args=())
def _attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """SDPA's CPU kernel on each document alone. An operator, as a compiled graph cannot know the documents' lengths.

    Returns the output (B, T, H, D) and the logarithm of each softmax's denominator (H, B*T).
    """
    lengths = _lengths(cu_seqlens)
    k, v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    outputs, denominators = [], []
    for one_q, one_k, one_v in zip(*(_each_document(x, lengths) for x in (q, k, v)), strict=True):
        is_causal, visible = _causality(one_q, window)
        out, denominator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            one_q, one_k, one_v, 0.0, is_causal, attn_mask=visible
        )
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
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _lengths(cu_seqlens)
    wide_k, wide_v = (_repeat_heads(x, q.shape[2]) for x in (k, v))
    tensors = [_each_document(x, lengths) for x in (upstream, q, wide_k, wide_v, out)]
    gradients = []
    for one_upstream, one_q, one_k, one_v, one_out, denominator in zip(
        *tensors, denominators[None].split(lengths, dim=2), strict=True
    ):
        is_causal, visible = _causality(one_q, window)
        gradients.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                one_upstream, one_q, one_k, one_v, one_out, denominator, 0.0, is_causal, attn_mask=visible
            )
        )
    wide = (torch.cat([x[0].transpose(0, 1) for x in each]) for each in zip(*gradients, strict=True))  # (B*T, H, D)
    dq, dk, dv = (
        grad.view(len(grad), x.shape[2], -1, x.shape[3]).sum(2).view(x.shape)
        for grad, x in zip(wide, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return [length for length in cu_seqlens.diff().tolist() if length]


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, KV, D) → (B, S, H, D), each key head beside its copies."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _each_document(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """(B, T, H, D) → for each document (1, H, its length, D)."""
    return [document.transpose(0, 1)[None] for document in x.contiguous().flatten(0, 1).split(lengths)]


def _causality(q: Tensor, window: int | None) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask as a term) for one document's queries (1, H, L, D)."""
    length = q.shape[2]
    if window is None or window >= length:
        return True, None
    outside = ~_band(length, length, window, q.device)
    return False, torch.zeros(length, length, dtype=q.dtype).masked_fill(outside, float("-inf"))


@_attention_by_document.register_fake
def _(q, k, v, cu_seqlens, window):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=dtype)


@_attention_by_document_backward.register_fake
def _(upstream, q, k, v, cu_seqlens, out, denominators, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream, _):
    return *_attention_by_document_backward(upstream, *ctx.saved_tensors, ctx.window), None, None


_attention_by_document.register_autograd(_backward, setup_context=_save_for_backward)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Documents through a varlen kernel: the batch as one long row, each document attended to on its own."""
    batch, length, heads, head_dim = q.shape
    starts, longest = mask.cu_seqlens, mask.max_seqlen or length
    if starts is None:
        starts = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device)
    q, k, v = (x.reshape(batch * length, -1, head_dim) for x in (q, k, v))
    reach = (-1 if mask.window is None else mask.window - 1, 0)  # keys before the query, keys after it
    if mask.kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        deterministic = torch.are_deterministic_algorithms_enabled()  # torch's own kernel looks there itself
        out = flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, causal=True, window_size=reach, deterministic=deterministic
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        extra: dict[str, Any] = {"enable_gqa": k.shape[1] != heads} if _TORCH_2_12 else {}
        if _TORCH_2_13:  # one split: a document's bits then do not depend on what else is in the batch
            extra["num_splits"] = 1
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torches that let varlen choose prefer cuDNN, slower on a GH200
            out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=reach, **extra)
    return out.view(batch, length, heads, head_dim)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask") -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    fuse = q.is_cuda and not torch.compiler.is_compiling()  # within a compiled model the compiler fuses it already
    run = _compiled_flex_attention() if fuse else flex_attention
    q, k, v, grouped = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[2] != k.shape[2]
    return run(q, k, v, block_mask=blocks, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


# -------------------------------------------------------------------------------------- what is here, and what is chosen


def why_not(
    backend: str, device: str | torch.device, dtype: torch.dtype, head_dim: int | None = None, *, training: bool = True
) -> str | None:
    """None where the back end can compute attention of this dtype there, else the reason why not, in words."""
    if backend not in ATTENTION_BACKENDS[1:]:
        raise ValueError(f"there is no attention back end {backend!r}")
    device = torch.device(device)
    if backend == "sdpa":
        return None
    if backend == "flex":
        return _why_not_flex(device, dtype, head_dim, training)
    if device.type != "cuda":
        return "varlen kernels need CUDA"
    if dtype not in HALF:
        return f"varlen kernels take fp16 or bf16, not {dtype}".replace("torch.", "")
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        return f"varlen kernels take heads up to 256 wide, in multiples of 8, not {head_dim}"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "varlen kernels need compute capability 8.0"
    if backend == "flash-attn":  # the distribution: flash-attn-4 has a module of the same name without this function
        return None if _installed("flash-attn") else "flash-attn is not installed"
    if backend == "fa3":
        if capability[0] != 9:
            return f"FlashAttention-3 needs compute capability 9.0, not {capability[0]}.{capability[1]}"
        if importlib.util.find_spec("flash_attn_interface") is None:  # the module that torch looks for
            index = f"https://download.pytorch.org/whl/cu{(torch.version.cuda or '').replace('.', '')}"
            return f"flash-attn-3 is not installed (pip install flash-attn-3 --index-url {index})"
    if backend == "fa4":
        if capability[0] not in (9, 10):
            return f"FlashAttention-4 needs compute capability 9.0 or 10.0, not {capability[0]}.{capability[1]}"
        if not _TORCH_2_12:
            return "FlashAttention-4 knows packed documents from torch 2.12 on"
        if not _installed("flash-attn-4"):
            return "flash-attn-4 is not installed (pip install flash-attn-4)"
    return None


def _why_not_flex(device: torch.device, dtype: torch.dtype, head_dim: int | None, training: bool) -> str | None:
    if device.type == "cpu":
        return "FlexAttention trains on CUDA only" if training else None
    if device.type != "cuda":
        return f"FlexAttention needs CUDA, not {device.type}"
    if dtype == torch.float64:
        return "FlexAttention takes fp32, fp16 and bf16 on CUDA"
    if head_dim is not None and head_dim < 16:
        return f"FlexAttention takes heads from 16 wide, not {head_dim}"
    return None if importlib.util.find_spec("triton") else "FlexAttention needs triton, which is not installed"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def attention_backends(device: str | torch.device) -> dict[str, str]:
    """Each back end of `attention` and "available", or the reason why it is not, for training on this device."""
    return {name: why_not(name, device, torch.bfloat16) or "available" for name in ATTENTION_BACKENDS[1:]}


def choose_attention(
    request: str, device: str | torch.device, dtype: torch.dtype, *, head_dim: int | None = None, training: bool = True
) -> str:
    """The back end to use: one of ATTENTION_BACKENDS other than "auto". Pass it to the masks, and once to `activate`.

    dtype is the one that attention computes in. training=False: without gradients. UserError where `request` is
    unknown or cannot run.
    """
    if request not in ATTENTION_BACKENDS:
        raise UserError(f"there is no attention back end {request!r}; choose one of {', '.join(ATTENTION_BACKENDS)}")
    if request == "auto":
        can_run = (name for name in ("flash-attn", "varlen") if why_not(name, device, dtype, head_dim) is None)
        return next(can_run, "sdpa")
    if reason := why_not(request, device, dtype, head_dim, training=training):
        raise UserError(f"attention cannot run on {request} here: {reason}; choose auto or sdpa")
    return request


def activate(backend: str) -> None:
    """Make FlashAttention-3 or -4 the flash kernel of this process where fa3 or fa4 was chosen; else do nothing.

    UserError where its package is there but does not load.
    """
    if backend not in ("fa3", "fa4"):
        return
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl(backend.upper())
    except Exception as error:  # whatever a compiled package of another torch or CUDA may raise when it is loaded
        raise UserError(
            f"{backend} does not load ({error}); reinstall flash-attn-{backend[2]} or choose auto"
        ) from error
    torch.backends.cuda.enable_cudnn_sdp(False)  # which SDPA would prefer on Hopper, to the one that was asked for


def _backend_that_runs(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that computes documents and windows: "sdpa", "varlen", "flash-attn" or "flex"."""
    if backend == "auto":
        return choose_attention("auto", device, dtype)
    if reason := why_not(backend, device, dtype, training=False):
        raise ValueError(f"attention back end {backend}: {reason}")
    return "varlen" if backend in ("fa3", "fa4") else backend


# what torch.compiler.assume_constant_result sets; calling it would import the compiler, a second at every start
_backend_that_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- in words


def sdpa_kernel_taken(
    device: str | torch.device, dtype: torch.dtype, head_dim: int | None = None, *, masked: bool = False
) -> str:
    """The kernel that torch takes for SDPA there, causal or with a boolean mask, asked of torch itself.

    On Hopper and later a cuDNN older than 9.15.1 makes torch fall back to FlashAttention-2, about half as fast. Mostly
    the cause is another cuDNN in LD_LIBRARY_PATH, found before the one of torch's wheel; so that is said.
    """
    device = torch.device(device)
    x = torch.empty(1, 2, 128, head_dim or 64, dtype=dtype, device=device, requires_grad=True)
    visible = torch.ones(128, 128, dtype=torch.bool, device=device) if masked else None
    taken = SDPBackend(torch._fused_sdp_choice(x, x, x, attn_mask=visible, is_causal=not masked))
    if device.type != "cuda":
        return f"the {taken.name.lower().replace('_', ' ')} kernel for {device.type}"
    cudnn = torch.backends.cudnn.version() or 0
    cudnn_name = f"cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}"
    if taken == SDPBackend.CUDNN_ATTENTION:
        return cudnn_name
    names = {SDPBackend.EFFICIENT_ATTENTION: "memory-efficient", SDPBackend.MATH: "math"}
    name = names.get(taken, taken.name)
    if taken == SDPBackend.FLASH_ATTENTION:
        name = f"FlashAttention-{(torch.nn.attention.current_flash_attention_impl() or 'FA2')[2:]}"
    hopper = torch.cuda.get_device_capability(device) >= (9, 0) and dtype in HALF
    if hopper and 0 < cudnn < 91501 and torch.backends.cuda.cudnn_sdp_enabled():
        name += f", as {cudnn_name} is too old: is one in LD_LIBRARY_PATH found before torch's?"
    return name


def describe_attention(
    backend: str, device: str | torch.device, dtype: torch.dtype, *, head_dim: int | None = None
) -> str:
    """What a chosen back end means, in words for a start-up line: kernels, versions, and why not a faster one."""
    if backend == "flex":
        return f"FlexAttention of torch {torch.__version__}"
    plain = sdpa_kernel_taken(device, dtype, head_dim)
    if backend == "sdpa":
        if torch.device(device).type == "cpu":
            least = LOOP_FROM_BF16 if dtype == torch.bfloat16 else LOOP_FROM
            documents = f"documents one by one in rows of {least} tokens and more"
        else:
            documents = f"documents by a mask on {sdpa_kernel_taken(device, dtype, head_dim, masked=True)}"
        return f"SDPA on {plain}; {documents} ({why_not('varlen', device, dtype, head_dim) or 'as asked'})"
    version = torch.__version__
    if backend == "flash-attn":
        name = f"flash-attn {importlib.metadata.version('flash-attn')}"
    elif backend == "varlen":
        name = f"torch {version} varlen ({why_not('flash-attn', device, dtype, head_dim) or 'as asked'})"
    else:
        name = f"FlashAttention-{backend[2]} in torch {version}"
    return f"{name} for documents and windows; SDPA on {plain} for the rest"


def chosen_backend(device: str | torch.device, dtype: torch.dtype) -> str:
    """`describe_attention` of what "auto" chooses."""
    return describe_attention(choose_attention("auto", device, dtype), device, dtype)
