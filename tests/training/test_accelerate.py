"""Does a run do what `accelerate launch` was asked for, and is what cannot be done refused? Without Accelerate.

The environments are what `accelerate launch` 1.15 sets; that it does is in tests/distributed/test_launchers.py.
"""

from pathlib import Path

import pytest

from errors import UserError
from training.config import of_launcher, resolve_config

SHIPPED = str(Path(__file__).resolve().parent.parent.parent / "configs/deepspeed/zero2.json")
PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
FSDP = PLAIN | {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_FORWARD_PREFETCH": "false", "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip
FIRST = FSDP | {"FSDP_VERSION": "1"}
ZERO = PLAIN | {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}  # fmt: skip
MESH = FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}


@pytest.fixture
def resolved(monkeypatch):
    def resolve(environment: dict[str, str], **given):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return resolve_config({"data_dir": ["data"], **given})

    return resolve


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (FSDP, {"strategy": "fsdp", "reshard_after_forward": True, "offload": "none", "shard_size": None}),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"strategy": "fsdp", "reshard_after_forward": False}),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {"strategy": "fsdp", "offload": "all"}),
        (FSDP | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"strategy": "fsdp", "mixed_precision": "bf16"}),
        (MESH | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {"shard_size": 4}),
        (MESH | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}, {"shard_size": None}),
        (MESH | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, {"tensor_parallel": 2, "context_parallel": 1}),
        (
            MESH | {"PARALLELISM_CONFIG_CP_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
            {"context_parallel": 2, "shard_size": 8},
        ),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"activation_checkpointing": "full"}),
        (FIRST, {"strategy": "fsdp", "reshard_after_forward": True, "shard_size": None}),
        (FIRST | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"reshard_after_forward": False, "shard_size": None}),
        (FIRST | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"reshard_after_forward": True, "shard_size": 2}),
        (FIRST | {"FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        (ZERO, {"strategy": "deepspeed", "grad_clip": 0.5, "batch_size": 32}),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "auto"}, {"strategy": "deepspeed", "grad_clip": 1.0}),
        (ZERO | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"strategy": "deepspeed", "mixed_precision": "bf16"}),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": SHIPPED}, {"strategy": "deepspeed", "deepspeed": SHIPPED}),
        (PLAIN, {"strategy": "ddp", "mixed_precision": "auto", "compile_model": False}),
        (PLAIN | {"ACCELERATE_MIXED_PRECISION": "fp16"}, {"strategy": "ddp", "mixed_precision": "fp16"}),
        (PLAIN | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile_model": True}),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}, {"device": "cpu"}),
    ],
)
def test_what_the_launcher_says_are_options(environment, expected, resolved):
    config, _ = resolved(environment, optimizer="adamw")
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (FIRST | {"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "FSDP_SHARDING_STRATEGY=NO_SHARD"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP"),
        (MESH | {"PARALLELISM_CONFIG_SP_SIZE": "2"}, "PARALLELISM_CONFIG_SP_SIZE=2"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "zero_optimization.offload_optimizer is not here",
        ),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_optimization.stage must be 1, 2 or 3"),
        (PLAIN | {"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8"),
        (PLAIN | {"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true"),
        (PLAIN | {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}, "ACCELERATE_DYNAMO_BACKEND=AOT_EAGER"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "starts no ranks by itself"),
    ],
)
def test_what_is_not_here_is_refused_by_name(environment, words, resolved):
    with pytest.raises(UserError, match=words):
        resolved(environment)


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        (FSDP, {"strategy": "ddp"}, "--strategy fsdp, and the command for --strategy ddp"),
        (FSDP, {"reshard_after_forward": False}, "--reshard_after_forward, and the command for --no-reshard"),
        (PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "none"}, "ACCELERATE_MIXED_PRECISION"),
        (ZERO, {"grad_clip": 1.0}, r"\(gradient_clipping\) asks for --grad_clip 0.5"),
        (ZERO, {"strategy": "fsdp"}, "ACCELERATE_USE_DEEPSPEED"),
        ({}, {"strategy": "accelerate"}, "start the run with `accelerate launch"),
    ],
)
def test_a_command_that_says_something_else_is_refused(environment, given, words, resolved):
    with pytest.raises(UserError, match=words):
        resolved(environment, **given)


def test_the_same_said_twice_is_no_contradiction(resolved):
    for strategy in ("fsdp", "accelerate"):
        assert resolved(FSDP, strategy=strategy, optimizer="adamw")[0].strategy == "fsdp"


def test_a_run_that_goes_on_follows_the_launcher_it_is_started_with_now(resolved):
    saved = {"strategy": "fsdp", "reshard_after_forward": False}
    resumed = resolve_config({"data_dir": ["data"]}, saved)[0]
    assert (resumed.strategy, resumed.reshard_after_forward) == ("fsdp", False)
    assert resolved(PLAIN, strategy="accelerate")[0].strategy == "ddp"


def test_the_start_of_a_run_says_what_was_understood(resolved):
    config, origins = resolved(FSDP | {"FSDP_OFFLOAD_PARAMS": "true"})
    assert of_launcher(config, origins) == [
        "accelerate launch: as with --strategy fsdp --reshard_after_forward --offload all"
    ]
