"""Does --profile show where the time of some steps goes, and change nothing else? And when is garbage looked for?"""

import gc
import gzip
import hashlib
import json

import pytest

from tests.forked import Forked, start_ranks
from training.garbage import collect_garbage, own_collection

OPTIONS = (
    "--hidden_size 32 --num_layers 1 --num_heads 2 --batch_size 4 --warmup_steps 2 --max_steps 12 --eval_interval 0 "
    "--log_interval 4 --device cpu"
)
FLAGS = [*OPTIONS.split(), "--sample_prompt", ""]


@pytest.fixture
def words(tiny_data):
    return [*FLAGS, "--data_dir", tiny_data]


def test_a_profile_is_a_trace_and_a_table_a_rank_and_costs_no_bits(words, tmp_path):
    ended = [one.wait() for one in start_ranks(tmp_path, *words, "--save_dir", tmp_path / "run", "--profile", 5)]
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert "profile of 5 steps" in ended[0].out and "profile of" not in ended[1].out
    for rank in (0, 1):
        with gzip.open(tmp_path / f"run/profile/trace_rank_{rank}.json.gz") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        assert len({name for name in names if name.startswith("ProfilerStep#")}) == 5
        table = (tmp_path / f"run/profile/operators_rank_{rank}.txt").read_text()
        assert "Self CPU" in table and "Optimizer.step#Muon.step" in table and "aten::" in table
    plain = [one.wait() for one in start_ranks(tmp_path, *words, "--save_dir", tmp_path / "plain")]
    assert [one.code for one in plain] == [0, 0]
    weights = [tmp_path / name / "checkpoint_step_12/model.safetensors" for name in ("run", "plain")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 1
    assert not (tmp_path / "plain/profile").exists()


@pytest.mark.exhaustive
def test_a_run_that_is_too_short_says_so_and_one_that_goes_on_is_not_profiled_again(words, tmp_path):
    ended = Forked(tmp_path / "streams", [*words, "--save_dir", tmp_path / "run", "--profile", 10]).wait()
    assert ended.code != 0 and "this run has 12 left" in ended.err and "Traceback" not in ended.err
    ended = Forked(tmp_path / "streams", [*words, "--save_dir", tmp_path / "again", "--profile", 9]).wait()
    assert ended.code == 0, ended.err
    more = ["--save_dir", tmp_path / "again", "--checkpoint", "latest", "--max_steps", 13]
    ended = Forked(tmp_path / "streams", more).wait()
    assert ended.code == 0, ended.err  # one step is left, which would be too short


def test_garbage_is_looked_for_between_steps_alone():
    """A cycle made in a step lives until the run looks, and what was alive at the first look is left alone from then on."""
    assert gc.isenabled()
    looks = []
    gc.callbacks.append(lambda phase, _: looks.append(phase) if phase == "start" else None)
    try:
        with own_collection():
            cycles = [[] for _ in range(200_000)]  # many times what starts a collection by itself
            for cycle in cycles:
                cycle.append(cycle)
            assert not looks
            for steps in range(1, 26):
                collect_garbage(steps)
            assert len(looks) == 3 and gc.get_freeze_count() > 200_000
    finally:
        gc.callbacks.pop()
    assert gc.isenabled() and gc.get_freeze_count() == 0
