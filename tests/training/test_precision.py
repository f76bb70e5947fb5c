"""Does the loss scaler find its scale, and does a wrong precision say so?"""

import pytest
import torch

from errors import UserError
from ranks import choose_device
from training.precision import LossScaler, choose_precision

CPU = torch.device("cpu")


def test_the_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    """Against torch.amp's own update rule."""
    scaler = LossScaler(CPU, enabled=True)
    scale, growth = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    outcomes = [True] * 1999 + [False] + [True] * 2000 + [False, False] + [True] * 10
    for finite in outcomes:
        scaler.update(torch.tensor(finite))
        torch._amp_update_scale_(scale, growth, torch.tensor(0.0 if finite else 1.0), 2.0, 0.5, 2000)
        assert scaler.scale == scale
    assert scaler.scale == 2.0**14


def test_the_scaler_goes_on_from_its_state():
    first = LossScaler(CPU, enabled=True)
    for _ in range(1500):
        first.update(torch.tensor(True))
    second = LossScaler(CPU, enabled=True)
    second.load(first.state())
    for _ in range(500):
        first.update(torch.tensor(True))
        second.update(torch.tensor(True))
    assert first.scale == second.scale == 2.0**17


def test_without_fp16_the_scale_is_one_for_ever():
    scaler = LossScaler(CPU, enabled=False)
    scaler.update(torch.tensor(False))
    assert scaler.scale == 1.0


@pytest.mark.parametrize("name,dtype", [("none", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_choice_on_a_cpu(name, dtype):
    precision = choose_precision(name, CPU)
    assert precision.dtype == dtype
    with precision.autocast(CPU):
        assert torch.is_autocast_enabled("cpu") == (dtype != torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_one_sentence():
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")
    assert choose_device("auto") == CPU or choose_device("auto").type == "mps"


@pytest.mark.parametrize(
    ("capability", "asked", "dtype"),
    [
        ((7, 5), "auto", torch.float16), ((8, 0), "auto", torch.bfloat16), ((9, 0), "fp16", torch.float16),
        ((7, 5), "none", torch.float32),
    ],
)  # fmt: skip
def test_a_gpu_computes_in_what_it_is_good_at(capability, asked, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision(asked, torch.device("cuda")).dtype == dtype


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(UserError, match="use fp16"):
        choose_precision("bf16", torch.device("cuda"))
