"""Are the files that other tools' users have read as what they mean, on any number of ranks, or refused with the reason?"""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
import yaml

from errors import UserError
from training.config import TrainConfig, read_config_file, resolve_config
from training.foreign_config import GROUPS, NAMES, Only, Unused
from training.option_groups import SPECS
from training.stage_plan import check_plan, read_as, read_plan

FLAT = {
    "model_name_or_path": "base", "output_dir": "out", "dataset_name": "rows.jsonl", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "num_train_epochs": 2, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
    "bf16": True, "fp16": False, "gradient_checkpointing": True, "max_grad_norm": 0.5, "logging_steps": 7, "save_steps": 9,
    "eval_steps": 11, "eval_strategy": "steps", "save_total_limit": 2, "learning_rate": "2e-4", "weight_decay": 0.01,
    "adam_beta2": 0.99, "optim": "adamw_torch", "max_seq_length": 64, "seed": 5, "max_steps": -1, "report_to": "none",
    "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4", "trust_remote_code": False, "device_map": None, "packing": True,
    "attn_implementation": "sdpa", "assistant_only_loss": True, "save_strategy": "steps",
    "metric_for_best_model": "eval_loss", "greater_is_better": False,
}  # fmt: skip
NESTED = {
    "model": {"name": "base", "torch_dtype": "bfloat16", "trust_remote_code": False, "attn_implementation": "sdpa"},
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none", "task_type": "CAUSAL_LM"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "data": {"train_file": "rows.jsonl", "max_length": 64},
    "training": {
        name: FLAT[name] for name in (
            "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
            "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "logging_steps", "save_steps", "eval_steps",
            "save_total_limit", "learning_rate", "weight_decay", "adam_beta2", "optim", "seed", "assistant_only_loss",
            "gradient_checkpointing",
            "metric_for_best_model", "greater_is_better",
        )
    },
}  # fmt: skip
OURS = {
    "stage": "sft", "init_from": "base", "save_dir": "out", "train_data": ["rows.jsonl"], "batch_size": 8,
    "micro_batch_size": 4, "num_epochs": 2.0, "schedule": "cosine", "warmup_steps": 0.1, "mixed_precision": "bf16",
    "grad_clip": 0.5, "log_interval": 7, "save_interval": 9, "eval_interval": 11, "keep_checkpoints": 2,
    "learning_rate": 2e-4, "weight_decay": 0.01, "beta2": 0.99, "optimizer": "adamw", "max_length": 64, "seed": 5,
    "lora": True, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q_proj", "v_proj"], "load_in_4bit": True,
    "attention": "sdpa", "train_on": "assistant", "activation_checkpointing": "full",
    "best_metric": "eval_loss", "best_mode": "min",
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Writes a file and returns its path."""

    def write(content: dict, suffix: str = ".yaml") -> str:
        file = tmp_path / f"file{suffix}"
        file.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
        return str(file)

    return write


@pytest.mark.parametrize("content", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_of_theirs_is_the_run_of_our_flags(content, suffix, written):
    config, origins = resolve_config({"config": written(content, suffix), "stage": "sft"})
    expected, _ = resolve_config(OURS)
    assert config == expected
    assert origins["lora_r"] == "config file"
    assert resolve_config({"config": written(content, suffix), "stage": "sft", "lora_r": 2})[0].lora_r == 2


def test_the_names_are_those_that_the_tools_have():
    """Each name of the table is a field of a class of transformers', TRL's or PEFT's, or of the files that groups are in."""
    transformers, trl, peft = (pytest.importorskip(name) for name in ("transformers", "trl", "peft"))
    classes = [
        transformers.TrainingArguments, trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RewardConfig, trl.ModelConfig,
        trl.ScriptArguments, peft.LoraConfig,
    ]  # fmt: skip
    known = {spec.name for one in classes for spec in dataclasses.fields(one)}
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    ours = {alias for spec in SPECS.values() for alias in spec.aliases}  # of teaching scripts, see test_aliases.py
    missing = {*NAMES} - known - {*quantised} - ours
    elsewhere = {
        # of plans, and of what people write beside those classes
        "stage_type", "dataset_path", "train_file", "validation_file", "use_lora", "reward_model_path", "reward_funcs",
        "max_seq_length", "evaluation_strategy", "torch_dtype", "trust_remote_code", "device_map", "load_in_8bit",
        # of older versions of these classes
        "fp16", "warmup_ratio", "overwrite_output_dir", "logging_dir", "group_by_length", "use_cache", "use_rslora", "use_dora",
        # of TRL's PPO, which is not in its newest versions' main namespace
        "response_length", "kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "num_ppo_epochs",
        "num_mini_batches", "beta", "task_type", "bias", "log_level", "dataset_name",
    }  # fmt: skip
    assert missing <= elsewhere, missing - elsewhere


@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (2, 16), (3, 24)])
def test_the_batch_follows_from_the_ranks_and_is_said(ranks, batch, written, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    file = written(FLAT)
    config, _ = resolve_config({"config": file, "stage": "sft"})
    assert (config.batch_size, config.micro_batch_size) == (batch, 4)
    said = " ".join(read_as(file, "sft"))
    assert (
        f"per_device_train_batch_size 4 x {ranks} rank(s) x gradient_accumulation_steps 2: --batch_size {batch}" in said
    )
    assert "model_name_or_path is --init_from base" in said and "packing is not used: examples are packed" in said


def test_a_run_that_goes_on_keeps_its_batch_on_other_ranks(written, monkeypatch):
    file = written(FLAT)
    saved = dataclasses.asdict(resolve_config({"config": file, "stage": "sft"})[0])
    monkeypatch.setenv("WORLD_SIZE", "4")
    config, _ = resolve_config({"config": file, "stage": "sft"}, saved)
    assert (config.batch_size, config.micro_batch_size) == (8, 4)
    assert resolve_config({"config": file, "stage": "sft", "batch_size": 12}, saved)[0].batch_size == 12


def test_names_that_mean_another_option_in_each_stage(written):
    common = {"model_name_or_path": "base", "train_file": "rows.jsonl", "beta": 0.04, "per_device_train_batch_size": 16}
    dpo, _ = resolve_config({"config": written({**common, "loss_type": "ipo"}), "stage": "dpo"})
    assert (dpo.dpo_beta, dpo.dpo_loss, dpo.batch_size) == (0.04, "ipo", 16)
    more = {"loss_type": "dapo", "num_generations": 4, "max_completion_length": 32, "reward_funcs": "numeric_answer"}
    grpo, _ = resolve_config({"config": written({**common, **more}), "stage": "grpo"})
    assert (grpo.kl_coefficient, grpo.grpo_loss, grpo.group_size, grpo.max_new_tokens) == (0.04, "dapo", 4, 32)
    assert grpo.batch_size == 4  # prompts: TRL counts their answers
    with pytest.raises(UserError, match="no whole groups of 3"):
        resolve_config({"config": written({**common, **more, "num_generations": 3}), "stage": "grpo"})
    with pytest.raises(UserError, match="beta is dpo_beta of dpo or kl_coefficient of grpo, and the stage is sft"):
        resolve_config({"config": written(common), "stage": "sft"})


@pytest.mark.parametrize(("value", "log_to"), [("none", []), (["none"], []), ("csv", ["csv"]), (["csv"], ["csv"])])
def test_report_to_is_log_to(written, value, log_to):
    config, _ = resolve_config({"config": written(FLAT | {"report_to": value}), "stage": "sft"})
    assert config.log_to == log_to


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"device_map": "auto"}, "device_map auto cannot be done: a model is not spread over devices"),
        ({"trust_remote_code": True}, "trust_remote_code true cannot be done: no code"),
        ({"model": {"trust_remote_code": True}}, "trust_remote_code true cannot be done"),
        ({"quantization": {"bnb_4bit_quant_type": "fp4"}}, "bnb_4bit_quant_type fp4 cannot be done"),
        ({"lora": {"bias": "all"}}, "bias all cannot be done: adapters have no biases"),
        ({"report_to": ["comet_ml"]}, "log_to is 'comet_ml', not one of tensorboard, wandb"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type greedy cannot be done; known are cosine"),
        ({"optim": "rmsprop"}, "optim rmsprop cannot be done"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"torch_dtype": "int8"}, "torch_dtype int8 cannot be done"),
        ({"bf16": True, "mixed_precision": "fp16"}, "disagree"),
        ({"warmup_ratio": 3}, "warmup_ratio is 3"),
        ({"eval_strategy": "epoch"}, "eval_strategy epoch cannot be done"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"per_device_train_batch_size": 4, "batch_size": 8}, "both say how large a batch is"),
        ({"logging_steps": 5, "log_interval": 6}, "log_interval and logging_steps both set"),
        ({"logging_steps": 5, "training": {"logging_steps": 6}}, "logging_steps is given twice"),
        ({"output_dir": "x", "loging_steps": 5}, "did you mean logging_steps"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(content, sentence, written):
    with pytest.raises(UserError, match=sentence) as caught:
        resolve_config({"config": written({"model_name_or_path": "base", **content}), "stage": "sft"}, validate=False)
    assert "\n" not in str(caught.value)


def test_what_is_the_case_anyway_is_accepted(written):
    for name, rule in NAMES.items():
        values = rule.accepted if isinstance(rule, Only) else (1,) if isinstance(rule, Unused) else ()
        for value in values:
            content = {"output_dir": "out", name: list(value) if isinstance(value, tuple) else value}
            assert read_config_file(written(content)) == {"save_dir": "out"}


def test_a_group_beside_our_own_names(written):
    content = {"init_from": "base", "train_data": "rows.jsonl", "lora": {"r": 4}}
    config, _ = resolve_config({"config": written(content), "stage": "sft"})
    assert (config.lora, config.lora_r, config.init_from) == (True, 4, "base")
    ours, _ = resolve_config({"config": written(content | {"lora": True}), "stage": "sft"})
    assert (
        ours.lora is True
        and ours.lora_r == TrainConfig().lora_r
        and read_as(written(content | {"lora": True}), "sft") == []
    )


@pytest.mark.parametrize(("steps", "expected"), [(0, 0.1), (30, 30)])
def test_warm_up_steps_win_over_the_ratio_where_there_are_some(steps, expected, written):
    transformers = pytest.importorskip("transformers")
    content = {"model_name_or_path": "base", "train_file": "rows.jsonl", "max_steps": 200, "warmup_ratio": 0.1}
    config, _ = resolve_config({"config": written(content | {"warmup_steps": steps}), "stage": "sft"})
    theirs = transformers.TrainingArguments(warmup_steps=expected, output_dir="out")
    assert config.warmup_steps == expected and config.resolved_warmup_steps == theirs.get_warmup_steps(200)


def test_adapters_that_are_off_say_nothing(written):
    content = {"model": {"name": "base", "use_lora": False, "lora_config": {"r": 4}}, "train_file": "rows.jsonl"}
    config, _ = resolve_config({"config": written(content), "stage": "sft"})
    assert config.lora is False and config.lora_r == TrainConfig().lora_r
    content = {
        "model": {"name": "base", "lora_config": {"r": 4}},
        "train_file": "rows.jsonl",
    }  # and on, where it is not said
    assert resolve_config({"config": written(content), "stage": "sft"})[0].lora is True


PLAN = """
task_name = "llama2_sft_dpo"
seed = 42
[model]
model_name_or_path = "base"
dtype = "bfloat16"
use_lora = true
load_in_4bit = true
[model.lora_config]
r = 16
lora_alpha = 32
[datasets.sft]
dataset_path = "FILE"
max_length = 2048
question_column = "x"
[datasets.pairs]
dataset_path = "FILE"
prompt_column = "question"
[[stages]]
stage_type = "sft"
stage_name = "sft"
num_train_epochs = 3
per_device_train_batch_size = 4
gradient_accumulation_steps = 4
[[stages]]
stage_type = "dpo"
stage_name = "taste"
dataset = "pairs"
dpo_beta = 0.1
[[stages]]
stage_type = "orpo"
stage_name = "more"
dataset_path = "FILE"
"""


def test_a_plan_of_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "rows.jsonl").write_text("")
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.replace("FILE", str(tmp_path / "rows.jsonl")).replace('question_column = "x"\n', ""))
    stages = read_plan(str(file))
    check_plan(stages, {})
    assert [stage.folder for stage in stages] == ["sft_stage", "taste_stage", "more_stage"]
    assert all(stage.timestamped and stage.options["save_dir"] == "runs/llm/llama2_sft_dpo" for stage in stages)
    sft, dpo, orpo = (resolve_config(stage.given({}), validate=False)[0] for stage in stages)
    assert (sft.stage, sft.init_from, sft.lora, sft.lora_r, sft.load_in_4bit) == ("sft", "base", True, 16, True)
    assert (sft.batch_size, sft.micro_batch_size, sft.num_epochs, sft.max_length) == (32, 4, 3.0, 2048)
    assert (sft.seed, sft.mixed_precision) == (42, "bf16")
    assert (dpo.stage, dpo.dpo_beta, dpo.init_from, dpo.rename_columns) == ("dpo", 0.1, None, ["question=prompt"])
    assert (orpo.stage, orpo.dpo_loss) == ("dpo", "orpo")
    said = read_as(str(file), None)
    assert any(
        "stage 1: per_device_train_batch_size 4 x 2 rank(s) x gradient_accumulation_steps 4" in line for line in said
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (('stage_type = "dpo"', 'stage_type = "dppo"'), "stage_type is 'dppo', not one of"),
        (('dataset = "pairs"', 'dataset = "pears"'), "dataset is 'pears', and there is no"),
        (('dataset = "pairs"\n', ""), r"has no data: name a file as dataset_path in it, or in \[datasets.taste\]"),
        (('stage_name = "taste"', 'stage_name = "sft"'), "two stages would be in the folder sft_stage"),
        (('task_name = "llama2_sft_dpo"', 'task_name = "../x"'), "task_name becomes a folder"),
        (("max_length = 2048", "max_lenth = 2048"), "'max_lenth', which is not an option, did you mean|did you mean"),
    ],
)
def test_a_plan_with_a_mistake_is_one_sentence(change, sentence, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    file = tmp_path / "plan.toml"
    text = PLAN.replace("FILE", str(tmp_path / "rows.jsonl")).replace('question_column = "x"\n', "")
    assert change[0] in text
    file.write_text(text.replace(*change))
    with pytest.raises(UserError, match=sentence) as caught:
        read_plan(str(file))
    assert "\n" not in str(caught.value)


def test_shipped_files_use_names_of_the_table(root):
    plan = tomllib.loads((root / "configs/task_plan.toml").read_text())
    flat = yaml.safe_load((root / "configs/transformers_names.yaml").read_text())
    assert {"task_name", "stages", "datasets"} <= plan.keys() and flat.keys() <= GROUPS.keys()
    assert Path(flat["data"]["train_file"]).name == "answers.jsonl"
