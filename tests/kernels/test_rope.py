"""Are queries and keys turned by the right angle? Against float64, complex numbers, transformers, deliberate faults."""

from functools import partial
from pathlib import Path

import pytest
import torch

import kernels.rope
from kernels.rope import rope, rope_reference
from kernels.rotary import checked_scaling, rotary_tables
from tests.kernels.accuracy import DTYPES, check, errors, failures, strided
from tests.kernels.mutants import load_mutant


def make(dtype, batch, length, q_heads, k_heads, width, device, angles="shared"):
    """q and k as views of one stacked projection; angles of one row for the whole batch, of each row, or a table."""
    generator = torch.Generator().manual_seed(batch * length * width + q_heads)
    heads = q_heads + 2 * k_heads
    qkv = torch.randn(batch, length, heads * width, generator=generator).to(device, dtype).unflatten(-1, (heads, width))
    q, k, _ = qkv.split([q_heads, k_heads, k_heads], dim=2)
    shape = {"shared": (1, length), "rows": (batch, length), "table": (3 * length,)}[angles]
    turns = 7 * torch.randn(*shape, width // 2, generator=generator).to(device)
    inputs = {"q": q, "k": k, "cos": 1.2 * turns.cos(), "sin": 1.2 * turns.sin()}  # a factor, as YaRN's
    if angles == "table":
        inputs["positions"] = torch.randint(3 * length, (batch, length), generator=generator).to(device)
    return inputs


def pair(module=kernels.rope, interleaved=False):
    return partial(module.rope, interleaved=interleaved, implementation="triton"), partial(
        rope, interleaved=interleaved
    )


# (batch, length, query heads, key heads, D): odd everything; one token; several programs; D not a power of two
SHAPES = [(2, 5, 3, 1, 6), (1, 1, 4, 2, 128), (2, 7, 8, 2, 64), (3, 3, 5, 5, 40)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("angles", ["shared", "rows", "table"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_turn_and_its_gradients_equal_float64(device, shape, angles, interleaved):
    check(*pair(interleaved=interleaved), make(torch.float32, *shape, device, angles), ["q", "k"], torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_turned_in_fp32(device, dtype, interleaved):
    check(*pair(interleaved=interleaved), make(dtype, 2, 7, 8, 2, 64, device), ["q", "k"], dtype)


def rounded_twice(function, dtype, device):
    """Which results are not the float64 ones rounded once (but where fp32 falls on the other side of a tie)."""
    inputs = make(dtype, 2, 7, 8, 3, 48, device)
    exact = rope(**{name: x.double() for name, x in inputs.items()})
    results = zip("qk", function(**inputs), exact, strict=True)
    return [name for name, found, wanted in results if (found == wanted.to(dtype)).float().mean() < 0.995]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_are_rounded_once(device, dtype):
    kernel, reference = pair()
    assert not rounded_twice(kernel, dtype, device) and not rounded_twice(reference, dtype, device)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_is_a_product_of_complex_numbers(device, interleaved):
    inputs = make(torch.float64, 2, 6, 3, 2, 10, device, "rows")
    angle = torch.complex(inputs["cos"].double(), inputs["sin"].double())[:, :, None]
    for x, turned in zip((inputs["q"], inputs["k"]), rope(**inputs, interleaved=interleaved), strict=True):
        parts = (lambda t: (t[..., ::2], t[..., 1::2])) if interleaved else (lambda t: t.chunk(2, dim=-1))
        torch.testing.assert_close(torch.complex(*parts(turned)), torch.complex(*parts(x)) * angle, rtol=0, atol=1e-14)


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"] if scaling else "plain")
def test_tables_and_reference_are_transformers_to_the_last_bit(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaling = scaling and checked_scaling(scaling, max_position_embeddings=128)
    positions = torch.tensor([[0, 1, 2, 3, 500, 100_000], [7, 8, 0, 1, 2, 127]])
    lengths = torch.full_like(positions, 100_001)  # transformers takes the longest of the batch for every text
    cos, sin = rotary_tables(positions, width=32, theta=10000.0, scaling=scaling, lengths=lengths)
    assert cos.shape == sin.shape == (2, 6, 16)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=128, rope_theta=10000.0,
        rope_parameters={"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})},
    )  # fmt: skip
    inputs = make(torch.float32, 2, 6, 4, 2, 32, "cpu")
    their_cos, their_sin = LlamaRotaryEmbedding(config)(inputs["q"], positions)
    assert torch.equal(torch.cat((cos, cos), -1), their_cos) and torch.equal(torch.cat((sin, sin), -1), their_sin)
    theirs = apply_rotary_pos_emb(inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), their_cos, their_sin)
    for found, wanted in zip(rope(inputs["q"], inputs["k"], cos, sin), theirs, strict=True):
        assert torch.equal(found, wanted.transpose(1, 2))


def test_interleaved_is_metas_layout():
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    inputs = make(torch.float32, 2, 6, 4, 2, 32, "cpu", "rows")
    theirs = apply_rotary_emb(inputs["q"], inputs["k"], torch.complex(inputs["cos"], inputs["sin"]))
    torch.testing.assert_close(rope(**inputs, interleaved=True), theirs)


def test_any_strides_are_read_where_they_lie(device):
    inputs = make(torch.float32, 2, 5, 4, 2, 16, device)
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # heads before tokens
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # tokens before rows of the batch
        lambda x: x[:, :1].expand_as(x),  # a stride of 0
        strided,  # channels with gaps between them, which are copied
    ):
        turned = {**inputs, "q": layout(inputs["q"]), "k": layout(inputs["k"])}
        check(*pair(), turned, ["q", "k"], torch.float32)
    found = pair()[0](**inputs)
    assert all(x.is_contiguous() for x in found)
    wide = {name: x.repeat_interleave(2, -1)[..., ::2] if name in ("cos", "sin") else x for name, x in inputs.items()}
    for x, y in zip(found, pair()[0](**wide), strict=True):
        assert torch.equal(x, y)


def test_int32_positions_shared_by_the_batch(device):
    inputs = make(torch.float32, 3, 5, 4, 2, 16, device, "table")
    inputs["positions"] = inputs["positions"][:1].int()
    check(*pair(), inputs, ["q", "k"], torch.float32)


def test_a_position_outside_of_the_table_shows(device):
    inputs = make(torch.float32, 1, 4, 2, 1, 16, device, "table")
    inputs["positions"][0, 1:3] = torch.tensor([12, -1])
    for x in pair()[0](**inputs):
        assert x[0, 1:3].isnan().all() and x[0, [0, 3]].isfinite().all()


def test_the_backward_keeps_neither_queries_nor_keys(device):
    inputs = make(torch.float32, 2, 4, 3, 2, 16, device, "table")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        pair()[0](**{**inputs, "q": inputs["q"].requires_grad_(), "k": inputs["k"].requires_grad_()})
    assert kept == [inputs[name].data_ptr() for name in ("cos", "sin", "positions")]


def test_gradients_from_a_sum_or_of_one_output(device):
    inputs = make(torch.float32, 2, 4, 3, 2, 16, device)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k")]
    kernel, reference = pair()
    for total in (lambda q, k: q.sum() + 2 * k.sum(), lambda q, k: k.square().sum()):
        found, wanted = (
            torch.autograd.grad(total(*function(**inputs)), leaves, materialize_grads=True)
            for function in (kernel, reference)
        )
        torch.testing.assert_close(found, wanted)


def test_no_tokens_give_no_tokens(device):
    for batch, length in ((0, 4), (2, 0)):
        q, k = torch.zeros(batch, length, 3, 8, device=device), torch.zeros(batch, length, 1, 8, device=device)
        angles = torch.zeros(1, length, 4, device=device)
        found = pair()[0](q.requires_grad_(), k, angles, angles)
        found[0].sum().backward()
        assert [x.shape for x in found] == [q.shape, k.shape] and q.grad.shape == q.shape


def test_what_does_not_fit_is_refused(device):
    inputs = make(torch.float32, 2, 6, 4, 2, 16, device)
    table = make(torch.float32, 2, 6, 4, 2, 16, device, "table")
    for good, name, wrong in (
        (inputs, "k", inputs["k"][:, :5]),
        (inputs, "k", inputs["k"][..., :8]),
        (inputs, "q", inputs["q"][..., :15]),
        (inputs, "cos", inputs["cos"][:, :5]),
        (inputs, "cos", inputs["cos"][..., :4]),
        (inputs, "cos", inputs["cos"][:, :, None]),
        (table, "positions", table["positions"][:, :5]),
        (table, "sin", table["sin"][:4]),
        (table, "cos", table["cos"][None]),
    ):
        for function in pair():
            with pytest.raises(ValueError, match="rope"):
                function(**{**good, name: wrong})
    for name in ("q", "cos"):
        with pytest.raises(ValueError, match="float64"):
            pair()[0](**{**inputs, name: inputs[name].double()})


@pytest.mark.parametrize("angles", ["shared", "table"])
def test_the_operator_obeys_torchs_rules_and_compiles_whole(device, angles):
    inputs = make(torch.bfloat16, 2, 3, 4, 2, 16, device, angles)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k")]
    arguments = (*leaves, inputs["cos"], inputs["sin"], inputs.get("positions"), angles == "table", False)
    torch.library.opcheck(torch.ops.groundup.rope, arguments)

    kernel, _ = pair()
    compiled = torch.compile(kernel, fullgraph=True)
    found, wanted = (
        (*outputs, *torch.autograd.grad(sum(x.float().sum() for x in outputs), leaves))
        for outputs in (compiled(**inputs), kernel(**inputs))
    )
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


# what is wrong, the text to replace, with what, the angles and the dtype in which it shows
COS, TURN = "first * cos - second * sin", "second * cos + first * sin"
FP32, BF16 = torch.float32, torch.bfloat16
MUTANTS = [
    ("turned the other way", "if BACK:", "if not BACK:", "shared", FP32),
    ("the backward turns forward", "if BACK:", "if False:", "shared", FP32),
    ("the sign of one product", COS, COS.replace("-", "+"), "shared", FP32),
    ("the second channel takes its own sine", TURN, "second * cos + second * sin", "shared", FP32),
    ("cos rounded", "sin = tl.load", "cos = cos.to(tl.bfloat16).to(tl.float32)\n    sin = tl.load", "shared", BF16),
    ("a product rounded", "second * sin", "(second * sin).to(tl.bfloat16)", "shared", BF16),
    ("one row's angles for all", "batch * angle_batch + place", "place", "rows", FP32),
    ("the table is not looked up", "if LOOK_UP:", "if False:", "table", FP32),
    ("the next position", "other=0).to(tl.int64)", "other=0).to(tl.int64) + 1", "table", FP32),
    ("one head for all", "head.to(tl.int64) * x_head", "0 * x_head", "shared", FP32),
    ("the first row of the batch for all", "batch.to(tl.int64) * x_batch", "0 * x_batch", "shared", FP32),
    ("queries read as keys", "q_batch, q_token, q_head, Q", "k_batch, k_token, k_head, Q", "shared", FP32),
    ("pairs of neighbours", "X + x_at + HALF + pair", "X + x_at + 1 + pair", "shared", FP32),
    ("the last token is forgotten", "inside = token < tokens", "inside = token < tokens - 1", "shared", FP32),
    ("the last pair is forgotten", "(pair < HALF)", "(pair < HALF - 1)", "shared", FP32),
    ("no program for the last keys", "-(-tokens * k_heads // rows)", "(tokens * k_heads // rows)", "shared", FP32),
    ("keys turned from their second tile on", "(program - q_programs)", "(program - q_programs + 1)", "shared", FP32),
]


@pytest.mark.parametrize(
    ("old", "new", "angles", "dtype"), [fault[1:] for fault in MUTANTS], ids=[f[0] for f in MUTANTS]
)
def test_a_wrong_kernel_is_noticed(old, new, angles, dtype, tmp_path, device):
    mutant = load_mutant(Path(kernels.rope.__file__), {old: new}, tmp_path)
    inputs = make(dtype, 2, 7, 8, 3, 48, device, angles)
    found = []
    for interleaved in (False, True):
        kernel, _ = pair(mutant, interleaved)
        found += failures(errors(kernel, partial(rope_reference, interleaved=interleaved), inputs, ["q", "k"]), dtype)
    assert found or rounded_twice(pair(mutant)[0], torch.bfloat16, device)
