"""How does a policy write the texts that it then learns from, and in which steps does it learn from them?

A rollout is a prompt and the answer drawn for it. It is a pure function of the weights, the prompt and one seed: each
answer has its own stream of random numbers (SplitMix64, counted from the seed), so neither the batch it is drawn in nor
the number of ranks changes it. Nothing is cut from the distribution (no top-k, no top-p): the log-probabilities of the
loss are those it was drawn with.

Prompts of different lengths share a batch without padding: all rows start at position 0 of the cache, the prompts' common
length goes through the model at once, then one token a step, taken from the prompt where it lasts and drawn where it has
ended. Prompts are sorted by length first. A batch costs max_new_tokens + (longest - shortest prompt) passes of one token.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from batches.micro_batch import MicroBatch
from batches.packing import Sequence, pack
from batches.sampler import SAMPLER_VERSION, hash_key, locate, permute, splitmix64
from errors import UserError
from kernels.linear_cross_entropy import TokenStatistics
from model import KVCache, Transformer
from ranks import Ranks, move_on

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
_ROLLOUT_KEY, _ORDER_KEY = 10, 11  # what a key is for, so that no two uses share random numbers


@dataclass(frozen=True)
class Prompt:
    """tokens (n,) int64, the answer's first token comes next; text and columns are what reward functions are given."""

    tokens: np.ndarray
    text: str
    columns: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """tokens (n,) int64: the prompt, and the response with the stop token it ended in.

    prompt_length: tokens of the prompt. finished: it drew a stop id, rather than being cut off at max_new_tokens.
    logprobs (n - prompt_length,) float32: log softmax(logits / temperature) of the drawn tokens, as they were drawn.
    """

    tokens: np.ndarray
    prompt_length: int
    finished: bool
    logprobs: np.ndarray

    @property
    def response(self) -> np.ndarray:
        return self.tokens[self.prompt_length :]

    @property
    def is_response(self) -> np.ndarray:
        """(n,) bool."""
        return np.arange(len(self.tokens)) >= self.prompt_length


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. batch_size: how many at a time; vocab_size: ids from there on are never drawn."""

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    vocab_size: int
    batch_size: int


# ------------------------------------------------------------------------------------------------------------- drawing


def roll_out(
    model: Transformer, prompts: SequenceOf[np.ndarray], seeds: SequenceOf[int], sampling: Sampling
) -> list[Rollout]:
    """An answer to each prompt (n,) int64, n >= 1, drawn from its own seed (64 bits), in the order of the prompts.

    Rounding aside (a product of matrices may round differently with the number of its rows), a row is what it is alone.
    A row that has finished keeps its slot until its batch is done. The model is put into evaluation mode meanwhile.
    ValueError for a temperature that is not above 0, an empty prompt, or one that leaves no room in the model's context.
    """
    if not sampling.temperature > 0:
        raise ValueError(f"rollouts are drawn at a temperature above 0, not {sampling.temperature}")
    context = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) <= context - sampling.max_new_tokens:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones, context {context}"
            )
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rollouts: dict[int, Rollout] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), sampling.batch_size):
            chosen = by_length[start : start + sampling.batch_size]
            rows = _roll_out_batch(model, [prompts[i] for i in chosen], [seeds[i] for i in chosen], sampling)
            rollouts |= dict(zip(chosen, rows, strict=True))
    finally:
        model.train(was_training)
    return [rollouts[index] for index in range(len(prompts))]


@torch.inference_mode()
def _roll_out_batch(
    model: Transformer, prompts: list[np.ndarray], seeds: list[int], sampling: Sampling
) -> list[Rollout]:
    device = model.head_weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
    rows, count = len(prompts), sampling.max_new_tokens
    sizes = np.array([len(prompt) for prompt in prompts])
    longest, total = int(sizes.max()), int(sizes.max()) + count
    given = np.zeros((rows, total), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = prompt
    tokens = torch.from_numpy(given).to(device)
    logprobs = torch.zeros(rows, total, device=device)
    lengths = torch.from_numpy(sizes).to(device)
    random = torch.from_numpy(uniform(seeds, count)).to(device, _sum_dtype(device))  # (rows, count)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
    drawn = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of each response
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    cache = KVCache(model.config, rows, total, device=device, dtype=dtype)
    step_ids = tokens[:, : int(sizes.min())]
    for position in range(int(sizes.min()), total):
        move_on()
        # forward, not a call: a model compiled in place would compile anew for every length
        hidden = model.forward(step_ids, cache=cache)
        logits = model.logits(hidden[:, -1])[:, : sampling.vocab_size]  # (rows, V) fp32
        statistics = (logits / sampling.temperature).log_softmax(-1)
        place = position - lengths  # in the response; below 0 the prompt still lasts
        chosen = draw(statistics, random.gather(1, place.clamp(0, count - 1)[:, None])[:, 0])
        writes = (place >= 0) & (place < count) & ~finished
        tokens[:, position] = torch.where(writes, chosen, tokens[:, position])
        logprobs[:, position] = statistics.gather(1, chosen[:, None])[:, 0]
        drawn += writes
        finished |= writes & torch.isin(chosen, stops)
        if position >= longest and (finished | (drawn == count)).all():
            break
        step_ids = tokens[:, position : position + 1]
    texts, drawn_logprobs = tokens.cpu().numpy(), logprobs.cpu().numpy()
    return [
        Rollout(texts[row, :end].copy(), int(size), bool(ended), drawn_logprobs[row, size:end].copy())
        for row, (size, end, ended) in enumerate(
            zip(sizes, sizes + drawn.cpu().numpy(), finished.tolist(), strict=True)
        )
    ]


def uniform(seeds: SequenceOf[int], count: int) -> np.ndarray:
    """(len(seeds), count) float64 in [0, 1): the first outputs of each seed's SplitMix64 (Steele et al. 2014).

    52 bits each, not 53, so that u · total never rounds up to total.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = splitmix64(np.array(seeds, dtype=np.uint64)[:, None] + steps)
    return (bits >> np.uint64(12)) * 2.0**-52


def draw(logprobs: Tensor, random: Tensor) -> Tensor:
    """(rows,) int64: the token at which each row's cumulated probability passes its random number (rows,) in [0, 1).

    logprobs (rows, V). A token of probability zero is never drawn.
    """
    cumulated = logprobs.to(_sum_dtype(logprobs.device)).exp().cumsum(-1)
    passed = cumulated <= (random.to(cumulated.dtype) * cumulated[:, -1])[:, None]
    return passed.sum(-1).clamp(max=logprobs.shape[-1] - 1)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64


# ------------------------------------------------------------------------------------------ what a model says of a text


def response_statistics(
    hidden: Tensor, policy: Transformer, targets: Tensor, *, temperature: float, vocab_size: int
) -> TokenStatistics:
    """Of each target its log-probability and the entropy, (B, T) fp32, under softmax(logits / temperature).

    hidden (B, T, H), targets (B, T). Over the ids that can be drawn only: the vocabulary's padding has no probability.
    """
    statistics = policy.token_statistics(
        hidden.flatten(0, 1), targets.flatten(), temperature=temperature, vocab_size=vocab_size
    )
    return TokenStatistics(*(figure.view(targets.shape) for figure in statistics))


@torch.no_grad()
def figures_of(
    sequences: SequenceOf[Sequence],
    function: Callable[[MicroBatch], dict[str, Tensor]],
    *,
    device: torch.device,
    max_length: int,
    micro_batch_size: int,
) -> list[dict[str, np.ndarray]]:
    """What `function` says of each token of each sequence: {name: (n,) float32}, ready to be its token_columns.

    The function takes a packed micro-batch and gives (B, T) figures of the targets, at the places of `targets`.
    """
    results: list[dict[str, np.ndarray]] = []
    for batch in pack([[s] for s in sequences], max_length=max_length, micro_batch_size=micro_batch_size):
        move_on()
        figures = {name: value.float().cpu().numpy() for name, value in function(batch.to(device)).items()}
        assert batch.sequence_ids is not None
        sequence_ids = batch.sequence_ids.numpy()
        for number in range(batch.num_sequences):
            at = sequence_ids == number
            # the figure beside a token is that of the next one; the first token has none
            results.append(
                {name: np.concatenate([[0], value[at][:-1]], dtype=np.float32) for name, value in figures.items()}
            )
    return results


# --------------------------------------------------------------------------------------- which prompts, which steps, who


@dataclass(frozen=True)
class RolloutSchedule:
    """Which prompts are answered when, and in which optimizer steps the answers are learned from.

    A rollout phase answers batch_size · minibatches prompts with the weights of that moment. Then come epochs ·
    minibatches optimizer steps, each on the answers to batch_size of these prompts; every epoch deals them anew. A run's
    position advances by batch_size a step, so a prompt is passed after `epochs` samples. It is exactly resumable where a
    phase begins: at steps that are multiples of `steps_per_phase`. In between, the phase's remaining steps learn from
    answers that are drawn anew.
    """

    batch_size: int
    minibatches: int
    epochs: int
    seed: int
    sampler: int = SAMPLER_VERSION  # the version of batches/sampler.py that the run began with

    @property
    def steps_per_phase(self) -> int:
        return self.epochs * self.minibatches

    @property
    def prompts_per_phase(self) -> int:
        return self.batch_size * self.minibatches

    def locate(self, first_sample: int) -> tuple[int, int]:
        """(the rollout phase, the step within it) at which sample `first_sample` is learned."""
        return divmod(first_sample // self.batch_size, self.steps_per_phase)

    def prompt_numbers(self, phase: int, num_prompts: int) -> np.ndarray:
        """(prompts_per_phase,) which prompts a phase answers: a permutation of all prompts in each pass over them."""
        first = phase * self.prompts_per_phase
        return locate(
            first, self.prompts_per_phase, num_windows=[num_prompts], weights=[1.0], seed=self.seed, version=self.sampler
        ).window  # fmt: skip

    def seeds(self, phase: int, answers: int) -> list[int]:
        """A seed for each of the `answers` answers to each prompt of a phase, a prompt's answers side by side."""
        first = phase * self.prompts_per_phase
        numbers = range(first, first + self.prompts_per_phase)
        return [hash_key(self.seed, _ROLLOUT_KEY, number, answer) for number in numbers for answer in range(answers)]

    def members(self, phase: int, step: int) -> np.ndarray:
        """(batch_size,) places, in the phase's order of prompts, that step number `step` of the phase learns from."""
        epoch, minibatch = divmod(step, self.minibatches)
        size = self.prompts_per_phase
        order = permute(np.arange(size), size, hash_key(self.seed, _ORDER_KEY, phase, epoch), self.sampler)
        return order[minibatch * self.batch_size : (minibatch + 1) * self.batch_size]


def gather_parts(part: list, ranks: Ranks) -> list:
    """The parts of all ranks, one after another, on every rank. The things are pickled: keep tensors out of them."""
    if ranks.world_size == 1:
        return part
    parts: list[list] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(parts, part)
    return [thing for one in parts for thing in one]


def own_micro_batches(
    sequences: SequenceOf[Sequence], ranks: Ranks, *, max_length: int, micro_batch_size: int
) -> list[MicroBatch]:
    """This rank's part of a step's sequences, packed; those without a target are left out.

    A rank without any gets one sequence of which nothing is learned: it must go through the model as the others do.
    """
    taught = [sequence for sequence in sequences if sequence.num_targets]
    own = taught[ranks.part(len(taught))]
    if not own:
        own = [replace(sequences[0], learned=np.zeros_like(sequences[0].learned))]
    return pack([[sequence] for sequence in own], max_length=max_length, micro_batch_size=micro_batch_size)


def check_prompts(prompts: SequenceOf[Prompt], policy: Transformer, sampling: Sampling, max_length: int) -> None:
    """UserError for an empty prompt, or one whose answer would not fit into a row or into the model's context."""
    room = min(max_length, policy.config.max_position_embeddings) - sampling.max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt.tokens) <= room:
            raise UserError(
                f"prompt {index + 1} has {len(prompt.tokens)} tokens, and there is room for 1 to {room} beside "
                f"--max_new_tokens {sampling.max_new_tokens}; shorten or drop it, or lower --max_new_tokens"
            )
