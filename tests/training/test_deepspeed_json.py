"""Is a DeepSpeed config understood as its owner means it, and is what is not here refused? Without DeepSpeed."""

import json
from pathlib import Path

import pytest

from errors import UserError
from training.config import of_launcher, resolve_config
from training.deepspeed_json import engine_settings, read_settings

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = {stage: str(ROOT / f"configs/deepspeed/zero{stage}.json") for stage in (2, 3)}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-8, "weight_decay": 0.05}}
DECAY = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 200, "warmup_min_lr": 0}}
COSINE = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "total_num_steps": 50, "cos_min_ratio": 0.1}}


def resolved(settings: dict | str, **given):
    named = settings if isinstance(settings, str) else json.dumps({"zero_optimization": {"stage": 2}} | settings)
    return resolve_config({"data_dir": ["data"], "deepspeed": named, **given})


@pytest.mark.parametrize("stage", SHIPPED)
def test_the_shipped_configs_leave_all_numbers_to_the_command(stage):
    given = {"learning_rate": 2e-3, "grad_clip": 0.5, "batch_size": 12, "mixed_precision": "bf16", "beta2": 0.9}
    config, origins = resolved(SHIPPED[stage], **given)
    assert {name: getattr(config, name) for name in given} == given
    assert (config.strategy, config.optimizer) == ("deepspeed", "adamw")
    assert of_launcher(config, origins) == ["--deepspeed: as with --optimizer adamw --strategy deepspeed"]


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({"optimizer": ADAMW}, {}, {"learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.05}),
        ({"optimizer": {"type": "Adam"}}, {}, {"optimizer": "adamw"}),
        ({"gradient_clipping": 0.7}, {"optimizer": "adamw"}, {"grad_clip": 0.7, "strategy": "deepspeed"}),
        ({"optimizer": ADAMW, "scheduler": DECAY}, {}, {"schedule": "linear", "warmup_steps": 10, "max_steps": 200}),
        (
            {"optimizer": ADAMW, "scheduler": COSINE},
            {},
            {"schedule": "cosine", "max_steps": 50, "min_lr_fraction": 0.1},
        ),
        ({"bf16": {"enabled": True}}, {"optimizer": "adamw"}, {"mixed_precision": "bf16"}),
        ({"bf16": {"enabled": False}}, {"optimizer": "adamw"}, {"mixed_precision": "none"}),
        ({"fp16": {"enabled": False}}, {"optimizer": "adamw"}, {"mixed_precision": "auto"}),
        ({"train_batch_size": 48}, {"optimizer": "adamw"}, {"batch_size": 48, "micro_batch_size": None}),
        # two ranks
        (
            {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4},
            {"optimizer": "adamw"},
            {"batch_size": 24, "micro_batch_size": 3},
        ),
        (
            {"gradient_accumulation_steps": 4},
            {"optimizer": "adamw", "batch_size": 16},
            {"batch_size": 16, "micro_batch_size": 2},
        ),
        ({"gradient_accumulation_steps": 1}, {"optimizer": "adamw"}, {"batch_size": 32}),
        ({"wall_clock_breakdown": False, "steps_per_print": 10}, {"optimizer": "adamw"}, {}),
    ],
)
def test_numbers_are_options(settings, given, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, _ = resolved(settings, **given)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3, and is 0"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "zero_quantized_weights is not for this"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "use --strategy fsdp --offload all",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type must be AdamW or Adam, and is OneBitAdam"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode must be True"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "optimizer.params.eps must be 1e-08, and is 1e-06"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type must be WarmupLR or"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, "warmup_type must be 'linear'"),
        ({"gradient_clipping": "one"}, "gradient_clipping must be a number or 'auto', and is 'one'"),
        ({"prescale_gradients": True}, "prescale_gradients is not for this project"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not for this project"),
        ({"gradient_acumulation_steps": 2}, "gradient_acumulation_steps is not for this project"),
    ],
)
def test_what_is_not_here_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        resolved(settings, optimizer="adamw")


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        (
            {"gradient_clipping": 1.0},
            {"grad_clip": 0.5},
            r"\(gradient_clipping\) asks for --grad_clip 1.0, and the command for --grad_clip 0.5",
        ),
        ({"train_batch_size": 64}, {"batch_size": 32}, r"\(train_batch_size\) asks for --batch_size 64"),
        ({"optimizer": ADAMW}, {"learning_rate": 1e-4}, r"\(optimizer.params.lr\)"),
        ({"optimizer": ADAMW}, {"optimizer": "muon"}, "the command for --optimizer muon"),
        (
            {"optimizer": ADAMW, "scheduler": DECAY},
            {"num_epochs": 2.0},
            "--max_steps 200, and the command for --num_epochs 2.0",
        ),
        ({"optimizer": ADAMW}, {"optimizer_file": "my.py:build"}, "and the command for --optimizer_file my.py:build"),
        ({"bf16": {"enabled": True}}, {"mixed_precision": "none"}, r"\(bf16.enabled\)"),
        ({}, {"strategy": "fsdp"}, "asks for --strategy deepspeed, and the command for --strategy fsdp"),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "train_batch_size": 6},
            {},
            "make 8 rows a step, not 6",
        ),
    ],
)
def test_a_command_that_says_something_else_is_refused_with_both_names(settings, given, words):
    with pytest.raises(UserError, match=words):
        resolved(settings, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimizer": "muon"}, "--optimizer muon is not for --strategy deepspeed"),
        ({"ema": 0.99}, "--ema"),
        ({"compile_model": True}, "--compile_model"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16"),
        ({"stage": "ppo", "init_from": "m", "train_data": ["p"], "reward_function": ["length=1"]}, "--stage ppo"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(given, words):
    given = {"optimizer": "adamw"} | given
    if "init_from" in given:
        given["data_dir"] = []
    with pytest.raises(UserError, match=words):
        resolved({}, **given)


def test_deepspeed_needs_a_config_that_can_be_read(tmp_path):
    broken = tmp_path / "ds.json"
    broken.write_text("{")
    for named, words in (
        (tmp_path / "none.json", "cannot be read"),
        (broken, "is no JSON"),
        ("{}", "no section zero_opt"),
    ):
        with pytest.raises(UserError, match=words):
            resolve_config({"data_dir": ["data"], "deepspeed": str(named)})
    with pytest.raises(UserError, match="--deepspeed is missing"):
        resolve_config({"data_dir": ["data"], "strategy": "deepspeed", "optimizer": "adamw"})


def test_auto_sizes_of_the_engine_follow_the_width_as_transformers_has_them():
    found = engine_settings(read_settings(SHIPPED[3]), grad_clip=0.5, hidden_size=64, world_size=4)
    zero = found["zero_optimization"]
    assert found["gradient_clipping"] == 0.5 and found["train_batch_size"] == 4
    assert zero["reduce_bucket_size"] == 64 * 64 and zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert zero["stage3_param_persistence_threshold"] == 640 and zero["stage"] == 3
    assert "stage3_gather_16bit_weights_on_model_save" not in zero


def test_a_run_goes_on_with_another_strategy_than_deepspeed():
    saved = {"strategy": "deepspeed", "deepspeed": SHIPPED[3], "optimizer": "adamw"}
    assert resolve_config({"data_dir": ["data"]}, saved)[0].strategy == "deepspeed"
    assert resolve_config({"data_dir": ["data"], "strategy": "fsdp"}, saved)[0].strategy == "fsdp"
    changed = resolve_config({"data_dir": ["data"], "deepspeed": SHIPPED[2]}, {"strategy": "ddp", "optimizer": "adamw"})
    assert changed[0].strategy == "deepspeed"


def test_a_transformers_config_may_name_it(tmp_path):
    rows = {"output_dir": "out", "per_device_train_batch_size": 8, "optim": "adamw_torch", "bf16": True}
    file = tmp_path / "arguments.json"
    file.write_text(
        json.dumps(rows | {"model_name_or_path": "base", "dataset_path": "a.jsonl", "deepspeed": SHIPPED[3]})
    )
    config, _ = resolve_config({"config": str(file), "stage": "sft"})
    assert (config.strategy, config.deepspeed, config.mixed_precision) == ("deepspeed", SHIPPED[3], "bf16")
    with pytest.raises(UserError, match="the command for --strategy ddp"):
        resolve_config({"config": str(file), "stage": "sft", "strategy": "ddp"})
