"""Do preferences move the right probabilities, from the right start, by the gradient that TRL's own code gives?"""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapters.lora import adapters_off
from batches.packing import Sequence
from errors import UserError
from finetune_data.encoding_examples import ENDS_SIDE
from ranks import Ranks
from stages.dpo import DPO, KTO, REFERENCE, reference_logprobs, with_mismatches, with_reference
from stages.preference_losses import PAIR_LOSSES, WITHOUT_REFERENCE
from tests.ranks import run_ranks
from tests.stages.example_stages import (
    CPU,
    MAX_LENGTH,
    a_feed,
    a_model,
    a_model_with_adapters,
    a_sequence,
    answer_logprob,
    some_examples,
    step_gradients,
)
from training.examples_data import ExampleData
from training.precision import choose_precision

BETA, GAMMA = 0.3, 0.4
REFERENCE_SEED = 14
SETTINGS = {"max_length": MAX_LENGTH, "micro_batch_size": 4, "ranks": Ranks(0, 1, CPU),
            "precision": choose_precision("none", CPU)}  # fmt: skip


def a_stage(groups, loss_name="sigmoid", **feed) -> DPO:
    return DPO(a_feed(groups, **feed), loss_name, BETA, gamma=GAMMA)


def referenced(groups, model=None) -> list[list[Sequence]]:
    """The examples with the log-probabilities of a reference, by default a model drawn from another seed."""
    data = ExampleData(groups, 0)
    return with_reference(data, reference_logprobs(model or a_model(REFERENCE_SEED), data, **SETTINGS)).groups


def labelled_examples(count: int, shortest=17) -> list[list[Sequence]]:
    """[answer] with a label, every third desirable."""
    groups = some_examples(count, size=1, shortest=shortest)
    return [
        [Sequence(sequence.tokens, sequence.learned, columns={"label": float(number % 3 == 0)})]
        for number, (sequence,) in enumerate(groups)
    ]


# ---- where it starts -------------------------------------------------------------------------------------------------


def test_new_adapters_start_at_ln_2_exactly():
    """Policy and reference are the same model then; no reward, and a gradient all the same."""
    stage = a_stage(some_examples(4, size=2, shortest=6))
    model = a_model_with_adapters(learned=False)
    (batch,) = next(stage.batches(0))
    loss, metrics = stage.loss(model, batch)
    assert batch.weight == 4 and loss.item() == 4 * torch.tensor(math.log(2)).item()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[name][0].item() == 0
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_dropout_is_off():
    """In the model, the reference and KTO's KL; adapters that were made with dropout give what those without give."""
    plain, dropping = a_model_with_adapters(), a_model_with_adapters(dropout=0.5)
    pairs, labelled = some_examples(4, size=2), with_mismatches(labelled_examples(4), MAX_LENGTH)
    labelled = with_reference(ExampleData(labelled, 0), np.full(8, -200.0)).groups  # so far off that the KL is not 0
    assert next(a_kto_stage(labelled, plain).batches(0))[0].columns["kl"][0] > 0
    for make_stage in (lambda model: a_stage(pairs), lambda model: a_kto_stage(labelled, model)):
        (loss, gradients), (other, same) = (step_gradients(make_stage(model), model) for model in (plain, dropping))
        assert loss == other and all(np.array_equal(gradients[name], same[name]) for name in gradients)
        plain.zero_grad()
        dropping.zero_grad()
    assert dropping.training


def test_full_fine_tuning_starts_at_ln_2_from_a_precomputed_reference():
    """Packed in another order than in training: log-probabilities of some 100 nats agree to 1e-5 relative."""
    groups = referenced(some_examples(4, size=2, shortest=6), a_model())
    loss, _ = step_gradients(a_stage(groups), a_model())
    assert abs(loss - math.log(2)) < 1e-4


def test_a_precomputed_reference_is_the_live_one():
    """The adapters' base, computed in the same step, against the column: loss and gradients to 1e-5 relative."""
    groups = some_examples(4, size=2, shortest=6)
    model = a_model_with_adapters()
    with adapters_off(model):
        columns = referenced(groups, model)
    live, precomputed = (step_gradients(a_stage(g), a_model_with_adapters()) for g in (groups, columns))
    assert math.isclose(live[0], precomputed[0], rel_tol=1e-5)
    for name, gradient in live[1].items():
        assert np.linalg.norm(gradient - precomputed[1][name]) <= 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("loss_name", ["sigmoid", "kto"])
def test_without_a_reference_there_is_a_sentence_and_not_a_wrong_loss(loss_name):
    model = a_model()
    if loss_name == "kto":
        stage = KTO(a_feed(with_mismatches(labelled_examples(4), MAX_LENGTH)), model, BETA)
    else:
        stage = a_stage(some_examples(4, size=2))
    with pytest.raises(ValueError, match="there is no reference"):
        stage.loss(model, next(stage.batches(0))[0])


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_reference_is_the_sum_over_the_answer_of_every_sequence_in_order(world_size):
    """Each sequence by itself in float64, to 1e-5 relative; every rank knows all of them; adapters' dropout is off."""
    groups = some_examples(5, size=2, shortest=6)
    expected = [answer_logprob(a_model_with_adapters(), sequence).item() for group in groups for sequence in group]

    def compute(rank, world_size):
        model = a_model_with_adapters(dropout=0.5)
        settings = {**SETTINGS, "ranks": Ranks(rank, world_size, CPU), "micro_batch_size": 2}
        return reference_logprobs(model, ExampleData(groups, 0), **settings)

    for found in [compute(0, 1)] if world_size == 1 else run_ranks(compute, world_size):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_reference_stands_beside_its_sequence_and_nothing_else_changes():
    groups = labelled_examples(3)
    data = with_reference(ExampleData(groups, seed=4), np.array([-1.5, -2.5, -3.5], dtype=np.float32))
    assert data.seed == 4 and [s.columns[REFERENCE] for (s,) in data.groups] == [-1.5, -2.5, -3.5]
    for (before,), (after,) in zip(groups, data.groups, strict=True):
        assert after.tokens is before.tokens and after.columns["label"] == before.columns["label"]


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_name", PAIR_LOSSES)
def test_packed_pairs_give_what_they_give_alone(loss_name):
    """Every answer by itself from whole logits in float64, the paper's formula, to 1e-5; and the reported figures."""
    groups = some_examples(4, size=2, shortest=6, longest=14)
    reference = a_model(REFERENCE_SEED)
    stage = a_stage(groups if loss_name in WITHOUT_REFERENCE else referenced(groups, reference), loss_name)
    model = a_model()
    (batch,) = next(stage.batches(0))
    assert len(batch.input_ids) < 8 and batch.weight == 4
    loss, metrics = stage.loss(model, batch)
    sums = [[answer_logprob(m, sequence).item() for m in (model, reference)] for group in groups for sequence in group]
    (c, qc), (r, qr) = (np.array(sums[side::2]).T for side in (0, 1))
    nc, nr = (np.array([group[side].learned.sum() for group in groups]) for side in (0, 1))

    def log_sigmoid(x):
        return -np.logaddexp(0, -x)

    def log_odds(mean):
        return mean - np.log1p(-np.exp(mean))

    expected = {
        "sigmoid": -log_sigmoid(BETA * (c - qc - r + qr)),
        "ipo": ((c - qc) / nc - (r - qr) / nr - 1 / (2 * BETA)) ** 2,
        "hinge": np.maximum(0, 1 - BETA * (c - qc - r + qr)),
        "simpo": -log_sigmoid(BETA * (c / nc - r / nr) - GAMMA),
        "orpo": -c / nc - BETA * log_sigmoid(log_odds(c / nc) - log_odds(r / nr)),
    }[loss_name]
    assert math.isclose(loss.item(), expected.sum(), rel_tol=1e-5)
    free = loss_name in WITHOUT_REFERENCE
    rewards = (BETA * c / nc, BETA * r / nr) if free else (BETA * (c - qc), BETA * (r - qr))
    figures = {
        "loss": expected,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": rewards[0] > rewards[1],
        "logps/chosen": c,
        "logps/rejected": r,
    }
    assert figures.keys() == metrics.keys()
    for name, values in figures.items():
        assert metrics[name][1] == 4 and not metrics[name][0].requires_grad
        assert math.isclose(metrics[name][0].item(), values.sum(), rel_tol=1e-5, abs_tol=1e-4), name


def test_smoothed_labels_cost_a_share_of_the_margin():
    """−(1−ε) log σ(m) − ε log σ(−m) is −log σ(m) + ε m, m being the margin of a pair; the other losses take no ε."""
    groups = referenced(some_examples(4, size=2))
    for loss_name, share in (("sigmoid", 0.2), ("hinge", 0.0)):
        plain, smoothed = (DPO(a_feed(groups), loss_name, BETA, label_smoothing=epsilon) for epsilon in (0.0, 0.2))
        (batch,) = next(plain.batches(0))
        (loss, metrics), (other, _) = (stage.loss(a_model(), batch) for stage in (plain, smoothed))
        margins = metrics["rewards/margins"][0].item()
        assert abs(margins) > 1 and math.isclose(other.item(), loss.item() + share * margins, rel_tol=1e-5)


@pytest.mark.parametrize("loss_name", PAIR_LOSSES)
def test_pairs_with_an_empty_answer_weigh_nothing(loss_name):
    """Alone they give zero and no NaN in any gradient; beside others they change nothing."""
    random = np.random.default_rng(1)
    empty = [a_sequence(random, np.arange(1, 20), 19), a_sequence(random, np.arange(1, 20), 25)]
    groups = some_examples(1, size=2)
    both, groups, only = (
        g if loss_name in WITHOUT_REFERENCE else referenced(g) for g in ([empty, *groups], groups, [empty])
    )
    loss, gradients = step_gradients(a_stage(only, loss_name, batch_size=1), a_model())
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    loss, gradients = step_gradients(a_stage(groups, loss_name, batch_size=1), a_model())
    with_empty, other = step_gradients(a_stage(both, loss_name, batch_size=2, micro_batch_size=2), a_model())
    assert math.isclose(loss, with_empty, rel_tol=1e-6)
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - other[name]) <= 1e-5 * np.linalg.norm(gradient)


def test_under_autocast_the_model_learns_and_not_the_reference():
    """Gradients in bf16 are those in fp32 within bf16's precision, though the reference is computed beside it without any."""
    groups = some_examples(2, size=2)
    stage, model = a_stage(groups, batch_size=2), a_model_with_adapters()
    (batch,) = next(stage.batches(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = stage.loss(model, batch)
    loss.backward()
    _, exact = step_gradients(stage, a_model_with_adapters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # bf16 has 8 bits; the loss was not divided by its weight of 2
            wanted = 2 * exact[name]
            assert np.linalg.norm(parameter.grad.numpy() - wanted) < 0.1 * np.linalg.norm(wanted), name


def test_dpo_raises_the_margin_of_held_out_like_pairs():
    """Chosen answers are of some four tokens, rejected ones of other four: accuracy goes from none to all."""
    random = np.random.default_rng(0)

    def pairs(count):
        for _ in range(count):
            prompt = random.integers(1, 97, 4)
            answers = random.integers(1, 5, 8), random.integers(5, 9, 8)
            yield [Sequence(np.concatenate([prompt, answer]), np.arange(12) >= 4) for answer in answers]

    model = a_model_with_adapters(learned=False)
    stage = a_stage(list(pairs(32)), batch_size=8, micro_batch_size=8, validation=list(pairs(16)))
    before = stage.evaluate(model, everything=False)
    assert before["val_accuracy"] == 0 and math.isclose(before["val_loss"], math.log(2), rel_tol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _, batches in zip(range(12), stage.batches(0), strict=False):
        for batch in batches:
            (stage.loss(model, batch)[0] / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = stage.evaluate(model, everything=False)
    assert after.keys() == {"val_loss", "val_accuracy"}
    assert after["val_accuracy"] == 1 and after["val_loss"] < 0.5 * before["val_loss"]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_is_the_mean_over_all_pairs_on_any_number_of_ranks(world_size):
    held_out = referenced(some_examples(4, size=2, shortest=6))
    model = a_model()
    sums = np.array([[answer_logprob(model, s).item() - s.columns[REFERENCE] for s in group] for group in held_out])
    margins = sums[:, 0] - sums[:, 1]

    def evaluate(rank, world_size):
        stage = a_stage(held_out, ranks=Ranks(rank, world_size, CPU), validation=held_out)
        return stage.evaluate(a_model(), everything=True)

    for figures in [evaluate(0, 1)] if world_size == 1 else run_ranks(evaluate, world_size):
        assert math.isclose(figures["val_loss"], np.logaddexp(0, -BETA * margins).mean(), rel_tol=1e-5)
        assert figures["val_accuracy"] == (margins > 0).mean()


# ---- KTO -------------------------------------------------------------------------------------------------------------


def a_kto_stage(groups, model, **feed) -> KTO:
    return KTO(a_feed(groups, **feed), model, BETA, desirable_weight=1.3, undesirable_weight=0.6)


@pytest.mark.parametrize("above", [True, False])
def test_kto_packed_is_the_papers_formula_of_answers_alone(above):
    """In float64 to 1e-5; a KL below 0 counts as 0; the reported figures are means over the answers of their kind."""
    groups = with_mismatches(labelled_examples(4, shortest=6), MAX_LENGTH)
    model = a_model()
    for seed in range(
        4, 40
    ):  # versions of torch draw other weights: the first reference on the wanted side of the model
        reference = a_model(seed)
        ratios = np.array(
            [[(answer_logprob(model, s) - answer_logprob(reference, s)).item() for s in g] for g in groups]
        )
        if (ratios[:, 1].mean() > 0) == above:
            break
    stage = a_kto_stage(referenced(groups, reference), model)
    (batch,) = next(stage.batches(0))
    assert len(batch.input_ids) < 4
    loss, metrics = stage.loss(model, batch)
    label = np.array([answer.columns["label"] for answer, _ in groups])
    kl = max(0.0, ratios[:, 1].mean())
    values = 1 - 1 / (1 + np.exp(-np.where(label > 0, 1, -1) * BETA * (ratios[:, 0] - kl)))
    expected = np.where(label > 0, 1.3, 0.6) * values
    assert batch.weight == 4 and (kl > 0) == above
    assert math.isclose(loss.item(), expected.sum(), rel_tol=1e-5)
    means = {name: (total / weight).item() if weight else 0 for name, (total, weight) in metrics.items()}
    assert math.isclose(means["kl"], kl, rel_tol=1e-5)
    for kind, mask in (("chosen", label > 0), ("rejected", label == 0)):
        assert math.isclose(means[f"rewards/{kind}"], BETA * ratios[mask, 0].mean(), rel_tol=1e-4)


def test_mismatches_have_the_prompt_of_one_example_and_the_answer_of_another():
    """The next example with another prompt, also around the end, cut to the row; labels and targets go along."""
    random = np.random.default_rng(3)
    a, b, c = np.arange(1, 5), np.arange(10, 13), np.arange(20, 40)
    examples = [[a_sequence(random, prompt, len(prompt) + 10, label=1.0)] for prompt in (a, a, b, c)]
    pairs = with_mismatches(examples, 24)
    for number, other in enumerate((2, 2, 3, 0)):
        (prompt, answer), mismatch = (examples[number][0], examples[other][0]), pairs[number][1]
        start = prompt.learned.argmax()
        expected = [*prompt.tokens[:start], *answer.tokens[answer.learned]][:24]
        assert mismatch.tokens.tolist() == expected and pairs[number][0] is prompt
        assert mismatch.learned.tolist() == [place >= start for place in range(len(expected))]
        assert mismatch.columns == {"label": 1.0}
    with pytest.raises(UserError, match="same prompt"):
        with_mismatches(examples[:2], 24)


def test_kto_evaluates_with_the_kl_of_the_held_out_answers():
    held_out = referenced(with_mismatches(labelled_examples(5, shortest=6), MAX_LENGTH))

    def evaluate(rank, world_size):
        model = a_model()
        stage = a_kto_stage(held_out, model, ranks=Ranks(rank, world_size, CPU), validation=held_out)
        return stage.evaluate(model, everything=True)

    alone = evaluate(0, 1)
    stage = a_kto_stage(held_out, a_model(), batch_size=5, micro_batch_size=5)
    losses = [stage.loss(a_model(), batch) for batch in next(stage.batches(0))]
    assert math.isclose(alone["val_loss"], sum(loss.item() for loss, _ in losses) / 5, rel_tol=1e-6)
    for figures in run_ranks(evaluate, 2):
        assert figures.keys() == {"val_loss", "val_kl"}
        assert all(math.isclose(figures[name], alone[name], rel_tol=1e-6) for name in alone)


# ---- beside TRL ------------------------------------------------------------------------------------------------------


def peers():
    """TRL 1.16's model side: our models' weights in transformers' class, with the head that TRL's losses read."""
    pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    models = []
    for ours in (a_model(), a_model(REFERENCE_SEED)):
        theirs = LlamaForCausalLM(LlamaConfig(**ours.config.to_hf()))
        theirs.load_state_dict(ours.state_dict())
        add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        models.append(theirs)
    return models


def trl_step(trainer_class, model, reference, inputs, **settings):
    """(loss, gradients) by TRL's own `_compute_loss`. The trainer is not set up by a run: that needs text and a tokenizer."""
    from accelerate import Accelerator

    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(
        accelerator=Accelerator(cpu=True), model=model, ref_model=reference, beta=BETA, aux_loss_enabled=False,
        precompute_ref_logps=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None), _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, **settings,
    )  # fmt: skip
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def split(sequence: Sequence) -> tuple[list[int], list[int]]:
    start = int(sequence.learned.argmax())
    return sequence.tokens[:start].tolist(), sequence.tokens[start:].tolist()


def assert_same_step(stage, theirs) -> None:
    """Loss, gradients of all weights, and what is reported, to 1e-5 of their size."""
    model = a_model()
    loss, gradients = step_gradients(stage, model)
    assert math.isclose(loss, theirs[0], rel_tol=1e-5)
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - theirs[1][name]) <= 1e-5 * np.linalg.norm(gradient), name
    (batch,) = next(stage.batches(0))
    _, metrics = stage.loss(model, batch)
    shared = metrics.keys() & theirs[2].keys()
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= shared
    for name in shared:
        total, weight = metrics[name]
        assert math.isclose(total.item() / weight, theirs[2][name], rel_tol=1e-5, abs_tol=1e-5), name


@pytest.mark.parametrize("loss_name", ["sigmoid", "ipo", "hinge"])
def test_pair_losses_and_gradients_are_trls(loss_name):
    model, reference = peers()
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    groups = some_examples(4, size=2, shortest=6)
    rows = [{"prompt_ids": split(c)[0], "chosen_ids": split(c)[1], "rejected_ids": split(r)[1]} for c, r in groups]
    theirs = trl_step(
        DPOTrainer, model, reference, DataCollatorForPreference(pad_token_id=0)(rows), ld_alpha=None,
        f_divergence_type="reverse_kl", loss_types=[loss_name], loss_weights=[1.0], use_weighting=False,
    )  # fmt: skip
    assert_same_step(a_stage(referenced(groups), loss_name), theirs)


def test_kto_and_its_gradients_are_trls():
    """On the same mismatched answers; TRL pairs them in batches of its dataset, a choice of no consequence here."""
    model, reference = peers()
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

    groups = with_mismatches(labelled_examples(4, shortest=6), MAX_LENGTH)
    rows = [
        {"prompt_ids": split(answer)[0], "completion_ids": split(answer)[1], "KL_completion_ids": split(mismatch)[1],
         "label": bool(answer.columns["label"])}
        for answer, mismatch in groups
    ]  # fmt: skip
    theirs = trl_step(
        KTOTrainer, model, reference, DataCollatorForUnpairedPreference(pad_token_id=0)(rows), calculate_KL=True,
        loss_type="kto", desirable_weight=1.3, undesirable_weight=0.6,
    )  # fmt: skip
    assert theirs[2]["kl"] > 0
    assert_same_step(a_kto_stage(referenced(groups), a_model()), theirs)


def test_a_side_of_several_sequences_counts_as_their_sum():
    """Answers of several turns, of which no one text shows all: log p of a side is that of its parts, each by itself."""
    drawn = iter(some_examples(7, size=1, shortest=6, longest=12))
    sizes = [(2, 1), (1, 1), (1, 2)]  # sequences of chosen and of rejected, of each pair
    pairs = [[[next(drawn)[0] for _ in range(size)] for size in sides if size] for sides in sizes[:2]]
    pairs.append([[next(drawn)[0]], [next(drawn)[0]]])
    groups = [
        [replace(one, columns={ENDS_SIDE: float(one is side[-1])}) for side in pair for one in side] for pair in pairs
    ]
    reference = a_model(REFERENCE_SEED)
    stage = a_stage(referenced(groups), batch_size=3)
    truth = a_model()
    ratios = [
        [sum((answer_logprob(truth, one) - answer_logprob(reference, one)).item() for one in side) for side in pair]
        for pair in pairs
    ]
    expected = sum(math.log1p(math.exp(-BETA * (chosen - rejected))) for chosen, rejected in ratios)
    batches = next(stage.batches(0))
    found = [stage.loss(a_model(), batch) for batch in batches]
    assert sum(batch.weight for batch in batches) == 3
    assert abs(sum(loss.item() for loss, _ in found) - expected) < 1e-4
    chosen = sum(metrics["rewards/chosen"][0].item() for _, metrics in found)
    assert abs(chosen - BETA * sum(ratio for ratio, _ in ratios)) < 1e-4
