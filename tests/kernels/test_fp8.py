"""Is a layer in fp8 what its format allows, and does a model learn with it as in bf16?

torch's fp8 product runs on any device here; where training takes it is another question (why_not_fp8). Bounds: rounding to e4m3
is off by at most 2⁻⁴ of a value, evenly spread over that √⅓ of it in the mean square, and both factors are rounded, so that
a product of random numbers is off by √⅔·2⁻⁴ = 0.051; results are rounded to bf16 then.
"""

import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from kernels.fp8 import FP8, LARGEST, fp8_linear, rows_to_fp8
from layers import Linear, use_fp8
from model import Transformer
from model_config import ModelConfig
from tests.kernels.accuracy import BOUNDS, relative_error, run
from training.precision import choose_precision

OF_ROUNDING = 0.051
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def drawn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("shape", [(40, 64), (3, 17, 128), (1, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_as_close_as_the_format_allows(device, shape, dtype):
    given = {"x": drawn(*shape, dtype=dtype, device=device), "weight": drawn(96, shape[-1], seed=1, device=device)}
    given["bias"] = drawn(96, seed=2, device=device)
    found = run(fp8_linear, given, list(given), 3)
    truth = run(F.linear, {name: value.double() for name, value in given.items()}, list(given), 3)
    assert (
        found["out0"].dtype == torch.bfloat16 and found["dweight"].dtype == torch.float32 and found["dx"].dtype == dtype
    )
    assert relative_error(found["out0"], truth["out0"]) < OF_ROUNDING
    assert relative_error(found["dx"], truth["dx"]) < OF_ROUNDING
    for name in ("dweight", "dbias"):  # which stay in bf16
        assert relative_error(found[name], truth[name]) < BOUNDS[torch.bfloat16]


def test_the_product_is_that_of_the_rounded_factors(device):
    x, weight = drawn(50, 256, device=device), drawn(64, 256, seed=1, device=device)
    (x8, x_scale), (w8, w_scale) = rows_to_fp8(x), rows_to_fp8(weight)
    truth = (x8.double() * x_scale) @ (w8.double() * w_scale).t()
    assert relative_error(fp8_linear(x, weight), truth) < BOUNDS[torch.bfloat16]


def test_each_row_has_its_own_scale(device):
    """Rows of very different sizes are each as exact; one scale for all would leave nothing of the small ones."""
    x = drawn(6, 64, device=device) * torch.logspace(-20, 20, 6, device=device)[:, None]
    values, scale = rows_to_fp8(x)
    assert values.dtype == FP8 and (values.float().abs().amax(-1) == LARGEST).all()
    errors = ((values.float() * scale - x).norm(dim=-1) / x.norm(dim=-1)).tolist()
    assert max(errors) < OF_ROUNDING / 2**0.5
    zero, _ = rows_to_fp8(torch.zeros(2, 16, device=device))
    assert not zero.float().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(device, value):
    x = drawn(4, 32, device=device)
    x[2, 5] = value
    y = fp8_linear(x, drawn(16, 32, seed=1, device=device))
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def small(**sizes) -> Transformer:
    usual = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    config = ModelConfig(**usual | sizes)
    torch.manual_seed(0)
    return Transformer(config)


def test_a_model_learns_as_in_bf16_and_is_evaluated_in_it():
    ids = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(3))

    def loss_of(model):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model.logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())

    losses = {}
    for fp8 in (True, False):
        model = small()
        if fp8:
            with torch.no_grad():
                before = loss_of(model)
            use_fp8(model)
            assert sum(layer.fp8 for layer in model.modules() if isinstance(layer, Linear)) == 14
            with torch.no_grad():
                assert torch.equal(loss_of(model), before)  # nothing learns from it
            assert not torch.equal(loss_of(model), before)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[fp8] = []
        for _ in range(40):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[fp8].append(loss.item())
    assert losses[False][-1] < 0.6 * losses[False][0]  # it learns by heart
    assert losses[True][-1] == pytest.approx(losses[False][-1], rel=0.05)


def test_where_it_cannot_be_is_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="--mixed_precision fp8: cpu multiplies no fp8; use bf16"):
        choose_precision("fp8", torch.device("cpu"))
    for capability, ok in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, now=capability: now)
        if ok:
            chosen = choose_precision("fp8", torch.device("cuda", 0))
            assert chosen.fp8 and chosen.dtype == torch.bfloat16
        else:
            with pytest.raises(UserError, match=r"capability is 8\.9, .* needs 9\.0"):
                choose_precision("fp8", torch.device("cuda", 0))
    with pytest.raises(UserError, match="multiples of 16"):
        use_fp8(small(hidden_size=40, head_dim=10))


def test_a_compiled_layer_gives_the_same():
    layer, x = Linear(64, 32, bias=False), drawn(20, 64)
    layer.fp8 = True
    x.requires_grad_()
    eager = layer(x)
    eager.sum().backward()
    gradients, x.grad = [x.grad, layer.weight.grad], None
    layer.weight.grad = None
    compiled = torch.compile(layer, backend="aot_eager")(x)
    compiled.sum().backward()
    assert torch.equal(compiled, eager)
    assert all(map(torch.equal, (x.grad, layer.weight.grad), gradients))
