"""What is learned in pretraining? The next token of packed documents.

A stage is what changes from pretraining to reinforcement learning, and nothing else; train.py's loop calls its three
methods. `loss` returns a sum, never a mean: the loop divides once, by the weight of all micro-batches and ranks.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adapters.lora import set_token_keys
from batches.masking import token_keys
from batches.micro_batch import IGNORE_INDEX, MicroBatch
from batches.sampler import hash_key
from batches.windows import BYTES, TrainingData, Windows, evaluation_micro_batches
from dataprep.token_bytes import TokenBytes
from experts import Routing, balancing_losses, expert_figures, z_losses
from ranks import Ranks, unwrap
from sharding import in_step
from training.examples_data import SAMPLE_KEY, without_dropout
from training.metrics import Figures, Metrics, mean
from training.precision import Precision


@dataclass(frozen=True)
class Pretrain:
    """Next-token prediction on the windows of `data`; `validation` is read in order at each evaluation.

    token_bytes: what each token of its split stands for. balance_weight, router_z_weight: of the two losses of a mixture
    of experts (experts.py), which each row adds by its number of targets.
    """

    data: TrainingData
    validation: Windows
    token_bytes: TokenBytes
    ranks: Ranks
    precision: Precision
    batch_size: int
    micro_batch_size: int
    eval_tokens: int
    z_loss: float
    balance_weight: float = 0.0
    router_z_weight: float = 0.0

    def batches(self, first_sample: int) -> Iterator[list[MicroBatch]]:
        """For each optimizer step from sample `first_sample` on, without end: this rank's micro-batches."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        while True:
            batches = self.data.micro_batches(first_sample, self.batch_size, self.micro_batch_size, rank, world_size)
            yield with_row_keys(batches, self.data.seed, first_sample + self.batch_size * rank // world_size)
            first_sample += self.batch_size

    def epoch(self, first_sample: int) -> float:
        """How many times the first source has been seen after that many samples, as a fraction."""
        return self.data.epoch(first_sample)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """(summed loss in nats to differentiate, {metric: (sum, weight)} to report); `batch.weight` is its weight."""
        inner = unwrap(model)
        use_row_keys(inner, batch)
        given = {"max_seqlen": batch.input_ids.shape[1], "with_routing": inner.config.num_experts is not None}
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, **given)
        hidden, routing = hidden if given["with_routing"] else (hidden, None)
        sums = inner.cross_entropy(hidden.flatten(0, 1), batch.targets.flatten(), self.z_loss)
        metrics: Metrics = {"loss": (sums.cross_entropy, batch.weight)}
        if routing is None:
            return sums.total, metrics
        added, of_experts = self._router_losses(routing, inner.config.experts_per_token, batch)
        return sums.total + added, metrics | of_experts

    def _router_losses(self, routing: list[Routing], per_token: int, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """What the routers add to the summed loss, and their metrics: of each row by the number of its targets."""
        weights = (batch.targets != IGNORE_INDEX).sum(1).float()  # (B,)
        balance, z = balancing_losses(routing, per_token), z_losses(routing, per_token)
        figures = {"balance": balance, "router_z": z, **expert_figures(routing)}
        added = (weights * (self.balance_weight * balance + self.router_z_weight * z)).sum()
        return added, {name: ((weights * each).sum().detach(), batch.weight) for name, each in figures.items()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, everything: bool) -> Figures:
        """Validation loss (nats per token) and bits per byte over all ranks, on the first `eval_tokens` of the split.

        Bits per byte counts the loss of every target, end-of-text tokens too, over the bytes of the same targets. With
        `everything`, and a split larger than eval_tokens, the figures of the whole split are added under `_all`. {} for
        an empty split.
        """
        if self.validation.split.num_tokens < 2:
            return {}
        with without_dropout(unwrap(model)):
            figures = self._evaluate(model, self.eval_tokens)
            if everything and 0 < self.eval_tokens < self.validation.split.num_tokens - 1:
                figures |= {f"{name}_all": value for name, value in self._evaluate(model, 0).items()}
        return figures

    def _evaluate(self, model: nn.Module, max_tokens: int) -> Figures:
        inner, device = unwrap(model), self.ranks.device
        loss = torch.zeros((), dtype=torch.float64, device="cpu")
        weight = num_bytes = 0.0
        ranks = self.ranks

        def batches(rank: int, world_size: int) -> Iterator[MicroBatch]:
            part = self.micro_batch_size, max_tokens, rank, world_size
            return evaluation_micro_batches(self.validation, *part, self.token_bytes)

        own = batches(ranks.rank, ranks.world_size)
        for batch, counts in in_step(own, inner, ranks, idle=lambda: next(batches(0, 1))):
            with self.precision.autocast(device):
                _, metrics = self.loss(inner, batch.to(device))
            if not counts:
                continue
            weight += batch.weight
            num_bytes += batch.token_columns[BYTES][batch.targets != IGNORE_INDEX].double().sum().item()
            loss += metrics["loss"][0].double().cpu()
        loss_sum, weight, num_bytes = ranks.sum([loss.item(), weight, num_bytes])
        return {"val_loss": mean(loss_sum, weight), "val_bpb": mean(loss_sum / math.log(2), num_bytes)}


def with_row_keys(batches: list[MicroBatch], seed: int, first: int) -> list[MicroBatch]:
    """The micro-batches of samples from `first` on, a row each, with the column SAMPLE_KEY: it decides on all that is random."""
    samples = itertools.count(first)
    keyed = []
    for batch in batches:
        keys = torch.tensor([hash_key(seed, next(samples)) >> 1 for _ in batch.input_ids], dtype=torch.int64)
        keyed.append(replace(batch, columns={**batch.columns, SAMPLE_KEY: keys}))
    return keyed


def use_row_keys(model: nn.Module, batch: MicroBatch) -> None:
    """Let dropout in the next forward pass follow the samples of a training batch."""
    if SAMPLE_KEY in batch.columns:
        set_token_keys(model, token_keys(batch.columns[SAMPLE_KEY], batch.input_ids.shape[1]))
