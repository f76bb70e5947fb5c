"""What does `accelerate launch` ask of a run, and which options say the same?

The launcher (Hugging Face Accelerate) starts ranks as torchrun does, and leaves what its config file and flags say in the
environment, where Accelerate's own classes would find it. It is read here, without Accelerate, and becomes options of this
project: the loop, the sharding and the checkpoints are this project's own. What has no such option is refused by name.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from errors import UserError


class Said(NamedTuple):
    """An option's value, and where it was said, in the words of a message."""

    value: Any
    where: str


_LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # which the launcher always sets
_FALSE = ("", "false", "no", "none", "0")
_SHARDING = {  # of FSDP version 1, by number and by name: (reshard_after_forward, whether each machine has a copy)
    "1": (True, False), "FULL_SHARD": (True, False), "2": (False, False), "SHARD_GRAD_OP": (False, False),
    "4": (True, True), "HYBRID_SHARD": (True, True), "5": (False, True), "HYBRID_SHARD_ZERO2": (False, True),
}  # fmt: skip
_SHARED = {"tensor_parallel": "TP", "context_parallel": "CP"}
_REFUSED = {  # what must be off, or one of these values, with the reason
    "ACCELERATE_USE_MEGATRON_LM": (_FALSE, "Megatron-LM is not used here"),
    "FSDP_AUTO_WRAP_POLICY": ((*_FALSE, "transformer_based_wrap"), "what is gathered at once is always a block"),
    "FSDP_BACKWARD_PREFETCH": ((*_FALSE, "backward_pre", "1"), "the next block is always gathered during this one's"),
    "FSDP_FORWARD_PREFETCH": (_FALSE, "the order of a forward pass is FSDP2's own"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (_FALSE, "activations stay on the device"),
    "FSDP_IGNORED_MODULES": (_FALSE, "all modules are shared out"),
    "PARALLELISM_CONFIG_SP_SIZE": ((*_FALSE, "1"), "rows are shared by --context_parallel (cp_size)"),
    "ACCELERATE_DYNAMO_BACKEND": ((*_FALSE, "inductor"), "--compile_model compiles with torch's inductor"),
    "ACCELERATE_DYNAMO_MODE": ((*_FALSE, "default"), "--compile_model compiles in torch's default mode"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": (_FALSE, "graph breaks are no error here"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": (_FALSE, "torch finds out which shapes change"),
}


def options_of_launcher(environment: Mapping[str, str], asked: bool) -> dict[str, Said]:
    """Options by name, as the environment of `accelerate launch` has them. UserError for what is not here.

    asked: by --strategy accelerate; else nothing is said where nothing was launched so. A launcher that says "no" of a
    precision, which it does where nobody chose one, says nothing.
    """
    if _LAUNCHED not in environment:
        if asked:
            raise UserError(
                "--strategy accelerate: start the run with `accelerate launch train.py ...`, whose config is read"
            )
        return {}
    _refuse_single_process(environment)
    found = _common(environment)
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        found |= _fsdp(environment)
    elif asked and not _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        found["strategy"] = Said("ddp", "accelerate launch (without a plugin)")
    elif _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        found["strategy"] = Said("deepspeed", "accelerate launch (ACCELERATE_USE_DEEPSPEED)")
        found["deepspeed"] = Said(_deepspeed(environment), "accelerate launch (its DeepSpeed plugin)")
    return found


def _refuse_single_process(environment: Mapping[str, str]) -> None:
    """Asked for several processes on CPUs the launcher leaves starting them to MPI, and without it starts one, silently."""
    if "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate launch --cpu starts no ranks by itself: choose --multi_gpu with the same --num_processes and give "
            "train.py --device cpu, or use torchrun"
        )


def _common(environment: Mapping[str, str]) -> dict[str, Said]:
    """What each kind of launch may say: the precision, the device and whether to compile."""
    for name, (allowed, reason) in _REFUSED.items():
        if (value := environment.get(name, "")).lower() not in allowed:
            raise UserError(f"accelerate launch: {name}={value} is not for this project, as {reason}")
    found: dict[str, Said] = {}
    precision = environment[_LAUNCHED].lower()
    if precision not in (*_FALSE, "bf16", "fp16"):
        raise UserError(f"accelerate launch: {_LAUNCHED}={precision} is not here; choose bf16, fp16 or no")
    if precision not in _FALSE:
        found["mixed_precision"] = Said(precision, f"accelerate launch ({_LAUNCHED})")
    if _is_on(environment, "ACCELERATE_USE_CPU"):
        found["device"] = Said("cpu", "accelerate launch (ACCELERATE_USE_CPU)")
    if _is_on(environment, "ACCELERATE_DYNAMO_BACKEND"):
        found["compile_model"] = Said(True, "accelerate launch (ACCELERATE_DYNAMO_BACKEND)")
    return found


def _fsdp(environment: Mapping[str, str]) -> dict[str, Said]:
    """The FSDP plugin's settings, of version 1 or 2. Those of how Accelerate starts and saves a model are not needed."""
    name = "FSDP_RESHARD_AFTER_FORWARD"
    shard_size, sizes = None, {}
    if environment.get("FSDP_VERSION", "1") == "1":
        # a sharding strategy may also stand where version 2 has a yes or no
        name = name if environment.get(name, "").upper() in _SHARDING else "FSDP_SHARDING_STRATEGY"
        strategy = environment.get(name, "FULL_SHARD").upper()
        if strategy not in _SHARDING:
            raise UserError(
                f"accelerate launch: {name}={strategy} shares no weights: leave the FSDP plugin out, for --strategy ddp"
            )
        reshard, by_machine = _SHARDING[strategy]
        shard_size = _number(environment, "LOCAL_WORLD_SIZE") if by_machine else None
    else:
        reshard = _is_on(environment, name, default="true")
        if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
            size = _number(environment, "PARALLELISM_CONFIG_DP_SHARD_SIZE")
            copies = _number(environment, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE")
            sizes = {
                option: _number(environment, f"PARALLELISM_CONFIG_{part}_SIZE") for option, part in _SHARED.items()
            }
            shard_size = size * sizes["context_parallel"] if copies > 1 else None
    found = {
        "strategy": Said("fsdp", "accelerate launch (ACCELERATE_USE_FSDP)"),
        "reshard_after_forward": Said(reshard, f"accelerate launch ({name})"),
    }
    for option, size in sizes.items():
        if size > 1:
            found[option] = Said(size, f"accelerate launch (PARALLELISM_CONFIG_{_SHARED[option]}_SIZE)")
    if _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        found["activation_checkpointing"] = Said("full", "accelerate launch (FSDP_ACTIVATION_CHECKPOINTING)")
    if shard_size is not None:
        found["shard_size"] = Said(shard_size, "accelerate launch (its hybrid sharding)")
    if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
        found["offload"] = Said("all", "accelerate launch (FSDP_OFFLOAD_PARAMS)")
    return found


def _deepspeed(environment: Mapping[str, str]) -> str:
    """What --deepspeed is given: the plugin's config file, or its own settings as JSON.

    zero3_init_flag changes nothing: a model is whole on each rank before DeepSpeed shares it out (docs/launchers.md).
    """
    prefix = "ACCELERATE_DEEPSPEED_"
    if _is_on(environment, f"{prefix}CONFIG_FILE"):
        return environment[f"{prefix}CONFIG_FILE"]
    zero: dict[str, Any] = {"stage": _number(environment, f"{prefix}ZERO_STAGE", "2")}
    for part in ("optimizer", "param"):
        device = environment.get(f"{prefix}OFFLOAD_{part.upper()}_DEVICE", "none")
        zero |= {f"offload_{part}": {"device": device}} if device != "none" else {}
    settings: dict[str, Any] = {"zero_optimization": zero}
    if "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in environment:
        passes = environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
        settings["gradient_accumulation_steps"] = int(passes) if passes.isdigit() else passes
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    settings["gradient_clipping"] = clipping if clipping in ("auto", "none") else float(clipping)
    return json.dumps({name: value for name, value in settings.items() if value not in ("auto", "none")})


def _is_on(environment: Mapping[str, str], name: str, default: str = "") -> bool:
    return environment.get(name, default).lower() not in _FALSE


def _number(environment: Mapping[str, str], name: str, default: str = "1") -> int:
    try:
        return int(environment.get(name, default))
    except ValueError as error:
        raise UserError(f"accelerate launch: {name} must be a number, and is {environment[name]!r}") from error
