"""Is a rollout what the model says with these random numbers, alone or in company? Against forward passes in float64."""

import numpy as np
import pytest
import torch

from batches.micro_batch import IGNORE_INDEX
from batches.packing import Sequence
from errors import UserError
from generation.rollouts import (
    Prompt,
    RolloutSchedule,
    Sampling,
    check_prompts,
    draw,
    figures_of,
    gather_parts,
    own_micro_batches,
    response_statistics,
    roll_out,
    uniform,
)
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks
from tests.ranks import run_ranks

CPU = torch.device("cpu")
VOCABULARY = 40  # of which the last three ids pad the weights
SAMPLING = Sampling(max_new_tokens=12, temperature=0.7, stop_ids=(3, 5), vocab_size=37, batch_size=4)
PROMPTS = [np.arange(1, 1 + size) % 37 for size in (7, 1, 4, 4, 9, 2, 7, 1, 5)]
SEEDS = [1000 + 7 * row for row in range(len(PROMPTS))]


def a_model(dtype=torch.float32) -> Transformer:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=32, **shape))
    model.init_weights(seed=1, zero_residual=False)
    for parameter in model.parameters():  # weights that have an opinion, so that draws differ from a fair die's
        parameter.data *= 2.0 if parameter.dim() == 2 else 1.0
    return model.to(dtype)


def float64_logprobs(tokens: np.ndarray) -> torch.Tensor:
    """(n, V) log softmax(logits / temperature) over the ids that can be drawn, of a float64 model without a cache."""
    model = a_model(torch.float64)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None])[0] @ model.head_weight.T
    return (logits[:, : SAMPLING.vocab_size] / SAMPLING.temperature).log_softmax(-1)


def test_a_row_is_what_it_is_alone():
    """Ragged prompts, another order, other batches: the same tokens, and log-probabilities to fp32's rounding, 1e-5."""
    model = a_model()
    together = roll_out(model, PROMPTS, SEEDS, SAMPLING)
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    shuffled = roll_out(model, [PROMPTS[i] for i in order], [SEEDS[i] for i in order], SAMPLING)
    assert len({rollout.tokens.tobytes() for rollout in together}) == len(PROMPTS)
    for row, rollout in enumerate(together):
        [alone] = roll_out(model, [PROMPTS[row]], [SEEDS[row]], SAMPLING)
        for other in (alone, shuffled[order.index(row)]):
            assert np.array_equal(rollout.tokens, other.tokens) and rollout.finished == other.finished
            np.testing.assert_allclose(rollout.logprobs, other.logprobs, atol=1e-5)


def test_tokens_and_logprobs_follow_from_the_random_numbers_alone():
    """Each token by inverting the float64 model's cumulated probabilities at the seed's next random number; no cache, no
    top-k or top-p: the log-probability is of the whole distribution at this temperature (1e-5: fp32)."""
    finished = 0
    for prompt, seed, rollout in zip(PROMPTS, SEEDS, roll_out(a_model(), PROMPTS, SEEDS, SAMPLING), strict=True):
        logprobs = float64_logprobs(rollout.tokens)
        numbers = uniform([seed], SAMPLING.max_new_tokens)[0]
        assert np.array_equal(rollout.tokens[: rollout.prompt_length], prompt)
        for place, token in enumerate(rollout.response):
            before = logprobs[len(prompt) + place - 1]
            edges = before.exp().cumsum(0)
            assert token == int(np.searchsorted(edges.numpy(), numbers[place], side="right"))
            assert abs(rollout.logprobs[place] - before[token].item()) < 1e-5
        # the stop token is kept, and nothing comes after it
        ends = np.isin(rollout.response, SAMPLING.stop_ids)
        assert not ends[:-1].any() and rollout.finished == ends[-1]
        assert rollout.finished or len(rollout.response) == SAMPLING.max_new_tokens
        assert len(rollout.logprobs) == len(rollout.response) == rollout.is_response.sum()
        finished += rollout.finished
    assert 0 < finished < len(PROMPTS)  # both kinds were seen


def test_random_numbers_are_splitmix64s():
    """The published outputs for the seed 1234567 (reference implementation of Vigna's)."""
    published = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], dtype=np.uint64)
    assert np.array_equal(uniform([1234567], 3)[0], (published >> np.uint64(12)) / 2.0**52)


def test_draws_have_the_probabilities_of_the_distribution():
    """χ² of 40,000 draws over 7 tokens: below 22.5, which has a chance of 1 in 1000 with 6 degrees of freedom."""
    logprobs = torch.tensor([0.3, 0.02, 0.0, 0.2, 0.08, 0.0, 0.4], dtype=torch.float64).log()
    count = 40_000
    numbers = torch.from_numpy(uniform(range(count), 1)[:, 0])
    found = np.bincount(draw(logprobs.expand(count, 7), numbers).numpy(), minlength=7)
    expected = count * logprobs.exp().numpy()
    assert found[2] == found[5] == 0  # impossible is impossible
    real = expected > 0
    assert (np.square(found - expected)[real] / expected[real]).sum() < 22.5
    edge = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    impossible_ends = torch.tensor([0.0, 0.7, 0.3, 0.0]).log().expand(2, 4)
    assert draw(impossible_ends, edge).tolist() == [1, 2]


def test_padding_of_the_vocabulary_is_never_drawn_and_has_no_probability():
    model = a_model()
    model.lm_head.weight.data[SAMPLING.vocab_size :] = 50.0 * model.lm_head.weight.data[:3]
    rollouts = roll_out(model, PROMPTS, SEEDS, SAMPLING)
    assert max(rollout.tokens.max() for rollout in rollouts) < SAMPLING.vocab_size
    [figures] = token_figures(model, rollouts[:1])
    np.testing.assert_allclose(figures["logprobs"][rollouts[0].prompt_length :], rollouts[0].logprobs, atol=1e-5)


def token_figures(model, rollouts) -> list[dict]:
    def logprobs(batch):
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, batch.input_ids.shape[1])
        settings = {"temperature": SAMPLING.temperature, "vocab_size": SAMPLING.vocab_size}
        return {"logprobs": response_statistics(hidden, model, batch.targets, **settings).logprobs}

    sequences = [Sequence(rollout.tokens, rollout.is_response) for rollout in rollouts]
    return figures_of(sequences, logprobs, device=CPU, max_length=24, micro_batch_size=2)


def test_packed_figures_are_those_of_each_text_alone():
    """The loss's log-probabilities beside each token, packed several to a row: those it was drawn with, 0 in the prompt."""
    model = a_model()
    rollouts = roll_out(model, PROMPTS, SEEDS, SAMPLING)
    for rollout, figures in zip(rollouts, token_figures(model, rollouts), strict=True):
        assert (
            figures["logprobs"].shape == rollout.tokens.shape and not figures["logprobs"][: rollout.prompt_length].any()
        )
        np.testing.assert_allclose(figures["logprobs"][rollout.prompt_length :], rollout.logprobs, atol=1e-5)


def test_the_mode_is_restored_and_wrong_use_is_refused():
    model = a_model().train()
    roll_out(model, PROMPTS[:1], SEEDS[:1], SAMPLING)
    assert model.training and roll_out(model, [], [], SAMPLING) == []
    for sampling, prompt in (
        (Sampling(4, 0.0, (), 37, 4), PROMPTS[0]),
        (SAMPLING, np.zeros(0, dtype=np.int64)),
        (SAMPLING, np.zeros(21, dtype=np.int64)),  # 21 + 12 > 32
    ):
        with pytest.raises(ValueError):
            roll_out(model, [prompt], [0], sampling)
    check_prompts([Prompt(np.zeros(20, dtype=np.int64), "")], model, SAMPLING, 32)
    for size, length in ((21, 32), (19, 30), (0, 32)):
        with pytest.raises(UserError, match="prompt 1 has"):
            check_prompts([Prompt(np.zeros(size, dtype=np.int64), "")], model, SAMPLING, length)


# ------------------------------------------------------------------------------------------------------------- schedule


def test_every_prompt_once_a_pass_and_every_answer_once_an_epoch():
    schedule = RolloutSchedule(batch_size=4, minibatches=3, epochs=2, seed=5)
    numbers = np.concatenate([schedule.prompt_numbers(phase, 24) for phase in range(4)])
    assert sorted(numbers[:24]) == sorted(numbers[24:]) == list(range(24)) and not np.array_equal(
        numbers[:24], numbers[24:]
    )
    for phase in range(2):
        dealt = [schedule.members(phase, step) for step in range(6)]
        assert sorted(np.concatenate(dealt[:3])) == sorted(np.concatenate(dealt[3:])) == list(range(12))
        assert [len(one) for one in dealt] == [4] * 6 and not np.array_equal(dealt[0], dealt[3])
    # a position counts samples of optimizer steps: 6 of them, of 4, use up a phase
    assert [schedule.locate(4 * step) for step in (0, 5, 6, 13)] == [(0, 0), (0, 5), (1, 0), (2, 1)]
    seeds = [seed for phase in range(3) for seed in schedule.seeds(phase, 2)]
    assert len(set(seeds)) == 3 * 12 * 2


def test_parts_come_together_in_order_and_an_idle_rank_still_has_a_micro_batch():
    def gather(rank, world_size):
        ranks = Ranks(rank, world_size, CPU)
        sequences = [Sequence(np.array([1, 2, 3 + i]), np.array([False, True, i != 1])) for i in range(2)]
        sequences.append(Sequence(np.array([9, 9]), np.array([False, False])))  # nothing to learn
        batches = own_micro_batches(sequences, ranks, max_length=8, micro_batch_size=2)
        targets = [int(t) for batch in batches for t in batch.targets.flatten() if t != IGNORE_INDEX]
        return gather_parts([(rank, i) for i in range(rank + 1)], ranks), targets, len(batches)

    answers = run_ranks(gather, 3)
    assert [gathered for gathered, _, _ in answers] == [[(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]] * 3
    assert [targets for _, targets, _ in answers] == [[], [2, 3], [2]]
    assert all(count == 1 for _, _, count in answers)
