"""Does the reward model learn from the score at each sequence's last token, whatever lies beside it in the row?"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adapters.lora import add_adapters
from adapters.scalar_head import RewardModel
from batches.packing import Sequence
from ranks import Ranks
from stages.reward import Reward
from tests.ranks import run_ranks
from tests.stages.example_stages import (
    CPU,
    a_config,
    a_feed,
    a_model,
    some_examples,
    step_gradients,
)


def a_reward_model(seed=3) -> RewardModel:
    model = RewardModel(a_config())
    model.model.load_state_dict(a_model(seed).model.state_dict())
    model.init_score(seed)
    return model


def an_adapted_reward_model() -> RewardModel:
    model = a_reward_model()
    add_adapters(model, rank=4, alpha=8.0)
    return model


def last_score(model: RewardModel, sequence: Sequence) -> torch.Tensor:
    """float64: the sequence by itself, hidden state times head."""
    return model(torch.from_numpy(sequence.tokens)[None])[0, -1].double()


def with_margins(groups) -> list[list[Sequence]]:
    return [
        [Sequence(s.tokens, s.learned, columns={"margin": 0.5 * number}) for s in group]
        for number, group in enumerate(groups)
    ]


def test_the_loss_is_bradley_terry_with_margin_and_centring():
    """Packed pairs against each sequence alone: loss, gradient and figures to 1e-5."""
    groups = with_margins(some_examples(4, size=2, shortest=6, longest=14))
    stage = Reward(a_feed(groups), centring=0.01)
    (batch,) = next(stage.batches(0))
    assert len(batch.input_ids) < 8 and batch.weight == 4
    truth = a_reward_model()
    c, r = (torch.stack([last_score(truth, group[side]) for group in groups]) for side in (0, 1))
    margins = torch.tensor([group[0].columns["margin"] for group in groups], dtype=torch.float64)
    expected = -F.logsigmoid(c - r - margins) + 0.01 * (c + r) ** 2
    loss, gradients = step_gradients(stage, a_reward_model())
    assert math.isclose(loss, expected.mean().item(), rel_tol=1e-5)
    expected.mean().backward()
    for name, parameter in truth.named_parameters():
        assert np.linalg.norm(gradients[name] - parameter.grad.numpy()) <= 2e-5 * parameter.grad.norm().item(), name
    _, metrics = stage.loss(a_reward_model(), batch)
    figures = {"loss": expected, "accuracy": c > r, "margin": c - r, "score/chosen": c, "score/rejected": r}
    assert metrics.keys() == figures.keys()
    for name, values in figures.items():
        assert metrics[name][1] == 4
        assert math.isclose(metrics[name][0].item(), values.double().sum().item(), rel_tol=1e-5, abs_tol=1e-5), name


def test_equal_scores_cost_ln_2_and_the_margin_costs_more():
    """A head of zeros: c = r = 0, so −log σ(−margin)."""
    model = a_reward_model()
    torch.nn.init.zeros_(model.score.weight)
    groups = some_examples(4, size=2)
    (batch,) = next(Reward(a_feed(groups)).batches(0))
    assert Reward(a_feed(groups)).loss(model, batch)[0].item() == 4 * torch.tensor(math.log(2)).item()
    groups = with_margins(groups)
    (batch,) = next(Reward(a_feed(groups)).batches(0))
    expected = sum(math.log1p(math.exp(0.5 * number)) for number in range(4))
    assert math.isclose(Reward(a_feed(groups)).loss(model, batch)[0].item(), expected, rel_tol=1e-6)


def test_with_adapters_the_head_and_the_adapters_learn_and_nothing_else():
    groups = some_examples(4, size=2)
    _, gradients = step_gradients(Reward(a_feed(groups)), an_adapted_reward_model())
    assert gradients["score.weight"].any()
    assert all(name == "score.weight" or ".lora_" in name for name in gradients) and len(gradients) == 1 + 2 * 7 * 2


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_is_the_mean_over_all_pairs_on_any_number_of_ranks(world_size):
    held_out = some_examples(4, size=2, shortest=6)
    model = a_reward_model()
    scores = np.array([[last_score(model, sequence).item() for sequence in group] for group in held_out])
    difference, total = scores[:, 0] - scores[:, 1], scores.sum(1)

    def evaluate(rank, world_size):
        stage = Reward(a_feed(held_out, Ranks(rank, world_size, CPU), validation=held_out), centring=0.01)
        return stage.evaluate(a_reward_model(), everything=True)

    expected = {
        "val_loss": (np.logaddexp(0, -difference) + 0.01 * total**2).mean(),
        "val_accuracy": (difference > 0).mean(),
        "val_margin": difference.mean(),
    }
    for figures in [evaluate(0, 1)] if world_size == 1 else run_ranks(evaluate, world_size):
        assert figures.keys() == expected.keys()
        assert all(math.isclose(figures[name], expected[name], rel_tol=1e-5, abs_tol=1e-6) for name in expected)


def test_a_reward_model_learns_which_answers_are_chosen():
    """Chosen answers are of low tokens, rejected ones of high; scores of held-out pairs, and centred around zero."""
    random = np.random.default_rng(0)

    def pairs(count):
        for _ in range(count):
            prompt = random.integers(1, 97, 4)
            answers = random.integers(1, 48, 8), random.integers(48, 97, 8)
            yield [Sequence(np.concatenate([prompt, answer]), np.arange(12) >= 4) for answer in answers]

    model = a_reward_model()
    stage = Reward(a_feed(list(pairs(32)), batch_size=8, micro_batch_size=8, validation=list(pairs(16))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, batches in zip(range(12), stage.batches(0), strict=False):
        for batch in batches:
            (stage.loss(model, batch)[0] / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = stage.evaluate(model, everything=False)
    assert after["val_accuracy"] == 1 and after["val_loss"] < 0.2


def test_loss_and_gradients_are_trls():
    """TRL 1.16's own compute_loss on transformers' classifier with the same weights: to 1e-5."""
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

    groups = with_margins(some_examples(4, size=2, shortest=6))
    ours = a_reward_model()
    theirs = LlamaForSequenceClassification(LlamaConfig(**ours.config.to_hf()))
    theirs.load_state_dict(ours.state_dict())
    rows = [
        {"chosen_ids": c.tokens.tolist(), "rejected_ids": r.tokens.tolist(), "margin": c.columns["margin"]}
        for c, r in groups
    ]
    inputs = DataCollatorForPreference(pad_token_id=ours.config.pad_token_id)(rows)
    trainer = object.__new__(RewardTrainer)
    trainer.__dict__.update(
        accelerator=Accelerator(cpu=True), args=SimpleNamespace(center_rewards_coefficient=0.01), _tp_size=1,
        _metrics={"train": {name: [] for name in ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy",
                                                  "margin")}}, _total_train_tokens=0, model=theirs,
    )  # fmt: skip
    expected = trainer.compute_loss(theirs, dict(inputs))
    expected.backward()
    loss, gradients = step_gradients(Reward(a_feed(groups), centring=0.01), ours)
    assert math.isclose(loss, expected.item(), rel_tol=1e-5)
    for name, parameter in theirs.named_parameters():
        assert np.linalg.norm(gradients[name] - parameter.grad.numpy()) <= 1e-5 * parameter.grad.norm().item(), name
