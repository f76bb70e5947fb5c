"""Does a mistake on the command line give one sentence that names the flag and the closest one that exists?"""

import subprocess
import sys

import pytest

from arguments import ArgumentParser, did_you_mean


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="train.py", description="First line.\nSecond line.")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak rate")
    parser.add_argument("--max-steps", type=int, help="optimizer steps")
    parser.add_argument("--mixed_precision", choices=["bf16", "fp16"], help="compute type")
    parser.add_argument("--compile_model", action="store_true", help="use torch.compile")
    parser.add_argument("--data_dir", required=True, help="folder of shards")
    return parser


def error_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args(words)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate"])
@pytest.mark.parametrize("steps", ["--max_steps", "--max-steps"])
def test_dashes_and_underscores_are_the_same(flag, steps):
    spaced = make_parser().parse_args(["--data-dir", "a-b", flag, "1", steps, "7"])
    joined = make_parser().parse_args(["--data_dir=a-b", f"{flag}=1", f"{steps}=7"])
    assert spaced == joined
    assert (spaced.data_dir, spaced.learning_rate, spaced.max_steps) == ("a-b", 1.0, 7)


def test_a_shortened_flag_is_refused_with_the_whole_name(capsys):
    error = error_of(capsys, "--data_dir", "d", "--learn", "1")
    assert "unknown flag --learn" in error and "did you mean --learning_rate?" in error


def test_an_unknown_flag_is_named_before_a_missing_one(capsys):
    assert "did you mean --data_dir?" in error_of(capsys, "--dta_dir=d")
    assert "--data_dir" in error_of(capsys, "--max_steps", "7")


def test_wrong_values_name_the_flag(capsys):
    assert "--max-steps" in error_of(capsys, "--data_dir", "d", "--max_steps", "many")
    choice = error_of(capsys, "--data_dir", "d", "--mixed_precision", "bff16")
    assert "--mixed_precision" in choice and "fp16" in choice and "did you mean bf16?" in choice


def test_a_stray_word_is_an_error(capsys):
    assert "'corpus'" in error_of(capsys, "--data_dir", "d", "corpus")


def test_a_value_may_begin_with_dashes():
    parser = ArgumentParser()
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt=--x-y=1"]).prompt == "--x-y=1"
    assert parser.parse_args(["--prompt", "--- a title ---"]).prompt == "--- a title ---"


def test_help_shows_defaults_that_say_something():
    text = make_parser().format_help()
    assert "First line.\nSecond line." in text
    assert "peak rate (default: 0.0003)" in text
    assert "None" not in text and "False" not in text


def test_a_word_far_from_everything_gets_no_suggestion():
    assert did_you_mean("zebra", ["--learning_rate", "--data_dir"]) == ""
    assert did_you_mean("Lerning-Rate", ["learning_rate"]) == "; did you mean learning_rate?"


def test_a_script_exits_with_2_and_one_line(root, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from arguments import ArgumentParser\nArgumentParser().parse_args()\n")
    run = subprocess.run(
        [sys.executable, str(script), "--oops"], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "error: unknown flag --oops; see --help\n")
