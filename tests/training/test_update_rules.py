"""Do Lion, SGD, schedule-free AdamW, Adafactor and 8-bit AdamW make the update of their papers and of other libraries?"""

import math

import numpy as np
import pytest
import torch
import transformers.optimization
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kernels.nf4 import dynamic_code
from tests.ranks import run_ranks
from training.adafactor import ADAFACTOR
from training.adamw8bit import ADAMW_8BIT, SMALLEST, encode, tables
from training.averages import Ema, train_on, weights_to_use
from training.update_rules import LION, SCHEDULE_FREE, SGD, ByRule

LR, DECAY, STEPS = 3e-3, 0.1, 12
SHAPES = ((40, 24), (24, 130), (3, 8, 16), (24,))


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def gradients(shapes, step):
    generator = torch.Generator().manual_seed(50 + step)
    return [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]


def ours(rule, weights, lr=LR, decay=DECAY, **settings):
    return ByRule([{"params": weights, "lr": lr, "weight_decay": decay}], rule, **settings)


def run(weights, optimizer, steps=STEPS, rates=None, shapes=SHAPES):
    for step in range(steps):
        for weight, gradient in zip(weights, gradients(shapes, step), strict=True):
            weight.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = LR if rates is None else rates[step]
        optimizer.step()


def close(found, wanted, atol=2e-8, rtol=2e-6):
    """fp32 against fp32 or float64: a few roundings of 2^-24 of weights near 0.1, over a dozen steps."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one.detach().double(), torch.as_tensor(other).detach().double(), atol=atol, rtol=rtol
        )


def float64(weights):
    return [weight.detach().double().numpy().copy() for weight in weights]


# ---- Lion, SGD -------------------------------------------------------------------------------------------------------


def test_lion_is_algorithm_2_of_its_paper_in_float64():
    weights = parameters()
    exact, momenta = float64(weights), [np.zeros(shape) for shape in SHAPES]
    run(weights, ours(LION, weights, beta1=0.9, beta2=0.99))
    for step in range(STEPS):
        for index, gradient in enumerate(gradients(SHAPES, step)):
            g = gradient.double().numpy()
            update = np.sign(0.9 * momenta[index] + 0.1 * g)
            momenta[index] = 0.99 * momenta[index] + 0.01 * g
            exact[index] -= LR * (update + DECAY * exact[index])
    close(weights, exact)


def test_lion_is_bitsandbytes():
    optim = pytest.importorskip("bitsandbytes").optim
    weights, theirs = parameters(), parameters()
    run(weights, ours(LION, weights, beta1=0.9, beta2=0.99))
    run(theirs, optim.Lion(theirs, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY))
    close(weights, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_with_decoupled_decay(momentum):
    weights, theirs = parameters(), parameters()
    run(weights, ours(SGD, weights, momentum=momentum))
    peer = torch.optim.SGD(theirs, lr=LR, momentum=momentum)
    for step in range(STEPS):
        for weight, gradient in zip(theirs, gradients(SHAPES, step), strict=True):
            weight.grad = gradient
            weight.data.mul_(1 - LR * DECAY)
        peer.step()
    close(weights, theirs)


# ---- schedule-free ---------------------------------------------------------------------------------------------------

RATES = [LR * min(1.0, (step + 1) / 4) for step in range(STEPS)]  # a warm-up of 4 steps


def test_schedule_free_is_algorithm_1_of_its_paper_in_float64():
    """x, y and z kept apart, as the paper writes them; what training is for is x, and y comes back bit for bit."""
    weights = parameters()
    x, z, v = float64(weights), float64(weights), [np.zeros(shape) for shape in SHAPES]
    optimizer = ours(SCHEDULE_FREE, weights, beta1=0.9, beta2=0.95, eps=1e-8)
    run(weights, optimizer, rates=RATES)
    squares = 0.0
    for step in range(STEPS):
        squares += RATES[step] ** 2
        share = RATES[step] ** 2 / squares
        for index, gradient in enumerate(gradients(SHAPES, step)):
            g = gradient.double().numpy()
            y = 0.1 * z[index] + 0.9 * x[index]
            v[index] = 0.95 * v[index] + 0.05 * g**2
            direction = g / (np.sqrt(v[index] / (1 - 0.95 ** (step + 1))) + 1e-8) + DECAY * y
            z[index] = z[index] - RATES[step] * direction
            x[index] = (1 - share) * x[index] + share * z[index]
    close(weights, [0.1 * z_ + 0.9 * x_ for z_, x_ in zip(z, x, strict=True)], atol=1e-7)
    before = [weight.detach().clone() for weight in weights]
    model = torch.nn.Module()
    with weights_to_use(model, [optimizer]):
        close(weights, x, atol=1e-7)
        assert not any(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))


def test_schedule_free_is_its_authors(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    weights, theirs = parameters(), parameters()
    peer = schedulefree.AdamWScheduleFree(
        theirs, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY, warmup_steps=4, foreach=False
    )
    peer.train()
    optimizer = ours(SCHEDULE_FREE, weights, beta1=0.9, beta2=0.95, eps=1e-8)
    run(weights, optimizer, rates=RATES)
    run(theirs, peer)
    close(weights, theirs, atol=1e-7)
    peer.eval()
    with weights_to_use(torch.nn.Module(), [optimizer]):
        close(weights, theirs, atol=1e-7)


def test_an_average_over_very_many_steps_loses_no_digits():
    """The share of step n is 1/n of a constant rate, here the 2^23rd: the sum of squares in fp32 would have stood still."""
    weights = parameters([(4,)])
    optimizer = ours(SCHEDULE_FREE, weights, beta1=0.9, beta2=0.95, eps=1e-8)
    run(weights, optimizer, steps=1, shapes=[(4,)])
    optimizer.state[weights[0]]["total"].fill_(2**23 - 1)
    run(weights, optimizer, steps=1, shapes=[(4,)])
    assert optimizer.state[weights[0]]["total"] == 2**23


def test_weights_that_were_never_trained_need_no_average():
    weights = parameters()
    optimizer = ours(SCHEDULE_FREE, weights, beta1=0.9, beta2=0.95, eps=1e-8)
    with weights_to_use(torch.nn.Module(), [optimizer]):
        close(weights, parameters(), atol=0, rtol=0)
    train_on(torch.nn.Module(), [optimizer])
    close(weights, parameters(), atol=0, rtol=0)


# ---- Adafactor -------------------------------------------------------------------------------------------------------


def test_adafactor_is_transformers_without_a_rate_of_its_own():
    """Gradients of different sizes, so that some updates are scaled down to a root mean square of 1."""
    weights, theirs = parameters(), parameters()
    run(weights, ours(ADAFACTOR, weights))
    peer = transformers.optimization.Adafactor(
        theirs, lr=LR, weight_decay=DECAY, scale_parameter=False, relative_step=False
    )
    run(theirs, peer)
    close(weights, theirs, atol=1e-7)
    state = ours(ADAFACTOR, weights).state_shapes(weights[2])
    assert state == {"step": torch.Size([]), "row": torch.Size([3, 8]), "column": torch.Size([3, 16])}


# ---- 8-bit AdamW -----------------------------------------------------------------------------------------------------

LARGE = ((70, 61), (4096,), (5000,), (24,))  # whole blocks and a part of one; the last in fp32


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_is_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(dynamic_code(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_gets_the_nearest_code(signed):
    """Found by search: over all of [-1, 1], on each edge between two codes and beside it, to the last bit."""
    table = tables(signed, torch.device("cpu"))
    edges = table.edges[:-1]
    beside = [edges, torch.nextafter(edges, torch.tensor(2.0)), torch.nextafter(edges, torch.tensor(-2.0))]
    values = torch.cat([torch.linspace(-1, 1, 2**20), torch.logspace(-12, 0, 2**16), *beside, torch.zeros(3)])
    values = values[: len(values) // 255 * 255].view(-1, 255)
    scaled = torch.cat([values, torch.ones(len(values), 1)], 1).flatten()  # the largest of each block is 1
    codes, largest = encode(scaled, table)
    assert (largest == 1).all()
    assert torch.equal(codes.int(), torch.bucketize(scaled, edges, out_int32=True))


def test_8_bit_adamw_is_bitsandbytes():
    """After a step the same weights to fp32's rounding, the same scales, and the same bytes, but for some whose code
    bitsandbytes looks up in a table on the CPU: there ours is the nearer. After a dozen, weights to 2 % of their way."""
    optim = pytest.importorskip("bitsandbytes").optim
    weights, theirs, start = parameters(LARGE), parameters(LARGE), parameters(LARGE)
    optimizer = ours(ADAMW_8BIT, weights, beta1=0.9, beta2=0.95, eps=1e-8)
    peer = optim.AdamW8bit(theirs, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, min_8bit_size=SMALLEST)
    run(weights, optimizer, steps=1, shapes=LARGE)
    run(theirs, peer, steps=1, shapes=LARGE)
    close(weights, theirs, atol=1e-7)
    for weight, other, gradient in zip(weights[:3], theirs[:3], gradients(LARGE, 0)[:3], strict=True):
        mine, state = optimizer.state[weight], peer.state[other]
        moments = {"mean": ("1", 0.1 * gradient.double()), "square": ("2", 0.05 * gradient.double() ** 2)}
        for name, (number, exact) in moments.items():
            largest, code = state[f"absmax{number}"], state[f"qmap{number}"].double()
            torch.testing.assert_close(mine[f"{name}_largest"], largest, rtol=1e-6, atol=0)
            codes, their_codes = mine[f"{name}_code"].int().flatten(), state[f"state{number}"].int().flatten()
            assert (codes != their_codes).float().mean() < 0.05
            scaled = exact.flatten() / largest.double().repeat_interleave(256)[: exact.numel()]
            assert ((code[codes] - scaled).abs() <= (code[their_codes] - scaled).abs() + 1e-7).all()
    run(weights, optimizer, shapes=LARGE)
    run(theirs, peer, shapes=LARGE)
    for weight, other, begin in zip(weights, theirs, start, strict=True):
        assert (weight - other).norm() < 0.02 * (other - begin).norm()


def test_8_bit_adamw_follows_adamw():
    """It moves as AdamW in float64 does, within 3 % of the way, and from the first step on exactly where moments are fp32."""
    weights = parameters(LARGE)
    start, exact = float64(weights), float64(weights)
    first, second = [np.zeros(s) for s in LARGE], [np.zeros(s) for s in LARGE]
    run(weights, ours(ADAMW_8BIT, weights, beta1=0.9, beta2=0.95, eps=1e-8), steps=30, shapes=LARGE)
    for step in range(30):
        for index, gradient in enumerate(gradients(LARGE, step)):
            g = gradient.double().numpy()
            first[index] = 0.9 * first[index] + 0.1 * g
            second[index] = 0.95 * second[index] + 0.05 * g**2
            mean, square = first[index] / (1 - 0.9 ** (step + 1)), second[index] / (1 - 0.95 ** (step + 1))
            exact[index] -= LR * (DECAY * exact[index] + mean / (np.sqrt(square) + 1e-8))
    for weight, end, begin in zip(weights, exact, start, strict=True):
        error = np.linalg.norm(weight.detach().double().numpy() - end) / np.linalg.norm(end - begin)
        assert error < (0.03 if weight.numel() >= SMALLEST else 1e-5), error


def test_a_block_of_zeros_and_one_of_the_largest_numbers_stay_finite():
    weights = parameters([(8192,)])
    optimizer = ours(ADAMW_8BIT, weights, beta1=0.9, beta2=0.95, eps=1e-8)
    for size in (0.0, 1e15, 1e-20):
        weights[0].grad = torch.full((8192,), size)
        weights[0].grad[256:] = 0.0
        optimizer.step()
        assert weights[0].isfinite().all()
        assert all(value.float().isfinite().all() for value in optimizer.state[weights[0]].values())


def test_state_takes_the_bytes_that_are_planned():
    from training.optimizers import state_bytes

    weights = parameters(LARGE)
    assert [state_bytes("adamw8bit", "hidden", weight.detach().to("meta")) for weight in weights] == [
        2 * (math.prod(shape) + 4 * math.ceil(math.prod(shape) / 256)) if math.prod(shape) >= SMALLEST
        else 8 * math.prod(shape)
        for shape in LARGE
    ]  # fmt: skip


# ---- parts of weights ------------------------------------------------------------------------------------------------


def distance_of_shards(rank: int, world_size: int, name: str, settings: dict[str, float]) -> float:
    """Between a weight and its twin that is spread over the ranks by rows, after some steps and on their average."""
    mesh = init_device_mesh("cpu", (world_size,))
    rule = {"lion": LION, "sgd": SGD, "schedule_free": SCHEDULE_FREE}[name]
    whole = torch.nn.Parameter(parameters([(9, 6)])[0].detach())
    spread = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
    optimizers = [ours(rule, [whole], **settings), ours(rule, [spread], **settings)]
    ema = Ema({"w": spread.detach()}, 0.9)
    for step in range(4):
        (whole.grad,) = gradients([(9, 6)], step)
        spread.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        ema.update(torch.tensor(step == 2))
    with weights_to_use(torch.nn.Module(), optimizers), ema.standing_in(torch.nn.Module()):
        pass
    with weights_to_use(torch.nn.Module(), optimizers):
        return (whole - spread.full_tensor()).abs().max().item()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name,settings",
    [("lion", {"beta1": 0.9, "beta2": 0.99}), ("sgd", {"momentum": 0.9}),
     ("schedule_free", {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8})],
)  # fmt: skip
def test_element_wise_rules_give_the_same_bits_to_weights_that_are_spread_over_ranks(name, settings):
    assert run_ranks(distance_of_shards, 2, name, settings) == [0.0, 0.0]
