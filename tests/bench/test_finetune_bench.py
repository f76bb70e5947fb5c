"""Does bench/finetune.py put the same work before both sides, and report what was measured?

On a model and examples small enough for a CPU; transformers, peft and bitsandbytes where they are installed.
"""

import json
import mmap
import sys

import numpy as np
import pytest
import torch

from batches.micro_batch import IGNORE_INDEX
from bench import finetune, finetune_data
from bench.finetune import measure, peak_gib, ratios, reset_peak
from bench.finetune_data import Settings, in_one_row, made_up, padded
from errors import UserError
from training.examples_data import pack_examples

CPU = torch.device("cpu")
SETTINGS = Settings(
    model=None, data=None, steps=4, batch_size=4, micro_batch_size=2, max_length=64, mixed_precision="none"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with a Llama of two layers, whose widths are multiples of NF4's 64."""
    made = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_data, "SMALL", finetune_data.llama(64, 128, 2, 4, 2, 256))
        finetune_data.write_random_model(made)
    return made


@pytest.fixture(scope="module")
def ours(folder):
    return {task: measure(task, "ours", SETTINGS, folder) for task in finetune.TASKS}


@pytest.mark.parametrize("way", ["peft", "peft packed"])
@pytest.mark.parametrize("task", finetune.TASKS)
def test_both_sides_start_from_the_same_adapters_and_learn_the_same(task, way, ours, folder):
    """Losses of fp32 steps, the sums in another order: 1e-5 apart at most; bitsandbytes' scales differ in some bytes."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    if task == "qlora":
        pytest.importorskip("bitsandbytes")
    theirs = measure(task, way, SETTINGS, folder)
    own = ours[task]
    assert theirs["tokens"] == own["tokens"]
    assert theirs["first_loss"] == pytest.approx(own["first_loss"], rel=1e-5 if task == "lora" else 1e-4)
    assert theirs["loss"] == pytest.approx(own["loss"], rel=1e-5 if task == "lora" else 1e-4)


def test_the_steps_learn(ours, folder):
    """On the same examples again and again the loss falls, so equal losses are not those of steps that did nothing."""
    first = SETTINGS.batch_size
    again = Settings(**{**SETTINGS.__dict__, "steps": 12})
    examples = made_up(first, SETTINGS.max_length, 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "sequences_of", lambda *_: examples * again.steps)
        row = measure("lora", "ours", again, folder)
    assert row["first_loss"] - row["loss"] > 1e-3


def targets_of(batches):
    """Every (token, its target) that is learned, in order."""
    pairs = []
    for batch in batches:
        learned = batch.targets != IGNORE_INDEX
        pairs += zip(batch.input_ids[learned].tolist(), batch.targets[learned].tolist(), strict=True)
    return pairs


def test_every_layout_holds_the_same_targets_and_counts_the_same_tokens():
    examples = made_up(9, 64, 256)
    packed = pack_examples([[example] for example in examples], 64, 2)
    layouts = [packed, [in_one_row(batch) for batch in packed], padded(examples, 2)]
    wanted = [
        (int(example.tokens[i]), int(example.tokens[i + 1]))
        for example in examples
        for i in np.flatnonzero(example.learned[1:])
    ]
    for batches in layouts:
        assert sorted(targets_of(batches)) == sorted(wanted)
        assert sum(batch.weight for batch in batches) == len(wanted)
        assert sum(batch.num_tokens for batch in batches) == sum(len(example.tokens) for example in examples)


def test_padded_rows_are_as_wide_as_the_longest_of_their_micro_batch_alone():
    examples = made_up(9, 64, 256)
    widths = [max(len(row.tokens) for row in examples[first : first + 2]) for first in range(0, 9, 2)]
    assert [batch.input_ids.shape[1] for batch in padded(examples, 2)] == widths
    assert (padded(examples, 2)[0].sequence_ids[0] == 0).sum() == len(examples[0].tokens)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak, and lets it reset it")
def test_the_peak_of_memory_is_that_since_the_reset():
    """64 MiB that were touched and freed before the reset do not count, those after it do. Pages straight from the system:
    an allocator may hold on to freed ones, or have some to give away."""

    def touched() -> mmap.mmap:
        pages = mmap.mmap(-1, 2**26)
        pages.write(b"x" * 2**26)
        return pages

    with touched():
        before = peak_gib(CPU)
    reset_peak(CPU)
    start = peak_gib(CPU)
    assert start < before - 0.05
    with touched():
        assert peak_gib(CPU) - start > 0.05
    assert peak_gib(CPU) - start > 0.05


def test_a_peer_that_is_not_installed_is_said(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it raises ImportError
    row = measure("lora", "peft", SETTINGS, folder)
    assert "peft" in row["skipped"]
    assert finetune.describe(row).startswith("left out: ")
    assert ratios({"ours": {"tokens_s": 2.0, "processor_ms": 1.0, "peak_gib": None, "loss": 1.0}, "peft": row}) == []


def test_ratios_are_ours_over_theirs():
    ours, theirs = (
        {"tokens_s": 300.0, "processor_ms": 7.0, "peak_gib": 1.0, "loss": 2.0},
        {"tokens_s": 200.0, "processor_ms": 10.0, "peak_gib": 4.0, "loss": 2.5},
    )
    (sentence,) = ratios({"peft": theirs, "ours": ours})
    assert sentence == (
        "ours / peft: 1.50 times the tokens/s, 0.70 times the processor's time, 0.25 times the memory of the steps, "
        "last loss -5.0e-01"
    )


def test_a_call_writes_its_rows_and_a_second_one_measures_nothing_again(tmp_path, folder, capsys):
    flags = ["--model", str(folder), "--task", "lora", "--ways", "ours", "--steps", "3", "--batch_size", "2"]
    flags += ["--max_length", "64", "--out", str(tmp_path)]
    assert finetune.main(flags) == 0
    first = (tmp_path / "finetune.json").read_text()
    (runs,) = json.loads(first)["runs"].values()
    row = runs["lora"]["ours"]
    assert row["tokens_s"] > 0 and row["loss"] > 0
    assert "lora ours: " in capsys.readouterr().out
    assert finetune.main(flags) == 0
    assert (tmp_path / "finetune.json").read_text() == first


def test_a_way_that_fails_is_recorded_with_its_reason_and_stops_no_other(tmp_path, folder, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    flags = ["--model", str(broken), "--task", "lora", "--ways", "ours", "--steps", "3", "--out", str(tmp_path)]
    assert finetune.main(flags) == 0
    assert "failed: " in capsys.readouterr().out


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="--steps 2"):
        finetune.main(["--steps", "2"])
    with pytest.raises(UserError, match="--data needs --model"):
        finetune.main(["--data", "answers.jsonl"])
