"""How good is an answer? Reward functions: loading them, calling them safely, and those that people need.

A reward function is f(prompts, completions, **columns) -> list[float | None]: texts, and one list for each column of the
data, among them `completion_ids`, the answers' tokens; it is given those that its signature names, all with **keywords.
The first two parameters may have any names, as in f(prompts, responses). None and NaN say that it cannot judge: nothing is
learned from such an answer. It may be async. Shipped ones are named, some with an argument behind "=":

    exact_answer     1 where the final answer is that of the data, as a number or word for word, else 0
    numeric_answer   1 where the final answer, or the last number, is the data's number, else 0
    format=REGEX     1 where the whole answer matches (default: <think>…</think> <answer>…</answer>)
    regex=REGEX      1 where the pattern is found
    length=N         0 up to N tokens, falling to -1 at 2 N (soft overlong punishment; Yu et al. 2025, eq. 13)

The final answer is what the last \\boxed{…} holds, else what follows the last "####" (GSM8K), else the whole text; how a
number may be written is in answers.py. The data's answer is in the first of the columns answer, solution, ground_truth,
target and label.
"""

import asyncio
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arguments import did_you_mean
from batches.micro_batch import MicroBatch
from batches.packing import Sequence, pack
from batches.sampler import hash_key
from errors import UserError
from generation.rollouts import Prompt, Rollout, Sampling, roll_out
from limits import CallTimeout, call_within
from model import Transformer
from ranks import Ranks
from stages.answers import as_number, final_answer, last_number
from training.metrics import Figures, Metrics
from training.precision import Precision

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "target", "label")
_EVALUATION_KEY = 20
MAX_UNSCORED_PHASES = 3  # in a row, before the run gives up
_DEFAULT_FORMAT = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"


@dataclass(frozen=True)
class Reward:
    """A judge by name, and how much it counts.

    on_tokens: it is a trained model instead, f(list of prompt-and-response tokens (n,) int64) -> list[float].
    """

    name: str
    function: Callable
    weight: float = 1.0
    on_tokens: bool = False


# ------------------------------------------------------------------------------------------------------------- loading


def load_reward(spec: str) -> Callable:
    """The function of "package.module:function", found from the working directory too, or a shipped one. UserError."""
    name, _, argument = spec.partition("=")
    if name in SHIPPED:
        return SHIPPED[name](argument)
    module_name, colon, function_name = spec.partition(":")
    if not colon:
        raise UserError(
            f"--reward_function {spec}: give package.module:function or one of {', '.join(SHIPPED)}"
            + did_you_mean(name, SHIPPED)
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing of the project is hidden by a file there
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(f"--reward_function {spec}: {module_name} cannot be imported ({error})") from error
    except AttributeError as error:
        raise UserError(f"--reward_function {spec}: {module_name} has no {function_name}") from error
    if not callable(function):
        raise UserError(f"--reward_function {spec}: {function_name} is not a function")
    return function


# ------------------------------------------------------------------------------------------------------------- calling


def judge(
    rewards: SequenceOf[Reward],
    prompts: SequenceOf[Prompt],
    rollouts: SequenceOf[Rollout],
    decode: Callable[[list[int]], str],
    *,
    timeout: float,
    samples: dict[str, str] | None = None,
) -> np.ndarray:
    """(answers, rewards) float64: what each reward says of each rollout of the prompt beside it; NaN is None.

    Texts are without the stop token. timeout: seconds for one call. samples: takes what each reward returned for its first
    answer, to be shown. UserError, naming the function and the sample, where one raises, takes longer, or gives anything but
    a finite number or None for each answer.
    """
    scores = np.full((len(rollouts), len(rewards)), np.nan)
    if not rollouts:
        return scores
    answers = [rollout.response[:-1] if rollout.finished else rollout.response for rollout in rollouts]
    columns: dict[str, list] = {name: [prompt.columns.get(name) for prompt in prompts] for name in prompts[0].columns}
    columns |= {
        "prompts": [prompt.text for prompt in prompts],
        "completions": [decode(answer.tolist()) for answer in answers],
        "completion_ids": [rollout.response.tolist() for rollout in rollouts],
    }
    for index, reward in enumerate(rewards):
        if reward.on_tokens:
            given = reward.function([rollout.tokens for rollout in rollouts])
        else:
            given = _call(reward, columns, timeout)
        scores[:, index] = [_as_float(reward.name, value, prompts[at].text) for at, value in enumerate(given)]
        if samples is not None:
            samples[reward.name] = f"{given[0]!r} for the answer {_short(columns['completions'][0])}"
    return scores


def model_reward(
    scores: Callable[[MicroBatch], Tensor],
    *,
    device: torch.device,
    precision: Precision,
    max_length: int,
    micro_batch_size: int,
) -> Callable[[list[np.ndarray]], list[float]]:
    """A trained reward model as the function of a Reward with on_tokens: its score at each text's last token.

    scores: micro-batch -> (B, T), as adapters/actor_critic.scores_of makes it.
    """

    @torch.no_grad()
    def score(texts: list[np.ndarray]) -> list[float]:
        sequences = [Sequence(tokens, np.zeros(len(tokens), dtype=bool)) for tokens in texts]
        results: list[float] = []
        for batch in pack([[s] for s in sequences], max_length=max_length, micro_batch_size=micro_batch_size):
            on_device = batch.to(device)
            with precision.autocast(device):
                results += scores(on_device).flatten()[on_device.last_tokens].tolist()
        return results

    return score


def combine(scores: np.ndarray, rewards: SequenceOf[Reward]) -> np.ndarray:
    """(answers,) weighted sums of (answers, rewards), over the rewards that could judge; NaN where none could."""
    total = np.nansum(scores * np.array([reward.weight for reward in rewards]), axis=1)
    return np.where(np.isnan(scores).all(axis=1), np.nan, total)


def describe_phase(
    rollouts: SequenceOf[Rollout], scores: np.ndarray, total: np.ndarray, rewards: SequenceOf[Reward]
) -> dict[str, float]:
    """Metrics of a rollout phase: mean and deviation (n - 1) of the reward and, if several, of each; lengths; endings.

    scores (answers, rewards) and total (answers,), of all ranks; what is NaN does not count, and is its own figure,
    unscored, the share of answers that no reward could judge. A figure of nothing is NaN.
    """
    figures = {"reward": _mean(total), "reward_std": _std(total), "unscored": float(np.isnan(total).mean())}
    if len(rewards) > 1:
        for reward, column in zip(rewards, scores.T, strict=True):
            figures |= {f"reward_{reward.name}": _mean(column), f"reward_{reward.name}_std": _std(column)}
    figures |= {"completion_length": float(np.mean([len(rollout.response) for rollout in rollouts]))}
    return figures | {"finished": float(np.mean([rollout.finished for rollout in rollouts]))}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _std(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else math.nan


def phase_metrics(columns: dict[str, Tensor]) -> Metrics:
    """{figure of the phase: (sum, weight)} from columns that are the same for every answer; NaN weighs nothing.

    Weighed by answers and not by what is learned, so that a step of which nothing is learned has them too.
    """
    return {name: (column.nansum(), (~column.isnan()).sum()) for name, column in columns.items()}


@dataclass
class UnscoredPhases:
    """How many rollout phases in a row had no answer that a reward could judge, and what is to be said of it.

    alert: a sentence for the log, set by such a phase and taken by the loop. in_a_row goes into checkpoints.
    """

    in_a_row: int = 0
    alert: str | None = None

    def see(self, total: np.ndarray, rewards: SequenceOf[Reward], samples: dict[str, str]) -> None:
        """After each phase; total (answers,) of all ranks, samples as `judge` gives them."""
        if not np.isnan(total).all():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        shown = "; ".join(f"{name} returned {sample}" for name, sample in samples.items())
        self.alert = (
            f"no answer of this round was scored ({', '.join(reward.name for reward in rewards)}), so nothing is learned "
            f"from it: {shown or 'no sample on this rank'}"
        )

    def sentence(self) -> str | None:
        """Why the run must end, or None."""
        if self.in_a_row < MAX_UNSCORED_PHASES:
            return None
        return (
            f"in {self.in_a_row} rounds of answers in a row none was scored; correct --reward_function or the column that "
            f"it compares with, and go on with --checkpoint latest: {self.alert}"
        )


def _call(reward: Reward, columns: dict[str, list], timeout: float) -> list[float]:
    arguments = _accepted(reward.function, columns)
    count = len(columns["prompts"])
    try:
        given = _call_once(reward.function, arguments, timeout)
    except CallTimeout:
        raise UserError(
            f"reward {reward.name} was not done with {count} answers after {timeout:g} s, the first to the prompt "
            f"{_short(columns['prompts'][0])}; make it faster or raise --reward_timeout"
        ) from None
    except Exception as error:
        at = _find_culprit(reward, arguments, count, timeout)
        raise UserError(
            f"reward {reward.name} raised {type(error).__name__}: {error}, for the answer "
            f"{_short(columns['completions'][at])} to the prompt {_short(columns['prompts'][at])}; correct the function, "
            "or return None for what it cannot judge"
        ) from error
    if not isinstance(given, (list, tuple, np.ndarray)) or len(given) != count:
        found = f"{len(given)} values" if hasattr(given, "__len__") else type(given).__name__
        raise UserError(f"reward {reward.name} returned {found} for {count} answers; it must return a list of {count}")
    return list(given)


def _accepted(function: Callable, columns: dict[str, list]) -> tuple[list[list], dict[str, list]]:
    """(positional arguments, keywords): the columns that the signature names, all if it takes **keywords or hides it.

    Where it needs a parameter that is no column, its first two are the prompts and the answers.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return [], columns
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    first: list[str] = []
    if any(one.default is one.empty and one.name not in columns for one in named):
        first = [one.name for one in named[:2] if one.kind is not one.KEYWORD_ONLY]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    names = (columns.keys() if takes_all else {one.name for one in named} & columns.keys()) - set(first)
    positional = [columns["prompts"], columns["completions"]][: len(first)]
    return positional, {name: column for name, column in columns.items() if name in names}


def _call_once(function: Callable, arguments: tuple[list[list], dict[str, list]], timeout: float) -> object:
    async def wait(result: Awaitable[object]) -> object:
        try:
            async with asyncio.timeout(timeout) as limit:
                return await result
        except TimeoutError:
            if limit.expired():  # it came before the watching thread's exception
                raise CallTimeout from None
            raise

    def call() -> object:
        positional, keywords = arguments
        result = function(*positional, **keywords)
        return asyncio.run(wait(result)) if inspect.isawaitable(result) else result

    return call_within(timeout, call)


def _find_culprit(
    reward: Reward, arguments: tuple[list[list], dict[str, list]], count: int, timeout: float
) -> int:  # fmt: skip
    """The first answer that the function raises for by itself, or 0 if it only raises for all together."""
    positional, keywords = arguments
    for at in range(count):
        one = [column[at : at + 1] for column in positional], {k: column[at : at + 1] for k, column in keywords.items()}
        try:
            _call_once(reward.function, one, timeout)
        except Exception:  # which one is reported already: here only for which answer
            return at
    return 0


def _as_float(name: str, value: Any, prompt: str) -> float:
    if value is None:
        return float("nan")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: of a tensor with several elements
        number = math.inf
    if math.isinf(number) or isinstance(value, (str, bytes)):
        raise UserError(
            f"reward {name} returned {_short(repr(value))} for the prompt {_short(prompt)}; it must return a finite number "
            "or None"
        )
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:60] + " … " + text[-15:])


# ---------------------------------------------------------------------------------------------------------- evaluation


def some_and_all(
    evaluate: Callable[[SequenceOf[Prompt]], Figures], prompts: SequenceOf[Prompt], some: int, everything: bool
) -> Figures:
    """The figures that `evaluate` finds for the first `some` held-out prompts (0: for all); with `everything`, and more of
    them, those of all under `_all`. {} where there are none."""
    if not prompts:
        return {}
    figures = evaluate(prompts[: some or len(prompts)])
    if everything and 0 < some < len(prompts):
        figures |= {f"{name}_all": value for name, value in evaluate(prompts).items()}
    return figures


def evaluate_rewards(
    model: Transformer,
    prompts: SequenceOf[Prompt],
    rewards: SequenceOf[Reward],
    decode: Callable[[list[int]], str],
    sampling: Sampling,
    ranks: Ranks,
    *,
    seed: int,
    timeout: float,
) -> Figures:
    """Held-out figures over all ranks: one answer drawn for each prompt, with the same random numbers every time.

    val_reward, its parts when there are several, the shares of answers that nothing could judge and that ended, and their
    length. val_loss is -val_reward: what is lower is better, as everywhere. None where no answer was scored.
    """
    part = ranks.part(len(prompts))
    own = list(prompts[part])
    seeds = [hash_key(seed, _EVALUATION_KEY, number) for number in range(len(prompts))[part]]
    rollouts = roll_out(model, [prompt.tokens for prompt in own], seeds, sampling)
    scores = judge(rewards, own, rollouts, decode, timeout=timeout)
    columns = [combine(scores, rewards), *(scores.T if len(rewards) > 1 else [])]
    sums = [part for column in columns for part in (np.nansum(column), np.sum(~np.isnan(column)))]
    sums += [sum(len(rollout.response) for rollout in rollouts), sum(rollout.finished for rollout in rollouts)]
    sums = ranks.sum([float(value) for value in sums])
    means = [sums[2 * i] / sums[2 * i + 1] if sums[2 * i + 1] else None for i in range(len(columns))]
    figures = {"val_loss": None if means[0] is None else -means[0], "val_reward": means[0]}
    figures["val_unscored"] = 1 - sums[1] / len(prompts)
    figures |= {f"val_reward_{reward.name}": mean for reward, mean in zip(rewards, means[1:], strict=False)}
    return figures | {"val_length": sums[-2] / len(prompts), "val_finished": sums[-1] / len(prompts)}


# ------------------------------------------------------------------------------------------------------------- shipped


def _reference(columns: dict[str, list]) -> list:
    for name in ANSWER_COLUMNS:
        if name in columns:
            return columns[name]
    raise UserError(
        f"this reward compares with the data's answer, but the data has none of {', '.join(ANSWER_COLUMNS)}"
    )


def _exact_answer(argument: str) -> Callable:
    def same(found: str, wanted: str) -> bool:
        found, wanted = final_answer(found), final_answer(wanted)
        number = as_number(wanted)
        if number is not None:
            return as_number(found) == number
        return " ".join(found.split()) == " ".join(wanted.split())

    def exact_answer(prompts: list[str], completions: list[str], **columns) -> list[float | None]:
        pairs = zip(completions, _reference(columns), strict=True)
        return [None if wanted is None else float(same(found, str(wanted))) for found, wanted in pairs]

    return exact_answer


def _numeric_answer(argument: str) -> Callable:
    def numeric_answer(prompts: list[str], completions: list[str], **columns) -> list[float | None]:
        results: list[float | None] = []
        for found, wanted in zip(completions, _reference(columns), strict=True):
            number = None if wanted is None else last_number(final_answer(str(wanted)))
            results.append(None if number is None else float(last_number(final_answer(found)) == number))
        return results

    return numeric_answer


def _matches(search: bool, default: str) -> Callable[[str], Callable]:
    def build(argument: str) -> Callable:
        try:
            pattern = re.compile(argument or default, re.DOTALL)
        except re.error as error:
            raise UserError(f"--reward_function: {argument} is not a regular expression ({error})") from None
        match = pattern.search if search else pattern.fullmatch
        return lambda prompts, completions: [float(match(text) is not None) for text in completions]

    return build


def _length(argument: str) -> Callable:
    if not argument.isdecimal() or not int(argument):
        raise UserError(f"--reward_function length={argument}: give a number of tokens, such as length=200")
    free = int(argument)
    return lambda prompts, completions, completion_ids: [
        -min(1.0, max(0.0, len(ids) / free - 1)) for ids in completion_ids
    ]


SHIPPED: dict[str, Callable[[str], Callable]] = {
    "exact_answer": _exact_answer,
    "numeric_answer": _numeric_answer,
    "format": _matches(search=False, default=_DEFAULT_FORMAT),
    "regex": _matches(search=True, default=""),
    "length": _length,
}
