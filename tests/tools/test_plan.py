"""Does `utils.py plan` say what train.py would do?"""

import json
import math
import shutil
import subprocess
import sys

import pytest

from arguments import ArgumentParser
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from families.new_models import parts_of_new
from model_config import ModelConfig
from tools import plan as plan_tool
from training.config import TrainConfig
from training.plan import model_shape


def plan(root, *flags: object) -> subprocess.CompletedProcess:
    words = [str(flag) for flag in flags]
    return subprocess.run([sys.executable, "utils.py", "plan", *words], cwd=root, capture_output=True, text=True)


def test_the_plan_is_the_table_of_train(root, tiny_data, tmp_path):
    flags = ["--data_dir", tiny_data, "--hidden_size", 32, "--num_layers", 2, "--num_heads", 2, "--batch_size", 8]
    flags += ["--max_steps", 3, "--sample_prompt", "", "--device", "cpu"]
    planned = plan(root, *flags).stdout.splitlines()
    command = [sys.executable, "train.py", *map(str, flags), "--save_dir", str(tmp_path / "run")]
    trained = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in ("model", "parameters", "batch", "run", "compute", "memory estimate", "optimizer", "precision"):
        line = next(line for line in planned if line.startswith(name))
        assert [word for word in line.split()] in [other.split() for other in trained], line
    assert any(line.startswith("time estimate") for line in planned)


@pytest.fixture
def planned(capsys):
    """The table for some flags, as {row: value}; of several tables, one after another."""

    def run(*words: object) -> list[dict[str, str]]:
        parser = ArgumentParser()
        plan_tool.add_arguments(parser)
        assert plan_tool.main(parser.parse_args([*map(str, words), "--device", "cpu", "--peak_tflops", "1"])) == 0
        tables = []
        for block in capsys.readouterr().out.strip().split("\n\n"):
            title, *lines = block.splitlines() if block.startswith("stage ") else ["", *block.splitlines()]
            tables.append({"title": title} | {line[:15].strip(): line[15:].strip() for line in lines})
        return tables

    return run


def test_without_data_and_for_several_devices(planned):
    (one,) = planned("--preset", "small")
    assert "rows of 2,048 tokens are assumed" in one["data"] and "1 rank(s) x 1 micro-batch(es) of 32" in one["batch"]
    (eight,) = planned("--preset", "small", "--world_size", 8, "--micro_batch_size", 2)
    assert "8 rank(s) x 2 micro-batch(es) of 2" in eight["batch"]


def test_wrong_flags_are_one_sentence(root, planned, capsys):
    for flags, words in (
        (["--world_size", 64], ["--world_size", "--batch_size 32"]),
        (["--num_heads", 7], ["--num_heads 7"]),
    ):
        with pytest.raises(UserError) as caught:
            planned(*flags)
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(SystemExit) as left:
        planned("--hiden_size", 64)
    assert left.value.code == 2 and "--hiden_size; did you mean --hidden_size" in capsys.readouterr().err
    done = plan(root, "--world_size", 64)
    assert done.returncode == 2 and "--world_size" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def base(tiny_data, tmp_path):
    """A model's folder without weights, and 21 chats, 11 pairs and 5 prompts of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_data / name, folder)
    tokenizer = load_tokenizer(folder)
    config = TrainConfig(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2)
    shape = model_shape(config, tokenizer.vocab_size, 128, tokenizer.eos_token_id)
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    rows = {
        "chat": [{"prompt": "the token", "completion": "reads " * n} for n in range(1, 22)],
        "pairs": [{"prompt": "the", "chosen": "of and", "rejected": "model"}] * 11,
        "prompts": [{"prompt": "the " * n} for n in (1, 2, 3, 4, 5)],
    }
    for name, examples in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return folder


def test_fine_tuning_has_the_shape_of_its_model_and_the_steps_of_its_examples(planned, base, tmp_path):
    """20 of 21 chats in batches of 8, three times over; 10 of 11 pairs once; rounds of 2 x 2 prompts, 4 steps each."""
    given = ("--init_from", base, "--batch_size", 8)
    (sft,) = planned("--stage", "sft", *given, "--train_data", tmp_path / "chat.jsonl")
    assert sft["model"].startswith("32x3, 4 heads of 8 (2 key/value)")
    assert sft["run"].startswith(f"{math.ceil(3 * 20 / 8)} steps = about ") and sft["starts from"] == str(base)
    assert sft["data"].startswith("20 examples to learn from, 1 held out, of ")
    (lora,) = planned("--stage", "dpo", "--lora", *given, "--train_data", tmp_path / "pairs.jsonl")
    assert lora["batch"].startswith("8 pairs = about ") and lora["run"].startswith("2 steps")
    assert "adapters of" in lora["parameters"] and lora["time estimate"].endswith("without the reference's pass")
    drawn = ("--max_new_tokens", 16, "--reward_function", "length=9", "--train_data", tmp_path / "prompts.jsonl")
    small = ("--init_from", base, "--batch_size", 2, "--num_minibatches", 2, "--rollout_epochs", 2, "--eval_samples", 1)
    (grpo,) = planned("--stage", "grpo", *small, *drawn, "--group_size", 3)
    assert grpo["batch"].startswith("2 prompts with 3 answers") and grpo["run"].startswith("4 steps")
    assert "drawing answers" in grpo["memory estimate"] and "reference" not in grpo["memory estimate"]
    (ppo,) = planned("--stage", "ppo", *small, *drawn)
    assert "reference (frozen)" in ppo["memory estimate"]
    (unknown,) = planned("--stage", "sft", *given, "--train_data", tmp_path / "nowhere.jsonl")
    assert "not known" in unknown["run"] and "nowhere.jsonl is not there" in unknown["data"]
    assert "time estimate" not in unknown and "at most" in unknown["batch"]


def test_a_file_with_stages_is_planned_stage_by_stage(planned, base, tiny_data, tmp_path):
    """The second starts from the shape and tokenizer that the first would leave, the fourth from what the third did."""
    stages = [
        {"stage": "pretrain", "data_dir": str(tiny_data), "hidden_size": 48, "num_layers": 2, "num_heads": 2,
         "max_steps": 7, "max_length": 64},
        {"stage": "sft", "train_data": str(tmp_path / "chat.jsonl"), "batch_size": 5},
        {"name": "taste", "stage": "reward", "train_data": str(tmp_path / "pairs.jsonl"), "lora": True},
        {"stage": "dpo", "train_data": str(tmp_path / "pairs.jsonl"), "lora_r": 4, "lora": True, "num_epochs": 2},
        {"stage": "sft", "init_from": str(base), "train_data": str(tmp_path / "chat.jsonl"), "max_steps": 9},
    ]  # fmt: skip
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"sample_prompt": "", "mixed_precision": "none", "stages": stages}))
    tables = planned("--config", file)
    names = ["pretrain", "sft", "taste", "dpo", "sft"]
    assert [table["title"] for table in tables] == [f"stage {n} of 5 ({name})" for n, name in enumerate(names, start=1)]
    assert [table["run"].split()[0] for table in tables] == ["7", "12", "1", "2", "9"]
    assert [table["model"].split(",")[0] for table in tables] == ["48x2"] * 4 + ["32x3"]
    assert all("the stage before" in table["starts from"] for table in tables[1:4])
    assert "starts from" not in tables[0] and tables[4]["starts from"] == str(base)
    file.write_text(json.dumps({"stages": [stages[1]]}))
    with pytest.raises(UserError, match=r"stage 1 of 1 \(sft\): --init_from is missing"):
        planned("--config", file)


def test_an_option_that_the_run_would_not_read_is_refused_here_too(planned, base, tmp_path):
    with pytest.raises(UserError, match="--group_size is for --stage grpo"):
        planned("--stage", "sft", "--init_from", base, "--train_data", tmp_path / "chat.jsonl", "--group_size", 4)


def test_rows_longer_than_a_base_can_take_are_refused_as_train_refuses_them(planned, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = parts_of_new("gpt2", 1, 16) | {"max_position_embeddings": 24}
    config = ModelConfig(vocab_size=99, **shape, **parts)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    (one,) = planned("--init_from", tmp_path)
    assert "rows of 24 tokens are assumed" in one["data"]
    with pytest.raises(UserError, match="rows of 32 tokens are longer than the 24 positions that the base has learned"):
        planned("--init_from", tmp_path, "--max_length", 32)
