"""Does the monitor tell a sound run from a sick one, show the right figures, and leave the terminal as it was?"""

import json
import math
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from rich.cells import cell_len

from arguments import ArgumentParser
from errors import UserError
from tools import monitor
from tools.charts import Curve, braille_chart, sparkline

STEPS = range(10, 2001, 10)


@dataclass
class FakeRun:
    """The files of a sound run at step 2000 of 4000, for a test to spoil."""

    run: dict = field(default_factory=dict)
    status: dict = field(default_factory=dict)
    train: list = field(default_factory=list)
    evals: list = field(default_factory=list)
    others: list = field(default_factory=list)

    def __post_init__(self):
        now, noise = time.time(), np.random.default_rng(0).normal(0, 0.03, len(STEPS))
        config = {
            "vocab_size": None,
            "hidden_size": 64,
            "warmup_steps": 100,
            "save_interval": 500,
            "keep_checkpoints": 3,
        }
        self.run = {
            "name": "sound", "config": config, "device": "cuda", "device_name": "NVIDIA H100", "world_size": 2,
            "num_params": 1_262_144, "num_params_non_embedding": 1_000_000, "max_steps": 4000, "precision": "bfloat16",
            "pid": os.getpid(), "host": socket.gethostname(), "started": now - 1010,
        }  # fmt: skip
        self.status = {
            "state": "training",
            "step": 2000,
            "max_steps": 4000,
            "time": now,
            "eta_s": 1000.0,
            "error": None,
        }
        self.train = [
            {
                "step": step, "time": now, "loss": 2.5 + 5 * math.exp(-step / 100) - step * 1e-5 + noise[index],
                "lr": 3e-4, "grad_norm": 0.7, "tok_s": 1000.0, "mfu": 0.41, "dt": 0.5, "mem_gb": 18.3,
                "tokens": 500 * step,
            }
            for index, step in enumerate(STEPS)
        ]  # fmt: skip
        self.evals = [
            {"step": step, "val_loss": 2.7 - step * 1e-5, "val_bpb": 1.1 - step * 1e-5}
            for step in range(200, 2001, 200)
        ]

    def write(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        start = {"step": 0, "event": "start", "message": "started"}
        rows = [start, *self.train, *self.evals, *self.others]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "run.json").write_text(json.dumps(self.run))
        (folder / "status.json").write_text(json.dumps(self.status))
        return folder


def write_checkpoint(run_dir, step=2000, size=1000):
    folder = run_dir / f"checkpoint_step_{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * size)
    manifest = {"format": 1, "step": step, "files": {"model.safetensors": {"bytes": size}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def once(capsys, monkeypatch):
    """Runs `monitor --once` at a width; returns (exit code, what it printed)."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)

    def call(*folders, columns=140, flags=()):
        monkeypatch.setenv("COLUMNS", str(columns))
        parser = ArgumentParser()
        monitor.add_arguments(parser)
        code = monitor.main(parser.parse_args(["--checkpoint_dir", *map(str, folders), "--once", *flags]))
        return code, capsys.readouterr().out

    return call


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 99, 100, 140, 200])
def test_every_figure_is_shown_and_no_line_is_too_long(once, tmp_path, columns):
    fake = FakeRun()
    fake.evals[4]["val_loss"] = 2.5
    fake.others = [{"step": 2000, "prompt": "def ", "sample": "main():\n    return 日本"}]
    folder = fake.write(tmp_path / "r")
    write_checkpoint(folder, 1500)
    write_checkpoint(folder, 2000)
    code, out = once(folder, columns=columns)
    losses = np.array([row["loss"] for row in fake.train])
    weights = (1 - 2 / 6) ** np.arange(len(losses))[::-1]  # an average over about 5 rows
    expected = [
        "sound", "1.26M", "training", "2,000/4,000", "50%", "████████░", f"{losses[-1]:.4f}",
        f"{np.average(losses, weights=weights):.4f}", "2.6800", "2.5000@1k", "1.080", "3.00e-04", "0.7", "1k", "41.0%",
        "18.3 GB", "1M", "16 min 40 s", "checkpoint 2,000", "sizes as in its manifest", "2 on disk",
        "sample at step 2,000", "def main():", "    return 日本", "no warnings",
    ]  # fmt: skip
    expected += ["2 x H100 bfloat16"] if columns != 100 else ["1.26M 2 x"]  # cut there with an ellipsis
    missing = [text for text in expected if text not in out]
    assert not missing, out
    ends = time.strftime("%H:%M", time.localtime(fake.status["time"] + 1000))  # 2000 steps of 0.5 s
    assert ends in out
    assert max(cell_len(line) for line in out.splitlines()) <= columns
    assert code == 0


def test_what_is_not_known_is_said(once, tmp_path):
    fake = FakeRun()
    for row in fake.train:
        row["mfu"] = None
    assert "n/a" in once(fake.write(tmp_path / "a"))[1]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{}")
    code, out = once(tmp_path / "b")
    assert code == 0 and "unknown" in out and "no loss yet" in out and "no checkpoint yet" in out


def test_several_runs_have_a_row_and_marks_each(once, tmp_path):
    for name in ("one", "two"):
        fake = FakeRun()
        fake.run["name"] = name
        fake.write(tmp_path / "runs" / name)
    for columns in (80, 140):
        out = once(tmp_path / "runs", columns=columns)[1]
        chart = [line for line in out.splitlines() if "│" in line]
        assert "a one" in out and "b two" in out
        assert any("b" in line for line in chart)
        assert out.count("training") == 2
    fake.run["name"], fake.status["state"] = "three", "failed"
    fake.write(tmp_path / "elsewhere")
    code, out = once(tmp_path / "runs", tmp_path / "elsewhere", tmp_path / "elsewhere")
    assert code == 2 and out.count("three") == 2  # its row and its warning, once though named twice


def test_text_from_the_files_cannot_steer_the_terminal_or_the_markup(once, tmp_path):
    evil = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\u202e\ud800[bold red]x[/] :smile:"
    fake = FakeRun()
    fake.run |= {"name": evil, "device_name": evil, "precision": evil}
    fake.status |= {"state": "failed", "error": evil}
    fake.others = [
        {"step": 2000, "prompt": evil, "sample": evil + "\n[i]sample[/i]"},
        {"step": 2000, "event": "alert", "message": evil},
        {"step": 2000, "event": "nan", "message": evil},
    ]
    folder = fake.write(tmp_path / "r")
    checkpoint = write_checkpoint(folder)
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {evil: {"bytes": 1}}}))
    for columns in (80, 160):
        out = once(folder, columns=columns, flags=["--plot", str(tmp_path / "p.png")])[1]
        assert all(char == "\n" or char.isprintable() for char in out)
        assert "[bold red]x[/]" in out and ":smile:" in out and "[i]sample[/i]" in out
        out.encode("utf-8")


def test_folders_may_be_named_together_or_by_repeating_the_flag(once, tmp_path):
    folders = []
    for letter in "xyz":
        fake = FakeRun()
        fake.run["name"] = f"run-{letter}"
        folders.append(fake.write(tmp_path / letter))
    out = once(*folders[:2], flags=["--checkpoint_dir", str(folders[2])])[1]
    assert all(f"run-{letter}" in out for letter in "xyz")


def test_a_terminal_that_is_not_utf8_gets_question_marks(root, tmp_path):
    FakeRun().write(tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "utils.py", "monitor", "--checkpoint_dir", tmp_path, "--once"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True)
    assert done.returncode == 0 and b"?" in done.stdout and b"sound" in done.stdout, done.stderr


# ---- warnings: each fires, and its neighbour does not ----------------------------------------------------------------


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def silent_for(seconds, state="training", dt=0.5):
    def change(fake, folder):
        fake.status |= {"time": time.time() - seconds, "state": state}
        fake.run["started"] = time.time() - 10 * seconds
        fake.train[-1]["dt"] = dt

    return change


def set_rows(key, rows, value):
    def change(fake, folder):
        for row in fake.train[rows]:
            row[key] = value

    return change


def add_loss(rows, amount):
    def change(fake, folder):
        for row in fake.train[rows]:
            row["loss"] += amount

    return change


def validation(values, train_slope=0.0):
    def change(fake, folder):
        for row, value in zip(fake.evals[-len(values) :], values, strict=True):
            row["val_loss"] = value
        for row in fake.train:
            row["loss"] += train_slope * row["step"]

    return change


def merge(part, **values):
    return lambda fake, folder: getattr(fake, part).update(values)


def events(*names):
    def change(fake, folder):
        fake.others = [{"step": 2000, "event": name, "message": f"{name} 17"} for name in names]

    return change


def checkpoint_cut(by):
    def change(fake, folder):
        path = write_checkpoint(folder) / "model.safetensors"
        os.truncate(path, path.stat().st_size - by)

    return change


def disk_share(share, step=2000, **config):
    """No checkpoint yet, and one that would fill `share` of the free space; --keep_checkpoints 3."""

    def change(fake, folder):
        folder.mkdir(parents=True, exist_ok=True)
        fake.run["num_params"] = int(shutil.disk_usage(folder).free * share / 12)
        fake.run["config"].update(vocab_size=4096, **config)
        fake.status["step"] = step

    return change


CASES = {
    "hung": (silent_for(70), "no progress for 1 min", 2),
    "silent for a moment": (silent_for(45), None, 0),
    "hung, slow steps": (silent_for(250, dt=10), "no progress", 2),
    "slow steps": (silent_for(150, dt=10), None, 0),
    "hung in an evaluation": (silent_for(2000, "evaluating"), "no progress", 2),
    "a long evaluation": (silent_for(600, "evaluating"), None, 0),
    "a long save": (silent_for(600, "saving"), None, 0),
    "finished long ago": (silent_for(10**6, "finished"), None, 0),
    "stopped long ago": (silent_for(10**6, "stopped"), None, 0),
    "failed": (merge("status", state="failed", error="out of luck"), "out of luck", 2),
    "died": (lambda fake, folder: fake.run.update(pid=ended_pid()), "is gone", 2),
    "of another host": (lambda fake, folder: fake.run.update(pid=ended_pid(), host="elsewhere"), None, 0),
    "finished, process gone": (
        lambda fake, folder: (fake.run.update(pid=ended_pid()), fake.status.update(state="finished")), None, 0,
    ),
    "just started again": (
        lambda fake, folder: (silent_for(900)(fake, folder), fake.run.update(started=time.time())), None, 0,
    ),
    "died at its second start": (
        lambda fake, folder: (silent_for(900, "finished")(fake, folder), fake.run.update(started=time.time(), pid=ended_pid())),
        "is gone", 2,
    ),
    "not finite": (set_rows("loss", slice(-1, None), None), "not finite at step 2,000", 0),
    "not finite long ago": (set_rows("loss", slice(-40, -39), None), None, 0),
    "gradient not finite": (events("nan"), "nan 17", 0),
    "spike": (add_loss(slice(-5, -4), 1.0), "loss spike at step 1,960", 0),
    "noise": (add_loss(slice(-5, -4), 0.07), None, 0),
    "diverging": (add_loss(slice(-15, None), 0.4), "the loss is rising", 0),
    "level": (add_loss(slice(-15, None), 0.05), None, 0),
    "gradient spike": (set_rows("grad_norm", slice(-3, -2), 8.0), "11 times its mean", 0),
    "gradient rise": (set_rows("grad_norm", slice(-3, -2), 6.0), None, 0),
    "overfitting": (validation([2.6, 2.61, 2.62, 2.63]), "validation rose three times", 0),
    "validation rose twice": (validation([2.62, 2.61, 2.62, 2.63]), None, 0),
    "both rise": (validation([2.6, 2.61, 2.62, 2.63], train_slope=3e-5), None, 0),
    "slow": (set_rows("tok_s", slice(-3, None), 750.0), "25% below the usual 1,000", 0),
    "a little slow": (set_rows("tok_s", slice(-3, None), 850.0), None, 0),
    "one slow row": (set_rows("tok_s", slice(-1, None), 100.0), None, 0),
    "memory": (merge("run", device_memory_gb=19.0), "memory 18.3 of 19.0 GB", 0),
    "enough memory": (merge("run", device_memory_gb=20.0), None, 0),
    "disk": (disk_share(0.3), "4 checkpoints need", 0),
    "enough disk": (disk_share(0.2), None, 0),
    "disk for what is kept for ever": (disk_share(0.2, keep_every=500, save_interval=250), "8 checkpoints need", 0),
    "enough disk for the last": (disk_share(0.3, step=3900), None, 0),
    "blind": (set_rows("loss", slice(None), 8.5), "above the 8.318 of a blind guess", 0),
    "nearly blind": (set_rows("loss", slice(None), 8.2), None, 0),
    "blind in the warm-up": (set_rows("loss", slice(0, 10), 9.0), None, 0),
    "damaged checkpoint": (checkpoint_cut(1), "checkpoint_step_2000 is damaged: model.safetensors has 999 bytes", 0),
    "whole checkpoint": (checkpoint_cut(0), None, 0),
    "failed save": (events("save", "alert"), "alert 17", 0),
    "saved since": (events("alert", "save"), None, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_warning(once, tmp_path, name):
    """4096 token ids (262,144 / 64): ln 4096 = 8.318. Noise of the loss: sigma 0.03."""
    change, sentence, expected_code = CASES[name]
    fake, folder = FakeRun(), tmp_path / "r"
    change(fake, folder)
    code, out = once(fake.write(folder), columns=200)
    warned = [line for line in out.splitlines() if line.startswith("!")]
    if sentence:
        assert len(warned) == 1 and sentence in warned[0], out
    else:
        assert not warned and "no warnings" in out
    assert code == expected_code


def test_a_folder_without_a_run_is_one_sentence(root, once, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UserError, match=str(folder)):
            once(folder)
    command = [sys.executable, "utils.py", "monitor", "--checkpoint_dir", tmp_path / "empty", "--once"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    FakeRun().write(tmp_path / "r")
    with pytest.raises(UserError, match="--interval"):
        once(tmp_path / "r", flags=["--interval", "0"])


# ---- picture, chart, terminal ----------------------------------------------------------------------------------------


def test_plot_writes_the_picture_with_and_without_once(once, capsys, tmp_path):
    FakeRun().write(tmp_path / "r")
    parser = ArgumentParser()
    monitor.add_arguments(parser)
    arguments = ["--checkpoint_dir", str(tmp_path / "r"), "--plot", str(tmp_path / "only.png")]
    assert monitor.main(parser.parse_args(arguments)) == 0
    assert "loss" not in capsys.readouterr().out
    code, out = once(tmp_path / "r", flags=["--plot", str(tmp_path / "both.png")])
    assert code == 0 and "no warnings" in out
    for name in ("only.png", "both.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="--plot"):
        once(tmp_path / "r", flags=["--plot", str(tmp_path / "missing" / "curves.png")])


def test_it_starts_without_torch_and_matplotlib(root, tmp_path):
    FakeRun().write(tmp_path)
    program = (
        "import sys, utils; utils.main(['monitor', '--checkpoint_dir', sys.argv[1], '--once']); "
        "sys.exit(' '.join({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == "" and "sound" in done.stdout


def dots(lines):
    """The dots of a chart as booleans (4 * rows, 2 * columns); bits by the Unicode chart of U+2800."""
    cells = [[ord(char) - 0x2800 for char in line.plain.split("│")[1]] for line in lines[:-1]]
    grid = np.zeros((4 * len(cells), 2 * len(cells[0])), bool)
    bits = {0: (0, 0), 1: (1, 0), 2: (2, 0), 3: (0, 1), 4: (1, 1), 5: (2, 1), 6: (3, 0), 7: (3, 1)}
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            for bit, (down, right) in bits.items():
                grid[4 * row + down, 2 * column + right] = cell >> bit & 1
    return grid


NOTHING = np.empty(0)


@pytest.mark.parametrize("count", [7, 5000])
def test_the_chart_draws_the_curve(count):
    """The middle of each dot column against the curve itself, within the dot and half that a column of it rises by."""
    x = np.linspace(0, 100, count)
    curve = Curve(x, (x / 100 - 0.5) ** 2, NOTHING, NOTHING, "o", "red")
    grid = dots(braille_chart([curve], 69, 11, (0.0, 0.25)))
    assert grid.shape == (40, 120) and grid.any(axis=0).all()
    truth_at = np.interp(np.linspace(0, 100, 120), x, curve.y)
    middle = [np.nonzero(column)[0].mean() for column in grid.T]
    assert np.abs(middle - (0.25 - truth_at) / 0.25 * 39).max() < 1.5


def test_the_chart_leaves_out_dots_beyond_its_range_and_keeps_marks():
    x = np.arange(100.0)
    y = np.where(x < 20, 9.0, 1.0)
    y[50] = np.nan
    lines = braille_chart([Curve(x, y, np.array([0.0, 99.0]), np.array([9.0, 1.0]), "o", "red")], 49, 9, (0.0, 2.0))
    text = [line.plain for line in lines]
    assert text[0].split("│")[1][0] == "o" and text[4].split("│")[1][-1] == "o"  # 9 is above: at the edge
    grid = dots(braille_chart([Curve(x, y, NOTHING, NOTHING, "o", "red")], 49, 9, (0.0, 2.0)))
    assert not grid[:, :15].any() and grid[:, 17:].any(axis=0).all()
    assert "0" in lines[-1].plain and "99" in lines[-1].plain
    assert text[0].strip().startswith("2│") and text[7].strip().startswith("0│")


def test_the_chart_joins_a_jump():
    grid = dots(
        braille_chart(
            [Curve(np.arange(120.0), np.repeat([0.0, 1.0], 60), NOTHING, NOTHING, "o", "red")], 69, 11, (0, 1)
        )
    )
    assert [column.sum() for column in grid.T] == [1] * 60 + [39] + [1] * 59
    assert grid[39, :60].all() and grid[0, 60:].all()


def test_sparkline_shows_the_last_values():
    assert sparkline(np.array([9.0, 0.0, 3.5, np.nan, 7.0]), 4) == "▁▅ █"
    assert len(set(sparkline(np.full(5, 3.0), 9))) == 1 and len(sparkline(np.full(5, 3.0), 9)) == 5
    assert sparkline(np.array([np.nan]), 4) == sparkline(NOTHING, 4) == ""


@pytest.mark.parametrize("leave", ["q", signal.SIGINT, signal.SIGTERM])
def test_the_live_view_follows_the_run_and_restores_the_terminal(root, tmp_path, leave):
    fake = FakeRun()
    folder = fake.write(tmp_path / "r")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "utils.py", "monitor", "--checkpoint_dir", folder, "--interval", "0.2"]
    process = subprocess.Popen(command, cwd=root, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    seen = ""

    def read_until(text, seconds=30):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        assert text in seen

    try:
        read_until("2,000/4,000")
        assert "\x1b[?1049h" in seen  # the second screen, so that the shell's lines stay
        assert termios.tcgetattr(theirs) != before
        fake.status["step"] = 2345
        fake.write(folder)
        read_until("2,345/4,000")
        os.write(ours, b"q") if leave == "q" else process.send_signal(leave)
        read_until("\x1b[?1049l")
        read_until("\x1b[?25h")  # the cursor is shown
        assert process.wait(20) == (143 if leave == signal.SIGTERM else 0)
        assert termios.tcgetattr(theirs) == before
        assert "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
