"""What does a run do, and where does each value of its config come from?

`TrainConfig` holds every option of a run as one flat dataclass; training/option_groups.py lists the options.

A value comes from, in rising precedence: the default, the stage's default, the checkpoint that is resumed, the preset,
the config file, the command line, and `accelerate launch`, which may contradict neither of the two. `origins` records
which, and run.json keeps it.
"""

import argparse
import inspect
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from arguments import ArgumentParser
from errors import UserError
from families.new_models import ENCODERS
from families.task_names import TASKS
from training.accelerate import Said, options_of_launcher
from training.config_file import read_config_file
from training.deepspeed_json import options_of_settings, read_settings, stage_of
from training.log_to import check_packages
from training.option import AUTO, add_flags, check_bounds, specs_of
from training.option_groups import (
    GROUPS,
    LAUNCHER,
    PRESETS,
    SPECS,
    TEXT_STAGES,
    AdaptersOptions,
    DataOptions,
    ExamplesOptions,
    HardwareOptions,
    MaskingOptions,
    ModelOptions,
    OptimizationOptions,
    PreferenceOptions,
    ReinforcementOptions,
    RunOptions,
    StageOptions,
    TaskOptions,
)
from training.user_code import read_hooks, read_loss

_FINE_TUNING = {
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 0.0,
    "batch_size": 16,
    "sample_prompt": "",
    "eval_interval": 100,
    "log_interval": 10,
}
_LEARNING_RATES = {"sft": 2e-5, "reward": 1e-5, "dpo": 1e-6, "grpo": 1e-6, "ppo": 1e-6, **dict.fromkeys(TASKS, 2e-5)}
# of fine-tuning both epochs and steps may be given, as in transformers, where the steps win
ALTERNATIVES = (
    ("train_file", "data_dir"), ("eval_iter", "eval_tokens"), ("optimizer_file", "optimizer"), ("num_epochs", "max_steps"),
)  # fmt: skip
# of one model, with as many rows for its head on all ranks: gradients must be ready in one order
ZERO_STAGES = ("pretrain", "sft", "reward", "dpo", "grpo")
SHARDED_OPTIMIZERS = ("adamw", "muon", "lion", "sgd")  # whose updates need no more than Muon gathers
LAUNCHED, BY_DEEPSPEED = "accelerate launch", "--deepspeed"  # the origins of what they say
# where a run goes on is said anew, what is looked at, and how long is waited
_NOT_RESUMED = ("checkpoint", "save_dir", "device", "profile", "timeout")
# what a first run is asked for: the flags that `--help` alone shows
_FIRST_FLAGS = (
    "stage", "init_from", "data_dir", "train_data", "lora", "preset", "batch_size", "max_steps", "learning_rate",
    "save_dir", "checkpoint", "config",
)  # fmt: skip


@dataclass
class TrainConfig(  # from the last to the first: so a dataclass gathers its fields in the groups' order
    RunOptions,
    HardwareOptions,
    OptimizationOptions,
    ModelOptions,
    ReinforcementOptions,
    PreferenceOptions,
    TaskOptions,
    AdaptersOptions,
    ExamplesOptions,
    MaskingOptions,
    DataOptions,
    StageOptions,
):
    """Every option of a run. None means: worked out from the other options, the data or the machine (see the help)."""

    def validate(self, data_needed: bool = True) -> None:
        """Raise UserError for values that cannot work together, before anything is read or built."""
        check_bounds(self, SPECS.values())
        self._check_stage(data_needed)
        check_packages(self.log_to)
        for path in self.hooks:
            read_hooks(path)
        if self.loss_file:
            read_loss(self.loss_file)
        if self.stage in ("grpo", "ppo"):
            self.check_rewards(self.stage)
        self.check_data()
        self.check_examples()
        self.check_adapters()
        self.check_model()
        self.check_hardware()
        self._check_micro_batches()
        self._check_strategy()
        self.check_optimization()
        _ = self.higher_is_better  # UserError where it is not known
        if self.stage in ("reward", "mlm", *TASKS) and self.sample_prompt:
            raise UserError(f"--sample_prompt cannot be used with --stage {self.stage}: the model writes no text")
        if self.lora and self.mixed_precision == "fp8":
            raise UserError("--mixed_precision fp8 is for training all weights: with --lora use bf16")
        if self.lora and self.init_from is None:
            raise UserError("--lora needs a model to adapt: name it with --init_from")

    def _check_micro_batches(self) -> None:
        """UserError where --micro_batch_size auto cannot be found, or figures would depend on what is."""
        if self.micro_batch_size is not AUTO:
            return
        if self.stage in ("grpo", "ppo"):
            raise UserError(
                f"--micro_batch_size auto is not for --stage {self.stage}, whose answers differ in length: give a number"
            )
        if self.strategy != "ddp" or self.ranks_of_a_batch > 1:
            shared = "--context_parallel" if self.context_parallel > 1 else "--tensor_parallel"
            named = shared if self.strategy == "ddp" else f"--strategy {self.strategy}"
            raise UserError(
                f"--micro_batch_size auto is not for {named}: a rank out of memory would leave the others waiting for its part; "
                "give a number"
            )
        if self.eval_iter is not None:
            raise UserError(
                "--eval_iter counts micro-batches, whose size --micro_batch_size auto leaves to the machine: give --eval_tokens"
            )

    def _check_strategy(self) -> None:
        """UserError for what needs whole tensors or rows where each rank has a part of them."""
        if self.context_parallel > 1 and self.attention not in ("auto", "sdpa", "flex"):
            raise UserError(
                f"--attention {self.attention} is not for --context_parallel, whose queries are a part of a row: choose auto, "
                "sdpa or flex"
            )
        if self.strategy == "deepspeed":
            self._check_deepspeed()
        if self.strategy != "fsdp" and self.tensor_parallel == 1:
            return
        way, otherwise = (
            ("--strategy fsdp", "use ddp") if self.tensor_parallel == 1 else ("--tensor_parallel", "give 1")
        )
        if self.optimizer_file or self.optimizer not in SHARDED_OPTIMIZERS:
            named = "--optimizer_file" if self.optimizer_file else f"--optimizer {self.optimizer}"
            raise UserError(f"{named} is not for {way}: choose {', '.join(SHARDED_OPTIMIZERS)}, or {otherwise}")
        if self.ema is not None:
            raise UserError(f"--ema is not for {way}: leave it out, or {otherwise}")
        if self.tensor_parallel == 1:
            return
        for flag, given in (
            ("--load_in_4bit", self.load_in_4bit), ("--dora", self.dora), ("--lora_dropout", self.lora_dropout),
            ("--add_chat_tokens", self.lora and self.add_chat_tokens), ("--loss_file", self.loss_file),
            ("--mixed_precision fp8", self.mixed_precision == "fp8"),
        ):  # fmt: skip
            if given:
                raise UserError(
                    f"{flag} is not for --tensor_parallel, of whose ranks each has a part of a layer: leave one out"
                )

    def _check_deepspeed(self) -> None:
        """UserError for what DeepSpeed's engine, or what is made of it here, cannot do."""
        if self.deepspeed is None:
            raise UserError("--deepspeed is missing: name a config, such as configs/deepspeed/zero2.json")
        stage = stage_of(read_settings(self.deepspeed))
        for refused, named, reason in (
            (self.optimizer_file, "--optimizer_file", "leave it out, and add --optimizer adamw"),
            (self.optimizer != "adamw", f"--optimizer {self.optimizer}", "add --optimizer adamw"),
            (self.stage not in ZERO_STAGES, f"--stage {self.stage}", f"which takes {', '.join(ZERO_STAGES)}: use fsdp"),
            (self.load_in_4bit, "--load_in_4bit", "use --strategy fsdp"),
            (self.ema is not None, "--ema", "leave it out, or use ddp"),
            (self.compile_model, "--compile_model", "leave it out, or use fsdp"),
            (self.mixed_precision == "fp16", "--mixed_precision fp16", "whose loss scale it keeps to itself: use bf16"),
            (self.mixed_precision == "fp8", "--mixed_precision fp8", "use bf16, or --strategy fsdp"),
            (self.spike_guard is not None, "--spike_guard", "whose verdict it would not wait for: use fsdp"),
            (self.context_parallel > 1, "--context_parallel", "use --strategy fsdp"),
            (self.tensor_parallel > 1, "--tensor_parallel", "use --strategy fsdp"),
            (self.activation_checkpointing != "none", "--activation_checkpointing", "use --strategy fsdp"),
            (self.async_checkpoint, "--async_checkpoint", "leave it out, or use fsdp"),
            (self.lora and self.add_chat_tokens, "--lora with --add_chat_tokens", "use --strategy fsdp"),
        ):
            if refused:
                raise UserError(f"{named} is not for --strategy deepspeed (ZeRO {stage}): {reason}")

    def _check_stage(self, data_needed: bool) -> None:
        """UserError where what the stage starts from or learns from is missing, or was given for another stage."""
        if self.on_text:
            if data_needed and not self.data_dir and not self.train_file:
                raise UserError(
                    "--data_dir is missing: name a folder written by data_prep_tool.py, or files of text with --train_file"
                )
            if self.train_data:
                raise UserError("--train_data is for fine-tuning: add --stage sft, reward or dpo, or give --data_dir")
            encoder = self.model in ENCODERS
            if self.stage == "pretrain" and encoder:
                raise UserError(f"--model {self.model} is an encoder, which learns hidden tokens: add --stage mlm")
            if self.stage == "mlm" and self.init_from is None and not encoder:
                raise UserError(
                    f"--stage mlm trains an encoder: add --model {' or '.join(ENCODERS)}, or --init_from one"
                )
            return
        if self.init_from is None:
            raise UserError(f"--init_from is missing: --stage {self.stage} starts from a model")
        if self.data_dir and self.add_chat_tokens:
            raise UserError(
                "--add_chat_tokens needs --train_data: the examples of --data_dir were encoded before there were such tokens"
            )
        if self.data_dir and self.stage in ("grpo", "ppo", *TASKS):
            raise UserError(f"--data_dir is not for --stage {self.stage}, which reads --train_data")
        if self.data_dir and self.train_data:
            raise UserError("--data_dir and --train_data both give examples: leave one of them out")
        if not self.data_dir and not self.train_data:
            raise UserError(f"--train_data is missing: name files of examples for --stage {self.stage}")

    @property
    def on_text(self) -> bool:
        """Whether the stage learns from text, as data_prep_tool.py prepares it, and not from examples."""
        return self.stage in TEXT_STAGES

    def counts_epochs(self, origins: dict[str, str]) -> bool:
        """Whether the run is as long as `steps_of_epochs` says: always in fine-tuning where --max_steps is not given."""
        return origins["max_steps"] == "default" and (not self.on_text or self.num_epochs is not None)

    @property
    def resolved_rollout_epochs(self) -> int:
        return self.rollout_epochs or (4 if self.stage == "ppo" else 1)

    @property
    def steps_per_phase(self) -> int:
        """Optimizer steps that share one round of rollouts; a checkpoint is written where one ends."""
        return self.num_minibatches * self.resolved_rollout_epochs if self.stage in ("grpo", "ppo") else 1

    def steps_of_epochs(self, num_samples: int) -> int:
        """Optimizer steps of --num_epochs passes over so many examples, whole rounds of rollouts."""
        epochs = self.num_epochs or (3.0 if self.stage in ("sft", *TASKS) else 1.0)
        rounds = math.ceil(epochs * num_samples / (self.batch_size * self.num_minibatches))
        return rounds * self.steps_per_phase

    def tokens_of_evaluation(self, max_length: int) -> int:
        """--eval_tokens, or those of --eval_iter micro-batches with rows of `max_length`; 0 means all."""
        rows = self.micro_batch_size or self.batch_size  # not a rank's share: figures must not depend on their number
        return self.eval_tokens if self.eval_iter is None else self.eval_iter * rows * max_length

    def evaluates_after(self, step: int) -> bool:
        """Whether --eval_interval asks for an evaluation after so many steps."""
        return self.eval_interval > 0 and step > 0 and step % self.eval_interval == 0

    @property
    def resolved_save_interval(self) -> int:
        return self.save_interval or self.eval_interval or self.max_steps


def add_options(parser: ArgumentParser) -> None:
    """Give a parser every option as a flag; its `--help` shows those of a first run, and `--help GROUP` the others."""
    for title, options in GROUPS.items():
        about, example = inspect.cleandoc(options.__doc__ or "").split("\n\n")
        group = parser.add_argument_group(title, f"{about}\n  {example}")
        add_flags(group, specs_of(options).values())
        parser.aliases |= {alias: spec.name for spec in specs_of(options).values() for alias in spec.aliases}
        if options is RunOptions:
            group.add_argument(
                "--config", metavar="FILE", default=argparse.SUPPRESS,
                help="YAML, TOML or JSON file that sets any of these options; the command line wins",
            )  # fmt: skip
    parser.shorten_help([f"--{name}" for name in _FIRST_FLAGS])


def resolve_config(
    given: dict[str, Any], saved: dict[str, Any] | None = None, validate: bool = True, in_plan: bool = False
) -> tuple[TrainConfig, dict[str, str]]:
    """Merge the flags of the command line with the config file, the preset, a resumed run's options and the defaults.

    given: what the command line named (vars() of the parser's result); may hold `config`, a file.
    saved: the options of the run that is resumed, or None. validate=False is for a first look, before that is known.
    in_plan: the run is a stage of a plan, and may be given what only other stages of it read.
    Returns the validated options and, for each, where its value came from. Raises UserError.
    """
    given = dict(given)
    config_file = given.pop("config", None)
    from_file = read_config_file(config_file, given.get("stage"), bool(saved)) if config_file else {}
    by_launcher = {**from_file, **given}.get("strategy") == LAUNCHER
    launched = options_of_launcher(os.environ, asked=by_launcher)
    for place in (from_file, given) if by_launcher else ():
        place.pop("strategy", None)  # it is what the launcher says
    _refuse_contradiction({**from_file, **given}, launched)
    chosen = {**(saved or {}), **from_file, **given}
    named = {**from_file, **given, **{name: said.value for name, said in launched.items()}}
    zero = _of_deepspeed(chosen, named)
    _refuse_contradiction(named, zero)
    layers = [
        ("stage", _stage_defaults(chosen.get("stage", "pretrain"), chosen.get("lora", False), chosen.get("optimizer"))),
        ("checkpoint", {name: value for name, value in (saved or {}).items() if name not in _NOT_RESUMED}),
        ("preset", PRESETS.get(from_file.get("preset", ""), {})),
        ("config file", from_file),
        ("preset", PRESETS.get(given.get("preset", ""), {})),  # named on the command line, it beats the file's sizes
        ("command line", given),
        (LAUNCHED, {name: said.value for name, said in launched.items()}),
        (BY_DEEPSPEED, {name: said.value for name, said in zero.items()}),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(SPECS, "default")
    for origin, layer in layers:
        for name, value in layer.items():
            if name in SPECS:  # a resumed run may have been written by a version with other options
                values[name], origins[name] = value, origin
    _settle_alternatives(values, origins)
    if origins["num_heads"] == "default" and origins["hidden_size"] != "default":
        values["num_heads"], origins["num_heads"] = heads_of_size(values["hidden_size"]), "--hidden_size"
    config = TrainConfig(**values)
    if validate:
        config.validate()
        if not in_plan:
            refuse_unread(config, [name for name in origins if origins[name] in ("command line", "config file")])
    return config, origins


def _refuse_contradiction(given: dict[str, Any], launched: dict[str, Said]) -> None:
    """UserError where a launcher and the command, or its config file, say two things of one option, or of its other name."""
    for name, said in launched.items():
        others = {other for pair in ALTERNATIVES if name in pair for other in pair if given.get(other) is not None}
        for other in sorted({name, *others} & given.keys()):
            if other != name or given[name] != said.value:
                raise UserError(
                    f"{said.where} asks for {as_flag(name, said.value)}, and the command for {as_flag(other, given[other])}: "
                    "leave one of them out"
                )


def _of_deepspeed(chosen: dict[str, Any], said: dict[str, Any]) -> dict[str, Said]:
    """What a run with DeepSpeed takes from DeepSpeed's config. said: of `chosen` what is not of the run that goes on."""
    goes_on = said.get("strategy", chosen.get("strategy")) == "deepspeed"
    named = said.get("deepspeed") or (chosen.get("deepspeed") if goes_on else None)
    if named is None:
        return {}
    return options_of_settings(read_settings(named), {**chosen, **said}, int(os.environ.get("WORLD_SIZE", 1)))


def of_launcher(config: TrainConfig, origins: dict[str, str]) -> list[str]:
    """Lines with the options that `accelerate launch` and DeepSpeed's config stand for; none where they say nothing."""
    lines = []
    for launcher in (LAUNCHED, BY_DEEPSPEED):
        flags = [as_flag(name, getattr(config, name)) for name, origin in origins.items() if origin == launcher]
        lines += [f"{launcher}: as with {' '.join(flags)}"] if flags else []
    return lines


def as_flag(name: str, value: Any) -> str:
    """An option as a command gives it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _settle_alternatives(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Of two options that say one thing in two ways the one that was said later, the other as if it were never given.

    UserError where both are given in one place.
    """
    for pair in ALTERNATIVES:
        later = [name for name in pair if origins[name] == "command line"]
        later = later or [name for name in pair if origins[name] == "config file"]
        if len(later) == 2 and not ("max_steps" in pair and values.get("stage", "pretrain") not in TEXT_STAGES):
            raise UserError(f"--{pair[0]} and --{pair[1]} say one thing in two ways: leave one out")
        for name in set(pair) - set(later) if later else ():
            values.pop(name, None)
            origins[name] = "default"


def without_alternatives(options: dict[str, Any], later: Collection[str]) -> dict[str, Any]:
    """`options` without those that one of the options named in `later` says in another way."""
    gone = {name for pair in ALTERNATIVES for name in pair if set(pair) - {name} & set(later)}
    return {name: value for name, value in options.items() if name not in gone}


def heads_of_size(hidden_size: int) -> int:
    """The attention heads of a model whose width alone is given. UserError for one that has no usual number of them."""
    for size in PRESETS.values():
        if size["hidden_size"] == hidden_size:
            return size["num_heads"]
    for head_dim in (64, 128):
        if hidden_size > 0 and hidden_size % head_dim == 0:
            return hidden_size // head_dim
    raise UserError(
        f"--hidden_size {hidden_size} is no multiple of 64, so its heads are not clear: give --num_heads too"
    )


def is_read(config: TrainConfig, name: str) -> bool:
    """Whether a run with this config reads the flag `name`; all read what is no option of theirs, such as `config`."""
    return name not in SPECS or all(runs.hold(config) for runs in SPECS[name].read_by)


def refuse_unread(config: TrainConfig, given: Collection[str]) -> None:
    """UserError for the first option named in `given` that a run with this config would parse and never read."""
    for name, spec in SPECS.items():
        for runs in spec.read_by:
            if name in given and not runs.hold(config):
                raise UserError(f"--{name} is for {runs.words}, and would do nothing in this run: leave it out")


def _stage_defaults(stage: str, lora: bool, optimizer: str | None) -> dict[str, Any]:
    """What fine-tuning starts from instead of the defaults, which are pretraining's; and what an optimizer needs."""
    needed = {"schedule": "constant"} if optimizer == "schedule_free" else {}
    if stage not in _LEARNING_RATES:
        return needed | ({"sample_prompt": ""} if stage == "mlm" else {})
    return _FINE_TUNING | {"learning_rate": _LEARNING_RATES[stage] * (10 if lora else 1)} | needed
