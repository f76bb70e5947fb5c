"""Where does the time of a step go? A Chrome trace of some steps and a table by operator: --profile."""

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from errors import UserError
from ranks import Ranks
from training.metrics import RunLog

SKIPPED = 3  # first steps: what they compile, allocate and load is in no later one
TABLE_ROWS = 40


class StepProfile:
    """Watches `steps` steps after the first few of this start of a run; without a number, nothing.

    In save_dir/profile each rank leaves trace_rank_N.json.gz, which chrome://tracing and ui.perfetto.dev show, and
    operators_rank_N.txt, the operators by the time that they took themselves. Raises UserError where the run is too short.
    """

    def __init__(self, steps: int | None, *, left: int, save_dir: str | Path, ranks: Ranks, log: RunLog) -> None:
        self._profile: profile | None = None
        if steps is None:
            return
        if left < SKIPPED + steps:
            raise UserError(
                f"--profile {steps} watches the steps after the first {SKIPPED}, and this run has {left} left: raise "
                "--max_steps, or profile fewer"
            )
        self._folder, self._ranks, self._log, self._cuda = (
            Path(save_dir) / "profile",
            ranks,
            log,
            ranks.device.type == "cuda",
        )
        self._steps, self._done = steps, 0
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._cuda],
            schedule=schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self, step: int) -> None:
        """After each step of the run, with its number."""
        if self._profile is None:
            return
        self._done = step
        self._profile.step()

    def close(self) -> None:
        """Before the run leaves, however early; what was watched until then is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, seen: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace_rank_{self._ranks.rank}.json.gz"
        seen.export_chrome_trace(str(trace))
        operators = seen.key_averages()
        by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        table = operators.table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=80)
        (self._folder / f"operators_rank_{self._ranks.rank}.txt").write_text(table + "\n")
        total = sum(getattr(one, by) for one in operators) or 1
        most = sorted(operators, key=lambda one: -getattr(one, by))[:5]
        shares = ", ".join(f"{one.key} {100 * getattr(one, by) / total:.0f} %" for one in most)
        self._log.event(self._done, "profile", f"profile of {self._steps} steps: {trace}; most of the time: {shares}")
