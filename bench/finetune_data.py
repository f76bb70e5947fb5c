"""On which model and examples does bench/finetune.py measure, and how does each way lay them out?

A Hugging Face folder and a file of chats where they are given, else a random Llama of 7M parameters and made-up examples.
Both sides get the same examples in each step: ours packed by batches/packing.py, transformers' padded or in one row.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from batches.micro_batch import IGNORE_INDEX, MicroBatch
from batches.packing import Sequence
from bench.step import llama
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.chat_template import load_chat_template
from finetune_data.encoding_examples import encode_example
from finetune_data.examples import read_examples
from model import Transformer
from training.examples_data import ExampleData

SMALL = llama(256, 704, 6, 4, 2, 8192)


@dataclass(frozen=True)
class Settings:
    """What all ways share. model, data: None for those that are made here."""

    model: str | None
    data: str | None
    steps: int
    batch_size: int
    micro_batch_size: int
    max_length: int
    mixed_precision: str

    @property
    def name(self) -> str:
        """What the results are filed under: figures of other settings are not compared."""
        model = Path(self.model).resolve().name if self.model else "random"
        data = Path(self.data).name if self.data else "made-up examples"
        return (
            f"{model}, {data}, {self.batch_size} x {self.max_length} in micro-batches of {self.micro_batch_size}, "
            f"precision {self.mixed_precision}, {self.steps} steps"
        )


def write_random_model(folder: Path) -> None:
    """A Hugging Face folder with a Llama of 7M parameters, the same ones each time."""
    model = Transformer(SMALL)
    model.init_weights(seed=0, zero_residual=False)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SMALL.to_hf()), encoding="utf-8")


def sequences_of(settings: Settings, folder: Path, vocabulary: int) -> list[Sequence]:
    """The examples of all steps, in their order."""
    count = settings.steps * settings.batch_size
    if settings.data is None:
        return made_up(count, settings.max_length, vocabulary)
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    found: list[Sequence] = []
    for example in read_examples([settings.data]).examples:
        found += encode_example(tokenizer, template, example, max_length=settings.max_length).sequences
        if len(found) >= count:
            return found[:count]
    if not found:
        raise UserError(f"--data {settings.data} holds no example to learn from")
    return [found[number % len(found)] for number in range(count)]


def made_up(count: int, max_length: int, vocabulary: int) -> list[Sequence]:
    """Sequences as long as instructions are: log-normal around 160 tokens, the last two thirds learned; few tokens
    are frequent and most rare, so that there is something to learn."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(160), 0.7, count).astype(int), 8, max_length)
    return [
        Sequence((rng.random(length) ** 3 * vocabulary).astype(np.int64), np.arange(length) >= length // 3)
        for length in lengths
    ]


class InOrder(ExampleData):
    """Examples one after another as they are, so that every way has the same ones in each step."""

    def numbers(self, first: int, count: int) -> list[int]:
        return list(range(first, first + count))


def in_order(sequences: list[Sequence]) -> InOrder:
    return InOrder([[sequence] for sequence in sequences], seed=0)


def padded(sequences: list[Sequence], micro_batch_size: int) -> list[MicroBatch]:
    """As transformers' collator for causal models lays them out: that many rows at a time, padded to the longest."""
    batches = []
    for first in range(0, len(sequences), micro_batch_size):
        rows = sequences[first : first + micro_batch_size]
        shape = len(rows), max(len(row.tokens) for row in rows)
        ids, targets, numbers = (np.full(shape, fill, np.int64) for fill in (0, IGNORE_INDEX, len(rows)))
        for index, row in enumerate(rows):
            size = len(row.tokens)
            ids[index, :size], numbers[index, :size] = row.tokens, index
            targets[index, : size - 1] = np.where(row.learned[1:], row.tokens[1:], IGNORE_INDEX)
        batches.append(
            MicroBatch(
                input_ids=torch.from_numpy(ids),
                targets=torch.from_numpy(targets),
                positions=torch.arange(shape[1]).expand(shape),
                cu_seqlens=None,
                weight=int((targets != IGNORE_INDEX).sum()),
                num_tokens=sum(len(row.tokens) for row in rows),
                sequence_ids=torch.from_numpy(numbers),
            )
        )
    return batches


def in_one_row(batch: MicroBatch) -> MicroBatch:
    """The rows of a packed micro-batch one behind the other; where a document begins, its positions do."""
    flat = {name: getattr(batch, name).reshape(1, -1) for name in ("input_ids", "targets", "positions")}
    return replace(batch, **flat)
