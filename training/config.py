"""Which options does a training run have, and where does each value come from?

Every option is one field of `TrainConfig`, with its default, its help and its group; the flags of train.py, the keys of
a `--config` file and the options saved with a run are all made from these fields.

A value comes from, in rising precedence: the default, the stage's default, the checkpoint that is resumed, the preset,
the config file, the command line. `origins` records which, and run.json keeps it.
"""

import argparse
import dataclasses
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from arguments import ArgumentParser, did_you_mean
from errors import UserError
from kernels.attention import ATTENTION_BACKENDS
from kernels.choice import OPERATIONS
from training.foreign_config import NAMES, Translation, is_foreign, translate
from training.optimizers import OPTIMIZERS
from training.schedule import SCHEDULES

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_layers": 6, "num_heads": 8},
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "medium": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "large": {"hidden_size": 1536, "num_layers": 24, "num_heads": 16},
    "xl": {"hidden_size": 2048, "num_layers": 32, "num_heads": 32},
}
_FINE_TUNING = {
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 0.0,
    "batch_size": 16,
    "sample_prompt": "",
    "eval_interval": 100,
    "log_interval": 10,
}
_LEARNING_RATES = {"sft": 2e-5, "reward": 1e-5, "dpo": 1e-6, "grpo": 1e-6, "ppo": 1e-6}
_NOT_RESUMED = ("checkpoint", "save_dir", "device")  # where a run goes on is said anew
STAGES = ("pretrain", "sft", "reward", "dpo", "grpo", "ppo")
PRECISIONS = ("auto", "bf16", "fp16", "none")


def option(group: str, help: str, default: Any = dataclasses.MISSING, choices: tuple | None = None) -> Any:
    """A dataclass field that is also a command-line flag of `group`."""
    metadata = {"group": group, "help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Every option of a run. None means: worked out from the other options, the data or the machine (see the help)."""

    # fmt: off
    stage: str = option("stage", "what is learned: pretrain (the next token of text), sft (answers), reward (a score from pairs), dpo (preferences: --dpo_loss), grpo or ppo (what a reward function asks of the model's own answers)", "pretrain", STAGES)
    init_from: str | None = option("stage", "model to start from: a Hugging Face folder, or a run or checkpoint of groundup; its tokenizer and shape are taken", None)

    data_dir: list[str] = option("data", "folder(s) written by data_prep_tool.py; several are mixed by --data_weights, and validation reads the first. Fine-tuning takes one, of --format sft or preference, in place of --train_data", [])
    data_weights: list[float] = option("data", "share of the samples drawn from each --data_dir (default: by their number of tokens)", [])
    max_length: int | None = option("data", "tokens in a row (default: what the data was prepared with)", None)
    stride: int | None = option("data", "overlap of neighbouring rows in tokens (default: what the data was prepared with; 0 when --max_length is given)", None)
    document_mask: bool = option("data", "documents packed into one row do not see each other", True)

    train_data: list[str] = option("examples", "files of examples for every stage but pretrain: .json, .jsonl, .csv, .tsv, .parquet, also .gz; what their columns mean is detected and printed", [])
    eval_data: list[str] = option("examples", "files of held-out examples (default: --eval_fraction of --train_data)", [])
    eval_fraction: float = option("examples", "share of --train_data held out where there is no --eval_data; 0 holds none out", 0.02)
    rename_columns: list[str] = option("examples", "column=meaning, for columns of other names: question=prompt answer=completion", [])
    train_on: str = option("examples", "tokens that are learned in sft: assistant (every answer), last (the last answer) or all", "assistant", ("assistant", "last", "all"))
    chat_template: str | None = option("examples", "chatml, llama3 or a Jinja file (default: the model's own, else chatml)", None)
    add_chat_tokens: bool = option("examples", "sft: give the tokenizer the special tokens that the chat template writes and it lacks, and the model rows for them, which learn, with --lora too", False)
    neftune_alpha: float = option("examples", "sft: noise on the embeddings of alpha / sqrt(length * width); 5 is usual, 0 is none", 0.0)

    lora: bool = option("adapters", "freeze the model and train low-rank adapters beside its linear layers", False)
    lora_r: int = option("adapters", "rank", 16)
    lora_alpha: float = option("adapters", "what B A is multiplied with, over the rank", 32.0)
    lora_dropout: float = option("adapters", "dropout of the adapters' input", 0.0)
    lora_target_modules: list[str] = option("adapters", "layers that get one: names such as q_proj v_proj, or all-linear", ["all-linear"])
    rslora: bool = option("adapters", "divide --lora_alpha by the rank's square root instead", False)
    dora: bool = option("adapters", "learn each output's magnitude apart from its direction", False)
    load_in_4bit: bool = option("adapters", "keep the frozen linear layers in NF4 (QLoRA)", False)

    dpo_loss: str = option("preference", "sigmoid, ipo, hinge, simpo, orpo or kto", "sigmoid", ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"))
    dpo_beta: float = option("preference", "how much a log-probability ratio counts against the reference; orpo: the weight of its odds ratio", 0.1)
    label_smoothing: float = option("preference", "sigmoid: probability that a pair is the wrong way round (conservative DPO)", 0.0)
    simpo_gamma: float = option("preference", "simpo: the margin that chosen must win by", 0.5)
    kto_desirable_weight: float = option("preference", "kto: of the loss of desirable answers; where one kind is rarer, weigh it more", 1.0)
    kto_undesirable_weight: float = option("preference", "kto: of the loss of the others", 1.0)
    reference_cache: str | None = option("preference", "folder that keeps the reference's log-probabilities for the next run on the same examples, or none (default: beside the data)", None)
    center_rewards: float = option("preference", "reward: weight of (chosen + rejected)^2, which keeps scores around zero", 0.01)

    reward_function: list[str] = option("reinforcement", "what answers are worth: exact_answer, numeric_answer, format=REGEX, regex=REGEX, length=TOKENS, or package.module:function of your own; several are added", [])
    reward_weights: list[float] = option("reinforcement", "of each --reward_function, then of --reward_model (default: 1 each)", [])
    reward_model: str | None = option("reinforcement", "folder of a model trained with --stage reward that judges answers", None)
    reward_timeout: float = option("reinforcement", "seconds that one call of a reward function may take", 60.0)
    max_new_tokens: int = option("reinforcement", "longest answer", 256)
    temperature: float = option("reinforcement", "of drawing answers; nothing else is cut from the distribution", 1.0)
    rollout_batch_size: int = option("reinforcement", "answers drawn at a time on a rank", 64)
    num_minibatches: int = option("reinforcement", "optimizer steps that share one round of answers, each on --batch_size prompts", 1)
    rollout_epochs: int | None = option("reinforcement", "passes over each round of answers (default: 4 for ppo, 1 for grpo)", None)
    group_size: int = option("reinforcement", "grpo: answers to each prompt", 8)
    grpo_loss: str = option("reinforcement", "grpo, dr_grpo, dapo, gspo or cispo", "grpo", ("grpo", "dr_grpo", "dapo", "gspo", "cispo"))
    clip_low: float | None = option("reinforcement", "how far the probability ratio may go below 1 (default: each loss's own)", None)
    clip_high: float | None = option("reinforcement", "how far it may go above 1 (default: each loss's own; ppo clips at 0.2 both ways)", None)
    mask_truncated: bool = option("reinforcement", "grpo: nothing is learned from answers that did not end", False)
    kl_coefficient: float | None = option("reinforcement", "weight of the KL to the reference (default: 0.05 for ppo, 0 for grpo)", None)
    kl_target: float | None = option("reinforcement", "ppo: adapt the weight to this KL an answer, in nats", None)
    discount: float = option("reinforcement", "ppo: what a reward one token later is worth (gamma)", 1.0)
    gae_lambda: float = option("reinforcement", "ppo: trace decay of generalised advantage estimation", 0.95)
    value_coefficient: float = option("reinforcement", "ppo: weight of the critic's loss", 0.1)
    value_clip: float = option("reinforcement", "ppo: how far a value may move from the one at the rollout before its loss stops falling", 0.2)
    whiten_rewards: bool = option("reinforcement", "ppo: divide the rewards of a round by their standard deviation", False)
    missing_eos_penalty: float = option("reinforcement", "ppo: taken from the score of an answer that did not end", 0.0)
    eval_samples: int = option("reinforcement", "held-out prompts answered at each evaluation; 0 takes all", 64)

    preset: str | None = option("model", "sets --hidden_size, --num_layers and --num_heads: " + ", ".join(f"{name} {size['hidden_size']}x{size['num_layers']}" for name, size in PRESETS.items()), None, tuple(PRESETS))
    vocab_size: int | None = option("model", "must be the tokenizer's, which it defaults to; the weights are padded to a multiple of 128", None)
    hidden_size: int = option("model", "width of the residual stream", 768)
    num_layers: int = option("model", "transformer blocks", 12)
    num_heads: int = option("model", "attention heads; must divide --hidden_size (default: those of the preset of that size, else heads of 64, or of 128 where 64 does not divide)", 12)
    num_kv_heads: int | None = option("model", "key/value heads, shared by groups of heads; must divide --num_heads (default: --num_heads)", None)
    intermediate_size: int | None = option("model", "width of the SwiGLU MLP (default: 8/3 of --hidden_size, rounded up to a multiple of 64)", None)
    rope_theta: float = option("model", "base of the rotary embedding; 500000 is usual for rows of 4096 tokens and more", 10000.0)
    qk_norm: bool = option("model", "RMSNorm on each query and key head; the checkpoint is then a Qwen3 instead of a Llama", False)
    tie_word_embeddings: bool = option("model", "one matrix for embedding and head; saves memory below some 350M parameters", False)

    batch_size: int = option("optimization", "sequences a step, over all ranks and micro-batches", 32)
    micro_batch_size: int | None = option("optimization", "sequences a forward pass on one rank; the rest is accumulated (default: a rank's whole share of the batch)", None)
    max_steps: int = option("optimization", "optimizer steps of the run (fine-tuning: from --num_epochs where it is not given)", 100_000)
    num_epochs: float | None = option("optimization", "fine-tuning: passes over --train_data (default: 3 for sft, 1 otherwise)", None)
    learning_rate: float = option("optimization", "peak learning rate; one value serves AdamW and Muon. Fine-tuning: 2e-5 (sft), 1e-5 (reward), 1e-6 (dpo, grpo, ppo), ten times that with --lora", 3e-4)
    warmup_steps: float | None = option("optimization", "steps of linear warm-up, or below 1 a share of --max_steps (default: 2000, or a tenth of --max_steps where that is less)", None)
    schedule: str = option("optimization", "after the warm-up: cosine, linear, or wsd (constant, then linear over the last --decay_fraction)", "wsd", SCHEDULES)
    decay_fraction: float = option("optimization", "share of the run over which wsd decays", 0.5)
    min_lr_fraction: float = option("optimization", "the last step's learning rate as a fraction of the peak", 0.0)
    optimizer: str = option("optimization", "muon (matrices of the blocks; AdamW for the rest) or adamw, which fine-tuning takes", "muon", OPTIMIZERS)
    weight_decay: float = option("optimization", "decoupled decay on matrices; norms and embeddings have none; 0 in fine-tuning", 0.1)
    beta1: float = option("optimization", "AdamW: decay of the first moment", 0.9)
    beta2: float = option("optimization", "AdamW: decay of the second moment", 0.95)
    grad_clip: float = option("optimization", "largest global gradient norm; 0 does not clip", 1.0)
    z_loss: float = option("optimization", "weight of the squared log-normaliser (1e-5 is usual); kept out of the reported loss", 0.0)

    device: str = option("hardware", "auto, cpu, cuda or mps", "auto", ("auto", "cpu", "cuda", "mps"))
    mixed_precision: str = option("hardware", "bf16, fp16 (with a loss scaler), none, or auto, which the flag alone means too: bf16 on a GPU that has it, fp16 on one that has not, none on a CPU", "auto", PRECISIONS)
    kernels: list[str] = option("hardware", "auto, triton or torch; then, for single ones, operation=triton or operation=torch (operations: " + ", ".join(OPERATIONS) + "). auto: Triton on a GPU, and with --compile_model only where it beats the compiler", ["auto"])
    attention: str = option("hardware", "back end of attention: auto (a varlen kernel for packed documents on a GPU, else sdpa), sdpa, varlen, flash-attn, fa3, fa4 or flex", "auto", ATTENTION_BACKENDS)
    compile_model: bool = option("hardware", "torch.compile the model in place", False)
    peak_tflops: float | None = option("hardware", "peak dense TFLOP/s of one device in the precision used, for MFU on a device that groundup does not know", None)

    save_dir: str = option("run", "where checkpoints, metrics.jsonl and the plot go", "./checkpoints")
    checkpoint: str | None = option("run", "resume from this checkpoint folder, or from the newest whole one: latest", None)
    save_interval: int | None = option("run", "steps between checkpoints (default: --eval_interval)", None)
    keep_checkpoints: int = option("run", "newest checkpoints to keep (the best one is kept too); 0 keeps all", 3)
    log_interval: int = option("run", "steps between log lines", 100)
    eval_interval: int = option("run", "steps between evaluations on the validation split; 0 evaluates at the end only", 500)
    eval_tokens: int = option("run", "validation tokens read at each evaluation; 0 reads all. The last evaluation always reads all", 1_000_000)
    sample_prompt: str = option("run", "text to continue at each evaluation; an empty text draws no sample", "The ")
    sample_tokens: int = option("run", "tokens of that sample", 100)
    seed: int = option("run", "of the initial weights and of the data order", 0)
    # fmt: on

    def validate(self, data_needed: bool = True) -> None:
        """Raise UserError for values that cannot work together, before anything is read or built."""
        positive = "max_length hidden_size num_layers num_heads num_kv_heads intermediate_size batch_size \
            micro_batch_size max_steps learning_rate log_interval rope_theta peak_tflops save_interval num_epochs \
            rollout_epochs clip_low clip_high value_clip kl_target kto_desirable_weight kto_undesirable_weight"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} must be positive, not {value}")
        not_negative = "warmup_steps stride weight_decay grad_clip z_loss eval_interval eval_tokens eval_samples \
            sample_tokens neftune_alpha simpo_gamma center_rewards kl_coefficient missing_eos_penalty \
            value_coefficient"
        for name in not_negative.split():
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"--{name} must not be negative, and is {value}")
        for name in ("decay_fraction", "min_lr_fraction", "discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must lie between 0 and 1, and is {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must lie in [0, 1), and is {getattr(self, name)}")
        self._validate_stage(data_needed)
        if self.data_weights and len(self.data_weights) != len(self.data_dir):
            raise UserError(
                f"--data_weights has {len(self.data_weights)} values for {len(self.data_dir)} folders in --data_dir; "
                "give one for each, or none"
            )
        if any(not weight > 0 for weight in self.data_weights):
            raise UserError(f"--data_weights must all be positive, and are {self.data_weights}")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--num_heads {self.num_heads} does not divide --hidden_size {self.hidden_size}; "
                f"{_divisors_near(self.hidden_size, self.num_heads)} would"
            )
        if (self.hidden_size // self.num_heads) % 2:
            raise UserError(
                f"--hidden_size {self.hidden_size} / --num_heads {self.num_heads} gives heads of odd width "
                f"{self.hidden_size // self.num_heads}, which rotary embedding cannot pair; choose another --num_heads"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"--num_kv_heads {self.kv_heads} does not divide --num_heads {self.num_heads}; "
                f"{_divisors_near(self.num_heads, self.kv_heads)} would"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        """Llama's 8/3 of the width, so that three matrices cost what two of 4x did; a multiple of 64 for the GEMMs."""
        return self.intermediate_size or -(-8 * self.hidden_size // 3 // 64) * 64

    @property
    def resolved_warmup_steps(self) -> int:
        if self.warmup_steps is None:
            return min(2000, self.max_steps // 10)
        return math.ceil(self.warmup_steps * self.max_steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    def _validate_stage(self, data_needed: bool) -> None:
        if self.stage == "pretrain":
            if data_needed and not self.data_dir:
                raise UserError("--data_dir is missing: name a folder written by data_prep_tool.py")
            if self.train_data:
                raise UserError("--train_data is for fine-tuning: add --stage sft, reward or dpo, or give --data_dir")
        else:
            if self.init_from is None:
                raise UserError(f"--init_from is missing: --stage {self.stage} starts from a model")
            if self.data_dir and self.add_chat_tokens:
                raise UserError(
                    "--add_chat_tokens needs --train_data: the examples of --data_dir were encoded before there were such tokens"
                )
            if self.data_dir and self.stage in ("grpo", "ppo"):
                raise UserError(f"--data_dir is not for --stage {self.stage}, which reads --train_data")
            if self.data_dir and self.train_data:
                raise UserError("--data_dir and --train_data both give examples: leave one of them out")
            if not self.data_dir and not self.train_data:
                raise UserError(f"--train_data is missing: name files of examples for --stage {self.stage}")
        if self.stage in ("grpo", "ppo"):
            judges = len(self.reward_function) + (self.reward_model is not None)
            if not judges:
                raise UserError(
                    f"--stage {self.stage} needs --reward_function or --reward_model: what an answer is worth"
                )
            if self.reward_weights and len(self.reward_weights) != judges:
                raise UserError(f"--reward_weights has {len(self.reward_weights)} values for {judges} rewards")
            for name in ("max_new_tokens", "temperature", "rollout_batch_size", "num_minibatches", "reward_timeout"):
                if not getattr(self, name) > 0:
                    raise UserError(f"--{name} must be positive, and is {getattr(self, name)}")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction must lie in [0, 1), and is {self.eval_fraction}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout must lie in [0, 1), and is {self.lora_dropout}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing must lie in [0, 0.5), and is {self.label_smoothing}")
        for name in ("lora_r", "lora_alpha", "dpo_beta"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be positive, and is {getattr(self, name)}")
        if (self.load_in_4bit or self.dora or self.rslora) and not self.lora:
            raise UserError("--load_in_4bit, --dora and --rslora are ways of training adapters: add --lora")
        if self.stage == "reward" and self.sample_prompt:
            raise UserError("--sample_prompt cannot be used with --stage reward: the model gives scores, not text")
        if self.lora and self.init_from is None:
            raise UserError("--lora needs a model to adapt: name it with --init_from")
        for pair in self.rename_columns:
            if not all(pair.partition("=")):
                raise UserError(f"--rename_columns {pair}: write column=meaning, such as question=prompt")

    @property
    def resolved_rollout_epochs(self) -> int:
        return self.rollout_epochs or (4 if self.stage == "ppo" else 1)

    @property
    def steps_per_phase(self) -> int:
        """Optimizer steps that share one round of rollouts; a checkpoint is written where one ends."""
        return self.num_minibatches * self.resolved_rollout_epochs if self.stage in ("grpo", "ppo") else 1

    def steps_of_epochs(self, num_samples: int) -> int:
        """Optimizer steps of --num_epochs passes over so many examples, whole rounds of rollouts."""
        epochs = self.num_epochs or (3.0 if self.stage == "sft" else 1.0)
        rounds = math.ceil(epochs * num_samples / (self.batch_size * self.num_minibatches))
        return rounds * self.steps_per_phase

    @property
    def resolved_save_interval(self) -> int:
        return self.save_interval or self.eval_interval or self.max_steps


def _divisors_near(number: int, wish: int) -> str:
    below = max(d for d in range(1, wish + 1) if number % d == 0)
    above = min(d for d in range(wish, number + 1) if number % d == 0)
    return f"{below} or {above}" if below != above else str(below)


def add_options(parser: ArgumentParser) -> None:
    """Give a parser every option as a flag. A flag that is not given is absent from the result, so its origin is known."""
    groups: dict[str, Any] = {}
    for spec in fields(TrainConfig):
        if spec.metadata["group"] not in groups:
            groups[spec.metadata["group"]] = parser.add_argument_group(spec.metadata["group"])
        group = groups[spec.metadata["group"]]
        settings: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "help": _help(spec)}
        value_type, is_list = _value_type(spec)
        if value_type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {
                "type": value_type,
                "choices": spec.metadata["choices"],
                "metavar": value_type.__name__.upper(),
            }
            if spec.metadata["choices"]:
                settings["metavar"] = "|".join(spec.metadata["choices"])
            if spec.name == "mixed_precision":  # as people write it: the flag alone asks for what the device has
                settings |= {"nargs": "?", "const": "auto"}
            if is_list:
                settings["nargs"] = "+"
        group.add_argument(f"--{spec.name}", **settings)
    groups["run"].add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="YAML, TOML or JSON file that sets any of these options; the command line wins",
    )  # fmt: skip


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
    chosen = {**(saved or {}), **from_file, **given}
    layers = [
        ("stage", _stage_defaults(chosen.get("stage", "pretrain"), chosen.get("lora", False))),
        ("checkpoint", {name: value for name, value in (saved or {}).items() if name not in _NOT_RESUMED}),
        ("preset", PRESETS.get(from_file.get("preset"), {})),
        ("config file", from_file),
        ("preset", PRESETS.get(given.get("preset"), {})),  # named on the command line, it beats the file's sizes
        ("command line", given),
    ]
    known = {spec.name for spec in fields(TrainConfig)}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for origin, layer in layers:
        for name, value in layer.items():
            if name in known:  # a resumed run may have been written by a version with other options
                values[name], origins[name] = value, origin
    if origins["num_heads"] == "default" and origins["hidden_size"] != "default":
        values["num_heads"], origins["num_heads"] = heads_of_size(values["hidden_size"]), "--hidden_size"
    config = TrainConfig(**values)
    if validate:
        config.validate()
        if not in_plan:
            refuse_unread(config, [name for name in origins if origins[name] in ("command line", "config file")])
    return config, origins


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


# Options that some runs do not read: their names, of which runs they are, and in which they are read.
_READ_ONLY: tuple[tuple[str, str, Callable[[TrainConfig], bool]], ...] = (
    ("data_weights stride document_mask z_loss vocab_size", "--stage pretrain", lambda c: c.stage == "pretrain"),
    ("eval_data eval_fraction rename_columns chat_template num_epochs", "fine-tuning", lambda c: c.stage != "pretrain"),
    ("eval_fraction", "runs without --eval_data", lambda c: not c.eval_data),
    (
        "preset hidden_size num_layers num_heads num_kv_heads intermediate_size rope_theta qk_norm tie_word_embeddings",
        "models trained from nothing, and --init_from has a shape of its own", lambda c: c.init_from is None,
    ),
    ("train_on neftune_alpha add_chat_tokens", "--stage sft", lambda c: c.stage == "sft"),
    ("lora_r lora_alpha lora_dropout lora_target_modules", "--lora", lambda c: c.lora),
    ("dpo_loss dpo_beta", "--stage dpo", lambda c: c.stage == "dpo"),
    ("label_smoothing", "--stage dpo --dpo_loss sigmoid", lambda c: (c.stage, c.dpo_loss) == ("dpo", "sigmoid")),
    ("simpo_gamma", "--stage dpo --dpo_loss simpo", lambda c: (c.stage, c.dpo_loss) == ("dpo", "simpo")),
    ("kto_desirable_weight kto_undesirable_weight", "--stage dpo --dpo_loss kto", lambda c: (c.stage, c.dpo_loss) == ("dpo", "kto")),
    (
        "reference_cache", "--stage dpo on all weights with a loss that has a reference",
        lambda c: c.stage == "dpo" and not c.lora and c.dpo_loss not in ("simpo", "orpo"),
    ),
    ("center_rewards", "--stage reward", lambda c: c.stage == "reward"),
    (
        "reward_function reward_weights reward_model reward_timeout max_new_tokens temperature rollout_batch_size "
        "num_minibatches rollout_epochs clip_high kl_coefficient eval_samples",
        "--stage grpo and ppo", lambda c: c.stage in ("grpo", "ppo"),
    ),
    ("eval_tokens", "stages that evaluate on given text, and not on answers of their own (--eval_samples)", lambda c: c.stage not in ("grpo", "ppo")),
    ("group_size grpo_loss mask_truncated", "--stage grpo", lambda c: c.stage == "grpo"),
    ("clip_low", "--stage grpo with another loss than cispo", lambda c: c.stage == "grpo" and c.grpo_loss != "cispo"),
    ("kl_target missing_eos_penalty discount gae_lambda value_coefficient value_clip whiten_rewards", "--stage ppo", lambda c: c.stage == "ppo"),
    ("decay_fraction", "--schedule wsd", lambda c: c.schedule == "wsd"),
    ("sample_tokens", "runs with a --sample_prompt", lambda c: bool(c.sample_prompt)),
)  # fmt: skip


def is_read(config: TrainConfig, name: str) -> bool:
    """Whether a run with this config reads the option `name`."""
    return all(reads(config) for names, _, reads in _READ_ONLY if name in names.split())


def refuse_unread(config: TrainConfig, given: Collection[str]) -> None:
    """UserError for the first option named in `given` that a run with this config would parse and never read."""
    for names, words, is_read in _READ_ONLY:
        if not is_read(config) and (unread := [name for name in names.split() if name in given]):
            raise UserError(f"--{unread[0]} is for {words}, and would do nothing in this run: leave it out")


def _stage_defaults(stage: str, lora: bool) -> dict[str, Any]:
    """What fine-tuning starts from instead of the defaults, which are pretraining's."""
    if stage not in _LEARNING_RATES:
        return {}
    return _FINE_TUNING | {"learning_rate": _LEARNING_RATES[stage] * (10 if lora else 1)}


def read_config_content(path: str) -> dict[str, Any]:
    """What a .yaml, .yml, .toml or .json file holds, its names and values as they are written. Raises UserError."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({error}); name a YAML, TOML or JSON file") from error
    try:
        if file.suffix == ".toml":
            content = tomllib.loads(text)
        elif file.suffix == ".json":
            content = json.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            import yaml  # the only reader here that is not in the standard library

            content = yaml.safe_load(text)
        else:
            raise UserError(f"--config {path}: the name must end in .yaml, .yml, .toml or .json")
    except ImportError as error:
        raise UserError(f"--config {path} needs PyYAML (pip install pyyaml), or write it as .toml or .json") from error
    except (ValueError, tomllib.TOMLDecodeError) as error:  # JSON's and YAML's decoding errors are ValueErrors
        raise UserError(f"--config {path} is not valid {file.suffix[1:].upper()}: {_one_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"--config {path} is not valid YAML: {_one_line(error)}") from error
        raise
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold option: value pairs")
    return content


def translated(path: str, stage: str | None) -> Translation:
    """What a file without stages sets, in our words where it has others; stage: of the command line. Raises UserError."""
    content = read_config_content(path)
    if not is_foreign(content, [spec.name for spec in fields(TrainConfig)]):
        return Translation(content)
    return translate(content, path, world_size=int(os.environ.get("WORLD_SIZE", 1)), stage=stage)


def read_config_file(path: str, stage: str | None = None, resumed: bool = False) -> dict[str, Any]:
    """The options that a .yaml, .yml, .toml or .json file sets, each coerced to its option's type. Raises UserError.

    resumed: without what follows from the number of ranks, for a run keeps its batch.
    """
    specs = {spec.name: spec for spec in fields(TrainConfig)}
    options, found = {}, translated(path, stage)
    for key, value in found.options.items():
        name = str(key).replace("-", "_")
        if resumed and name in found.derived:
            continue
        if name not in specs:
            known = did_you_mean(name, [*specs, *NAMES])
            raise UserError(f"--config {path} sets {key!r}, which is not an option{known}")
        options[name] = coerce_option(specs[name], value, path)
    return options


def coerce_option(spec: dataclasses.Field, value: Any, path: str) -> Any:
    """A value of a config file as the type of its option, a field of TrainConfig. UserError, naming `path`, for another.

    YAML 1.1 reads 3e-4 as a string, which is why this exists.
    """
    value_type, is_list = _value_type(spec)
    if value is None and spec.default is None:
        return None
    if is_list:
        items = value if isinstance(value, list) else [value]
        return [_coerce_one(spec.name, value_type, item, path) for item in items]
    result = _coerce_one(spec.name, value_type, value, path)
    choices = spec.metadata["choices"]
    if choices and result not in choices:
        raise UserError(
            f"--config {path}: {spec.name} is {result!r}, not one of {', '.join(choices)}{did_you_mean(str(result), choices)}"
        )
    return result


def _coerce_one(name: str, value_type: type, value: Any, path: str) -> Any:
    wrong = UserError(f"--config {path}: {name} must be of type {value_type.__name__}, and is {value!r}")
    if value_type is bool or isinstance(value, bool):
        if value_type is bool and isinstance(value, bool):
            return value
        raise wrong
    try:
        result = value_type(value)
    except (TypeError, ValueError) as error:
        raise wrong from error
    if value_type is int and float(value) != result:  # 1.5 layers
        raise wrong
    return result


def _value_type(spec: dataclasses.Field) -> tuple[type, bool]:
    """(the type of one value, whether the option takes several)."""
    annotation = spec.type
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _help(spec: dataclasses.Field) -> str:
    text = spec.metadata["help"].replace("%", "%%")
    if spec.default in (None, dataclasses.MISSING, "") or "(default" in text:
        return text
    return f"{text} (default: {spec.default})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
