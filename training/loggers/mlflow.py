"""How do a run's rows become MLflow's? Where MLFLOW_TRACKING_URI says, else where MLflow keeps runs by itself."""

import os

from training.log_to import LoggedRun, Row, figures_of

_PARAMS_AT_ONCE = 100  # MLflow's limits
_LONGEST_PARAM = 6000


class Logger:
    """A run of MLflow, whose id later starts go on with. Samples and events are small files among its artifacts."""

    takes_back = False

    def __init__(self, run: LoggedRun) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        if run.kept is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "groundup")
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self.kept = self._client.create_run(number, run_name=run.name).info.run_id
            params = [Param(option, str(value)[:_LONGEST_PARAM]) for option, value in run.config.items()]
            for start in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(self.kept, params=params[start : start + _PARAMS_AT_ONCE])
        else:
            self.kept = run.kept
            self._client.update_run(self.kept, status="RUNNING")
        # parameters of MLflow never change; the options of a later start may
        self._client.log_dict(self.kept, run.config, f"options/from_step_{run.step}.json")

    def log(self, kind: str, row: Row) -> None:
        step = row["step"]
        if kind == "sample":
            self._client.log_text(self.kept, f"{row['prompt']}{row['sample']}", f"samples/step_{step}.txt")
        elif kind == "event":
            self._client.log_text(self.kept, row["message"], f"events/step_{step}_{row['event']}.txt")
        else:
            time = int(row["time"] * 1000)
            metrics = [self._metric(name, value, time, step) for name, value in figures_of(kind, row).items()]
            self._client.log_batch(self.kept, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.kept, "FAILED" if failed else "FINISHED")
