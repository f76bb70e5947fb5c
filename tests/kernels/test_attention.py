"""Does attention compute softmax(q kᵀ / √D) v over exactly the keys a query may see, whatever the kernel?"""

import sys
from pathlib import Path

import pytest
import torch

import kernels.attention
from errors import UserError
from kernels.attention import (
    ATTENTION_BACKENDS,
    AttentionMask,
    activate,
    attention,
    attention_backends,
    causal_mask,
    choose_attention,
    chosen_backend,
    describe_attention,
    document_mask,
    document_positions,
    sdpa_kernel_taken,
    why_not,
)
from tests.kernels.imitated_varlen import install_imitation
from tests.kernels.mutants import load_mutant

BOUNDS = torch.tensor([0, 3, 4, 12, 19, 24, 24], dtype=torch.int32)  # two rows of 12, and an empty document as padding
WINDOWS = [None, 1, 3, 12]
HEADS = [(4, 4), (4, 2), (4, 1)]


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


def past(window, offset=0, packed=False):
    """The definition: the past, `window` keys at most, of the own document; queries start `offset` keys late."""

    def visible(row, query, key):
        near = window is None or query + offset - key < window
        return key <= query + offset and near and (not packed or document_of(row, key) == document_of(row, query))

    return visible


def compare(found, wanted, inputs, atol=1e-12):
    """Outputs, and gradients under a random upstream gradient that has gaps in memory."""
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)
    upstream = torch.randn(*found.shape, 2, generator=torch.Generator().manual_seed(0), dtype=found.dtype)[..., 0]
    gradients = [torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (found, wanted)]
    for gradient, wanted_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, atol=atol, rtol=0)


def packed_mask(kernel, window=None, dtype=torch.float64):
    """The documents of BOUNDS as a mask of that kind: rows of 12 tokens are too short for `document_mask` to loop."""
    if kernel == "mask":
        return document_mask(BOUNDS, 2, 12, dtype=dtype, window=window)
    return AttentionMask(kernel, cu_seqlens=BOUNDS, max_seqlen=8, window=window)


# --------------------------------------------------------------------------------------------------- the CPU's kernels


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", ["none", "mask", "loop"])
def test_output_and_gradients_equal_the_definition(kernel, window, heads, kv_heads):
    inputs = make(heads, kv_heads)
    if kernel == "none":
        found = attention(*inputs, window=window)
    else:
        found = attention(*inputs, mask=packed_mask(kernel, window))
    compare(found, by_hand(*inputs, past(window, packed=kernel != "none")), inputs)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 5, 12])
def test_new_queries_see_the_keys_before_them_and_their_own_past(length, window, heads, kv_heads):
    inputs = make(heads, kv_heads, length=length)
    wanted = by_hand(*inputs, past(window, offset=12 - length))
    mask = causal_mask(length, 12, torch.device("cpu"), window=window)
    compare(attention(*inputs, mask=mask), wanted, inputs)
    compare(attention(*inputs, window=window), wanted, inputs)  # which builds the mask itself


def test_without_causality_everything_is_seen():
    q, k, v = make(4, 2)
    torch.testing.assert_close(attention(q, k, v, causal=False), by_hand(q, k, v, lambda *_: True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["mask", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_error_is_that_of_its_rounding(dtype, kernel):
    """Bounds of a sum of rounded products: 2e-6 in fp32, else one rounding of p and one of the output."""
    bound = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    inputs = make(4, 2, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = attention(*inputs, mask=packed_mask(kernel, 3, dtype))
    wanted = by_hand(*exact, past(3, packed=True))
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() < bound * wanted.norm()
    gradients, wanted_gradients = (
        torch.autograd.grad(out.square().sum(), x) for out, x in ((found, inputs), (wanted, exact))
    )
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert (gradient.double() - wanted_gradient).norm() < 2 * bound * wanted_gradient.norm()


@pytest.mark.parametrize("kernel", ["mask", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_does_not_depend_on_its_neighbours(kernel, dtype):
    """Bit for bit, outputs and gradients: other tokens in the documents around leave a document as it was."""
    own = slice(4, 12)  # the third document, in the first row

    def run(inputs):
        out = attention(*inputs, mask=packed_mask(kernel, 3, dtype))
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


def test_inputs_with_gaps_and_a_gradient_of_one_repeated_number():
    """What one projection for q, k and v gives, also with its columns interleaved, and what .sum() sends back."""
    for dim in (-2, -1):
        wide = torch.stack([x.detach() for x in make(4, 4)], dim).requires_grad_()
        outputs = [attention(*wide.unbind(dim), mask=packed_mask(kernel)) for kernel in ("mask", "loop")]
        gradients = [torch.autograd.grad(out.sum(), wide)[0] for out in outputs]
        torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_long_rows_run_document_by_document_and_short_ones_under_a_mask():
    def kind(length, dtype):
        bounds = torch.tensor([0, 5, length], dtype=torch.int32)
        return document_mask(bounds, 1, length, dtype=dtype).kernel

    assert kind(255, torch.float32) == kind(511, torch.bfloat16) == "mask"
    assert kind(256, torch.float32) == kind(512, torch.bfloat16) == "loop"


def test_rows_alone_and_whole_prefixes_need_no_mask():
    rows = torch.tensor([0, 12, 24], dtype=torch.int32)
    for window in (None, 12):
        assert document_mask(rows, 2, 12, dtype=torch.float32, window=window) is None
        assert causal_mask(12, 12, rows.device, window=window) is None
    inputs = make(4, 2)
    windowed = attention(*inputs, mask=document_mask(rows, 2, 12, dtype=torch.float64, window=2))
    compare(windowed, by_hand(*inputs, past(2)), inputs)
    assert causal_mask(1, 12, rows.device).visible is None  # a single new token sees all


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
    visible = causal_mask(10, 10, torch.device("cpu"), window=window).visible
    assert torch.equal(weights[0, 0] > 0, visible) and visible.sum(1).max() == window


def test_calls_that_make_no_sense_are_refused():
    q, k, v = make(4, 2)
    with pytest.raises(ValueError, match="built for window=3, not 4"):
        attention(q, k, v, window=4, mask=packed_mask("mask", 3))
    with pytest.raises(ValueError, match="needs causal"):
        attention(q, k, v, window=4, causal=False)
    with pytest.raises(ValueError, match="cannot be 0"):
        document_mask(BOUNDS, 2, 12, dtype=torch.float32, window=0)
    with pytest.raises(ValueError, match="varlen: varlen kernels need CUDA"):
        document_mask(BOUNDS, 2, 12, dtype=torch.bfloat16, backend="varlen")


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("window", [None, 3])
def test_the_loop_obeys_torchs_rules_for_operators(window):
    inputs = make(4, 2, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.groundup.attention_by_document, (*inputs, BOUNDS, window))


@pytest.mark.parametrize("least", [0, 256], ids=["loop", "mask"])
def test_a_compiled_forward_builds_its_mask_whole(least, monkeypatch):
    """As in the model: document_mask within the graph, its result shared by two layers; the same bits as in eager."""
    monkeypatch.setattr(kernels.attention, "LOOP_FROM", least)

    def two_layers(q, k, v, bounds):
        mask = document_mask(bounds, 2, 12, dtype=q.dtype, window=5)
        return attention(attention(q, k, v, mask=mask), k, v, window=5, mask=mask)

    torch.compiler.reset()
    inputs = make(4, 2, dtype=torch.float32)
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*inputs, BOUNDS), two_layers(*inputs, BOUNDS)
    compare(found, wanted, inputs, atol=0)
    with torch.compiler.set_stance("fail_on_recompile"):  # other documents, the same graph
        compiled(*inputs, torch.tensor([0, 12, 13, 24, 24, 24, 24], dtype=torch.int32))


def test_a_mask_may_be_built_outside_of_the_compiled_region():
    torch.compiler.reset()
    inputs = make(4, 2, dtype=torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for kernel in ("mask", "loop"):
        mask = packed_mask(kernel, 3, torch.float32)
        compare(compiled(*inputs, mask=mask), attention(*inputs, mask=mask), inputs, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- flex


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_sees_what_sdpa_sees(packed, window):
    """Forward on the CPU, in float64, and traced whole."""
    q, k, v = (x.detach() for x in make(4, 2))

    def run(q, k, v, bounds):
        if packed:
            mask = document_mask(bounds, 2, 12, dtype=q.dtype, window=window, backend="flex")
        else:
            mask = causal_mask(12, 12, q.device, dtype=q.dtype, window=window, backend="flex")
        return attention(q, k, v, mask=mask)

    wanted = by_hand(q, k, v, past(window, packed=packed))
    torch.testing.assert_close(run(q, k, v, BOUNDS), wanted, atol=1e-12, rtol=0)
    if packed:
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, BOUNDS)
        torch.testing.assert_close(compiled, wanted, atol=1e-12, rtol=0)


def test_flex_trains_on_cuda_only_and_says_so_when_it_is_chosen():
    with pytest.raises(UserError, match="flex here: FlexAttention trains on CUDA only; choose auto or sdpa"):
        choose_attention("flex", "cpu", torch.float32, head_dim=64)
    assert choose_attention("flex", "cpu", torch.float32, head_dim=64, training=False) == "flex"


# --------------------------------------------------------------------------------- the varlen kernels, imitated on CPU


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("kernel", "version"), [("varlen", "2.11"), ("varlen", "2.12"), ("varlen", "2.13"), ("flash-attn", "2.13")]
)
def test_varlen_kernels_are_called_as_they_document(kernel, version, window, monkeypatch):
    install_imitation(kernel, monkeypatch, version)
    inputs = make(4, 2)
    compare(attention(*inputs, mask=packed_mask(kernel, window)), by_hand(*inputs, past(window, packed=True)), inputs)
    rows = attention(*inputs, mask=AttentionMask(kernel, window=window))  # rows without documents
    compare(rows, by_hand(*inputs, past(window)), inputs)


@pytest.mark.parametrize("backend", ["auto", "varlen", "flash-attn", "fa3", "fa4"])
def test_masks_carry_what_the_chosen_kernel_needs(backend, monkeypatch):
    """On a GPU, which is pretended here."""
    monkeypatch.setattr(kernels.attention, "why_not", lambda *_, **__: None)
    kernel = {"auto": "flash-attn", "fa3": "varlen", "fa4": "varlen"}.get(backend, backend)
    mask = document_mask(BOUNDS, 2, 12, dtype=torch.bfloat16, max_seqlen=9, window=3, backend=backend)
    assert (mask.kernel, mask.max_seqlen, mask.window, mask.visible) == (kernel, 9, 3, None)
    assert mask.cu_seqlens is BOUNDS
    assert document_mask(BOUNDS, 2, 12, dtype=torch.bfloat16, backend=backend).max_seqlen == 12
    assert causal_mask(12, 12, BOUNDS.device, dtype=torch.bfloat16, backend=backend) is None
    rows = causal_mask(12, 12, BOUNDS.device, dtype=torch.bfloat16, window=3, backend=backend)
    assert (rows.kernel, rows.cu_seqlens, rows.window) == (kernel, None, 3)
    assert causal_mask(5, 12, BOUNDS.device, dtype=torch.bfloat16, backend=backend).kernel == "mask"  # after a cache


# ----------------------------------------------------------------------------------------- what is here, what is chosen


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
        monkeypatch.setattr(kernels.attention, "_TORCH_2_12", new_torch)
        assert (why_not("fa4", "cuda", torch.bfloat16) is None) == new_torch


def pretend_gpu(monkeypatch, capability, installed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(kernels.attention, "_installed", lambda name: name in installed)
    monkeypatch.setattr(kernels.attention, "_TORCH_2_12", True)


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


# ---------------------------------------------------------------------------------------------------- deliberate faults


def faults(module, monkeypatch):
    """The ways to compute attention in which this module is not the definition: outputs or gradients."""
    for kernel in ("varlen", "flash-attn"):
        install_imitation(kernel, monkeypatch, module=module)
    cpu, wrong = torch.device("cpu"), []

    def check(name, mask, visible, length=12):
        inputs = make(4, 2, length=length)
        try:
            if name == "flex":
                inputs = [x.detach() for x in inputs]
                torch.testing.assert_close(module.attention(*inputs, mask=mask), by_hand(*inputs, visible))
            else:
                compare(module.attention(*inputs, mask=mask), by_hand(*inputs, visible), inputs)
        except (AssertionError, RuntimeError):
            wrong.append(name)

    for kernel in ("loop", "varlen", "flash-attn"):
        mask = module.AttentionMask(kernel, cu_seqlens=BOUNDS, max_seqlen=8, window=3)
        check(kernel, mask, past(3, packed=True))
    check("rows", module.AttentionMask("varlen", window=3), past(3))
    check("mask", module.document_mask(BOUNDS, 2, 12, dtype=torch.float64, window=3), past(3, packed=True))
    check("cache", module.causal_mask(5, 12, cpu, window=3), past(3, offset=7), length=5)
    check("token", module.causal_mask(1, 12, cpu, window=3), past(3, offset=11), length=1)
    flex = module.document_mask(BOUNDS, 2, 12, dtype=torch.float64, window=3, backend="flex")
    check("flex", flex, past(3, packed=True))
    return wrong


# what is wrong, the text to replace, with what, and where it must be noticed
MUTANTS = [
    ("a token does not see itself", "seen = key <= query", "seen = key < query", "mask"),
    ("a window one too wide", "seen & (key > query - window)", "seen & (key >= query - window)", "mask"),
    ("queries at the start of the keys", "key_length - query_length, key_length, dev", "query_length, dev", "cache"),
    ("a band as wide as the window", "reach + query_length - 1)", "reach)", "cache"),
    ("keys one before the window", "reach = mask.window + q.shape[1] - 1", "reach = mask.window + q.shape[1]", "token"),
    ("documents see each other", "same_document & _band", "_band", "mask"),
    ("the loop ignores the window", "window is None or window >= length:", "window != 0:", "loop"),
    ("the loop sees the future", "return True, None", "return False, None", "loop"),
    ("key heads in the wrong order", "repeat_interleave(heads // x.shape[2], dim=2)", "repeat(1, 1, heads // 2, 1)", "loop"),
    ("heads' gradients averaged", ".sum(2)", ".mean(2)", "loop"),
    ("varlen's window counts the token twice", "mask.window - 1, 0)", "mask.window, 0)", "varlen"),
    ("the window is not passed on", "causal=True, window_size=reach", "causal=True", "flash-attn"),
    ("rows run together", "batch * length + 1, length, dtype", "batch * length + 1, batch * length, dtype", "rows"),
    ("flex: a window one too wide", "visible & (key > query - window)", "visible & (key >= query - window)", "flex"),
    ("flex: documents see each other", "document[row, query] ==", "document[row, key] ==", "flex"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where"), [fault[1:] for fault in MUTANTS], ids=[fault[0] for fault in MUTANTS])
def test_a_wrong_kernel_is_noticed(old, new, where, tmp_path, monkeypatch):
    mutant = load_mutant(Path(kernels.attention.__file__), {old: new}, tmp_path)
    assert where in faults(mutant, monkeypatch)


def test_the_right_one_has_none_of_these_faults(monkeypatch):
    assert faults(kernels.attention, monkeypatch) == []


# -------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash-attn", "flex", "fa3", "fa4"])
def test_every_back_end_on_the_gpu_equals_the_definition(backend, heads, kv_heads, window):
    """In bf16, to bf16's rounding of the exact result; documents, rows alone and queries after a cache."""
    if reason := why_not(backend, "cuda", torch.bfloat16, 64):
        pytest.skip(reason)
    activate(backend)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, heads, 64), (2, 12, kv_heads, 64), (2, 12, kv_heads, 64)]
    half = [torch.randn(shape, generator=generator).bfloat16().cuda().requires_grad_() for shape in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in half]
    settings = {"dtype": torch.bfloat16, "window": window, "backend": backend}
    cuda = torch.device("cuda")
    try:
        for mask, visible, first in (
            (document_mask(BOUNDS.cuda(), 2, 12, **settings), past(window, packed=True), 0),
            (causal_mask(12, 12, cuda, **settings), past(window), 0),
            (causal_mask(5, 12, cuda, **settings), past(window, offset=7), 7),
        ):
            found = attention(half[0][:, first:], *half[1:], mask=mask)
            wanted = by_hand(exact[0][:, first:], *exact[1:], visible)
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


@pytest.mark.gpu
def test_the_kernels_of_this_gpu_are_named():
    assert attention_backends("cuda")["sdpa"] == "available"
    described = chosen_backend("cuda", torch.bfloat16)
    assert "SDPA on " in described and ("varlen" in described or "flash-attn" in described)
    assert sdpa_kernel_taken("cuda", torch.float32, masked=True) in ("memory-efficient", "math")
