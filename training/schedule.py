"""What fraction of the peak learning rate does a given optimizer step use?

A pure function of the step, so a resumed run needs no schedule state and a plot needs no run.
"""

import math
from collections.abc import Callable

ONE_CYCLE_START = 1 / 25  # of the peak: where one_cycle begins (torch.optim.lr_scheduler.OneCycleLR's div_factor)
_INVERSE_SQRT_STEPS = 10_000  # what inverse_sqrt takes for the warm-up where there is none, as transformers does


def _cosine(progress: float, power: float) -> float:
    """Half a cosine (Loshchilov & Hutter, arXiv 1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float, power: float) -> float:
    return 1.0 - progress


def _polynomial(progress: float, power: float) -> float:
    return (1.0 - progress) ** power


# what is left of the way from the peak to the minimum, by the share of the decay's steps that is done; power: polynomial's
_DECAYS: dict[str, Callable[[float, float], float]] = {
    "wsd": _linear,
    "cosine": _cosine,
    "linear": _linear,
    "polynomial": _polynomial,
    "one_cycle": _cosine,
}
SCHEDULES = (*_DECAYS, "constant", "inverse_sqrt", "restarts")
END_AT_MINIMUM = (*_DECAYS, "restarts")  # those that min_factor is for


def learning_rate_factor(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    schedule: str,
    decay_fraction: float,
    min_factor: float,
    power: float = 1.0,
    cycle_steps: int = 1,
) -> float:
    """What step `step` (0 … max_steps-1) multiplies the peak rate by: in (0, 1], and 0 only where `min_factor` is 0.

    Warm-up is linear, `(step + 1) / warmup_steps`: the first step already moves the weights and the last one of the
    warm-up uses the peak. The first step after it uses the peak too; from there on:

    * "cosine", "linear", "polynomial" (to `power`): down to the last step of the run, which uses `min_factor`;
    * "wsd": the peak, then a straight line over the last `decay_fraction` of `max_steps`, never into the warm-up
      (warm-up, stable, decay: Hägele et al., arXiv 2405.18392). `decay_fraction` 0 never decays;
    * "one_cycle": as cosine, but its warm-up is half a cosine, too, up from 1/25 (Smith & Topin, arXiv 1708.07120);
    * "constant": the peak;
    * "inverse_sqrt": falls with the root of the steps, as from the end of a warm-up (Vaswani et al., arXiv 1706.03762);
    * "restarts": half a cosine towards `min_factor` over `cycle_steps`, again and again (SGDR, arXiv 1608.03983).

    A run that ends within its warm-up never decays; neither does one of a single step. Past the end: `min_factor`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, not {schedule!r}")
    if step < warmup_steps:
        if schedule == "one_cycle":
            return 1.0 + (ONE_CYCLE_START - 1.0) * _cosine(step / warmup_steps, power)
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    since_peak = step - warmup_steps
    if schedule == "inverse_sqrt":
        timescale = warmup_steps or _INVERSE_SQRT_STEPS
        return math.sqrt(timescale / (timescale + since_peak))
    if schedule == "restarts":
        return min_factor + (1.0 - min_factor) * _cosine(since_peak % cycle_steps / cycle_steps, power)

    last_step = max_steps - 1
    decay_steps = last_step - warmup_steps
    if schedule == "wsd":
        decay_steps = min(decay_steps, round(decay_fraction * max_steps))
    if decay_steps <= 0:
        return 1.0
    progress = min(1.0, max(0.0, (step - (last_step - decay_steps)) / decay_steps))
    return min_factor + (1.0 - min_factor) * _DECAYS[schedule](progress, power)
