"""How are the runs doing? A live view of every run below a folder, from the files that train.py leaves.

  watch       python utils.py monitor --checkpoint_dir ./checkpoints      (q or Ctrl-C leaves)
  one look    python utils.py monitor --checkpoint_dir ./checkpoints --once
  a picture   python utils.py monitor --checkpoint_dir run1 run2 --plot curves.png

It only reads, on any machine that sees the folder. --once exits with 2 when a run failed, died or hangs.
"""

import argparse
import contextlib
import io
import math
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from arguments import ArgumentParser
from dataprep.progress import megabytes
from errors import UserError, explain_os_error
from tools.charts import Curve, braille_chart, sparkline
from tools.run_health import ENDED, Health, assess, heartbeat_age, memory_total_gb, step_seconds
from training.run_files import (
    CheckpointFiles,
    RunHistory,
    RunReader,
    column,
    duration,
    find_runs,
    list_checkpoints,
    number,
    printable,
    robust_range,
    smoothed,
)
from training.stage_figures import figures_of, last_figures, shared_figures, stage_of

_WIDE = 100  # columns from which the table is readable
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
_SEARCH_SECONDS = 15.0  # between looks for runs that were started since
_CHART_LINES = 12


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint_dir", nargs="+", action="extend", metavar="DIR",
        help="folders of runs: train.py's --save_dir, or any folder above; may be repeated (default: ./checkpoints)",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print one plain snapshot and exit: 0 all well, 2 not")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves of all runs into FILE.png and exit")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="time between two looks")


def main(args: argparse.Namespace) -> int:
    """Watch until the user leaves; with --once or --plot, or without a terminal, look once. Returns the exit code."""
    if not 0.1 <= args.interval <= 86_400:
        raise UserError(f"--interval must lie between 0.1 and 86400 seconds, and is {args.interval:g}")
    watch = RunWatch(args.checkpoint_dir or ["./checkpoints"])
    views = watch.look()
    if args.plot:
        _write_plot(views, args.plot)
        if not args.once:
            return 0
    console = Console(markup=False, emoji=False, highlight=False)
    if not args.once and console.is_terminal and not console.is_dumb_terminal:
        _run_live(watch, console, args.interval)
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII-only pipe gets question marks, not a traceback
    plain = Console(markup=False, emoji=False, highlight=False, color_system=None)
    plain.print(render(views, plain))
    return 2 if any(view.health.failed for view in views) else 0


@dataclass(frozen=True)
class RunView:
    """One run at one moment, and how it is shown: its mark in the chart and its colour."""

    run: RunHistory
    checkpoints: list[CheckpointFiles]
    health: Health
    mark: str
    colour: str


class RunWatch:
    """Every run below some folders, read again and again. Raises UserError when there is none at the start."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders = folders
        self._readers: dict[Path, RunReader] = {}
        self._searched = -math.inf
        for folder in folders:
            if not os.path.isdir(folder):
                raise UserError(f"--checkpoint_dir {folder}: there is no such folder; name train.py's --save_dir")
            if not find_runs(folder):
                raise UserError(
                    f"--checkpoint_dir {folder}: no run is in or below this folder; name train.py's --save_dir"
                )

    def look(self) -> list[RunView]:
        """All runs as they are now, by path; those whose folder is gone are left out."""
        if time.monotonic() - self._searched >= _SEARCH_SECONDS:
            found = sorted({path.resolve() for folder in self._folders for path in find_runs(folder)})
            self._readers = {path: self._readers.get(path) or RunReader(path) for path in found}
            self._searched = time.monotonic()
        views = []
        for index, (path, reader) in enumerate(self._readers.items()):
            mark = chr(ord("a") + index % 26) if len(self._readers) > 1 else "o"
            try:
                run, checkpoints = reader.refresh(), list_checkpoints(path)
                health = assess(run, checkpoints, time.time())
            except FileNotFoundError:  # removed while we looked
                continue
            views.append(RunView(run, checkpoints, health, mark, _COLOURS[index % len(_COLOURS)]))
        return views


# ---- the screen ------------------------------------------------------------------------------------------------------


def render(views: Sequence[RunView], console: Console, height: int | None = None) -> RenderableType:
    """Everything about `views` for a terminal as wide as `console`; the chart takes what `height` lines leave it.

    Text that comes from the runs' files goes through `printable` and into `Text`, never into markup.
    """
    now = time.time()
    above: list[RenderableType] = [_table(views, now)] if console.width >= _WIDE else [_block(v, now) for v in views]
    above += _warnings(views)
    below: list[RenderableType] = [line for view in views for line in _stage_line(view)]
    below += [line for view in views for line in _sparklines(view, console.width)]
    below += [_checkpoint_line(view, len(views) > 1, now) for view in views]
    below += [part for view in views for part in _sample(view, len(views) > 1, console)]
    lines = _CHART_LINES
    if height is not None:
        taken = len(console.render_lines(Group(*above, *below), pad=False)) + 2  # the first line and the chart's title
        lines = max(_CHART_LINES // 2, min(2 * _CHART_LINES, height - taken))
    return Group(*above, *_chart(views, console.width, lines), *below)


def _table(views: Sequence[RunView], now: float) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style="dim", collapse_padding=True)
    table.add_column("run\nmodel", ratio=1, no_wrap=True, overflow="ellipsis")
    curves = sorted({figures_of(view.run).curve for view in views})
    has_text = any(stage_of(view.run) == "pretrain" for view in views)  # whose bytes are counted
    headers = ["step\nprogress", "\n".join(curves) if len(curves) > 1 else f"{curves[0]}\nEMA", "val\nbest"]
    headers += ["bits\n/byte"] * has_text + ["lr\n|grad|", "tok/s\ntokens", "MFU\nmemory"]
    for header in headers:
        table.add_column(header, no_wrap=True)
    table.add_column("left\nends", no_wrap=True)
    table.add_column("state\nheartbeat", no_wrap=True)
    for view in views:
        f = _figures(view, now)
        cells = [
            (f"{view.mark} {view.run.name}", f["what"]),
            (f["step"], f["bar"]),
            (f["curve"], f["ema"]),
            (f["val"], f["best"]),
            *[(f["bpb"], "")] * has_text,
            (f["lr"], f["grad"]),
            (f["tok_s"], f["tokens"]),
            (f["mfu"], f["memory"]),
            (f["left"], f["ends"]),
        ]
        row = [Text(first).append(f"\n{second}", style="dim") for first, second in cells]
        row[0].stylize(view.colour, 0, 1)
        row.append(Text(f["state"], style=_state_style(view)).append(f"\n{f['heartbeat']}", style="dim"))
        table.add_row(*row)
    return table


def _block(view: RunView, now: float) -> Text:
    """The narrow layout of one run: what it is, how far it is, and its figures as `key value`, in four lines."""
    f = _figures(view, now)
    text = Text(overflow="fold").append(f"{view.mark} ", style=view.colour).append(view.run.name, style="bold")
    text.append(f"  {f['what']}  ").append(f"{f['state']} ({f['heartbeat']})", style=_state_style(view))
    lines = (
        (("", f["bar"]), ("step", f["step"]), ("left", f["left"]), ("ends", f["ends"])),
        ((figures_of(view.run).curve, f["curve"]), ("EMA", f["ema"]), ("val", f["val"]), ("best", f["best"]),
         *[("bits/byte", f["bpb"])] * (stage_of(view.run) == "pretrain")),
        (("lr", f["lr"]), ("|grad|", f["grad"]), ("tok/s", f["tok_s"]), ("MFU", f["mfu"]), ("memory", f["memory"]),
         ("tokens", f["tokens"])),
    )  # fmt: skip
    for pairs in lines:
        text.append("\n")
        for key, value in pairs:
            text.append(f" {key}" if key else "", style="dim").append(f" {value} ")
    return text


def _figures(view: RunView, now: float) -> dict[str, str]:
    """What is known of a run as short texts; n/a is what is not known."""
    run, said, stage = view.run, view.run.run, figures_of(view.run)
    last = run.train[-1] if run.train else {}
    validation = run.evals[-1] if run.evals else {}
    curve, val = column(run.train, stage.curve), column(run.evals, stage.held_out)
    best = int(np.nanargmin(stage.sign * val)) if np.isfinite(val).any() else None
    max_steps = number(run.status.get("max_steps", said.get("max_steps")))
    share = max(0.0, min(1.0, run.step / max_steps)) if max_steps > 0 else math.nan
    devices, size = number(said.get("world_size")), number(said.get("num_params"))
    name = printable(said.get("device_name") or said.get("device") or "device n/a").removeprefix("NVIDIA ")
    heartbeat = number(run.status.get("time"))
    going = view.health.state not in (*ENDED, "died", "hung", "unknown")
    left = step_seconds(run) * (max_steps - run.step)
    ends = heartbeat + left if going else heartbeat if view.health.state in ENDED else math.nan
    memory_total = memory_total_gb(run)
    return {
        "what": f"{'' if stage_of(run) == 'pretrain' else stage_of(run) + ' '}{_count(size)} "
        + f"{f'{devices:.0f} x ' if devices > 1 else ''}{name} "
        + printable(said.get("precision") or "precision n/a"),
        "step": f"{run.step:,}/" + (f"{max_steps:,.0f} {share:.0%}" if max_steps > 0 else "n/a"),
        "bar": _bar(share),
        "curve": _format(number(last.get(stage.curve)), ".4f"),
        "ema": _format(smoothed(curve)[-1] if len(curve) else math.nan, ".4f"),
        "val": _format(number(validation.get(stage.held_out)), ".4f"),
        "best": "n/a" if best is None else f"{val[best]:.4f}@{_count(run.evals[best]['step'])}",
        "bpb": _format(number(validation.get("val_bpb")), ".3f"),
        "lr": _format(number(last.get("lr")), ".2e"),
        "grad": _format(number(last.get("grad_norm")), ".3g"),
        "tok_s": _count(number(last.get("tok_s"))),
        "tokens": _count(number(last.get("tokens"))),
        "mfu": _format(number(last.get("mfu")), ".1%"),
        "memory": _format(number(last.get("mem_gb")), ".1f")
        + (f"/{memory_total:.0f}" if math.isfinite(memory_total) else "")
        + " GB",
        "left": duration(left) if going else "-",
        "ends": _clock(ends, now),
        "state": view.health.state,
        "heartbeat": f"{duration(heartbeat_age(run, now))} ago" if math.isfinite(heartbeat) else "no heartbeat",
    }


def _warnings(views: Sequence[RunView]) -> list[Text]:
    lines = [
        Text(f"! {f'{view.run.name}: ' if len(views) > 1 else ''}{sentence}", style="bold red" if grave else "yellow")
        for view in views
        for index, sentence in enumerate(view.health.warnings)
        for grave in [view.health.failed and index == 0]
    ]
    return lines or [Text("no warnings", style="dim")]


def _chart(views: Sequence[RunView], width: int, lines: int) -> list[Text]:
    curves, ranges, stage = [], [], shared_figures([view.run for view in views])
    for view in views:
        average, val = smoothed(column(view.run.train, stage.curve)), column(view.run.evals, stage.held_out)
        if np.isfinite(average).any() or np.isfinite(val).any():
            ranges.append(robust_range(average, val, skip=stage.warm_up))
        steps, val_steps = column(view.run.train, "step"), column(view.run.evals, "step")
        curves.append(Curve(steps, average, val_steps, val, view.mark, view.colour))
    if not ranges:
        return [Text(f"no {stage.curve} yet", style="dim")]
    what = "o: validation" if len(views) == 1 else "letters: validation"
    title = Text(f"{stage.curve}, smoothed ({what})", style="dim")
    return [title, *braille_chart(curves, width, lines, (min(r[0] for r in ranges), max(r[1] for r in ranges)))]


def _stage_line(view: RunView) -> list[Text]:
    """What else tells how its stage goes, in the newest log line and evaluation."""
    figures = last_figures(view.run)
    if not figures:
        return []
    text = Text(overflow="fold").append(f"{view.mark} ", style=view.colour)
    for words, value in figures:
        text.append(f" {words}", style="dim").append(f" {value:.3g} ")
    return [text]


def _sparklines(view: RunView, width: int) -> list[Text]:
    """Speed and gradient norm of the last log lines."""
    room = min(60, (width - 22) // 2)
    speed, norm = (sparkline(column(view.run.train, key), room) for key in ("tok_s", "grad_norm"))
    if not speed and not norm:
        return []
    return [Text(no_wrap=True).append(f"{view.mark} ", style=view.colour).append(f"tok/s {speed}  |grad| {norm}")]


def _checkpoint_line(view: RunView, named: bool, now: float) -> Text:
    text = Text().append(f"{view.mark} " if named else "", style=view.colour)
    if not view.checkpoints:
        return text.append("no checkpoint yet", style="dim")
    last = view.checkpoints[-1]
    text.append(f"checkpoint {last.step:,}: {megabytes(last.bytes)}, {duration(now - last.time)} old, ")
    if last.problem:
        text.append(f"DAMAGED: {last.problem}", style="bold red")
    elif last.path.suffix == ".pt":
        text.append("one file without a manifest, not checked", style="yellow")
    else:
        text.append("sizes as in its manifest", style="green")
    total = sum(checkpoint.bytes for checkpoint in view.checkpoints)
    return text.append(f"; {len(view.checkpoints)} on disk, {megabytes(total)}")


def _sample(view: RunView, named: bool, console: Console) -> list[Text]:
    """The newest sample, cut to a few lines of the terminal."""
    if not view.run.samples:
        return []
    row = view.run.samples[-1]
    title = Text().append(f"{view.mark} " if named else "", style=view.colour)
    title.append(f"sample at step {row['step']:,}", style="dim")
    text = f"{row.get('prompt') or ''}{row['sample']}"[:4000].expandtabs(4)
    body = Text("\n".join(printable(line) for line in text.split("\n")))
    return [title, *body.wrap(console, console.width, overflow="fold")[: 3 if named else 8]]


def _state_style(view: RunView) -> str:
    if view.health.failed:
        return "bold red"
    return "green" if view.health.state in ("training", "finished") else "yellow"


def _bar(share: float, width: int = 16) -> str:
    done = round(width * share) if math.isfinite(share) else 0
    return "█" * done + "░" * (width - done)


def _format(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "n/a"


def _count(value: float) -> str:
    """1234567 as 1.23M."""
    if not math.isfinite(value):
        return "n/a"
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.0f}"


def _clock(moment: float, now: float) -> str:
    """The local time of day, with the date when it is another day; n/a beyond the next ten years."""
    if not abs(moment - now) < 10 * 365 * 86_400:
        return "n/a"
    then, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%d %b %H:%M", then)


# ---- picture and terminal --------------------------------------------------------------------------------------------


def _write_plot(views: Sequence[RunView], path: str) -> None:
    from training.plots import plot_runs  # here: matplotlib takes a second to import

    try:
        plot_runs([view.run for view in views], path)
    except OSError as error:
        reason = explain_os_error(error) or f"{error.strerror}; choose another file"
        raise UserError(f"--plot {path} cannot be written: {reason}") from error
    print(f"wrote {path}")


def _run_live(watch: RunWatch, console: Console, interval: float) -> None:
    """Redraw until q or Ctrl-C; however it ends, the terminal is as before."""
    received: list[int] = []  # noted and looked at between redraws: an exception could be raised anywhere, and be lost
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda caught, _: received.append(caught))
    with (
        _keyboard() as keyboard,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        leave = False
        while not leave and not received:
            screen = render(watch.look(), console, console.height)
            title = Text(time.strftime("%H:%M:%S  q leaves"), style="dim")
            live.update(Group(title, screen), refresh=True)
            leave = _wait(keyboard, interval)
    if received and received[0] != signal.SIGINT:
        sys.exit(128 + received[0])


@contextlib.contextmanager
def _keyboard() -> Iterator[int | None]:
    """Standard input set to give each key at once, as a file descriptor; None when it is not a terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _wait(keyboard: int | None, seconds: float) -> bool:
    """Wait for the next look; True when the user asks to leave. Any other key looks at once."""
    if keyboard is None:
        time.sleep(seconds)
        return False
    if not select.select([keyboard], [], [], seconds)[0]:
        return False
    keys = os.read(keyboard, 64)
    return not keys or keys.lower().startswith(b"q")  # nothing to read: the terminal is gone
