"""Which classes does a classifier take for which? A matrix of counts as a PNG."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.plots import save_png

_MOST_NUMBERS = 25  # classes, beyond which numbers in the cells could not be read
_MOST_NAMES = 60


def plot_confusion(counts: np.ndarray, names: Sequence[str], path: str | os.PathLike, *, title: str = "") -> None:
    """Draw confusion counts, (K, K) with labels as rows and predictions as columns, into the PNG `path`, replaced in one step.

    A cell is as dark as its share of its row: the share of a class's examples that are predicted so. Raises OSError when
    `path` cannot be written.
    """
    size = len(names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = min(3 + 0.45 * size, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the label's examples", shrink=0.8)
    if size <= _MOST_NAMES:
        shown = [name[:24] for name in names]
        axes.set_xticks(range(size), shown, rotation=90 if size > 6 else 0, fontsize=8, parse_math=False)
        axes.set_yticks(range(size), shown, fontsize=8, parse_math=False)
    if size <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    accuracy = np.trace(counts) / max(int(counts.sum()), 1)
    axes.set_title(f"{title}{': ' if title else ''}accuracy {accuracy:.1%}", fontsize=10, parse_math=False)
    save_png(figure, path)
