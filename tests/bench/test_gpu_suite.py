"""Is each part of bench/gpu_suite.sh over within six minutes, does it take up what is left, and are mistakes one sentence?

An interpreter that only writes down how it is called stands for Python, and `timeout` tells what it was given.
"""

import os
import subprocess
from pathlib import Path

import pytest

SIX_MINUTES = 360
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && { echo some-gpu; exit 0; }
[ "$1" = - ] && { cat > /dev/null; echo "$MISSING"; exit 0; }
echo "$*" >> "$CALLS"
[[ "$*" == *"$FAILING"* ]] && exit 1
exit 0
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$2" >> "$LIMITS"
shift 2
exec "$@"
"""


@pytest.fixture
def call(root, tmp_path):
    """part, … → (exit code, how Python was called, the limits). seconds: how many of the part's are over."""
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, failing: str = "no such call", missing: str = "", seconds: int = 0):
        for name in ("calls", "limits"):
            (tmp_path / name).write_text("")
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
            "CALLS": str(tmp_path / "calls"), "LIMITS": str(tmp_path / "limits"), "OUT": str(tmp_path / "out"),
            "FAILING": failing, "MISSING": missing, "SECONDS": str(seconds),
        }  # fmt: skip
        command = ["bash", str(root / "bench" / "gpu_suite.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [(tmp_path / name).read_text().splitlines() for name in ("calls", "limits")]
        return done, lines[0], [int(limit) for limit in lines[1]]

    return run


def minutes_of(line: str) -> float | None:
    words = line.split()
    return float(words[words.index("--minutes") + 1]) if "--minutes" in words else None


@pytest.mark.parametrize("part", "1234")
@pytest.mark.parametrize("seconds", [0, 200, 300, 340])
def test_a_part_starts_nothing_that_could_end_after_six_minutes(part, seconds, call):
    done, calls, limits = call(part, missing="8192x4096x4096x16", seconds=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(limits) >= (2 if seconds < 300 else 0)
    assert all(seconds + limit + 10 < SIX_MINUTES for limit in limits)  # 10 for the targets
    for line in calls:  # what ends by itself has time to let its last row come to its end
        if (minutes := minutes_of(line)) and minutes > 0.1:
            assert 60 * minutes + 25 <= max(limits) + 1
    if seconds == 340:
        assert limits == [] and "goes on from here" in done.stdout


def test_files_of_tests_that_passed_are_not_run_again(call, root):
    def files(calls: list[str]) -> set[str]:
        return {line.split()[-1] for line in calls if "-m pytest" in line}

    done, calls, _ = call("1", failing="tests/kernels/test_rope.py")
    with_gpu = {
        str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()
    }
    kernels = {f"tests/kernels/{path.name}" for path in (root / "tests" / "kernels").glob("test_*.py")}
    assert done.returncode == 1 and files(calls) >= with_gpu | kernels
    done, calls, _ = call("1")
    assert done.returncode == 0 and files(calls) == {"tests/kernels/test_rope.py"}
    assert files(call("1")[1]) == set()


def test_shapes_that_were_measured_are_not_measured_again(call):
    assert any("lora_paths.py --shapes 1x2x3x4" in line for line in call("2", missing="1x2x3x4")[1])
    assert not any("lora_paths.py" in line for line in call("2", missing="")[1])
    assert any("nf4_memory.py" in line and "--size 1024" in line for line in call("4", missing="1024")[1])
    assert not any("nf4_memory.py" in line for line in call("4", missing="")[1])


def test_first_hands_its_arguments_on(call, tmp_path):
    _, calls, _ = call("first", "--dry_run", "--minutes", "3")
    assert calls == [f"bench/gpu_first.py --out {tmp_path / 'out'} --dry_run --minutes 3"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["5"], "5"), (["1", "--dry_run"], "first"), (["3", "more"], "more"), (["--dry_run"], "first")],
)
def test_a_mistake_is_one_sentence(arguments, named, call):
    done, calls, _ = call(*arguments)
    assert done.returncode == 2 and done.stdout == "" and calls == []
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr


def test_the_usage_names_every_part(call):
    done, _, _ = call()
    assert done.returncode == 2 and all(f"gpu_suite.sh {part} " in done.stdout for part in ("first", *"1234"))
    assert not any(line.startswith(("#", "set ")) for line in done.stdout.splitlines())


def test_results_in_the_tree_are_not_touched_where_out_names_another_folder(call, root, tmp_path):
    call("1")
    assert not (root / "bench" / "results" / "some-gpu").exists()
    assert (tmp_path / "out" / "passed_tests.txt").exists() and Path(tmp_path / "out" / "suite_1.log").exists()
