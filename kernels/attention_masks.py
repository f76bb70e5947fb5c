"""Which tokens may a token look at?

`document_mask` answers for packed documents, `row_mask` for rows without documents and for tokens after a cache, `share_mask`
for some tokens of a row, which the other ranks compute with others of it (context.py). A forward
builds one of them once, and every layer of the same window shares it. The mask also carries what its kernel needs, so that
`attention` (kernels/attention.py) has nothing to decide.

    causal=True     itself and what precedes it, `window` tokens in all        0 ≤ query − key < window
    causal=False    what precedes and what follows it, within the window       |query − key| < window
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attention_backends import backend_that_runs, loop_pays

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class AttentionMask:
    """Who may see whom beyond "the past of one's own row", in the form that one kernel reads.

    kernel:     "mask" (all scores, under `visible`), "loop" (a call a document), "varlen", "flash-attn" or "flex".
    visible:    mask: bool, broadcasts to (B, 1, T, S), True where the query may see the key; None: all see all. After a
                cache, S is cut to the last window + T - 1 keys, which are all that anyone sees.
    cu_seqlens: loop, varlen, flash-attn: (num_docs + 1,) int32, where each document starts in the flattened B*T tokens;
                None: each row is a document.
    max_seqlen: varlen, flash-attn: an upper bound of the documents' lengths; goes with cu_seqlens.
    window:     a key is seen where it is fewer tokens away than this, so the token itself counts; None: at any distance.
    causal:     whether what follows a token is hidden from it.
    blocks:     flex: the block mask; None: all see all.
    """

    kernel: str = "mask"
    visible: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    window: int | None = None
    causal: bool = True
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
    causal: bool = True,
    softcap: bool = False,
    backend: str = "auto",
) -> AttentionMask | None:
    """The mask of packed documents: a token sees tokens of its own document only.

    cu_seqlens: (num_docs + 1,) int32 from 0 to B*T over the flattened tokens. Every row starts a document, so with as
    many documents as rows the rows are the documents, and the answer is `row_mask`'s.
    dtype is the one that the attention will compute in (under autocast: autocast's); it decides which kernel can run.
    max_seqlen defaults to `length`: a document never crosses a row.
    window: a token sees itself and the window-1 tokens before it (Mistral's sliding_window; Jiang et al. 2023).
    causal=False: it sees its whole document (BERT); with a window also the window-1 tokens after it (ModernBERT, whose
    local_attention of 128, 64 to each side, is a window of 65; Warner et al. 2024).
    softcap: whether `attention` will be given one; not every kernel knows it.
    backend: one of ATTENTION_BACKENDS. ValueError where it cannot run; `choose_attention` tells the user beforehand.
    """
    if cu_seqlens.numel() - 1 == batch:
        return row_mask(
            length, length, cu_seqlens.device,
            dtype=dtype, window=window, causal=causal, softcap=softcap, backend=backend,
        )  # fmt: skip
    _check_window(window)
    device = cu_seqlens.device
    kernel = backend_that_runs(backend, device, dtype, softcap)
    if kernel == "sdpa":
        kernel = "loop" if loop_pays(device, dtype, length) else "mask"
    if kernel in ("loop", "varlen", "flash-attn"):
        return AttentionMask(
            kernel, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen or length, window=window, causal=causal
        )
    document = document_ids(cu_seqlens, batch, length)
    if kernel == "flex":
        return AttentionMask("flex", window=window, causal=causal, blocks=_blocks(document, length, window, causal))
    same_document = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    return AttentionMask(
        visible=same_document & band(length, length, window, causal, device), window=window, causal=causal
    )


def row_mask(
    query_length: int,
    key_length: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    causal: bool = True,
    softcap: bool = False,
    backend: str = "auto",
) -> AttentionMask | None:
    """The mask of T queries that are the last of S keys (a cache in front), without documents.

    None where plain causality says it all. window, causal, softcap, dtype and backend as in `document_mask`; queries after
    a cache run on SDPA, or in plain PyTorch with a softcap, whatever the back end. ValueError for a cache with causal=False.
    """
    _check_window(window)
    if query_length != key_length:
        return _mask_after_cache(query_length, key_length, window, causal, device)
    plain = window is None or window >= key_length
    kernel = backend_that_runs(backend, device, dtype, softcap)
    if plain and not softcap and kernel != "flex":
        return None if causal else AttentionMask(window=window, causal=False)
    if kernel == "flex":
        blocks = None if plain and not causal else _blocks(None, key_length, window, causal, device)
        return AttentionMask("flex", window=window, causal=causal, blocks=blocks)
    if kernel in ("varlen", "flash-attn"):
        return AttentionMask(kernel, window=window, causal=causal)
    if softcap and loop_pays(device, dtype, key_length):  # nothing fused: a row's scores in memory instead of all rows'
        return AttentionMask("loop", window=window, causal=causal)
    visible = None if plain and not causal else band(query_length, key_length, window, causal, device)
    return AttentionMask(visible=visible, window=window, causal=causal)


def share_mask(
    places: Tensor,
    cu_seqlens: Tensor | None,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype,
    window: int | None = None,
    causal: bool = True,
    softcap: bool = False,
    backend: str = "auto",
) -> AttentionMask:
    """The mask of queries at `places` (n,) of each row, over the keys of whole rows of T = `length` tokens.

    cu_seqlens, and the rest, as in `document_mask`; None where every row is one document. On FlexAttention where that runs,
    else on SDPA, or plain PyTorch with a softcap, under a boolean mask (B or 1, 1, n, T).
    """
    _check_window(window)
    document = None if cu_seqlens is None else document_ids(cu_seqlens, batch, length)
    if backend_that_runs(backend, places.device, dtype, softcap) == "flex":
        blocks = _blocks(document, length, window, causal, places.device, places)
        return AttentionMask("flex", window=window, causal=causal, blocks=blocks)
    visible = _sees(places[:, None], torch.arange(length, device=places.device), window, causal)  # (n, T)
    if document is not None:
        visible = visible & (document[:, None, places, None] == document[:, None, None, :])
    return AttentionMask(visible=visible, window=window, causal=causal)


def band(query_length: int, key_length: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """(T, S) bool: whom the last T of S tokens of one document see."""
    query = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    key = torch.arange(key_length, device=device)
    return _sees(query, key, window, causal)


def _mask_after_cache(
    query_length: int, key_length: int, window: int | None, causal: bool, device: torch.device
) -> AttentionMask:
    if not causal:
        raise ValueError("without causality there is no cache: tokens that come later would change the earlier ones")
    if query_length == 1:  # sees every key of its window
        return AttentionMask(window=window)
    keys = key_length if window is None else min(key_length, window + query_length - 1)
    return AttentionMask(visible=band(query_length, keys, window, True, device), window=window)


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the token itself, so it cannot be {window}")


def _sees(query: Tensor, key: Tensor, window: int | None, causal: bool) -> Tensor:
    """Whether each query sees each key of its document, from their places in it; the two broadcast."""
    distance = query - key
    seen = (distance >= 0) | (not causal)
    return seen if window is None else seen & (distance.abs() < window)


def _blocks(
    document: Tensor | None, length: int, window: int | None, causal: bool, device: torch.device | None = None,
    places: Tensor | None = None,
) -> "BlockMask":  # fmt: skip
    """FlexAttention's mask of rows of `length` tokens, of the documents (B, T) or else of the rows alone; with `places` (n,)
    of the queries that stand there alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row, head, query, key):
        query = query if places is None else places[query]
        visible = _sees(query, key, window, causal)
        if document is not None:
            visible = visible & (document[row, query] == document[row, key])
        return visible

    rows, device = (None, device) if document is None else (len(document), document.device)
    return create_block_mask(seen, rows, None, length if places is None else len(places), length, device=device)
