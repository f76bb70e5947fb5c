"""What does a model that reads say of each row? Fills masks, classifies, tags, finds answers, or embeds, by its folder.

    python utils.py predict --checkpoint checkpoints/mlm --text "the model [MASK] a text"
    python utils.py predict --checkpoint checkpoints/classifier --input reviews.csv > labelled.jsonl
    python utils.py predict --checkpoint MiniLM --task embed --input lines.txt --normalise

The class that config.json names says what is done: ForMaskedLM fills masks, ForSequenceClassification classifies,
ForTokenClassification tags, ForQuestionAnswering answers; a bare model embeds, and so does any language model with --task
embed. A row is one line of JSON on stdout, in the order of the input: the row's columns and what was found, or "row" and
"error" for a row that cannot be read. Everything else goes to stderr.
"""

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapters.lora import quantise_layers
from adapters.peft_files import learned_over, load_adapter
from adapters.task_heads import Task, TaskModel
from arguments import ArgumentParser
from dataprep.progress import Progress
from dataprep.tokenizers import Tokenizer, load_tokenizer
from errors import UserError
from families.task_names import class_name
from finetune_data.example_files import Row
from finetune_data.task_layout import find_layout
from finetune_data.task_rows import WrongRowError, check_text
from model import Transformer
from model_config import ModelConfig
from ranks import choose_device
from tools.generate import check_model, find_model, replace_what_cannot_be_shown
from tools.predict_rows import Predictor, Reader, read_input, read_texts
from tools.predict_tasks import answer, classify, read_question, read_words, tag
from tools.predict_text import POOLING, Recipe, embed, fill_masks, read_masked, read_recipe
from training.loading import base_and_adapter, find_adapter, load_for_use, read_shape, task_of
from training.precision import choose_precision
from training.task_data import DEFAULT_LENGTH

DTYPES = ("auto", "float32", "bfloat16", "float16")
# flags that only one kind of prediction reads
_READ_BY = {"top_k": "fill", "pooling": "embed", "normalise": "embed", "doc_stride": "answer"}


class Found(NamedTuple):
    """What --checkpoint and --adapter mean. task: of a classifier, tagger or answer finder, else None."""

    folder: Path
    adapter: Path | None
    task: Task | None
    shape: ModelConfig


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="a checkpoint, a run's folder (its newest whole checkpoint), or any folder of a family in docs/families.md",
    )
    add("--adapter", metavar="DIR", help="a PEFT folder, or a run that trained adapters, to put on that model")
    add("--input", metavar="FILE", help="a .txt of a text a line, a .jsonl, .json, .csv, .tsv or .parquet; - is stdin")
    add(
        "--text",
        metavar="TEXT",
        nargs="+",
        help="one text, or two that belong together: a pair, a question and its context",
    )
    add("--task", choices=["auto", "embed"], default="auto", help="auto is what the folder's class is for")
    add("--top_k", type=int, help="how many tokens for a mask (default: 5)")
    add("--pooling", choices=POOLING, help="of which tokens a text's embedding is (default: the folder's, else mean)")
    add("--normalise", action="store_true", help="embeddings of length 1 (default: as the folder says, else not)")
    add("--doc_stride", type=int, help="tokens that windows of a long context share (default: 128)")
    add(
        "--max_length",
        type=int,
        help="longer texts are cut, contexts read in windows (default: the folder's or the model's; of tasks 512 at most)",
    )
    add("--batch_size", type=int, default=32, help="rows computed together; results do not depend on it")
    add(
        "--dtype", choices=DTYPES, default="auto", help="of weights and products; auto is bfloat16 on a GPU that has it"
    )
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes a GPU if there is one")


def main(args: argparse.Namespace) -> int:
    """Print a line for each row."""
    if (args.input is None) == (args.text is None):
        raise UserError("give the rows as --input FILE or as --text, one of the two")
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; it must be at least 1")
    replace_what_cannot_be_shown(sys.stdin, "surrogateescape")
    found = find(args.checkpoint, args.adapter)
    kind = kind_of(found, args.task)
    for flag, reader_of_it in _READ_BY.items():
        if getattr(args, flag) not in (None, False) and kind != reader_of_it:
            raise UserError(f"--{flag} is for another kind of model: this one would {kind}; leave it out")
    rows: list[Row] = read_input(args.input) if args.input else [(1, text_row(args.text, kind))]
    predictor = build(args, found, kind)
    wrong, cut = write_all(predictor, rows, args.batch_size, args.input or "--text")
    for count, words in ((wrong, 'could not be read and have an "error"'), (cut, 'were cut, and have "truncated"')):
        if count:
            print(f"{count:,} of {len(rows):,} rows {words}", file=sys.stderr)
    return 0


def text_row(texts: list[str], kind: str) -> dict[str, str]:
    """The columns of --text."""
    names = ("question", "context") if kind == "answer" else ("text",) if len(texts) == 1 else ("text_a", "text_b")
    if len(texts) != len(names):
        wanted = "a question and its context" if kind == "answer" else "one text, or two that belong together"
        raise UserError(f"--text has {len(texts)} texts; give {wanted}, or a file of rows as --input")
    return dict(zip(names, texts, strict=True))


# ---- the model -------------------------------------------------------------------------------------------------------


def find(checkpoint: str, adapter: str | None) -> Found:
    """The folders that are meant, and what is in them. Raises UserError."""
    folder, on_it = base_and_adapter(find_model(checkpoint), find_adapter(adapter) if adapter else None)
    return Found(folder, on_it, task_of(folder, on_it), read_shape(folder))


def kind_of(found: Found, task: str) -> str:
    """ "fill", "embed", "classify", "tag" or "answer". UserError where --task asks for what the model is not for."""
    if found.task is not None:
        if task == "embed":
            named = class_name(found.shape.family, found.task.stage)
            raise UserError(
                f"--task embed: {found.folder} is a {named}; take the model that it was made of, or leave --task out"
            )
        return found.task.stage
    if task == "embed" or found.shape.head == "none":
        return "embed"
    if found.shape.head == "lm":
        raise UserError(
            f"{found.folder} holds a model that writes text: python utils.py generate continues one, and --task embed "
            "gives embeddings"
        )
    return "fill"


def build(args: argparse.Namespace, found: Found, kind: str) -> Predictor:
    """The model, loaded, and what is done with it. Raises UserError."""
    with_tokenizer = found.adapter and (found.adapter / "tokenizer.json").exists()
    tokenizer = load_tokenizer(found.adapter if found.adapter and with_tokenizer else found.folder)
    recipe = embedding_recipe(args, found) if kind == "embed" else None
    max_length = choose_length(args.max_length, found, recipe)
    if kind == "fill" and tokenizer.mask_token_id is None:
        raise UserError(
            f"{found.folder}: its tokenizer has no mask token; name one as mask_token in tokenizer_config.json"
        )
    model = load(args, found, tokenizer)
    reader = Reader(model, tokenizer, find_layout(tokenizer, causal=found.shape.causal), max_length)
    if recipe is not None:
        print(
            f"embeddings: {recipe.pooling} over at most {max_length:,} tokens{', normalised' if recipe.normalise else ''}",
            file=sys.stderr,
        )
        return Predictor(read_texts, partial(embed, reader, recipe=recipe))
    if kind == "fill":
        top_k = 5 if args.top_k is None else args.top_k
        if top_k < 1:
            raise UserError(f"--top_k is {top_k}; it must be at least 1")
        mask = {token["id"]: token["content"] for token in tokenizer.definition["added_tokens"]}[
            tokenizer.mask_token_id
        ]
        return Predictor(partial(read_masked, mask), partial(fill_masks, reader, top_k=top_k))
    assert found.task is not None
    if kind == "classify":
        return Predictor(read_texts, partial(classify, reader, task=found.task))
    if kind == "tag":
        return Predictor(read_words, partial(tag, reader, task=found.task))
    doc_stride = min(128, max_length // 4) if args.doc_stride is None else args.doc_stride
    return Predictor(read_question, partial(answer, reader, doc_stride=doc_stride))


def embedding_recipe(args: argparse.Namespace, found: Found) -> Recipe:
    """That of the flags, or of the folder where --pooling is not given, --normalise added to it."""
    told = None if args.pooling else read_recipe(found.folder)
    recipe = told or Recipe(args.pooling or "mean", False)
    if recipe.pooling == "cls" and found.shape.causal:
        raise UserError(
            "--pooling cls: the first token of a model that reads from left to right knows nothing; take last"
        )
    return dataclasses.replace(recipe, normalise=recipe.normalise or args.normalise)


def choose_length(given: int | None, found: Found, recipe: Recipe | None) -> int:
    """Tokens of a text at most, special ones included."""
    context = found.shape.max_position_embeddings
    if given is None:
        of_folder = recipe.max_length if recipe else None
        return min(context, of_folder or (DEFAULT_LENGTH if found.task else context))  # a task's as it is trained
    if given > context:
        raise UserError(f"--max_length {given} is more than the model in {found.folder} takes, {context} tokens")
    return given


def load(args: argparse.Namespace, found: Found, tokenizer: Tokenizer) -> Transformer:
    """The model on its device, with its adapter and its head. Raises UserError."""
    device = choose_device(args.device)
    dtype = choose_precision("auto", device).dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model: Transformer
    if found.task is None:
        model = load_for_use(found.folder, found.adapter, device=device, dtype=dtype)
    else:
        model = TaskModel.from_pretrained(found.folder, found.task, device=device, dtype=dtype)
        if found.adapter is not None:
            if learned_over(found.adapter) == "nf4":
                quantise_layers(model)
            load_adapter(model, found.adapter)
    check_model(found.folder, model, tokenizer)
    return model.eval()


# ---- the rows --------------------------------------------------------------------------------------------------------


def write_all(predictor: Predictor, rows: list[Row], batch_size: int, where: str) -> tuple[int, int]:
    """Print a line for each row; returns how many could not be read and how many were cut.

    UserError, before anything is printed, where none can be read.
    """
    read = [_prepared(predictor, row) for row in rows]
    right = [number for number, (_, reason) in enumerate(read) if reason is None]
    if not right:
        raise UserError(
            f"{where} has no row to read: {f'row {rows[0][0]} has {read[0][1]}' if rows else 'it is empty'}"
        )
    progress, started = Progress(sys.stderr), time.monotonic()
    to_print, cut = 0, 0
    for first in range(0, len(right), batch_size):
        chosen = right[first : first + batch_size]
        results = dict(zip(chosen, predictor.predict([read[number][0] for number in chosen]), strict=True))
        progress.clear()
        last = chosen[-1] if first + batch_size < len(right) else len(rows) - 1
        for number in range(to_print, last + 1):
            index, columns = rows[number]
            if number in results:
                assert isinstance(columns, dict)
                cut += "truncated" in results[number]
                print_line(columns | results[number])
            else:
                print_line({"row": index, "error": read[number][1]})
        sys.stdout.flush()
        to_print = last + 1
        progress.show("predicting", first + len(chosen), len(right), started, "rows")
    progress.clear()
    return len(rows) - len(right), cut


def _prepared(predictor: Predictor, row: Row) -> tuple[Any, str | None]:
    """(what is read of a row, None), or (None, why it cannot be read)."""
    _, columns = row
    try:
        if isinstance(columns, str):
            raise WrongRowError(columns)
        check_text(columns)
        return predictor.prepare(columns), None
    except WrongRowError as reason:
        return None, str(reason)


def print_line(result: dict[str, Any]) -> None:
    """One line of JSON, in ASCII on a stream that is not UTF-8. Values of a .parquet that JSON has not become text."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(result, ensure_ascii=not is_utf8, default=str))
