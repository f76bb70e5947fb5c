"""What does a classifier learn? The label of a text, any of several labels, or figures.

Logits are those of the first token of an encoder, [CLS] (Devlin et al. 2018, §4.1), of the last one of a decoder, which alone
has read the whole text (Radford et al. 2018), or of a mean where the model's head takes one.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches.micro_batch import MicroBatch
from finetune_data.labelled import Labels, batch_labels
from finetune_data.task_layout import token_types
from finetune_data.task_metrics import (
    class_figures,
    confusion_counts,
    multi_label_counts,
    multi_label_figures,
    regression_figures,
)
from ranks import unwrap
from stages.held_out import over_held_out, summed
from training.examples_data import ExampleFeed, Group, Metrics, use_sample_keys
from training.metrics import Figures, mean


@dataclass
class Classify:
    """Cross-entropy of single labels, of several labels the mean binary one, of figures the mean squared error, by text.

    class_weights: of each single label's loss; their mean over what is learned from is 1, so that the loss is still
    divided by the number of texts. confusion: counts of the last evaluation, labels as rows, of single labels.
    The model is an adapters.task_heads.TaskModel.
    """

    feed: ExampleFeed
    labels: Labels
    causal: bool
    class_weights: tuple[float, ...] = ()
    confusion: np.ndarray | None = field(default=None, init=False)

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self._micro_batches)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss, {metric: (sum, texts)})."""
        use_sample_keys(unwrap(model), batch)
        losses, logits, labels = self._losses(model, batch)
        figures = {"loss": losses}
        if self.labels.kind == "single":
            figures["accuracy"] = (logits.argmax(1) == labels).float()
        return losses.sum(), {name: (value.detach().sum(), batch.weight) for name, value in figures.items()}

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss a text, and by kind val_accuracy, val_f1 (macro), val_matthews; val_f1, val_micro_f1, val_exact_match;
        val_pearson, val_spearman, val_mae. Always over all that is held out."""
        if self.feed.validation is None:
            return {}
        groups = self.feed.validation.groups
        own = self.feed.ranks.part(len(groups))
        parts = over_held_out(self.feed, model, self._micro_batches(groups[own]), self._losses)
        loss = sum(float(losses.sum()) for losses, _, _ in parts)
        width = self.labels.num_outputs
        shapes = (0, width), (0,) if self.labels.kind == "single" else (0, width)
        found, labels = (
            np.concatenate([np.zeros(shape), *(part[place].cpu().numpy() for part in parts)])
            for place, shape in zip((1, 2), shapes, strict=True)
        )
        (loss,) = self.feed.ranks.sum([loss])
        return {"val_loss": mean(loss, len(groups)), **self._figures(found, labels, own.start, len(groups))}

    def draw_confusion(self, path: Path) -> None:
        """The counts of the last evaluation as a PNG; nothing where there are none."""
        from training.confusion_plot import plot_confusion  # here: matplotlib takes seconds to import

        if self.confusion is not None:
            plot_confusion(self.confusion, self.labels.names, path, title="held out")

    def _figures(self, found: np.ndarray, labels: np.ndarray, first: int, total: int) -> Figures:
        """Of this rank's logits and labels, which begin at example `first` of `total`, together with those of the others."""
        ranks, width = self.feed.ranks, self.labels.num_outputs
        if self.labels.kind == "single":
            self.confusion = summed(ranks, confusion_counts(found.argmax(1), labels, width)).astype(np.int64)
            of = class_figures(self.confusion)
            return {"val_accuracy": of["accuracy"], "val_f1": of["macro_f1"], "val_matthews": of["mcc"]}
        if self.labels.kind == "multi":
            of = multi_label_figures(summed(ranks, multi_label_counts(found > 0, labels)))
            names = {"val_f1": "macro_f1", "val_micro_f1": "micro_f1", "val_exact_match": "exact_match"}
            return {ours: of[theirs] for ours, theirs in names.items()}
        both = np.zeros((2, total, width))  # a correlation needs all of them at once
        both[:, first : first + len(found)] = found, labels
        of = regression_figures(*summed(ranks, both))
        known = {f"val_{name}": of[name] for name in ("pearson", "spearman", "mae")}
        return {name: None if np.isnan(value) else value for name, value in known.items()}

    def _losses(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(the loss of each text (N,), its logits (N, K), its labels) in fp32."""
        logits = text_logits(model, batch, causal=self.causal)
        labels = batch_labels(batch, self.labels)
        if self.labels.kind == "single":
            weights = torch.tensor(self.class_weights, device=logits.device) if self.class_weights else None
            return F.cross_entropy(logits, labels, weight=weights, reduction="none"), logits, labels
        if self.labels.kind == "multi":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1), logits, labels
        return (logits - labels).square().mean(1), logits, labels

    def _micro_batches(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        return [replace(batch, weight=batch.num_sequences) for batch in self.feed.pack(groups)]


def text_logits(model: nn.Module, batch: MicroBatch, *, causal: bool) -> Tensor:
    """(texts, K) fp32: the logits of each text of a micro-batch."""
    logits = token_logits(model, batch).flatten(0, 1)
    assert batch.last_tokens is not None
    return logits[batch.last_tokens if causal else batch.first_tokens]


def token_logits(model: nn.Module, batch: MicroBatch) -> Tensor:
    """(B, T, K) fp32: the logits of each token of a micro-batch."""
    return model(
        batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1],
        token_types=token_types(batch),
    )  # fmt: skip
