"""How do a run's rows become TensorBoard's? Event files in tensorboard/ of the run's folder: tensorboard --logdir FOLDER."""

from training.log_to import LoggedRun, Row, figures_of


class Logger:
    """Curves, samples and events; events after the step that a run goes on from are purged, as TensorBoard reads it."""

    takes_back = True
    kept: str | None = None

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)
        options = "\n".join(f"| {name} | {value} |" for name, value in run.config.items())
        self._writer.add_text("options", f"| option | value |\n|---|---|\n{options}", run.step)

    def log(self, kind: str, row: Row) -> None:
        step, time = row["step"], row["time"]
        if kind == "sample":
            self._writer.add_text("sample", f"**{row['prompt']}**{row['sample']}", step, time)
        elif kind == "event":
            self._writer.add_text(f"event/{row['event']}", row["message"], step, time)
        else:
            for name, value in figures_of(kind, row).items():
                self._writer.add_scalar(name, value, step, time)
        self._writer.flush()  # a killed run must not lose rows from before its checkpoint

    def close(self, failed: bool) -> None:
        self._writer.close()
