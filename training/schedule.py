"""What fraction of the peak learning rate does a given optimizer step use?

A pure function of the step, so a resumed run needs no schedule state and a plot needs no run.
"""

import math

SCHEDULES = ("cosine", "linear", "wsd")


def learning_rate_factor(
    step: int, *, max_steps: int, warmup_steps: int, schedule: str, decay_fraction: float, min_factor: float
) -> float:
    """What step `step` (0 … max_steps-1) multiplies the peak rate by: in (0, 1], and 0 only where `min_factor` is 0.

    Warm-up is linear, `(step + 1) / warmup_steps`: the first step already moves the weights and the last one of the
    warm-up uses the peak. The first step after it uses the peak too; from there to the last step of the run, which
    uses `min_factor`:

    * "cosine": half a cosine (Loshchilov & Hutter, arXiv 1608.03983, without restarts);
    * "linear": a straight line;
    * "wsd": the peak, then a straight line over the last `decay_fraction` of `max_steps`, never into the warm-up
      (warm-up, stable, decay: Hägele et al., arXiv 2405.18392). `decay_fraction` 0 never decays.

    A run that ends within its warm-up never decays; neither does one of a single step. Past the end: `min_factor`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, not {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps

    last_step = max_steps - 1
    decay_steps = last_step - warmup_steps
    if schedule == "wsd":
        decay_steps = min(decay_steps, round(decay_fraction * max_steps))
    if decay_steps <= 0:
        return 1.0
    progress = min(1.0, max(0.0, (step - (last_step - decay_steps)) / decay_steps))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_factor + (1.0 - min_factor) * remaining
