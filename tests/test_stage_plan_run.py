"""Does a file with stages run like its stages one by one, and go on where it was interrupted, on one rank or two?

Each run is a fork of the test process, which has imported torch: seconds less than a new interpreter.
"""

import hashlib
import json
import random
import signal
from argparse import Namespace
from pathlib import Path

import pytest

from tests.forked import Forked, start_ranks, wait_for
from tests.tiers import grid
from tools import merge

WORDS = ["the", "of", "and", "model", "token", "loss", "gradient", "learns", "reads", "writes", "a", "small"]
SHARED = """
save_dir = "{folder}/run"
batch_size = 4
eval_interval = 0
log_interval = 1
learning_rate = 1e-3
keep_checkpoints = 0
"""
PRETRAIN = """
[[stages]]
data_dir = "{data}"
hidden_size = 32
num_layers = 2
num_heads = 2
max_length = 96
max_steps = 6
sample_prompt = ""
"""
SFT = """
[[stages]]
name = "answers"
stage = "sft"
lora = true
train_data = "{folder}/answers.jsonl"
max_steps = 40
"""
DPO = """
[[stages]]
stage = "dpo"
train_data = "{folder}/pairs.jsonl"
max_steps = 5
"""
LAST = {"1_pretrain": 6, "2_answers": 40, "3_dpo": 5}


@pytest.fixture
def run(tmp_path):
    """Runs train.py to its end."""
    return lambda *words: Forked(tmp_path / "streams", list(words)).wait()


@pytest.fixture(scope="module")
def write_plan(tiny_data):
    """Writes a plan of the parts, with its examples, into a folder; what it trains goes to folder/run."""

    def write(folder: Path, *parts: str) -> Path:
        folder.mkdir(exist_ok=True)
        answers, pairs = [], []
        for i in range(12):
            prompt = " ".join(WORDS[(i + j) % 12] for j in range(3))
            answer, other = (" ".join(WORDS[(i * k + j) % 12] for j in range(2 + i % 4)) for k in (5, 7))
            answers.append({"prompt": prompt, "completion": answer})
            pairs.append({"prompt": prompt, "chosen": answer, "rejected": other + " a"})
        for name, rows in (("answers", answers), ("pairs", pairs)):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text = (SHARED + "".join(parts)).replace("{folder}", str(folder)).replace("{data}", str(tiny_data))
        (folder / "plan.toml").write_text(text)
        return folder / "plan.toml"

    return write


@pytest.fixture(scope="module")
def whole(write_plan, tmp_path_factory) -> Path:
    """The folder of a plan of three stages that ran without a break."""
    folder = tmp_path_factory.mktemp("whole")
    ended = Forked(folder / "streams", ["--config", write_plan(folder, PRETRAIN, SFT, DPO)]).wait()
    assert ended.code == 0, ended.out + ended.err
    (folder / "said").write_text(ended.out)
    return folder


def digests(run_folder: Path) -> dict[str, str]:
    """Of the tensors in the last checkpoint of each stage."""
    found = {}
    for stage, step in LAST.items():
        for path in sorted((run_folder / stage / f"checkpoint_step_{step}").glob("*.safetensors")):
            found[f"{stage}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def options_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())["options"]


def steps(stage: Path) -> int:
    """How many training steps metrics.jsonl holds."""
    path = stage / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_plan_is_its_stages_one_by_one_bit_for_bit(whole, run, tmp_path, tiny_data):
    def single(name: str, *flags: object) -> None:
        shared = [
            "--batch_size",
            4,
            "--eval_interval",
            0,
            "--log_interval",
            1,
            "--keep_checkpoints",
            0,
            "--learning_rate",
        ]
        ended = run("--save_dir", tmp_path / name, *shared, 1e-3, *flags)
        assert ended.code == 0, ended.err

    size = ["--hidden_size", 32, "--num_layers", 2, "--num_heads", 2, "--max_length", 96, "--sample_prompt", ""]
    single("1_pretrain", "--data_dir", tiny_data, *size, "--max_steps", 6)
    base = tmp_path / "1_pretrain"
    answers = ["--stage", "sft", "--train_data", whole / "answers.jsonl", "--lora", "--max_steps", 40]
    single("2_answers", "--init_from", base, *answers)
    merged, base, adapter = (tmp_path / name for name in ("merged", f"{base}/checkpoint_step_6", "2_answers"))
    merge.main(Namespace(
        base=base, adapter=adapter / "checkpoint_step_40", output=merged, dtype=None, merge_into="auto",
    ))  # fmt: skip
    single("3_dpo", "--init_from", merged, "--stage", "dpo", "--train_data", whole / "pairs.jsonl", "--max_steps", 5)
    assert digests(tmp_path) == digests(whole / "run") and len(digests(tmp_path)) == 6


def test_what_is_said_and_recorded(whole):
    said = (whole / "said").read_text()
    run = whole / "run"
    headings = [f"stage {number} of 3 ({name}): {run}/{number}_{name}\n" for number, name in (
        (1, "pretrain"), (2, "answers"), (3, "dpo"),
    )]  # fmt: skip
    assert [said.index(heading) for heading in headings] == sorted(said.index(heading) for heading in headings)
    assert f"{run}/2_answers/merged: {run}/2_answers/checkpoint_step_40 merged into" in said
    assert options_of(run / "2_answers/checkpoint_step_40")["init_from"] == f"{run}/1_pretrain/checkpoint_step_6"
    assert options_of(run / "3_dpo/checkpoint_step_5")["init_from"] == f"{run}/2_answers/merged"
    origins = json.loads((run / "2_answers/run.json").read_text())["origins"]
    assert {origins[name] for name in ("lora", "learning_rate", "init_from", "save_dir")} == {"config file"}
    assert origins["schedule"] == "stage"


def test_the_stage_after_a_reward_stage_starts_where_that_started(write_plan, run, tmp_path):
    reward = DPO.replace('"dpo"', '"reward"').replace("= 5", "= 1")
    plan = write_plan(tmp_path / "plan", PRETRAIN.replace("= 6", "= 1"), reward, DPO.replace("= 5", "= 1"))
    ended = run("--config", plan)
    assert ended.code == 0, ended.err
    started_from = [
        options_of(tmp_path / f"plan/run/{stage}/checkpoint_step_1")["init_from"] for stage in ("2_reward", "3_dpo")
    ]
    assert started_from == [str(tmp_path / "plan/run/1_pretrain/checkpoint_step_1")] * 2


def test_the_command_line_wins_and_its_save_dir_is_the_root(whole, run, tmp_path):
    ended = run("--config", whole / "plan.toml", "--save_dir", tmp_path / "other", "--max_steps", 2)
    assert ended.code == 0, ended.err
    assert sorted(path.parent.name for path in (tmp_path / "other").glob("*/checkpoint_step_2")) == sorted(LAST)
    run_json = json.loads((tmp_path / "other/2_answers/run.json").read_text())
    assert run_json["origins"]["max_steps"] == "command line" and run_json["max_steps"] == 2


# ---- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", grid([signal.SIGTERM, signal.SIGKILL], quick=[signal.SIGKILL]), ids=lambda number: number.name
)
def test_interrupted_in_the_middle_and_resumed_is_the_run_without_a_break(whole, write_plan, run, tmp_path, number):
    plan = write_plan(tmp_path / "plan", PRETRAIN, SFT + "save_interval = 7\n", DPO)
    out = tmp_path / "plan/run"
    process = Forked(tmp_path / "killed", ["--config", plan])
    moment = random.Random().randint(8, 25)  # on purpose another one each time: no moment may matter
    wait_for(lambda: steps(out / "2_answers") >= moment)
    process.send(number)
    ended = process.wait()
    assert not (out / "3_dpo").exists() and not (out / "2_answers/checkpoint_step_40").exists()
    if number == signal.SIGTERM:
        assert ended.code == 143 and "Traceback" not in ended.err
        assert "go on with the same command and --checkpoint latest" in ended.out
        assert json.loads((out / "2_answers/status.json").read_text())["state"] == "stopped"
    resumed = run("--config", plan, "--checkpoint", "latest")
    assert resumed.code == 0, resumed.err
    assert f"stage 1 of 3 (pretrain): finished already, {out}/1_pretrain/checkpoint_step_6" in resumed.out
    assert f"resumed from {out}/2_answers/checkpoint_step_" in resumed.out
    assert digests(out) == digests(whole / "run")


def test_a_finished_plan_is_left_as_it_is(whole, run):
    before = {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*") if path.is_file()}
    ended = run("--config", whole / "plan.toml", "--checkpoint", "latest")
    assert ended.code == 0 and ended.out.count("finished already") == len(ended.out.splitlines()) == 3
    after = {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*") if path.is_file()}
    del before[whole / "run/.lock"], after[whole / "run/.lock"]
    assert after == before


def test_a_signal_in_the_last_evaluation_of_a_stage_stops_the_plan_before_the_next(write_plan, run, tmp_path):
    endless = 'sample_prompt = "the"\nsample_tokens = 3000\n'
    plan = write_plan(tmp_path / "plan", PRETRAIN.replace('sample_prompt = ""\n', endless), DPO)
    out = tmp_path / "plan/run"
    process = Forked(tmp_path / "stopped", ["--config", plan])
    status = out / "1_pretrain/status.json"
    wait_for(lambda: status.exists() and json.loads(status.read_text())["state"] == "sampling")
    process.send(signal.SIGTERM)
    assert process.wait().code == 143
    assert json.loads(status.read_text())["state"] == "finished" and not (out / "2_dpo").exists()
    resumed = run("--config", plan, "--checkpoint", "latest")
    assert resumed.code == 0 and "stage 1 of 2 (pretrain): finished already" in resumed.out, resumed.err
    assert (out / "2_dpo/checkpoint_step_5").is_dir()


def test_a_stage_that_fails_stops_the_plan_with_its_sentence(write_plan, run, tmp_path):
    plan = write_plan(tmp_path / "plan", PRETRAIN, DPO.replace("pairs", "answers"), DPO)
    ended = run("--config", plan)
    assert ended.code == 2 and ended.err.startswith("error: --train_data holds chat examples"), ended.err
    assert ended.err.count("\n") == 1 and not (tmp_path / "plan/run/3_dpo").exists()
    assert f"stage 2 of 3 (dpo): {tmp_path}/plan/run/2_dpo" in ended.out


def test_a_plan_that_was_begun_is_not_begun_again_unasked(whole, run):
    before = digests(whole / "run")
    ended = run("--config", whole / "plan.toml")
    assert ended.code == 2 and "--checkpoint latest" in ended.err and digests(whole / "run") == before


@pytest.mark.exhaustive
def test_a_stage_that_goes_on_makes_what_was_built_on_it_an_error(write_plan, run, tmp_path):
    plan = write_plan(tmp_path / "plan", PRETRAIN, SFT.replace("40", "2"), DPO.replace("5", "1"))
    out = tmp_path / "plan/run"
    assert run("--config", plan).code == 0
    text = plan.read_text()
    plan.write_text(text.replace("max_steps = 2", "max_steps = 3"))
    ended = run("--config", plan, "--checkpoint", "latest")  # the merged model is not that of the adapters any more
    assert ended.code == 2 and f"{out}/2_answers/merged was made of checkpoint_step_2" in ended.err
    plan.write_text(text.replace("max_steps = 6", "max_steps = 7"))
    ended = run("--config", plan, "--checkpoint", "latest")
    assert ended.code == 2 and f"was trained from {out}/1_pretrain/checkpoint_step_6" in ended.err


# ---- two ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks_run_the_plan_and_stop_together_where_one_of_them_was_told_to(whole, write_plan, tmp_path):
    """Losses to 1e-4: sums of fp32 in another order, some 1e-7 a step, over three stages."""
    plan = write_plan(tmp_path / "plan", PRETRAIN, SFT, DPO)
    out = tmp_path / "plan/run"
    ranks = start_ranks(tmp_path, "--config", plan)
    wait_for(lambda: steps(out / "2_answers") >= 5)
    ranks[1].send(signal.SIGTERM)
    ended = [rank.wait() for rank in ranks]
    assert [one.code for one in ended] == [143, 143], ended[0].err + ended[1].err
    assert not (out / "3_dpo").exists()
    resumed = [rank.wait() for rank in start_ranks(tmp_path, "--config", plan, "--checkpoint", "latest")]
    assert [one.code for one in resumed] == [0, 0], resumed[0].err + resumed[1].err
    assert "finished already" in resumed[0].out and "stage" not in resumed[1].out
    for stage, last in LAST.items():
        losses = []
        for folder in (out, whole / "run"):
            rows = map(json.loads, (folder / stage / "metrics.jsonl").read_text().splitlines())
            losses.append({row["step"]: row["loss"] for row in rows if "loss" in row})
        assert losses[0].keys() == losses[1].keys() == set(range(1, last + 1))
        assert max(abs(losses[0][step] - losses[1][step]) for step in losses[0]) < 1e-4
