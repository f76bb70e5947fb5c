"""What does a DeepSpeed config (JSON, as people have it) ask of a run?

Each key is one of three: an option of this project, which the loop follows; a setting of ZeRO, which DeepSpeed's engine is
given as it stands; or nothing that there is here, which is refused by name, as DeepSpeed would not say so. "auto" is what
the run's options say. How the engine is run is in training/deepspeed.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from training.accelerate import Said

AUTO = "auto"
_OFF = (None, False, AUTO)
_ZERO = (  # what the engine is given; "auto" is worked out here where transformers does so, else left to DeepSpeed
    "stage", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
    "contiguous_gradients", "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
)  # fmt: skip
_ZERO_UNREAD = (  # of DeepSpeed's own checkpoints, of which none are written
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
)  # fmt: skip
_UNREAD = ("steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
_SECTIONS = ("optimizer", "scheduler", "bf16", "fp16", "zero_optimization")
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def read_settings(text: str) -> dict[str, Any]:
    """The config that --deepspeed means: a file, or the JSON itself where it begins with "{". UserError."""
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed {text} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--deepspeed {text} is no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise UserError(f"--deepspeed {text} has no section zero_optimization, which says what is shared out")
    return found


def options_of_settings(settings: Mapping[str, Any], chosen: Mapping[str, Any], world_size: int) -> dict[str, Said]:
    """Options by name, as a DeepSpeed config has them; what is "auto" is none. UserError for what is not here.

    chosen: the run's options from elsewhere, of which batch sizes are completed.
    """
    _refuse_unknown(settings)
    found = {"strategy": Said("deepspeed", "--deepspeed")}

    def add(option: str, value: Any, key: str, kind: type = float) -> None:
        if value in (None, AUTO):
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
            raise UserError(f"--deepspeed: {key} must be a number or {AUTO!r}, and is {value!r}")
        found[option] = Said(kind(value), f"--deepspeed ({key})")

    add("grad_clip", settings.get("gradient_clipping"), "gradient_clipping")
    add("batch_size", settings.get("train_batch_size"), "train_batch_size", int)
    add("micro_batch_size", settings.get("train_micro_batch_size_per_gpu"), "train_micro_batch_size_per_gpu", int)
    _complete_batch(settings, found, chosen, world_size)
    precision = settings.get("bf16", {}).get("enabled", AUTO)
    if precision != AUTO:
        found["mixed_precision"] = Said("bf16" if precision else "none", "--deepspeed (bf16.enabled)")
    if optimizer := settings.get("optimizer"):
        params = _section(optimizer, "optimizer", ("AdamW", "Adam"))
        found["optimizer"] = Said("adamw", "--deepspeed (optimizer.type)")
        add("learning_rate", params.pop("lr", None), "optimizer.params.lr")
        add("weight_decay", params.pop("weight_decay", None), "optimizer.params.weight_decay")
        betas = params.pop("betas", AUTO)
        for place, name in enumerate(("beta1", "beta2") if betas != AUTO else ()):
            add(name, betas[place], "optimizer.params.betas")
        _only(
            params, "optimizer.params", {"eps": (1e-8, AUTO), "adam_w_mode": (True, AUTO), "bias_correction": (True,)}
        )
    if scheduler := settings.get("scheduler"):
        params = _section(scheduler, "scheduler", tuple(_SCHEDULES))
        found["schedule"] = Said(_SCHEDULES[scheduler["type"]], "--deepspeed (scheduler.type)")
        add("warmup_steps", params.pop("warmup_num_steps", None), "scheduler.params.warmup_num_steps")
        add("max_steps", params.pop("total_num_steps", None), "scheduler.params.total_num_steps", int)
        add("learning_rate", params.pop("warmup_max_lr", None), "scheduler.params.warmup_max_lr")
        add("min_lr_fraction", params.pop("cos_min_ratio", None), "scheduler.params.cos_min_ratio")
        start = {"warmup_min_lr": (0, AUTO), "warmup_min_ratio": (0, AUTO), "warmup_type": ("linear", AUTO)}
        _only(params, "scheduler.params", start)
    return found


def engine_settings(
    settings: Mapping[str, Any], *, grad_clip: float, hidden_size: int, world_size: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. The loop counts micro-batches and rows, so to the engine each step is one."""
    zero = {name: value for name, value in settings["zero_optimization"].items() if name in _ZERO}
    by_width = {  # as transformers resolves them
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = {name: by_width.get(name) if value == AUTO else value for name, value in zero.items()}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "zero_optimization": {name: value for name, value in zero.items() if value is not None},
        "steps_per_print": None,
    }


def stage_of(settings: Mapping[str, Any]) -> int:
    return settings["zero_optimization"].get("stage", 0)


def _complete_batch(
    settings: Mapping[str, Any], found: dict[str, Said], chosen: Mapping[str, Any], world_size: int
) -> None:
    """Of rows a step, rows a pass and passes a step the one that two of them leave open. UserError where they disagree."""
    passes = settings.get("gradient_accumulation_steps", AUTO)
    if passes == AUTO:
        return
    if not isinstance(passes, int) or passes < 1:
        raise UserError(f"--deepspeed: gradient_accumulation_steps must be a number or 'auto', and is {passes!r}")
    rows, micro = (
        found[name].value if name in found else chosen.get(name) for name in ("batch_size", "micro_batch_size")
    )
    where = "--deepspeed (gradient_accumulation_steps)"
    if rows is None:
        if micro is not None:
            found["batch_size"] = Said(micro * passes * world_size, where)
        elif passes > 1:
            raise UserError(f"{where} is {passes}: give --batch_size too, the rows of a step on all ranks together")
    elif micro is None:
        if rows % (passes * world_size):
            raise UserError(f"{where} is {passes}: {rows} rows a step cannot be shared by {world_size} ranks so often")
        found["micro_batch_size"] = Said(rows // (passes * world_size), where)
    elif micro * passes * world_size != rows:
        raise UserError(
            f"{where} is {passes}, and {micro} rows a pass on {world_size} ranks make {micro * passes * world_size} rows a "
            f"step, not {rows}: leave one of the three at 'auto'"
        )


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        known = name in (*_UNREAD, *_SECTIONS, *_SIZES, "gradient_clipping")
        is_off = value in _OFF or (isinstance(value, dict) and value.get("enabled", True) in _OFF)
        if not known and not is_off and (name, value) != ("communication_data_type", "fp32"):
            raise UserError(f"--deepspeed: {name} is not for this project; leave it out")
    if settings.get("fp16", {}).get("enabled", AUTO) not in _OFF:
        raise UserError("--deepspeed: fp16.enabled is not here, as its loss scale is in no checkpoint: choose bf16")
    zero = settings["zero_optimization"]
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(f"--deepspeed: zero_optimization.stage must be 1, 2 or 3, and is {zero.get('stage')}")
    for name, value in zero.items():
        if name in ("offload_optimizer", "offload_param"):
            if (value or {}).get("device", "none") not in ("none", None):
                raise UserError(f"--deepspeed: zero_optimization.{name} is not here: use --strategy fsdp --offload all")
        elif name not in (*_ZERO, *_ZERO_UNREAD) and value not in _OFF:
            raise UserError(f"--deepspeed: zero_optimization.{name} is not for this project; leave it out")


def _section(section: Any, name: str, types: tuple[str, ...]) -> dict[str, Any]:
    """The params of an optimizer or a scheduler of one of these types. UserError."""
    if not isinstance(section, dict) or section.get("type") not in types:
        found = section.get("type") if isinstance(section, dict) else section
        raise UserError(f"--deepspeed: {name}.type must be {' or '.join(types)}, and is {found}")
    return dict(section.get("params", {}))


def _only(params: dict[str, Any], where: str, allowed: dict[str, tuple]) -> None:
    """UserError for a parameter that is none of these, or has none of its values."""
    for name, value in params.items():
        if name not in allowed and name not in ("torch_adam", "fused"):
            raise UserError(f"--deepspeed: {where}.{name} is not for this project; leave it out")
        if name in allowed and value not in allowed[name]:
            raise UserError(f"--deepspeed: {where}.{name} must be {allowed[name][0]!r}, and is {value!r}")
