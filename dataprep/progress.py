"""How does long work show that it goes on: one live line on a terminal, a line for each phase elsewhere?"""

import sys
import time
from typing import TextIO

_REDRAW_SECONDS = 0.2


class Progress:
    """Prints lines to `stream` (default stdout) and keeps, on a terminal only, one live line below them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._shown = False
        self._drawn = 0.0

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        encoding = self._stream.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)

    def show(self, phase: str, done: float, total: float, started: float, unit: str | None = None) -> None:
        """Redraw the live line: done and total in bytes, or in what `unit` names; started by time.monotonic()."""
        now = time.monotonic()
        if not self._live or now - self._drawn < _REDRAW_SECONDS or not total:
            return
        self._drawn = now
        seconds = max(now - started, 1e-9)
        left = duration(seconds * (total - done) / done) if done else "?"
        share = min(1.0, done / total)
        if unit is None:
            much = f"{megabytes(done)} of {megabytes(total)}  {done / seconds / 1e6:.1f} MB/s"
        else:
            much = f"{done:,} of {total:,} {unit}  {done / seconds:,.1f} {unit}/s"
        line = f"{phase} {share:4.0%}  {much}  {left} left"
        print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)
        self._shown = True

    def clear(self) -> None:
        """Take the live line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._shown = False


def megabytes(size: float) -> str:
    """Bytes as "12.3 MB" (or GB), decimal."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as "1:02:03", "2:03" or "3 s"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
