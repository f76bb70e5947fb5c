"""What is learned in masked language modelling? Tokens that were hidden, from what stands before and behind them.

Devlin et al. (2019), §3.1, with masks that are drawn anew each time a row is seen (Liu et al. 2019, §4.1; batches/masking.py).

A row is a window of pretraining's, without its last token, which only pretraining needs: what is told stands where it was
hidden. [CLS] is in a row where a document begins. Or else a row is one of BERT's pairs (batches/sentence_pairs.py), whose [CLS]
tells, too, whether the second part follows the first.

The loop divides by one weight, the step's masked tokens M. BERT's loss is a mean over M and a mean over the step's B pairs: of a
micro-batch Σ CE + (M / B) Σ CE of its pairs, which over M gives both, exactly, however the step was divided. M is a sum over the
ranks, taken when the step's rows are read. In a step without a masked token nothing is learned.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches.masking import MASKED, Masking, mask_micro_batch
from batches.micro_batch import MicroBatch
from batches.sampler import hash_key
from batches.sentence_pairs import NOT_NEXT, TOKEN_TYPES, SentencePairs
from batches.windows import TrainingData, Windows, evaluation_micro_batches
from ranks import Ranks, unwrap
from sharding import in_step
from stages.pretrain import use_row_keys, with_row_keys
from training.examples_data import SAMPLE_KEY, without_dropout
from training.metrics import Figures, Metrics, mean
from training.precision import Precision

_PAIR_SHARE = "pair_share"  # column, () float32: M / B
_EVALUATION = 4  # begins the keys of an evaluation's masks, which are the same in every run, whatever its seed


@dataclass(frozen=True)
class MLM:
    """Masked language modelling on the rows of `data`, with next-sentence prediction where they are pairs.

    validation: is read in order at each evaluation; None where there is nothing to evaluate on. filler_id: a special token, which
    fills up the last row of an evaluation.
    """

    data: TrainingData | SentencePairs
    validation: Windows | SentencePairs | None
    masking: Masking
    filler_id: int
    ranks: Ranks
    precision: Precision
    batch_size: int
    micro_batch_size: int
    eval_tokens: int
    z_loss: float

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches. Every rank calls it."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        while True:
            rows = self.data.micro_batches(first_sample, self.batch_size, self.micro_batch_size, rank, world_size)
            keyed = with_row_keys(rows, self.data.seed, first_sample + self.batch_size * rank // world_size)
            masked = [mask_micro_batch(batch, batch.columns[SAMPLE_KEY], self.masking) for batch in keyed]
            if isinstance(self.data, SentencePairs):
                [total] = self.ranks.sum([float(sum(batch.weight for batch in masked))])
                share = torch.tensor(total / self.batch_size)
                masked = [replace(batch, columns={**batch.columns, _PAIR_SHARE: share}) for batch in masked]
            yield masked
            first_sample += self.batch_size

    def epoch(self, first_sample: int) -> float:
        """How many times the first source has been seen after that many samples, as a fraction."""
        return self.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss in nats to differentiate, {metric: (sum, weight)}); `batch.weight`, its masked tokens, is its weight.

        The head works on the masked tokens alone. What it would have told costs it one more matrix product, without gradients.
        """
        inner = unwrap(model)
        use_row_keys(inner, batch)
        hidden = model(
            batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1],
            token_types=batch.token_columns.get(TOKEN_TYPES),
        )  # fmt: skip
        places = batch.columns[MASKED]
        states, targets = hidden.flatten(0, 1)[places], batch.targets.flatten()[places]  # (masked, H), (masked,)
        sums = inner.cross_entropy(states, targets, self.z_loss)
        with torch.no_grad():
            told = inner.token_statistics(states, targets).top1 == targets
        figures: Metrics = {"loss": (sums.cross_entropy, batch.weight), "masked_accuracy": (told.sum(), batch.weight)}
        if NOT_NEXT not in batch.columns:
            return sums.total, figures
        labels, logits = batch.columns[NOT_NEXT], inner.next_sentence_logits(hidden[:, 0])  # (B,), (B, 2)
        pairs = F.cross_entropy(logits, labels, reduction="sum")
        figures["next_sentence_loss"] = pairs.detach(), len(labels)
        figures["next_sentence_accuracy"] = (logits.argmax(-1) == labels).sum(), len(labels)
        return sums.total + batch.columns.get(_PAIR_SHARE, 1.0) * pairs, figures  # no share where nothing is learned

    @torch.no_grad()
    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss (nats a masked token), val_masked_accuracy; of pairs val_next_sentence_loss and _accuracy; over all ranks.

        On the first `eval_tokens` of the split, each time with the same masks, which follow the number of the row. With
        `everything`, and a larger split, the figures of the whole split are added under `_all`. {} for an empty split.
        """
        if self.validation is None or not (rows := self.validation.evaluation_rows(0)):
            return {}
        with without_dropout(unwrap(model)):
            figures = self._evaluate(model, self.eval_tokens)
            if everything and self.validation.evaluation_rows(self.eval_tokens) < rows:
                figures |= {f"{name}_all": value for name, value in self._evaluate(model, 0).items()}
        return figures

    def _evaluate(self, model: nn.Module, max_tokens: int) -> Figures:
        names = ["loss", "masked_accuracy"]
        names += ["next_sentence_loss", "next_sentence_accuracy"] * isinstance(self.validation, SentencePairs)
        sums = {name: [0.0, 0.0] for name in names}
        inner, ranks = unwrap(model), self.ranks
        own = self._evaluation_batches(max_tokens, ranks.rank, ranks.world_size)
        for batch, counts in in_step(own, inner, ranks, idle=lambda: next(self._evaluation_batches(max_tokens, 0, 1))):
            with self.precision.autocast(ranks.device):
                _, metrics = self.loss(inner, batch.to(ranks.device))
            for name, parts in metrics.items() if counts else ():
                sums[name] = [before + float(new) for before, new in zip(sums[name], parts, strict=True)]
        flat = iter(ranks.sum([part for name in names for part in sums[name]]))
        return {f"val_{name}": mean(next(flat), next(flat)) for name in names}

    def _evaluation_batches(self, max_tokens: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
        """A rank's part of the rows, masked."""
        assert self.validation is not None
        part = self.micro_batch_size, max_tokens, rank, world_size
        if isinstance(self.validation, SentencePairs):
            batches = self.validation.evaluation_micro_batches(*part)
        else:
            batches = evaluation_micro_batches(self.validation, *part, filler_id=self.filler_id)
        numbers = itertools.count(self.validation.evaluation_rows(max_tokens) * rank // world_size)
        for batch in batches:
            keys = torch.tensor([hash_key(_EVALUATION, next(numbers)) >> 1 for _ in batch.input_ids])
            yield mask_micro_batch(batch, keys, self.masking)
