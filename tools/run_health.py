"""Is this run well? Its state, and what is wrong or about to go wrong, from nothing but the files it leaves.

Each rule is a function that returns a sentence or None. The thresholds are choices, made so that a sound run with
Gaussian noise does not trip them: 6 sigma for a spike, 3 sigma and 5 % for a lasting rise. Which rules hold depends on the
stage: a loss of reinforcement learning says nothing, and its reward is looked at in its place.
"""

import math
import os
import shutil
import socket
from dataclasses import dataclass

import numpy as np

from training.run_files import CheckpointFiles, Row, RunHistory, column, duration, number, printable, smoothed
from training.stage_figures import figures_of, stage_of

_TEXT_STAGES = ("pretrain", "mlm")  # in which a model that knows nothing guesses among all tokens
ENDED = ("finished", "stopped", "failed")
_BUSY_SECONDS = 1800.0  # for a first step, a compilation, an evaluation or a save, none of which moves the heartbeat
_RECENT = 20  # rows: for how long a passing trouble stays on the screen
_WINDOW = 50  # rows: what a new row is compared with
_BLOCK = 10  # rows: whose median counts as the level of the loss
_ADAMW_BYTES = 12  # a parameter: fp32 weight and two fp32 moments; other optimizers keep less
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_OWN_ANSWERS = ("grpo", "ppo")  # stages that learn from what the model writes
_AGREEING = 3  # log lines in a row that must say the same


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
        if stage_of(run) in _OWN_ANSWERS:
            found += [_falling_reward(run), _nothing_to_learn(run), _collapsed(run), _too_far(run), _unfinished(run)]
        else:
            found += [_diverging(run) or _spike(run), _above_chance(run), _slow(run)]
        found += [_gradient_spike(run), _overfitting(run), _memory(run), _disk(run, checkpoints)]
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
    """The next checkpoints, up to what --keep_checkpoints and --keep_every keep plus the one being written, against the space."""
    config = _config(run)
    max_steps, keep = number(run.status.get("max_steps")), number(config.get("keep_checkpoints"))
    interval = next((n for key in ("save_interval", "eval_interval") if (n := number(config.get(key))) > 0), max_steps)
    models = math.nan if config.get("lora") else 2 if stage_of(run) == "ppo" else 1  # adapters are small: wait and see
    size = checkpoints[-1].bytes if checkpoints else models * _ADAMW_BYTES * number(run.run.get("num_params"))
    if not all(map(math.isfinite, (max_steps, interval, size, keep))) or interval <= 0:
        return None
    saves = math.ceil((max_steps - run.step) / interval)
    if keep > 0:
        every = number(config.get("keep_every"))
        for_ever = max_steps // every - run.step // every if every > 0 else 0
        saves = min(saves, int(max(0, keep - len(checkpoints)) + for_ever) + 1)
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
    return _finite(run, "loss")


def _finite(run: RunHistory, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), both (n,), of the rows in which a column is finite."""
    steps, values = column(run.train, "step"), column(run.train, name)
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _sigma(residuals: np.ndarray) -> float:
    """Standard deviation by the median absolute deviation, which a few outliers do not move."""
    return _MAD_TO_SIGMA * float(np.median(np.abs(residuals - np.median(residuals))))


def _spike(run: RunHistory) -> str | None:
    """The highest recent loss that is 6 sigma above the average before it, sigma by the rows before it.

    Of pairs, whose loss may approach 0, sigma is 0.01 nats at least.
    """
    least = 0.01 if stage_of(run) in ("reward", "dpo") else 0.0
    steps, losses = _finite_losses(run)
    average = smoothed(losses, _RECENT)
    above = losses[1:] - average[:-1]
    worst = None
    for index in range(max(_RECENT, len(above) - _RECENT), len(above)):
        sigma = max(_sigma(above[max(0, index - _WINDOW) : index]), 0.002 * abs(average[index]), least)
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
    """The level of the loss, by medians of blocks of rows, lies clearly above the lowest level before.

    Of pairs 0.05 nats at least: their loss may approach 0, of which any rise is a large share.
    """
    found = _risen(*_finite_losses(run), least=0.05 if stage_of(run) in ("reward", "dpo") else 0.0)
    return (
        None if found is None else f"the loss is rising: {found[0]:.3f} now, {found[1]:.3f} around step {found[2]:,.0f}"
    )


def _risen(steps: np.ndarray, values: np.ndarray, least: float = 0.0) -> tuple[float, float, float] | None:
    """(the level now, the lowest one before, its step) where it is above by 3 sigma, 5 % and `least`."""
    blocks = len(values) // _BLOCK
    if blocks < 2:
        return None
    grouped = values[-blocks * _BLOCK :].reshape(blocks, _BLOCK)
    level = np.median(grouped, axis=1)
    lowest = int(np.argmin(level))
    sigma = _sigma((grouped - level[:, None])[-5:].ravel())
    if level[-1] - level[lowest] <= max(3 * sigma, 0.05 * abs(level[lowest]), least):
        return None
    return float(level[-1]), float(level[lowest]), float(steps[-(blocks - lowest) * _BLOCK :][_BLOCK - 1])


def _gradient_spike(run: RunHistory) -> str | None:
    steps, norms = column(run.train, "step"), column(run.train, "grad_norm")
    for index in range(len(norms) - 1, max(_BLOCK, len(norms) - _RECENT) - 1, -1):
        before = norms[max(0, index - _WINDOW) : index]
        before = before[np.isfinite(before) & (before > 0)]  # 0: a step of GRPO that taught nothing
        if len(before) >= _BLOCK and norms[index] > 10 * before.mean():
            ratio = norms[index] / before.mean()
            return f"gradient norm {norms[index]:.3g} at step {steps[index]:,.0f}, {ratio:.0f} times its mean"
    return None


def _above_chance(run: RunHistory) -> str | None:
    """After the warm-up a model must be better than a guess: among all tokens, or between chosen and rejected."""
    config, chance = _config(run), _loss_of_chance(run)
    warmup = number(config.get("warmup_steps"))
    if not math.isfinite(warmup):  # train.py's default
        warmup = min(2000, number(run.run.get("max_steps")) // 10)
    elif warmup < 1:  # a share
        warmup *= number(run.run.get("max_steps"))
    steps, losses = _finite_losses(run)
    after = losses[steps > warmup][-_BLOCK:]
    if len(after) < _BLOCK // 2 or not math.isfinite(chance):
        return None
    level = float(np.median(after))
    # preferences begin at chance exactly, so a little noise may stand above it
    sure = level - 3 * _sigma(after) / math.sqrt(len(after)) > 1.01 * chance
    if level <= chance or (stage_of(run) not in _TEXT_STAGES and not sure):
        return None
    said = "a blind guess" if stage_of(run) in _TEXT_STAGES else "a guess between chosen and rejected"
    return (
        f"after the warm-up the loss is {level:.3f}, above the {chance:.3f} of {said}: the labels or the learning rate "
        "are wrong"
    )


def _loss_of_chance(run: RunHistory) -> float:
    """The loss of a model that knows nothing, in nats; NaN where a stage starts from one that does, or has no such loss.

    Of pairs it is the loss where both answers are equally good: ln 2 of a reward model and of DPO's sigmoid, 1 of hinge,
    1/(4 β²) of IPO.
    """
    config, stage = _config(run), stage_of(run)
    if stage == "reward":
        return math.log(2)
    if stage == "dpo":
        beta = number(config.get("dpo_beta"))
        losses = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 0.25 / beta**2 if beta > 0 else math.nan}
        return losses.get(str(config.get("dpo_loss")), math.nan)
    if stage not in _TEXT_STAGES or config.get("init_from"):
        return math.nan
    vocabulary = number(config.get("vocab_size"))
    if not math.isfinite(vocabulary):  # left to the tokenizer: the embedding has one row a token
        embedding = number(run.run.get("num_params")) - number(run.run.get("num_params_non_embedding"))
        vocabulary = embedding / (number(config.get("hidden_size")) or math.nan)
    return math.log(vocabulary) if vocabulary > 1 else math.nan


def _overfitting(run: RunHistory) -> str | None:
    """Validation got worse three times in a row while the training curve got better."""
    stage = figures_of(run)
    last = [row for row in run.evals if math.isfinite(number(row.get(stage.held_out)))][-4:]
    values = [stage.sign * row[stage.held_out] for row in last]
    if len(last) < 4 or sorted(set(values)) != values:
        return None
    steps, curve = _finite(run, stage.curve)
    average = smoothed(stage.sign * curve, _RECENT)
    at = [np.searchsorted(steps, row["step"], side="right") - 1 for row in (last[0], last[-1])]
    if at[0] < 0 or average[at[1]] >= average[at[0]]:
        return None
    since = f"three times in a row since step {last[0]['step']:,}"
    if stage.higher_is_better:
        return f"the held-out reward fell {since} while that of the training prompts rose"
    return f"validation rose {since} while the training loss fell"


# ---- reinforcement learning ------------------------------------------------------------------------------------------


def _falling_reward(run: RunHistory) -> str | None:
    steps, rewards = _finite(run, "reward")
    if (found := _risen(steps, -rewards)) is None:
        return None
    return f"the reward is falling: {-found[0]:.3f} now, {-found[1]:.3f} around step {found[2]:,.0f}"


def _level(run: RunHistory, name: str) -> float:
    """The median of a column's last rows; NaN where they are too few."""
    values = _finite(run, name)[1][-_BLOCK:]
    return float(np.median(values)) if len(values) >= _AGREEING else math.nan


def _nothing_to_learn(run: RunHistory) -> str | None:
    """Advantages are differences: where answers to a prompt (PPO: all answers) are worth the same, there are none."""
    name, same = ("equal_groups", 1.0) if stage_of(run) == "grpo" else ("reward_std", 0.0)
    values = _finite(run, name)[1][-_AGREEING:]
    if len(values) < _AGREEING or (values != same).any():
        return None
    grpo, reward = name == "equal_groups", _level(run, "reward")
    return (
        f"all answers {'to a prompt ' if grpo else ''}were worth the same in the last {_AGREEING} log lines (reward "
        f"{reward:.3g}), so nothing is learned: take a finer reward{', a larger --group_size' if grpo else ''} or other prompts"
    )


def _collapsed(run: RunHistory) -> str | None:
    entropy = _finite(run, "entropy")[1]
    if len(entropy) < 2 * _BLOCK:
        return None
    first, now = float(np.median(entropy[:_BLOCK])), float(np.median(entropy[-_BLOCK:]))
    if now >= 0.1 * first:
        return None
    return (
        f"the entropy has fallen from {first:.2f} to {now:.2g} nats a token, so answers hardly differ any more: raise "
        "--kl_coefficient, or lower --learning_rate"
    )


def _too_far(run: RunHistory) -> str | None:
    """Steps that are cut off by the clip, and a policy that the reference hardly knows: a nat a token is e times less."""
    clipped = _level(run, "clip_fraction")
    if clipped > 0.5:
        return f"{clipped:.0%} of the tokens are clipped: the steps are too large; lower --learning_rate or --rollout_epochs"
    kl = _level(run, "kl")
    if stage_of(run) == "ppo":  # a whole answer's
        kl /= _level(run, "completion_length")
    return f"the policy is {kl:.2g} nats a token from its reference: raise --kl_coefficient" if kl > 1.0 else None


def _unfinished(run: RunHistory) -> str | None:
    finished = _level(run, "finished")
    if not finished < 0.5:
        return None
    longest = number(_config(run).get("max_new_tokens"))
    return f"only {finished:.0%} of the answers end by themselves; the others are cut at --max_new_tokens" + (
        f" {longest:.0f}" if math.isfinite(longest) else ""
    )


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
