"""Where do a run's options come from, and what happens to wrong ones?"""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from arguments import ArgumentParser
from errors import UserError
from training.config import TrainConfig, add_options, read_config_file, resolve_config


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
        (["--hidden_size", "12"], ["odd width"]),
        (["--decay_fraction", "1.5"], ["--decay_fraction", "between 0 and 1"]),
        (["--data_weights", "1", "2"], ["--data_weights", "--data_dir"]),
    ],
)
def test_values_that_cannot_work_name_the_flag(flags, words):
    with pytest.raises(UserError) as caught:
        resolve_config(parse("--data_dir", "data", *flags))
    assert all(word in str(caught.value) for word in words)


def test_no_flag_is_a_prefix_of_a_torchrun_flag():
    """torchrun parses the script's flags too and refuses one that abbreviates two of its own (Python's argparse)."""
    from torch.distributed.run import get_args_parser

    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for spec in fields(TrainConfig):
        assert not [flag for flag in torchrun if flag.startswith(f"--{spec.name}")], spec.name


def test_every_flag_has_help_and_the_script_says_so(root):
    environment = {**os.environ, "COLUMNS": "120"}
    text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=root, capture_output=True, text=True, env=environment, check=True
    ).stdout
    for spec in fields(TrainConfig):
        assert f"--{spec.name}" in text and spec.metadata["help"]
