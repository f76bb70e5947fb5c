"""Are the flags of other scripts the options that they stand for, alone and beside them?"""

import dataclasses
import json

import pytest

from arguments import ArgumentParser
from errors import UserError
from tools.plan import add_arguments
from tools.plan import main as plan
from training.config import TrainConfig, add_options, resolve_config
from training.option_groups import SPECS
from training.options_page import options_page
from training.stage_plan import read_plan

ALIASES = {  # the flag of other scripts: (ours, a value)
    "start_context": ("sample_prompt", "Every effort"),
    "epochs": ("num_epochs", 2.0),
    "eval_freq": ("eval_interval", 5),
    "save_model": ("save_dir", "kept"),
    "load_model": ("init_from", "base"),
}


def parser() -> ArgumentParser:
    made = ArgumentParser()
    add_options(made)
    return made


def parse(*words: object) -> dict:
    return vars(parser().parse_args([str(word) for word in words]))


def config_of(*words: object) -> TrainConfig:
    return resolve_config(parse("--data_dir", "data", *words))[0]


def test_every_alias_is_listed_here_and_none_is_an_option():
    assert {alias: name for name, spec in SPECS.items() for alias in spec.aliases} == {
        alias: name for alias, (name, _) in ALIASES.items()
    }
    assert not ALIASES.keys() & SPECS.keys()


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_the_option_on_the_command_line_and_in_files(alias, tmp_path):
    name, value = ALIASES[alias]
    expected = config_of(f"--{name}", value)
    assert getattr(expected, name) == value
    assert config_of(f"--{alias}", value) == expected
    assert config_of(f"--{alias.replace('_', '-')}={value}") == expected
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"data_dir": ["data"], alias: value}))
    assert resolve_config({"config": str(file)})[0] == expected
    file.write_text(json.dumps({"stages": [{"stage": "pretrain", "data_dir": ["data"], alias: value}]}))
    if name != "save_dir":  # which stages share
        assert read_plan(str(file))[0].options[name] == value


@pytest.mark.parametrize("alias", ALIASES)
def test_two_names_of_one_option_must_agree(alias, tmp_path, capsys):
    name, value = ALIASES[alias]
    other = value + 1 if not isinstance(value, str) else value + "!"
    assert config_of(f"--{name}", value, f"--{alias}", value) == config_of(f"--{name}", value)
    for words in ([f"--{name}", other, f"--{alias}", value], [f"--{alias}", value, f"--{name}", other]):
        with pytest.raises(SystemExit) as left:
            parse(*words)
        sentence = capsys.readouterr().err
        assert left.value.code == 2 and sentence.count("\n") == 1
        assert f"--{alias} is another name of --{name}" in sentence
    file = tmp_path / "run.json"
    file.write_text(json.dumps({name: other, alias: value}))
    with pytest.raises(UserError, match=f"both set --{name}, to different values"):
        resolve_config({"config": str(file)}, validate=False)


def test_help_and_the_page_name_them():
    said, page = (" ".join(text.split()) for text in (parser().format_help("all"), options_page()))
    for alias in ALIASES:
        assert f"also --{alias}" in said and f"also --{alias}" in page


# ---- eval_iter and epochs ----------------------------------------------------------------------------------------------


def test_an_evaluation_of_micro_batches_is_one_of_as_many_tokens_on_any_number_of_ranks():
    rows_of_64 = 64
    assert config_of("--eval_iter", 5, "--batch_size", 8).tokens_of_evaluation(rows_of_64) == 5 * 8 * 64
    smaller = config_of("--eval_iter", 5, "--batch_size", 8, "--micro_batch_size", 2)
    assert smaller.tokens_of_evaluation(rows_of_64) == 5 * 2 * 64
    assert config_of("--eval_tokens", 77).tokens_of_evaluation(rows_of_64) == 77


@pytest.mark.parametrize(
    ("one", "other"), [(("eval_iter", 5), ("eval_tokens", 9)), (("epochs", 2), ("max_steps", 9))], ids=str
)
def test_one_thing_is_said_in_one_way_and_the_later_word_counts(one, other, tmp_path):
    names = [ALIASES.get(name, (name,))[0] for name, _ in (one, other)]
    flags = [[f"--{name}", value] for name, value in (one, other)]
    with pytest.raises(UserError, match=f"--{names[0]} and --{names[1]} say one thing in two ways"):
        config_of(*flags[0], *flags[1])
    for first, then in ((0, 1), (1, 0)):
        expected = config_of(*flags[then])
        # of a run that goes on
        saved = dataclasses.asdict(config_of(*flags[first]))
        assert resolve_config(parse(*flags[then]), saved)[0] == expected
        # of a file and the command line, of what stages share and what one has
        file = tmp_path / "run.json"
        file.write_text(json.dumps({"data_dir": ["data"], names[first]: flags[first][1]}))
        assert resolve_config(parse("--config", file, *flags[then]))[0] == expected
        own = {"stage": "pretrain", names[then]: flags[then][1]}
        file.write_text(json.dumps({"data_dir": ["data"], names[first]: flags[first][1], "stages": [own]}))
        (stage,) = read_plan(str(file))
        assert resolve_config(stage.given({}))[0] == expected
        assert resolve_config(stage.given(parse(*flags[first])))[0] == config_of(*flags[first])


def test_epochs_of_text_are_passes_over_its_rows(tiny_data, capsys):
    """What the plan says, with the number of rows that it has without --epochs."""
    small = ["--data_dir", tiny_data, "--hidden_size", 32, "--num_heads", 2, "--batch_size", 8, "--device", "cpu"]

    def planned(*words: object) -> tuple[int, float]:
        plan(parser_of_plan().parse_args([str(word) for word in (*small, *words)]))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run "))
        return int(line.split()[1].replace(",", "")), float(line.split()[-2])

    steps, epochs = planned("--max_steps", 1000)
    rows = steps * 8 / epochs
    steps, epochs = planned("--epochs", 3)
    assert steps == pytest.approx(3 * rows / 8, abs=1) and 3 <= epochs < 3 + 8 / rows + 0.01


def parser_of_plan() -> ArgumentParser:
    made = ArgumentParser()
    add_arguments(made)
    return made
