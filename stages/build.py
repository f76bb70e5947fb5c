"""How does a --stage become the data and the objective that the loop runs?

`open_stage_data` reads and checks what a stage learns from, before anything large is built; `build_stage` makes the
objective over it, once there is a model.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters.actor_critic import REWARD_ADAPTER, REWARD_HEAD, scores_of
from adapters.base_models import load_base
from adapters.lora import adapter_settings
from adapters.scalar_head import RewardModel, padding_files
from batches.masking import Masking, masking_of
from batches.packing import Sequence
from batches.sampler import SAMPLER_VERSION, Mixture
from batches.sentence_pairs import SentencePairs, makes_pairs, open_sentence_pairs
from batches.windows import TrainingData, Windows, open_training_data
from checkpointing.save_folder import from_rank_0
from dataprep.shards import Metadata, load_metadata, open_split
from dataprep.special_tokens import with_tokens
from dataprep.token_bytes import TokenBytes
from dataprep.tokenizers import Tokenizer, load_tokenizer
from errors import UserError
from families.task_names import TASKS
from finetune_data.chat_template import SHIPPED, ChatTemplate, load_chat_template
from finetune_data.chat_tokens import describe_template, missing_tokens, stop_token_ids
from finetune_data.encoding_examples import encode_example, say_by_answer, show_example, with_marked_sides
from finetune_data.example_shards import FORMATS, ExampleShards, template_digest
from finetune_data.examples import Example, ExampleSet, read_examples
from generation.rollouts import Prompt, RolloutSchedule, Sampling
from model import Transformer, read_json
from ranks import Ranks, unwrap
from stages.answer import Answer
from stages.classify import Classify
from stages.dpo import DPO, KTO, with_mismatches
from stages.grpo import GRPO
from stages.mlm import MLM
from stages.ppo import PPO
from stages.preference_losses import WITHOUT_REFERENCE
from stages.pretrain import Pretrain
from stages.reference_cache import with_kept_reference
from stages.reward import Reward as RewardStage
from stages.rewards import Reward, load_reward, model_reward
from stages.sft import SFT
from stages.tag import Tag
from training.config import TrainConfig
from training.examples_data import ExampleData, ExampleFeed
from training.loading import find_base, read_shape
from training.mixture import describe_mixtures, later_mixtures
from training.plan import mask_probability
from training.precision import Precision
from training.standing import Pins
from training.task_data import TaskData, open_task_data
from training.text_files import with_prepared_text

Groups = list | ExampleShards  # of examples, or of prompts
Stage = Pretrain | MLM | SFT | RewardStage | DPO | KTO | GRPO | PPO | Classify | Tag | Answer

DEFAULT_LENGTH = 2048  # of fine-tuning's rows, where the model allows more
_KINDS = {  # what each stage can learn from
    "sft": ("chat", "text"),
    "reward": ("preference",),
    "dpo": ("preference",),
    "kto": ("labelled",),
    "grpo": ("prompt",),
    "ppo": ("prompt",),
}


@dataclass(frozen=True)
class StageData:
    """What a stage learns from, opened and checked.

    tokenizer_folder: its tokenizer's files go into every checkpoint. order: what decides which tokens sample number t is;
    a resumed run must have the same. num_samples: of one pass. report: sentences for the user, before the first step.
    """

    tokenizer_folder: Path
    tokenizer: Tokenizer
    max_length: int
    order: dict
    num_samples: int
    train: TrainingData | SentencePairs | ExampleData | list[Prompt]
    held_out: Windows | SentencePairs | ExampleData | list[Prompt] | None
    report: list[str] = field(default_factory=list)
    stop_ids: tuple[int, ...] = ()  # what ends an answer
    files: dict[str, bytes] = field(default_factory=dict)  # further ones for every checkpoint: the chat template
    num_new_tokens: int = 0  # the tokenizer's last ids, which the model that is trained on does not have
    masking: Masking | None = None  # of masked language modelling
    task: TaskData | None = None  # of stages that classify, tag or answer


# their batches follow from the data alone; GRPO and PPO draw answers, and KTO asks the model for a KL
_OF_DATA_ALONE = (Pretrain, MLM, SFT, RewardStage, DPO, Classify, Tag, Answer)


def can_be_ahead(stage: Stage) -> bool:
    """Whether a thread may make its batches: whether they need neither the model nor, as sentence pairs do, other ranks."""
    return type(stage) in _OF_DATA_ALONE and not isinstance(getattr(stage, "data", None), SentencePairs)


def open_stage_data(
    config: TrainConfig, base: Path | None, context: int | None, saved: dict | None = None,
    checkpoint: Path | None = None,
) -> StageData:  # fmt: skip
    """The data of config.stage. base: the folder of the model that is trained on, context: the tokens it can take.

    saved: the state of `checkpoint`, from which a run goes on, with its data's order; {} or None at the start of one.
    """
    saved_order = (saved or {}).get("data_order")
    # the order of a run that began before it had a version stays as it was
    sampler = SAMPLER_VERSION if saved_order is None else saved_order.get("sampler", 1)
    if config.on_text:
        text_order: dict = {}
        if config.train_file:
            config, text_order = with_prepared_text(config, base, context, saved_order or {}, checkpoint)
        data = _open_shards(config, base, context, sampler, later_mixtures(config, saved or {}))
        return replace(data, order=data.order | text_order)
    assert base is not None and context is not None, "fine-tuning starts from a model"
    if config.stage in TASKS:
        return _of_task(config, open_task_data(config, base, context, sampler), base, sampler)
    return _open_examples(config, base, context, saved_order or {}, checkpoint, sampler)


def build_stage(
    config: TrainConfig, data: StageData, model: nn.Module, ranks: Ranks, precision: Precision, micro_batch_size: int,
    pins: Pins,
) -> Stage:  # fmt: skip
    """The objective of config.stage over `data`. model: the finished one, for stages that compute with it beforehand.

    pins: the digests of the folders that the run stands on. Samples are divided among `ranks.data`, answers are drawn by each.
    """
    drawing, ranks = ranks, ranks.data
    if data.masking is not None:
        assert isinstance(data.train, TrainingData | SentencePairs)
        assert isinstance(data.held_out, Windows | SentencePairs | None)
        return MLM(
            data=data.train, validation=data.held_out, masking=data.masking, filler_id=data.tokenizer.filler_id, ranks=ranks,
            precision=precision, batch_size=config.batch_size, micro_batch_size=micro_batch_size,
            eval_tokens=config.tokens_of_evaluation(data.max_length), z_loss=config.z_loss,
        )  # fmt: skip
    if isinstance(data.train, TrainingData) and isinstance(data.held_out, Windows):
        return Pretrain(
            data=data.train, validation=data.held_out, token_bytes=TokenBytes(data.held_out.split, data.tokenizer), ranks=ranks,
            precision=precision, batch_size=config.batch_size, micro_batch_size=micro_batch_size,
            eval_tokens=config.tokens_of_evaluation(data.max_length), z_loss=config.z_loss,
            balance_weight=unwrap(model).config.router_aux_loss_coef, router_z_weight=config.router_z_loss_coef,
        )  # fmt: skip
    if config.stage in ("grpo", "ppo"):
        return _reinforcement_stage(config, data, model, drawing, precision, micro_batch_size)
    assert isinstance(data.train, ExampleData) and isinstance(data.held_out, ExampleData | None)
    feed = ExampleFeed(
        data=data.train, validation=data.held_out, ranks=ranks, precision=precision, batch_size=config.batch_size,
        micro_batch_size=micro_batch_size, max_length=data.max_length, eval_tokens=config.tokens_of_evaluation(data.max_length),
    )  # fmt: skip
    if data.task is not None:
        return _task_stage(data.task, feed)
    if config.stage == "sft":
        return SFT(feed, neftune_alpha=config.neftune_alpha)
    if config.stage == "reward":
        return RewardStage(feed, centring=config.center_rewards)
    return _preference_stage(config, feed, model, pins)


# --------------------------------------------------------------------------------------------------------- pretraining


def _open_shards(
    config: TrainConfig, base: Path | None, context: int | None, sampler: int, later: Mixture
) -> StageData:
    """The text of folders. later: when they are mixed otherwise (training/mixture.py)."""
    metadata = [load_metadata(folder) for folder in config.data_dir]
    for folder, one in zip(config.data_dir, metadata, strict=True):
        if one.options.get("format") in FORMATS:
            raise UserError(
                f"--data_dir {folder} holds examples to fine-tune on ({one.options['format']}): add --stage"
            )
    tokenizer = load_tokenizer(config.data_dir[0])
    _check_vocabulary(config, metadata, tokenizer, base)
    max_length = config.max_length or metadata[0].max_length
    if len(tokenizer.encode(config.sample_prompt)) >= max_length:
        raise UserError(f"--sample_prompt leaves no room in rows of --max_length {max_length} tokens; shorten it")
    stride = config.stride if config.stride is not None else (0 if config.max_length else metadata[0].stride)
    report = describe_mixtures(config, later)
    train, held_out = _rows(config, tokenizer, max_length, stride, sampler, later, report)
    order = {
        "fingerprints": [m.fingerprint for m in metadata], "weights": train.weights, "data_stages": [list(one) for one in later],
        "max_length": max_length, "stride": stride, "document_mask": config.document_mask, "seed": config.seed,
        "sampler": sampler,
    }  # fmt: skip
    masking = None
    if config.stage == "mlm":
        probability = mask_probability(config, read_shape(base).family if base else config.model or "")
        masking = masking_of(tokenizer, probability, config.whole_words)
        order |= {"mask_probability": probability} | {n: getattr(config, n) for n in ("whole_words", "next_sentence")}
    elif not tokenizer.byte_level and isinstance(held_out, Windows) and not held_out.split.has_document_bytes:
        report.append(
            f"bits per byte: {config.data_dir[0]} does not keep each document's bytes (prepared by an older version), so those "
            "of the whole split are shared out among its tokens"
        )
    if context and max_length > context:
        if config.lora:
            raise UserError(
                f"--max_length {max_length} is more than the model in {base} takes, {context} tokens, and an adapter cannot "
                "say so to who loads it: train all weights, or shorten the rows"
            )
        report.append(
            f"the model in {base} takes {context} tokens; it is trained on rows of {max_length}, and takes so many now"
        )
    files = {"tokenizer_config.json": _tokenizer_config(config.data_dir[0], max(max_length, context or 0))}
    return StageData(
        Path(config.data_dir[0]), tokenizer, max_length, order, train.num_samples, train, held_out, report, files=files,
        masking=masking,
    )  # fmt: skip


def _rows(
    config: TrainConfig,
    tokenizer: Tokenizer,
    max_length: int,
    stride: int,
    sampler: int,
    later: Mixture,
    report: list[str],
) -> tuple[TrainingData | SentencePairs, Windows | SentencePairs | None]:
    """Of the text: windows, or with --next_sentence pairs of parts; those to learn from, and those held out."""
    splits, held_out = (
        [open_split(folder, "train") for folder in config.data_dir],
        open_split(config.data_dir[0], "val"),
    )
    if not config.next_sentence:
        train = open_training_data(
            splits, config.data_weights,
            max_length=max_length, stride=stride, document_mask=config.document_mask, seed=config.seed, sampler=sampler,
            later=later,
        )  # fmt: skip
        return train, Windows(held_out, max_length, 0, config.document_mask)
    pairs = open_sentence_pairs(
        splits, config.data_weights, tokenizer, max_length=max_length, seed=config.seed, sampler=sampler, later=later
    )
    if not makes_pairs(held_out, tokenizer):
        report.append("nothing is evaluated: no two documents are held out of which pairs can be made")
        return pairs, None
    return pairs, open_sentence_pairs([held_out], [], tokenizer, max_length=max_length, seed=0)


def _tokenizer_config(folder: str, max_length: int) -> bytes:
    """The folder's, with the length of the model's rows; that of the data may have been another."""
    path = Path(folder) / "tokenizer_config.json"
    content = read_json(path) if path.exists() else {}
    return (json.dumps(content | {"model_max_length": max_length}, indent=2, ensure_ascii=False) + "\n").encode()


def _check_vocabulary(config: TrainConfig, metadata: list[Metadata], tokenizer: Tokenizer, base: Path | None) -> None:
    """UserError where the flag, the tokenizer, the shards and the model that is gone on from do not agree."""
    for folder, data in zip(config.data_dir, metadata, strict=True):
        if data.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"the shards in {folder} were made with the tokenizer {data.tokenizer.sha256[:12]}, and "
                f"{config.data_dir[0]}/tokenizer.json is {tokenizer.sha256[:12]}; prepare the data with one tokenizer"
            )
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"--vocab_size {config.vocab_size} is not the tokenizer's in {config.data_dir[0]}, which has "
            f"{tokenizer.vocab_size}; leave --vocab_size out to use the tokenizer's"
        )
    if base and (theirs := load_tokenizer(base)).sha256 != tokenizer.sha256:
        raise UserError(
            f"--init_from {base} has the tokenizer {theirs.sha256[:12]}, and the shards in {config.data_dir[0]} were made "
            f"with {tokenizer.sha256[:12]}; prepare the data with the model's tokenizer"
        )


# --------------------------------------------------------------------------------------------------------- fine-tuning


def _open_examples(
    config: TrainConfig, base: Path, context: int, saved_order: dict, checkpoint: Path | None, sampler: int
) -> StageData:  # fmt: skip
    # a template that writes the date goes on writing that of the run's first day
    today = saved_order.get("template_date") or from_rank_0(lambda: datetime.now().isoformat())
    template = _template(config, base, datetime.fromisoformat(today), saved_order.get("template"), checkpoint)
    tokenizer, tokenizer_files, added = _with_chat_tokens(config, base, load_tokenizer(base), template)
    report = [*added, *describe_template(tokenizer, template)]
    shards = _open_example_shards(config, base, tokenizer, template) if config.data_dir else None
    max_length = config.max_length or (min(context, DEFAULT_LENGTH) if shards is None else shards.metadata.max_length)
    if max_length > context:
        raise UserError(f"--max_length {max_length} is more than the model in {base} takes, {context} tokens")

    read = partial(_read, config, tokenizer, template, max_length, report)
    train: Groups
    held_out: Groups = []
    if shards is None:
        train = read(config.train_data)
    else:
        train = with_mismatches(shards, max_length) if _is_kto(config) else shards
    if config.eval_data:
        held_out = read(config.eval_data)
    else:
        train, held_out = _split(train, config.eval_fraction)
    report.append(
        f"{len(train):,} examples to learn from, {len(held_out):,} held out; the first, what is learned marked:"
    )
    if config.stage == "sft":
        train, held_out = _one_by_one(train), _one_by_one(held_out)
    first = train[0] if isinstance(train[0], Prompt) else train[0][0]
    shown = Sequence(first.tokens, np.zeros(len(first.tokens), bool)) if isinstance(first, Prompt) else first
    report.append(show_example(tokenizer, shown, color=sys.stdout.isatty()))
    order = {
        "fingerprints": _digests(config.train_data) if shards is None else [shards.metadata.fingerprint],
        "held_out": _digests(config.eval_data), "rename_columns": sorted(config.rename_columns),
        "max_length": max_length, "template": template_digest(template),
        "train_on": config.train_on if shards is None else shards.metadata.options["train_on"],
        "eval_fraction": config.eval_fraction, "seed": config.seed, "sampler": sampler,
    }  # fmt: skip
    if template.reads("strftime_now"):
        order["template_date"] = today
    stops = tuple(stop_token_ids(tokenizer, template))
    files = {"chat_template.jinja": template.source.encode(), **tokenizer_files}
    num_new_tokens = tokenizer.vocab_size - load_tokenizer(base, lazy=True).vocab_size
    if config.stage == "reward":
        files |= padding_files(base)
    if config.stage in ("grpo", "ppo"):
        assert isinstance(train, list) and isinstance(held_out, list), "prompts come of files alone"
        return StageData(base, tokenizer, max_length, order, len(train), train, held_out, report, stops, files)
    return StageData(
        base, tokenizer, max_length, order, len(train), ExampleData(train, config.seed, sampler),
        ExampleData(held_out, config.seed) if held_out else None, report, stops, files, num_new_tokens,
    )  # fmt: skip


def _with_chat_tokens(
    config: TrainConfig, base: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[Tokenizer, dict[str, bytes], list[str]]:
    """(the tokenizer with --add_chat_tokens' tokens, its files where they are new, what to say of it)."""
    if not config.add_chat_tokens:
        return tokenizer, {}, []
    if not (missing := missing_tokens(tokenizer, template)):
        return tokenizer, {}, ["--add_chat_tokens: the tokenizer has every special token that the chat template writes"]
    path = base / "tokenizer_config.json"
    more, files = with_tokens(tokenizer, read_json(path) if path.exists() else {}, missing)
    ids = f"as the ids {tokenizer.vocab_size:,} to {more.vocab_size - 1:,}"
    return more, files, [f"--add_chat_tokens: {', '.join(missing)} are new in the tokenizer, {ids}"]


def _open_example_shards(
    config: TrainConfig, base: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> ExampleShards:  # fmt: skip
    """The examples of --data_dir. UserError where they are not what the stage, the model and the options ask for."""
    if len(config.data_dir) > 1:
        raise UserError(f"--stage {config.stage} takes one --data_dir; prepare all examples together")
    folder = config.data_dir[0]
    shards = ExampleShards(folder)
    metadata, options = shards.metadata, shards.metadata.options
    again = "prepare the examples again with data_prep_tool.py"
    if options["kind"] not in (kinds := _kinds(config)):
        raise UserError(
            f"--data_dir {folder} holds {options['kind']} examples, and {_named(config)} learns from {' or '.join(kinds)} "
            "examples; prepare those"
        )
    if metadata.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"the examples in {folder} were made with the tokenizer {metadata.tokenizer.sha256[:12]}, and --init_from {base} "
            f"has {tokenizer.sha256[:12]}; {again} and --tokenizer_from {base}"
        )
    if options["template"] != template_digest(template):
        raise UserError(
            f"the examples in {folder} were written with another chat template than {template.name}; give the same "
            f"--chat_template, or {again}"
        )
    if config.max_length and config.max_length < metadata.max_length:
        raise UserError(
            f"--max_length {config.max_length} is less than the {metadata.max_length} tokens that the examples in {folder} "
            f"may have; {again}"
        )
    if config.train_on not in ("assistant", options["train_on"]) or config.rename_columns:
        raise UserError(
            f"the examples in {folder} are prepared, with --train_on {options['train_on']}: --train_on and "
            "--rename_columns belong to data_prep_tool.py"
        )
    return shards


def _template(
    config: TrainConfig, base: Path, today: datetime, saved_digest: str | None, checkpoint: Path | None
) -> ChatTemplate:
    """--chat_template or the model's own; of a run that goes on with another version's shipped one, that in `checkpoint`."""
    template = load_chat_template(base, override=config.chat_template, now=today)
    shipped = config.chat_template is None and template.name in SHIPPED
    if shipped and checkpoint and template_digest(template) != saved_digest:
        kept = load_chat_template(checkpoint, now=template.now)
        return kept if template_digest(kept) == saved_digest else template
    return template


def _read(
    config: TrainConfig, tokenizer: Tokenizer, template: ChatTemplate, max_length: int, report: list[str], paths: list[str]
) -> list:  # fmt: skip
    """The examples of these files as the stage takes them: groups of sequences, or prompts."""
    rename = dict(pair.split("=", 1) for pair in config.rename_columns)
    examples = read_examples(paths, rename=rename)
    report.extend([f"examples: {examples.format}", *examples.report])
    groups, kept = _encode(config, examples, tokenizer, template, max_length, report)
    if _is_kto(config):
        return with_mismatches(groups, max_length)
    if config.stage not in ("grpo", "ppo"):
        return groups
    pairs = zip(groups, kept, strict=True)
    return [Prompt(group[0].tokens, example.prompt[-1].content, example.columns) for group, example in pairs]


def _encode(
    config: TrainConfig, examples: ExampleSet, tokenizer: Tokenizer, template: ChatTemplate, max_length: int,
    report: list[str],
) -> tuple[list[list[Sequence]], list[Example]]:  # fmt: skip
    """(the sequences of each example that can be used, these examples); what was left out is counted in `report`."""
    if examples.kind not in (kinds := _kinds(config)):
        raise UserError(
            f"--train_data holds {examples.kind} examples ({examples.format}), and {_named(config)} learns from "
            f"{' or '.join(kinds)} examples; --rename_columns can say what the columns mean"
        )
    groups: list[list[Sequence]] = []
    kept: list[Example] = []
    dropped: Counter[str] = Counter()
    truncated = by_answer = 0
    # a prompt of reinforcement learning leaves room for its answer
    room = max_length - config.max_new_tokens + 1 if config.stage in ("grpo", "ppo") else max_length
    for example in examples.examples:
        encoded = encode_example(tokenizer, template, example, max_length=room, train_on=config.train_on)
        truncated += encoded.truncated
        by_answer += encoded.by_answer
        if encoded.sequences:
            groups.append(encoded.sequences)
            kept.append(example)
        else:
            dropped[encoded.dropped] += 1
    report.extend(f"{count:,} examples left out: {reason}" for reason, count in dropped.most_common())
    if truncated:
        report.append(f"{truncated:,} examples cut off at --max_length {max_length}")
    report.extend(say_by_answer(by_answer))
    if not groups:
        raise UserError(f"no example of --train_data can be learned from: {'; '.join(dropped)}")
    return with_marked_sides(groups) if examples.kind == "preference" else groups, kept


def _kinds(config: TrainConfig) -> tuple[str, ...]:
    """The kinds of examples that the stage can learn from."""
    return _KINDS["kto" if _is_kto(config) else config.stage]


def _is_kto(config: TrainConfig) -> bool:
    return config.stage == "dpo" and config.dpo_loss == "kto"


def _split(groups: Groups, fraction: float) -> tuple[Groups, Groups]:
    """(to learn from, held out), both in the order of the files; the same ones each time. A dialogue is in one of them whole."""
    dialogues = groups.dialogues() if isinstance(groups, ExampleShards) else [[number] for number in range(len(groups))]
    count = math.ceil(len(dialogues) * fraction) if len(dialogues) > 1 else 0
    chosen = set(np.random.default_rng(0).permutation(len(dialogues))[:count].tolist())
    parts = [number for number in range(len(dialogues)) if number not in chosen], sorted(chosen)
    learned, held_out = ([place for number in part for place in dialogues[number]] for part in parts)
    if isinstance(groups, ExampleShards):
        return groups.select(learned), groups.select(held_out)
    return [groups[place] for place in learned], [groups[place] for place in held_out]


def _one_by_one(groups: Groups) -> Groups:
    """Each sequence of a dialogue as a sample of its own, which those of shards are."""
    return [[sequence] for group in groups for sequence in group] if isinstance(groups, list) else groups


def _reinforcement_stage(
    config: TrainConfig, data: StageData, model: nn.Module, ranks: Ranks, precision: Precision, micro_batch_size: int
) -> GRPO | PPO:
    device, kl = ranks.device, config.kl_coefficient
    reference = None  # with adapters it is the model without them
    if not config.lora and (config.stage == "ppo" or kl):
        reference = load_base(data.tokenizer_folder, dtype=precision.dtype, device=device).eval()
    shared: dict[str, Any] = {
        "model": unwrap(model), "prompts": data.train, "eval_prompts": data.held_out,
        "rewards": _rewards(config, data, unwrap(model), device, precision, micro_batch_size),
        "decode": data.tokenizer.decode,
        "ranks": ranks, "precision": precision,
        "sampling": Sampling(
            config.max_new_tokens, config.temperature, data.stop_ids, data.tokenizer.vocab_size, config.rollout_batch_size
        ),
        "schedule": RolloutSchedule(
            config.batch_size, config.num_minibatches, config.resolved_rollout_epochs, config.seed, data.order["sampler"]
        ),
        "micro_batch_size": micro_batch_size, "max_length": data.max_length, "reference": reference,
        "reward_timeout": config.reward_timeout, "eval_samples": config.eval_samples,
    }  # fmt: skip
    if config.stage == "grpo":
        return GRPO(
            **shared, group_size=config.group_size, loss_type=config.grpo_loss, clip_low=config.clip_low,
            clip_high=config.clip_high, kl_coefficient=kl or 0.0, mask_truncated=config.mask_truncated,
        )  # fmt: skip
    return PPO(
        **shared, clip=config.clip_high or 0.2, kl_coefficient=0.05 if kl is None else kl, kl_target=config.kl_target,
        missing_eos_penalty=config.missing_eos_penalty, discount=config.discount, trace=config.gae_lambda,
        value_coefficient=config.value_coefficient, value_clip=config.value_clip, whiten_rewards=config.whiten_rewards,
    )  # fmt: skip


def _rewards(
    config: TrainConfig, data: StageData, model: Any, device: torch.device, precision: Precision,
    micro_batch_size: int,
) -> list[Reward]:  # fmt: skip
    """The judges of --reward_function and --reward_model, with their weights."""
    functions = [load_reward(name) for name in config.reward_function]
    weights = config.reward_weights or [1.0] * (len(functions) + 1)
    rewards = [
        Reward(name.partition("=")[0].rpartition(":")[2], function, weight)
        for name, function, weight in zip(config.reward_function, functions, weights, strict=False)
    ]
    if config.reward_model:
        scores = model_reward(
            _judge(config.reward_model, data, getattr(model, "policy", model), device, precision),
            device=device, precision=precision,
            max_length=data.max_length, micro_batch_size=micro_batch_size,
        )  # fmt: skip
        rewards.append(Reward("reward_model", scores, weights[len(functions)], on_tokens=True))
    return rewards


def _judge(where: str, data: StageData, policy: Transformer, device: torch.device, precision: Precision) -> Callable:
    """What scores prefixes: the adapter "reward" of the policy's own model, or a model beside it."""
    if REWARD_ADAPTER in adapter_settings(policy):
        return scores_of(policy, REWARD_ADAPTER, getattr(policy, REWARD_HEAD))
    folder = find_base(where, "--reward_model")
    if load_tokenizer(folder).sha256 != data.tokenizer.sha256:
        raise UserError(f"--reward_model {folder} has another tokenizer than the model that is trained")
    return scores_of(RewardModel.from_pretrained(folder, seed=0, device=device, dtype=precision.dtype).eval())


def _preference_stage(config: TrainConfig, feed: ExampleFeed, model: nn.Module, pins: Pins) -> DPO | KTO:
    """With the reference's log-probabilities beside the examples, where they are not those of a model without adapters."""
    if not config.lora and config.dpo_loss not in WITHOUT_REFERENCE:
        feed = with_kept_reference(config, feed, model, base=pins["init_from"])
    if config.dpo_loss == "kto":
        weights = config.kto_desirable_weight, config.kto_undesirable_weight
        return KTO(feed, model, config.dpo_beta, *weights)
    return DPO(
        feed, config.dpo_loss, beta=config.dpo_beta, label_smoothing=config.label_smoothing, gamma=config.simpo_gamma
    )  # fmt: skip


def _of_task(config: TrainConfig, task: TaskData, base: Path, sampler: int) -> StageData:
    train, held_out = task.train.groups(), task.held_out.groups()
    return StageData(
        base, task.tokenizer, task.max_length, task.order, len(train), ExampleData(train, config.seed, sampler),
        ExampleData(held_out, config.seed) if held_out else None, task.report, files=task.files, task=task,
    )  # fmt: skip


def _task_stage(data: TaskData, feed: ExampleFeed) -> Classify | Tag | Answer:
    if data.task.stage == "classify":
        return Classify(feed, data.labels, data.causal, data.class_weights)
    if data.task.stage == "tag":
        return Tag(feed, data.task.labels, data.held_out.read, data.held_out.kept, data.class_weights)
    return Answer(feed, data.held_out.read, data.held_out.kept, data.may_be_none)


def _named(config: TrainConfig) -> str:
    return f"--stage {config.stage}" + (f" --dpo_loss {config.dpo_loss}" if config.stage == "dpo" else "")


def _digests(paths: list[str]) -> list[str]:
    """SHA-256 of each file."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
