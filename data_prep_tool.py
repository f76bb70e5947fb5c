"""How does a folder of text become a tokenizer and token shards?

    python data_prep_tool.py --input_dir my_text --output_dir data

reads .txt, .md, .json and .jsonl files (also .gz) below my_text, trains a tokenizer on them and writes the folder that
train.py takes as --data_dir. The output is the same, byte for byte, whatever --num_workers is. Killed or interrupted,
the same command continues. What is in the folder: docs/data.md.
"""

from pathlib import Path

from arguments import ArgumentParser
from dataprep.pipeline import TOKENIZER_TYPES, Options, prepare
from dataprep.progress import Progress
from dataprep.train_tokenizer import PATTERNS, TIKTOKEN_PATTERNS
from errors import run_script


def build_parser() -> ArgumentParser:
    """All flags, in groups."""
    parser = ArgumentParser(prog="data_prep_tool.py", description=__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("--input_dir", type=Path, required=True, help="folder of text, read with all its subfolders")
    group.add_argument("--output_dir", type=Path, required=True, help="folder to write; train.py's --data_dir")
    group.add_argument(
        "--text_extensions", nargs="+", default=[], metavar="EXT", help="further files to read as plain text: .py .rst"
    )
    group.add_argument("--text_key", default="text", help="key of the text in .json and .jsonl objects")
    group.add_argument("--overwrite", action="store_true", help="make a finished dataset in --output_dir anew")

    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer_type",
        choices=TOKENIZER_TYPES,
        default="bpe",
        help="bpe: byte-level, trained here; wordpiece: trained here, loses text; tiktoken: --tiktoken_encoding; "
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
    group.add_argument("--eos_token", help="token that ends a document (default: <|endoftext|>, or the existing one's)")
    group.add_argument(
        "--tokenizer_train_bytes",
        type=int,
        default=200_000_000,
        help="train the tokenizer on a fixed sample of at most this many bytes",
    )

    group = parser.add_argument_group("dataset")
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
    group.add_argument("--shard_tokens", type=int, default=256_000_000, help="tokens of a shard, at most")

    group = parser.add_argument_group("running")
    group.add_argument("--num_workers", type=int, default=4, help="processes that read and encode")
    return parser


def main() -> None:
    args = vars(build_parser().parse_args())
    args["text_extensions"] = tuple(args["text_extensions"])
    progress = Progress()
    if args["vocab_size"] is None:
        del args["vocab_size"]
    elif args["tokenizer_type"] in ("tiktoken", "existing"):
        progress.say(f"--vocab_size is not used: a {args['tokenizer_type']} tokenizer has the size it has")
    if args["stride"] is None:
        args["stride"] = min(Options.stride, args["max_length"] // 2)
    prepare(Options(**args), progress)


if __name__ == "__main__":
    run_script(main)
