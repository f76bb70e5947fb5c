"""What is learned in supervised fine-tuning? The next token of examples, where the example says that it is to be learned.

Whose tokens are targets, the assistant's or all, is decided where examples become tokens, and stands in
`Sequence.learned`; the end of a turn is among them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batches.micro_batch import MicroBatch
from batches.packing import sequence_sums
from kernels.dropout import GOLDEN, mix64
from ranks import unwrap
from training.examples_data import SAMPLE_KEY, ExampleFeed, Metrics, token_keys, use_sample_keys
from training.metrics import Figures


@dataclass(frozen=True)
class SFT:
    """Next-token prediction on groups of one sequence each.

    neftune_alpha: above 0, embeddings of training examples get noise (NEFTune, Jain et al. 2023; 5 is usual).
    """

    feed: ExampleFeed
    neftune_alpha: float = 0.0

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self.feed.pack)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss in nats, {metric: (sum, targets)}); 0 for a batch without targets."""
        use_sample_keys(unwrap(model), batch)
        with self._noise(unwrap(model), batch):
            hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
        sums = unwrap(model).cross_entropy(hidden.flatten(0, 1), batch.targets.flatten())
        return sums.total, {"loss": (sums.cross_entropy, batch.weight)}

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss: nats a target of the held-out examples."""
        return self.feed.evaluate(model, self.feed.pack, self.loss, {"loss": "val_loss"}, everything)

    @contextlib.contextmanager
    def _noise(self, model: Any, batch: MicroBatch) -> Iterator[None]:
        """Inside, the embedding adds this batch's noise, if it is a training batch and noise is wanted."""
        if not self.neftune_alpha:
            yield
            return
        embedding = model.model.embed_tokens
        if not hasattr(embedding, "noise"):
            # for good: a compiled model does not notice hooks that come or go, but does notice an attribute
            embedding.noise = None
            embedding.register_forward_hook(_add_noise)
        if SAMPLE_KEY in batch.columns:
            noise = neftune_noise(batch, embedding.embedding_dim, self.neftune_alpha)
            embedding.noise = model.own_tokens(noise)
        try:
            yield
        finally:
            embedding.noise = None


def _add_noise(embedding: Any, _, output: Tensor) -> Tensor:
    return output if embedding.noise is None else output + embedding.noise.to(output.dtype)


def neftune_noise(batch: MicroBatch, hidden_size: int, alpha: float) -> Tensor:
    """(B, T, H) fp32, uniform in ±alpha/√(L·H) with L the length of the token's own sequence; 0 for padding.

    Jain et al. 2023, algorithm 1. Each number is a hash of the sequence's key, the position and the dimension, so it
    depends neither on the packing nor on the device, and no generator's state has to be saved.
    """
    lengths = sequence_sums(torch.ones_like(batch.input_ids, dtype=torch.float32), batch)
    bounds = torch.cat([alpha / (lengths * hidden_size).sqrt(), lengths.new_zeros(1)])
    keys = token_keys(batch)
    dimensions = torch.arange(1, hidden_size + 1, device=keys.device)
    bits = mix64(keys[..., None] + GOLDEN * dimensions) >> 40  # the upper 24: -2²³ … 2²³-1
    uniform = (bits + 0.5) / 2**23  # in ±1, symmetric about 0
    return uniform * bounds[batch.sequence_ids][..., None]
