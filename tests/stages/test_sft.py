"""Is the loss of fine-tuning that of the tokens to be learned and of no other, however it is packed and divided?"""

import math

import numpy as np
import pytest
import torch

from batches.micro_batch import IGNORE_INDEX
from batches.packing import Sequence
from ranks import Ranks
from stages.sft import SFT, neftune_noise
from tests.ranks import run_ranks
from tests.stages.example_stages import (
    CPU,
    a_feed,
    a_model,
    a_model_with_adapters,
    alone,
    answer_logprob,
    some_examples,
    step_gradients,
)
from training.examples_data import ExampleData
from training.precision import choose_precision


def test_the_loss_is_that_of_the_learned_tokens_of_every_example_alone():
    """Packed several to a row, against each example's own logits in float64: sum and gradient to 1e-5 relative."""
    groups = some_examples(8, size=1, shortest=6, longest=14)
    model, truth = a_model(), a_model()
    stage = SFT(a_feed(groups, batch_size=8))
    (batch,) = next(stage.batches(0))
    assert len(batch.input_ids) < 8
    loss, gradients = step_gradients(stage, model)
    targets = sum(int(sequence.learned[1:].sum()) for (sequence,) in groups)
    expected = -sum(answer_logprob(truth, sequence) for (sequence,) in groups) / targets
    expected.backward()
    assert batch.weight == targets and math.isclose(loss, expected.item(), rel_tol=1e-5)
    for name, parameter in truth.named_parameters():
        assert np.linalg.norm(gradients[name] - parameter.grad.numpy()) <= 1e-5 * parameter.grad.norm().item(), name


def test_the_last_token_is_learned_and_the_first_never_is():
    """The end of an answer is a target like any other; what comes first has nothing that predicts it, learned or not."""
    everything = Sequence(np.arange(1, 11), np.ones(10, dtype=bool))
    (batch,) = next(SFT(a_feed([[everything]], batch_size=1)).batches(0))
    assert batch.targets[batch.targets != IGNORE_INDEX].tolist() == list(range(2, 11)) and batch.weight == 9


def test_a_token_that_also_fills_rows_up_is_learned():
    """Rows are filled up with id 0. In many models that, or another pad token, is the end of a text: masks go by place."""
    ends_in_zero = Sequence(np.array([3, 0, 5, 4, 0]), np.array([True, False, False, True, True]))
    (batch,) = next(SFT(a_feed([[ends_in_zero]], batch_size=1)).batches(0))
    assert batch.targets[0, :5].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 4, 0, IGNORE_INDEX] and batch.weight == 2
    assert (batch.targets[0, 5:] == IGNORE_INDEX).all() and (batch.input_ids[0, 5:] == 0).all()


def test_examples_without_targets_weigh_nothing():
    """A micro-batch, and a whole rank, without targets: zero, not NaN, and the others' gradient as if it were not there."""
    groups = some_examples(1, size=1)
    nothing = [Sequence(np.arange(1, 21), np.zeros(20, dtype=bool))]

    def step(rank, world_size, groups):
        stage = SFT(a_feed(groups, Ranks(rank, world_size, CPU), batch_size=len(groups), micro_batch_size=1))
        model = a_model()
        if world_size > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        return step_gradients(stage, model)

    loss, gradients = step(0, 1, groups)
    only_nothing, zeros = step(0, 1, [nothing])
    assert only_nothing == 0 and all((gradient == 0).all() for gradient in zeros.values())
    for world_size in (1, 2):
        both = [*groups, nothing]
        results = [step(0, 1, both)] if world_size == 1 else run_ranks(step, 2, both)
        for other_loss, other in results:
            assert math.isclose(other_loss, loss, rel_tol=1e-6)
            assert all(np.allclose(other[name], gradients[name], rtol=1e-5, atol=1e-8) for name in gradients)


def test_batches_go_on_from_a_sample_and_every_example_comes_once_an_epoch():
    groups = some_examples(10, size=1)
    stage = SFT(a_feed(groups, batch_size=5))
    steps = stage.batches(0)
    epochs = [[next(steps), next(steps)] for _ in range(2)]
    seen = [[row for step in epoch for batch in step for row in _rows(batch)] for epoch in epochs]
    whole = sorted(tuple(sequence.tokens) for (sequence,) in groups)
    assert all(sorted(epoch) == whole for epoch in seen) and seen[0] != seen[1]
    again = next(stage.batches(15))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(again, epochs[1][1], strict=True))
    assert stage.epoch(15) == 1.5


def _rows(batch) -> list[tuple]:
    """Each sequence of a micro-batch, as a tuple of its tokens."""
    flat, ids = batch.input_ids.flatten(), batch.sequence_ids.flatten()
    return [tuple(flat[ids == number].tolist()) for number in range(len(batch.last_tokens))]


def test_ranks_share_a_step_and_no_more():
    groups = some_examples(11, size=1)
    whole = [row for batch in next(SFT(a_feed(groups, batch_size=7)).batches(7)) for row in _rows(batch)]
    parts = []
    for rank in range(3):
        stage = SFT(a_feed(groups, Ranks(rank, 3, CPU), batch_size=7))
        parts += [row for batch in next(stage.batches(7)) for row in _rows(batch)]
    assert parts == whole


# ---- NEFTune ---------------------------------------------------------------------------------------------------------


def test_noise_is_uniform_within_alpha_by_the_root_of_length_times_width():
    """Bounds, mean and variance (a²/3) by each sequence's own length; neighbours in both directions uncorrelated."""
    groups = some_examples(6, size=1, shortest=6, longest=30)
    (batch,) = next(SFT(a_feed(groups, batch_size=6, micro_batch_size=6), neftune_alpha=5.0).batches(0))
    width, alpha = 512, 5.0
    noise = neftune_noise(batch, width, alpha)
    assert (noise[batch.sequence_ids == len(batch.last_tokens)] == 0).all()
    scaled = []
    for number in range(len(batch.last_tokens)):
        own = noise[batch.sequence_ids == number]
        scaled.append(own / (alpha / math.sqrt(own.numel())))
        assert 0.99 < scaled[-1].abs().max() <= 1
    every = torch.cat(scaled)  # about 50,000 numbers: four standard errors are below 0.011 for the mean
    assert abs(every.mean()) < 4 / math.sqrt(3 * every.numel())
    assert abs(every.var() - 1 / 3) < 0.01
    for a, b in ((every[:, 1:], every[:, :-1]), (every[1:], every[:-1])):
        assert abs((a * b).mean() * 3) < 4 / math.sqrt(a.numel())


def test_noise_belongs_to_the_sample_and_only_to_training():
    """The same sample has the same noise whatever it is packed with; another epoch's has another; evaluation has none."""
    groups = some_examples(4, size=1, shortest=6, longest=10)
    noises = {}
    for micro_batch_size in (1, 4):
        stage = SFT(a_feed(groups, batch_size=4, micro_batch_size=micro_batch_size), neftune_alpha=5.0)
        for first in (0, 4):
            rows = {}
            for batch in next(stage.batches(first)):
                noise = neftune_noise(batch, 32, 5.0)
                for number, row in enumerate(_rows(batch)):
                    rows[row] = noise[batch.sequence_ids == number]
            noises[micro_batch_size, first] = rows
    for row, noise in noises[1, 0].items():
        assert torch.equal(noise, noises[4, 0][row]) and not torch.equal(noise, noises[1, 4][row])
    model = a_model()
    plain = SFT(a_feed(groups, validation=groups))
    noisy = SFT(a_feed(groups, validation=groups), neftune_alpha=5.0)
    batch = next(noisy.batches(0))[0]
    assert noisy.loss(model, batch)[0] != plain.loss(model, batch)[0]
    assert noisy.evaluate(model, everything=True) == plain.evaluate(a_model(), everything=True)
    assert model(batch.input_ids).equal(a_model()(batch.input_ids))


def test_noise_is_added_to_the_embeddings_of_a_compiled_model():
    """Against rows of the embedding with the noise added by hand; a compiled model must not miss it, nor keep it."""
    groups = some_examples(4, size=1)
    stage = SFT(a_feed(groups, validation=groups), neftune_alpha=50.0)
    (batch,) = next(stage.batches(0))
    by_hand, compiled = a_model(), a_model()
    embedding = by_hand.model.embed_tokens
    noise = neftune_noise(batch, embedding.embedding_dim, 50.0)
    embedding.register_forward_hook(lambda module, arguments, output: output + noise)
    expected = SFT(a_feed(groups)).loss(by_hand, batch)[0]
    compiled.compile(backend="eager")
    before = stage.evaluate(compiled, everything=True)
    assert math.isclose(stage.loss(compiled, batch)[0].item(), expected.item(), rel_tol=1e-6)
    assert stage.evaluate(compiled, everything=True) == before


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_is_the_mean_over_all_targets_on_any_number_of_ranks(world_size):
    """More ranks than examples too, and dropout that training has and evaluation has not."""
    held_out = some_examples(4, size=1, shortest=6)
    model = a_model_with_adapters()
    targets = sum(sequence.num_targets for (sequence,) in held_out)
    expected = -sum(answer_logprob(model, sequence).item() for (sequence,) in held_out) / targets

    def evaluate(rank, world_size):
        model = a_model_with_adapters(dropout=0.5)
        stage = SFT(a_feed(some_examples(5, size=1), Ranks(rank, world_size, CPU), validation=held_out))
        figures = stage.evaluate(model, everything=True)
        assert model.training
        return figures

    results = [evaluate(0, 1)] if world_size == 1 else run_ranks(evaluate, world_size)
    for figures in results:
        assert figures.keys() == {"val_loss"} and math.isclose(figures["val_loss"], expected, rel_tol=1e-5)


def test_evaluation_is_shared_among_the_ranks():
    """Each held-out example is computed on one rank, in order."""
    held_out = some_examples(7, size=1)

    def evaluate(rank, world_size):
        feed, seen = a_feed(held_out, Ranks(rank, world_size, CPU), validation=held_out), []

        def micro_batches(groups):
            seen.extend(tuple(sequence.tokens) for (sequence,) in groups)
            return feed.pack(groups)

        feed.evaluate(a_model(), micro_batches, SFT(feed).loss, {"loss": "val_loss"}, everything=True)
        return seen

    seen = [tokens for part in run_ranks(evaluate, 3) for tokens in part]
    assert seen == [tuple(sequence.tokens) for (sequence,) in held_out]


def test_some_examples_are_evaluated_in_between_and_all_at_the_end():
    held_out = some_examples(6, size=1)
    model = a_model()
    first_two = sum(len(sequence.tokens) for (sequence,) in held_out[:2])

    def val_loss(groups, eval_tokens=0, everything=False):
        return SFT(a_feed(groups, validation=groups, eval_tokens=eval_tokens)).evaluate(model, everything)

    some = val_loss(held_out, eval_tokens=first_two)
    assert some == val_loss(held_out[:2])
    last = val_loss(held_out, eval_tokens=first_two, everything=True)
    assert last == {**some, "val_loss_all": val_loss(held_out)["val_loss"]}
    assert SFT(a_feed(held_out)).evaluate(model, everything=True) == {}


def test_bf16_is_used_where_it_is_asked_for():
    """Evaluation sets autocast itself: the figure is close to fp32's and not equal to it."""
    held_out = some_examples(6, size=1)
    feed = a_feed(held_out, validation=held_out)
    exact = SFT(feed).evaluate(a_model(), everything=False)["val_loss"]
    bf16 = SFT(type(feed)(**{**feed.__dict__, "precision": choose_precision("bf16", CPU)}))
    assert 0 < abs(bf16.evaluate(a_model(), everything=False)["val_loss"] - exact) < 0.02


def test_an_epoch_of_one_example_is_one_sample():
    data = ExampleData(some_examples(1, size=1), seed=0)
    assert data.numbers(3, 4) == [0, 0, 0, 0] and data.epoch(3) == 3


def test_losses_alone_and_packed_agree_token_by_token():
    """The helper that the other tests lean on: its log-probabilities are those of a model run on longer and longer prefixes."""
    ((sequence,),) = some_examples(1, size=1)
    model = a_model()
    tokens = torch.from_numpy(sequence.tokens)
    expected = [
        model.logits(model(tokens[None, :n]))[0, -1].double().log_softmax(-1)[tokens[n]].item()
        for n in range(1, len(tokens))
    ]
    torch.testing.assert_close(alone(model, sequence), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
