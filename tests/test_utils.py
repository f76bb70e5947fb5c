"""Is utils.py a thin door: one sentence for a mistake, and nothing loaded that a command does not need?"""

import json
import subprocess
import sys

import pytest

import utils


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, words):
    assert utils.main(words) == 0
    shown = capsys.readouterr().out
    for name in ("setup", "plan", "monitor", "generate", "verify", "demo"):
        assert f"  {name} " in shown


def test_an_unknown_command_gives_the_closest_one(root):
    command = [sys.executable, "utils.py", "genrate", "--prompt", "x"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no command genrate; did you mean generate?")
    assert done.stderr.count("\n") == 1


def test_an_unknown_flag_gives_the_closest_one(capsys):
    with pytest.raises(SystemExit) as stopped:
        utils.main(["generate", "--promt", "x", "--checkpoint", "y"])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "error: unknown flag --promt; did you mean --prompt?\n")


@pytest.mark.parametrize("name", list(utils.COMMANDS))
def test_each_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        utils.main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: utils.py {name}")
    assert "?" in shown  # the question that the tool's file answers


@pytest.mark.parametrize("words", [["--help"], ["monitor", "--help"], ["setup", "--help"]])
def test_what_needs_no_torch_does_not_load_it(root, words):
    """Loading torch takes seconds, and the monitor is started often and on machines without it."""
    code = (
        "import json, sys, utils\n"
        "try: utils.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "utils" in loaded
    assert "torch" not in loaded and "matplotlib" not in loaded
