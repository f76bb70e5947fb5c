"""Is the chunked loss the loss? Against float64 and the full logits, by what it allocates, and with deliberate faults."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels.linear_cross_entropy
from kernels.linear_cross_entropy import LossSums, linear_cross_entropy, token_statistics
from tests.kernels.accuracy import BOUNDS, DTYPES, errors, failures, relative_error, run, strided
from tests.kernels.mutants import load_mutant

N, H, V = 45, 16, 67  # no size divides another
ROW = 4 * V  # bytes of one row of logits
IMPLEMENTATIONS = ["torch", "triton"]


def make(dtype=torch.float64, n=N, h=H, v=V, device="cpu"):
    """Logits of standard deviation 1, every seventh target ignored, and a weight for each token."""
    generator = torch.Generator().manual_seed(n * v)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::7] = -100
    inputs = {
        "hidden": torch.randn(n, h, generator=generator).to(dtype),
        "weight": (torch.randn(v, h, generator=generator) / h**0.5).to(dtype),
        "targets": targets,
        "token_weights": torch.rand(n, generator=generator).to(dtype),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def learned(dtype=torch.float64, **sizes):
    hidden, weight, targets, token_weights = make(dtype, **sizes).values()
    return hidden.requires_grad_(), weight.requires_grad_(), targets, token_weights


def full_logits(hidden, weight, softcap=0.0):
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def full_loss(hidden, weight, targets, token_weights=None, z_loss=0.0, softcap=0.0):
    """(total, cross-entropy) with all logits in memory, by torch's own loss."""
    logits = full_logits(hidden, weight, softcap)
    kept = (targets != -100).to(logits.dtype)
    w = kept if token_weights is None else kept * token_weights.to(logits.dtype)
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return LossSums((w * (losses + z_loss * logits.logsumexp(-1) ** 2)).sum(), (w * losses).sum().detach())


def full_statistics(hidden, weight, targets, temperature=1.0, softcap=0.0):
    """(log-probabilities, entropies) with all logits in memory, by torch's own distribution."""
    distribution = Categorical(logits=full_logits(hidden, weight, softcap) / temperature)
    kept = targets != -100
    return distribution.log_prob(targets.where(kept, 0)).where(kept, 0.0), distribution.entropy().where(kept, 0.0)


def chunked_statistics(*arguments, module=kernels.linear_cross_entropy, **settings):
    return module.token_statistics(*arguments, **settings)[:2]


def only(inputs, *names):
    return {name: inputs[name] for name in names}


def check_chunked(chunked, reference, inputs, dtype):
    """As accuracy.check, but a single number in fp32 may by luck be exact in the reference, and in half precision the
    gradients are rounded once more than there: hidden's when it is saved, before the gradient from above is known, the
    weight's when a chunk's product is made (on CPU)."""
    measured = errors(chunked, reference, inputs, ["hidden", "weight"])
    for name, (error, plain) in measured.items():
        if dtype == torch.float32:
            measured[name] = error, plain if name.startswith("d") else BOUNDS[dtype]
        else:
            measured[name] = error, 1.5**0.5 * plain
    assert not (broken := failures(measured, dtype)), broken
    once, again = (run(chunked, inputs, ["hidden", "weight"], 1) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.fixture
def small_blocks(monkeypatch):
    """The vocabulary in three blocks, the last one partial."""
    monkeypatch.setattr(kernels.linear_cross_entropy, "VOCABULARY_BLOCK", 32)


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (0.01, 0.0), (0.0, 3.0), (0.01, 3.0)])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_loss_and_gradients_equal_float64(rows, z_loss, softcap, weighted):
    hidden, weight, targets, token_weights = learned()
    token_weights = token_weights if weighted else None
    settings = {"token_weights": token_weights, "z_loss": z_loss, "softcap": softcap}
    wanted = full_loss(hidden, weight, targets, **settings)
    found = linear_cross_entropy(hidden, weight, targets, **settings, chunk_bytes=rows * ROW)
    wanted_grads = torch.autograd.grad(3.0 * wanted.total, (hidden, weight))
    grads = torch.autograd.grad(3.0 * found.total, (hidden, weight))  # an upstream gradient that is not 1
    assert relative_error(found.total, wanted.total) < 1e-13
    assert relative_error(found.cross_entropy, wanted.cross_entropy) < 1e-13  # the z-loss is not in the reported figure
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-13
    assert not found.cross_entropy.requires_grad


@pytest.mark.parametrize(("z_loss", "softcap", "weighted"), [(0.0, 0.0, False), (0.01, 0.0, True), (0.01, 3.0, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_is_as_exact_as_its_dtype(device, small_blocks, implementation, dtype, z_loss, softcap, weighted):
    inputs = make(dtype, n=12, h=48, device=device)
    inputs = inputs if weighted else only(inputs, "hidden", "weight", "targets")
    settings = {"z_loss": z_loss, "softcap": softcap}
    chunked = partial(linear_cross_entropy, implementation=implementation, chunk_bytes=5 * ROW, **settings)
    check_chunked(chunked, partial(full_loss, **settings), inputs, dtype)


@pytest.mark.parametrize("vocab", [4096, 5003])
def test_a_vocabulary_of_one_whole_block_and_of_a_whole_and_a_partial_one(device, vocab):
    inputs = make(torch.float32, n=6, v=vocab, device=device)
    check_chunked(partial(linear_cross_entropy, implementation="triton"), full_loss, inputs, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_may_have_gaps_in_memory(device, implementation):
    inputs = make(torch.float32, n=8, device=device)
    inputs = {name: strided(value) for name, value in inputs.items() if name != "targets"} | {
        "targets": torch.stack([inputs["targets"]] * 2, 1)[:, 0]
    }
    assert not any(value.is_contiguous() for value in inputs.values())
    check_chunked(partial(linear_cross_entropy, implementation=implementation), full_loss, inputs, torch.float32)
    statistics = partial(chunked_statistics, implementation=implementation)
    check_chunked(statistics, full_statistics, only(inputs, "hidden", "weight", "targets"), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignored_rows_have_no_gradient_and_weigh_nothing(device, implementation):
    hidden, weight, targets, _ = learned(torch.float32, n=20, device=device)
    loss = partial(linear_cross_entropy, implementation=implementation, z_loss=0.1)
    total = loss(hidden, weight, targets).total
    total.backward()
    ignored = targets == -100
    assert ignored.any() and (hidden.grad[ignored] == 0).all() and (hidden.grad[~ignored].abs().sum(-1) > 0).all()
    assert relative_error(total, loss(hidden[~ignored], weight, targets[~ignored]).total) < 1e-6
    other = torch.where(ignored, V + 5, targets)  # any number may stand for an ignored target
    assert torch.equal(loss(hidden, weight, other, ignore_index=V + 5).total, total)


@pytest.mark.parametrize("count", [N, 0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_without_targets_gives_zero(device, implementation, count):
    hidden, weight, _, _ = learned(torch.float32, device=device)
    hidden = hidden.detach()[:count].requires_grad_()
    targets = torch.full((count,), -100, device=device)
    statistics = token_statistics(hidden, weight, targets, implementation=implementation)
    total = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, implementation=implementation).total
    assert total == 0 and (statistics.logprobs == 0).all() and (statistics.entropy == 0).all()
    assert (statistics.top1 == -1).all()
    (total + statistics.logprobs.sum() + statistics.entropy.sum()).backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits_stay_finite(device, implementation):
    """exp of 1e4 overflows fp32; the largest logit is taken out first."""
    hidden, weight, targets, _ = make(torch.float32, n=16, device=device).values()
    hidden = hidden * 1e4
    total = linear_cross_entropy(hidden, weight, targets, implementation=implementation).total
    assert relative_error(total, full_loss(hidden.double(), weight.double(), targets).total) < 1e-6
    logprobs, entropy, _ = token_statistics(hidden, weight, targets, implementation=implementation)
    wanted, wanted_entropy = full_statistics(hidden.double(), weight.double(), targets)
    assert relative_error(logprobs, wanted) < 1e-6 and (entropy - wanted_entropy).abs().max() < 1e-6


@pytest.mark.parametrize("loss", [linear_cross_entropy, chunked_statistics])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_asks_gets_a_gradient(device, implementation, loss):
    hidden, weight, targets, _ = learned(torch.float32, n=9, device=device)
    both = torch.autograd.grad(loss(hidden, weight, targets, implementation=implementation)[0].sum(), (hidden, weight))
    one = loss(hidden, weight.detach(), targets, implementation=implementation)[0].sum()
    other = loss(hidden.detach(), weight, targets, implementation=implementation)[0].sum()
    assert torch.equal(torch.autograd.grad(one, hidden)[0], both[0])
    assert torch.equal(torch.autograd.grad(other, weight)[0], both[1])


class Opened(TorchDispatchMode):
    """Runs the operators of this file in the open, so that modes outside see each product and allocation in them."""

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        if operator.namespace == "groundup":
            operator = getattr(kernels.linear_cross_entropy, f"_{operator._opname}")._init_fn
        return operator(*arguments, **settings or {})


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has had."""

    numel = 0

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        result = operator(*arguments, **settings or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("loss", [linear_cross_entropy, chunked_statistics])
@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_a_gradient_that_nobody_asks_for_costs_nothing(loss, hidden_learns, weight_learns):
    """By torch's own count of operations: the logits, and one more product of that size for each gradient; the
    statistics make the logits once more for their backward pass.

    Under autocast, because torch does not count the in-place product that fp32 uses.
    """
    hidden, weight, targets, _ = make(torch.float32).values()
    hidden, weight = hidden.requires_grad_(hidden_learns), weight.requires_grad_(weight_learns)
    products = 1 + hidden_learns + weight_learns
    products += loss is chunked_statistics and products > 1
    with FlopCounterMode(display=False) as counter, Opened(), torch.autocast("cpu", torch.bfloat16):
        out = loss(hidden, weight, targets)[0].sum()
        assert out.requires_grad == (hidden_learns or weight_learns)
        if out.requires_grad:
            out.backward()
    assert counter.get_total_flops() == products * 2 * N * H * V
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with FlopCounterMode(display=False) as counter, Opened(), torch.no_grad():
        loss(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * N * H * V


@pytest.mark.parametrize("loss", [linear_cross_entropy, chunked_statistics])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tensor_is_as_large_as_the_logits(device, implementation, loss):
    hidden, weight, targets, _ = learned(torch.float32, n=48, h=8, v=200, device=device)
    with Largest() as largest, Opened():
        out = loss(hidden, weight, targets, implementation=implementation, chunk_bytes=8 * 4 * 200)
        (out[0].sum() + out[1].sum()).backward()
    assert 8 * 200 <= largest.numel <= 8 * 208  # a chunk of eight rows, padded to aligned ones; the logits are 48


def test_nothing_is_saved_without_a_gradient():
    hidden, weight, targets, _ = learned()
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, targets)
        token_statistics(hidden, weight, targets)
    assert not saved


def test_bfloat16_is_as_close_to_float64_as_the_full_computation():
    """Bounds: twice bf16's spacing (2^-8) for the gradients, and no worse than eager by more than a quarter."""
    hidden, weight, targets, _ = learned(torch.float32, n=512, h=64, v=512)
    reference = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = full_loss(*reference, targets).total
    wanted_grads = torch.autograd.grad(wanted, reference)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, chunk_bytes=16 * 4 * 512).total
        eager = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    assert ours.dtype == torch.float32 and relative_error(ours, wanted) < 1e-3
    for grad, eager_grad, wanted_grad in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(eager, (hidden, weight)),
        wanted_grads,
        strict=True,
    ):
        assert grad.dtype == torch.float32
        assert 0 < relative_error(grad, wanted_grad) < min(2 * 2**-8, 1.25 * relative_error(eager_grad, wanted_grad))


@pytest.mark.parametrize("loss", [linear_cross_entropy, chunked_statistics])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_error_does_not_grow_with_the_number_of_chunks(device, implementation, loss):
    """The sum over chunks is in fp32. A bf16 one of 24 chunks has several times the error."""
    inputs = only(make(torch.bfloat16, n=48, device=device), "hidden", "weight", "targets")
    reference = full_loss if loss is linear_cross_entropy else full_statistics
    error = {
        rows: errors(
            partial(loss, implementation=implementation, chunk_bytes=rows * ROW), reference, inputs, ["weight"]
        )["dweight"][0]
        for rows in (2, 48)
    }
    assert error[2] < 1.25 * error[48]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_decides_the_dtype_of_the_products_and_not_of_the_gradients(device, implementation):
    inputs = make(torch.float32, n=12, h=48, device=device)

    def under_autocast(**tensors):
        with torch.autocast(device.type, torch.bfloat16):
            sums = linear_cross_entropy(**tensors, implementation=implementation)
            logprobs, entropy, _ = token_statistics(
                *list(tensors.values())[:3], temperature=0.7, implementation=implementation
            )
        return sums.total, logprobs, entropy

    def half(hidden, weight, targets, token_weights):
        hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
        loss = full_loss(hidden, weight, targets, token_weights).total
        return loss, *full_statistics(hidden, weight, targets, temperature=0.7)

    found, wanted = (run(function, inputs, ["hidden", "weight"], 1) for function in (under_autocast, half))
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert relative_error(value, wanted[name]) < 6e-3, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_large_loss_scale_does_not_overflow_half_precision(device, implementation):
    """65536, where fp16's loss scale starts, is no fp16 number."""
    hidden, weight, targets, _ = learned(torch.float16, n=9, device=device)
    small = torch.full((9,), 1e-3, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, token_weights=small, implementation=implementation).total
    plain = torch.autograd.grad(loss, hidden, retain_graph=True)[0].double()
    scaled = torch.autograd.grad(65536 * loss, hidden)[0].double() / 65536
    assert relative_error(scaled, plain) < 1e-3


@pytest.mark.parametrize("loss", [linear_cross_entropy, token_statistics])
@pytest.mark.parametrize("target", [V, V + 1000, -1])
def test_a_target_outside_the_vocabulary_is_named(loss, target):
    hidden, weight, targets, _ = learned()
    targets[3] = target
    with pytest.raises(ValueError, match=f"target {target} is outside the vocabulary of {V}"):
        loss(hidden, weight, targets)


@pytest.mark.parametrize("target", [V, V + 1000, -1])
def test_a_target_outside_the_vocabulary_makes_the_kernels_row_nan(device, monkeypatch, target):
    """What a GPU does, where the host may not wait to look."""
    monkeypatch.setattr(kernels.linear_cross_entropy, "_check_targets", lambda *_: None)
    hidden, weight, targets, _ = learned(torch.float32, n=5, device=device)
    targets[3] = target
    total = linear_cross_entropy(hidden, weight, targets, implementation="triton").total
    statistics = token_statistics(hidden, weight, targets, implementation="triton")
    assert total.isnan() and statistics.logprobs.isnan().tolist() == [False, False, False, True, False]
    for out in (total, statistics.logprobs.sum()):
        (grad,) = torch.autograd.grad(out, hidden)
        assert grad.isnan().all(1).tolist() == [False, False, False, True, False]


def test_wrong_shapes_temperatures_and_double_precision_are_refused(device):
    hidden, weight, targets, _ = make(torch.float64, n=3, device=device).values()
    with pytest.raises(ValueError, match=r"\(3, 16\), \(67, 15\), \(3,\)"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"\(3, 16\), \(67, 16\), \(2,\)"):
        token_statistics(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="above 0"):
        token_statistics(hidden, weight, targets, temperature=0.0)
    for loss in (linear_cross_entropy, token_statistics):
        with pytest.raises(ValueError, match="float64"):
            loss(hidden, weight, targets, implementation="triton")


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 0.0), (1.3, 3.0)])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_statistics_equal_the_distributions_own(rows, temperature, softcap):
    hidden, weight, targets, upstream = learned()
    settings = {"temperature": temperature, "softcap": softcap}
    wanted = full_statistics(hidden, weight, targets, **settings)
    found = token_statistics(hidden, weight, targets, **settings, chunk_bytes=rows * ROW)
    kept = targets != -100
    assert (
        torch.equal(found.top1[kept], full_logits(hidden, weight).argmax(-1)[kept]) and (found.top1[~kept] == -1).all()
    )
    assert found.top1.dtype == torch.int64 and not found.top1.requires_grad
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.3)):  # a gradient of its own for each token, to one and to both
        out, wanted_out = (
            sum(factor * value @ upstream for factor, value in zip(weights, values, strict=False) if factor)
            for values in (found, wanted)
        )
        assert relative_error(out, wanted_out) < 1e-13
        grads = torch.autograd.grad(out, (hidden, weight), retain_graph=True)
        wanted_grads = torch.autograd.grad(wanted_out, (hidden, weight), retain_graph=True)
        for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
            assert relative_error(grad, wanted_grad) < 1e-13


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 3.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_are_as_exact_as_their_dtype(device, small_blocks, implementation, dtype, temperature, softcap):
    inputs = only(make(dtype, n=12, h=48, device=device), "hidden", "weight", "targets")
    settings = {"temperature": temperature, "softcap": softcap}
    chunked = partial(chunked_statistics, implementation=implementation, chunk_bytes=5 * ROW, **settings)
    check_chunked(chunked, partial(full_statistics, **settings), inputs, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equally_probable_tokens_the_first_is_the_best(device, small_blocks, implementation):
    hidden, weight, targets, _ = make(torch.float32, n=12, device=device).values()
    twice = torch.cat([weight, weight])
    best = full_logits(hidden, weight).argmax(-1).where(targets != -100, -1)
    assert torch.equal(token_statistics(hidden, twice, targets, implementation=implementation).top1, best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_gradient_may_stand_for_all_tokens(device, implementation):
    """.sum() hands back a gradient of stride 0."""
    hidden, weight, targets, _ = learned(torch.float32, n=9, device=device)
    found = token_statistics(hidden, weight, targets, implementation=implementation)
    wanted = full_statistics(hidden.double(), weight.double(), targets)
    grads, wanted_grads = (
        torch.autograd.grad(out[0].sum() + out[1].sum(), (hidden, weight)) for out in (found, wanted)
    )
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 2e-6


# ----------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operators_obey_torchs_rules(device, implementation):
    hidden, weight, targets, token_weights = learned(torch.bfloat16, n=5, device=device)
    settings = (2, torch.bfloat16, implementation)
    opcheck = torch.library.opcheck
    loss = torch.ops.groundup.linear_cross_entropy
    opcheck(loss, (hidden, weight, targets, token_weights, -100, 0.1, 3.0, *settings, True, True))
    opcheck(loss, (hidden, weight.detach(), targets, None, -100, 0.0, 0.0, *settings, True, False))
    opcheck(torch.ops.groundup.token_statistics, (hidden, weight, targets, 0.7, 3.0, -100, *settings))
    fixed = [x.detach() for x in (hidden, weight)]
    vector = torch.rand(5, device=device)
    opcheck(
        torch.ops.groundup.token_statistics_backward,
        (vector, vector, *fixed, targets, vector, vector, 0.7, 3.0, -100, *settings, False, True),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_they_compile_whole(device, implementation):
    hidden, weight, targets, token_weights = learned(torch.float32, n=9, device=device)

    def both(hidden, weight):
        with torch.autocast(device.type, torch.bfloat16):
            settings = {"softcap": 3.0, "implementation": implementation, "chunk_bytes": 4 * ROW}
            sums = linear_cross_entropy(hidden, weight, targets, token_weights=token_weights, z_loss=0.1, **settings)
            statistics = token_statistics(hidden, weight, targets, temperature=0.7, **settings)
        return sums.total, sums.cross_entropy, *statistics

    compiled = torch.compile(both, fullgraph=True)
    results = [function(hidden, weight) for function in (compiled, both)]
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted) and found.requires_grad == wanted.requires_grad
    grads = [
        torch.autograd.grad(out[0] + (out[2] * token_weights).sum() + out[3].sum(), (hidden, weight)) for out in results
    ]
    for found, wanted in zip(*grads, strict=True):
        assert torch.equal(found, wanted)


# what is wrong, the implementation it is in, the text to replace, with what
MUTANTS = [
    ("z-term's gradient missing", "torch", "share * (1 + 2 * z_loss * lse) / norm", "share / norm"),
    ("z-term's gradient missing", "triton", "share * (1 + 2 * z_loss * lse) / norm", "share / norm"),
    ("z-term's gradient halved", "triton", "1 + 2 * z_loss * lse", "1 + z_loss * lse"),
    ("weight not applied to the z-loss", "torch", "z_loss * (squares * scale)", "z_loss * squares"),
    ("weight not in the gradient", "triton", "tl.where(real, tl.load(WEIGHTS + row)", "tl.where(real, 1.0"),
    ("softcap's slope missing", "torch", "p if slope is None else p.mul_(slope)", "p"),
    ("softcap's slope missing", "triton", "grad *= 1 - bent * bent", "grad *= 1"),
    ("softcap's slope missing in the statistics", "torch", "grad if slope is None else grad.mul_(slope)", "grad"),
    ("softcap not undone", "triton", "raw = softcap * _tanh(raw / softcap)", "raw = _tanh(raw / softcap)"),
    ("target's logit without softcap", "triton", "chosen = _logit(raw, softcap, 1.0, SOFTCAP)", "chosen = raw"),
    ("peak not subtracted", "torch", "p = logits.sub_(peak).exp_()", "p = logits.exp_(); peak = peak * 0"),
    ("peak not subtracted", "triton", "rise = x - peak", "rise = x"),
    ("sums not rescaled when the peak rises", "triton", "norm * ratio + 1", "norm + 1"),
    ("lanes not brought to one peak", "triton", "tl.sum(norm * ratio, 0)", "tl.sum(norm, 0)"),
    ("partial block counted whole", "triton", "column < vocab, _logit", "column < pitch, _logit"),
    ("last partial block left out", "triton", "range(0, vocab, BLOCK)", "range(0, vocab - BLOCK + 1, BLOCK)"),
    ("entropy's sums not rescaled", "triton", "ratio * (moment - norm * rise)", "ratio * moment"),
    ("entropy's lanes not brought to one peak", "triton", "moment + norm * (peak - top)", "moment"),
    ("entropy's gradient without the mean", "torch", "logp.add_(entropy[:, None])", "logp"),
    ("entropy's gradient without the mean", "triton", "p_share += logp_share * tl.load(ENTROPY + row)", "p_share += 0"),
    ("temperature not in the entropy's gradient", "triton", "(D_ENTROPY + row) * inverse_temperature", "(D_ENTROPY + row)"),
    ("temperature not in the gradient", "torch", "(d_logprobs.where(kept, 0.0) / temperature)", "d_logprobs.where(kept, 0.0)"),
    ("temperature not in the gradient", "triton", "(D_LOGPROBS + row) * inverse_temperature", "(D_LOGPROBS + row)"),
    ("temperature not in the logits", "triton", "return raw * inverse_temperature", "return raw"),
    ("target not in the gradient", "triton", "column == target, target_share", "column == target, 0.0"),
    ("target's neighbour in the gradient", "triton", "column == target", "column == target + 1"),
    ("ignored rows not zeroed", "torch", "d_logprobs.where(kept, 0.0)", "d_logprobs"),
    ("ignored rows not zeroed", "triton", "tl.store(LOGITS + column, tl.zeros", "tl.store(LOGITS + column, 1.0 + tl.zeros"),
    ("ignored rows counted", "torch", "token_weights.to(stats).where(kept, 0.0)", "token_weights.to(stats)"),
    ("rows overlap", "triton", "LOGITS += row * pitch", "LOGITS += row * vocab"),
    ("the weight's gradient of the last chunk alone", "torch", "= gradients\n", "= gradients[0], gradients[1].zero_()\n"),
    ("upstream gradient left out", "torch", "(grad_weight * upstream)", "grad_weight"),
]  # fmt: skip


def faults(module, implementation, device):
    """What breaks the bounds, in the loss and in the statistics, of a few rows, one of them with huge logits."""
    inputs = make(torch.float32, n=9, device=device)
    inputs["hidden"][2] *= 100
    chunked = {"implementation": implementation, "chunk_bytes": 5 * ROW}
    for settings in ({"z_loss": 0.01, "softcap": 3.0}, {"z_loss": 0.01}):
        loss, reference = partial(module.linear_cross_entropy, **chunked, **settings), partial(full_loss, **settings)
        yield from failures(errors(loss, reference, inputs, ["hidden", "weight"]), torch.float32)
    inputs = only(inputs, "hidden", "weight", "targets")
    for settings in ({"temperature": 0.7, "softcap": 3.0}, {"temperature": 1.5}):
        statistics = partial(chunked_statistics, module=module, **chunked, **settings)
        reference = partial(full_statistics, **settings)
        yield from failures(errors(statistics, reference, inputs, ["hidden", "weight"]), torch.float32)


@pytest.mark.parametrize(
    ("implementation", "old", "new"),
    [fault[1:] for fault in MUTANTS],
    ids=[f"{fault[0]} ({fault[1]})" for fault in MUTANTS],
)
def test_a_wrong_kernel_is_noticed(device, tmp_path, implementation, old, new):
    mutant = load_mutant(Path(kernels.linear_cross_entropy.__file__), {old: new}, tmp_path)
    mutant.VOCABULARY_BLOCK = 32
    assert next(faults(mutant, implementation, device), None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_right_kernel_is_not_called_wrong(device, small_blocks, implementation):
    assert not list(faults(kernels.linear_cross_entropy, implementation, device))


# -------------------------------------------------------------------------------------------------------------- memory


_PEAK = """
import torch
import torch.nn.functional as F
from kernels.linear_cross_entropy import linear_cross_entropy, token_statistics
torch.set_num_threads(1)
hidden = torch.randn(2048, 32, requires_grad=True)
weight = torch.randn(16384, 32, requires_grad=True)
targets = torch.randint(0, 16384, (2048,))
ways = [  # by what they should need: the high-water mark only rises
    lambda *inputs: linear_cross_entropy(*inputs, chunk_bytes=2**22).total,
    lambda *inputs: sum(x.sum() for x in token_statistics(*inputs, chunk_bytes=2**22)[:2]),
    lambda *inputs: F.cross_entropy(F.linear(*inputs[:2]), inputs[2], reduction="sum"),
]
def high_water():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB
for way in ways:
    way(hidden[:8], weight, targets[:8]).backward()  # libraries' own work space
before = high_water()
for way in ways:
    way(hidden, weight, targets).backward()
    print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_a_fraction_of_the_full_computation(root):
    """The logits are 128 MiB and the full way holds at least two such; ours holds a few chunks of 4 MiB: an eighth."""
    child = subprocess.run([sys.executable, "-c", _PEAK], cwd=root, capture_output=True, text=True, check=True)
    loss, statistics, full = (int(line) / 1024 for line in child.stdout.split())
    assert full > 256
    assert loss < full / 8
    assert statistics < full / 8
