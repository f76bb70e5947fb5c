"""Does the first call on a GPU go on after whatever breaks, tell what broke, and leave the rest to the next call?

The runner is tried with checks made for that; the real list runs on the CPU with tiny shapes (exhaustive), and would see a
kernel, a back end or a compiled loss that is wrong.
"""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import first_checks, gpu_first
from bench.gpu_first import FAILED, NOT_RUN, PASSED, SKIPPED, Check, Place, Report, Skipped
from bench.operations import operations
from errors import UserError
from kernels.attention_backends import ATTENTION_BACKENDS
from training.option_groups import STAGES

DRY = {"device": "cpu", "dry_run": True}


def passes(place: Place) -> dict:
    return {"figure": 1.5}


def raises(place: Place) -> dict:
    raise ValueError("a reason\nin two lines")


def is_skipped(place: Place) -> dict:
    raise Skipped("no such thing here")


def run(folder: Path, checks: list[Check], seconds: float = 60, jobs: int = 2) -> tuple[int, dict, str]:
    """(exit code, rows, log) of one call, which takes up what an earlier one left in the folder."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    report = Report(folder, checks, gpu_first.kept_rows(folder, DRY, again=False), dict(DRY))
    until = time.monotonic() + seconds
    code = gpu_first.run_checks(checks, Place(work, "cpu", True), report, until=until, jobs=jobs)
    log = folder / "first.log"
    return code, rows_of(folder), log.read_text() if log.exists() else ""


def rows_of(folder: Path) -> dict:
    return json.loads((folder / "first.json").read_text())["rows"]


def test_the_table_has_a_line_a_check_in_the_order_of_the_list(tmp_path):
    checks = [Check("second", is_skipped), Check("first", passes), Check("a third", passes)]
    code, rows, log = run(tmp_path, checks)
    assert code == 0 and [rows[check.name]["status"] for check in checks] == [SKIPPED, PASSED, PASSED]
    lines = (tmp_path / "first.txt").read_text().splitlines()[1:-1]
    assert [check.name in line for check, line in zip(checks, lines, strict=True)] == [True] * 3
    assert "no such thing here" in lines[0] and "figure 1.5" in lines[1]
    assert all(f"  {check.name}" in log for check in checks)


def exits(place: Place) -> dict:
    sys.exit("a script's last word")


def dies(place: Place) -> dict:
    print("before it died", flush=True)
    os._exit(7)


def is_killed(place: Place) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def touches_what_is_not_its_own(place: Place) -> dict:
    ctypes.string_at(0)
    return {}


def hangs(place: Place) -> dict:
    time.sleep(600)
    return {}


@pytest.mark.parametrize(
    ("broken", "error", "logged"),
    [
        (raises, "in two lines", "in raises"),  # the traceback
        (exits, "a script's last word", "in exits"),
        (dies, "exit code 7", "before it died"),
        (is_killed, "SIGKILL", ""),
        (touches_what_is_not_its_own, "SIGSEGV", "in touches_what_is_not_its_own"),
        (hangs, "not done after 1 s", "in hangs"),
    ],
)
def test_what_breaks_is_recorded_and_the_rest_still_runs(broken, error, logged, tmp_path):
    checks = [Check("good", passes), Check("broken", broken, 1.0), Check("later", passes)]
    code, rows, log = run(tmp_path, checks, jobs=1)
    assert code == 1
    assert [rows[check.name]["status"] for check in checks] == [PASSED, FAILED, PASSED]
    assert error in rows["broken"]["error"] and error in (tmp_path / "first.txt").read_text()
    assert logged in log.partition("  broken")[2]


def test_a_check_that_hangs_takes_what_it_started_with_it(tmp_path):
    def starts_another(place: Place) -> dict:
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "child").write_text(str(child.pid))
        return hangs(place)

    run(tmp_path, [Check("broken", starts_another, 1.0)])
    assert ended(int((tmp_path / "child").read_text()))


def ended(process: int) -> bool:
    """Whether a process is gone, or waits to be collected by whoever adopted it."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_second_call_runs_only_what_is_missing(tmp_path):
    def counted(name: str, then=passes):
        def check(place: Place) -> dict:
            with (tmp_path / "ran").open("a") as ran:
                ran.write(f"{name}\n")
            return then(place)

        return check

    def ran() -> list[str]:
        names = (tmp_path / "ran").read_text().split()
        (tmp_path / "ran").unlink()
        return sorted(names)

    def checks(then) -> list[Check]:
        return [
            Check("feed", counted("feed"), feeds=True),
            Check("feed_of_none", counted("feed_of_none"), feeds=True),
            Check("good", counted("good")),
            Check("absent", counted("absent", is_skipped)),
            Check("broken", counted("broken", then), needs=("feed",)),
        ]

    assert run(tmp_path, checks(raises))[0] == 1
    assert ran() == ["absent", "broken", "feed", "feed_of_none", "good"]
    code, rows, _ = run(tmp_path, checks(passes))
    assert code == 0 and ran() == ["broken", "feed"]  # what it reads was in a folder that is gone
    assert rows["good"]["status"] == PASSED and rows["absent"]["status"] == SKIPPED
    assert run(tmp_path, checks(passes))[0] == 0 and not (tmp_path / "ran").exists()


def test_a_dry_run_says_nothing_about_a_gpu(tmp_path):
    run(tmp_path, [Check("good", passes)])
    assert gpu_first.kept_rows(tmp_path, DRY, again=False)["good"]["status"] == PASSED
    assert gpu_first.kept_rows(tmp_path, DRY, again=True) == {}
    assert gpu_first.kept_rows(tmp_path, {"device": "cpu", "dry_run": False}, again=False) == {}
    assert gpu_first.kept_rows(tmp_path, {"device": "nvidia-h100", "dry_run": True}, again=False) == {}


def test_rows_of_an_earlier_commit_are_counted(tmp_path):
    checks = [Check("earlier", passes), Check("later", passes)]
    Report(tmp_path, checks, {}, {**DRY, "git_commit": "a"}).add(checks[0], {"status": PASSED})
    rows = gpu_first.kept_rows(tmp_path, DRY, again=False)
    report = Report(tmp_path, checks, rows, {**DRY, "git_commit": "b"})
    report.add(checks[1], {"status": PASSED})
    assert "1 of them at another commit" in (tmp_path / "first.txt").read_text()


def test_what_time_does_not_allow_is_left_to_the_next_call(tmp_path):
    checks = [Check("long", hangs), Check("later", passes)]
    start = time.monotonic()
    code, rows, _ = run(tmp_path, checks, seconds=1, jobs=1)
    assert code == 0 and time.monotonic() - start < 10
    assert [rows[name]["status"] for name in ("long", "later")] == [NOT_RUN, NOT_RUN]
    assert "while it ran" in rows["long"]["error"] and "goes on from here" in rows["later"]["error"]
    _, rows, _ = run(tmp_path, [Check("long", passes), checks[1]])
    assert [rows[name]["status"] for name in ("long", "later")] == [PASSED, PASSED]


def test_what_needs_a_check_that_failed_is_not_run_and_says_so(tmp_path):
    checks = [
        Check("feed", raises, feeds=True),
        Check("second", passes, needs=("feed",)),
        Check("third", passes, needs=("second",)),
    ]
    code, rows, _ = run(tmp_path, checks)
    assert code == 1 and [rows[check.name]["status"] for check in checks] == [FAILED, NOT_RUN, NOT_RUN]
    assert "needs feed" in rows["second"]["error"] and "needs second" in rows["third"]["error"]


def test_checks_run_side_by_side_but_for_those_that_measure_time(tmp_path):
    def watched(seconds: float):
        def check(place: Place) -> dict:
            start = time.monotonic()
            time.sleep(seconds)
            return {"start": start, "end": time.monotonic()}

        return check

    lengths = {"a": 0.3, "b": 1.0, "timed": 0.3, "c": 0.5, "d": 0.5}
    checks = [Check(name, watched(seconds), alone=name == "timed") for name, seconds in lengths.items()]
    _, rows, _ = run(tmp_path, checks, jobs=2)
    spans = {name: rows[name]["figures"] for name in lengths}

    def together(one: str, other: str) -> bool:
        return max(spans[one]["start"], spans[other]["start"]) < min(spans[one]["end"], spans[other]["end"])

    assert together("a", "b") and together("c", "d")
    assert not any(together("timed", name) for name in lengths if name != "timed")


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from bench.gpu_first import Check, Place, Report, run_checks
folder = Path({folder!r})
def good(place): return {{}}
def hangs(place):
    import os
    (folder / "process").write_text(str(os.getpid()))
    (folder / "process").rename(folder / "started")
    time.sleep(600)
checks = [Check("good", good), Check("long", hangs), Check("later", good)]
report = Report(folder, checks, {{}}, {{"device": "cpu", "dry_run": True}})
run_checks(checks, Place(folder, "cpu", True), report, until=time.monotonic() + 60, jobs=1)
"""


def test_a_killed_call_leaves_readable_files_and_no_process(root, tmp_path):
    """Killed while a check runs, which ends with it."""
    program = KILLED.format(root=str(root), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as call:
        while not (tmp_path / "started").exists():
            assert call.poll() is None, "it ended by itself"
            time.sleep(0.01)
        call.kill()
    assert ended(int((tmp_path / "started").read_text()))
    assert [row["status"] for row in rows_of(tmp_path).values()].count(PASSED) == 1
    table = (tmp_path / "first.txt").read_text().splitlines()
    assert len(table) == 5 and "1 passed, 0 failed, 0 skipped, 2 not run" in table[-1]
    assert "  good" in (tmp_path / "first.log").read_text()
    code, rows, _ = run(tmp_path, [Check(name, passes) for name in ("good", "long", "later")])
    assert code == 0 and all(row["status"] == PASSED for row in rows.values())


@pytest.mark.parametrize("with_waiting", [raises, passes])
def test_a_cuda_error_is_traced_again_with_every_kernel_waited_for(with_waiting, tmp_path):
    """So that the traceback names the kernel that failed; where nothing fails then, that is said, and it stays a failure."""

    def fails_late(place: Place) -> dict:
        if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
            return with_waiting(place)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checks = [Check("broken", fails_late), Check("later", passes, needs=("broken",))]
    code, rows, log = run(tmp_path, checks)
    assert code == 1 and rows["broken"]["status"] == FAILED and rows["later"]["status"] == NOT_RUN
    assert log.count("  broken") == 2 and "illegal memory access" in log
    assert ("race" if with_waiting is passes else "in two lines") in rows["broken"]["error"]


def test_long_output_is_cut_in_the_middle(tmp_path):
    def talks(place: Place) -> dict:
        print("the beginning")
        print("x" * 10 * gpu_first.KEPT_OUTPUT)
        raise ValueError("the end")

    _, _, log = run(tmp_path, [Check("talks", talks)])
    assert "the beginning" in log and "ValueError: the end" in log and len(log) < 1.1 * gpu_first.KEPT_OUTPUT


# ---------------------------------------------------------------------------------------------------------- the real list


def test_the_list_has_every_stage_precision_and_way_every_back_end_kernel_and_speed():
    checks = first_checks.all_checks()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    wanted = {
        f"{stage}{mode} {precision}{compiled}"
        for stage in STAGES
        for mode in ("", " LoRA", " QLoRA")
        for precision in ("bf16", "fp16")
        for compiled in ("", " compiled")
    }
    wanted |= {f"attention {name}" for name in ATTENTION_BACKENDS if name != "auto"}
    wanted |= {f"kernel {name}" for name in operations()}
    wanted |= {f"speed {size} {way}" for size in ("124m", "1b") for way in ("ours", "transformers")}
    wanted |= {"resume pretrain", "resume sft QLoRA", "generate", "chat"}
    assert wanted <= set(names)
    for index, check in enumerate(checks):
        assert set(check.needs) <= set(names[:index])
        assert check.alone == check.name.startswith("speed")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "cpu", True)


def test_a_wrong_kernel_is_seen(place, monkeypatch):
    assert first_checks.kernel(place, "swiglu")["ours"] < 2e-6
    table = operations()
    right = table["swiglu"].ways["ours"]
    table["swiglu"].ways["ours"] = lambda gate, up: right(gate=gate, up=up) * 1.0001
    monkeypatch.setattr(first_checks, "operations", lambda: table)
    with pytest.raises(AssertionError, match="out0"):
        first_checks.kernel(place, "swiglu")


@pytest.mark.parametrize("fault", ["window", "documents"])
def test_attention_to_the_wrong_tokens_is_seen(fault, place, monkeypatch):
    assert first_checks.back_end(place, "sdpa")["float16 error"] < 2**-10
    right = first_checks.document_mask

    def wrong(starts, batch, length, *, window=None, **settings):
        if fault == "documents" and len(starts) > 3:
            starts = starts[[0, 2, 3, 5, 6]]  # a boundary in each row is gone
        return right(starts, batch, length, window=window and window + (fault == "window"), **settings)

    monkeypatch.setattr(first_checks, "document_mask", wrong)
    with pytest.raises(AssertionError, match="errors"):
        first_checks.back_end(place, "sdpa")


def test_compiled_losses_that_leave_the_eager_ones_are_seen():
    eager = {"figures": {"loss": [6.0, 5.0, 0.5]}}
    assert first_checks.follows([6.0, 5.0, 0.51], eager)["beside eager"] == pytest.approx(0.01)
    for losses in ([6.0, 5.2, 0.5], [6.0, 5.0, 0.55]):
        with pytest.raises(AssertionError, match="apart"):
            first_checks.follows(losses, eager)
    assert "not compared" in first_checks.follows([6.0], {"status": FAILED})["beside eager"]


def test_a_loss_that_is_not_finite_or_a_step_that_is_missing_is_seen(tmp_path):
    def logged(*losses: float | None) -> None:
        rows = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
        first_checks.write_lines(tmp_path / "metrics.jsonl", [{"event": "start"}, *rows])

    logged(3.0, 2.0, 1.0)
    assert first_checks.figures_of(tmp_path, 3)["loss"] == [3.0, 2.0, 1.0]
    for losses in ((3.0, None, 1.0), (3.0, math.nan, 1.0), (3.0, 2.0)):
        logged(*losses)
        with pytest.raises(AssertionError):
            first_checks.figures_of(tmp_path, 3)


def test_a_precision_or_kernels_that_the_gpu_lacks_are_skipped_with_the_reason(place, monkeypatch):
    def lacks_bf16(name: str, device: object) -> None:
        raise UserError(f"this GPU has no {name}")

    monkeypatch.setattr(first_checks, "choose_precision", lacks_bf16)
    with pytest.raises(Skipped, match="no bf16"):
        first_checks.run_stage(place, "sft", "", "bf16", compiled=False)
    monkeypatch.setattr(first_checks, "why_not_triton", lambda device: "too old")
    with pytest.raises(Skipped, match="too old"):
        first_checks.kernel(place, "rope")


def test_without_a_gpu_it_says_that_a_dry_run_needs_none(tmp_path):
    if first_checks.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="no CUDA device; --dry_run"):
        gpu_first.facts(tmp_path, tiny=False)


@pytest.mark.exhaustive
def test_the_whole_list_runs_dry(root, tmp_path):
    """As a user calls it, by the shell; a line that is skipped has its reason, and a second call has nothing to do."""
    command = ["bash", root / "bench" / "gpu_suite.sh", "first", "--dry_run"]
    results = {path: path.stat().st_mtime_ns for path in (root / "bench" / "results").rglob("*")}
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [check.name for check in first_checks.all_checks()]
    rows = rows_of(tmp_path)
    assert sorted(rows) == sorted(names)
    assert {row["status"] for row in rows.values()} == {PASSED, SKIPPED}
    assert all(row["error"] for row in rows.values() if row["status"] == SKIPPED)
    table = (tmp_path / "first.txt").read_text()
    lines = table.splitlines()[1:-1]
    assert all(f"  {name}  " in line + "  " for name, line in zip(names, lines, strict=True)) and table in done.stdout
    assert rows[first_checks.COMPILED_IN_A_DRY_RUN]["status"] == PASSED
    # what needs a GPU or is compiled, and nothing else
    skipped = {name for name, row in rows.items() if row["status"] == SKIPPED}
    assert all("compiled" in name or name.startswith(("attention", "mlm LoRA", "mlm QLoRA")) for name in skipped)
    assert {path: path.stat().st_mtime_ns for path in (root / "bench" / "results").rglob("*")} == results
    assert {path.name for path in tmp_path.iterdir()} == {"first.txt", "first.json", "first.log"}
    start = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0 and rows_of(tmp_path) == rows and time.monotonic() - start < 30
