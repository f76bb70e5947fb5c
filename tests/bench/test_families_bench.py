"""Does bench/families.py put the same training before every library, and would it notice one that is fast and wrong?

On sizes for a test: nothing is said of speed here. transformers and peft where they are installed; in nanoGPT's place a model
with its interface, as its own is no part of this project.
"""

import json
import re

import numpy as np
import pytest
import torch

from batches.micro_batch import IGNORE_INDEX
from bench import families
from bench.families import BOUNDS, CASES, Machine, Shape, Way, difference, measure, rows_of, take_turns
from errors import UserError
from training.precision import choose_precision

pytest.importorskip("transformers")

CPU = torch.device("cpu")
MACHINE = Machine(CPU, choose_precision("none", CPU), compiled=False)
SHAPES = {
    "gpt2": Shape(97, 16, 2, 2, 3, 24),
    "bert": Shape(97, 16, 2, 2, 9, 32),
    "lora": Shape(97, 32, 2, 4, 8, 64),
}
# nanoGPT's interface on torch's own layers: the same function of the same parameters
GPT = """
import math
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

class Part(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        if inner == 3 * width:
            self.c_attn = nn.Linear(width, inner)
            self.c_proj = nn.Linear(width, width)
        else:
            self.c_fc, self.c_proj = nn.Linear(width, inner), nn.Linear(inner, width)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.n_head, config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Part(width, 3 * width), Part(width, 4 * width)

    def forward(self, x):
        length = x.shape[1]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.attn.c_attn(self.ln_1(x)).chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.ACTIVATION(self.mlp.c_fc(self.ln_2(x))))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("made")
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd), "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)), "ln_f": nn.LayerNorm(config.n_embd),
        })

    def configure_optimizers(self, decay, rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay)

    def forward(self, ids, targets):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        logits = self.transformer.ln_f(x) @ self.transformer.wte.weight.t()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def nanogpt(folder, activation="gelu"):
    (folder / "model.py").write_text(GPT.replace("ACTIVATION", activation))
    return families.read_nanogpt(folder)


def ways(case, folder, module=None):
    if case == "lora":
        pytest.importorskip("peft")
    return CASES[case](SHAPES[case], folder, module, MACHINE)


@pytest.mark.parametrize("case", CASES)
def test_every_way_computes_the_same_and_stays_with_it(case, tmp_path):
    """Loss and gradients before a step; the losses after three: clipping and the optimizers do the same as well."""
    sides = ways(case, tmp_path, nanogpt(tmp_path))
    ours = sides.pop("ours")
    assert sides.keys() == {
        "gpt2": {"nanoGPT", "nanoGPT, fused AdamW", "transformers"}, "bert": {"transformers"}, "lora": {"peft"},
    }[case]  # fmt: skip
    for theirs in sides.values():
        assert difference(ours, theirs) < BOUNDS[torch.float32]
    before = ours.backward().item()
    ours.model.zero_grad()
    for way in (ours, *sides.values()):
        for _ in range(3):
            way.step()
    after = ours.backward().item()
    assert after < before - 1e-6  # the steps learn
    for name, theirs in sides.items():
        if name != "nanoGPT":  # here it decays what the others do not
            assert theirs.backward().item() == pytest.approx(after, abs=1e-5)


def test_every_parameter_is_compared(tmp_path):
    """A gradient that one of them lacks, or that differs by a half, is seen."""
    sides = ways("bert", tmp_path)
    ours, theirs = sides.values()
    for name in dict(theirs.model.named_parameters()):
        wrong = Way(
            theirs.model,
            theirs.backward,
            theirs.step,
            lambda name=name: {key: value * (1.5 if key == name else 1) for key, value in theirs.gradients().items()},
        )
        gradient_vanishes = name.endswith("key.bias")  # softmax does not see what is added to all keys
        assert (difference(ours, wrong) > BOUNDS[torch.float32]) is not gradient_vanishes
    lacking = Way(theirs.model, theirs.backward, theirs.step, lambda: dict(list(theirs.gradients().items())[1:]))
    with pytest.raises(ValueError, match="not the same parameters"):
        difference(ours, lacking)


def test_a_library_that_computes_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gpt2: nanoGPT is not what ours computes: .* differ by"):
        measure("gpt2", SHAPES["gpt2"], nanogpt(tmp_path, "silu"), MACHINE, rounds=2)


def test_packed_texts_are_the_padded_ones():
    """The same tokens stand at the same places of their texts, with the same ones hidden, in fewer places."""
    shape = SHAPES["bert"]
    texts = families.texts_of(shape)
    input_ids, labels, seen = families.masked_rows(texts, shape.vocabulary)
    batch = families.packed_rows(texts, input_ids, labels, shape.length)
    assert batch.input_ids.numel() < len(texts) * shape.length
    assert seen.sum() == batch.num_tokens == sum(map(len, texts))
    assert batch.weight == (labels != IGNORE_INDEX).sum() > 0
    tokens, positions = batch.input_ids.flatten().tolist(), batch.positions.flatten().tolist()
    targets = batch.targets.flatten().tolist()
    places = list(zip(tokens, positions, targets, strict=True))
    for row, told, text in zip(input_ids.tolist(), labels.tolist(), texts, strict=True):
        wanted = list(zip(row, range(len(text)), told, strict=False))
        assert any(places[start : start + len(wanted)] == wanted for start in range(len(places)))


def test_texts_have_real_lengths():
    lengths = np.array([len(text) for text in families.texts_of(families.SHAPES["bert"])])
    assert 0.4 * 128 < lengths.mean() < 0.55 * 128
    assert lengths.max() <= 128 and lengths.std() > 20


def test_ways_take_turns_and_a_ratio_is_of_one_round():
    """Steps of known length; another is first in each round."""
    order = []
    parts = {
        name: Way(torch.nn.Identity(), lambda: torch.zeros(()), lambda name=name: order.append(name), dict)
        for name in ("ours", "other", "third")
    }
    times = take_turns(parts, 4, CPU)
    assert [len(measured) for measured in times.values()] == [4, 4, 4]
    assert order[:9] == ["ours", "other", "third", "other", "third", "ours", "third", "ours", "other"]
    rows = rows_of({"ours": [10.0, 100.0, 10.0], "other": [20.0, 150.0, 30.0]}, {"other": 1e-7})
    assert rows["ours"] == {"step_ms": 10.0}
    assert rows["other"] == {"step_ms": 30.0, "ratio": 2.0, "quartiles": [1.75, 2.5], "difference": 1e-7}


def test_a_call_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "SHAPES", SHAPES)
    assert families.main(["--case", "gpt2", "bert", "--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "families.json").read_text())
    ratio = rows["bert"]["eager"]["transformers"]["ratio"]
    assert ratio > 0 and rows["gpt2"]["eager"].keys() == {"ours", "transformers"}
    printed = re.search(r"bert, transformers: .* ms a step, ([\d.]+) times ours", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(ratio, abs=0.01)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no model\.py"):
        families.main(["--nanogpt", str(tmp_path)])
    with pytest.raises(UserError, match="--rounds 1"):
        families.main(["--rounds", "1"])
