"""Where do a run's options come from, and what happens to wrong ones?"""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from arguments import ArgumentParser
from errors import UserError
from training.config import TrainConfig, add_options, resolve_config
from training.config_file import read_config_content, read_config_file
from training.option_groups import GROUPS, PRESETS, SPECS
from training.options_page import PAGE, options_page


def parse(*words: str) -> dict:
    parser = ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(list(words)))


def test_defaults_are_the_documented_ones():
    config, origins = resolve_config(parse("--data_dir", "data"))
    expected = {
        "hidden_size": 768, "num_layers": 12, "num_heads": 12, "batch_size": 32, "max_steps": 100_000,
        "learning_rate": 3e-4, "grad_clip": 1.0, "log_interval": 100, "eval_interval": 500, "save_dir": "./checkpoints",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.resolved_warmup_steps == 2000
    assert origins["data_dir"] == "command line" and origins["hidden_size"] == "default"


@pytest.mark.parametrize(
    "preset,size",
    [("tiny", (256, 6)), ("small", (768, 12)), ("medium", (1024, 24)), ("large", (1536, 24)), ("xl", (2048, 32))],
)
def test_presets(preset, size):
    config, origins = resolve_config(parse("--data_dir", "data", "--preset", preset))
    assert (config.hidden_size, config.num_layers) == size
    assert origins["hidden_size"] == "preset"


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_precedence_default_file_preset_command_line(tmp_path, suffix):
    text = {
        "yaml": "learning_rate: 1e-3\nbatch-size: 8\nqk_norm: true\ndata_dir: [a, b]\npreset: tiny\nnum_layers: 2\n",
        "toml": 'learning_rate = 1e-3\nbatch-size = 8\nqk_norm = true\ndata_dir = ["a", "b"]\npreset = "tiny"\nnum_layers = 2\n',
        "json": json.dumps(
            {
                "learning_rate": 1e-3,
                "batch-size": 8,
                "qk_norm": True,
                "data_dir": ["a", "b"],
                "preset": "tiny",
                "num_layers": 2,
            }
        ),
    }[suffix]
    file = tmp_path / f"run.{suffix}"
    file.write_text(text)
    config, origins = resolve_config(parse("--config", str(file), "--batch_size", "4"))
    assert config.learning_rate == 1e-3  # PyYAML alone reads 1e-3 as a string
    assert (config.batch_size, config.qk_norm, config.data_dir) == (4, True, ["a", "b"])
    assert (config.hidden_size, config.num_layers) == (256, 2)
    assert origins["learning_rate"] == "config file" and origins["batch_size"] == "command line"
    assert origins["hidden_size"] == "preset" and origins["num_layers"] == "config file"
    # a preset named on the command line beats the file's sizes, a size named there beats both
    config, _ = resolve_config(parse("--config", str(file), "--preset", "medium", "--num_heads", "8"))
    assert (config.hidden_size, config.num_layers, config.num_heads) == (1024, 24, 8)


def test_a_saved_runs_options_come_back_and_the_command_line_wins():
    first, _ = resolve_config(parse("--data_dir", "data", "--preset", "tiny", "--max_steps", "50", "--save_dir", "a"))
    saved = {spec.name: getattr(first, spec.name) for spec in fields(TrainConfig)}
    again, origins = resolve_config(parse("--checkpoint", "latest", "--save_dir", "b", "--max_steps", "80"), saved)
    assert (again.hidden_size, again.max_steps, again.save_dir, again.data_dir) == (256, 80, "b", ["data"])
    assert origins["hidden_size"] == "checkpoint" and origins["max_steps"] == "command line"


@pytest.mark.parametrize(
    "content,words",
    [
        ("learning_rat: 1", ["'learning_rat'", "did you mean learning_rate"]),
        ("num_layers: 1.5", ["num_layers", "int", "1.5"]),
        ("num_layers: many", ["num_layers", "int", "'many'"]),
        ("qk_norm: 1", ["qk_norm", "bool"]),
        ("schedule: cosin", ["schedule", "did you mean cosine"]),
        ("- 1", ["option: value"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_wrong_config_file_is_one_sentence(tmp_path, content, words):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_config_file(str(file))
    message = str(caught.value)
    assert all(word in message for word in [*words, str(file)]) and "\n" not in message


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--num_heads", "7"], ["--num_heads 7", "--hidden_size 768", "6 or 8"]),
        (["--num_kv_heads", "5"], ["--num_kv_heads 5", "--num_heads 12"]),
        (["--batch_size", "0"], ["--batch_size", "positive"]),
        (["--hidden_size", "12", "--num_heads", "12"], ["odd width"]),
        (["--decay_fraction", "1.5"], ["--decay_fraction", "between 0 and 1"]),
        (["--data_weights", "1", "2"], ["--data_weights", "--data_dir"]),
        (["--num_epochs", "0"], ["--num_epochs", "positive"]),
        (["--clip_low", "0"], ["--clip_low", "positive"]),
        (["--kto_undesirable_weight", "-1"], ["--kto_undesirable_weight", "positive"]),
        (["--neftune_alpha", "-5"], ["--neftune_alpha", "not be negative"]),
    ],
)
def test_values_that_cannot_work_name_the_flag(flags, words):
    with pytest.raises(UserError) as caught:
        resolve_config(parse("--data_dir", "data", *flags))
    assert all(word in str(caught.value) for word in words)


SFT = "--stage sft --init_from base --train_data a.jsonl"
DPO, REWARD, PPO, GRPO = (
    f"--stage {stage} --init_from base --train_data a.jsonl" + more
    for stage, more in (("dpo", ""), ("reward", ""), ("ppo", " --reward_model r"), ("grpo", " --reward_model r"))
)


@pytest.mark.parametrize(
    "run,option,belongs_to",
    [
        (DPO + " --dpo_loss ipo", "simpo_gamma 1", "simpo"),
        (DPO + " --dpo_loss hinge", "label_smoothing 0.1", "sigmoid"),
        (DPO, "kto_desirable_weight 2", "kto"),
        (SFT, "dpo_beta 0.2", "--stage dpo"),
        (DPO, "center_rewards 0.1", "--stage reward"),
        (REWARD, "neftune_alpha 5", "--stage sft"),
        (DPO, "train_on last", "--stage sft"),
        (PPO, "group_size 4", "--stage grpo"),
        (PPO, "clip_low 0.1", "--stage grpo"),
        (GRPO + " --grpo_loss cispo", "clip_low 0.1", "cispo"),
        (GRPO, "kl_target 3", "--stage ppo"),
        (GRPO, "eval_tokens 100", "--eval_samples"),
        (SFT, "num_minibatches 2", "grpo and ppo"),
        (SFT, "lora_r 8", "--lora"),
        (SFT, "stride 8", "--stage pretrain"),
        (SFT, "hidden_size 384", "--init_from"),
        (SFT, "preset tiny", "--init_from"),
        (SFT + " --eval_data b.jsonl", "eval_fraction 0.1", "--eval_data"),
        (SFT, "decay_fraction 0.1", "--schedule wsd"),
        (SFT, "sample_tokens 10", "--sample_prompt"),
        ("--data_dir data", "chat_template chatml", "stages that learn from chats"),
        ("--data_dir data", "lora_alpha 8", "--lora"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(tmp_path, run, option, belongs_to):
    """On the command line and in a file; not where another stage of a plan may read it, nor as what a default sets."""
    name, value = option.split()
    resolve_config(parse(*run.split()))
    with pytest.raises(UserError, match=f"--{name} is for .*{belongs_to}.*: leave it out"):
        resolve_config(parse(*run.split(), f"--{name}", value))
    file = tmp_path / "run.json"
    file.write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=f"--{name} is for"):
        resolve_config(parse("--config", str(file), *run.split()))
    resolve_config(parse(*run.split(), f"--{name}", value), in_plan=True)


def test_every_option_is_read_by_some_run():
    """What is refused in one place is taken where it belongs."""
    for run in (
        "--data_dir data --data_weights 1 --stride 8 --z_loss 1e-5 --no-document_mask --vocab_size 99 --decay_fraction 0.1",
        SFT + " --train_on last --neftune_alpha 5 --eval_fraction 0.1 --chat_template chatml --num_epochs 2",
        SFT + " --lora --lora_r 8 --lora_alpha 8 --lora_dropout 0.1 --lora_target_modules q_proj",
        REWARD + " --center_rewards 0.1",
        DPO + " --dpo_loss sigmoid --label_smoothing 0.1 --dpo_beta 0.2",
        DPO + " --dpo_loss simpo --simpo_gamma 1",
        DPO + " --dpo_loss kto --kto_desirable_weight 2 --kto_undesirable_weight 0.5",
        GRPO + " --group_size 4 --grpo_loss dapo --clip_low 0.1 --clip_high 0.3 --mask_truncated --kl_coefficient 0.1",
        PPO + " --clip_high 0.3 --kl_target 3 --missing_eos_penalty 1 --num_minibatches 2 --rollout_epochs 2",
    ):
        config, origins = resolve_config(parse(*run.split()))
        assert "command line" in origins.values() and config.stage in run + " --stage pretrain"


def test_what_a_file_holds_is_read_before_it_is_checked(tmp_path):
    """A plan's tables, which are no options, come as they are written; what cannot be read is the same sentence."""
    file = tmp_path / "plan.toml"
    file.write_text('save-dir = "out"\n[[stages]]\nstage = "sft"\n')
    assert read_config_content(str(file)) == {"save-dir": "out", "stages": [{"stage": "sft"}]}
    with pytest.raises(UserError, match="'stages', which is not an option"):
        read_config_file(str(file))
    file.write_text("a = [")
    sentences = []
    for read in (read_config_content, read_config_file):
        with pytest.raises(UserError) as caught:
            read(str(file))
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1] and "not valid TOML" in sentences[0]


def test_no_flag_is_a_prefix_of_a_torchrun_flag():
    """torchrun parses the script's flags too and refuses one that abbreviates two of its own (Python's argparse)."""
    from torch.distributed.run import get_args_parser

    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for spec in fields(TrainConfig):
        assert not [flag for flag in torchrun if flag.startswith(f"--{spec.name}")], spec.name


def help_text(root, *words: str) -> str:
    command = [sys.executable, "train.py", "--help", *words]
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=True).stdout


def shown(text: str) -> set[str]:
    """The options that have an entry of their own in a help text."""
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def test_help_shows_a_first_runs_flags_and_how_to_see_the_rest(root):
    text = help_text(root)
    assert shown(text) == {
        "stage", "init_from", "data_dir", "train_data", "lora", "preset", "batch_size", "max_steps", "learning_rate",
        "save_dir", "checkpoint", "config",
    }  # fmt: skip
    assert len(text.splitlines()) < 60
    assert "--help [GROUP]" in text and all(title in text for title in (*GROUPS, "all"))


def test_every_option_is_in_the_whole_help_and_in_its_groups(root):
    assert shown(help_text(root, "all")) == {*SPECS, "config"}
    for title, group in GROUPS.items():
        parser = ArgumentParser()
        add_options(parser)
        found = shown(parser.format_help(title)) - {"config"}
        assert found == {spec.name for spec in fields(group)}
        assert all(spec.help for spec in SPECS.values())


def test_a_group_that_is_none_is_said(root):
    done = subprocess.run(
        [sys.executable, "train.py", "--help", "optimisation"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2 and "did you mean optimization?" in done.stderr and "hardware" in done.stderr


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_example_of_a_group_is_a_command_that_runs(group):
    """It parses, its options go together, and it shows one of its own group."""
    _, example = inspect.cleandoc(group.__doc__).split("\n\n")
    launcher, script, *words = example.split()
    assert (launcher, script) == ("python", "train.py")
    _, origins = resolve_config(parse(*words), {"data_dir": ["data"]} if "latest" in words else None)
    assert {name for name in origins if origins[name] == "command line"} & {spec.name for spec in fields(group)}


def test_the_page_of_options_is_current():
    assert PAGE.read_text(encoding="utf-8") == options_page(), "write it anew with `make options`"
    assert all(f"`--{name}" in options_page() for name in SPECS)
    assert max(map(len, options_page().splitlines())) <= 100


def given(words: str) -> dict:
    parser = ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(words.split()))


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        ("--hidden_size 256", 8), ("--hidden_size 768", 12), ("--hidden_size 1024", 16), ("--hidden_size 1536", 16),
        ("--hidden_size 2048", 32), ("--hidden_size 512", 8), ("--hidden_size 4096", 64), ("--hidden_size 320", 5),
        ("--hidden_size 256 --num_heads 4", 4), ("--preset xl", 32), ("--preset tiny --hidden_size 512", 8),
        ("--preset tiny --num_heads 2", 2), ("", 12),
    ],
)  # fmt: skip
def test_heads_follow_from_the_width_where_they_are_not_given(words, heads):
    config, origins = resolve_config(given(f"--data_dir x {words}"))
    assert config.num_heads == heads
    assert (origins["num_heads"] == "--hidden_size") == (words.startswith("--hidden_size") and "num_heads" not in words)


def test_a_resumed_run_keeps_its_heads_though_the_table_has_changed():
    saved = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "data_dir": ["x"]}
    assert resolve_config(given(""), saved)[0].num_heads == 4
    assert resolve_config(given("--hidden_size 256"), saved)[0].num_heads == 4


def test_a_width_without_usual_heads_asks_for_them():
    with pytest.raises(UserError, match="--num_heads"):
        resolve_config(given("--data_dir x --hidden_size 100"))


@pytest.mark.parametrize("size", PRESETS)
def test_the_presets_are_the_documented_table(size):
    table = {
        "tiny": (256, 6, 8),
        "small": (768, 12, 12),
        "medium": (1024, 24, 16),
        "large": (1536, 24, 16),
        "xl": (2048, 32, 32),
    }
    config, _ = resolve_config(given(f"--data_dir x --preset {size}"))
    assert (config.hidden_size, config.num_layers, config.num_heads) == table[size]


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ("--mixed_precision", "auto"),
        ("--mixed_precision --seed 1", "auto"),
        ("--mixed_precision bf16", "bf16"),
        ("", "auto"),
    ],
)
def test_mixed_precision_alone_means_auto(words, precision):
    assert resolve_config(given(f"--data_dir x {words}"))[0].mixed_precision == precision


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--data_dir is missing"),
        ("--data_dir data --train_data a.jsonl", "--train_data is for fine-tuning"),
        ("--stage sft --train_data a.jsonl", "--init_from is missing: --stage sft"),
        ("--stage sft --init_from base", "--train_data is missing"),
        ("--stage sft --init_from base --data_dir data --train_data a.jsonl", "leave one of them out"),
        ("--stage sft --init_from base --data_dir data --add_chat_tokens", "--add_chat_tokens needs --train_data"),
        ("--stage ppo --init_from base --data_dir data", "--data_dir is not for --stage ppo"),
        ("--stage grpo --init_from base --train_data a.jsonl", "--reward_function or --reward_model"),
        (PPO + " --reward_weights 1 2", "--reward_weights has 2 values for 1 rewards"),
        (REWARD + " --sample_prompt Hello", "the model writes no text"),
        ("--data_dir data --lora", "--lora needs a model to adapt"),
        (SFT + " --dora", "add --lora"),
        (SFT + " --rename_columns question", "write column=meaning"),
    ],
)
def test_a_run_that_cannot_start_says_what_is_missing(words, sentence):
    with pytest.raises(UserError) as caught:
        resolve_config(parse(*words.split()))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
