"""Does --spike_guard leave out what spikes and nothing else, on all ranks alike, and go on without the data that did it?

The loss of chosen samples is multiplied, in a loss file of the kind that a user writes.
"""

import hashlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from batches.sampler import hash_key
from ranks import Ranks
from tests.forked import Ended, Forked, start_ranks, wait_for
from tests.tiers import grid
from training.optimizers import OPTIMIZERS
from training.spike_guard import MIN_STEPS, WINDOW, SpikeGuard, position

BATCH = 8
SIZES = f"--hidden_size 32 --num_layers 1 --num_heads 2 --batch_size {BATCH} --learning_rate 3e-3 --warmup_steps 4"
QUIET = "--eval_interval 0 --sample_prompt= --log_interval 5 --device cpu --keep_checkpoints 0 --spike_guard 6"

LOSS = """
KEYS = {keys}

def loss(model, batch, stage_loss):
    total, metrics = stage_loss(model, batch)
    factor = 1 + 2 * sum(key in KEYS for key in batch.columns["sample_key"].tolist())
    return total * factor, {{"loss": (total.detach() * factor, batch.weight)}}
"""


@pytest.fixture
def flags(tiny_data, tmp_path):
    """The flags of a run in which the samples of these steps, from 0, spike."""

    def of(*steps: int) -> list[str]:
        keys = {hash_key(0, sample) >> 1 for step in steps for sample in range(step * BATCH, (step + 1) * BATCH)}
        (tmp_path / "mine.py").write_text(LOSS.format(keys=keys))
        return f"--data_dir {tiny_data} {SIZES} {QUIET} --loss_file {tmp_path / 'mine.py'}:loss".split()

    return of


def events(save_dir: Path, kind: str) -> list[dict]:
    path = save_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row.get("event") == kind]


def digests(checkpoint: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.glob("*.safetensors")}


def state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


WAYS = [*((optimizer, "") for optimizer in OPTIMIZERS), ("muon", "--mixed_precision fp16")]


@pytest.mark.parametrize(("optimizer", "more"), grid(WAYS, [("muon", "")]))
def test_a_spike_changes_no_bit_and_says_what_it_learned_from(optimizer, more, flags, tmp_path):
    run = tmp_path / "run"
    ema = "" if optimizer == "schedule_free" else "--ema 0.9"
    words = f"--optimizer {optimizer} {ema} {more} --save_interval 40 --max_steps 41".split()
    assert Forked(tmp_path / "0", [*flags(40), *words, "--save_dir", run]).wait().code == 0
    assert digests(run / "checkpoint_step_40") == digests(run / "checkpoint_step_41")
    (spike,) = events(run, "spike")
    assert spike["step"] == 41 and spike["loss"] > spike["loss_bound"]
    assert spike["documents"] and all("documents.jsonl, byte " in place for place in spike["documents"])
    assert state(run / "checkpoint_step_41")["spike_guard"]["accepted"] == 40


@pytest.mark.parametrize("strategy", grid(["ddp", "fsdp"], []))
def test_after_several_the_run_goes_back_once_and_passes_over_their_data_on_any_number_of_ranks(
    strategy, flags, tmp_path
):
    given = [*flags(*range(43, 50)), "--save_interval", 20, "--max_steps", 60]

    def told(save_dir: Path, ended: list[Ended]) -> tuple:
        assert [one.code for one in ended] == [0] * len(ended), ended[0].err
        assert f"going back to {save_dir / 'checkpoint_step_40'}" in ended[0].out
        last = state(save_dir / "checkpoint_step_60")
        assert last["skipped"] == [[43 * BATCH, 50 * BATCH]] and last["samples_consumed"] == 67 * BATCH
        rows = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["loss"] for row in rows if "lr" in row}  # of two of a step the later one counts
        assert max(losses.values()) < 7, "nothing that spiked was learned from when the run went on"
        return [(row["step"], row["documents"]) for row in events(save_dir, "spike")], losses

    one, two = tmp_path / "one", tmp_path / "two"
    alone = told(one, [Forked(tmp_path / "0", [*given, "--save_dir", one]).wait()])
    ranks = start_ranks(tmp_path, *given, "--save_dir", two, "--strategy", strategy)
    both = told(two, [rank.wait() for rank in ranks])
    assert [step for step, _ in alone[0]] == list(range(44, 51)) and alone[0] == both[0]
    assert alone[1] == pytest.approx(both[1], rel=1e-4)


@pytest.mark.parametrize("moment", grid([42, 46, 53], [46]))
def test_killed_around_a_spike_and_resumed_equals_never_killed(moment, flags, tmp_path):
    given = [*flags(36, *range(43, 50)), "--save_interval", 7, "--max_steps", 60, "--log_interval", 1]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Forked(tmp_path / "0", [*given, "--save_dir", whole]).wait().code == 0
    process = Forked(tmp_path / "1", [*given, "--save_dir", killed])
    metrics = killed / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and f'"step": {moment}' in metrics.read_text())
    process.send(signal.SIGKILL)
    process.wait()
    assert Forked(tmp_path / "1", [*given, "--save_dir", killed, "--checkpoint", "latest"]).wait().code == 0
    for step in (56, 60):
        name = f"checkpoint_step_{step}"
        assert digests(whole / name) == digests(killed / name)
        assert state(whole / name)["spike_guard"] == state(killed / name)["spike_guard"]
        assert state(whole / name)["skipped"] == state(killed / name)["skipped"] != []


@pytest.mark.parametrize(
    ("steps", "more", "reason"),
    [
        ([*range(43, 50), *range(57, 67)], ["--save_interval", 20], "though the run has gone back once before"),
        pytest.param(range(43, 50), [], "there is no checkpoint from before them", marks=pytest.mark.exhaustive),
    ],
    ids=["again", "nowhere"],
)
def test_where_it_cannot_go_back_it_stops_with_a_sentence(steps, more, reason, flags, tmp_path):
    given = [*flags(*steps), *more, "--max_steps", 80, "--save_dir", tmp_path / "run"]
    ended = Forked(tmp_path / "0", given).wait()
    assert ended.code == 2 and reason in ended.err and "look at the documents" in ended.err
    assert "Traceback" not in ended.err


def test_the_bound_is_that_of_the_steps_that_counted():
    """Against NumPy in float64, over more steps than the window holds; NaN and spikes never enter it."""
    guard = SpikeGuard(4.0, Ranks(0, 1, torch.device("cpu")))
    random = np.random.default_rng(0)
    kept: list[tuple[float, float]] = []
    for step in range(3 * WINDOW):
        loss, norm = 3 + random.normal() * 0.1, 1 + random.normal() * 0.05
        if step % 17 == 5:
            loss = [float("nan"), 30.0, float("inf")][step % 3]
        if step % 23 == 7:
            norm = [float("nan"), 10.0, float("inf")][step % 3]
        recent = np.array(kept[-WINDOW:])
        expected = bool(np.isfinite([loss, norm]).all())
        if len(kept) >= MIN_STEPS:
            expected &= bool(((loss, norm) <= recent.mean(0) + 4 * recent.std(0)).all())
        metrics = {"loss": (torch.tensor(loss) * 50, 50.0)}
        assert bool(guard.judge(metrics, torch.tensor(norm), None, step, 0)) == expected, step
        if expected:
            kept.append((loss, norm))
    assert 0 < int(guard.accepted) == len(kept) < 3 * WINDOW


def test_an_overflow_of_the_loss_scaler_neither_makes_nor_ends_a_row_of_spikes():
    guard = SpikeGuard(6.0, Ranks(0, 1, torch.device("cpu")))

    def judge(loss: float, norm: float) -> int:
        overflowed = ~torch.isfinite(torch.tensor(norm))
        guard.judge({"loss": (torch.tensor(loss), 1.0)}, torch.tensor(norm), overflowed, 0, 0)
        return int(guard.in_row)

    for step in range(MIN_STEPS):
        judge(2 + step % 2, 1 + step % 2)
    rows = [judge(99.0, 1.0), judge(2.0, float("inf")), judge(99.0, 1.0), judge(2.0, 1.0), judge(2.0, float("inf"))]
    assert rows == [1, 1, 2, 0, 0]


def test_no_batch_holds_a_sample_that_is_passed_over():
    """Also where the batch has another size than when they were found."""
    skipped = [(24, 40), (40, 48), (100, 108)]
    for batch in (4, 8, 12):
        samples, seen = position(0, batch, skipped), []
        while samples < 150:
            seen += range(samples, samples + batch)
            samples = position(samples + batch, batch, skipped)
        assert len(set(seen)) == len(seen) and not set(seen) & {*range(24, 48), *range(100, 108)}
        assert set(range(24)) - set(seen) <= set(range(24 - batch + 1, 24)) and 48 in seen
