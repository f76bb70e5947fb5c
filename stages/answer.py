"""What does a model learn that finds answers? At which token of a text the answer starts, and at which it ends.

The mean of two cross-entropies over the tokens of a window (Devlin et al. 2018, §4.2 and 4.3); where the window does not show
the answer both are at one place that stands for none (finetune_data/answer_spans.py).
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches.micro_batch import MicroBatch
from finetune_data.answer_spans import END, START, Question, Window, find_answer
from finetune_data.task_metrics import answer_figures, answer_sums
from ranks import unwrap
from stages.classify import token_logits
from stages.held_out import over_held_out, summed
from stages.tag import by_sequence
from training.examples_data import ExampleFeed, Group, Metrics, use_sample_keys
from training.metrics import Figures, mean


@dataclass(frozen=True)
class Answer:
    """A sample is one window. questions, windows: of what is held out, as it was read, and the windows of each.

    may_be_none: whether questions of the data may have no answer; then answers are judged as SQuAD 2.0's script does, else
    as that of version 1.1. The model is an adapters.task_heads.TaskModel.
    """

    feed: ExampleFeed
    questions: SequenceOf[Question]
    windows: SequenceOf[list[Window]]
    may_be_none: bool

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self._micro_batches)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss, {metric: (sum, windows)}); accuracy: windows whose likeliest start and end both are right."""
        use_sample_keys(unwrap(model), batch)
        losses, right, _ = self._judge(model, batch)
        figures = {"loss": losses, "accuracy": right.float()}
        return losses.sum(), {name: (value.detach().sum(), batch.weight) for name, value in figures.items()}

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss a window; val_exact_match and val_f1 a question, its answer the best span over its windows.

        Always over all that is held out; where some questions have no answer, also of both kinds.
        """
        if self.feed.validation is None:
            return {}
        ranks = self.feed.ranks
        own = ranks.part(len(self.questions))
        batches = self._micro_batches([[one.sequence] for windows in self.windows[own] for one in windows])
        parts = over_held_out(self.feed, model, batches, self._judge)
        sums = [sum(float(losses.sum()) for losses, _, _ in parts), float(sum(batch.weight for batch in batches))]
        loss, weight = ranks.sum(sums)
        found = (
            logits
            for batch, (_, _, every) in zip(batches, parts, strict=True)
            for logits in by_sequence(batch, every.cpu().numpy())
        )
        answers = []
        for question, windows in zip(self.questions[own], self.windows[own], strict=True):
            logits = [next(found) for _ in windows]
            starts, ends = ([one[:, place] for one in logits] for place in (0, 1))
            answers.append(find_answer(question.context, windows, starts, ends, may_be_none=self.may_be_none).text)
        right = [[text for text, _ in question.answers] for question in self.questions[own]]
        counts = summed(ranks, answer_sums(answers, right, version=2 if self.may_be_none else 1))
        return {"val_loss": mean(loss, weight)} | {f"val_{name}": v for name, v in answer_figures(counts).items()}

    def _judge(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(the loss of each window (N,), whether its start and end are found (N,), all logits (B, T, 2))."""
        logits = token_logits(model, batch)
        of_windows = padded_logits(logits, batch)  # (N, L, 2)
        targets = torch.stack([batch.columns[START], batch.columns[END]], dim=1).long()  # (N, 2)
        losses = F.cross_entropy(of_windows, targets, reduction="none").mean(1)
        return losses, (of_windows.argmax(1) == targets).all(1), logits.detach()

    def _micro_batches(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        return [replace(batch, weight=batch.num_sequences) for batch in self.feed.pack(groups)]


def padded_logits(logits: Tensor, batch: MicroBatch) -> Tensor:
    """(sequences, length of the longest, K): the (B, T, K) logits of each sequence's own tokens, -inf behind them."""
    assert batch.last_tokens is not None
    first = batch.first_tokens
    lengths = batch.last_tokens - first + 1
    places = torch.arange(int(lengths.max()), device=logits.device)
    inside = places < lengths[:, None]  # (N, L)
    flat = logits.flatten(0, 1)
    taken = flat[(first[:, None] + places).clamp(max=len(flat) - 1)]
    return taken.masked_fill(~inside[:, :, None], -np.inf)
