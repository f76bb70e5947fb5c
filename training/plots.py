"""How did the runs go, as one picture? Loss, learning rate, gradient norm, speed, bits per byte and memory in a PNG.

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

from training.run_files import RunHistory, column, robust_range, smoothed

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_NOTABLE_EVENTS = ("alert", "nan", "oom")


def plot_runs(runs: Sequence[RunHistory], path: str | os.PathLike) -> None:
    """Draw `runs`, overlaid with one colour each, into the PNG file `path`, which is replaced in one step.

    Training loss is shown raw (pale) and smoothed, validation as circles. Dotted lines mark where a run was resumed,
    red ticks on the loss panel's floor where it reported an alert. Raises OSError when `path` cannot be written.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    _draw_loss(panels[0, 0], runs)
    _draw_column(panels[0, 1], runs, "lr", "learning rate")
    _draw_column(panels[0, 2], runs, "grad_norm", "gradient norm", smooth=True, log=True)
    _draw_column(panels[1, 0], runs, "tok_s", "tokens per second", from_zero=True)
    _draw_bits_per_byte(panels[1, 1], runs)
    _draw_column(panels[1, 2], runs, "mem_gb", "memory (GB)", from_zero=True)
    for panel in panels.flat:
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.set_xlim(left=0)
    figure.suptitle(_title(runs), fontsize=11, parse_math=False)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(unfinished, format="png", dpi=100)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_loss(panel: Axes, runs: Sequence[RunHistory]) -> None:
    ranges = []
    for colour, run in _coloured(runs):
        steps, loss = column(run.train, "step"), column(run.train, "loss")
        average = smoothed(loss)
        val_steps, val = column(run.evals, "step"), column(run.evals, "val_loss")
        label = _label(run) if len(runs) > 1 else "training, smoothed"
        panel.plot(steps, loss, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(steps, average, color=colour, linewidth=1.6, label=label)
        if np.isfinite(val).any():
            best = int(np.nanargmin(val))
            label = None if len(runs) > 1 else f"validation, best {val[best]:.4f} at {int(val_steps[best]):,}"
            panel.plot(val_steps, val, "o", color=colour, markersize=4, markeredgecolor="black", label=label)
        for event in run.events:
            if event["event"] == "resume":
                panel.axvline(event["step"], color=colour, linestyle=":", linewidth=1)
            elif event["event"] in _NOTABLE_EVENTS:
                panel.plot(event["step"], 0.0, "|", color="red", markersize=12, transform=panel.get_xaxis_transform())
        if len(loss) or len(val):
            ranges.append(robust_range(loss, val))
    if ranges:
        panel.set_ylim(min(low for low, _ in ranges), max(high for _, high in ranges))
        for text in panel.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    panel.set_title("loss (nats per token)" + ("; circles: validation" if len(runs) > 1 else ""), fontsize=10)


def _draw_column(
    panel: Axes,
    runs: Sequence[RunHistory],
    key: str,
    title: str,
    smooth: bool = False,
    log: bool = False,
    from_zero: bool = False,
) -> None:
    """One value of the training rows against the step; `smooth` draws the raw values pale under their average."""
    shown = False
    for colour, run in _coloured(runs):
        steps, values = column(run.train, "step"), column(run.train, key)
        shown = shown or bool(np.isfinite(values).any())
        panel.plot(steps, values, color=colour, alpha=0.3 if smooth else 1.0, linewidth=1)
        if smooth:
            panel.plot(steps, smoothed(values), color=colour, linewidth=1.6)
    if log and any((column(run.train, key) > 0).any() for run in runs):
        panel.set_yscale("log")
    if from_zero and shown:
        panel.set_ylim(bottom=0)
    panel.set_title(title if shown else f"{title}: not recorded", fontsize=10)


def _draw_bits_per_byte(panel: Axes, runs: Sequence[RunHistory]) -> None:
    ranges = []
    for colour, run in _coloured(runs):
        values = column(run.evals, "val_bpb")
        panel.plot(column(run.evals, "step"), values, "o-", color=colour, markersize=4, linewidth=1)
        if np.isfinite(values).any():
            ranges.append(robust_range(values))
    if ranges:
        panel.set_ylim(min(low for low, _ in ranges), max(high for _, high in ranges))
    panel.set_title("validation, bits per byte" + ("" if ranges else ": not recorded"), fontsize=10)


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
