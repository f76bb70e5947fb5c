"""Does a file with stages become the options of each stage, and is a wrong one a sentence that names the stage?"""

import json

import pytest

from errors import UserError
from training.config import resolve_config
from training.stage_plan import check_plan, finished_checkpoint, read_plan

PLAN = {
    "toml": """
save_dir = "out"
seed = 7
learning-rate = 3e-4
init_from = "base"

[[stages]]
stage = "sft"
train_data = "a.jsonl"
learning_rate = 1e-3

[[stages]]
name = "taste"
stage = "reward"
train_data = ["b.jsonl", "c.jsonl"]
seed = 8

[[stages]]
stage = "dpo"
train_data = "d.jsonl"
""",
    "yaml": """
save_dir: out
seed: 7
learning-rate: 3e-4
init_from: base
stages:
  - {stage: sft, train_data: a.jsonl, learning_rate: 1e-3}
  - name: taste
    stage: reward
    train_data: [b.jsonl, c.jsonl]
    seed: 8
  - {stage: dpo, train_data: d.jsonl}
""",
    "json": json.dumps({
        "save_dir": "out", "seed": 7, "learning-rate": 3e-4, "init_from": "base", "stages": [
            {"stage": "sft", "train_data": "a.jsonl", "learning_rate": 1e-3},
            {"name": "taste", "stage": "reward", "train_data": ["b.jsonl", "c.jsonl"], "seed": 8},
            {"stage": "dpo", "train_data": "d.jsonl"},
        ],
    }),
}  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    """Writes a file and reads it as a plan."""

    def make(text: str, suffix: str = "toml") -> list:
        file = tmp_path / f"plan.{suffix}"
        file.write_text(text)
        return read_plan(str(file))

    return make


@pytest.mark.parametrize("suffix", PLAN)
def test_a_stage_has_the_shared_options_and_its_own_over_them(plan, suffix):
    stages = plan(PLAN[suffix], suffix)
    shared = {"save_dir": "out"}
    assert [stage.options for stage in stages] == [
        shared | {"init_from": "base", "seed": 7, "learning_rate": 1e-3, "stage": "sft", "train_data": ["a.jsonl"]},
        shared | {"seed": 8, "learning_rate": 3e-4, "stage": "reward", "train_data": ["b.jsonl", "c.jsonl"]},
        shared | {"seed": 7, "learning_rate": 3e-4, "stage": "dpo", "train_data": ["d.jsonl"]},
    ]
    assert [stage.folder for stage in stages] == ["1_sft", "2_taste", "3_dpo"]
    assert stages[1].title == "stage 2 of 3 (taste)"
    assert [stage.gives_language_model for stage in stages] == [True, False, True]


def test_the_command_line_wins_in_every_stage_and_its_init_from_is_the_first_ones(plan):
    stages = plan(PLAN["toml"])
    flags = {"config": "plan.toml", "learning_rate": 0.5, "seed": 9, "init_from": "other"}
    given = [stage.given(flags) for stage in stages]
    assert [(one["learning_rate"], one["seed"], one.get("init_from")) for one in given] == [
        (0.5, 9, "other"), (0.5, 9, None), (0.5, 9, None),
    ]  # fmt: skip
    assert not any("config" in one for one in given)


@pytest.mark.parametrize(
    "flags,size", [({}, (256, 2)), ({"preset": "medium"}, (1024, 24)), ({"hidden_size": 64}, (64, 2))]
)
def test_presets_and_sizes_are_as_without_stages(plan, tmp_path, flags, size):
    """A preset of the file gives way to the file's sizes, both to a preset of the command line, as in a file of one run."""
    text = 'data_dir = "x"\npreset = "tiny"\nnum_layers = 2\n'
    (stage,) = plan(text + "[[stages]]\n")
    config, _ = resolve_config(stage.given(flags))
    (tmp_path / "single.toml").write_text(text)
    single, _ = resolve_config({"config": str(tmp_path / "single.toml"), **flags})
    assert (config.hidden_size, config.num_layers) == (single.hidden_size, single.num_layers) == size


def test_a_stage_with_a_start_of_its_own_keeps_it(plan):
    stages = plan('[[stages]]\n[[stages]]\nstage = "sft"\ninit_from = "elsewhere"\n')
    assert stages[1].given({})["init_from"] == "elsewhere"
    assert [stage.folder for stage in stages] == ["1_pretrain", "2_sft"]


@pytest.mark.parametrize("text,suffix", [("seed = 1", "toml"), ("seed: 1", "yaml"), ("{}", "json")])
def test_a_file_without_stages_is_no_plan(plan, text, suffix):
    assert plan(text, suffix) == []


@pytest.mark.parametrize(
    "text,words",
    [
        ('[[stages]]\n[[stages]]\nstage = "sft"\nlearning_rat = 1', ["stage 2 (sft)", "'learning_rat'", "learning_rate?"]),
        ('[[stages]]\nname = "first"\nnum_layers = 1.5', ["stage 1 (first)", "num_layers", "int", "1.5"]),
        ('[[stages]]\nstage = "sftt"', ["stage 1 (sftt)", "'sftt'", "did you mean sft?"]),
        ('learning_rat = 1\n[[stages]]\nstage = "sft"', ["plan.toml sets 'learning_rat'"]),
        ('[[stages]]\nsave_dir = "x"', ["stage 1 (pretrain)", "save_dir", "above"]),
        ('[[stages]]\ncheckpoint = "latest"', ["stage 1 (pretrain)", "checkpoint", "above"]),
        ('[[stages]]\ndevice = "cpu"', ["stage 1 (pretrain)", "device", "above"]),
        ('[[stages]]\nname = "a/b"', ["stage 1 (a/b)", "folder"]),
        ('[[stages]]\nname = ".."', ["stage 1 (..)", "folder"]),
        ("stages = []", ["stages", "list of tables"]),
        ("stages = 3", ["stages", "list of tables"]),
        ('stages = ["sft"]', ["stages", "list of tables"]),
        ("[[stages", ["not valid TOML"]),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_one_sentence_that_names_the_stage(plan, text, words):
    with pytest.raises(UserError) as caught:
        plan(text)
    message = str(caught.value)
    assert all(word in message for word in [*words, "plan.toml"]) and "\n" not in message, message


def test_a_missing_file_is_one_sentence():
    with pytest.raises(UserError, match=r"--config nowhere\.toml cannot be read"):
        read_plan("nowhere.toml")


def test_what_would_stop_a_later_stage_is_found_before_the_first(plan, tmp_path):
    for name in ("data", "a.jsonl"):
        (tmp_path / name).touch()
    good = f'data_dir = "{tmp_path}/data"'
    start = f'[[stages]]\n{good}\n[[stages]]\nstage = "sft"\n'
    check_plan(plan(start + f'train_data = "{tmp_path}/a.jsonl"'), {})
    wrong = {
        (start, ()): ["stage 2 of 2 (sft)", "--train_data is missing"],
        (start + 'train_data = "nowhere.jsonl"', ()): ["stage 2 of 2 (sft)", "nowhere.jsonl does not exist"],
        (start + f'train_data = "{tmp_path}/a.jsonl"\ndora = true', ()): ["stage 2 of 2 (sft)", "add --lora"],
        ('[[stages]]\nstage = "sft"\ntrain_data = "x"', ()): ["stage 1 of 1 (sft)", "--init_from is missing"],
        (start + f'train_data = "{tmp_path}/a.jsonl"\nsimpo_gamma = 1.0', ()): ["stage 2 of 2 (sft)", "--simpo_gamma"],
        (f"lora_r = 4\n[[stages]]\n{good}", ()): ["--lora_r", "none of them"],
        (f"[[stages]]\n{good}", (("group_size", 4),)): ["--group_size", "none of them"],
        (f"[[stages]]\n{good}", (("stage", "sft"),)): ["--stage cannot be given"],
        (f"[[stages]]\n{good}", (("checkpoint", "best"),)): ["--checkpoint best", "--checkpoint latest"],
        (f"[[stages]]\n{good}", (("num_heads", 7),)): ["stage 1 of 1 (pretrain)", "--num_heads 7"],
    }
    for (text, flags), words in wrong.items():
        with pytest.raises(UserError) as caught:
            check_plan(plan(text), dict(flags))
        assert all(word in str(caught.value) for word in words), (words, str(caught.value))


def test_a_stage_without_a_checkpoint_is_not_finished(tmp_path):
    assert finished_checkpoint({"save_dir": str(tmp_path / "none")}, follows=True) is None


# ---- the files that ship ---------------------------------------------------------------------------------------------


def test_the_full_pipeline_resolves_and_its_examples_are_there(root):
    stages = read_plan(str(root / "configs/full_pipeline.toml"))
    assert [stage.options["stage"] for stage in stages] == ["pretrain", "sft", "dpo"]
    for stage in stages[1:]:
        config, _ = resolve_config({**stage.given({}), "init_from": "the stage before"})
        assert all((root / file).is_file() for file in config.train_data)


def test_the_qlora_file_resolves(root):
    given = {"config": str(root / "configs/qlora_24gb.yaml"), "init_from": "model", "train_data": ["answers.jsonl"]}
    config, origins = resolve_config(given)
    assert (config.stage, config.lora, config.load_in_4bit, config.learning_rate) == ("sft", True, True, 2e-4)
    assert config.lora_target_modules == ["all-linear"] and config.batch_size < 32
    assert origins["learning_rate"] == "config file"
