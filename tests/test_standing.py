"""Does a run go on over what it began with, the same base, judge and examples, and refuse anything else by name?

Each fault here was once accepted in silence: a base that trained on in between, another one, an edited config.json, a reward
model that moved, other held-out examples.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dataprep.chatml import CHATML
from finetune_data.chat_template import ChatTemplate
from finetune_data.example_shards import template_digest
from stages.build import open_stage_data
from tests.forked import Ended, Forked
from tests.tiers import grid
from training.config import TrainConfig

BASE = (
    "--hidden_size 32 --num_layers 2 --num_heads 2 --max_length 128 --optimizer adamw --batch_size 4 --eval_interval 0 \
    --learning_rate 1e-2 --keep_checkpoints 0 --device cpu"
)
SMALL = "--batch_size 4 --max_length 96 --log_interval 1 --eval_interval 0 --keep_checkpoints 0 --device cpu"
REWARDED = "--train_data prompts.jsonl --max_new_tokens 4 --eval_samples 2 --group_size 2 --learning_rate 1e-9"
RUNS = {
    "lora": "--stage sft --lora --init_from base --train_data chat.jsonl",
    "qlora": "--stage sft --lora --load_in_4bit --init_from base --train_data chat.jsonl",
    "dpo": "--stage dpo --init_from base --train_data pairs.jsonl --eval_data held.jsonl",
    "grpo": f"--stage grpo --init_from base {REWARDED} --reward_function length=2 --kl_coefficient 0.1",
    "judged": f"--stage grpo --init_from base {REWARDED} --reward_model judge",
}
WORDS = ["the", "of", "and", "model", "token", "loss", "gradient", "learns", "reads", "writes", "a", "small", "large"]


def sentence(start: int, count: int) -> str:
    return " ".join(WORDS[(start * 5 + i * 3) % len(WORDS)] for i in range(count))


@pytest.fixture(scope="module")
def first(tiny_data, tmp_path_factory) -> Path:
    """A base, a reward model over it, files of examples, and each run stopped after two steps."""
    folder = tmp_path_factory.mktemp("standing")
    (folder / "TEXT").symlink_to(tiny_data)
    rows = {
        "chat": [{"prompt": sentence(i, 4), "completion": sentence(i + 1, 3)} for i in range(12)],
        "pairs": [
            {"prompt": sentence(i, 4), "chosen": sentence(i + 1, 3), "rejected": sentence(i + 2, 3)} for i in range(12)
        ],
        "held": [
            {"prompt": sentence(i, 5), "chosen": sentence(i + 1, 2), "rejected": sentence(i + 2, 2)} for i in range(4)
        ],
        "prompts": [{"prompt": sentence(i, 3)} for i in range(8)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    train(folder, f"--data_dir TEXT {BASE} --max_steps 3 --save_dir base --sample_prompt=")
    train(folder, f"--stage reward --init_from base --train_data pairs.jsonl {SMALL} --max_steps 2 --save_dir judge")
    for name, words in RUNS.items():
        train(folder, f"{words} {SMALL} --max_steps 2 --save_dir {name}")
    return folder


@pytest.fixture
def place(first, tmp_path) -> Path:
    """A copy of it, in which something may change."""
    return shutil.copytree(first, tmp_path / "place", symlinks=True)


def train(folder: Path, words: str, code: int = 0) -> Ended:
    """`train.py WORDS`, started in `folder`."""
    with contextlib.chdir(folder):
        ended = Forked(folder / "streams", words.split()).wait()
    assert ended.code == code, ended.out + ended.err
    return ended


def go_on(folder: Path, name: str, change: str = "", code: int = 0) -> Ended:
    """The same command again, two more steps."""
    return train(folder, f"{RUNS[name]} {SMALL} --save_dir {name} --checkpoint latest --max_steps 4 {change}", code)


def train_base_on(folder: Path) -> None:
    train(folder, "--save_dir base --checkpoint latest --max_steps 9")


def weights(run: Path) -> dict:
    [file] = (run / "checkpoint_step_4").glob("*model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def undisturbed(first, tmp_path_factory):
    """The folder in which every run went on over what had not changed."""
    folder = shutil.copytree(first, tmp_path_factory.mktemp("undisturbed") / "place", symlinks=True)
    for name in RUNS:
        go_on(folder, name)
    return folder


@pytest.mark.parametrize("name", grid(RUNS, quick=["lora", "grpo"]))
def test_a_base_or_judge_that_trains_on_changes_nothing(name, first, undisturbed, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(first, place, symlinks=True)
    train_base_on(place)
    judge = f"--stage reward --init_from base/checkpoint_step_3 --train_data pairs.jsonl {SMALL} --max_steps 4"
    train(place, f"{judge} --save_dir judge --checkpoint latest --learning_rate 1e-2")
    go_on(place, name)
    assert weights(place / name) == weights(undisturbed / name)
    config = place / name / "checkpoint_step_4" / "adapter_config.json"
    if config.exists():
        assert json.loads(config.read_text())["base_model_name_or_path"].endswith("base/checkpoint_step_3")


@pytest.mark.parametrize("name", ["lora", "grpo", "dpo"])
def test_another_base_is_refused(name, place):
    train_base_on(place)
    ended = go_on(place, name, "--init_from base/checkpoint_step_9", code=2)
    assert "--init_from" in ended.err and "weights differs" in ended.err and len(ended.err.splitlines()) == 1


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", ["lora", "grpo", "judged"])
def test_an_edited_config_is_refused(name, place):
    edit(place / "base" / "checkpoint_step_3" / "config.json", rope_theta=5e5)
    (place / "base" / "checkpoint_step_3" / "manifest.json").unlink()  # as a folder of elsewhere has none
    ended = go_on(place, name, "--init_from base/checkpoint_step_3", code=2)
    assert "--init_from" in ended.err and "config differs" in ended.err


def test_another_tokenizer_config_is_refused(place):
    edit(place / "base" / "checkpoint_step_3" / "tokenizer_config.json", bos_token="the")
    (place / "base" / "checkpoint_step_3" / "manifest.json").unlink()
    assert "tokenizer differs" in go_on(place, "lora", "--init_from base/checkpoint_step_3", code=2).err


def test_another_judge_is_refused(place):
    judge = f"--stage reward --init_from base/checkpoint_step_3 --train_data pairs.jsonl {SMALL} --max_steps 4"
    train(place, f"{judge} --save_dir judge --checkpoint latest --learning_rate 1e-2")
    ended = go_on(place, "judged", "--reward_model judge/checkpoint_step_4", code=2)
    assert "--reward_model" in ended.err and "weights differs" in ended.err


@pytest.mark.parametrize(
    ("name", "change", "flag"),
    [
        ("lora", "--load_in_4bit", "--load_in_4bit"),
        ("qlora", "--no-load_in_4bit", "--load_in_4bit"),
        ("lora", "--lora_alpha 5", "--lora_alpha"),
        ("lora", "--rslora", "--rslora"),
        ("lora", "--chat_template llama3", "--chat_template"),
        ("lora", "--train_on all", "--train_on"),
        ("lora", "--rename_columns prompt=completion completion=prompt", "--rename_columns"),
        ("dpo", "--rename_columns chosen=rejected rejected=chosen", "--rename_columns"),
        ("dpo", "--eval_data pairs.jsonl", "--eval_data"),
        ("lora", "--train_data held.jsonl", "--train_data"),
        ("judged", "--reward_model base", "--reward_model"),
    ],
)
def test_other_options_under_the_same_names_of_things_are_refused(name, change, flag, place):
    ended = go_on(place, name, change, code=2)
    assert flag in ended.err and "Traceback" not in ended.err and len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(("name", "file"), [("dpo", "held.jsonl"), ("lora", "chat.jsonl"), ("grpo", "prompts.jsonl")])
def test_other_examples_under_the_same_name_are_refused(name, file, place):
    lines = (place / file).read_text().splitlines()
    (place / file).write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    assert "other content" in go_on(place, name, code=2).err


def test_what_may_change_when_a_run_goes_on(place):
    go_on(place, "lora", "--learning_rate 1e-3 --micro_batch_size 2 --log_interval 2 --lora_dropout 0.1")


def test_a_base_that_moved_may_be_named_anew_and_one_that_is_gone_is_named(place):
    go_on(place, "lora", "--max_steps 3")
    (place / "base" / "checkpoint_step_3").rename(place / "moved")
    ended = train(place, "--save_dir lora --checkpoint latest --max_steps 4", code=2)
    assert "checkpoint_step_3" in ended.err and "name a copy" in ended.err and "--init_from" in ended.err
    assert "same as" in train(place, "--save_dir lora --checkpoint latest --max_steps 4 --init_from moved").out


def test_a_checkpoint_without_pins_goes_on_and_says_so(place):
    for checkpoint in (place / "lora").glob("checkpoint_step_*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["stands_on"]
        for name in ("held_out", "rename_columns"):
            del state["data_order"][name]
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        rewrite_manifest(checkpoint)
    assert "older version" in go_on(place, "lora").out
    assert "older version" not in go_on(place, "lora", "--max_steps 5").out


def rewrite_manifest(checkpoint: Path) -> None:
    from checkpointing.safetensors_writer import file_crc32

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        file = checkpoint / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "crc32": file_crc32(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_goes_on_with_the_shipped_template_that_it_began_with(bare_tokenizer, tmp_path):
    """Which another version of groundup may have worded otherwise; one that was named or edited since is another."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare_tokenizer.definition))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "the user asks", "completion": "answers"}) + "\n")
    (tmp_path / "checkpoint").mkdir()
    earlier = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
    earlier += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text(earlier)
    kept = {"template": template_digest(ChatTemplate("", earlier))}
    config = TrainConfig(stage="sft", init_from="x", train_data=[str(tmp_path / "chat.jsonl")], eval_fraction=0)
    again = open_stage_data(config, tmp_path, 64, {"data_order": kept}, tmp_path / "checkpoint")
    assert again.order["template"] == kept["template"] and again.files["chat_template.jinja"] == earlier.encode()
    assert open_stage_data(config, tmp_path, 64).order["template"] == template_digest(ChatTemplate("", CHATML))
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text(earlier + " ")
    assert (
        open_stage_data(config, tmp_path, 64, {"data_order": kept}, tmp_path / "checkpoint").order["template"]
        != kept["template"]
    )
