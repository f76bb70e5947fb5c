"""How does a folder of text become a tokenizer and token shards?

    python data_prep_tool.py --input_dir my_text --output_dir data

reads .txt, .md, .json and .jsonl files (also .gz) below my_text, trains a tokenizer on them and writes the folder that
train.py takes as --data_dir. The output is the same, byte for byte, whatever --num_workers is. Killed or interrupted,
the same command continues. What is in the folder: docs/data.md. With --format sft or preference it encodes examples to
fine-tune on instead: see finetune_data/example_shards.py.
"""

import shlex
from pathlib import Path
from typing import Any

from arguments import ArgumentParser
from dataprep.pipeline import TOKENIZER_TYPES, Options, prepare
from dataprep.progress import Progress
from dataprep.train_tokenizer import PATTERNS, TIKTOKEN_PATTERNS
from errors import UserError, run_script

OF_EXAMPLES = ("tokenizer_from", "rename_columns", "train_on", "chat_template")
OF_BOTH = ("input_dir", "output_dir", "format", "overwrite", "max_length", "shard_tokens")


def build_parser() -> ArgumentParser:
    """All flags, in groups."""
    parser = ArgumentParser(prog="data_prep_tool.py", description=__doc__)
    add_input_flags(parser.add_argument_group("input and output"))
    add_tokenizer_flags(parser.add_argument_group("tokenizer"))
    add_dataset_flags(parser.add_argument_group("dataset"))
    add_example_flags(parser.add_argument_group("examples (--format sft and preference)"))
    group = parser.add_argument_group("running")
    group.add_argument("--num_workers", type=int, default=4, help="processes that read and encode")
    return parser


def add_input_flags(group: Any) -> None:
    group.add_argument("--input_dir", type=Path, required=True, help="folder of text, read with all its subfolders")
    group.add_argument(
        "--format",
        choices=("text", "sft", "preference"),
        default="text",
        help="text; or files of examples, as train.py's --train_data takes them: sft (chats, texts) or preference (pairs, "
        "labelled answers), for which --input_dir may be one file",
    )
    group.add_argument("--output_dir", type=Path, required=True, help="folder to write; train.py's --data_dir")
    group.add_argument(
        "--text_extensions", nargs="+", default=[], metavar="EXT", help="further files to read as plain text: .py .rst"
    )
    group.add_argument("--text_key", default="text", help="key of the text in .json and .jsonl objects")
    group.add_argument("--overwrite", action="store_true", help="make a finished dataset in --output_dir anew")


def add_tokenizer_flags(group: Any) -> None:
    group.add_argument(
        "--tokenizer_type",
        choices=TOKENIZER_TYPES,
        default="bpe",
        help="bpe: byte-level, trained here; wordpiece: BERT's, trained here, loses text; tiktoken: --tiktoken_encoding; "
        "existing: --tokenizer_dir",
    )
    group.add_argument("--vocab_size", type=int, help="ids of a tokenizer trained here, at most (default: 32000)")
    group.add_argument(
        "--pretokenizer",
        choices=list(PATTERNS),
        default="llama3",
        help="split pattern of bpe; these are the ones that llama.cpp knows",
    )
    group.add_argument(
        "--tiktoken_encoding", choices=list(TIKTOKEN_PATTERNS), default="gpt2", help="encoding of tiktoken"
    )
    group.add_argument("--tokenizer_dir", type=Path, help="folder with the tokenizer.json of an existing tokenizer")
    group.add_argument(
        "--lowercase", action="store_true", help="wordpiece: letters without case and accents, as BERT's uncased models"
    )
    group.add_argument(
        "--eos_token",
        help="token that ends a document (default: <|endoftext|>; of an encoder [SEP]; or the existing one's)",
    )
    group.add_argument(
        "--encoder_tokens",
        action="store_true",
        help="bpe: the special tokens of an encoder, [PAD] [UNK] [CLS] [SEP] [MASK], instead of those of chats "
        "(wordpiece has them anyway)",
    )
    group.add_argument(
        "--special_tokens",
        nargs="*",
        metavar="TOKEN",
        help="special tokens of a tokenizer trained here, beside the end of text and padding (default: those of chats, "
        "reasoning and tool calls, and reserved ones to 32 in all: docs/data.md; of an encoder none)",
    )
    group.add_argument(
        "--tokenizer_train_bytes",
        type=int,
        default=200_000_000,
        help="train the tokenizer on a fixed sample of at most this many bytes",
    )


def add_dataset_flags(group: Any) -> None:
    group.add_argument("--max_length", type=int, default=2048, help="tokens of a chunk (a window) in training")
    group.add_argument(
        "--stride",
        type=int,
        help="tokens that two neighbouring chunks share; nothing is stored twice "
        "(default: 1024, or half of --max_length where that is less)",
    )
    group.add_argument(
        "--val_fraction",
        type=float,
        default=0.01,
        help="share of documents held out, chosen by a hash of their content",
    )
    group.add_argument(
        "--val_subdir",
        metavar="NAME",
        help="folder in --input_dir whose text is the validation split, and no other (default: --val_fraction of all)",
    )
    group.add_argument("--shard_tokens", type=int, default=256_000_000, help="tokens of a shard, at most")


def add_example_flags(group: Any) -> None:
    group.add_argument(
        "--tokenizer_from",
        type=Path,
        metavar="DIR",
        help="the model to fine-tune: its tokenizer and chat template are used",
    )
    group.add_argument(
        "--rename_columns",
        nargs="+",
        default=[],
        metavar="COLUMN=MEANING",
        help="for columns of other names: question=prompt",
    )
    group.add_argument(
        "--train_on",
        choices=("assistant", "last", "all"),
        default="assistant",
        help="tokens of a chat that are learned: every answer, the last answer, or all",
    )
    group.add_argument("--chat_template", help="chatml, llama3 or a Jinja file (default: the model's own, else chatml)")


def refuse_flags_of_the_other_kind(parser: ArgumentParser, args: dict[str, Any]) -> None:
    """UserError for a flag that --format makes meaningless, and for examples without --tokenizer_from."""
    text = args["format"] == "text"
    if not text and args["tokenizer_from"] is None:
        raise UserError(
            f"--tokenizer_from is missing: --format {args['format']} needs the model that is to be fine-tuned"
        )
    for name in args:
        if name not in OF_BOTH and (name in OF_EXAMPLES) == text and args[name] != parser.get_default(name):
            other = "--format sft and preference" if text else "--format text"
            raise UserError(f"--{name} belongs to {other}, and --format is {args['format']}; leave it out")


def main() -> None:
    parser = build_parser()
    args = vars(parser.parse_args())
    refuse_flags_of_the_other_kind(parser, args)
    if args["format"] != "text":
        from finetune_data.example_shards import ExampleOptions, prepare_examples  # here: torch takes seconds to import

        args["rename_columns"] = tuple(args["rename_columns"])
        prepare_examples(ExampleOptions(**{name: args[name] for name in ExampleOptions.__annotations__}), Progress())
        return
    for name in ("format", *OF_EXAMPLES):
        del args[name]
    args["text_extensions"] = tuple(args["text_extensions"])
    args["special_tokens"] = None if args["special_tokens"] is None else tuple(args["special_tokens"])
    progress = Progress()
    if args["vocab_size"] is None:
        del args["vocab_size"]
    elif args["tokenizer_type"] in ("tiktoken", "existing"):
        progress.say(f"--vocab_size is not used: a {args['tokenizer_type']} tokenizer has the size it has")
    if args["stride"] is None:
        args["stride"] = min(Options.stride, args["max_length"] // 2)
    prepare(Options(**args), progress)
    progress.say(f"next: python train.py --data_dir {shlex.quote(str(args['output_dir']))}")


if __name__ == "__main__":
    run_script(main)
