"""Is the plan that is printed the run that is run?"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.actor_critic import ActorCritic, new_critic
from adapters.lora import add_adapters
from adapters.scalar_head import RewardModel
from batches.packing import Sequence
from bench.measure import tensor_peak_bytes
from families.new_models import ENCODERS, NEW_MODELS
from model import Transformer
from ranks import Ranks
from tests.tiers import grid
from training.config import TrainConfig
from training.optimizers import OPTIMIZERS, build_optimizers
from training.parallel import prepare_model
from training.plan import example_sizes, format_plan, learning_flops, model_shape, plan_run

CPU = torch.device("cpu")
EXAMPLES = {"data_dir": [], "init_from": "base", "train_data": ["a.jsonl"], "optimizer": "adamw", "sample_prompt": ""}
DRAWN = {**EXAMPLES, "reward_model": "judge", "max_new_tokens": 8}


def a_plan(**options):
    settings = {"data_dir": ["data"], "hidden_size": 64, "num_layers": 2, "num_heads": 2, "batch_size": 12} | options
    world_size, sizes = settings.pop("world_size", 1), settings.pop("sizes", {})
    config = TrainConfig(**settings)
    config.validate()
    model = model_shape(config, 300, 32, 0)
    plan = plan_run(
        config, model, max_length=32, world_size=world_size, half_precision=False, train_windows=100, **sizes
    )
    return config, model, plan


def bytes_of(*models: torch.nn.Module) -> int:
    return sum(parameter.nbytes for model in models for parameter in model.parameters())


def kept_bytes(compute) -> int:
    """What autograd keeps beside parameters in `compute()`."""
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = compute()
    del outputs
    return sum(saved.values())


def test_parameters_are_those_of_the_real_model():
    for tied in (False, True):
        _, model, plan = a_plan(tie_word_embeddings=tied, qk_norm=True, num_kv_heads=1)
        assert plan.parameters.total == sum(p.numel() for p in Transformer(model).parameters())
        assert model.vocab_size == 384  # 300, padded to a multiple of 128


def test_of_experts_the_plan_says_how_many_and_what_a_token_meets():
    """Two blocks of 8 experts, each of 3 matrices of 64 x 192, of which 2 work on a token; and a block without any."""
    config, model, plan = a_plan(model="qwen3_moe", intermediate_size=384)
    assert model.expert_size == 192
    idle = 2 * (8 - 2) * 3 * 64 * 192
    assert plan.parameters.active == sum(p.numel() for p in Transformer(model).parameters()) - idle
    said = format_plan(plan, config, model, {})
    assert ", 8 experts of 192, 2 a token, vocabulary" in said and "MLP" not in said
    assert f"; a token meets {plan.parameters.active:,}" in said
    mixed = replace(model, dense_layers=[1])
    assert "8 experts of 192, 2 a token, in 1 layers, MLP 384 in the others" in format_plan(plan, config, mixed, {})
    config, model, plan = a_plan()
    assert plan.parameters.active == plan.parameters.total and "meets" not in format_plan(plan, config, model, {})


@pytest.mark.parametrize("world_size,micro,accumulation", [(1, None, 1), (1, 5, 3), (2, 3, 2), (5, 1, 3), (2, 100, 1)])
def test_accumulation_covers_the_batch(world_size, micro, accumulation):
    config, _, plan = a_plan(world_size=world_size, micro_batch_size=micro)
    assert plan.accumulation_steps == accumulation
    assert plan.accumulation_steps * plan.micro_batch_size * world_size >= config.batch_size
    assert plan.tokens_per_step == 12 * 32


def test_totals_and_time():
    config, _, plan = a_plan(max_steps=50, world_size=2)
    assert plan.total_tokens == 50 * 12 * 32 and plan.epochs == 50 * 12 / 100
    assert plan.total_flops == plan.flops_per_token * plan.total_tokens
    assert plan.seconds(1e9) == plan.total_flops / 2e9
    assert config.resolved_warmup_steps == 5


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_memory_is_what_the_optimizers_hold(name, lora):
    """To the byte, but for step counters, beside weights and gradients."""
    stage = {**EXAMPLES, "stage": "sft", "lora": True, "lora_r": 64} if lora else {}
    schedule = {"schedule": "constant"} if name == "schedule_free" else {}
    _, shape, plan = a_plan(**stage | {"optimizer": name}, **schedule)
    model = Transformer(shape)
    model.init_weights(0, zero_residual=True)
    if lora:
        add_adapters(model, rank=64, alpha=8.0)
    optimizers = build_optimizers(model, name=name, learning_rate=1e-3, weight_decay=0.1)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()
    )
    if lora:
        weights_and_gradients = sum(2 * parameter.nbytes for parameter in learning)
        assert plan.memory["adapters, gradients and optimizer state (fp32)"] - weights_and_gradients == held
        return
    assert plan.memory[f"optimizer state ({'8-bit' if name == 'adamw8bit' else 'fp32'})"] == held
    assert plan.memory["weights (fp32)"] == 4 * plan.parameters.total == plan.memory["gradients (fp32)"]


def test_an_average_takes_as_much_as_the_weights_that_learn():
    for options in ({}, {**EXAMPLES, "stage": "ppo", "reward_model": "judge"}):
        _, _, plan = a_plan(ema=0.9, **options)
        assert plan.memory["weights' average (fp32)"] == 4 * plan.parameters.total
    _, _, adapted = a_plan(**EXAMPLES, stage="sft", lora=True, ema=0.9)
    assert (
        adapted.memory["weights' average (fp32)"] * 4
        == adapted.memory["adapters, gradients and optimizer state (fp32)"]
    )


@pytest.mark.parametrize("family", [None, *NEW_MODELS])
def test_activation_memory_is_near_what_autograd_saves(family):
    """Within 35 % of the bytes that autograd really keeps for the blocks: it is an estimate, and says so."""
    stage = "mlm" if family in ENCODERS else "pretrain"
    config, shape, plan = a_plan(batch_size=64, model=family, stage=stage, sample_prompt="")
    model = Transformer(shape)
    model.init_weights(0, zero_residual=False)
    kept = kept_bytes(lambda: model(torch.zeros(64, 32, dtype=torch.int64)))
    assert math.isclose(plan.memory["activations"], kept, rel_tol=0.35)
    assert "activations" in format_plan(plan, config, shape, {})


SETTINGS = [(setting, family) for setting in ("none", "selective", "full", "0.5") for family in (None, *NEW_MODELS)]


@pytest.mark.parametrize(
    ("setting", "family"), grid(SETTINGS, [(setting, None) for setting, f in SETTINGS if f is None])
)
def test_activation_memory_is_near_what_a_step_takes(setting, family):
    """Within 35 % of the peak of a forward and a backward pass of the blocks, whose gradients were there before."""
    stage = "mlm" if family in ENCODERS else "pretrain"
    options = {"batch_size": 64, "num_layers": 4, "model": family, "stage": stage, "sample_prompt": ""}
    _, shape, plan = a_plan(**options, activation_checkpointing=setting)
    model = Transformer(shape)
    model.init_weights(0, zero_residual=False)
    prepare_model(model, Ranks(0, 1, CPU), compile_model=False, again=setting)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(64, 32, dtype=torch.int64)
    taken = tensor_peak_bytes(lambda: model(ids).sum().backward(), CPU)
    assert math.isclose(plan.memory["activations"], taken, rel_tol=0.35)


@pytest.mark.parametrize("family", [model for model in NEW_MODELS if model not in ENCODERS])
def test_flops_of_every_family_are_those_that_torch_counts(family):
    """Exactly, of experts those that work on a token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    grouped = torch.ops.groundup
    mapping = {
        grouped.grouped_linear: lambda x, weight, *_, **__: 2 * x[0] * weight[1] * weight[2],
        grouped.grouped_linear_weight_gradient: lambda dy, x, *_, **__: 2 * dy[0] * dy[1] * x[1],
    }
    config = TrainConfig(hidden_size=64, num_layers=2, num_heads=4, model=family)
    shape, length = model_shape(config, 300, 32, 0), 16
    model = Transformer(shape)
    model.init_weights(0, zero_residual=False)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(torch.arange(length)[None])).sum().backward()
    assert counter.get_total_flops() == length * learning_flops(config, shape, length)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "model,stage,full,window", [("gemma3", "pretrain", [5], 512), ("modernbert", "mlm", [0, 3, 6], 64 + 1 + 64)]
)
def test_flops_of_sliding_windows_are_those_of_the_keys_that_they_hold(model, stage, full, window, lora):
    """Of 8 layers all but `full` see `window` keys; 12 FLOPs for each of them and each of the 64 values of the heads."""
    options = {"model": model, "stage": stage, "num_layers": 8, "hidden_size": 64, "num_heads": 2, "lora": lora}
    config = TrainConfig(**options, sample_prompt="")
    shape = model_shape(config, 300, 8192, 0)
    short, long = (learning_flops(config, shape, length) for length in (100, 5000))
    assert long - short == 12 * 64 * (len(full) * (5000 - 100) + (8 - len(full)) * (window - 100))
    assert short - learning_flops(config, shape, 50) == 12 * 64 * 8 * 50


@pytest.mark.parametrize("stage", ["pretrain", "reward", "ppo"])
@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_that_torch_counts(stage, lora):
    """torch's own counter on forward and backward, attention as explicit matrix products (so T² is counted): exactly.

    Beside frozen weights no gradient reaches the embedding, so the first layer's q, k and v and the A of their adapters
    need none of their input: the one thing that the formula counts and nothing computes. Score and value heads have one
    row each, and are counted by neither.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # adapters add to what W gave, which torch's table of operations, of shapes, lacks
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    config = TrainConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, lora=lora, lora_r=4, stage=stage)
    shape, length = model_shape(config, 300, 32, 0), 16
    policy = RewardModel(shape) if stage == "reward" else Transformer(shape)
    policy.init_weights(0, zero_residual=False)
    if stage == "reward":
        policy.init_score(0)
    names = (("policy", "value") if stage == "ppo" else ("default",)) if lora else ()
    for name in names:
        add_adapters(policy, rank=4, alpha=8.0, name=name)
    model = ActorCritic(policy, None if lora else new_critic(policy)) if stage == "ppo" else policy
    ids, positions = torch.arange(length)[None], torch.arange(length)[None]
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        if stage == "ppo":
            hidden, values = model(ids, positions, None)
            (policy.logits(hidden).sum() + values.sum()).backward()
        else:
            out = model(ids)
            (out if stage == "reward" else policy.logits(out)).sum().backward()
    unneeded = len(names) * length * 2 * (64 * (64 + 2 * 32) + 3 * 64 * 4)
    assert counter.get_total_flops() == length * learning_flops(config, shape, length) - unneeded


@pytest.mark.parametrize(
    "model,probability,share", [("bert", None, 0.15), ("modernbert", None, 0.3), ("bert", 0.5, 0.5)]
)
def test_flops_of_a_masked_language_models_head_are_those_of_what_is_masked(model, probability, share):
    """As torch counts them, with explicit attention, where the head works on that share of the tokens, in whole ones."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    options = {"stage": "mlm", "model": model, "mask_probability": probability, "sample_prompt": "", "num_layers": 1}
    config, shape, plan = a_plan(**options, num_heads=4)
    assert shape.head == "mlm" and plan.tokens_per_step == 12 * 32 and plan.tokens_are == ""
    encoder, length = Transformer(shape), 20
    encoder.init_weights(0, zero_residual=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = encoder(torch.arange(length)[None])
        encoder.logits(hidden[0, : round(share * length)]).sum().backward()
    counted = counter.get_total_flops()
    # the bias of the logits is counted as eight more columns of the product
    beside = 6 * round(share * length) * 8 * shape.vocab_size
    assert counted - beside == pytest.approx(length * learning_flops(config, shape, length))
    assert f"(the head's for the {share:.0%} that are masked)" in format_plan(plan, config, shape, {})


def test_pairs_are_rows_of_at_most_max_length():
    paired = {"stage": "mlm", "model": "bert", "next_sentence": True, "sample_prompt": ""}
    config, shape, plan = a_plan(**paired)
    assert shape.next_sentence and shape.pooler and shape.to_hf()["architectures"] == ["BertForPreTraining"]
    assert plan.tokens_per_step == 12 * 32 and "12 pairs = at most 384 tokens" in format_plan(plan, config, shape, {})


def test_memory_of_weights_is_that_of_each_stages_models():
    """Weights exactly as parameters of the real models, whose count the optimizer's state follows."""
    _, shape, sft = a_plan(**EXAMPLES, stage="sft")
    policy = Transformer(shape)
    assert sft.memory["weights (fp32)"] == bytes_of(policy) and "reference (frozen)" not in sft.memory
    _, _, dpo = a_plan(**EXAMPLES, stage="dpo")
    assert dpo.memory["weights (fp32)"] == bytes_of(policy) and "reference (frozen)" not in dpo.memory
    _, _, reward = a_plan(**EXAMPLES, stage="reward")
    assert reward.memory["weights (fp32)"] == bytes_of(RewardModel(shape)) and len(reward.memory) == 4
    _, _, ppo = a_plan(**DRAWN, stage="ppo")
    assert ppo.memory["weights (fp32)"] == bytes_of(policy, new_critic(policy))
    assert ppo.memory["optimizer state (fp32)"] == 2 * ppo.memory["weights (fp32)"]
    assert ppo.memory["reference (frozen)"] == bytes_of(policy)
    assert ppo.memory["reward model (taken to be as large)"] == bytes_of(RewardModel(shape))
    _, _, grpo = a_plan(**DRAWN, stage="grpo")
    assert grpo.memory["weights (fp32)"] == bytes_of(policy) and "reference (frozen)" not in grpo.memory
    _, _, grpo = a_plan(**DRAWN, stage="grpo", kl_coefficient=0.1)
    assert grpo.memory["reference (frozen)"] == bytes_of(policy)
    _, _, lora = a_plan(**DRAWN, stage="ppo", lora=True, kl_coefficient=0.1, lora_r=4)
    for name in ("policy", "value"):
        add_adapters(policy, rank=4, alpha=8.0, name=name)
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert lora.memory["adapters, gradients and optimizer state (fp32)"] == 16 * adapters
    assert lora.memory["weights (frozen)"] == bytes_of(policy) - 4 * adapters
    assert "reference (frozen)" not in lora.memory


def test_ppo_keeps_the_activations_of_policy_and_critic():
    """Within 35 % of what autograd keeps, with a critic of its own and with two adapters."""
    for lora in (False, True):
        _, shape, plan = a_plan(**DRAWN, stage="ppo", batch_size=64, lora=lora, lora_r=4)
        policy = Transformer(shape)
        policy.init_weights(0, zero_residual=False)
        for name in ("policy", "value") if lora else ():
            add_adapters(policy, rank=4, alpha=8.0, name=name)
        model = ActorCritic(policy, None if lora else new_critic(policy))
        ids = torch.zeros(64, 32, dtype=torch.int64)
        kept = kept_bytes(lambda model=model, ids=ids: model(ids, torch.arange(32).expand(64, 32), None))
        assert math.isclose(plan.memory["activations"], kept, rel_tol=0.35)


def test_answers_are_drawn_when_there_is_nothing_to_learn_from_them_yet():
    """Keys and values of the rows that are drawn at once; beside what lasts only the larger of drawing and learning."""
    _, shape, plan = a_plan(**DRAWN, stage="grpo", group_size=4, rollout_batch_size=16)
    drawing = plan.memory["drawing answers (keys, values, logits)"]
    keys_values = 16 * 32 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2 * 4
    assert keys_values < drawing < keys_values + 16 * shape.vocab_size * 32
    lasting = ("weights (fp32)", "optimizer state (fp32)", "reward model (taken to be as large)")
    rest = sum(plan.memory.values()) - drawing - sum(plan.memory[part] for part in lasting)
    assert plan.memory_total == sum(plan.memory[part] for part in lasting) + max(drawing, rest)
    _, _, few = a_plan(**DRAWN, stage="grpo", group_size=4, batch_size=2, rollout_batch_size=16)
    assert few.memory["drawing answers (keys, values, logits)"] == drawing / 2


def test_examples_are_counted_by_their_tokens():
    """Pairs of 10 and 20 tokens, answers to prompts of 5 and 9; without them, rows of --max_length."""
    pairs = [[Sequence(np.arange(n), np.ones(n, bool)) for n in (10, 20)] for _ in range(3)]
    config, shape, plan = a_plan(**EXAMPLES, stage="dpo")
    assert plan.tokens_per_step == 12 * 2 * 32 and "at most 768 tokens" in format_plan(plan, config, shape, {})
    sizes = example_sizes(config, pairs)
    assert sizes == {"tokens_per_example": 30.0}
    config, _, plan = a_plan(**EXAMPLES, stage="dpo", sizes=sizes, max_steps=50)
    assert (plan.tokens_per_step, plan.total_tokens) == (12 * 30, 50 * 12 * 30) and plan.epochs == 50 * 12 / 100
    config, _, _ = a_plan(**EXAMPLES, stage="dpo", dpo_loss="kto")
    assert example_sizes(config, pairs) == {"tokens_per_example": 10.0}
    prompts = [Sequence(np.arange(n), np.zeros(n, bool)) for n in (5, 9)]
    config, _, _ = a_plan(**DRAWN, stage="grpo", group_size=4)
    assert example_sizes(config, prompts) == {"tokens_per_example": 4 * (7 + 8.0), "longest_prompt": 9}
    config, _, plan = a_plan(**DRAWN, stage="ppo", max_steps=100)  # each answer is learned from in four epochs
    assert plan.epochs == 100 * 12 / 100 / 4


def test_a_run_that_ends_in_its_warm_up_is_told():
    config, shape, plan = a_plan(max_steps=10, warmup_steps=20)
    assert "--warmup_steps" in format_plan(plan, config, shape, {})
    config, shape, plan = a_plan(max_steps=100, warmup_steps=20)
    assert "warning" not in format_plan(plan, config, shape, {})
