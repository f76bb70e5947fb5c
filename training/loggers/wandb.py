"""How do a run's rows become those of Weights & Biases? Its variables decide where to: WANDB_MODE=offline, WANDB_PROJECT, …"""

import os

from training.log_to import LoggedRun, Row, figures_of


class Logger:
    """A run of wandb, whose id later starts go on with. Its steps are ours: rows are not numbered by its own counter."""

    takes_back = False

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "groundup"), name=os.environ.get("WANDB_NAME", run.name), id=run.kept,
            resume="allow", config=run.config, dir=str(run.folder), allow_val_change=True,
        )  # fmt: skip
        self.kept = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, row: Row) -> None:
        if kind == "sample":
            figures = {"sample": self._table(columns=["prompt", "text"], data=[[row["prompt"], row["sample"]]])}
        elif kind == "event":
            figures = {"event": f"{row['event']}: {row['message']}"}
        else:
            figures = figures_of(kind, row)
        self._run.log({"step": row["step"], **figures})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
