"""Do the commands run as documents print them, and the files that other tools' users bring? Steps aside: a run that has begun,
over the data and at the size that was asked for, is stopped."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.peft_files import read_adapter_config
from tests.forked import Ended, Forked, start_ranks, wait_for

PREPARE = "--input_dir ./raw_text_data --output_dir ./processed_data --vocab_size 32000 --max_length 2048"
DATA = "--data_dir ./processed_data"
COMMANDS = {  # flags, ranks, what the plan says of the size, and how far the run is let go
    "tiny": (f"{DATA} --hidden_size 256 --num_layers 6 --batch_size 8 --max_steps 10000", 1, "256x6, 8 heads", "started"),
    "small": (
        f"{DATA} --hidden_size 768 --num_layers 12 --batch_size 32 --max_steps 100000 --mixed_precision", 1,
        "768x12, 12 heads", "started",
    ),
    "torchrun": (
        f"{DATA} --hidden_size 1024 --num_layers 16 --batch_size 128 --micro_batch_size 32 --mixed_precision", 4,
        "1024x16, 16 heads", "peak TFLOP/s .*",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(root, tmp_path_factory) -> Path:
    """A folder with raw_text_data, prepared by the command as it is printed."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "raw_text_data").mkdir()
    for file in (root / "docs").glob("*.md"):
        shutil.copy(file, folder / "raw_text_data")
    command = [sys.executable, str(root / "data_prep_tool.py"), *PREPARE.split()]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert "next: python train.py --data_dir processed_data" in said
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_training_command_begins_as_printed(name, place, monkeypatch, tmp_path):
    flags, ranks, size, until = COMMANDS[name]
    monkeypatch.chdir(place)
    words = [*flags.split(), "--save_dir", tmp_path / "run", "--device", "cpu"]
    started = start_ranks(tmp_path, *words, world_size=ranks) if ranks > 1 else [Forked(tmp_path / "0", words)]
    said = tmp_path / "0" / "stdout"
    reached = re.compile(rf"^({until})$", re.MULTILINE)
    wait_for(
        lambda: not all(one.is_alive() for one in started) or (said.exists() and reached.search(said.read_text())), 100
    )
    for one in started:
        one.send(signal.SIGKILL)
        one.wait()
    text = said.read_text()
    assert reached.search(text), (tmp_path / "0" / "stderr").read_text()
    assert re.search(rf"^model +{size}", text, re.MULTILINE)
    batch, micro = re.search(r"--batch_size (\d+)", flags)[1], re.search(r"--micro_batch_size (\d+)", flags)
    assert re.search(rf"^batch +{batch} sequences .* {ranks} rank\(s\)", text, re.MULTILINE)
    assert micro is None or f"micro-batch(es) of {micro[1]}" in text
    if "--mixed_precision" in flags:
        assert "precision        fp32 (the default on cpu)" in text


# ---- files of other tools ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tiny_data, tmp_path_factory) -> Path:
    """A folder with a small model, and files of examples, text and rewards beside it."""
    folder = tmp_path_factory.mktemp("desk")
    flags = (
        f"--data_dir {tiny_data} --hidden_size 32 --num_layers 2 --num_heads 2 --max_length 64 --max_steps 1 --batch_size 2 \
        --eval_interval 0 --device cpu --save_dir {folder / 'base'} --sample_prompt="
    )
    assert Forked(folder / "streams", flags.split()).wait().code == 0
    rows = {
        "text": [{"text": f"the model {n} reads and writes a small text " * 4} for n in range(60)],
        "answers": [{"prompt": f"the model {n}", "completion": "reads a text"} for n in range(12)],
        "asked": [{"prompt": f"the model {n} of"} for n in range(8)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    (folder / "src" / "utils").mkdir(parents=True)
    (folder / "src" / "utils" / "rewards.py").write_text(
        "def my_reward_function(prompts, responses):\n    return [float(len(text)) for text in responses]\n"
    )
    return folder


PLAN = """
task_name = "tried"
seed = 42
device = "cpu"
eval_interval = 0
[model]
model_name_or_path = "base"
dtype = "float32"
use_lora = true
load_in_4bit = true
[model.lora_config]
r = 4
lora_alpha = 8
[datasets.more]
dataset_path = "text.jsonl"
[datasets.sft]
dataset_path = "answers.jsonl"
max_length = 64
[[stages]]
stage_type = "pretrain"
stage_name = "more"
max_steps = 2
[[stages]]
stage_type = "sft"
stage_name = "sft"
num_train_epochs = 1
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
[[stages]]
stage_type = "grpo"
stage_name = "rl"
dataset_path = "asked.jsonl"
max_steps = 1
per_device_train_batch_size = 8
reward_function = "src.utils.rewards:my_reward_function"
max_new_tokens = 4
"""


def test_a_plan_with_rows_of_text_and_a_reward_of_the_users(desk, tmp_path, monkeypatch):
    """Each stage in runs/llm/TASK/TIME/NAME_stage, on two ranks that agree on the time; latest goes on with the newest."""
    monkeypatch.chdir(desk)
    Path("plan.toml").write_text(PLAN)
    ended: list[Ended] = [one.wait() for one in start_ranks(tmp_path, "--config", "plan.toml")]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    (start,) = Path("runs/llm/tried").iterdir()
    assert re.fullmatch(r"\d{8}_\d{6}", start.name)
    assert {path.name for path in start.iterdir() if path.is_dir()} == {"more_stage", "sft_stage", "rl_stage"}
    assert "per_device_train_batch_size 2 x 2 rank(s) x gradient_accumulation_steps 2: --batch_size 8" in ended[0].out
    assert "--config" not in ended[1].out  # one rank speaks
    options = {path.name: json.loads((path / "run.json").read_text())["config"] for path in start.glob("*_stage")}
    assert (
        options["sft_stage"]["batch_size"] == 8 and options["rl_stage"]["batch_size"] == 2
    )  # 16 answers, 8 to a prompt
    assert (options["sft_stage"]["seed"], options["sft_stage"]["load_in_4bit"]) == (42, True)
    # each stage goes on from the one before, and adapters of pretraining name the model that they are beside
    base = read_adapter_config(start / "more_stage" / "checkpoint_step_2")["base_model_name_or_path"]
    assert Path(base).parent.resolve() == (desk / "base").resolve()
    assert Path(options["sft_stage"]["init_from"]).parts[-2:] == ("more_stage", "merged")
    tokenizer = next(start.glob("more_stage/data/*/tokenizer.json")).read_bytes()
    assert tokenizer == next(desk.glob("base/checkpoint_step_*/tokenizer.json")).read_bytes()

    again = Forked(tmp_path / "again", ["--config", "plan.toml", "--checkpoint", "latest"]).wait()
    assert again.code == 0 and again.out.count("finished already") == 3, again.err
    assert list(Path("runs/llm/tried").iterdir()) == [start]


def test_the_shipped_file_with_other_names_trains(desk, root, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    text = (root / "configs/transformers_names.yaml").read_text()
    for before, now in (
        ("checkpoints/mine", "base"),
        ("configs/", f"{root}/configs/"),
        ("max_length: 128", "max_length: 64"),
    ):
        text = text.replace(before, now)
    Path("theirs.yaml").write_text(text)
    words = ["--stage", "sft", "--config", "theirs.yaml", "--save_dir", tmp_path / "run", "--device", "cpu"]
    ended = Forked(tmp_path / "streams", words).wait()
    assert ended.code == 0, ended.err
    assert read_adapter_config(next((tmp_path / "run").glob("checkpoint_step_*")))["r"] == 8


def test_monitor_runs_as_printed(desk, root, monkeypatch):
    """`python utils.py setup` is run as printed in tools/test_setup.py."""
    monkeypatch.chdir(desk)
    shutil.copytree("base", "checkpoints")
    command = [sys.executable, str(root / "utils.py"), "monitor", "--checkpoint_dir", "./checkpoints"]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0 and "finished" in ended.stdout, ended.stdout + ended.stderr
