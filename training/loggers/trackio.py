"""How do a run's rows become those of trackio? In its folder on this machine, or where TRACKIO_SPACE_ID says."""

import os
import uuid

from training.log_to import LoggedRun, Row, figures_of


class Logger:
    """A run of trackio, whose name, unlike ours, is the only one of the kind, so that later starts find it."""

    takes_back = False

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        self._markdown = trackio.Markdown
        self.kept = run.kept or f"{run.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            os.environ.get("TRACKIO_PROJECT", "groundup"), name=self.kept, resume="allow", config=run.config, embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, kind: str, row: Row) -> None:
        if kind == "sample":
            figures = {"sample": self._markdown(f"**{row['prompt']}**{row['sample']}")}
        elif kind == "event":
            figures = {"event": f"{row['event']}: {row['message']}"}
        else:
            figures = figures_of(kind, row)
        self._run.log(figures, step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish()
