"""In which order are examples learned from, and how are they shared among ranks and micro-batches?

Sample t of a run is one example: a group of sequences that stay together (one of SFT, a chosen and a rejected one of a
preference). Step s takes the samples [first, first + batch_size), a rank its contiguous part of them, packed into
micro-batches (batches/packing.py). As in pretraining a run's position is one integer, and ranks and micro-batches only divide.
"""

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adapters.lora import set_token_keys
from batches.micro_batch import MicroBatch
from batches.packing import Sequence, pack
from batches.sampler import SAMPLER_VERSION, hash_key, locate
from kernels.dropout import GOLDEN, mix64
from ranks import Ranks, unwrap
from sharding import in_step, is_sharded
from training.metrics import Figures, Metrics, mean
from training.precision import Precision

SAMPLE_KEY = "sample_key"  # the column of a sequence that is trained on
Group = SequenceOf[Sequence]


@dataclass(frozen=True)
class ExampleData:
    """groups: the sequences of each example, all with the same columns. seed: of the order.

    sampler: the version of batches/sampler.py that the run began with.
    """

    groups: SequenceOf[Group]
    seed: int
    sampler: int = SAMPLER_VERSION

    def numbers(self, first: int, count: int) -> list[int]:
        """The example of each of the samples first … first+count-1: every example once an epoch, in a new order."""
        return locate(
            first, count, num_windows=[len(self.groups)], weights=[1.0], seed=self.seed, version=self.sampler
        ).window.tolist()  # fmt: skip

    def documents(self, first: int, count: int) -> list[str]:
        """Which examples these samples are: by file and row where shards know them, else by their number, from 1."""
        source = getattr(self.groups, "source", lambda number: f"example {number + 1}")
        return list(dict.fromkeys(source(number) for number in self.numbers(first, count)))

    def epoch(self, first: int) -> float:
        """How many times the examples have been seen after `first` samples, as a fraction."""
        return first / len(self.groups)


@dataclass(frozen=True)
class ExampleFeed:
    """What every stage that learns from examples needs to make micro-batches of them and to evaluate on the held-out ones.

    validation: None where there is none. batch_size: examples a step, over all ranks. micro_batch_size: examples of
    max_length for which a micro-batch has room; shorter ones are packed, so it usually holds more. eval_tokens: an
    evaluation reads the first examples of `validation` until it has as many tokens; 0 reads all.
    """

    data: ExampleData
    validation: ExampleData | None
    ranks: Ranks
    precision: Precision
    batch_size: int
    micro_batch_size: int
    max_length: int
    eval_tokens: int

    def samples(self, first: int) -> range:
        """This rank's part of the step whose samples are first … first+batch_size-1."""
        return range(first, first + self.batch_size)[self.ranks.part(self.batch_size)]

    def groups(self, first: int) -> list[Group]:
        """The examples of `samples(first)`."""
        samples = self.samples(first)
        return [self.data.groups[number] for number in self.data.numbers(samples.start, len(samples))]

    def batches(
        self, first: int, micro_batches: Callable[[list[Group]], list[MicroBatch]]
    ) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first` on, without end: what `micro_batches` makes of its examples.

        Every sequence has the column SAMPLE_KEY, which decides on all that is random in how it is trained on.
        """
        while True:
            groups = self.groups(first)
            keys = iter(self._sample_keys(groups, self.samples(first)))
            for_step = []
            for batch in micro_batches(groups):
                column = torch.tensor([next(keys) for _ in range(batch.num_sequences)], dtype=torch.int64)
                for_step.append(replace(batch, columns={**batch.columns, SAMPLE_KEY: column}))
            yield for_step
            first += self.batch_size

    def _sample_keys(self, groups: list[Group], samples: range) -> Iterator[int]:
        """One for each sequence, in their order; 63 bits, which fit int64."""
        for sample, group in zip(samples, groups, strict=True):
            for place in range(len(group)):
                yield hash_key(self.data.seed, sample, *([place] if place else [])) >> 1

    def pack(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        """Micro-batches that hold every sequence once, in order."""
        return pack_examples(groups, self.max_length, self.micro_batch_size)

    def idle(self) -> MicroBatch:
        """The first held-out example, for ranks that have none of their own."""
        assert self.validation is not None
        return self.pack(self.validation.groups[:1])[0]

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        micro_batches: Callable[[list[Group]], list[MicroBatch]],
        loss: Callable[[nn.Module, MicroBatch], tuple[Tensor, Metrics]],
        names: dict[str, str],
        everything: bool,
    ) -> Figures:
        """Means over the held-out examples, each once, in order and split over the ranks; {} where there are none.

        names: {metric of `loss`: name of the figure}. With `everything`, where eval_tokens leaves examples out, the
        figures of all of them are added under `_all`. Dropout is off.
        """
        if self.validation is None:
            return {}
        inner, groups = unwrap(model), self.validation.groups
        some = _count_for_tokens(groups, self.eval_tokens) if self.eval_tokens else len(groups)
        with without_dropout(inner):
            figures = self._means(inner, groups[:some], micro_batches, loss, names)
            if everything and some < len(groups):
                whole = self._means(inner, groups, micro_batches, loss, names)
                figures |= {f"{name}_all": value for name, value in whole.items()}
        return figures

    def _means(self, model, groups, micro_batches, loss, names) -> Figures:
        sums = {metric: [0.0, 0.0] for metric in names}
        own = micro_batches(groups[self.ranks.part(len(groups))])
        few = len(groups) < self.ranks.world_size and is_sharded(model)
        spare = micro_batches(groups[:1]) if few else []  # by every rank, as KTO's are made by all together
        for batch, counts in in_step(own, model, self.ranks, lambda: spare[0]):
            with self.precision.autocast(self.ranks.device):
                _, metrics = loss(model, batch.to(self.ranks.device))
            for metric in names if counts else ():
                sums[metric] = [before + float(new) for before, new in zip(sums[metric], metrics[metric], strict=True)]
        flat = iter(self.ranks.sum([part for metric in names for part in sums[metric]]))
        return {name: mean(next(flat), next(flat)) for name in names.values()}


def pack_examples(groups: SequenceOf[Group], max_length: int, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches with room for `micro_batch_size` examples whose sequences all are max_length long."""
    if not groups:
        return []
    return pack(groups, max_length=max_length, micro_batch_size=micro_batch_size * max(map(len, groups)))


def token_keys(batch: MicroBatch) -> Tensor:
    """(B, T) int64: a key for each token, of its sequence's sample and its position in it."""
    keys = torch.cat([batch.columns[SAMPLE_KEY], batch.columns[SAMPLE_KEY].new_zeros(1)])  # one more for the padding
    return mix64(keys[batch.sequence_ids] + GOLDEN * (batch.positions + 1))


def use_sample_keys(model: nn.Module, batch: MicroBatch) -> None:
    """Let dropout in the next forward pass follow the samples of a training batch."""
    if SAMPLE_KEY in batch.columns:
        set_token_keys(model, token_keys(batch))


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes the same each time: it is in evaluation mode."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _count_for_tokens(groups: SequenceOf[Group], max_tokens: int) -> int:
    """How many of the first examples it takes to reach `max_tokens` tokens."""
    total = 0
    for number, group in enumerate(groups):
        total += sum(len(sequence.tokens) for sequence in group)
        if total >= max_tokens:
            return number + 1
    return len(groups)
