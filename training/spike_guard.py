"""Which steps are left out because their loss or gradient is out of all proportion, and where does a run go on after several?

--spike_guard K: a step whose loss, or gradient norm before clipping, is above mean + K σ of the last 128 steps that were not
left out changes nothing: weights, optimizer state and EMA keep their bits (as OLMo-core's SkipStepOptimizer does). What is left
out, a NaN too, never enters the window. The verdict falls on the device, over the sums of all ranks: it is one on all of them,
and no rank waits for the host.

The host looks every 10 steps. Where MAX_SPIKES or more of the last ones were left out in a row, the run goes back to its newest
checkpoint from before them and passes over their samples, once, as PaLM's authors did by hand (arXiv 2204.02311, §5.1). Which
samples those are is kept in checkpoints, as the window is, so that a resumed run decides the same.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batches.micro_batch import MicroBatch
from checkpointing.save_folder import from_rank_0, list_checkpoints, move_aside, verify_checkpoint
from errors import UserError
from ranks import Ranks
from training.config import TrainConfig
from training.metrics import Metrics

WINDOW = 128  # steps
MIN_STEPS = 32  # in the window, before anything is left out
MAX_SPIKES = 5  # in a row, before the run goes back
_RING = 32  # steps that are remembered between two looks of the host, which are at most 10 steps apart
_ROUNDING = 1e-6  # of the mean: where all steps are alike σ is 0, and the last bit is no spike
_SHOWN_DOCUMENTS = 6

Skipped = list[tuple[int, int]]  # samples [first, end) that are passed over


@dataclass(frozen=True)
class GoBack:
    """To which checkpoint, and which samples are then passed over."""

    checkpoint: Path
    samples: tuple[int, int]


class SpikeGuard:
    """The window and the verdicts, on the device."""

    def __init__(self, sigmas: float, ranks: Ranks) -> None:
        self.sigmas, self.ranks = sigmas, ranks
        self.window = torch.zeros(2, WINDOW, device=ranks.device)  # losses and norms, each at its step's place
        self.accepted = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.in_row = torch.zeros((), dtype=torch.int64, device=ranks.device)
        # of the last steps: loss, norm, their bounds, and 1 where it was left out
        self.verdicts = torch.zeros(_RING, 5, device=ranks.device)
        self.positions = [0] * _RING  # their first samples
        self.looked = 0  # the step up to which the host knows them
        self.went_back = False

    @torch.no_grad()
    def judge(self, metrics: Metrics, norm: Tensor, overflowed: Tensor | None, step: int, first_sample: int) -> Tensor:
        """0-dim bool on the device: whether the step counts. Every rank calls it.

        metrics: of this rank, its "loss" among them. overflowed: whether the loss scaler has overflowed, which is neither a
        spike nor the end of a row of them; None without one.
        """
        device = self.ranks.device
        total, weight = metrics.get("loss", (0.0, 0.0))
        sums = [_on(device, total), _on(device, weight), norm.float() / self.ranks.world_size]
        shared = torch.stack(sums)
        if self.ranks.world_size > 1:
            dist.all_reduce(shared)
        seen = torch.stack([shared[0] / shared[1], shared[2]])  # (2,) loss, norm
        known = torch.arange(WINDOW, device=device) < self.accepted
        count = self.accepted.clamp(1, WINDOW)
        mean = (self.window * known).sum(1) / count
        sigma = (((self.window - mean[:, None]) ** 2 * known).sum(1) / count).sqrt()
        bounds = mean + self.sigmas * sigma + _ROUNDING * mean.abs()
        counts = torch.isfinite(seen).all() & ((self.accepted < MIN_STEPS) | (seen <= bounds).all())
        left_out = ~counts if overflowed is None else ~counts & ~overflowed

        place = self.accepted % WINDOW
        here = torch.arange(WINDOW, device=device) == place
        self.window = torch.where(here & counts, seen[:, None], self.window)
        self.accepted = self.accepted + counts
        self.in_row = torch.where(counts, 0, self.in_row + left_out)
        self.verdicts[step % _RING] = torch.cat([seen, bounds, left_out.float()[None]])
        self.positions[step % _RING] = first_sample
        return counts

    def look(self, run: Any, done: int, may_go_back: bool) -> GoBack | None:
        """Tell what was left out since the last look, which waits for the device. Where too many in a row were, and the run may
        go back here: to where. done: steps so far. Every rank calls it. UserError where it would have to and cannot.
        """
        verdicts, in_row = self.verdicts.tolist(), int(self.in_row)
        for step in range(max(self.looked, done - _RING), done):
            loss, norm, loss_bound, norm_bound, left_out = verdicts[step % _RING]
            if left_out and self.ranks.is_main:
                documents = documents_of(run, self.positions[step % _RING])
                bounds = {"loss_bound": loss_bound, "grad_norm_bound": norm_bound}
                more = f" and {len(documents) - _SHOWN_DOCUMENTS} more" if len(documents) > _SHOWN_DOCUMENTS else ""
                words = (
                    f"step {step + 1:,} is left out: loss {loss:.4f} (bound {loss_bound:.4f}), grad_norm {norm:.3f} (bound "
                    f"{norm_bound:.3f}); learned from {'; '.join(documents[:_SHOWN_DOCUMENTS])}{more}"
                )
                run.log.event(step + 1, "spike", words, loss=loss, grad_norm=norm, **bounds, documents=documents)
        self.looked = done
        if in_row < MAX_SPIKES or not may_go_back:
            return None
        return self._go_back(run, done, first_step=done - in_row)

    def _go_back(self, run: Any, done: int, first_step: int) -> GoBack:
        words = f"{done - first_step} steps in a row, up to step {done:,}, were left out by --spike_guard"
        advice = (
            f"the weights are those from before; look at the documents that metrics.jsonl in {run.config.save_dir} names, or "
            "go on with --checkpoint latest and a lower --learning_rate"
        )
        if run.config.stage in ("grpo", "ppo"):
            raise UserError(f"{words}, and a run that draws answers cannot go back and pass over them: {advice}")
        if self.went_back:
            raise UserError(f"{words}, though the run has gone back once before: {advice}")
        run.saves.settle(run)  # one that is still being written may be from after them
        found = from_rank_0(lambda: _last_before(Path(run.config.save_dir), first_step))
        if found is None:
            raise UserError(f"{words}, and there is no checkpoint from before them: {advice}")
        back = GoBack(found, (self.positions[first_step % _RING], run.samples))
        run.log.event(done, "alert", f"{words}: going back to {found}, and on without what they learned from")
        run.log.status("stopped", done)
        return back

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON keeps the bits of a float32."""
        return {
            "window": self.window.tolist(), "accepted": int(self.accepted), "in_row": int(self.in_row),
            # NaN and infinity are not JSON
            "verdicts": [[x if math.isfinite(x) else str(x) for x in row] for row in self.verdicts.tolist()],
            "positions": self.positions, "looked": self.looked, "went_back": self.went_back,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.window.copy_(torch.tensor(state["window"]))
        self.accepted.fill_(state["accepted"])
        self.in_row.fill_(state["in_row"])
        self.verdicts.copy_(torch.tensor([[float(x) for x in row] for row in state["verdicts"]]))
        self.positions, self.looked, self.went_back = state["positions"], state["looked"], state["went_back"]


def make_guard(config: TrainConfig, ranks: Ranks, state: dict[str, Any] | None) -> SpikeGuard | None:
    """The guard that --spike_guard asks for, as the checkpoint that is resumed knew it."""
    if config.spike_guard is None:
        return None
    guard = SpikeGuard(config.spike_guard, ranks)
    if state is not None:
        guard.load(state)
    return guard


def go_on_without(run: Any, back: GoBack) -> None:
    """In a run that was resumed from `back.checkpoint`: pass over these samples. It goes back only this once."""
    run.skipped = [*run.skipped, back.samples]
    run.samples = position(run.samples, run.config.batch_size, run.skipped)
    run.guard.went_back = True


def _on(device: torch.device, value: Tensor | float) -> Tensor:
    """On the device, without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().float().to(device)
    return torch.full((), float(value), device=device)


def _last_before(save_dir: Path, step: int) -> Path | None:
    """The newest whole checkpoint of at most so many steps; later ones, whose steps were left out, are removed."""
    saved = list_checkpoints(save_dir)
    for number, path in reversed(saved):
        if number <= step and verify_checkpoint(path) is None:
            for later, aside in saved:
                if later > number:
                    shutil.rmtree(move_aside(aside, ".del"), ignore_errors=True)
            return path
    return None


def documents_of(run: Any, first_sample: int) -> list[str]:
    """What the step of these samples learned from: documents by file and place, examples or prompts by number."""
    data = run.data.train
    if isinstance(data, list):
        phase, step = run.stage.schedule.locate(first_sample)
        numbers = run.stage.schedule.prompt_numbers(phase, len(data))[run.stage.schedule.members(phase, step)]
        return [f"prompt {number + 1}" for number in numbers.tolist()]
    return data.documents(first_sample, run.config.batch_size)


# ---- samples that are passed over ---------------------------------------------------------------------------------------


def position(samples: int, batch_size: int, skipped: Skipped) -> int:
    """The first sample of the next step, where `samples` were consumed: none of its batch may be among the skipped."""
    for first, end in sorted(skipped):
        if first < samples + batch_size and samples < end:
            samples = end
    return samples


def batches_from(stage: Any, samples: int, batch_size: int, skipped: Skipped) -> Iterator[list[MicroBatch]]:
    """What `stage.batches` gives, but for what is passed over."""
    samples = position(samples, batch_size, skipped)
    batches = stage.batches(samples)
    while True:
        yield next(batches)
        samples += batch_size
        if (after := position(samples, batch_size, skipped)) != samples:
            samples, batches = after, stage.batches(after)
