"""Is GRPO, with its relatives, what their papers and TRL say, and does it learn? Rollouts here are real ones."""

import copy
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapters.lora import adapters_off, add_adapters
from batches.micro_batch import IGNORE_INDEX
from errors import UserError
from generation.rollouts import Prompt, RolloutSchedule, Sampling, roll_out
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks
from stages.grpo import CLIPS, GRPO
from stages.rewards import Reward
from tests.ranks import run_ranks
from tests.stages.drawn_stages import ALONE, loss_and_gradient, train
from training.metrics import reduce_metrics
from training.parallel import prepare_model
from training.precision import choose_precision

CPU = torch.device("cpu")

LOSSES = tuple(CLIPS)
STOPS = tuple(range(250, 256))


def a_model(seed: int = 0, hidden: int = 32) -> Transformer:
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(vocab_size=256, max_position_embeddings=64, **shape))
    model.init_weights(seed, zero_residual=False)
    return model


def small_bytes(completion_ids) -> list[float]:
    return [float(np.mean(np.array(ids) < 128)) for ids in completion_ids]


def sometimes(completion_ids) -> list[float | None]:
    """None for some, and many that are equal."""
    return [None if sum(ids) % 7 == 0 else float(sum(ids) % 3) for ids in completion_ids]


def a_stage(model, ranks=ALONE, **changes) -> GRPO:
    settings = {
        "prompts": [Prompt(np.arange(1, 2 + i % 5) * 7 % 250, f"prompt {i}") for i in range(12)],
        "eval_prompts": [],
        "rewards": [Reward("small", small_bytes), Reward("sometimes", sometimes, 0.5)],
        "decode": lambda ids: " ".join(map(str, ids)),
        "ranks": ranks,
        "precision": choose_precision("none", CPU),
        "sampling": Sampling(max_new_tokens=12, temperature=0.8, stop_ids=STOPS, vocab_size=256, batch_size=16),
        "schedule": RolloutSchedule(batch_size=4, minibatches=1, epochs=2, seed=3),
        "group_size": 4,
        "micro_batch_size": 4,
        "max_length": 24,
    }
    return GRPO(model=model, **(settings | changes))


def moved(model: Transformer, by: float = 0.02) -> None:
    """As optimizer steps would: away from the weights that drew."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)


def unpacked(micro_batches) -> list[dict]:
    """Each sequence of packed micro-batches: its tokens, how many of them are the response, and its columns."""
    sequences = []
    for batch in micro_batches:
        for number in range(len(batch.last_tokens)):
            at = batch.sequence_ids == number
            targets = batch.targets[at]
            learned = targets != IGNORE_INDEX
            tokens = batch.input_ids[at]
            columns = {name: column[at][learned] for name, column in batch.token_columns.items()}
            advantage = batch.columns["advantage"][number]
            sequences.append({"tokens": tokens, "learned": learned, "advantage": advantage, **columns})
    return sequences


def plain_logprobs(model, sequence, temperature=0.8) -> torch.Tensor:
    """(response,) by the whole logits of the text alone."""
    logits = model.logits(model(sequence["tokens"][None]))[0] / temperature
    logprobs = logits[:-1].log_softmax(-1).gather(1, sequence["tokens"][1:, None])[:, 0]
    return logprobs[sequence["learned"][:-1]]


# ------------------------------------------------------------------------------------------------------------ the losses


def by_definition(loss_type, sequences, logprobs, references, beta, max_new_tokens, low, high) -> torch.Tensor:
    """Each paper's equation over ragged lists, in float64."""
    per_answer, num_tokens = [], 0
    for sequence, logp, reference in zip(sequences, logprobs, references, strict=True):
        logp, old, advantage = logp.double(), sequence["old_logprobs"].double(), sequence["advantage"].double()
        ratio = (logp - old).exp()
        if loss_type == "gspo":
            ratio = (logp - old).mean().exp().expand(len(logp))
        if loss_type == "cispo":
            terms = -ratio.detach().clamp(max=1 + high) * advantage * logp
        else:
            terms = torch.maximum(-ratio * advantage, -ratio.clamp(1 - low, 1 + high) * advantage)
        if beta:
            rho = reference.double() - logp
            terms = terms + beta * ratio * (rho.exp() - 1 - rho)
        per_answer.append(terms)
        num_tokens += len(terms)
    if loss_type in ("grpo", "gspo"):
        return sum(terms.mean() for terms in per_answer) / len(per_answer)
    if loss_type == "dr_grpo":
        return sum(terms.sum() for terms in per_answer) / (len(per_answer) * max_new_tokens)
    return sum(terms.sum() for terms in per_answer) / num_tokens


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_an_answers_advantage_is_its_reward_against_its_groups(mask_truncated):
    """From the drawn answers on: rewards added with their weights, an answer that none of them judges counting nowhere; what
    was cut off is compared all the same; the answer's tokens are learned and not the prompt's."""
    rewards = [Reward("small", small_bytes, 2.0), Reward("sometimes", sometimes, 0.5)]
    stage = a_stage(a_model(), rewards=rewards, mask_truncated=mask_truncated)
    found = unpacked(next(stage.batches(0)))
    numbers = stage.schedule.prompt_numbers(0, 12)[stage.schedule.members(0, 0)]
    seeds = np.array(stage.schedule.seeds(0, 4), dtype=object).reshape(-1, 4)[stage.schedule.members(0, 0)]
    sequences = iter(found)
    for number, group in zip(numbers, seeds, strict=True):
        prompt = stage.prompts[number].tokens
        rollouts = roll_out(stage.model, [prompt] * 4, list(group), stage.sampling)
        totals = []
        for ids in (rollout.response.tolist() for rollout in rollouts):
            [small], [other] = small_bytes([ids]), sometimes([ids])
            totals.append(2.0 * small + (0.0 if other is None else 0.5 * other))
        for rollout, total in zip(rollouts, totals, strict=True):
            if mask_truncated and not rollout.finished:
                continue
            sequence = next(sequences)
            assert sequence["tokens"].tolist() == rollout.tokens.tolist()
            assert sequence["learned"].tolist() == [*rollout.is_response[1:], False]
            wanted = (total - np.mean(totals)) / (np.std(totals, ddof=1) + 1e-4)
            assert math.isclose(sequence["advantage"], wanted, rel_tol=1e-5, abs_tol=1e-6)
    assert next(sequences, None) is None and (0 < len(found) < 16 if mask_truncated else len(found) == 16)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_and_gradients_are_the_papers(loss_type, beta, mask_truncated):
    """Off-policy, so that clipping decides; answers that did not end leave every denominator when they are masked.
    Against float64 sums over fp32 log-probabilities: 1e-5 of the gradient's size."""
    model = a_model()
    reference = copy.deepcopy(model)
    stage = a_stage(model, loss_type=loss_type, kl_coefficient=beta, reference=reference, mask_truncated=mask_truncated)
    micro_batches = next(stage.batches(0))
    moved(model)
    moved(reference, 0.05)  # only now: the stored log-probabilities must be those of its own weights before
    gradient, metrics = loss_and_gradient(stage, model, micro_batches)
    sequences = unpacked(micro_batches)
    assert len(sequences) < 16 if mask_truncated else len(sequences) == 16
    references = [sequence.get("reference_logprobs") for sequence in sequences]
    model.zero_grad()
    wanted = by_definition(
        loss_type, sequences, [plain_logprobs(model, s) for s in sequences], references, beta, 12, *CLIPS[loss_type]
    )
    wanted.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()
    assert math.isclose(metrics["loss"], wanted.item(), abs_tol=1e-5)
    assert np.abs(gradient - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
    assert 0 < metrics["clip_fraction"] < 1 or loss_type == "cispo" or mask_truncated  # few answers are left then
    assert ("kl" in metrics) == bool(beta)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_and_gradients_are_trls(loss_type, beta):
    """TRL's own `_compute_loss` on the same answers, padded instead of packed, log-probabilities from the whole logits."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    model = a_model()
    cap = 1.1 if loss_type == "dr_grpo" else None
    stage = a_stage(model, loss_type=loss_type, kl_coefficient=beta, reference=copy.deepcopy(model), ratio_cap=cap)
    micro_batches = next(stage.batches(0))
    moved(model)
    gradient, metrics = loss_and_gradient(stage, model, micro_batches)
    sequences = unpacked(micro_batches)
    lengths = torch.tensor([int(sequence["learned"].sum()) for sequence in sequences])

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    model.zero_grad()
    logprobs = padded(plain_logprobs(model, sequence) for sequence in sequences)
    mask = (torch.arange(logprobs.shape[1]) < lengths[:, None]).long()
    low, high = CLIPS[loss_type]
    theirs = SimpleNamespace(
        top_entropy_quantile=1.0, aux_loss_enabled=False, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, beta=beta, epsilon_low=low,
        epsilon_high=1 + high if loss_type == "cispo" else high, loss_type={"gspo": "grpo"}.get(loss_type, loss_type),
        importance_sampling_level="sequence" if loss_type == "gspo" else "token", max_completion_length=12,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=True, delta=cap, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask,
        "advantages": torch.stack([sequence["advantage"] for sequence in sequences]),
        "old_per_token_logps": padded(sequence["old_logprobs"] for sequence in sequences),
        "num_items_in_batch": lengths.sum(),
    }  # fmt: skip
    if beta:
        inputs["ref_per_token_logps"] = padded(sequence["reference_logprobs"] for sequence in sequences)
    loss = trainer._compute_loss(theirs, None, inputs)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()
    assert math.isclose(metrics["loss"], loss.item(), abs_tol=1e-5)
    assert np.abs(gradient - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
    if loss_type == "dapo":  # which averages over tokens, as TRL reports
        assert metrics["clip_fraction"] == pytest.approx(
            theirs._metrics["train"]["clip_ratio/region_mean"][0], abs=1e-6
        )


def test_clips_are_the_papers_unless_others_are_given():
    """PPO's; DAPO's clip-higher (Yu et al. 2025, §3.1); GSPO's of a mean over tokens (Zheng et al. 2025, §5.1); CISPO's upper
    one is ScaleRL's."""
    clips = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    stages = {loss_type: a_stage(a_model(), loss_type=loss_type) for loss_type in LOSSES}
    assert {name: (stage.clip_low, stage.clip_high) for name, stage in stages.items()} == clips
    given = a_stage(a_model(), loss_type="dapo", clip_low=0.1)
    assert (given.clip_low, given.clip_high) == (0.1, 0.28)


def test_on_policy_nothing_is_stored_and_the_gradient_is_reinforces():
    """One step a phase: no old log-probabilities, ratio 1, the gradient of Σ -A log p / tokens."""
    model = a_model()
    stage = a_stage(model, loss_type="dapo", schedule=RolloutSchedule(4, 1, 1, 3))
    micro_batches = next(stage.batches(0))
    assert all(not batch.token_columns for batch in micro_batches)
    gradient, metrics = loss_and_gradient(stage, model, micro_batches)
    assert metrics["clip_fraction"] == 0
    model.zero_grad()
    sequences = unpacked(micro_batches)
    logprobs = [plain_logprobs(model, sequence) for sequence in sequences]
    total = sum((-s["advantage"] * logp).sum() for s, logp in zip(sequences, logprobs, strict=True))
    (total / sum(map(len, logprobs))).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()
    assert np.abs(gradient - expected).max() < 1e-6 * max(1.0, np.abs(expected).max())
    # stored all the same, when there are several steps: the first has ratio 1, and so the same gradient, to 1e-5
    again = a_stage(model, loss_type="dapo", schedule=RolloutSchedule(4, 1, 2, 3))
    stored = next(again.batches(0))
    assert all("old_logprobs" in batch.token_columns for batch in stored)
    assert np.abs(loss_and_gradient(again, model, stored)[0] - gradient).max() < 1e-5


def test_the_reference_is_the_model_without_its_adapters():
    """Fresh adapters: KL exactly 0. After they moved: the stored log-probabilities are the base's, to 1e-5."""
    model = a_model()
    add_adapters(model, rank=4, alpha=8.0)
    with pytest.raises(ValueError, match="frozen copy"):
        a_stage(a_model(), kl_coefficient=0.1)
    stage = a_stage(model, kl_coefficient=0.1)
    steps = stage.batches(0)
    assert abs(loss_and_gradient(stage, model, next(steps))[1]["kl"]) < 1e-9
    moved(model, 0.1)
    next(steps)
    micro_batches = next(steps)  # of the second phase
    _, metrics = loss_and_gradient(stage, model, micro_batches)
    assert metrics["kl"] > 1e-4
    for sequence in unpacked(micro_batches):
        with torch.no_grad(), adapters_off(model):
            base = plain_logprobs(model, sequence)
        torch.testing.assert_close(sequence["reference_logprobs"], base, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])  # one divides by answers, one by tokens
def test_micro_batches_and_ranks_only_divide(loss_type):
    """4 rows at once = 2 = 1 = two and three ranks (one of which gets no answer that is learned from, once masked):
    the same answers, loss, metrics and gradient to 1e-5 of its size, with minibatches, KL and masked answers."""

    def begin(ranks, seed, micro_batch_size=4):
        model = a_model()
        return a_stage(
            model, ranks, loss_type=loss_type, kl_coefficient=0.1, reference=copy.deepcopy(model), mask_truncated=True,
            schedule=RolloutSchedule(batch_size=1, minibatches=3, epochs=1, seed=seed), micro_batch_size=micro_batch_size,
        )  # fmt: skip

    def has_answers(seed):
        steps = begin(ALONE, seed).batches(0)
        return all(sum(batch.weight for batch in next(steps)) for _ in range(2))

    # versions of torch draw other weights, and so other answers: the first seed whose answers end in both steps
    seed = next(seed for seed in range(22, 60) if has_answers(seed))

    def step(rank, world_size, micro_batch_size=4):
        ranks = Ranks(rank, world_size, CPU)
        stage = begin(ranks, seed, micro_batch_size)
        model = stage.model
        wrapped = prepare_model(model, ranks, compile_model=False)
        steps = stage.batches(0)
        results = [loss_and_gradient(stage, wrapped, next(steps), ranks)]
        moved(model)
        return [*results, loss_and_gradient(stage, wrapped, next(steps), ranks)]

    alone = step(0, 1)
    others = [step(0, 1, 2), step(0, 1, 1), *run_ranks(step, 2), *run_ranks(step, 3)]
    for other in others:
        for (gradient, metrics), (expected, reported) in zip(other, alone, strict=True):
            assert math.isclose(metrics["loss"], reported["loss"], abs_tol=1e-5)
            assert np.abs(gradient - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
            assert metrics == pytest.approx(reported, abs=1e-4)


def test_killed_and_resumed_at_a_phase_is_never_killed():
    """Four phases of 2 × 2 steps at once, or two, then a new process's objects from the weights and the position: the same
    bits. In the middle of a phase it goes on too, with answers drawn anew."""
    schedule = RolloutSchedule(batch_size=2, minibatches=2, epochs=2, seed=1)

    def build(state=None):
        model = a_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        return a_stage(model, schedule=schedule), model, optimizer

    whole = build()
    train(*whole, 16)
    first = build()
    train(*first, 8)
    second = build(copy.deepcopy((first[1].state_dict(), first[2].state_dict())))
    train(*second, 8, first_sample=8 * 2)
    for wanted, found in zip(whole[1].parameters(), second[1].parameters(), strict=True):
        assert torch.equal(wanted, found)
    middle = build()
    assert len(train(*middle, 3, first_sample=6 * 2)) == 3


def test_metrics_describe_the_phase_and_wrong_options_are_refused():
    stage = a_stage(a_model(), loss_type="dr_grpo")
    assert stage.advantage_scale == "none" and stage.epoch(48) == 2.0 and stage.evaluate(stage.model, True) == {}
    _, metrics = loss_and_gradient(stage, stage.model, next(stage.batches(0)))
    names = {"loss", "entropy", "clip_fraction", "reward", "reward_std", "reward_small", "reward_small_std",
             "reward_sometimes", "reward_sometimes_std", "completion_length", "finished", "equal_groups", "unscored"}  # fmt: skip
    assert set(metrics) == names
    assert 0 < metrics["finished"] < 1 and 1 < metrics["completion_length"] <= 12
    assert abs(metrics["entropy"] - math.log(256)) < 1.0  # an untrained model guesses
    for change in ({"loss_type": "ppo"}, {"group_size": 1}, {"max_length": 12}):
        with pytest.raises(UserError):
            a_stage(a_model(), **change)


def test_where_every_answer_was_cut_off_and_masked_the_rounds_figures_are_said():
    stage = a_stage(a_model(), mask_truncated=True)
    stage.sampling = replace(stage.sampling, stop_ids=())
    [*batches] = next(stage.batches(0))
    assert not any(batch.weight for batch in batches)
    sums = [stage.loss(stage.model, batch)[1] for batch in batches]
    figures = reduce_metrics(
        {name: tuple(map(sum, zip(*(one[name] for one in sums), strict=True))) for name in sums[0]}, ALONE
    )
    assert figures["loss"] is None and figures["entropy"] is None
    assert figures["completion_length"] == stage.sampling.max_new_tokens and figures["finished"] == 0
    assert math.isfinite(figures["reward"]) and 0 <= figures["unscored"] < 1


def test_held_out_prompts_are_evaluated_in_part_or_all():
    prompts = [Prompt(np.array([i + 1]), "") for i in range(6)]
    stage = a_stage(a_model(), eval_prompts=prompts, eval_samples=2)
    some, last = stage.evaluate(stage.model, everything=False), stage.evaluate(stage.model, everything=True)
    assert {f"{name}_all" for name in some} | set(some) == set(last)
    whole = a_stage(a_model(), eval_prompts=prompts).evaluate(stage.model, everything=False)
    assert whole["val_reward"] == last["val_reward_all"] and whole["val_loss"] == -whole["val_reward"]


# ----------------------------------------------------------------------------------------------------------------- proof


def test_it_learns_to_write_small_bytes():
    """From about one half to at least 0.85 after 40 updates; 1600 held-out bytes, a deviation of 0.01."""
    model = a_model()
    stage = a_stage(
        model, rewards=[Reward("small", small_bytes)], schedule=RolloutSchedule(8, 1, 1, 0), group_size=8,
        sampling=Sampling(max_new_tokens=16, temperature=1.0, stop_ids=(), vocab_size=256, batch_size=128),
        eval_prompts=[Prompt(np.array([100 + i]), "") for i in range(100)], micro_batch_size=64,
    )  # fmt: skip
    before = stage.evaluate(model, everything=True)["val_reward"]
    train(stage, model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), steps=40)
    after = stage.evaluate(model, everything=True)["val_reward"]
    assert 0.4 < before < 0.6 and after >= 0.85, (before, after)
