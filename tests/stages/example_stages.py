"""What do the tests of stages that learn from examples share? A small model, small examples, and a step as the loop makes it."""

import numpy as np
import torch
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that
from torch import Tensor, nn

from adapters.lora import LoraLinear, add_adapters
from batches.packing import Sequence
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks, unwrap
from training.examples_data import ExampleData, ExampleFeed
from training.parallel import gradient_sync
from training.precision import choose_precision

CPU = torch.device("cpu")
VOCABULARY, MAX_LENGTH = 97, 32
TOKENS = VOCABULARY - 1  # the last one pads in a classifier, and transformers' embedding learns nothing for it
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def a_config(**changes) -> ModelConfig:
    return ModelConfig(vocab_size=VOCABULARY, max_position_embeddings=MAX_LENGTH, **SHAPE, **changes)


def a_model(seed=3, **changes) -> Transformer:
    model = Transformer(a_config(**changes))
    model.init_weights(seed, zero_residual=False)
    return model


def a_model_with_adapters(learned=True, dropout=0.0) -> Transformer:
    """With `learned`, B is drawn, as after some training."""
    model = a_model()
    add_adapters(model, rank=4, alpha=8.0, dropout=dropout)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if learned and isinstance(module, LoraLinear):
            for b in module.lora_B.values():
                b.data = 0.1 * torch.randn(b.shape, generator=generator)
    return model


def a_sequence(random: np.random.Generator, prompt: np.ndarray, length: int, **columns: float) -> Sequence:
    """`prompt` and an answer, whose tokens are learned, of together `length` tokens."""
    tokens = np.concatenate([prompt, random.integers(1, TOKENS, length - len(prompt))])
    return Sequence(tokens, np.arange(length) >= len(prompt), columns=columns)


def some_examples(count: int, size: int, shortest=17, longest=MAX_LENGTH, **columns: float) -> list[list[Sequence]]:
    """Groups of `size` answers to one prompt each. From 17 tokens on, no two sequences fit into a row of 32."""
    random = np.random.default_rng(5)
    groups = []
    for _ in range(count):
        prompt = random.integers(1, TOKENS, random.integers(2, 6))
        lengths = random.integers(shortest, longest + 1, size)
        groups.append([a_sequence(random, prompt, length, **columns) for length in lengths])
    return groups


def a_feed(groups, ranks=None, batch_size=4, micro_batch_size=4, validation=None, eval_tokens=0) -> ExampleFeed:
    return ExampleFeed(
        data=ExampleData(groups, seed=1), validation=None if validation is None else ExampleData(validation, seed=1),
        ranks=ranks or Ranks(0, 1, CPU), precision=choose_precision("none", CPU), batch_size=batch_size,
        micro_batch_size=micro_batch_size, max_length=MAX_LENGTH, eval_tokens=eval_tokens,
    )  # fmt: skip


def step_gradients(stage, model: nn.Module) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the first optimizer step, divided once by the weight of all ranks, as train.py does."""
    ranks = stage.feed.ranks
    batches = next(stage.batches(0))
    (weight,) = ranks.sum([float(sum(batch.weight for batch in batches))])
    loss_sum = 0.0
    for number, batch in enumerate(batches):
        with gradient_sync(model, number == len(batches) - 1):
            loss, metrics = stage.loss(model, batch)
            assert loss.item() == metrics["loss"][0].item() and metrics["loss"][1] == batch.weight
            (loss * (ranks.world_size / max(1.0, weight))).backward()
        loss_sum += loss.item()
    gradients = {n: p.grad.numpy() for n, p in unwrap(model).named_parameters() if p.grad is not None}
    return ranks.sum([loss_sum])[0] / max(1.0, weight), gradients


def alone(model: nn.Module, sequence: Sequence) -> Tensor:
    """(n-1,) float64 log-probabilities of a sequence's tokens from the second on, by itself and from its whole logits."""
    tokens = torch.from_numpy(sequence.tokens)
    logits = model.logits(model(tokens[None, :-1]))[0].double()
    return logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def answer_logprob(model: nn.Module, sequence: Sequence) -> Tensor:
    """float64 log-probability of the answer: the sum over its tokens, the prompt's left out."""
    return alone(model, sequence)[torch.from_numpy(sequence.learned[1:])].sum()
