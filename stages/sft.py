"""What is learned in supervised fine-tuning? The next token of examples, where the example says that it is to be learned.

Whose tokens are targets, the assistant's or all, is decided where examples become tokens, and stands in
`Sequence.learned`; the end of a turn is among them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy
from training.batches import IGNORE_INDEX, MicroBatch
from training.examples_data import ExampleFeed, Metrics
from training.packing import sequence_sums
from training.parallel import unwrap
from training.sampler import hash_key

_NOISE_KEY = "noise_key"  # the column of a sequence that is trained with noise


@dataclass(frozen=True)
class SFT:
    """Next-token prediction on groups of one sequence each.

    neftune_alpha: above 0, embeddings of training examples get noise (NEFTune, Jain et al. 2023; 5 is usual).
    """

    feed: ExampleFeed
    neftune_alpha: float = 0.0

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        while True:
            batches = self.feed.pack(self.feed.groups(first_sample))
            if self.neftune_alpha:
                batches = list(self._with_noise_keys(batches, self.feed.samples(first_sample)))
            yield batches
            first_sample += self.feed.batch_size

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss in nats, {metric: (sum, targets)}); 0 for a batch without targets."""
        with self._noise(unwrap(model), batch):
            hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
        sums = linear_cross_entropy(
            hidden.flatten(0, 1),  # (B·T, H)
            unwrap(model).head_weight,
            batch.targets.flatten(),
            ignore_index=IGNORE_INDEX,
            implementation=unwrap(model).kernels.linear_cross_entropy,
        )
        return sums.total, {"loss": (sums.cross_entropy, batch.weight)}

    def evaluate(self, model: nn.Module, everything: bool) -> dict[str, float]:
        """val_loss: nats a target of the held-out examples."""
        return self.feed.evaluate(model, self.feed.pack, self.loss, {"loss": "val_loss"}, everything)

    def _with_noise_keys(self, batches: list[MicroBatch], samples: range) -> Iterator[MicroBatch]:
        """Each sequence with a key made of its sample number: the noise is the same wherever and whenever it is trained."""
        keys = iter(hash_key(self.feed.data.seed, sample) >> 1 for sample in samples)  # 63 bits fit int64
        for batch in batches:
            column = torch.tensor([next(keys) for _ in batch.last_tokens], dtype=torch.int64)
            yield replace(batch, columns={**batch.columns, _NOISE_KEY: column})

    @contextlib.contextmanager
    def _noise(self, model: nn.Module, batch: MicroBatch) -> Iterator[None]:
        """Inside, the embedding adds this batch's noise, if it is a training batch and noise is wanted."""
        if not self.neftune_alpha:
            yield
            return
        embedding = model.model["embed_tokens"]
        if not hasattr(embedding, "noise"):
            # for good: a compiled model does not notice hooks that come or go, but does notice an attribute
            embedding.noise = None
            embedding.register_forward_hook(_add_noise)
        if _NOISE_KEY in batch.columns:
            embedding.noise = neftune_noise(batch, embedding.embedding_dim, self.neftune_alpha)
        try:
            yield
        finally:
            embedding.noise = None


def _add_noise(embedding: nn.Module, _, output: Tensor) -> Tensor:
    return output if embedding.noise is None else output + embedding.noise.to(output.dtype)


def neftune_noise(batch: MicroBatch, hidden_size: int, alpha: float) -> Tensor:
    """(B, T, H) fp32, uniform in ±alpha/√(L·H) with L the length of the token's own sequence; 0 for padding.

    Jain et al. 2023, algorithm 1. Each number is a hash of the sequence's key, the position and the dimension, so it
    depends neither on the packing nor on the device, and no generator's state has to be saved.
    """
    keys = torch.cat([batch.columns[_NOISE_KEY], batch.columns[_NOISE_KEY].new_zeros(1)])  # one more for the padding
    lengths = sequence_sums(torch.ones_like(batch.input_ids, dtype=torch.float32), batch)
    bounds = torch.cat([alpha / (lengths * hidden_size).sqrt(), lengths.new_zeros(1)])
    token_keys = _mix(keys[batch.sequence_ids] + _GOLDEN * (batch.positions + 1))  # (B, T)
    dimensions = torch.arange(1, hidden_size + 1, device=token_keys.device)
    bits = _mix(token_keys[..., None] + _GOLDEN * dimensions) >> 40  # the upper 24: -2²³ … 2²³-1
    uniform = (bits + 0.5) / 2**23  # in ±1, symmetric about 0
    return uniform * bounds[batch.sequence_ids][..., None]


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment (Steele et al. 2014), as int64, whose sums wrap around
_MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose shift must be kept from copying the sign."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return x ^ ((x >> 31) & (2**33 - 1))
