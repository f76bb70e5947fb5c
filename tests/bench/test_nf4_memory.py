"""Does bench/nf4_memory.py count what is kept, and find that ours keeps no decoded weight?

On layers small enough for a CPU; transformers, peft and bitsandbytes where they are installed.
"""

import json
import sys

import pytest
import torch

from bench import nf4_memory
from bench.measure import saved_bytes, tensor_peak_bytes
from bench.nf4_memory import PARTS, prepared
from bench.step import Shape, llama

CPU = torch.device("cpu")
SHAPE = Shape(llama(64, 128, 1, 4, 2, 16), 1, 32)
# fp32 products of the same numbers in another order; and of bitsandbytes' second scales, looked up on a CPU, one of 128
# may be a code off, which moves a weight by 6e-4 of its norm here. A wrong scale of the adapters moves results by 1e-1
NEAR = {"ours": 1e-5, "peft + bitsandbytes": 2e-3}
# values of all weights, and of all adapters: rank times inputs and outputs of each layer
MLP = 3 * 64 * 128, 16 * 3 * (64 + 128)
BLOCK = MLP[0] + 2 * 64 * 64 + 2 * 64 * 32, MLP[1] + 16 * (2 * (64 + 64) + 2 * (64 + 32))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", ["ours", "peft + bitsandbytes"])
def test_every_way_computes_the_same_with_the_same_gradients(part, way):
    if way != "ours":
        for package in ("transformers", "peft", "bitsandbytes"):
            pytest.importorskip(package)
    found, truth = results_of(part, way), results_of(part, "naive")
    assert found.keys() == truth.keys() and len(truth) > 6
    for name, value in truth.items():
        assert (found[name] - value).norm() < NEAR[way] * value.norm(), name


def results_of(part, way):
    """The output and the gradients of the input and of each adapter, by name."""
    layer, forward = prepared(part, SHAPE, way, CPU, torch.float32)
    x = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = forward(x)
    output.square().sum().backward()
    learned = {name.partition(".default")[0]: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in learned)
    return {"output": output.detach(), "x": x.grad, **learned}


@pytest.mark.parametrize(("part", "weights", "adapters"), [("mlp", *MLP), ("block", *BLOCK)])
def test_the_naive_way_keeps_all_decoded_weights_and_ours_none(part, weights, adapters):
    """What the naive way keeps more is each weight decoded to bf16, 2 bytes a value, and each adapter rounded to it."""
    saved = {}
    for way in ("ours", "naive"):
        layer, forward = prepared(part, SHAPE, way, CPU, torch.bfloat16)
        x = torch.randn(1, 32, 64).bfloat16().requires_grad_()
        saved[way] = saved_bytes(lambda forward=forward, x=x: forward(x), [*layer.parameters(), *layer.buffers()])
    assert saved["naive"] - saved["ours"] == 2 * (weights + adapters)


@pytest.mark.parametrize("way", nf4_memory.WAYS)
def test_what_is_counted_is_all_that_stays_allocated_after_the_forward_pass(way):
    """Nothing is kept by other means, such as an attribute of the graph: the growth is the count and the output.

    The MLP's input was there before. Some bytes may be numbers that became tensors.
    """
    if way not in ("ours", "naive"):
        for package in ("transformers", "peft", "bitsandbytes"):
            pytest.importorskip(package)
    layer, forward = prepared("mlp", SHAPE, way, CPU, torch.bfloat16)
    x = torch.randn(1, 32, 64).bfloat16().requires_grad_()
    saved = saved_bytes(lambda: forward(x), [x, *layer.parameters(), *layer.buffers()])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = forward(x)
    events = profile.profiler.kineto_results.events()
    grown = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert output.requires_grad and 0 <= grown - (saved + output.nbytes) < 64


def test_saved_bytes_are_counted_once_each_and_without_the_weights():
    """By hand, in float32."""
    weight, x = torch.ones(50, 40), torch.ones(30, 40).requires_grad_()

    def forward():
        y = x @ weight.T  # keeps the weight alone, for dx
        return (y * y).exp()  # keeps y, twice, and the result

    assert saved_bytes(forward, [weight]) == 2 * 30 * 50 * 4
    assert saved_bytes(forward, []) == (2 * 30 * 50 + 50 * 40) * 4


def test_the_peak_of_tensors_is_the_most_at_any_time_and_not_the_sum():
    """Three of 4 MiB one after another, two of which live at once; what was there before does not count.

    A few bytes come with them: the number that is added becomes a tensor.
    """
    before = torch.ones(2**20)

    def call():
        first = before + 1
        second = first + 1
        del first
        return second + 1

    assert 0 <= tensor_peak_bytes(call, CPU) - 2 * 2**22 < 64


def test_a_call_prints_and_writes_a_row_of_every_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(nf4_memory.SHAPES, "1024", SHAPE)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    assert nf4_memory.main(["--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "nf4_memory.json").read_text())["1024"]
    assert rows.keys() == set(PARTS) and all(part.keys() == set(nf4_memory.WAYS) for part in rows.values())
    for part in rows.values():
        assert 0 < part["ours"]["saved_mib"] < part["naive"]["saved_mib"] < part["naive"]["peak_mib"]
        assert part["ours"]["peak_mib"] < part["naive"]["peak_mib"]
        assert "bitsandbytes" in part["peft + bitsandbytes"]["skipped"]
    printed = capsys.readouterr().out
    assert "mlp ours: " in printed and "block peft + bitsandbytes: left out: " in printed
