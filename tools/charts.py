"""How is a curve drawn with characters? Braille cells, two dots wide and four high, and one-line sparklines."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # [row, column] in a cell (Unicode, U+2800)
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """A line through (x, y), both (n,), x rising, and points (mark_x, mark_y), each shown as the character `mark`."""

    x: np.ndarray
    y: np.ndarray
    mark_x: np.ndarray
    mark_y: np.ndarray
    mark: str
    colour: str


def braille_chart(curves: Sequence[Curve], width: int, height: int, y_range: tuple[float, float]) -> list[Text]:
    """`curves`, overlaid, as `height` lines of `width` characters: the y axis on the left, the x axis on the last line.

    Dots outside `y_range` (low, high) are left out; marks outside are moved to the edge, so that none is missed.
    """
    columns, rows = max(2, width - 9), max(2, height - 1)
    xs = np.concatenate([part[np.isfinite(part)] for curve in curves for part in (curve.x, curve.mark_x)])
    left, right = (float(xs.min()), float(xs.max())) if len(xs) else (0.0, 1.0)
    low, high = y_range
    cells, colours, marks = np.zeros((rows, columns), int), np.full((rows, columns), "", object), {}

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keep = np.isfinite(x) & np.isfinite(y)
        across = (x[keep] - left) / (right - left or 1.0) * (2 * columns - 1)
        return np.rint(across).astype(int), (high - y[keep]) / (high - low) * (4 * rows - 1)

    for curve in curves:
        across, down = place(curve.x, curve.y)
        used = np.unique(across)  # several points of one dot column: their mean
        means = np.bincount(across, weights=down)[used] / np.bincount(across)[used] if len(used) else np.empty(0)
        every = np.arange(used[0], used[-1] + 1) if len(used) else used
        line = np.clip(np.interp(every, used, means) if len(used) else means, -1, 4 * rows)
        for index, column in enumerate(every):
            before, here = np.rint(line[[max(0, index - 1), index]]).astype(int)
            for row in range(here, before, 1 if here < before else -1) or [here]:  # joined to the column before
                if 0 <= row < 4 * rows:
                    cells[row // 4, column // 2] |= _DOTS[row % 4, column % 2]
                    colours[row // 4, column // 2] = curve.colour
        for column, row in zip(*place(curve.mark_x, curve.mark_y), strict=True):
            marks[min(rows - 1, max(0, round(row) // 4)), int(column) // 2] = (curve.mark, curve.colour)

    lines = []
    for row in range(rows):
        label = {0: high, rows // 2: high - (high - low) * (rows // 2 + 0.5) / rows, rows - 1: low}.get(row)
        line = Text(no_wrap=True).append(f"{'' if label is None else f'{label:.4g}':>8}│", style="dim")
        for column in range(columns):
            character, colour = marks.get((row, column), (chr(0x2800 + cells[row, column]), colours[row, column]))
            line.append(character, style=colour or "default")
        lines.append(line)
    first, last = f"{left:,.0f}", f"{right:,.0f}"
    lines.append(Text(f"{'step':>8} {first}{last:>{columns - len(first)}}", style="dim", no_wrap=True))
    return lines


def sparkline(values: np.ndarray, width: int) -> str:
    """The last rows of `values` (n,), one character each, at most `width`; a blank where a value is not finite.

    The tallest bar is the largest value, the lowest is the smallest; equal values are all drawn half high.
    """
    values = values[-width:]
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    low, span = finite.min(), finite.max() - finite.min()
    heights = (values - low) / span * (len(_BARS) - 1) if span > 0 else np.full(len(values), len(_BARS) // 2 - 1.0)
    return "".join(
        _BARS[round(height)] if np.isfinite(value) else " " for height, value in zip(heights, values, strict=True)
    )
