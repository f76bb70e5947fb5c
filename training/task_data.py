"""What do the stages that classify, tag and answer learn from, and what are they judged on?

Files are read and encoded by finetune_data/ (labelled.py, tagged.py, answer_spans.py); a sequence is a text, a sentence, or
a window of a text behind its question. What is held out is kept as it was read, too: entities and answers are judged on it.
"""

import hashlib
import json
import math
import sys
from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters.scalar_head import files_naming_pad
from adapters.task_heads import TASK_CONFIG, Task, TaskConfig, figure_names, saved_task, task_config, task_padding
from batches.packing import Sequence
from dataprep.tokenizers import Tokenizer, load_tokenizer
from errors import UserError
from finetune_data.answer_spans import Question, encode_questions, read_questions
from finetune_data.encoding_examples import show_example
from finetune_data.labelled import Labels, encode_labelled, read_labelled
from finetune_data.tagged import TaggedWords, encode_tagged, read_tagged
from finetune_data.task_layout import Layout, find_layout
from finetune_data.task_metrics import balanced_class_weights
from training.config import TrainConfig

DEFAULT_LENGTH = 512  # of rows, where the model allows more: what BERT takes


@dataclass(frozen=True)
class Encoded:
    """Examples of one kind: what each was read as, what is kept of its encoding, and its sequences.

    kept: of texts nothing, of a sentence the place of each word's first piece, of a question its windows.
    """

    read: list[Any]
    kept: list[Any]
    sequences: list[list[Sequence]]

    def select(self, numbers: SequenceOf[int]) -> "Encoded":
        return Encoded(*([values[number] for number in numbers] for values in (self.read, self.kept, self.sequences)))

    def groups(self) -> list[list[Sequence]]:
        """Each sequence as a sample of its own."""
        return [[sequence] for sequences in self.sequences for sequence in sequences]


@dataclass(frozen=True)
class TaskData:
    """What a task learns from, and what is held out.

    labels: of classify. class_weights: of each label, () where all weigh the same. order, report, files: as in
    stages.build.StageData. may_be_none: whether some question has no answer.
    """

    task: Task
    labels: Labels
    causal: bool
    tokenizer: Tokenizer
    max_length: int
    train: Encoded
    held_out: Encoded
    order: dict
    class_weights: tuple[float, ...] = ()
    may_be_none: bool = False
    report: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


def open_task_data(config: TrainConfig, base: Path, context: int, sampler: int) -> TaskData:
    """The data of config.stage for the model in `base`, which takes `context` tokens. Raises UserError."""
    tokenizer, known = load_tokenizer(base), saved_task(base)
    max_length = config.max_length or min(context, DEFAULT_LENGTH)
    if max_length > context:
        raise UserError(f"--max_length {max_length} is more than the model in {base} takes, {context} tokens")
    shape = task_config(base, Task(config.stage, figure_names(2)))
    layout = find_layout(tokenizer, causal=shape.causal)
    reader = _Reader(config, tokenizer, layout, max_length, known if known and known.stage == config.stage else None)
    train = reader.read(config.train_data)
    if config.eval_data:
        held_out = reader.read(config.eval_data)
    else:
        learned, kept_back = _split(reader.keys(train), config.eval_fraction)
        train, held_out = train.select(learned), train.select(kept_back)
    reader.report.append(
        f"{len(train.read):,} examples to learn from, {len(held_out.read):,} held out; the first as it is read:"
    )
    reader.report.append(show_example(tokenizer, train.sequences[0][0], color=sys.stdout.isatty()))
    whole = TaskConfig.of(shape, reader.task, shape.pooling)
    order = {
        "fingerprints": _digests(config.train_data), "held_out": _digests(config.eval_data),
        "rename_columns": sorted(config.rename_columns), "max_length": max_length, "label_kind": reader.labels.kind,
        "eval_fraction": config.eval_fraction, "seed": config.seed, "sampler": sampler,
        **({"doc_stride": config.doc_stride} if config.stage == "answer" else {}),
    }  # fmt: skip
    files = files_naming_pad(base, task_padding(base, shape)) if shape.causal else {}
    if config.lora:
        files[TASK_CONFIG] = (json.dumps(whole.to_hf(), indent=2, ensure_ascii=False) + "\n").encode()
    return TaskData(
        reader.task, reader.labels, shape.causal, tokenizer, max_length, train, held_out, order,
        _class_weights(config, reader, train), reader.may_be_none, reader.report, files,
    )  # fmt: skip


@dataclass
class _Reader:
    """Reads and encodes files for one stage. The first files say what the labels are, unless the model has some already."""

    config: TrainConfig
    tokenizer: Tokenizer
    layout: Layout
    max_length: int
    known: Task | None
    labels: Labels = field(default_factory=Labels)
    may_be_none: bool = False
    report: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        names = self.labels.names or figure_names(self.labels.num_outputs)
        return Task("answer") if self.config.stage == "answer" else Task(self.config.stage, names, self.labels.kind)

    def read(self, paths: list[str]) -> Encoded:
        rename = dict(pair.split("=", 1) for pair in self.config.rename_columns)
        return {"classify": self._texts, "tag": self._sentences, "answer": self._questions}[self.config.stage](
            paths, rename
        )

    def keys(self, encoded: Encoded) -> list[Hashable]:
        """What examples that must be held out together share: the text that questions are about."""
        return [one.context if isinstance(one, Question) else number for number, one in enumerate(encoded.read)]

    def _texts(self, paths: list[str], rename: dict[str, str]) -> Encoded:
        wanted = self.labels if self.labels.kind else self._wanted()
        found = read_labelled(paths, rename=rename, wanted=wanted)
        self.labels = found.labels
        encoded = encode_labelled(self.tokenizer, self.layout, found.examples, found.labels, max_length=self.max_length)
        self.report += found.report
        self._say_cut(encoded.truncated)
        return Encoded(found.examples, [None] * len(found.examples), [[one] for one in encoded.sequences])

    def _wanted(self) -> Labels:
        kind = "" if self.config.label_kind == "auto" else self.config.label_kind
        if self.known is None:
            return Labels(kind)
        if kind not in ("", self.known.kind):
            raise UserError(f"--label_kind {kind} is not the model's, which was trained for {self.known.kind} labels")
        if self.known.kind == "regression":
            return Labels("regression", (), self.known.num_outputs)
        return Labels(self.known.kind, self.known.labels, self.known.num_outputs)

    def _sentences(self, paths: list[str], rename: dict[str, str]) -> Encoded:
        names = self.labels.names or (self.known.labels if self.known else ())
        found = read_tagged(paths, rename=rename, names=names)
        self.labels = Labels("single", found.names, len(found.names))
        encoded = encode_tagged(self.tokenizer, self.layout, found.examples, max_length=self.max_length)
        self.report += found.report
        self._say_cut(sum(encoded.truncated))
        if encoded.words_without_place:
            self.report.append(f"{encoded.words_without_place:,} words have no token, and count as tagged O")
        return Encoded(found.examples, encoded.places, [[one] for one in encoded.sequences])

    def _questions(self, paths: list[str], rename: dict[str, str]) -> Encoded:
        found = read_questions(paths, rename=rename)
        self.may_be_none |= found.some_without_answer
        encoded = encode_questions(
            self.tokenizer, self.layout, found.examples, max_length=self.max_length, doc_stride=self.config.doc_stride
        )
        self.report += found.report
        windows = sum(map(len, encoded.windows))
        self.report.append(
            f"{len(found.examples):,} questions in {windows:,} windows of at most {self.max_length} tokens"
        )
        if cut := sum(encoded.cut_questions):
            self.report.append(f"{cut:,} questions cut off")
        if encoded.hidden:
            self.report.append(f"{encoded.hidden:,} questions have an answer that no window shows whole")
        return Encoded(found.examples, encoded.windows, [[w.sequence for w in ws] for ws in encoded.windows])

    def _say_cut(self, truncated: int) -> None:
        if truncated:
            self.report.append(f"{truncated:,} examples cut off at --max_length {self.max_length}")


def _class_weights(config: TrainConfig, reader: _Reader, train: Encoded) -> tuple[float, ...]:
    """n / (k · count) of each label's examples, or words: their mean over what is learned from is 1."""
    if config.stage == "answer" or config.class_weights == "none":
        return ()
    if reader.labels.kind != "single":
        raise UserError(
            f"--class_weights is for one label a text, and these are {reader.labels.kind} labels: leave it out"
        )
    ids: list[int] = []
    for one, places in zip(train.read, train.kept, strict=True):
        if isinstance(one, TaggedWords):
            ids += [tag for tag, place in zip(one.tags, places, strict=True) if place >= 0]
        else:
            ids.append(one.label)
    weights = balanced_class_weights(ids, reader.labels.num_outputs)
    words = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(reader.labels.names, weights, strict=True))
    reader.report.append(f"class weights, whose mean over the data is 1: {words}")
    return tuple(weights.tolist())


def _split(keys: list[Hashable], fraction: float) -> tuple[list[int], list[int]]:
    """The numbers (to learn from, held out), in order; the same ones each time, those of one key in one of them."""
    distinct = list(dict.fromkeys(keys))
    count = math.ceil(len(distinct) * fraction) if len(distinct) > 1 else 0
    chosen = {distinct[place] for place in np.random.default_rng(0).permutation(len(distinct))[:count]}
    learned = [number for number, key in enumerate(keys) if key not in chosen]
    return learned, [number for number, key in enumerate(keys) if key in chosen]


def _digests(paths: list[str]) -> list[str]:
    """SHA-256 of each file."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
