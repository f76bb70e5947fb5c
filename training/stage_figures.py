"""Which of the figures that a run writes tell how it goes? Of each stage the curve to watch, and what stands beside it.

The loss does so where it is what is wanted: of text, in SFT and of preferences. In reinforcement learning it hovers around zero
whatever happens, and the reward is the curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.run_files import RunHistory, column, number


@dataclass(frozen=True)
class Panel:
    """A plot against the step: columns of the training rows, and of the evaluations, drawn as circles.

    Of several columns those are drawn that the run has. style: "log", "from zero", "robust" (as `robust_range`) or "".
    """

    title: str
    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    style: str = ""
    smooth: bool = True


@dataclass(frozen=True)
class StageFigures:
    """curve and held_out: of training rows and evaluations; what is better, a lower or a higher one.

    unit: of the curve. figures: (column, its name on the screen) to show beside it, of evaluations where it begins with
    val_. panels: the five plots beside the curve's.
    """

    curve: str
    held_out: str
    unit: str
    higher_is_better: bool
    figures: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]

    @property
    def warm_up(self) -> float:
        """The share of the curve that may fall off the chart: a reward has no cliff at its start."""
        return 0.0 if self.higher_is_better else 0.2

    @property
    def sign(self) -> float:
        """What the curve is multiplied with so that lower is better."""
        return -1.0 if self.higher_is_better else 1.0


_RATE = Panel("learning rate", ("lr",), smooth=False)
_GRADIENT = Panel("gradient norm", ("grad_norm",), style="log")
_SPEED = Panel("tokens per second", ("tok_s",), style="from zero", smooth=False)
_MEMORY = Panel("memory (GB)", ("mem_gb",), style="from zero", smooth=False)
_ACCURACY = Panel("the chosen answer is preferred (share)", ("accuracy", "rewards/accuracies"), ("val_accuracy",))
_DRAWN = (
    ("reward_std", "±"), ("unscored", "unscored"), ("kl", "KL"), ("approx_kl", "KL of a round"),
    ("clip_fraction", "clipped"), ("entropy", "entropy"),
    ("completion_length", "length"), ("finished", "finished"), ("equal_groups", "equal groups"), ("value_loss", "value loss"),
)  # fmt: skip
_DRAWN_PANELS = (
    Panel("entropy (nats per token)", ("entropy",), style="from zero"),
    _GRADIENT,
    Panel("KL to the reference; of PPO a whole answer's", ("kl", "approx_kl")),
    Panel("length of answers (tokens)", ("completion_length",), ("val_length",), style="from zero"),
    Panel("clipped tokens, answers that ended (share)", ("clip_fraction", "finished"), ("val_finished",)),
)
PLAIN = StageFigures(
    "loss", "val_loss", "nats per token", False, (),
    (_RATE, _GRADIENT, _SPEED, Panel("validation, bits per byte", held_out=("val_bpb",), style="robust"), _MEMORY),
)  # fmt: skip
_HELD_OUT = Panel("held-out loss", held_out=("val_loss",), style="robust")
_LABELS = ("val_accuracy", "val_micro_f1", "val_pearson")  # one by kind of labels
_BY_STAGE = {
    "pretrain": replace(
        PLAIN, figures=(("balance", "balance"), ("experts/busiest", "busiest expert"), ("experts/idle", "idle experts")),
    ),
    "mlm": StageFigures(
        "loss", "val_loss", "nats per masked token", False,
        (("masked_accuracy", "masked accuracy"), ("val_masked_accuracy", "held out"),
         ("next_sentence_accuracy", "next-sentence accuracy"), ("val_next_sentence_accuracy", "held out")),
        (_RATE, _GRADIENT, _SPEED,
         Panel("masked tokens, next sentences told rightly (share)", ("masked_accuracy", "next_sentence_accuracy"),
               ("val_masked_accuracy", "val_next_sentence_accuracy")),
         Panel("held-out loss", held_out=("val_loss", "val_next_sentence_loss"), style="robust")),
    ),
    "sft": StageFigures(
        "loss", "val_loss", "nats per learned token", False, (),
        (_RATE, _GRADIENT, _SPEED, Panel("held-out loss", held_out=("val_loss",), style="robust"), _MEMORY),
    ),
    "reward": StageFigures(
        "loss", "val_loss", "nats per pair", False,
        (("accuracy", "accuracy"), ("val_accuracy", "held out"), ("margin", "margin"), ("score/chosen", "chosen"),
         ("score/rejected", "rejected")),
        (_RATE, _GRADIENT, _SPEED, _ACCURACY, Panel("score of chosen and rejected", ("score/chosen", "score/rejected"))),
    ),
    "dpo": StageFigures(
        "loss", "val_loss", "a pair or answer", False,
        (("rewards/accuracies", "accuracy"), ("val_accuracy", "held out"), ("rewards/margins", "margin"),
         ("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("kl", "KL")),
        (_RATE, _GRADIENT, Panel("log-probability of chosen and rejected", ("logps/chosen", "logps/rejected")), _ACCURACY,
         Panel("reward of chosen and rejected", ("rewards/chosen", "rewards/rejected"))),
    ),
    "classify": StageFigures(
        "loss", "val_loss", "a text", False,
        (("accuracy", "accuracy"), ("val_accuracy", "held out"), ("val_f1", "F1"), ("val_matthews", "Matthews"),
         ("val_micro_f1", "micro F1"), ("val_exact_match", "all right"), ("val_pearson", "Pearson"),
         ("val_spearman", "Spearman")),
        (_RATE, _GRADIENT, _SPEED,
         Panel("accuracy; of several labels micro F1, of figures Pearson", ("accuracy",), _LABELS), _HELD_OUT),
    ),
    "tag": StageFigures(
        "loss", "val_loss", "nats per word", False,
        (("accuracy", "accuracy"), ("val_accuracy", "held out"), ("val_f1", "F1"), ("val_precision", "precision"),
         ("val_recall", "recall")),
        (_RATE, _GRADIENT, _SPEED,
         Panel("accuracy of words, held out F1", ("accuracy",), ("val_f1",)), _HELD_OUT),
    ),
    "answer": StageFigures(
        "loss", "val_loss", "nats per place", False,
        (("accuracy", "accuracy"), ("val_exact_match", "exact"), ("val_f1", "F1"),
         ("val_f1/has_answer", "F1 with an answer"), ("val_f1/no_answer", "without")),
        (_RATE, _GRADIENT, _SPEED, Panel("accuracy of windows, held out F1", ("accuracy",), ("val_f1",)), _HELD_OUT),
    ),
    "grpo": StageFigures("reward", "val_reward", "an answer", True, _DRAWN, _DRAWN_PANELS),
    "ppo": StageFigures("reward", "val_reward", "an answer", True, _DRAWN, _DRAWN_PANELS),
}  # fmt: skip


def stage_of(run: RunHistory) -> str:
    """The stage in run.json; pretraining where it does not say."""
    config = run.run.get("config")
    stage = config.get("stage") if isinstance(config, dict) else None
    return stage if isinstance(stage, str) and stage in _BY_STAGE else "pretrain"


def figures_of(run: RunHistory) -> StageFigures:
    return _BY_STAGE[stage_of(run)]


def shared_figures(runs: Sequence[RunHistory]) -> StageFigures:
    """What runs that are drawn together have in common: their stage's figures, or the loss alone."""
    found = {figures_of(run) for run in runs}
    return found.pop() if len(found) == 1 else PLAIN


def last_figures(run: RunHistory) -> list[tuple[str, float]]:
    """(name on the screen, value) of the stage's figures in the newest log line and evaluation; those that are there."""
    shown = []
    for name, words in figures_of(run).figures:
        rows = run.evals if name.startswith("val_") else run.train
        values = column(rows[-1:], name)
        if len(values) and np.isfinite(values[0]):
            shown.append((words, number(values[0].item())))
    return shown
