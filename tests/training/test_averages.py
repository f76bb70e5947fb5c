"""Is the average of --ema the corrected one of its closed form, and does it leave the weights as they were?"""

import pytest
import torch

from training.averages import Ema, figures_of_both


def model_and_ema(decay=0.9):
    model = torch.nn.Linear(5, 3)
    torch.nn.init.constant_(model.weight, 0.25)
    return model, Ema({name: parameter.detach() for name, parameter in model.named_parameters()}, decay)


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999999])
def test_the_average_is_the_corrected_sum_in_float64(decay):
    """Also where 1 - decay^n loses all digits in fp32: 1e-7 of the average, some roundings a step over 40 steps."""
    model, ema = model_and_ema(decay)
    history = []
    for step in range(40):
        torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(step))
        history.append(model.weight.detach().double().clone())
        ema.update(None)
    weights = [decay ** (39 - step) for step in range(40)]
    exact = sum(w * one for w, one in zip(weights, history, strict=True)) / sum(weights)
    torch.testing.assert_close(ema.averages["weight"].double(), exact, atol=2e-6, rtol=0)


def test_after_one_step_it_is_the_weights():
    model, ema = model_and_ema(0.9999)
    torch.nn.init.normal_(model.weight)
    ema.update(None)
    torch.testing.assert_close(ema.averages["weight"], model.weight.detach(), atol=1e-7, rtol=1e-6)


def test_a_step_that_was_left_out_does_not_count():
    model, ema = model_and_ema()
    torch.nn.init.normal_(model.weight)
    ema.update(torch.tensor(False))
    before = {name: average.clone() for name, average in ema.averages.items()}
    ema.update(torch.tensor(True))
    assert ema.steps == 1 and all(torch.equal(before[name], average) for name, average in ema.averages.items())


def test_it_stands_in_and_the_weights_come_back_bit_for_bit_also_after_an_error():
    model, ema = model_and_ema()
    torch.nn.init.normal_(model.weight)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    averages = {name: average.clone() for name, average in ema.averages.items()}
    seen = []

    def evaluate(model, everything):
        seen.append(model.weight.detach().clone())
        return {"val_loss": float(len(seen))}

    assert figures_of_both(ema, evaluate, model, True) == {"val_loss": 2.0, "val_loss_ema": 1.0}
    assert torch.equal(seen[0], averages["weight"]) and torch.equal(seen[1], weights["weight"])
    with pytest.raises(RuntimeError), ema.standing_in(model):
        raise RuntimeError
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(averages[name], average) for name, average in ema.averages.items())
