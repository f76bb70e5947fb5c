"""What is learned from preferences? To make the chosen answer more probable than the rejected one, near a reference.

`DPO` learns from pairs, with any loss of preference_losses.PAIR_LOSSES; `KTO` from single answers marked desirable or
not. The reference is the model at the start of training: with LoRA the same weights with the adapters off, computed in
the same step; else its log-probabilities are computed once, before training, and travel beside the sequences.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from adapters.lora import LoraLinear, adapters_off
from batches.micro_batch import IGNORE_INDEX, MicroBatch
from batches.packing import Sequence, sequence_sums
from dataprep.progress import Progress
from errors import UserError
from finetune_data.encoding_examples import ENDS_SIDE
from ranks import Ranks, unwrap
from sharding import in_step
from stages import preference_losses
from stages.preference_losses import PAIR_LOSSES, WITHOUT_REFERENCE, Pairs
from training.examples_data import ExampleData, ExampleFeed, Group, Metrics, pack_examples, without_dropout
from training.metrics import Figures
from training.precision import Precision

REFERENCE = "reference_logprob"  # the column of a sequence: log π_ref of its targets

# ------------------------------------------------------------------------------------------------- the log-probabilities


def by_side(values: Tensor, batch: MicroBatch) -> Tensor:
    """(sequences,) summed to (sides,): the answers to a prompt of several turns may be several sequences (ENDS_SIDE)."""
    if ENDS_SIDE not in batch.columns:
        return values
    ends = batch.columns[ENDS_SIDE]
    side = (ends.cumsum(0) - ends).long()  # of each sequence
    return values.new_zeros(int(ends.sum().item())).index_add(0, side, values)


def sequence_logprobs(model: nn.Module, batch: MicroBatch) -> Tensor:
    """(sequences,) fp32: the sum of log p over each sequence's targets, in nats; 0 for one without. Differentiable."""
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
    logprobs = unwrap(model).token_statistics(hidden.flatten(0, 1), batch.targets.flatten()).logprobs
    return sequence_sums(logprobs.view_as(batch.targets), batch)


def reference_of(model: nn.Module, batch: MicroBatch) -> Tensor:
    """(sequences,) log-probabilities of the reference: the column that was precomputed, else of the adapters' base."""
    if REFERENCE in batch.columns:
        return batch.columns[REFERENCE]
    inner = unwrap(model)
    if not any(isinstance(module, LoraLinear) for module in inner.modules()):
        raise ValueError("there is no reference: the model has no adapters and precompute_reference was not called")
    with torch.no_grad(), adapters_off(inner), without_dropout(inner):
        return sequence_logprobs(inner, batch)


def reference_logprobs(
    model: nn.Module, data: ExampleData, *,
    max_length: int, micro_batch_size: int, ranks: Ranks, precision: Precision,
) -> np.ndarray:  # fmt: skip
    """(sequences,) float32 log-probabilities of all sequences of all examples, in order, under the model as it is.

    Every rank calls it, computes its part and gets the whole. On a terminal the first one shows how far it is.
    """
    inner, sizes = unwrap(model), [len(group) for group in data.groups]
    part = ranks.part(len(sizes))
    found = np.zeros(sum(sizes))
    place = first = sum(sizes[: part.start])
    progress, started, share = Progress(), time.monotonic(), sum(sizes[part])
    own = pack_examples(data.groups[part], max_length, micro_batch_size)
    with torch.no_grad(), without_dropout(inner), precision.autocast(ranks.device):
        for batch, counts in in_step(own, inner, ranks, lambda: pack_examples(data.groups[:1], max_length, 1)[0]):
            logprobs = sequence_logprobs(inner, batch.to(ranks.device)).float().cpu().numpy()
            if not counts:
                continue
            found[place : place + len(logprobs)] = logprobs
            place += len(logprobs)
            if ranks.is_main:
                progress.show("reference", place - first, share, started, "sequences")
    progress.clear()
    return np.array(ranks.sum(found.tolist()), dtype=np.float32)


def with_reference(data: ExampleData, logprobs: np.ndarray) -> ExampleData:
    """The same examples, each sequence with its log-probability under the reference, as `reference_logprobs` gives them."""
    values = iter(logprobs.tolist())
    groups = [
        [replace(sequence, columns={**sequence.columns, REFERENCE: next(values)}) for sequence in group]
        for group in data.groups
    ]
    return replace(data, groups=groups)


# ----------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation on groups [chosen, rejected], whose targets are the answers' tokens.

    A side of several sequences counts as one, whose log-probability is their sum.

    loss_name: one of PAIR_LOSSES; beta, label_smoothing (sigmoid's alone) and gamma (simpo's alone) are explained there.
    """

    feed: ExampleFeed
    loss_name: str
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self._micro_batches)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss, {metric: (sum, pairs)}). A pair in which an answer has no token counts nothing."""
        with without_dropout(unwrap(model)):
            logprobs = by_side(sequence_logprobs(model, batch), batch)
            reference = None if self.loss_name in WITHOUT_REFERENCE else by_side(reference_of(model, batch), batch)
        lengths = by_side(_answer_lengths(batch), batch)
        real = (lengths[0::2] > 0) & (lengths[1::2] > 0)
        # where a pair is not real, constants: the gradient stops there, whatever the loss makes of them
        columns = [logprobs, lengths] + ([] if reference is None else [reference])
        pairs = Pairs(*(torch.where(real, column[side::2], 1.0) for column in columns for side in (0, 1)))
        losses = torch.where(real, self._losses(pairs), 0.0)

        chosen, rejected = (side.detach() for side in self._rewards(pairs))
        figures = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
        return losses.sum(), {
            name: (torch.where(real, value, 0.0).sum().detach(), batch.weight) for name, value in figures.items()
        }

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss a pair, and val_accuracy: how often the chosen answer has the higher reward."""
        names = {"loss": "val_loss", "rewards/accuracies": "val_accuracy"}
        return self.feed.evaluate(model, self._micro_batches, self.loss, names, everything)

    def _micro_batches(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        return [replace(batch, weight=_real_groups(batch, 2)) for batch in self.feed.pack(groups)]

    def _losses(self, pairs: Pairs) -> Tensor:
        match self.loss_name:
            case "sigmoid":
                return preference_losses.sigmoid(pairs, beta=self.beta, label_smoothing=self.label_smoothing)
            case "ipo":
                return preference_losses.ipo(pairs, beta=self.beta)
            case "hinge":
                return preference_losses.hinge(pairs, beta=self.beta)
            case "simpo":
                return preference_losses.simpo(pairs, beta=self.beta, gamma=self.gamma)
            case "orpo":
                return preference_losses.orpo(pairs, beta=self.beta)
        raise ValueError(f"there is no loss {self.loss_name!r} of pairs; choose from {', '.join(PAIR_LOSSES)}")

    def _rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What the loss takes for the rewards of both answers: β log-ratios, or without a reference β log-probs a token."""
        if self.loss_name in WITHOUT_REFERENCE:
            return self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean
        return self.beta * pairs.chosen_ratio, self.beta * pairs.rejected_ratio


def _answer_lengths(batch: MicroBatch) -> Tensor:
    """(sequences,) fp32: how many targets each sequence has."""
    return sequence_sums((batch.targets != IGNORE_INDEX).float(), batch)


def _real_groups(batch: MicroBatch, size: int) -> int:
    """How many groups of `size` sides have a target in each of them."""
    return int((by_side(_answer_lengths(batch), batch) > 0).view(-1, size).all(1).sum())


# --------------------------------------------------------------------------------------------------------- single answers


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation on groups [answer, mismatched answer], which `with_mismatches` makes.

    Each sequence has the column "label": 1 for a desirable answer, 0 for another. The KL of a step is estimated on the
    mismatched ones of all its ranks and micro-batches, with the weights that the step starts from: `model` is what is
    trained.
    """

    feed: ExampleFeed
    model: nn.Module
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        return self.feed.batches(first_sample, self._micro_batches)

    def epoch(self, first_sample: int) -> float:
        return self.feed.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss, {metric: (sum, weight)}): examples weigh, and for figures of one kind of answer those of its kind."""
        with without_dropout(unwrap(model)):
            logprobs = sequence_logprobs(model, batch)
            reference = reference_of(model, batch)
        real, kl = (_answer_lengths(batch) > 0).float(), batch.columns["kl"]
        desirable = batch.columns["label"]
        losses = real * preference_losses.kto(
            logprobs, reference, desirable, kl,
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
        )  # fmt: skip
        metrics: Metrics = {"loss": (losses.sum().detach(), batch.weight), "kl": ((real * kl).sum(), batch.weight)}
        for kind, mask in (("chosen", real * desirable), ("rejected", real * (1 - desirable))):
            rewards = self.beta * (logprobs - reference).detach()
            metrics[f"rewards/{kind}"] = ((mask * rewards).sum(), mask.sum())
            metrics[f"logps/{kind}"] = ((mask * logprobs.detach()).sum(), mask.sum())
        return losses.sum(), metrics

    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """val_loss an example, with the KL of the held-out examples, which is val_kl."""
        return self.feed.evaluate(
            model, self._micro_batches, self.loss, {"loss": "val_loss", "kl": "val_kl"}, everything
        )

    def _micro_batches(self, groups: SequenceOf[Group]) -> list[MicroBatch]:
        kl = self._kl([[mismatch] for _, mismatch in groups])
        batches = self.feed.pack([[answer] for answer, _ in groups])
        return [
            replace(
                batch,
                weight=_real_groups(batch, 1),
                columns={**batch.columns, "kl": torch.full((batch.num_sequences,), kl)},
            )
            for batch in batches
        ]

    @torch.no_grad()
    def _kl(self, mismatches: list[Group]) -> float:
        """Over all ranks, so each must call it."""
        inner, feed = unwrap(self.model), self.feed
        any_mismatch = feed.data.groups[0][1]
        total, count = 0.0, 0
        with without_dropout(inner):
            for batch, counts in in_step(
                feed.pack(mismatches), inner, feed.ranks, lambda: feed.pack([[any_mismatch]])[0]
            ):
                batch = batch.to(feed.ranks.device)
                with feed.precision.autocast(feed.ranks.device):
                    ratios = sequence_logprobs(inner, batch) - reference_of(inner, batch)
                if not counts:
                    continue
                total += ratios.double().sum().item()
                count += len(ratios)
        return preference_losses.kl_estimate(*feed.ranks.sum([total, count]))


def with_mismatches(groups: SequenceOf[Group], max_length: int) -> list[list[Sequence]]:
    """[answer] -> [answer, its prompt with the answer of the next example that has another prompt], for KTO's KL.

    The prompt is what comes before the first target; the pairing does not depend on the order of training, so the
    reference of both can be precomputed. Cut to max_length. Raises UserError where all prompts are the same.
    """
    sequences = [sequence for (sequence,) in groups]
    starts = [1 + int(np.argmax(sequence.learned[1:])) for sequence in sequences]
    prompts = [sequence.tokens[:start].tobytes() for sequence, start in zip(sequences, starts, strict=True)]
    if len(set(prompts)) < 2:
        raise UserError("every example has the same prompt, and kto compares with answers to others; use another loss")
    count = len(sequences)
    other = [0] * count
    for number in reversed(range(2 * count)):  # twice around, so that the last examples know the first ones
        here, after = number % count, (number + 1) % count
        other[here] = after if prompts[after] != prompts[here] else other[after]
    pairs = []
    for number, sequence in enumerate(sequences):
        answer, start = sequences[other[number]], starts[other[number]]
        tokens = np.concatenate([sequence.tokens[: starts[number]], answer.tokens[start:]])[:max_length]
        learned = np.concatenate([np.zeros(starts[number], bool), answer.learned[start:]])[:max_length]
        pairs.append([sequence, Sequence(tokens, learned, columns=sequence.columns)])
    return pairs
