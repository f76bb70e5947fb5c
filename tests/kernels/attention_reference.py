"""What is attention, by definition? Scores, softcap, who sees whom, softmax: in float64, one head of one row at a time."""

import torch

from kernels.attention_masks import AttentionMask, document_mask

BOUNDS = torch.tensor([0, 3, 4, 12, 19, 24, 24], dtype=torch.int32)  # two rows of 12, and an empty document as padding


def make(heads, kv_heads, length=12, keys=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    shapes = [(2, length, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_hand(q, k, v, visible, scale=None, softcap=None):
    """visible(row, query, key) says what a query may see."""
    rows = []
    for row in range(q.shape[0]):
        hidden = torch.tensor(
            [[not visible(row, query, key) for key in range(k.shape[1])] for query in range(q.shape[1])]
        )
        for head in range(q.shape[2]):
            kv_head = head // (q.shape[2] // k.shape[2])
            scores = q[row, :, head] @ k[row, :, kv_head].T * (q.shape[3] ** -0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), 1) @ v[row, :, kv_head])
    return torch.stack(rows).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def document_of(row, token):
    return int((row * 12 + token >= BOUNDS).sum())


def past(window, offset=0, packed=False):
    """Causality: the past, `window` keys at most, of the own document; queries start `offset` keys late."""

    def visible(row, query, key):
        near = window is None or query + offset - key < window
        return key <= query + offset and near and (not packed or document_of(row, key) == document_of(row, query))

    return visible


def around(window, packed=False):
    """No causality: fewer than `window` tokens before or after, of the own document."""

    def visible(row, query, key):
        near = window is None or -window < query - key < window
        return near and (not packed or document_of(row, key) == document_of(row, query))

    return visible


def seen(causal, window, packed=False):
    return past(window, packed=packed) if causal else around(window, packed)


def compare(found, wanted, inputs, atol=1e-12):
    """Outputs, and gradients under a random upstream gradient that has gaps in memory."""
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)
    upstream = torch.randn(*found.shape, 2, generator=torch.Generator().manual_seed(0), dtype=found.dtype)[..., 0]
    gradients = [torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (found, wanted)]
    for gradient, wanted_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, atol=atol, rtol=0)


def packed_mask(kernel, window=None, dtype=torch.float64, causal=True):
    """The documents of BOUNDS as a mask of that kind: rows of 12 tokens are too short for `document_mask` to loop."""
    if kernel == "mask":
        return document_mask(BOUNDS, 2, 12, dtype=dtype, window=window, causal=causal)
    return AttentionMask(kernel, cu_seqlens=BOUNDS, max_seqlen=8, window=window, causal=causal)
