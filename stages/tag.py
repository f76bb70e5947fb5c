"""What does a tagger learn? The tag of each word, at the first of its tokens (Devlin et al. 2018, §5.3)."""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches.micro_batch import IGNORE_INDEX, MicroBatch
from finetune_data.tagged import TaggedWords, batch_tags, outside, word_tags
from finetune_data.task_metrics import (
    class_f1,
    confusion_counts,
    entity_counts,
    entity_figures,
    entity_types,
    marks_entities,
)
from ranks import unwrap
from stages.classify import token_logits
from stages.held_out import over_held_out, summed
from training.examples_data import ExampleFeed, Group, Metrics, use_sample_keys
from training.metrics import Figures, mean


@dataclass(frozen=True)
class Tag:
    """Cross-entropy of the tags of words, those that have a token in the sentence.

    sentences, places: of what is held out, as it was read, and where each word begins. class_weights: as in
    stages.classify.Classify. The model is an adapters.task_heads.TaskModel.
    """

    feed: ExampleFeed
    names: tuple[str, ...]
    sentences: SequenceOf[TaggedWords]
    places: SequenceOf[np.ndarray]
    class_weights: tuple[float, ...] = ()

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self._micro_batches)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss, {metric: (sum, words)})."""
        use_sample_keys(unwrap(model), batch)
        loss, predicted = self._judge(model, batch)
        right = (predicted == batch_tags(batch)).sum()
        return loss, {"loss": (loss.detach(), batch.weight), "accuracy": (right, batch.weight)}

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss a word with a token; val_accuracy over all words; of entities val_f1, val_precision, val_recall and
        val_f1/TYPE, of other tags val_f1 (macro). Always over all that is held out."""
        if self.feed.validation is None:
            return {}
        groups = self.feed.validation.groups
        own = self.feed.ranks.part(len(groups))
        batches = self._micro_batches(groups[own])
        parts = over_held_out(self.feed, model, batches, self._judge)
        sums = [sum(float(loss) for loss, _ in parts), float(sum(batch.weight for batch in batches))]
        loss, weight = self.feed.ranks.sum(sums)
        found = [
            sequence
            for batch, (_, predicted) in zip(batches, parts, strict=True)
            for sequence in by_sequence(batch, predicted.cpu().numpy())
        ]
        return {"val_loss": mean(loss, weight), **self._figures(found, own.start)}

    def _figures(self, found: list[np.ndarray], first: int) -> Figures:
        """Of the tags found for this rank's sentences, which begin at `first`, with those of the other ranks."""
        last = first + len(found)
        sentences, places = self.sentences[first:last], self.places[first:last]
        tags = [word_tags(one, where, missing=outside(self.names)) for one, where in zip(found, places, strict=True)]
        if marks_entities(self.names):
            types = entity_types(self.names)
            named = (
                [[self.names[tag] if tag >= 0 else "O" for tag in one] for one in tags],
                [[self.names[tag] for tag in one.tags] for one in sentences],
            )
            counts = summed(self.feed.ranks, entity_counts(*named, types))
            return {f"val_{name}": value for name, value in entity_figures(counts, types).items()}
        predicted = np.concatenate([np.zeros(0, np.int64), *tags])
        labels = np.array([tag for one in sentences for tag in one.tags], dtype=np.int64)
        size = len(self.names)  # one more class, which no label has, for words without a token
        confusion = summed(
            self.feed.ranks, confusion_counts(np.where(predicted < 0, size, predicted), labels, size + 1)
        )
        occurs = (confusion.sum(0) + confusion.sum(1) > 0)[:size]
        accuracy = float(np.trace(confusion) / max(confusion.sum(), 1))
        return {"val_accuracy": accuracy, "val_f1": float(class_f1(confusion)[:size][occurs].mean())}

    def _judge(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(the summed loss, the best tag of each token (B, T))."""
        logits = token_logits(model, batch)  # (B, T, K)
        weights = torch.tensor(self.class_weights, device=logits.device) if self.class_weights else None
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            batch_tags(batch).flatten(),
            weight=weights,
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        return losses.sum(), logits.detach().argmax(-1)

    def _micro_batches(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        return [replace(b, weight=int((batch_tags(b) != IGNORE_INDEX).sum())) for b in self.feed.pack(groups)]


def by_sequence(batch: MicroBatch, values: np.ndarray) -> list[Any]:
    """What (B, T, …) values of tokens are for each sequence, (n, …), in their order."""
    flat = values.reshape(-1, *values.shape[2:])
    return [flat[place] for place in batch.places]
