"""How did the runs go, as one picture? The stage's curve and five plots beside it in a PNG.

Drawn with matplotlib's Agg canvas directly: no window and no global state, so a training loop may call it at will.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.run_files import RunHistory, column, read_history, robust_range, smoothed
from training.stage_figures import Panel, StageFigures, shared_figures

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_LINES = ("-", "--", ":")
_NOTABLE_EVENTS = ("alert", "nan", "spike", "oom")


def plot_runs(runs: Sequence[RunHistory], path: str | os.PathLike) -> None:
    """Draw `runs`, overlaid with one colour each, into the PNG file `path`, which is replaced in one step.

    Which curves they are depends on the stage (stage_figures.py). Raw values are pale, their average is drawn over them,
    validation as circles. Dotted lines mark where a run was resumed, red ticks on the floor of the first panel where it
    reported an alert. Raises OSError when `path` cannot be written.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(2, 3).flat
    stage = shared_figures(runs)
    _draw_curve(first, runs, stage)
    for axes, panel in zip(others, stage.panels, strict=True):
        _draw_panel(axes, runs, panel)
    for axes in (first, *others):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    figure.suptitle(_title(runs), fontsize=11, parse_math=False)
    save_png(figure, path)


def draw_run(folder: str | os.PathLike) -> None:
    """The curves of the run in `folder`, in curves.png there."""
    plot_runs([read_history(folder)], Path(folder) / "curves.png")


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure into the PNG file `path`, which is replaced in one step. Raises OSError when it cannot be written."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(unfinished, format="png", dpi=100)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_curve(panel: Axes, runs: Sequence[RunHistory], stage: StageFigures) -> None:
    ranges = []
    for colour, run in _coloured(runs):
        steps, values = column(run.train, "step"), column(run.train, stage.curve)
        average = smoothed(values)
        val_steps, val = column(run.evals, "step"), column(run.evals, stage.held_out)
        label = _label(run) if len(runs) > 1 else "training, smoothed"
        panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(steps, average, color=colour, linewidth=1.6, label=label)
        if np.isfinite(val).any():
            best = int(np.nanargmin(stage.sign * val))
            best_label = None if len(runs) > 1 else f"validation, best {val[best]:.4f} at {int(val_steps[best]):,}"
            panel.plot(val_steps, val, "o", color=colour, markersize=4, markeredgecolor="black", label=best_label)
        for event in run.events:
            if event["event"] == "resume":
                panel.axvline(event["step"], color=colour, linestyle=":", linewidth=1)
            elif event["event"] in _NOTABLE_EVENTS:
                panel.plot(event["step"], 0.0, "|", color="red", markersize=12, transform=panel.get_xaxis_transform())
        if len(values) or len(val):
            ranges.append(robust_range(values, val, skip=stage.warm_up))
    if ranges:
        panel.set_ylim(min(low for low, _ in ranges), max(high for _, high in ranges))
        for text in panel.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    title = f"{stage.curve} ({stage.unit})" + ("; circles: validation" if len(runs) > 1 else "")
    panel.set_title(title, fontsize=10)


def _draw_panel(axes: Axes, runs: Sequence[RunHistory], panel: Panel) -> None:
    """Columns of a run that share a panel differ in the line: whole, dashed, …; in their colour where there is one run."""
    drawn, ranges = [], []
    for colour, run in _coloured(runs):
        present = [name for name in panel.train if np.isfinite(column(run.train, name)).any()]
        steps = column(run.train, "step")
        for number, name in enumerate(present):
            values, line = column(run.train, name), _LINES[number % len(_LINES)]
            own = colour if len(runs) > 1 else _COLOURS[number % len(_COLOURS)]
            label = name if len(panel.train) > 1 and len(present) > 1 and name not in drawn else None
            if panel.smooth:
                axes.plot(steps, values, line, color=own, alpha=0.3, linewidth=1)
                values = smoothed(values)
            axes.plot(steps, values, line, color=own, linewidth=1.6, label=label)
            drawn.append(name)
        for name in panel.held_out:
            values = column(run.evals, name)
            if np.isfinite(values).any():
                style = "o-" if not panel.train else "o"
                axes.plot(column(run.evals, "step"), values, style, color=colour, markersize=4, linewidth=1)
                ranges.append(robust_range(values))
                drawn.append(name)
    if panel.style == "log" and any((column(run.train, name) > 0).any() for run in runs for name in panel.train):
        axes.set_yscale("log")
    if panel.style == "from zero" and drawn:
        axes.set_ylim(bottom=0)
    if panel.style == "robust" and ranges:
        axes.set_ylim(min(low for low, _ in ranges), max(high for _, high in ranges))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    circles = "; circles: held out" if panel.train and set(drawn) & set(panel.held_out) else ""
    axes.set_title(panel.title + circles if drawn else f"{panel.title}: not recorded", fontsize=10)


def _coloured(runs: Sequence[RunHistory]) -> list[tuple[str, RunHistory]]:
    return [(_COLOURS[index % len(_COLOURS)], run) for index, run in enumerate(runs)]


def _label(run: RunHistory) -> str:
    """The run's name as matplotlib takes it: short, and not one of the underscore names that legends leave out."""
    return run.name.lstrip("_")[:60] or "run"


def _title(runs: Sequence[RunHistory]) -> str:
    if len(runs) != 1:
        return f"{len(runs)} runs"
    run = runs[0]
    parts = [_label(run)]
    if isinstance(run.run.get("num_params"), int):
        parts.append(f"{run.run['num_params'] / 1e6:,.1f}M parameters")
    if run.run.get("git_commit"):
        parts.append(f"commit {str(run.run['git_commit'])[:10]}")
    return " · ".join([*parts, f"step {run.step:,}"])
