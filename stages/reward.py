"""What does a reward model learn? To score the chosen answer of a pair higher than the rejected one.

Bradley & Terry (1952) as in Ouyang et al. (2022), eq. 1: the probability that the chosen answer wins is σ(c − r), the
scores being the model's at the last token of each sequence.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches.micro_batch import MicroBatch
from finetune_data.encoding_examples import ENDS_SIDE
from ranks import unwrap
from training.examples_data import ExampleFeed, Group, Metrics, use_sample_keys
from training.metrics import Figures


@dataclass(frozen=True)
class Reward:
    """−log σ(c − r − margin) + centring · (c + r)² on groups [chosen, rejected].

    margin: the column of that name, where the data has one (Llama 2, Touvron et al. 2023, eq. 2). centring: 0.01 keeps
    scores near 0, which differences alone do not fix (Eisenstein et al. 2023). The model is a adapters.scalar_head.RewardModel.
    """

    feed: ExampleFeed
    centring: float = 0.01

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self._micro_batches)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss, {metric: (sum, pairs)})."""
        use_sample_keys(unwrap(model), batch)
        scores = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
        scores = scores.flatten()[batch.last_tokens]  # (sequences,) fp32
        if ENDS_SIDE in batch.columns:  # answers of several turns are judged where the last one ends
            scores = scores[batch.columns[ENDS_SIDE] > 0]
        chosen, rejected = scores[0::2], scores[1::2]
        margin = batch.columns["margin"][0::2] if "margin" in batch.columns else 0.0
        losses = -F.logsigmoid(chosen - rejected - margin) + self.centring * (chosen + rejected).square()
        figures = {
            "loss": losses,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "score/chosen": chosen,
            "score/rejected": rejected,
        }
        return losses.sum(), {name: (value.detach().sum(), batch.weight) for name, value in figures.items()}

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss and val_margin a pair, and val_accuracy: how often the chosen answer scores higher."""
        names = {"loss": "val_loss", "accuracy": "val_accuracy", "margin": "val_margin"}
        return self.feed.evaluate(model, self._micro_batches, self.loss, names, everything)

    def _micro_batches(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        batches = self.feed.pack(groups)
        sides = [batch.columns.get(ENDS_SIDE, torch.ones(batch.num_sequences)) for batch in batches]
        return [replace(batch, weight=int(ends.sum()) // 2) for batch, ends in zip(batches, sides, strict=True)]
