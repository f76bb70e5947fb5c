"""Does bench/pretrain.py compare what computes the same, and does the Trainer take its steps by turns?"""

import pytest
import torch

from bench import pretrain
from bench.families import Shape, difference

MACHINE = pretrain.machine_of("fp32", "eager")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(pretrain.SHAPES, "llama", Shape(128, 32, 2, 2, 4, 16))
    monkeypatch.setattr(pretrain, "MLP", 64)


def test_every_way_computes_and_learns_the_same(tmp_path):
    ways = pretrain.build("llama", None, MACHINE, tmp_path, None)
    ours = ways.pop("ours")
    assert "transformers' Trainer" in ways  # and litgpt, where it is installed
    for way in ways.values():
        assert difference(ours, way) < 1e-5
    for _ in range(3):
        for way in (ours, *ways.values()):
            way.step()
    # after as many steps the weights are still the same
    for way in ways.values():
        assert difference(ours, way) < 1e-4


def test_litgpts_fused_projection_is_three_of_transformers():
    parts = pretrain.litgpt_views("transformer.h.3.attn.qkv.weight", torch.arange(6.0)[:, None])
    assert {name: part.flatten().tolist() for name, part in parts.items()} == {
        "model.layers.3.self_attn.q_proj.weight": [0.0, 1.0],
        "model.layers.3.self_attn.k_proj.weight": [2.0, 3.0],
        "model.layers.3.self_attn.v_proj.weight": [4.0, 5.0],
    }
