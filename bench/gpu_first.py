"""Does groundup run on this GPU? Every check of first_checks.py once, within minutes, the ones that would hurt users most first.

    bash bench/gpu_suite.sh first               what is missing of the list; everything with --again
    bash bench/gpu_suite.sh first --dry_run     the same list on the CPU with tiny shapes

A check runs in a process of its own, forked from one that has imported torch and not touched CUDA: an illegal memory
access, a crash or a hang ends that check alone. Several run side by side; those that measure time run alone.

Three files, each replaced or added to after every check, so that a run killed at any moment leaves what was done:
first.txt, a line a check; first.json, the same with all figures; first.log, what each check wrote, with its traceback. A
later call keeps what passed or was skipped and runs the rest.
"""

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from arguments import ArgumentParser  # noqa: E402
from bench.measure import read_results, write_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"
KEPT_OUTPUT = 64 * 1024  # bytes of a check's output that go into the log
LARGEST_LOG = 8 * 2**20  # a longer one begins anew with the next call
DRY_RUN_PATIENCE = 4  # times the limits, for a CPU that others use too
POLL = 0.02
CUDA_ERROR = "CUDA error"  # in the output of a check whose traceback may name a later call than the one that failed
PR_SET_PDEATHSIG = 1

Figures = dict[str, Any]


class Skipped(Exception):
    """Why a check cannot run here."""


@dataclass(frozen=True)
class Place:
    """Where a check runs: work holds what earlier checks made, rows what they found."""

    work: Path
    device: str
    tiny: bool
    rows: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """run(place) returns figures, raises Skipped with a reason, or fails by raising anything else.

    limit: seconds. alone: nothing runs beside it, because it measures time. needs: checks that must have passed before it in
    this call. feeds: others read what it leaves in the work folder, so it runs in every call in which they do.
    """

    name: str
    run: Callable[[Place], Figures]
    limit: float = 60.0
    alone: bool = False
    needs: tuple[str, ...] = ()
    feeds: bool = False
    blocking: bool = False


# --------------------------------------------------------------------------------------------------- one check's process


@dataclass
class Running:
    """A check under way: its process, its folder, and when it began and must end."""

    check: Check
    process: int
    folder: Path
    began: float
    ends: float

    def ended(self) -> str | None:
        """None while it runs, else how it ended, in words."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if not process:
            return None
        if os.WIFSIGNALED(status):
            return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"exit code {os.WEXITSTATUS(status)}"

    def kill(self) -> None:
        """End it and what it started. A process that the driver holds may outlive this; it is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        patience = time.monotonic() + 5
        while self.ended() is None and time.monotonic() < patience:
            time.sleep(POLL)

    def output(self) -> str:
        """What it wrote; of more than the log takes, the beginning and the end."""
        written = (self.folder / "output").read_bytes()
        if len(written) > KEPT_OUTPUT:
            written = written[: KEPT_OUTPUT // 4] + b"\n[...]\n" + written[-KEPT_OUTPUT * 3 // 4 :]
        return written.decode("utf-8", errors="replace")


def start(check: Check, place: Place, limit: float, threads: int) -> Running:  # in the forked process it ends it
    """Fork a process that runs the check."""
    folder = Path(tempfile.mkdtemp(prefix="check_", dir=place.work))
    (folder / "output").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, began = os.getpid(), time.monotonic()
    process = os.fork()
    if process:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # as the child does itself; whoever is first
            os.setpgid(process, process)
        return Running(check, process, folder, began, began + limit)
    try:
        settle(folder, parent, limit, threads)
        if check.blocking:
            os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
        row = outcome(check, place)
        write_results(folder / "row.json", row, digits=6)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(0)  # without the interpreter's goodbye, in which a broken CUDA context can hang


def settle(folder: Path, parent: int, limit: float, threads: int) -> None:
    """Make the forked process a check's own: its group, its streams, its end when the parent is gone."""
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(folder / "output", os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(max(0.9 * limit, limit - 2), file=sys.stderr)  # where it hangs, before its end
    torch.set_num_threads(threads)


def outcome(check: Check, place: Place) -> dict:
    """The row of a check that came to its end."""
    try:
        return {"status": PASSED, "figures": check.run(place) or {}}
    except Skipped as reason:
        return {"status": SKIPPED, "error": str(reason)}
    except BaseException as error:  # SystemExit too: whatever ends a check is its result
        traceback.print_exc()
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        return {"status": FAILED, "error": lines[-1][:300]}


# ------------------------------------------------------------------------------------------------------------- all checks


@dataclass
class Report:
    """The three files, and the rows in the order of the list."""

    folder: Path
    checks: list[Check]
    rows: dict[str, dict]
    environment: dict[str, Any]
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "first.log"
        if log.exists() and log.stat().st_size > LARGEST_LOG:
            log.unlink()
        self.write()

    def row(self, check: Check) -> dict:
        return self.rows.get(check.name, {"status": NOT_RUN})

    def add(self, check: Check, row: dict, output: str = "") -> None:
        self.rows[check.name] = row | {"commit": self.environment.get("git_commit")}
        with (self.folder / "first.log").open("a", encoding="utf-8") as log:
            log.write(f"\n===== {line_of(check.name, row)}\n{output.rstrip()}\n")
        self.write()
        print(line_of(check.name, row), flush=True)

    def write(self) -> None:
        rows = {check.name: self.row(check) for check in self.checks}
        write_results(
            self.folder / "first.json", {"environment": self.environment, "rows": rows, "order": list(rows)}, digits=6
        )
        temporary = self.folder / ".first.txt"
        temporary.write_text(self.text(), encoding="utf-8")
        temporary.replace(self.folder / "first.txt")

    def text(self) -> str:
        """A line a check, and how many of each kind."""
        lines = [line_of(check.name, self.row(check)) for check in self.checks]
        found = [self.row(check)["status"] for check in self.checks]
        counts = ", ".join(f"{found.count(status)} {status}" for status in (PASSED, FAILED, SKIPPED, NOT_RUN))
        now = self.environment.get("git_commit")
        if earlier := sum("commit" in row and row["commit"] != now for row in map(self.row, self.checks)):
            counts += f"; {earlier} of them at another commit (--again runs them anew)"
        words = ", ".join(f"{name} {value}" for name, value in self.environment.items() if isinstance(value, str))
        seconds = time.monotonic() - self.started
        if self.environment.get("dry_run"):
            words = f"a dry run: tiny shapes, whatever size a line names; {words}"
        return "\n".join([words, *lines, f"{counts}; this call took {seconds:.0f} s"]) + "\n"


def line_of(name: str, row: dict) -> str:
    figures = ", ".join(f"{key} {in_words(value)}" for key, value in row.get("figures", {}).items())
    seconds = f"{row['seconds']:.1f} s" if "seconds" in row else ""
    return f"{row['status']:<8}{seconds:>8}  {name:<34} {row.get('error') or figures}".rstrip()


def in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "n/a"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def left_to_run(checks: list[Check], rows: dict[str, dict]) -> list[Check]:
    """What has neither passed nor been skipped before, and what feeds it."""
    missing = {check.name for check in checks if rows.get(check.name, {}).get("status") not in (PASSED, SKIPPED)}
    by_name = {check.name: check for check in checks}
    wanted = list(missing)
    for name in wanted:  # grows while it is walked
        wanted += [need for need in by_name[name].needs if by_name[need].feeds or need in missing]
    return [check for check in checks if check.name in wanted]


class Line:
    """Who is next? The checks that wait, those under way, and what became of those of this call."""

    def __init__(self, pending: list[Check], jobs: int) -> None:
        self.pending, self.jobs = pending, jobs
        self.running: list[Running] = []
        self.done: dict[str, str] = {}

    def hopeless(self) -> tuple[Check, str] | None:
        """A check that waits for one that did not pass, and that one's name."""
        for check in self.pending:
            for need in check.needs:
                if self.done.get(need, PASSED) != PASSED:
                    return check, need
        return None

    def next(self) -> Check | None:
        """The first that can start now. One that runs alone lets nobody past."""
        if len(self.running) >= self.jobs or any(one.check.alone for one in self.running):
            return None
        unfinished = {check.name for check in self.pending} | {one.check.name for one in self.running}
        for check in self.pending:
            waits = any(need in unfinished for need in check.needs)
            if check.alone:
                return None if self.running or waits else check
            if not waits:
                return check
        return None


def run_checks(
    checks: list[Check], place: Place, report: Report, *, until: float, jobs: int = 2, patience: float = 1.0
) -> int:
    """Run what the report lacks until `until` (of time.monotonic); an exit code: 1 where a check failed."""
    line = Line(left_to_run(checks, report.rows), jobs)
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def settled(check: Check, row: dict, output: str = "") -> None:
        if row["status"] == FAILED and CUDA_ERROR in output and not check.blocking:
            line.pending.insert(0, replace(check, blocking=True))
        elif check.blocking:
            row = judged_again(report.row(check), row)
            line.done[check.name] = FAILED
        else:
            line.done[check.name] = row["status"]
        report.add(check, row, output)

    while line.pending or line.running:
        now = time.monotonic()
        while found := line.hopeless():
            line.pending.remove(found[0])
            settled(found[0], {"status": NOT_RUN, "error": f"needs {found[1]}, which did not pass"})
        while now < until and (check := line.next()):
            line.pending.remove(check)
            limit = min(check.limit * patience, until - now)
            line.running.append(start(check, Place(place.work, place.device, place.tiny, report.rows), limit, threads))
        if now >= until and not line.running:
            for check in line.pending:
                settled(check, {"status": NOT_RUN, "error": "the time was used up; the same command goes on from here"})
            break
        for one in list(line.running):
            if row := finished(one, until):
                line.running.remove(one)
                settled(one.check, row, one.output())
                shutil.rmtree(one.folder, ignore_errors=True)
        time.sleep(POLL)
    return int(any(report.row(check)["status"] == FAILED for check in checks))


def judged_again(before: dict, row: dict) -> dict:
    """The row of a check that failed with a CUDA error and then ran with every kernel waited for: failed in any case."""
    if row["status"] in (FAILED, NOT_RUN):
        return row if row["status"] == FAILED else before
    words = "not with CUDA_LAUNCH_BLOCKING=1, so kernels or copies race"
    return before | {"error": f"{before.get('error', 'failed')}; {words}"}


def finished(one: Running, until: float) -> dict | None:
    """The row of a check that has ended or must end now; None where it may go on."""
    now, how = time.monotonic(), one.ended()
    seconds = {"seconds": now - one.began}
    if how is None and now < one.ends:
        return None
    if how is None:
        one.kill()
        if one.ends >= until:
            return {"status": NOT_RUN, "error": "the time was used up while it ran"} | seconds
        return {"status": FAILED, "error": f"not done after {one.ends - one.began:.0f} s"} | seconds
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.process, signal.SIGKILL)  # what it may have left running
    if (one.folder / "row.json").exists():
        return json.loads((one.folder / "row.json").read_text(encoding="utf-8")) | seconds
    return {"status": FAILED, "error": f"its process died: {how}"} | seconds


# ----------------------------------------------------------------------------------------------------------- the command


def prepare_process(dry_run: bool) -> None:
    """What the environment must say before torch's CUDA, Triton or the compiler is first asked."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # that there is a GPU is asked without CUDA, which survives no fork
    )
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each of several checks
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined


def facts(work: Path, tiny: bool) -> dict[str, Any]:
    """The machine, as a forked process sees it, which is the first thing to find out. UserError without a GPU."""
    from bench.first_checks import machine

    one = start(Check("machine", machine), Place(work, "cpu" if tiny else "cuda", tiny), 60.0, 1)
    while (row := finished(one, math.inf)) is None:
        time.sleep(POLL)
    if row["status"] == SKIPPED:
        raise UserError(f"{row['error']}; --dry_run runs the same list on the CPU")
    if row["status"] == FAILED:
        raise UserError(f"a forked process cannot use the GPU: {row['error']}\n{one.output()}")
    return row["figures"] | {"dry_run": tiny}


def kept_rows(folder: Path, environment: dict[str, Any], again: bool) -> dict[str, dict]:
    """Rows of an earlier call on the same device; those of a dry run say nothing about a GPU."""
    usual = ROOT / "bench" / "results" / environment["device"] / "first.json"
    path = folder / "first.json"
    found = read_results(path if path.exists() or environment["dry_run"] else usual)
    before = found.get("environment", {})
    same = all(before.get(name) == environment[name] for name in ("device", "dry_run"))
    return found.get("rows", {}) if same and not again else {}


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = ArgumentParser(prog="bench/gpu_first.py", description=__doc__)
    add = parser.add_argument
    add("--dry_run", action="store_true", help="the same list on the CPU with tiny shapes")
    add("--minutes", type=float, default=5.7, help="what is not done by then is left to the next call")
    add("--jobs", type=int, help="checks side by side (default: 8 on a GPU, fewer on a machine of few cores)")
    add("--again", action="store_true", help="run anew what passed before")
    add("--commit", help="the commit that is checked, where there is no git checkout to ask")
    add("--out", type=Path, help="folder of the three files (default: bench/results/DEVICE; a dry run's: a new one)")
    args = parser.parse_args(argv)
    cores = os.cpu_count() or 1
    jobs = args.jobs if args.jobs is not None else max(1, min(8, cores if args.dry_run else cores // 2))
    if jobs < 1 or not args.minutes > 0:
        raise UserError("--jobs and --minutes must be above 0")
    prepare_process(args.dry_run)
    from bench.first_checks import all_checks  # here: the environment had to be prepared

    with tempfile.TemporaryDirectory(prefix="groundup_first_") as work:
        environment = facts(Path(work), args.dry_run) | ({"git_commit": args.commit} if args.commit else {})
        usual = ROOT / "bench" / "results" / environment["device"]
        folder = args.out or (Path(tempfile.mkdtemp(prefix="first_")) if args.dry_run else usual)
        checks = all_checks()
        report = Report(folder, checks, kept_rows(folder, environment, args.again), environment, started)
        place = Place(Path(work), "cpu" if args.dry_run else "cuda", args.dry_run)
        patience = DRY_RUN_PATIENCE if args.dry_run else 1
        until = math.inf if args.dry_run else started + 60 * args.minutes
        code = run_checks(checks, place, report, until=until, jobs=jobs, patience=patience)
        report.write()
        print(f"\n{report.text()}in {folder}: first.txt, first.json, first.log", flush=True)
    return code


if __name__ == "__main__":
    from bench.gpu_first import main as main_of_the_module  # so that its classes are there once

    run_script(main_of_the_module)
