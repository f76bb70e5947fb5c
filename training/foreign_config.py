"""What do other tools call our options, and what do their --config files say in our words?

Flat files with the names of transformers and TRL (`per_device_train_batch_size`), files with groups (`model.name`,
`lora.r`, `training.…`), and plans with [datasets.NAME] and [[stages]] of a `stage_type`. One table has every name: one that
means an option of ours, one that is accepted where it asks for what is the case anyway, and one that is refused, with the
reason. Our own names may stand beside them. What was read as what is said before a run begins. The names of teaching scripts
(`start_context`) are each option's `aliases`, in training/option_groups.py.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from training.option_groups import SPECS, STAGES, TEXT_STAGES


@dataclass(frozen=True)
class Is:
    """Another name of `option`. values: what its values are called; one that is not there is refused."""

    option: str
    values: dict[Any, Any] | None = None


@dataclass(frozen=True)
class Only:
    """Accepted with these values, for that is the case anyway; any other is refused with the reason."""

    accepted: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Unused:
    """Changes nothing of what is trained here, whatever its value; said, with the reason."""

    reason: str


_OFF = (False, None, "no", "none", "")
_SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine",
    "polynomial": "polynomial", "inverse_sqrt": "inverse_sqrt", "constant": "constant", "constant_with_warmup": "constant",
}  # fmt: skip
_ATTENTION = {
    "sdpa": "sdpa", "flash_attention_2": "flash-attn", "flash_attention_3": "fa3", "flex_attention": "flex", None: "auto",
}  # fmt: skip
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw8bit"),
    "muon": "muon", "adafactor": "adafactor", "schedule_free_adamw": "schedule_free",
}  # fmt: skip
_IN_STEPS = "evaluations and checkpoints are counted in steps here: give eval_steps or save_steps"

NAMES: dict[str, Is | Only | Unused] = {
    # what is trained
    "model_name_or_path": Is("init_from"),
    "stage_type": Is("stage"),
    "torch_dtype": Is("precision of dtype"),
    "dtype": Is("precision of dtype"),
    "bnb_4bit_compute_dtype": Is("precision of compute"),
    "bf16": Is("precision of bf16"),
    "fp16": Is("precision of fp16"),
    "attn_implementation": Is("attention", _ATTENTION),
    "use_lora": Is("lora"),
    "use_peft": Is("lora"),
    "use_rslora": Is("rslora"),
    "use_dora": Is("dora"),
    "bias": Only(("none", None), "adapters have no biases here"),
    "task_type": Only(("CAUSAL_LM", "SEQ_CLS", None), "only language models and their scores are trained here"),
    "load_in_8bit": Only(_OFF, "weights are kept in 4 bits (load_in_4bit) or whole"),
    "bnb_4bit_quant_type": Only(("nf4",), "the only 4-bit format here is NF4"),
    "bnb_4bit_use_double_quant": Only((True,), "the scales of NF4's blocks are always quantised, too"),
    "use_bnb_nested_quant": Only((True,), "the scales of NF4's blocks are always quantised, too"),
    "trust_remote_code": Only(_OFF, "no code from a model's folder is ever run"),
    "device_map": Only((None,), "a model is not spread over devices: torchrun gives each of them a whole one"),
    "use_cache": Only((False, None), "there is no key-value cache in training"),
    "gradient_checkpointing": Is("activation_checkpointing", {True: "full", **dict.fromkeys(_OFF, "none")}),
    "gradient_checkpointing_kwargs": Unused("a block is computed again in one way alone"),
    "deepspeed": Is("deepspeed"),
    "fsdp": Only(
        (None, "", ()), "weights are shared out by strategy (fsdp), shard_size, reshard_after_forward and offload"
    ),
    "torch_compile": Is("compile_model"),
    "use_liger_kernel": Unused("--kernels chooses the fused kernels of this project"),
    # examples
    "dataset_path": Is("train_data"),
    "dataset_name": Is("train_data"),
    "train_file": Is("train_file"),
    "validation_file": Is("val_file"),
    "max_seq_length": Is("max_length"),
    "assistant_only_loss": Is("train_on", {True: "assistant", False: "all"}),
    "completion_only_loss": Is("train_on", {True: "assistant", False: "all"}),
    "dataset_text_field": Only(("text", None), "another column is named by rename_columns, as in COLUMN=text"),
    "packing": Unused("examples are packed, and what is packed gives what it gives alone"),
    "eval_packing": Unused("examples are packed, and what is packed gives what it gives alone"),
    "padding_free": Unused("examples are packed, and what is packed gives what it gives alone"),
    "dataset_num_proc": Unused("examples are encoded by one process"),
    "dataset_streaming": Only(
        _OFF, "examples are read whole; data_prep_tool.py makes shards of those that are too many"
    ),
    # the loop
    "output_dir": Is("save_dir"),
    "num_train_epochs": Is("num_epochs"),
    "per_device_train_batch_size": Is("batch of a device"),
    "gradient_accumulation_steps": Is("batches of a step"),
    "per_device_eval_batch_size": Unused("evaluations take the micro-batches of training"),
    "lr_scheduler_type": Is("schedule", _SCHEDULES),
    "warmup_ratio": Is("warmup_steps"),
    "max_grad_norm": Is("grad_clip"),
    "adam_beta1": Is("beta1"),
    "adam_beta2": Is("beta2"),
    "optim": Is("optimizer", _OPTIMIZERS),
    "neftune_noise_alpha": Is("neftune_alpha"),
    "logging_steps": Is("log_interval"),
    "save_steps": Is("save_interval"),
    "eval_steps": Is("eval_interval"),
    "save_total_limit": Is("keep_checkpoints", {None: 0}),
    "metric_for_best_model": Is("best_metric"),
    "greater_is_better": Is("best_mode", {True: "max", False: "min", None: None}),
    "logging_strategy": Only(("steps", None), _IN_STEPS),
    "save_strategy": Only(("steps", None), _IN_STEPS),
    "eval_strategy": Is("evaluations"),
    "evaluation_strategy": Is("evaluations"),
    "resume_from_checkpoint": Is("checkpoint", {True: "latest", False: None, None: None}),
    "tf32": Only((True, None), "on a GPU what stays fp32 may always use TF32"),
    "report_to": Is("log_to"),
    "push_to_hub": Only(_OFF, "nothing is uploaded"),
    "load_best_model_at_end": Only(
        _OFF, "the best checkpoint is kept and marked (`best`), and the run ends with its last one"
    ),
    **dict.fromkeys(
        ("run_name", "logging_dir", "logging_first_step", "disable_tqdm", "log_level"),
        Unused("figures go to metrics.jsonl"),
    ),
    **dict.fromkeys(("do_train", "do_eval", "overwrite_output_dir"), Unused("the flags of train.py say what is done")),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory", "remove_unused_columns", "group_by_length"),
        Unused("examples are in memory and shards are read as they are, and rows are packed"),
    ),
    "ddp_find_unused_parameters": Only(_OFF, "every parameter that learns is used"),
    # preferences and reinforcement
    "beta": Is("beta"),
    "loss_type": Is("loss_type"),
    "num_generations": Is("group_size"),
    "max_completion_length": Is("max_new_tokens"),
    "response_length": Is("max_new_tokens"),
    "epsilon": Is("clip_low"),
    "epsilon_high": Is("clip_high"),
    "num_iterations": Is("rollout_epochs"),
    "mask_truncated_completions": Is("mask_truncated"),
    "reward_funcs": Is("reward_function"),
    "reward_model_path": Is("reward_model"),
    "kl_coef": Is("kl_coefficient"),
    "cliprange": Is("clip_high"),
    "cliprange_value": Is("value_clip"),
    "vf_coef": Is("value_coefficient"),
    "gamma": Is("discount"),
    "lam": Is("gae_lambda"),
    "num_ppo_epochs": Is("rollout_epochs"),
    "num_mini_batches": Is("num_minibatches"),
    "use_vllm": Only(_OFF, "answers are drawn by this project's own generation"),
}
NAMES |= {alias: Is(name) for name, spec in SPECS.items() for alias in spec.aliases}

# what a name in a group is called outside of it; a name that is not here keeps its own
_LORA = {
    "r": "lora_r", "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "target_modules": "lora_target_modules", "enabled": "use_lora",
}  # fmt: skip
_DATA = {"path": "dataset_path", "train_path": "dataset_path", "name": "dataset_path", "eval_path": "validation_file",
         "eval_dataset_path": "validation_file", "validation_path": "validation_file"}  # fmt: skip
GROUPS: dict[str, dict[str, str]] = {
    "model": {"name": "model_name_or_path", "path": "model_name_or_path"},
    "lora": _LORA,
    "lora_config": _LORA,
    "peft": _LORA,
    "quantization": {},
    "quantization_config": {},
    "training": {},
    "data": _DATA,
    "dataset": _DATA,
}
_ADAPTERS = ("lora", "lora_config", "peft")  # groups that ask for adapters by being there
_BY_STAGE = {  # names that mean something else in each stage
    "beta": {"dpo": "dpo_beta", "grpo": "kl_coefficient"},
    "loss_type": {"dpo": "dpo_loss", "grpo": "grpo_loss"},
    "train_file": {stage: "train_file" if stage in TEXT_STAGES else "train_data" for stage in STAGES},
    "validation_file": {stage: "val_file" if stage in TEXT_STAGES else "eval_data" for stage in STAGES},
}
_STAGES = {  # stage_type: options
    **{name: {"stage": name} for name in STAGES},
    **{name: {"stage": "reward"} for name in ("rm", "reward_modeling", "reward_model")},
    **{name: {"stage": "dpo", "dpo_loss": name} for name in ("kto", "orpo", "simpo", "ipo")},
}
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "none", "bf16": "bf16", "fp16": "fp16", "fp32": "none"}
_GLOBAL_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass
class Translation:
    """A table in our words. lines: what was read as what. derived: options that follow from the number of ranks."""

    options: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    derived: set[str] = field(default_factory=set)


def is_foreign(content: dict[str, Any], own: Collection[str]) -> bool:
    """Whether a file has a name of another tool's."""
    tables = content.get("stages")
    inner = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    foreign = {*NAMES, "task_name", "datasets", "stage_name"} - set(own) | {*_BY_STAGE}
    named = [(str(name).replace("-", "_"), value) for table in (content, *inner) for name, value in table.items()]
    return any(name in foreign or (name in GROUPS and isinstance(value, dict)) for name, value in named)


def translate(table: dict[str, Any], where: str, *, world_size: int, stage: str | None = None) -> Translation:
    """A table of options in our words; names that are known to nobody stay in it, for whoever checks them to refuse.

    where: what sentences call it. stage: of the run, where the table does not say. UserError for what cannot be honoured,
    with the reason, and for two names of one option that disagree.
    """
    found = Translation()
    values, model = _flat(table, where), table.get("model")
    if any(
        isinstance(one.get(name), dict)
        for one in (table, model if isinstance(model, dict) else {})
        for name in _ADAPTERS
    ):
        values.setdefault("use_lora", True)
    if {"warmup_steps", "warmup_ratio"} <= values.keys():  # steps win where there are some, as in transformers
        del values["warmup_ratio" if values["warmup_steps"] else "warmup_steps"]
    given: dict[str, tuple[str, Any]] = {}  # option: (the name that it was given under, its value)

    def put(option: str, name: str, value: Any) -> None:
        if option in given and given[option][1] != value:
            other = given[option][0]
            raise UserError(
                f"--config {where}: {other} and {name} both set --{option}, to different values: leave one out"
            )
        given[option] = name, value

    if "stage_type" in values:
        kind = values.pop("stage_type")
        if kind not in _STAGES:
            raise UserError(f"--config {where}: stage_type is {kind!r}, not one of {', '.join(_STAGES)}")
        for option, value in _STAGES[kind].items():
            put(option, "stage_type", value)
    stage = values.get("stage", given.get("stage", (None, stage))[1])
    for name, value in values.items():
        _read(name, value, where, stage, put, found)
    _drop_adapters(given, found)
    _set_precision(given, where)
    _set_batch(given, found, where, world_size, stage)
    found.options |= {option: value for option, (_, value) in given.items()}
    renamed = {option: (name, value) for option, (name, value) in given.items() if name != option}
    if renamed:
        found.lines.insert(
            0, "; ".join(f"{name} is --{option} {_shown(value)}" for option, (name, value) in renamed.items())
        )
    return found


def _flat(table: dict[str, Any], where: str) -> dict[str, Any]:
    """{name: value} without groups. UserError for one name with two values."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = str(key).replace("-", "_")
        if isinstance(value, dict) and name in GROUPS:
            for inner, one in _flat(value, f"{where}, {name}").items():
                called = GROUPS[name].get(inner, inner)
                if values.setdefault(called, one) != one:
                    raise UserError(
                        f"--config {where}: {name}.{inner} is given twice, with different values: leave one out"
                    )
        elif values.setdefault(name, value) != value:
            raise UserError(f"--config {where}: {name} is given twice, with different values: leave one out")
    return values


def _read(
    name: str, value: Any, where: str, stage: str | None, put: Callable[[str, str, Any], None], found: Translation
) -> None:
    """One name and its value. UserError where it cannot be honoured."""
    rule = NAMES.get(name)
    value = tuple(value) if isinstance(value, list) and not isinstance(rule, Is) and rule is not None else value
    if name == "max_steps" and value == -1:
        return  # transformers' way to say: by the epochs
    if rule is None:
        put(name, name, value)
    elif isinstance(rule, Only):
        if value not in rule.accepted:
            raise UserError(f"--config {where}: {name} {_shown(value)} cannot be done: {rule.reason}")
    elif isinstance(rule, Unused):
        found.lines.append(f"{name} is not used: {rule.reason}")
    elif name in _BY_STAGE:
        kind = stage or "pretrain"
        if kind not in _BY_STAGE[name]:
            stages = " or ".join(f"{option} of {kind}" for kind, option in _BY_STAGE[name].items())
            raise UserError(
                f"--config {where}: {name} is {stages}, and the stage is {stage or 'not given'}: add `stage`"
            )
        put(_BY_STAGE[name][kind], name, value)
    elif name in ("eval_strategy", "evaluation_strategy"):
        if value not in ("no", "steps", None):
            raise UserError(f"--config {where}: {name} {value} cannot be done: {_IN_STEPS}")
        if value == "no":
            put("eval_interval", name, 0)
    elif name == "report_to":
        put("log_to", name, [] if value in ("none", ["none"], None) else value)
    elif name == "warmup_ratio":
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(f"--config {where}: warmup_ratio is {value!r}; it must be from 0 up to, not including, 1")
        put("warmup_steps", name, value)
    elif rule.values is None:
        put(rule.option, name, value)
    elif value in rule.values:
        put(rule.option, name, rule.values[value])
    elif not (rule.option == "keep_checkpoints" and isinstance(value, int)):
        known = ", ".join(str(one) for one in rule.values)
        raise UserError(f"--config {where}: {name} {_shown(value)} cannot be done; known are {known}")
    else:
        put(rule.option, name, value)


def _drop_adapters(given: dict[str, tuple[str, Any]], found: Translation) -> None:
    """With use_lora false the adapters' settings, which such files keep, say nothing."""
    if given.get("lora", ("", True))[1] is not False:
        return
    for option in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "rslora", "dora"):
        if option in given:
            found.lines.append(f"{given.pop(option)[0]} is not used: {given['lora'][0]} is false")


def _set_precision(given: dict[str, tuple[str, Any]], where: str) -> None:
    """--mixed_precision of bf16 and fp16, else of the dtype, else of that of 4-bit products."""
    asked = {kind: given.pop(f"precision of {kind}", None) for kind in ("bf16", "fp16", "dtype", "compute")}
    flags = {kind: bool(found[1]) for kind in ("bf16", "fp16") if (found := asked[kind])}
    chosen = [kind for kind, on in flags.items() if on]
    if len(chosen) > 1:
        raise UserError(f"--config {where}: bf16 and fp16 are both true: leave one out")
    if chosen:
        name, precision = chosen[0], chosen[0]
    elif named := asked["dtype"] or asked["compute"]:
        name, dtype = named
        dtype = str(dtype).removeprefix("torch.")
        if dtype in ("auto", "None"):
            return
        if dtype not in _PRECISIONS:
            raise UserError(f"--config {where}: {name} {dtype} cannot be done; known are {', '.join(_PRECISIONS)}")
        precision = _PRECISIONS[dtype]
    elif flags:
        name, precision = next(iter(flags)), "none"
    else:
        return
    if "mixed_precision" in given and given["mixed_precision"][1] != precision:
        raise UserError(f"--config {where}: {name} and mixed_precision disagree: leave one out")
    given.setdefault("mixed_precision", (name, precision))


def _set_batch(
    given: dict[str, tuple[str, Any]], found: Translation, where: str, world_size: int, stage: str | None
) -> None:
    """--batch_size and --micro_batch_size of what each device takes at a time, the ranks and the batches of a step."""
    device, steps = (given.pop(name, (None, None))[1] for name in ("batch of a device", "batches of a step"))
    if device is None and steps is None:
        return
    if taken := [option for option in ("batch_size", "micro_batch_size") if option in given]:
        raise UserError(
            f"--config {where}: {taken[0]} and {_GLOBAL_BATCH[0]} both say how large a batch is: leave one out"
        )
    device, steps = (8 if device is None else device), (1 if steps is None else steps)  # transformers' defaults
    for name, value in zip(_GLOBAL_BATCH, (device, steps), strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"--config {where}: {name} is {value!r}; it must be a whole number above 0")
    batch, answers = device * steps * world_size, ""
    if stage == "grpo":  # TRL counts answers, and groups of them answer one prompt
        group = int(given.get("group_size", (None, 8))[1])
        if batch % group:
            raise UserError(
                f"--config {where}: {device} x {steps} x {world_size} rank(s) are {batch} answers, no whole groups of {group}"
            )
        batch, answers = batch // group, f", {group} answers to each prompt"
    given["batch_size"], given["micro_batch_size"] = ("batch_size", batch), ("micro_batch_size", device)
    found.derived.add("batch_size")
    found.lines.append(
        f"{_GLOBAL_BATCH[0]} {device} x {world_size} rank(s) x {_GLOBAL_BATCH[1]} {steps}{answers}: --batch_size {batch}, "
        f"--micro_batch_size {device} (a run that goes on keeps the --batch_size that it began with)"
    )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------------------------ plans


_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "label", "messages")


def translate_plan(
    content: dict[str, Any], path: str, *, world_size: int
) -> tuple[dict[str, Any], list[str], list[set[str]]]:
    """(a plan's file in our words, what was read as what, the derived options of each stage). UserError as in `translate`.

    Its stages may also hold "folder", the name of their folder; and beside them stands "task_folder", below which each start
    has a folder with its time, where the file names no save_dir.
    """
    content = dict(content)
    tables, datasets, task = content.pop("stages"), content.pop("datasets", {}), content.pop("task_name", None)
    shared = translate(content, path, world_size=world_size)
    batch = {
        name: value for name, value in _flat(content, path).items() if name in _GLOBAL_BATCH
    }  # for stages to change
    lines = [f"--config {path}: {line}" for line in shared.lines]
    plan: dict[str, Any] = dict(shared.options)
    if task is not None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(task)):
            raise UserError(f"--config {path}: task_name becomes a folder; write it with letters, digits, _ and -")
        plan["task_folder"] = str(Path("runs", "llm", str(task)))
    plan["stages"], derived = [], []
    for number, table in enumerate(tables, start=1):
        if not isinstance(table, dict):
            raise UserError(f"--config {path}: stages must be a list of tables, each with a stage and its options")
        if any(name in table for name in _GLOBAL_BATCH):
            table = batch | table
        made = _translate_stage(table, f"{path}, stage {number}", datasets, shared.options, world_size)
        lines += [f"--config {path}, stage {number}: {line}" for line in made.lines]
        plan["stages"].append(made.options)
        derived.append(made.derived | (shared.derived - made.options.keys()))
    return plan, lines, derived


def _translate_stage(
    table: dict[str, Any], where: str, datasets: dict[str, Any], shared: dict[str, Any], world_size: int
) -> Translation:  # fmt: skip
    table = dict(table)
    foreign = "stage_type" in table or "stage_name" in table
    name = table.pop("stage_name", table.get("name", table.get("stage_type")))
    chosen = table.pop("dataset", None)
    wanted = [chosen] if isinstance(chosen, str) else [name, table.get("stage_type")]
    data = next((datasets[one] for one in wanted if one in datasets), None)
    if isinstance(chosen, str) and data is None:
        raise UserError(f"--config {where}: dataset is {chosen!r}, and there is no [datasets.{chosen}]")
    if isinstance(chosen, dict) or data is not None:
        table["dataset"] = _columns_apart(dict(data or chosen), table)
    made = translate(table, where, world_size=world_size, stage=shared.get("stage"))
    if foreign and not {"train_data", "data_dir", "train_file"} & {*made.options, *shared}:
        raise UserError(
            f"--config {where} has no data: name a file as dataset_path in it, or in [datasets.{name or table['stage_type']}]"
        )
    if foreign:
        made.options |= {"name": str(name), "folder": f"{name}_stage"}
    if made.options.get("stage", shared.get("stage", "pretrain")) in TEXT_STAGES and "train_data" in made.options:
        files = made.options.pop("train_data")
        files = files if isinstance(files, list) else [files]
        prepared = len(files) == 1 and (Path(files[0]) / "metadata.json").exists()
        made.options["data_dir" if prepared else "train_file"] = files
    return made


def _columns_apart(dataset: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """A dataset without `prompt_column = "question"` and the like, which go to the stage's rename_columns."""
    pairs = []
    for meaning in _COLUMNS:
        for key in (f"{meaning}_column", f"{meaning}_field"):
            if (column := dataset.pop(key, meaning)) != meaning:
                pairs.append(f"{column}={meaning}")
    if pairs:
        table["rename_columns"] = [*table.get("rename_columns", []), *pairs]
    return dataset
