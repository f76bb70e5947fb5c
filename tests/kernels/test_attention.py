"""Does attention compute softmax(q kᵀ / √D) v over exactly the keys a query may see, whatever the kernel?"""

import pytest
import torch

from kernels.attention import (
    attention,
    attention_backends,
    causal_mask,
    chosen_backend,
    document_mask,
    document_positions,
)

BOUNDS = torch.tensor([0, 3, 4, 12, 19, 24], dtype=torch.int32)  # two rows of 12


def make(heads, kv_heads, length=12, keys=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    shapes = [(2, length, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_hand(q, k, v, visible):
    """One query at a time, in float64: visible(row, query, key) says what it may see."""
    rows = []
    for row in range(q.shape[0]):
        for query in range(q.shape[1]):
            seen = [key for key in range(k.shape[1]) if visible(row, query, key)]
            for head in range(q.shape[2]):
                kv_head = head // (q.shape[2] // k.shape[2])
                scores = k[row, seen, kv_head] @ q[row, query, head] / q.shape[3] ** 0.5
                rows.append(torch.softmax(scores, 0) @ v[row, seen, kv_head])
    return torch.stack(rows).view(q.shape)


def document_of(row, token):
    return int((row * 12 + token >= BOUNDS).sum())


def in_document(row, query, key):
    return key <= query and document_of(row, key) == document_of(row, query)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_equal_the_definition(packed, heads, kv_heads):
    q, k, v = make(heads, kv_heads)
    mask = document_mask(BOUNDS, 2, 12, dtype=q.dtype) if packed else None
    visible = in_document if packed else lambda row, query, key: key <= query
    found, wanted = attention(q, k, v, mask=mask), by_hand(q, k, v, visible)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    for grad, wanted_grad in zip(
        torch.autograd.grad((found * upstream).sum(), (q, k, v)),
        torch.autograd.grad((wanted * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 5, 12])
def test_new_queries_see_all_earlier_keys_and_their_own_past(length):
    q, k, v = make(4, 2, length=length)
    found = attention(q, k, v, mask=causal_mask(length, 12, q.device))
    torch.testing.assert_close(
        found, by_hand(q, k, v, lambda _, query, key: key <= 12 - length + query), atol=1e-12, rtol=0
    )


def test_without_causality_everything_is_seen():
    q, k, v = make(4, 2)
    torch.testing.assert_close(attention(q, k, v, causal=False), by_hand(q, k, v, lambda *_: True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_error_is_that_of_its_rounding(dtype):
    """Bounds of a sum of rounded products: 2e-6 in fp32, 2^-8 in bf16 (one rounding of p and one of the output)."""
    q, k, v = make(4, 2, dtype=dtype)
    mask = document_mask(BOUNDS, 2, 12, dtype=dtype)
    wanted = by_hand(q.double(), k.double(), v.double(), in_document)
    error = (attention(q, k, v, mask=mask).double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]


def test_rows_alone_and_whole_prefixes_need_no_mask():
    rows = torch.tensor([0, 12, 24], dtype=torch.int32)
    assert document_mask(rows, 2, 12, dtype=torch.float32) is None
    assert causal_mask(12, 12, rows.device) is None


def test_positions_restart_with_each_document():
    wanted = [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert document_positions(BOUNDS, 2, 12).flatten().tolist() == wanted


def test_the_cpu_says_what_it_has_and_why_not_more():
    backends = attention_backends("cpu")
    assert backends["sdpa"] == "available"
    assert backends["flash-attn varlen"] == backends["torch varlen"] == "varlen kernels need CUDA"
    assert chosen_backend("cpu", torch.float32) == "SDPA with a document mask (varlen kernels need CUDA)"


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_the_varlen_kernel_equals_the_mask(heads, kv_heads):
    """On CUDA in bf16 the varlen kernel is chosen; it agrees with SDPA on the CPU in float64 to bf16's rounding."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, heads, 64), (2, 12, kv_heads, 64), (2, 12, kv_heads, 64)]
    half = [torch.randn(shape, generator=generator).bfloat16().cuda().requires_grad_() for shape in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in half]
    mask = document_mask(BOUNDS.cuda(), 2, 12, dtype=torch.bfloat16)
    assert mask.visible is None and "varlen" in chosen_backend("cuda", torch.bfloat16)
    found = attention(*half, mask=mask)
    wanted = attention(*exact, mask=document_mask(BOUNDS, 2, 12, dtype=torch.float64))
    assert (found.double().cpu() - wanted).norm() < 2**-7 * wanted.norm()
    grads = torch.autograd.grad(found.sum(), half)
    for grad, wanted_grad in zip(grads, torch.autograd.grad(wanted.sum(), exact), strict=True):
        assert (grad.double().cpu() - wanted_grad).norm() < 2**-6 * wanted_grad.norm() + 1e-3
