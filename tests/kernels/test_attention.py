"""Does attention compute softmax(q kᵀ · scale) v over exactly the keys a query may see, whatever the kernel?"""

from pathlib import Path

import pytest
import torch

import kernels.attention
import kernels.attention_backends
import kernels.attention_masks
from kernels.attention import attention
from kernels.attention_backends import activate, why_not
from kernels.attention_masks import AttentionMask, document_mask, document_positions, row_mask
from tests.kernels.attention_reference import BOUNDS, by_hand, compare, make, packed_mask, past, seen
from tests.kernels.imitated_varlen import install_imitation
from tests.kernels.mutants import load_mutant

WINDOWS = [None, 1, 3, 12]  # 3 is shorter than most documents of BOUNDS, 12 longer than all
HEADS = [(4, 2), *(pytest.param(4, kv_heads, marks=pytest.mark.exhaustive) for kv_heads in (4, 1))]
SCORES = [{}, {"scale": 0.6}, {"softcap": 1.5}, {"scale": 0.6, "softcap": 1.5}]
every_score = pytest.mark.parametrize("scores", SCORES, ids=lambda scores: "-".join(scores) or "plain")
every_causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


# --------------------------------------------------------------------------------------------------- the CPU's kernels


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@every_score
@every_causality
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", ["none", "rows", "mask", "loop"])
def test_output_and_gradients_equal_the_definition(kernel, window, causal, scores, heads, kv_heads):
    inputs = make(heads, kv_heads)
    if kernel == "none":
        found = attention(*inputs, causal=causal, window=window, **scores)
    elif kernel == "rows":
        found = attention(*inputs, mask=AttentionMask("loop", window=window, causal=causal), **scores)
    else:
        found = attention(*inputs, mask=packed_mask(kernel, window, causal=causal), **scores)
    compare(found, by_hand(*inputs, seen(causal, window, packed=kernel in ("mask", "loop")), **scores), inputs)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@every_score
@pytest.mark.parametrize("length", [1, 5, 12])
def test_new_queries_see_the_keys_before_them_and_their_own_past(length, scores, window, heads, kv_heads):
    inputs = make(heads, kv_heads, length=length)
    wanted = by_hand(*inputs, past(window, offset=12 - length), **scores)
    mask = row_mask(length, 12, torch.device("cpu"), window=window, softcap="softcap" in scores)
    compare(attention(*inputs, mask=mask, **scores), wanted, inputs)
    compare(attention(*inputs, window=window, **scores), wanted, inputs)  # which builds the mask itself


@every_score
@every_causality
@pytest.mark.parametrize("kernel", ["mask", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_error_is_that_of_its_rounding(dtype, kernel, causal, scores):
    """Bounds of a sum of rounded products: 2e-6 in fp32, else one rounding of p and one of the output."""
    bound = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    inputs = make(4, 2, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = attention(*inputs, mask=packed_mask(kernel, 3, dtype, causal), **scores)
    wanted = by_hand(*exact, seen(causal, 3, packed=True), **scores)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() < bound * wanted.norm()
    gradients, wanted_gradients = (
        torch.autograd.grad(out.square().sum(), x) for out, x in ((found, inputs), (wanted, exact))
    )
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert (gradient.double() - wanted_gradient).norm() < 2 * bound * wanted_gradient.norm()


@pytest.mark.parametrize("scores", [{}, {"softcap": 1.5}], ids=["plain", "softcap"])
@every_causality
@pytest.mark.parametrize("kernel", ["mask", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_does_not_depend_on_its_neighbours(kernel, dtype, causal, scores):
    """Bit for bit, outputs and gradients: other tokens in the documents around leave a document as it was."""
    own = slice(4, 12)  # the third document, in the first row

    def run(inputs):
        out = attention(*inputs, mask=packed_mask(kernel, 3, dtype, causal), **scores)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        return [x[0, own].detach() for x in (out, *gradients)]

    inputs = make(4, 2, dtype=dtype)
    others = []
    for x, other in zip(inputs, make(4, 1, dtype=dtype), strict=True):
        changed = other.detach().repeat_interleave(x.shape[2] // other.shape[2], dim=2) * 3
        changed[0, own] = x[0, own].detach()
        others.append(changed.requires_grad_())
    for value, changed in zip(run(inputs), run(others), strict=True):
        assert torch.equal(value, changed)


@every_score
def test_inputs_with_gaps_and_a_gradient_of_one_repeated_number(scores):
    """What one projection for q, k and v gives, also with its columns interleaved, and what .sum() sends back."""
    for dim in (-2, -1):
        wide = torch.stack([x.detach() for x in make(4, 4)], dim).requires_grad_()
        outputs = [attention(*wide.unbind(dim), mask=packed_mask(kernel), **scores) for kernel in ("mask", "loop")]
        gradients = [torch.autograd.grad(out.sum(), wide)[0] for out in outputs]
        torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_long_rows_run_document_by_document_and_short_ones_under_a_mask():
    def kind(length, dtype):
        bounds = torch.tensor([0, 5, length], dtype=torch.int32)
        return document_mask(bounds, 1, length, dtype=dtype).kernel

    assert kind(255, torch.float32) == kind(511, torch.bfloat16) == "mask"
    assert kind(256, torch.float32) == kind(512, torch.bfloat16) == "loop"


@every_score
@every_causality
@pytest.mark.parametrize("window", [None, 65, 300])
def test_long_documents_one_by_one_are_what_they_are_under_a_mask(window, causal, scores, monkeypatch):
    """Rows of 257 tokens, an odd number; documents of 1 to 257 tokens and two empty ones."""
    bounds = torch.tensor([0, 0, 1, 100, 257, 257, 514], dtype=torch.int32)
    inputs, masks = make(4, 2, length=257, keys=257), []
    for least in (256, 1000):
        monkeypatch.setattr(kernels.attention_backends, "LOOP_FROM", least)
        settings = {"dtype": torch.float64, "window": window, "causal": causal, "softcap": "softcap" in scores}
        masks.append(document_mask(bounds, 2, 257, **settings))
    assert [mask.kernel for mask in masks] == ["loop", "mask"]
    compare(*(attention(*inputs, mask=mask, **scores) for mask in masks), inputs)


@pytest.mark.parametrize("kernel", ["mask", "loop"])
def test_a_softcap_under_autocast_is_computed_in_fp32(kernel):
    inputs = make(4, 2, dtype=torch.float32)
    mask = packed_mask(kernel, 3, torch.float32)
    plain = attention(*inputs, mask=mask, softcap=1.5)
    with torch.autocast("cpu", torch.bfloat16):
        compare(attention(*inputs, mask=mask, softcap=1.5), plain, inputs, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_with_a_softcap_keep_no_scores(packed):
    """Two rows of 256 tokens: what is kept for the backward grows with the tokens, and not with their pairs."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 256, 2, 8, generator=generator).requires_grad_() for _ in range(3)]
    bounds, kept = torch.tensor([0, 100, 256, 512] if packed else [0, 256, 512], dtype=torch.int32), []
    mask = document_mask(bounds, 2, 256, dtype=torch.float32, softcap=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention(*inputs, mask=mask, softcap=1.5)
    assert kept and max(kept) == inputs[0].numel()


def test_rows_alone_and_whole_prefixes_need_no_mask():
    rows = torch.tensor([0, 12, 24], dtype=torch.int32)
    for window in (None, 12):
        assert document_mask(rows, 2, 12, dtype=torch.float32, window=window) is None
        assert row_mask(12, 12, rows.device, window=window) is None
        assert row_mask(12, 12, rows.device, window=window, causal=False).visible is None  # all see all
    assert row_mask(1, 12, rows.device).visible is None  # a single new token sees all


@every_score
@every_causality
@pytest.mark.parametrize("window", [None, 2])
def test_as_many_documents_as_rows_are_rows(window, causal, scores):
    rows, inputs = torch.tensor([0, 12, 24], dtype=torch.int32), make(4, 2)
    settings = {"dtype": torch.float64, "window": window, "causal": causal}
    mask = document_mask(rows, 2, 12, **settings, softcap="softcap" in scores)
    compare(attention(*inputs, mask=mask, **scores), by_hand(*inputs, seen(causal, window), **scores), inputs)


def test_a_softcap_is_computed_on_the_back_end_that_the_mask_was_built_for(monkeypatch):
    """Plain causality is no exception: without a mask, `attention` would have to choose a back end itself."""
    monkeypatch.setattr(kernels.attention_backends, "why_not", lambda *_, **__: None)
    for backend, kernel in (("sdpa", "mask"), ("flash-attn", "flash-attn"), ("auto", "flash-attn"), ("flex", "flex")):
        for causal in (True, False):
            settings = {"dtype": torch.bfloat16, "causal": causal, "backend": backend}
            assert row_mask(12, 12, BOUNDS.device, softcap=True, **settings).kernel == kernel
            assert document_mask(BOUNDS, 2, 12, softcap=True, **settings).kernel == kernel


def test_positions_restart_with_each_document():
    wanted = [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert document_positions(BOUNDS, 2, 12).flatten().tolist() == wanted


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_is_transformers_sliding_window(window):
    """Mistral's attention in transformers gives weight to exactly the keys that our mask shows."""
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, sliding_window=window, attn_implementation="eager")  # fmt: skip
    with torch.no_grad():
        weights = MistralModel(config)(torch.arange(10)[None], output_attentions=True).attentions[0]  # (1, 2, 10, 10)
    visible = row_mask(10, 10, torch.device("cpu"), window=window).visible
    assert torch.equal(weights[0, 0] > 0, visible) and visible.sum(1).max() == window


@pytest.mark.parametrize("local_attention", [2, 6])
def test_a_window_to_both_sides_is_transformers_local_attention(local_attention):
    """ModernBERT's first layer sees all, its second local_attention / 2 tokens to each side."""
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, pad_token_id=0,
                              num_attention_heads=2, layer_types=["full_attention", "sliding_attention"],
                              local_attention=local_attention, attn_implementation="eager")  # fmt: skip
    with torch.no_grad():
        everywhere, near = ModernBertModel(config)(torch.arange(10)[None], output_attentions=True).attentions
    assert (everywhere > 0).all()
    visible = row_mask(10, 10, torch.device("cpu"), window=local_attention // 2 + 1, causal=False).visible
    assert torch.equal(near[0, 0] > 0, visible) and visible.sum(1).max() == local_attention + 1


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scale_and_softcap_are_transformers_gemma_2(softcap):
    from types import SimpleNamespace

    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    inputs = make(4, 2, dtype=torch.float32)
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    hidden = torch.full((12, 12), -torch.inf).triu(1)
    transposed = [x.transpose(1, 2) for x in inputs]
    wanted, _ = eager_attention_forward(module, *transposed, hidden, scaling=0.6, softcap=softcap)
    compare(attention(*inputs, scale=0.6, softcap=softcap), wanted, inputs, atol=5e-6)


def test_calls_that_make_no_sense_are_refused():
    q, k, v = make(4, 2)
    with pytest.raises(ValueError, match="built for window=3, not 4"):
        attention(q, k, v, window=4, mask=packed_mask("mask", 3))
    with pytest.raises(ValueError, match="built with causality"):
        attention(q, k, v, causal=False, mask=packed_mask("mask", 3))
    with pytest.raises(ValueError, match="there is no cache"):
        attention(q[:, 4:], k, v, causal=False)
    with pytest.raises(ValueError, match="cannot be 0"):
        document_mask(BOUNDS, 2, 12, dtype=torch.float32, window=0)
    with pytest.raises(ValueError, match="varlen: varlen kernels need CUDA"):
        document_mask(BOUNDS, 2, 12, dtype=torch.bfloat16, backend="varlen")


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("scores", [SCORES[0], SCORES[-1]], ids=["plain", "softcap"])
@every_causality
@pytest.mark.parametrize("window", [None, 3])
def test_the_loop_obeys_torchs_rules_for_operators(window, causal, scores):
    inputs = make(4, 2, dtype=torch.bfloat16)
    settings = (window, causal, scores.get("scale"), scores.get("softcap"))
    torch.library.opcheck(torch.ops.groundup.attention_by_document, (*inputs, BOUNDS, *settings))


@pytest.mark.parametrize("scores", [{}, {"scale": 0.6, "softcap": 1.5}], ids=["plain", "softcap"])
@every_causality
@pytest.mark.parametrize("least", [0, 256], ids=["loop", "mask"])
def test_a_compiled_forward_builds_its_masks_whole(least, causal, scores, monkeypatch):
    """As in the model: masks of two windows within the graph, shared by layers; the same bits as in eager."""
    monkeypatch.setattr(kernels.attention_backends, "LOOP_FROM", least)

    def three_layers(q, k, v, bounds):
        settings = {"dtype": q.dtype, "causal": causal, "softcap": "softcap" in scores}
        near, far = (document_mask(bounds, 2, 12, window=window, **settings) for window in (5, None))
        x = attention(q, k, v, window=5, mask=near, **scores)
        return attention(attention(x, k, v, mask=far, **scores), k, v, mask=near, **scores)

    torch.compiler.reset()
    inputs = make(4, 2, dtype=torch.float32)
    compiled = torch.compile(three_layers, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*inputs, BOUNDS), three_layers(*inputs, BOUNDS)
    compare(found, wanted, inputs, atol=0)
    with torch.compiler.set_stance("fail_on_recompile"):  # other documents, the same graph
        compiled(*inputs, torch.tensor([0, 12, 13, 24, 24, 24, 24], dtype=torch.int32))


@every_causality
def test_a_mask_may_be_built_outside_of_the_compiled_region(causal):
    torch.compiler.reset()
    inputs = make(4, 2, dtype=torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for kernel in ("mask", "loop"):
        mask = packed_mask(kernel, 3, torch.float32, causal)
        for scores in ({}, {"softcap": 1.5}):
            compare(compiled(*inputs, mask=mask, **scores), attention(*inputs, mask=mask, **scores), inputs, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- flex


@every_score
@every_causality
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_sees_what_sdpa_sees(packed, window, causal, scores):
    """Forward on the CPU, in float64, and traced whole."""
    q, k, v = (x.detach() for x in make(4, 2))

    def run(q, k, v, bounds):
        settings = {"dtype": q.dtype, "window": window, "causal": causal, "softcap": "softcap" in scores}
        if packed:
            mask = document_mask(bounds, 2, 12, **settings, backend="flex")
        else:
            mask = row_mask(12, 12, q.device, **settings, backend="flex")
        return attention(q, k, v, mask=mask, **scores)

    wanted = by_hand(q, k, v, seen(causal, window, packed=packed), **scores)
    torch.testing.assert_close(run(q, k, v, BOUNDS), wanted, atol=1e-12, rtol=0)
    if packed and window:
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, BOUNDS)
        torch.testing.assert_close(compiled, wanted, atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------- the varlen kernels, imitated on CPU


@every_score
@every_causality
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("kernel", "version"), [("varlen", "2.11"), ("varlen", "2.12"), ("varlen", "2.13"), ("flash-attn", "2.13")]
)
def test_varlen_kernels_are_called_as_they_document(kernel, version, window, causal, scores, monkeypatch):
    install_imitation(kernel, monkeypatch, version)
    inputs, rows = make(4, 2), AttentionMask(kernel, window=window, causal=causal)
    for packed, mask in ((True, packed_mask(kernel, window, causal=causal)), (False, rows)):
        if kernel == "varlen" and "softcap" in scores:
            with pytest.raises(ValueError, match="knows no softcap; build the mask with softcap=True"):
                attention(*inputs, mask=mask, **scores)
        else:
            wanted = by_hand(*inputs, seen(causal, window, packed=packed), **scores)
            compare(attention(*inputs, mask=mask, **scores), wanted, inputs)


@every_causality
@pytest.mark.parametrize("backend", ["auto", "varlen", "flash-attn", "fa3", "fa4"])
def test_masks_carry_what_the_chosen_kernel_needs(backend, causal, monkeypatch):
    """On a GPU, which is pretended here."""
    monkeypatch.setattr(kernels.attention_backends, "why_not", lambda *_, **__: None)
    kernel = {"auto": "flash-attn", "fa3": "varlen", "fa4": "varlen"}.get(backend, backend)
    settings = {"dtype": torch.bfloat16, "causal": causal, "backend": backend}
    mask = document_mask(BOUNDS, 2, 12, max_seqlen=9, window=3, **settings)
    assert (mask.kernel, mask.max_seqlen, mask.window, mask.visible) == (kernel, 9, 3, None)
    assert mask.cu_seqlens is BOUNDS and mask.causal == causal
    assert document_mask(BOUNDS, 2, 12, **settings).max_seqlen == 12
    assert row_mask(12, 12, BOUNDS.device, **settings) == (None if causal else AttentionMask(causal=False))
    rows = row_mask(12, 12, BOUNDS.device, window=3, **settings)
    assert (rows.kernel, rows.cu_seqlens, rows.window, rows.causal) == (kernel, None, 3, causal)
    if causal:
        assert row_mask(5, 12, BOUNDS.device, **settings).kernel == "mask"  # after a cache


# ---------------------------------------------------------------------------------------------------- deliberate faults


def faults(module, masks, monkeypatch, only=None):
    """The ways to compute attention, or that one, in which these modules are not the definition: outputs or gradients."""
    for kernel in ("varlen", "flash-attn"):
        install_imitation(kernel, monkeypatch, module=module)
    cpu, wrong = torch.device("cpu"), set()

    def check(name, mask, visible, length=12, **scores):
        if only not in (None, name):
            return
        inputs = make(4, 2, length=length)
        try:
            if name.startswith("flex"):
                inputs = [x.detach() for x in inputs]
                found, wanted = module.attention(*inputs, mask=mask, **scores), by_hand(*inputs, visible, **scores)
                torch.testing.assert_close(found, wanted)
            else:
                compare(module.attention(*inputs, mask=mask, **scores), by_hand(*inputs, visible, **scores), inputs)
        except (AssertionError, RuntimeError):
            wrong.add(name)

    for causal, side in ((True, ""), (False, " both sides")):
        visible = seen(causal, 3, packed=True)
        for kernel in ("loop", "varlen", "flash-attn"):
            mask = masks.AttentionMask(kernel, cu_seqlens=BOUNDS, max_seqlen=8, window=3, causal=causal)
            check(kernel + side, mask, visible, scale=0.6)
            if kernel != "varlen":
                check(kernel + " softcap", mask, visible, scale=0.6, softcap=1.5)
        settings = {"dtype": torch.float64, "window": 3, "causal": causal}
        check("mask" + side, masks.document_mask(BOUNDS, 2, 12, **settings), visible, scale=0.6)
        check("mask softcap", masks.document_mask(BOUNDS, 2, 12, **settings), visible, scale=0.6, softcap=1.5)
        flex = masks.document_mask(BOUNDS, 2, 12, **settings, backend="flex")
        check("flex" + side, flex, visible)
        check("flex softcap", flex, visible, scale=0.6, softcap=1.5)
    check("rows", masks.AttentionMask("varlen", window=3), past(3))
    check("cache", masks.row_mask(5, 12, cpu, window=3), past(3, offset=7), length=5)
    check("token", masks.row_mask(1, 12, cpu, window=3), past(3, offset=11), length=1)
    return wrong


# what is wrong, the text to replace, with what, and where it must be noticed
MASK_MUTANTS = [
    ("a token does not see itself", "(distance >= 0)", "(distance > 0)", "mask"),
    ("the future is seen", "| (not causal)", "| causal", "mask"),
    ("both sides are one", "| (not causal)", "", "mask both sides"),
    ("a window one too wide", "distance.abs() < window", "distance.abs() <= window", "mask both sides"),
    ("a window to the past only", "distance.abs() < window", "distance < window", "mask both sides"),
    ("queries at the start of the keys", "key_length - query_length, key_length, dev", "query_length, dev", "cache"),
    ("a band as wide as the window", "window + query_length - 1)", "window)", "cache"),
    ("documents see each other", "same_document & band", "band", "mask"),
    ("flex: documents see each other", "document[row, query] ==", "document[row, key] ==", "flex"),
    ("flex: both sides are one", "visible = _sees(query, key, window, causal)", "visible = _sees(query, key, window, True)",
     "flex both sides"),
]  # fmt: skip
MUTANTS = [
    ("keys one before the window", "reach = mask.window + q.shape[1] - 1", "reach = mask.window + q.shape[1]", "token"),
    ("the loop ignores the window", "causal and (window is None or window >= q.shape[2])", "causal", "loop"),
    ("the loop sees the future", "length, length, window, causal, q", "length, length, window, False, q", "loop"),
    ("the loop sees no future", "length, length, window, causal, q", "length, length, window, True, q", "loop both sides"),
    ("the loop has a scale of its own", "attn_mask=term, scale=scale", "attn_mask=term", "loop"),
    ("SDPA has a scale of its own", "is_causal=is_causal,\n        scale=scale,", "is_causal=is_causal,", "mask"),
    ("key heads in the wrong order", "repeat_interleave(heads // x.shape[2], dim=2)", "repeat(1, 1, heads // 2, 1)", "loop"),
    ("heads' gradients averaged", ".sum(2)", ".mean(2)", "loop"),
    ("a softcap without its slope", "d_capped * (1 - capped.square())", "d_capped", "loop softcap"),
    ("a softcap's slope of the scores", "(1 - capped.square())", "(1 - (softcap * capped).square())", "loop softcap"),
    ("gradients without the softmax's sum", " - (upstream * out).sum(-1, keepdim=True)", "", "loop softcap"),
    ("a softcap without its factor", "scores = softcap * _capped(one_q", "scores = _capped(one_q", "mask softcap"),
    ("a softcap before the scale", "(_scale(q, scale) / softcap)).tanh()", "(1 / softcap)).tanh() * _scale(q, scale)",
     "mask softcap"),
    ("varlen's window counts the token twice", "mask.window - 1  # keys", "mask.window  # keys", "varlen"),
    ("varlen sees no future", "0 if mask.causal else before", "0", "varlen both sides"),
    ("varlen has a scale of its own", "window_size=reach, scale=scale", "window_size=reach", "varlen"),
    ("the window is not passed on", "window_size=reach, softmax_scale", "softmax_scale", "flash-attn"),
    ("flash-attn has a scale of its own", "softmax_scale=scale, ", "", "flash-attn"),
    ("flash-attn without a softcap", "softcap=softcap or 0.0", "softcap=0.0", "flash-attn softcap"),
    ("flash-attn sees no future", "causal=mask.causal, window_size", "causal=True, window_size", "flash-attn both sides"),
    ("rows run together", "batch * length + 1, length, dtype", "batch * length + 1, batch * length, dtype", "rows"),
    ("flex without a softcap", "score_mod=capped", "score_mod=None", "flex softcap"),
    ("flex has a scale of its own", "block_mask=blocks, scale=scale", "block_mask=blocks", "flex softcap"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS])
def test_a_wrong_kernel_is_noticed(old, new, where, tmp_path, monkeypatch):
    mutant = load_mutant(Path(kernels.attention.__file__), {old: new}, tmp_path)
    assert faults(mutant, kernels.attention_masks, monkeypatch, where) == {where}


@pytest.mark.parametrize(
    ("old", "new", "where"), [fault[1:] for fault in MASK_MUTANTS], ids=[fault[0] for fault in MASK_MUTANTS]
)
def test_a_wrong_mask_is_noticed(old, new, where, tmp_path, monkeypatch):
    mutant = load_mutant(Path(kernels.attention_masks.__file__), {old: new}, tmp_path)
    assert faults(kernels.attention, mutant, monkeypatch, where) == {where}


def test_the_right_ones_have_none_of_these_faults(monkeypatch):
    assert faults(kernels.attention, kernels.attention_masks, monkeypatch) == set()


# -------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@every_score
@every_causality
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash-attn", "flex", "fa3", "fa4"])
def test_every_back_end_on_the_gpu_equals_the_definition(backend, heads, kv_heads, window, causal, scores):
    """In bf16, to bf16's rounding of the exact result; documents, rows alone and queries after a cache."""
    softcap, cuda = "softcap" in scores, torch.device("cuda")
    if reason := why_not(backend, cuda, torch.bfloat16, 64, softcap=softcap):
        pytest.skip(reason)
    activate(backend)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, heads, 64), (2, 12, kv_heads, 64), (2, 12, kv_heads, 64)]
    half = [torch.randn(shape, generator=generator).bfloat16().cuda().requires_grad_() for shape in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in half]
    settings = {"dtype": torch.bfloat16, "window": window, "backend": backend, "softcap": softcap}
    cases = [
        (document_mask(BOUNDS.cuda(), 2, 12, causal=causal, **settings), seen(causal, window, packed=True), 0),
        (row_mask(12, 12, cuda, causal=causal, **settings), seen(causal, window), 0),
    ]
    if causal:
        cases.append((row_mask(5, 12, cuda, **settings), past(window, offset=7), 7))
    try:
        for mask, visible, first in cases:
            found = attention(half[0][:, first:], *half[1:], mask=mask, **scores)
            wanted = by_hand(exact[0][:, first:], *exact[1:], visible, **scores)
            assert (found.double().cpu() - wanted).norm() < 2**-7 * wanted.norm()
            gradients = torch.autograd.grad(found.square().sum(), half)
            wanted_gradients = torch.autograd.grad(wanted.square().sum(), exact)
            for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
                assert (gradient.double().cpu() - wanted_gradient).norm() < 2**-6 * wanted_gradient.norm() + 1e-3
    finally:
        if backend in ("fa3", "fa4"):
            torch.nn.attention.restore_flash_attention_impl()
            torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash-attn"])
def test_on_the_gpu_a_model_compiles_whole_and_documents_stay_apart(backend):
    if reason := why_not(backend, "cuda", torch.bfloat16, 64):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 12, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    bounds = BOUNDS.cuda()

    def run(q, k, v):
        return attention(q, k, v, mask=document_mask(bounds, 2, 12, dtype=q.dtype, backend=backend))

    out = run(q, k, v)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, k, v), out, atol=2e-2, rtol=0)
    others = [x.clone() for x in (q, k, v)]
    for x in others:
        x[0, :4] = 3
    assert torch.equal(run(*others)[0, 4:], out[0, 4:])
