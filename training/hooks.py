"""What may functions of the user's own see of a run, and what may they change in it? (--hooks FILE)

    def on_start(state)         before the first step of each start, also where a run goes on
    def on_step(state)          after each optimizer step
    def on_evaluate(state)      after each evaluation, before its figures are logged
    def on_checkpoint(state)    after each checkpoint that was written; with --async_checkpoint some steps later
    def on_finish(state)        when the run has come to its end or was stopped

Any of them, in one file or several, which are called in the order in which they are named. They run on every rank. What they
ask for is agreed over the ranks: a stop, an evaluation or a checkpoint is made where any file on any rank asks for it,
`lr_factor` must be the same on all ranks, and `log` and `memory` are those of the first.

A run that was killed and goes on is the run that never stopped as long as hooks keep what they know in `memory`: it is in
every checkpoint, as what they asked for is. An evaluation that followed the checkpoint is made again, so that on_evaluate
sees it. What on_checkpoint and on_finish would change, no checkpoint would hold, so they cannot.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from errors import UserError
from ranks import Ranks, unwrap
from training.config import TrainConfig
from training.metrics import Figures, Metrics, TrainRow, reduce_metrics
from training.saving import Saves
from training.user_code import HOOKS, UserCode, hooks_of, read_hooks

_CHANGEABLE = ("lr_factor", "stop_after_this_step", "evaluate_now", "save_now")
_READ_ONLY = ("on_checkpoint", "on_finish")
_WITH_A_ROW = ("on_step", "on_evaluate")
_TELLS_THE_KIND = ("time", "event", "message", "sample", "prompt", "eval_s")  # of a row in metrics.jsonl


@dataclass
class HookState:
    """A run as a hook sees it.

    To be read:
      event                 the name of the function that is called
      step                  optimizer steps made so far
      config                every option of the run, by name (training/option_groups.py)
      model                 the module that learns, without DDP's wrapper
      ranks                 this process among the others: rank, world_size, device, and sum, which adds up over all of them;
                            ranks.data is the same of what samples are divided among, and adds up what is found of them
      figures               in on_step those of the step, over all ranks, with grad_norm; in on_evaluate those of the
                            evaluation, such as val_loss; None for one that nothing was averaged over. Else {}
      learning_rate         of the last step, with lr_factor in it; 0 before the first
      tokens                that the run has learned from so far
      checkpoint            the folder of the newest checkpoint, in on_checkpoint the one just written; None before the first

    To be changed:
      lr_factor             what the schedule's learning rate is multiplied with from the next step on; stays until changed
      stop_after_this_step  True: the run saves and ends here. In on_start no step is made
      evaluate_now          True: an evaluation is made now, beside those of --eval_interval
      save_now              True: a checkpoint is written now; of grpo and ppo where the round of answers ends
      log                   figures that are added to the row of this step or evaluation: state.log["name"] = 1.5. on_step's
                            are written where --log_interval writes a row; on_evaluate's get `val_` in front of their names
      memory                what the hooks want to keep: it is in every checkpoint, so it holds what JSON does
    """

    event: str
    step: int
    config: TrainConfig
    model: nn.Module
    ranks: Ranks
    figures: Figures
    learning_rate: float
    tokens: int
    checkpoint: Path | None
    log: Any
    memory: Any
    lr_factor: float
    stop_after_this_step: bool
    evaluate_now: bool
    save_now: bool

    def __setattr__(self, name: str, value: Any) -> None:
        """AttributeError for a name that is none, or may only be read: a wish that nobody reads would be lost in silence."""
        if name in self.__dict__ or name not in self.__dataclass_fields__:
            if name not in _CHANGEABLE:
                raise AttributeError(f"state.{name} cannot be set; what can be is {', '.join(_CHANGEABLE)}")
            if self.event in _READ_ONLY:
                raise AttributeError(f"state.{name} cannot be set in {self.event}, after the save; set it in on_step")
        super().__setattr__(name, value)

    def take_wishes(self) -> tuple[bool, bool, bool]:
        """(stop, evaluate, save) as one file asked for; the next one, which is given the same state, may only add to it."""
        wishes = bool(self.stop_after_this_step), bool(self.evaluate_now), bool(self.save_now)
        if any(wishes):
            self.stop_after_this_step = self.evaluate_now = self.save_now = False
        return wishes


class HookedRun(Protocol):
    """What hooks are shown of train.py's Run, and what they have done by it."""

    config: TrainConfig
    model: nn.Module
    ranks: Ranks
    step: int
    tokens: int
    learning_rate: float
    saves: Saves

    def evaluate(self, step: int, last: bool) -> None: ...


@dataclass
class Hooks:
    """The user's functions by event, and what they asked for; `stop`, `evaluate` and `save` are wishes not yet granted."""

    functions: dict[str, list[tuple[UserCode, Callable[[HookState], object]]]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0
    stop: bool = False
    evaluate: bool = False
    save: bool = False

    def start(self, run: HookedRun) -> bool:
        """on_start; then, where the run goes on from a checkpoint, the evaluation that came after it, for on_evaluate.

        Returns whether a step is to be made.
        """
        self.call("on_start", run)
        if self.evaluate or ("on_evaluate" in self.functions and run.config.evaluates_after(run.step)):
            run.evaluate(run.step, last=False)
        return not self.stop

    def step(self, run: HookedRun, metrics: Metrics, grad_norm: Tensor | None) -> Figures:
        """on_step with the figures of all ranks, for which it waits for the device; what it adds to the step's row."""
        if "on_step" not in self.functions:
            return {}
        norm = None if grad_norm is None else grad_norm.item()
        return self.call("on_step", run, reduce_metrics(metrics, run.ranks.data) | {"grad_norm": norm})

    def finish(self, run: HookedRun) -> None:
        self.call("on_finish", run)

    def call(self, event: str, run: HookedRun, figures: Mapping[str, float | None] = MappingProxyType({})) -> Figures:
        """Call the functions of an event, and agree over the ranks on what they ask for. Every rank calls it.

        Returns what they add to the event's row. UserError on every rank where a function raises on any of them, naming
        file, line and step.
        """
        if event not in self.functions:
            return {}
        log: Any = {} if event in _WITH_A_ROW else MappingProxyType({})
        memory: Any = MappingProxyType(self.memory) if event in _READ_ONLY else self.memory
        state = HookState(
            event=event, step=run.step, config=run.config, model=unwrap(run.model), ranks=run.ranks, figures=dict(figures),
            learning_rate=run.learning_rate, tokens=run.tokens, checkpoint=run.saves.newest, log=log, memory=memory,
            lr_factor=self.lr_factor, stop_after_this_step=False, evaluate_now=False, save_now=False,
        )  # fmt: skip
        wishes: tuple[bool, ...] = (False, False, False)
        failure = None
        for code, function in self.functions[event]:
            try:
                function(state)
                _check(state, figures)
                wishes = tuple(before or now for before, now in zip(wishes, state.take_wishes(), strict=True))
            except (Exception, SystemExit) as error:  # a rank that left alone would leave the others waiting
                failure = UserError(
                    f"{code.failure(error, event, f' at step {run.step}')}; the checkpoints in {run.config.save_dir} are as "
                    "they were: correct the file and go on with --checkpoint latest"
                )
                failure.__cause__ = error
                break
        self._agree(state, wishes, failure)
        return {_name_in_row(event, name): value for name, value in state.log.items()}

    def _agree(self, state: HookState, wishes: tuple[bool, ...], failure: UserError | None) -> None:
        """Take over what is asked for on any rank. UserError on every rank for a failure, or for two learning rates."""
        size, own, event = state.ranks.world_size, state.ranks.rank, state.event
        factor = 1.0 if failure else state.lr_factor
        by_rank = [value * (rank == own) for value in (float(failure is not None), factor) for rank in range(size)]
        total = state.ranks.sum([*by_rank, *map(float, wishes)])
        failed, factors = total[:size], total[size : 2 * size]
        if failure is not None:
            raise failure
        if any(failed):
            raise UserError(
                f"{event} of --hooks failed at step {state.step} on rank {failed.index(1.0)}, which says why"
            )
        if min(factors) != max(factors):
            other = next(rank for rank, factor in enumerate(factors) if factor != factors[0])
            raise UserError(
                f"{event} of --hooks set lr_factor to {factors[0]:g} on rank 0 and to {factors[other]:g} on rank {other} "
                f"at step {state.step}: set the same on every rank"
            )
        stop, evaluate, save = (count > 0 for count in total[2 * size :])
        self.lr_factor = state.lr_factor
        self.stop, self.evaluate, self.save = self.stop or stop, self.evaluate or evaluate, self.save or save

    def for_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint keeps. UserError for a memory that it would give back as something else."""
        for name, value in self.memory.items():
            if not isinstance(name, str) or not _is_json(value):
                raise UserError(
                    f"--hooks: state.memory[{name!r}] is {type(value).__name__} {value!r:.60}, which a checkpoint cannot keep: "
                    "use text as names, and numbers, texts, lists and dicts with such names as values"
                )
        return {
            "memory": self.memory, "lr_factor": self.lr_factor, "stop": self.stop, "evaluate": self.evaluate,
        }  # fmt: skip


def load_hooks(config: TrainConfig, saved: Mapping[str, Any]) -> Hooks:
    """The functions of --hooks, run once; saved: what `for_checkpoint` gave, {} at the start of a run. UserError."""
    functions: dict[str, list] = {}
    for path in config.hooks:
        code = read_hooks(path)
        found = hooks_of(code)
        for event in HOOKS:
            if event in found:
                functions.setdefault(event, []).append((code, found[event]))
    if not functions:  # the run goes on without hooks
        return Hooks()
    return Hooks(
        functions, dict(saved.get("memory", {})), saved.get("lr_factor", 1.0), evaluate=saved.get("evaluate", False)
    )


def _check(state: HookState, figures: Mapping[str, float | None]) -> None:
    """ValueError for a wish that cannot be granted; logged figures become floats, of tensors too."""
    factor = state.lr_factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 0:
        raise ValueError(f"state.lr_factor is {factor!r}; it must be a finite number, and not negative")
    for name, value in state.log.items():
        named = _name_in_row(state.event, name)
        if named in {*figures, *TrainRow.__dataclass_fields__, *_TELLS_THE_KIND}:
            raise ValueError(f"state.log[{name!r}]: the row has something of this name already; choose another")
        if state.event == "on_step" and named.startswith("val_"):
            raise ValueError(
                f"state.log[{name!r}]: a name that begins with val_ is one of an evaluation; choose another"
            )
        if value is not None:
            state.log[name] = float(value)


def _name_in_row(event: str, name: str) -> str:
    return f"val_{name.removeprefix('val_')}" if event == "on_evaluate" else name


def _is_json(value: Any) -> bool:
    """Whether it comes back from JSON as what it is; NaN does, and is unequal to itself."""
    try:
        again = json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return again == value or repr(again) == repr(value)
