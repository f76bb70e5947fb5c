"""Is this run well? Its state, and what is wrong or about to go wrong, from nothing but the files it leaves.

Each rule is a function that returns a sentence or None. The thresholds are choices, made so that a sound run with
Gaussian noise does not trip them: 6 sigma for a spike, 3 sigma and 5 % for a lasting rise.
"""

import math
import os
import shutil
import socket
from dataclasses import dataclass

import numpy as np

from training.run_files import CheckpointFiles, Row, RunHistory, column, duration, number, printable, smoothed

ENDED = ("finished", "stopped", "failed")
_BUSY_SECONDS = 1800.0  # for a first step, a compilation, an evaluation or a save, none of which moves the heartbeat
_RECENT = 20  # rows: for how long a passing trouble stays on the screen
_WINDOW = 50  # rows: what a new row is compared with
_BLOCK = 10  # rows: whose median counts as the level of the loss
_ADAMW_BYTES = 12  # a parameter: fp32 weight and two fp32 moments; other optimizers keep less
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Health:
    """`state` as a word, `failed` when the run is dead or silent, and one sentence for each warning."""

    state: str
    failed: bool
    warnings: list[str]


def assess(run: RunHistory, checkpoints: list[CheckpointFiles], now: float) -> Health:
    """The run's state at `now` (unix seconds) and its warnings, the gravest first.

    States: those of status.json; "starting", before a started run wrote its first one; "died", when its process on
    this host is gone; "hung", when it lives or may live and its heartbeat is too old; "unknown", without status.json.
    """
    state = _state(run, now)
    running = state not in (*ENDED, "died", "unknown")
    found = [
        _trouble(run, state, now),
        _damaged_checkpoint(checkpoints),
        _failed_save(run),
        _not_finite(run),
    ]
    if running:
        found += [
            _diverging(run) or _spike(run),
            _gradient_spike(run),
            _above_chance(run),
            _overfitting(run),
            _slow(run),
            _memory(run),
            _disk(run, checkpoints),
        ]
    return Health(state, state in ("failed", "died", "hung"), [sentence for sentence in found if sentence])


def step_seconds(run: RunHistory) -> float:
    """Seconds a step: of the last log line, or before the first one what the steps so far took; NaN when unknown."""
    logged = number(run.train[-1].get("dt")) if run.train else math.nan
    if math.isfinite(logged):
        return logged
    steps = run.step - _start_step(run)
    return (number(run.status.get("time")) - number(run.run.get("started"))) / steps if steps > 0 else math.nan


def heartbeat_age(run: RunHistory, now: float) -> float:
    """Seconds since the run last wrote status.json; by our own clock where it was seen to, as hosts' clocks differ."""
    if run.unchanged_seconds is not None:
        return run.unchanged_seconds
    beats = [number(run.status.get("time")), number(run.run.get("started"))]
    return max(0.0, now - max((beat for beat in beats if math.isfinite(beat)), default=math.nan))


# ---- state -----------------------------------------------------------------------------------------------------------


def _state(run: RunHistory, now: float) -> str:
    said = printable(run.status.get("state", "unknown"))
    older_than_run = number(run.status.get("time")) < number(run.run.get("started"))
    if older_than_run or (not run.status and run.run):
        said = "starting"
    if said in (*ENDED, "unknown"):
        return said
    if run.process_gone:
        return "died"
    return "hung" if heartbeat_age(run, now) > _patience(run, said) else said


def _patience(run: RunHistory, state: str) -> float:
    """How old a heartbeat may be: training beats at every step, anything else only when it begins."""
    pace = step_seconds(run)
    if state == "training" and math.isfinite(pace):
        return max(60.0, 20 * pace)
    longest = max((number(row.get("eval_s")) for row in run.evals), default=0.0)
    return max(_BUSY_SECONDS, 3 * longest)


def _trouble(run: RunHistory, state: str, now: float) -> str | None:
    if state == "failed":
        return "the run failed: " + printable(run.status.get("error") or "no reason was recorded")
    said = printable(run.status.get("state", "starting"))
    if state == "died":
        return f"process {run.run['pid']} is gone while the state says {said}; continue it with --checkpoint latest"
    if state == "hung":
        return f"no progress for {duration(heartbeat_age(run, now))} (it was {said} at step {run.step:,})"
    return None


# ---- what was written ------------------------------------------------------------------------------------------------


def _damaged_checkpoint(checkpoints: list[CheckpointFiles]) -> str | None:
    damaged = [checkpoint for checkpoint in checkpoints if checkpoint.problem]
    if not damaged:
        return None
    more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
    return f"{damaged[-1].path.name} is damaged: {damaged[-1].problem}{more}"


def _failed_save(run: RunHistory) -> str | None:
    """The last alert, until a later save succeeds."""
    for event in reversed(run.events):
        if event["event"] == "alert":
            return printable(event.get("message", f"alert at step {event['step']:,}"))
        if event["event"] in ("save", "start", "resume"):
            return None
    return None


def _disk(run: RunHistory, checkpoints: list[CheckpointFiles]) -> str | None:
    """The next checkpoints, up to what --keep_checkpoints keeps plus the one being written, against the free space."""
    config = _config(run)
    max_steps, keep = number(run.status.get("max_steps")), number(config.get("keep_checkpoints"))
    interval = next((n for key in ("save_interval", "eval_interval") if (n := number(config.get(key))) > 0), max_steps)
    size = checkpoints[-1].bytes if checkpoints else _ADAMW_BYTES * number(run.run.get("num_params"))
    if not all(map(math.isfinite, (max_steps, interval, size, keep))) or interval <= 0:
        return None
    saves = math.ceil((max_steps - run.step) / interval)
    if keep > 0:
        saves = min(saves, int(max(0, keep - len(checkpoints))) + 1)
    free = shutil.disk_usage(run.folder).free
    if saves < 1 or saves * size < free:
        return None
    what = "the next checkpoint needs" if saves == 1 else f"the next {saves:,} checkpoints need"
    return f"{what} {saves * size / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB left"


# ---- loss and gradient -----------------------------------------------------------------------------------------------


def _not_finite(run: RunHistory) -> str | None:
    recent = run.train[-_RECENT:]
    bad = [row for row in recent if not math.isfinite(number(row.get("loss")))]
    if not bad:  # with a finite loss the gradient may still not be; the run says so
        said = [
            event for event in run.events if event["event"] == "nan" and recent and event["step"] >= recent[0]["step"]
        ]
        return printable(said[-1].get("message", "the gradient was not finite")) if said else None
    again = "" if bad[-1] is recent[-1] else ", finite again since"
    return f"the loss was not finite at step {bad[-1]['step']:,}{again}"


def _finite_losses(run: RunHistory) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses), both (n,), of the rows whose loss is finite."""
    steps, losses = column(run.train, "step"), column(run.train, "loss")
    keep = np.isfinite(losses)
    return steps[keep], losses[keep]


def _sigma(residuals: np.ndarray) -> float:
    """Standard deviation by the median absolute deviation, which a few outliers do not move."""
    return _MAD_TO_SIGMA * float(np.median(np.abs(residuals - np.median(residuals))))


def _spike(run: RunHistory) -> str | None:
    """The highest recent loss that is 6 sigma above the average before it, sigma by the rows before it."""
    steps, losses = _finite_losses(run)
    average = smoothed(losses, _RECENT)
    above = losses[1:] - average[:-1]
    worst = None
    for index in range(max(_RECENT, len(above) - _RECENT), len(above)):
        sigma = max(_sigma(above[max(0, index - _WINDOW) : index]), 0.002 * abs(average[index]))
        if above[index] > 6 * sigma and (worst is None or above[index] > above[worst[0]]):
            worst = index, sigma
    if worst is None:
        return None
    index, sigma = worst
    recovered = "" if losses[-1] > average[index] + 6 * sigma else ", since recovered"
    return (
        f"loss spike at step {steps[index + 1]:,.0f}: {losses[index + 1]:.3f}, "
        f"{above[index] / sigma:.0f} sigma over its average{recovered}"
    )


def _diverging(run: RunHistory) -> str | None:
    """The level of the loss, by medians of blocks of rows, lies clearly above the lowest level before."""
    steps, losses = _finite_losses(run)
    blocks = len(losses) // _BLOCK
    if blocks < 2:
        return None
    grouped = losses[-blocks * _BLOCK :].reshape(blocks, _BLOCK)
    level = np.median(grouped, axis=1)
    lowest = int(np.argmin(level))
    sigma = _sigma((grouped - level[:, None])[-5:].ravel())
    if level[-1] - level[lowest] <= max(3 * sigma, 0.05 * abs(level[lowest])):
        return None
    step = steps[-(blocks - lowest) * _BLOCK :][_BLOCK - 1]
    return f"the loss is rising: {level[-1]:.3f} now, {level[lowest]:.3f} around step {step:,.0f}"


def _gradient_spike(run: RunHistory) -> str | None:
    steps, norms = column(run.train, "step"), column(run.train, "grad_norm")
    for index in range(len(norms) - 1, max(_BLOCK, len(norms) - _RECENT) - 1, -1):
        before = norms[max(0, index - _WINDOW) : index]
        before = before[np.isfinite(before)]
        if len(before) >= _BLOCK and norms[index] > 10 * before.mean():
            ratio = norms[index] / before.mean()
            return f"gradient norm {norms[index]:.3g} at step {steps[index]:,.0f}, {ratio:.0f} times its mean"
    return None


def _above_chance(run: RunHistory) -> str | None:
    """After the warm-up a model must be better than a guess among all tokens."""
    config = _config(run)
    vocabulary = number(config.get("vocab_size"))
    if not math.isfinite(vocabulary):  # left to the tokenizer: the embedding has one row a token
        embedding = number(run.run.get("num_params")) - number(run.run.get("num_params_non_embedding"))
        vocabulary = embedding / (number(config.get("hidden_size")) or math.nan)
    warmup = number(config.get("warmup_steps"))
    if not math.isfinite(warmup):  # train.py's default
        warmup = min(2000, number(run.run.get("max_steps")) // 10)
    steps, losses = _finite_losses(run)
    after = losses[steps > warmup][-_BLOCK:]
    if len(after) < _BLOCK // 2 or not vocabulary > 1 or np.median(after) <= math.log(vocabulary):
        return None
    return (
        f"after the warm-up the loss is {np.median(after):.3f}, above the {math.log(vocabulary):.3f} of a blind guess: "
        "the labels or the learning rate are wrong"
    )


def _overfitting(run: RunHistory) -> str | None:
    """Validation rose three times in a row while the training loss fell."""
    last = [row for row in run.evals if math.isfinite(number(row.get("val_loss")))][-4:]
    values = [row["val_loss"] for row in last]
    if len(last) < 4 or sorted(set(values)) != values:
        return None
    steps, losses = _finite_losses(run)
    average = smoothed(losses, _RECENT)
    at = [np.searchsorted(steps, row["step"], side="right") - 1 for row in (last[0], last[-1])]
    if at[0] < 0 or average[at[1]] >= average[at[0]]:
        return None
    return f"validation rose three times in a row since step {last[0]['step']:,} while the training loss fell"


# ---- speed and room --------------------------------------------------------------------------------------------------


def _slow(run: RunHistory) -> str | None:
    """Tokens per second of the last rows against the median since the run was last started."""
    start = _start_step(run)
    speeds = column([row for row in run.train if row["step"] > start], "tok_s")
    speeds = speeds[np.isfinite(speeds)]
    if len(speeds) < _BLOCK:
        return None
    usual, now = float(np.median(speeds)), float(np.median(speeds[-3:]))
    return f"{now:,.0f} tok/s, {1 - now / usual:.0%} below the usual {usual:,.0f}" if now < 0.8 * usual else None


def memory_total_gb(run: RunHistory) -> float:
    """Memory of the device in GB: as the run recorded it, or this machine's when it runs here on the CPU; else NaN."""
    recorded = number(run.run.get("device_memory_gb"))
    if math.isfinite(recorded):
        return recorded
    here = run.run.get("host") == socket.gethostname() and run.run.get("device") == "cpu"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if here else math.nan


def _memory(run: RunHistory) -> str | None:
    used, total = number(run.train[-1].get("mem_gb")) if run.train else math.nan, memory_total_gb(run)
    return f"memory {used:.1f} of {total:.1f} GB" if used > 0.95 * total else None


def _start_step(run: RunHistory) -> int:
    """The step at which the run was last started or resumed."""
    return next((event["step"] for event in reversed(run.events) if event["event"] in ("start", "resume")), 0)


def _config(run: RunHistory) -> Row:
    config = run.run.get("config")
    return config if isinstance(config, dict) else {}
