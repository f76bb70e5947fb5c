"""What would this run be, and how long would it take? The table that train.py prints, from the same flags, without training.

Of a file with [[stages]] it prints one table a stage. A stage that starts from what the one before will have made is
planned with that one's shape and tokenizer. The memory leaves out the libraries' context and work space, DDP's buckets,
fragmentation, compilation and evaluation; the time leaves out drawing answers and the forward passes of a reference.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from arguments import ArgumentParser
from batches.sampler import SAMPLER_VERSION
from batches.sentence_pairs import open_sentence_pairs
from batches.windows import Windows
from dataprep.shards import load_metadata, open_split
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from families.task_names import TASKS
from finetune_data.chat_template import load_chat_template
from finetune_data.encoding_examples import encode_example
from finetune_data.example_shards import FORMATS
from finetune_data.examples import read_examples
from model_config import ModelConfig
from ranks import choose_device
from training.config import TrainConfig, add_options, refuse_unread, resolve_config
from training.loading import find_base, read_base_shape, reward_adapter
from training.metrics import peak_tflops
from training.micro_batches import fitted, free_bytes
from training.option import AUTO
from training.plan import GIB, RunPlan, example_sizes, format_plan, grown, model_shape, plan_run
from training.precision import Precision, choose_precision
from training.run_files import duration
from training.stage_plan import read_plan
from training.task_data import open_task_data

_VOCAB_SIZE, _MAX_LENGTH = 32_000, 2048  # data_prep_tool.py's defaults, for a plan without data
_ASSUMED_MFU = 0.4  # of a GPU's data sheet; what well-tuned dense models of 0.1 to 10 B parameters reach
_ASSUMED_SHARE = 0.5  # of the rate that this machine's matrix product reaches
_MEASURED_EXAMPLES = 2000  # so many are tokenised, spread over all, to know how long they are
_BEFORE = "the stage before"  # in place of --init_from, where there is no such folder yet


class Start(NamedTuple):
    """What a run starts from: the shape, a folder with the tokenizer or None, and where both are taken from, in words."""

    shape: ModelConfig
    tokenizer: Path | None
    words: str


class Data(NamedTuple):
    """What is known of the data. samples: rows or examples to learn from; None where it cannot be read, which `words` say."""

    max_length: int
    samples: int | None
    sizes: dict[str, Any] = {}  # noqa: RUF012 - what plan_run is told of the examples; never changed
    words: str = ""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--world_size", type=int, default=1, help="number of devices to plan for")
    add_options(parser)


def main(args: argparse.Namespace) -> int:
    """Print the plan, with the memory by part and the estimated time; of a file with stages, of each of them."""
    given = vars(args).copy()
    world_size = given.pop("world_size")
    stages = read_plan(given["config"]) if "config" in given else []
    if not stages:
        print(_table(given, world_size)[0])
        return 0
    before, tables = None, []
    for stage in stages:
        try:
            table, start = _table(stage.given(given), world_size, before, own=stage.own)
        except UserError as error:
            raise UserError(f"{stage.title}: {error}") from error
        tables.append(f"{stage.title}\n{table}")
        if stage.gives_language_model or before is None:
            before = start
    print("\n\n".join(tables))
    return 0


def _table(
    given: dict[str, Any], world_size: int, before: Start | None = None, own: Collection[str] | None = None
) -> tuple[str, Start]:
    """(the table of one run, what the next stage starts from).

    before: what the stage before would leave. own: the options that a stage's own table sets.
    """
    if before is not None and "init_from" not in given:
        given = {**given, "init_from": _BEFORE}
    config, origins = resolve_config(given, validate=False)
    config.validate(data_needed=False)
    named = [name for name, origin in origins.items() if origin in ("command line", "config file")]
    refuse_unread(config, named if own is None else own)
    if world_size < 1 or world_size % (size := config.ranks_of_a_batch):
        raise UserError(
            f"--world_size must be a multiple of the {config.ranks_of_a_batch} ranks that share a row, and is {world_size}"
        )
    if (groups := world_size // size) > config.batch_size:
        raise UserError(f"--world_size must lie between 1 and --batch_size {config.batch_size}, and is {groups}")
    start = _start(config, before)
    data = _windows(config, start.shape) if config.on_text else _examples(config, start)
    model = grown(start.shape, data.max_length, 0)
    steps_known = not config.counts_epochs(origins)
    if not steps_known and data.samples is not None:
        config, steps_known = dataclasses.replace(config, max_steps=config.steps_of_epochs(data.samples)), True

    device = choose_device(config.device)
    precision = choose_precision(config.mixed_precision, device)

    def planned(config: TrainConfig) -> RunPlan:
        return plan_run(
            config, model, max_length=data.max_length, world_size=world_size,
            half_precision=precision.dtype != torch.float32, train_windows=data.samples,
            judge_over_base=config.init_from != _BEFORE and reward_adapter(config, start.tokenizer) is not None, **data.sizes,
        )  # fmt: skip

    if config.micro_batch_size is AUTO:
        config, _ = fitted(config, planned, world_size, free_bytes(device))
    plan = planned(config)
    extra = {"precision": precision.reason}
    if config.init_from:
        extra["starts from"] = start.words
    if steps_known:
        extra["time estimate"] = _time(config, plan, device, precision)
    else:
        extra["run"] = "as many steps as --num_epochs of the data take, whose size is not known"
        extra["compute"] = f"{plan.flops_per_token:,.0f} FLOPs a token"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        extra["device memory"] = f"{total / GIB:.1f} GiB" + (
            "" if plan.memory_total < total else ": TOO SMALL; lower --micro_batch_size"
        )
    if data.words:
        extra["data"] = data.words
    return format_plan(plan, config, model, extra), Start(model, start.tokenizer, f"what {_BEFORE} leaves: its shape")


# ---- what it starts from, and what it learns from --------------------------------------------------------------------


def _start(config: TrainConfig, before: Start | None) -> Start:
    if config.init_from == _BEFORE and before is not None:
        return before
    if config.init_from is not None:
        base = find_base(config.init_from)
        return Start(read_base_shape(config, base), base, str(base))
    vocab_size, eos, tokenizer = config.vocab_size or _VOCAB_SIZE, None, None
    if config.data_dir:
        found = load_metadata(config.data_dir[0]).tokenizer
        vocab_size, eos, tokenizer = found.vocab_size, found.eos_token_id, Path(config.data_dir[0])
    return Start(model_shape(config, vocab_size, _row_length(config)[0], eos), tokenizer, "nothing")


def _row_length(config: TrainConfig) -> tuple[int, int]:
    """(tokens in a row, overlap) in pretraining."""
    length, stride = _MAX_LENGTH, 0
    if config.data_dir:
        metadata = load_metadata(config.data_dir[0])
        length, stride = metadata.max_length, metadata.stride
    if config.max_length:
        length, stride = config.max_length, 0
    return length, stride if config.stride is None else config.stride


def _windows(config: TrainConfig, shape: ModelConfig) -> Data:
    length, stride = _row_length(config)
    if not config.data_dir:
        length = config.max_length or min(length, shape.max_position_embeddings)
        given = "--train_file, not counted before train.py prepares it" if config.train_file else "none given"
        return Data(
            length, None, words=f"{given}: rows of {length:,} tokens are assumed; name what is prepared with --data_dir"
        )
    splits = [open_split(folder, "train") for folder in config.data_dir]
    if config.next_sentence:
        tokenizer = load_tokenizer(config.data_dir[0], lazy=True)
        return Data(length, open_sentence_pairs(splits, [], tokenizer, max_length=length, seed=0).num_samples)
    return Data(length, sum(len(Windows(split, length, stride)) for split in splits))


def _examples(config: TrainConfig, start: Start) -> Data:
    """The examples of a fine-tuning stage, measured with the tokenizer and the chat template that they are learned with."""
    context = start.shape.max_position_embeddings
    if config.data_dir:
        return _prepared_examples(config)
    length = config.max_length or min(context, _MAX_LENGTH)
    if length > context:
        raise UserError(f"--max_length {length} is more than the model takes, {context} tokens")
    missing = [path for path in config.train_data if not Path(path).exists()]
    if missing or start.tokenizer is None:
        why = f"{missing[0]} is not there yet" if missing else "the model's tokenizer is not there yet"
        return Data(length, None, words=f"not known: {why}; rows of {length:,} tokens are assumed")
    if config.stage in TASKS:
        found = open_task_data(config, start.tokenizer, context, SAMPLER_VERSION)
        train, held_out = found.train.groups(), found.held_out.groups()
        sizes = example_sizes(config, train)
        words = f"of {sizes['tokens_per_example']:,.0f} tokens on average"
        words = f"{len(train):,} examples to learn from, {len(held_out):,} held out, {words}"
        return Data(found.max_length, len(train), sizes, words)
    tokenizer, template = load_tokenizer(start.tokenizer), load_chat_template(start.tokenizer, config.chat_template)
    rename = dict(pair.split("=", 1) for pair in config.rename_columns)
    examples = read_examples(config.train_data, rename=rename).examples
    drawn = config.stage in ("grpo", "ppo")
    room = length - config.max_new_tokens + 1 if drawn else length
    some = examples[:: -(-len(examples) // _MEASURED_EXAMPLES)]
    encoded = [
        encode_example(tokenizer, template, example, max_length=room, train_on=config.train_on).sequences
        for example in some
    ]
    kept = [sequences for sequences in encoded if sequences]
    if not kept:
        raise UserError(f"no example of --train_data can be learned from in rows of --max_length {length}")
    count = round(len(examples) * len(kept) / len(some))
    sizes = example_sizes(config, [sequences[0] for sequences in kept] if drawn else kept)
    measured = f", measured on {len(some):,}" if len(some) < len(examples) else ""
    return _counted(config, length, count, sizes, measured)


def _prepared_examples(config: TrainConfig) -> Data:
    metadata = load_metadata(config.data_dir[0])
    if metadata.options.get("format") not in FORMATS:
        raise UserError(f"--data_dir {config.data_dir[0]} holds text; --stage {config.stage} learns from examples")
    train = metadata.splits["train"]
    count = train.documents // (2 if metadata.options["kind"] == "preference" else 1)
    sizes = {"tokens_per_example": train.tokens / count}
    return _counted(config, config.max_length or metadata.max_length, count, sizes)


def _counted(config: TrainConfig, length: int, count: int, sizes: dict[str, Any], measured: str = "") -> Data:
    """sizes: see example_sizes. As train.py does, --eval_fraction of the examples are held out, if there are two."""
    held_out = math.ceil(count * config.eval_fraction) if count > 1 and not config.eval_data else 0
    tokens = sizes["tokens_per_example"]
    drawn = f" with answers of {config.max_new_tokens:,}" if "longest_prompt" in sizes else ""
    words = (
        f"{count - held_out:,} examples to learn from, {held_out:,} held out, of {tokens:,.0f} tokens on average"
        f"{drawn}{measured}"
    )
    return Data(length, count - held_out, sizes, words)


# ---- how long it takes -----------------------------------------------------------------------------------------------


def _time(config: TrainConfig, plan: RunPlan, device: torch.device, precision: Precision) -> str:
    peak = config.peak_tflops or peak_tflops(device, precision.dtype)
    if peak:
        rate, basis = peak * 1e12 * _ASSUMED_MFU, f"{_ASSUMED_MFU:.0%} of {peak:g} TFLOP/s"
    else:
        measured = _matmul_flops(device, precision.dtype)
        rate = measured * _ASSUMED_SHARE
        basis = f"{_ASSUMED_SHARE:.0%} of the {measured / 1e12:.2f} TFLOP/s that a matrix product reaches here"
    speed = rate * plan.world_size / plan.flops_per_token
    beside = {"dpo": ", without the reference's pass"} | dict.fromkeys(("grpo", "ppo"), ", without drawing answers")
    return f"{duration(plan.seconds(rate))} at {speed:,.0f} tokens/s ({basis}){beside.get(config.stage, '')}"


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 1024-wide matrix product, the best of those that fit into half a second."""
    a, b = (torch.randn(1024, 1024, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
