"""Is the plan that is printed the run that is run?"""

import math

import pytest
import torch

from model import Transformer
from training.config import TrainConfig
from training.plan import format_plan, model_shape, plan_run


def a_plan(**options):
    settings = {"data_dir": ["data"], "hidden_size": 64, "num_layers": 2, "num_heads": 2, "batch_size": 12} | options
    world_size = settings.pop("world_size", 1)
    config = TrainConfig(**settings)
    config.validate()
    model = model_shape(config, 300, 32, 0)
    plan = plan_run(config, model, max_length=32, world_size=world_size, half_precision=False, train_windows=100)
    return config, model, plan


def test_parameters_are_those_of_the_real_model():
    for tied in (False, True):
        _, model, plan = a_plan(tie_word_embeddings=tied, qk_norm=True, num_kv_heads=1)
        assert plan.parameters.total == sum(p.numel() for p in Transformer(model).parameters())
        assert model.vocab_size == 384  # 300, padded to a multiple of 128


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


def test_state_memory_is_what_the_optimizers_hold():
    """Weights, gradients and optimizer state exactly; AdamW keeps 8 bytes a parameter, Muon 4 for each hidden matrix's."""
    from training.optimizers import build_optimizers

    for name in ("muon", "adamw"):
        _, shape, plan = a_plan(optimizer=name)
        model = Transformer(shape)
        model.init_weights(0, zero_residual=True)
        optimizers = build_optimizers(model, name=name, learning_rate=1e-3, weight_decay=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        held = sum(
            value.numel() * value.element_size()
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if value.dim()
        )
        # the closed form counts the norms, some hundred values, with the matrices
        assert math.isclose(plan.memory["optimizer state (fp32)"], held, rel_tol=0.01)
        assert plan.memory["weights (fp32)"] == 4 * plan.parameters.total == plan.memory["gradients (fp32)"]


def test_activation_memory_is_near_what_autograd_saves():
    """Within 35 % of the bytes that autograd really keeps for the blocks: it is an estimate, and says so."""
    config, shape, plan = a_plan(batch_size=64)
    model = Transformer(shape)
    model.init_weights(0, zero_residual=False)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(torch.zeros(64, 32, dtype=torch.int64))
    assert math.isclose(plan.memory["activations"], sum(saved.values()), rel_tol=0.35)
    assert hidden.requires_grad and "activations" in format_plan(plan, config, shape, {})


def test_a_run_that_ends_in_its_warm_up_is_told():
    config, shape, plan = a_plan(max_steps=10, warmup_steps=20)
    assert "--warmup_steps" in format_plan(plan, config, shape, {})
    config, shape, plan = a_plan(max_steps=100, warmup_steps=20)
    assert "warning" not in format_plan(plan, config, shape, {})
