"""How do the raw text files of --train_file and --val_file become the shards that a run reads?

    SAVE_DIR/data/3f2a…/text/train/0000_book.txt   links to the files, as a folder that data_prep_tool.py could read
    SAVE_DIR/data/3f2a…/                           what it makes of them

The folder is named by a digest of the files' bytes and of the options. So a second start finds it finished, or goes on with
it where the first was killed, and changed files are prepared anew beside it.
"""

import hashlib
import json
import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from checkpointing.save_folder import from_rank_0
from dataprep.known_tokenizers import find_tokenizer
from dataprep.pipeline import TRAINED, Options, prepare
from dataprep.progress import Progress
from dataprep.readers import EMPTY, NO_TEXT, TEXT_EXTENSIONS, Document, SourceFile, discover, read_documents
from dataprep.shards import METADATA_FILE
from dataprep.tokenizers import Tokenizer, load_tokenizer
from errors import UserError
from training.config import TrainConfig
from training.resume import check_data_order

_PATIENCE = timedelta(days=7)  # of the ranks that wait, for a corpus of any size
_READ_AS_THEY_ARE = (*TEXT_EXTENSIONS, ".json", ".jsonl")
_TABLES = (".csv", ".tsv", ".parquet")
_VAL = "val"


def with_prepared_text(
    config: TrainConfig, base: Path | None, context: int | None, saved_order: dict, checkpoint: Path | None
) -> tuple[TrainConfig, dict[str, Any]]:
    """(config that reads the shards made of --train_file, what of the files a resumed run must find unchanged).

    base, context: the model that is trained on, and the tokens it can take. saved_order: of the run that goes on, in
    `checkpoint`. Every rank calls it; the first prepares, and the others wait. UserError for files that cannot be used or
    that have changed, and for a tokenizer that cannot be found.
    """
    files = {"--train_file": config.train_file, "--val_file": config.val_file}
    _refuse_columns(config, files)
    order = from_rank_0(
        lambda: {flag[2:]: [_digest(flag, path, config.save_dir) for path in paths] for flag, paths in files.items()}
    )
    check_data_order(saved_order, order, checkpoint)
    folder, trained = from_rank_0(lambda: _prepare(config, base, context, files, order), _PATIENCE)
    # a small text gives a tokenizer fewer ids than it was asked for
    vocab_size = None if trained else config.vocab_size
    return replace(config, data_dir=[str(folder)], vocab_size=vocab_size), order


def _refuse_columns(config: TrainConfig, files: dict[str, list[str]]) -> None:
    """UserError for tables, whose bytes would be read as text, and for a renaming that no file would heed."""
    names = {path: Path(path).name.lower().removesuffix(".gz") for paths in files.values() for path in paths}
    for flag, paths in files.items():
        for path in paths:
            if names[path].endswith(_TABLES):
                raise UserError(
                    f"{flag} {path} is a table: write its column of text as .jsonl, or fine-tune on it with --stage "
                    "and --train_data"
                )
    for pair in config.rename_columns:
        if not pair.endswith("=text"):
            raise UserError(
                f"--rename_columns {pair}: of --train_file a column can only be the text; write COLUMN=text"
            )
    if config.rename_columns and not any(
        Path(path).is_dir() or name.endswith((".json", ".jsonl")) for path, name in names.items()
    ):
        raise UserError("--rename_columns is for .json and .jsonl files, and --train_file names none: leave it out")


def _prepare(
    config: TrainConfig, base: Path | None, context: int | None, files: dict[str, list[str]], order: dict[str, Any]
) -> tuple[Path, bool]:
    """(the folder of shards, whether its tokenizer was trained on the text)."""
    cache = Path(config.save_dir) / "data"
    progress = Progress()
    options = _options(config, base, context, cache, progress)
    names = [Path(path).name for paths in files.values() for path in paths]  # a suffix says how a file is read
    content = json.dumps([order, names, replace(options, val_subdir=None).recorded()], sort_keys=True)
    folder = cache / hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    links = _link(folder / "text", files)
    options = replace(options, input_dir=folder / "text", output_dir=folder)
    if not (folder / METADATA_FILE).exists():
        _refuse_unusable(folder / "text", links, options.text_key, config.save_dir)
    prepare(options, progress, exclude=[Path(config.save_dir)])
    return folder, options.tokenizer_type in TRAINED


def _options(config: TrainConfig, base: Path | None, context: int | None, cache: Path, progress: Progress) -> Options:
    """Those of data_prep_tool.py; input_dir and output_dir are still to be set."""
    max_length = config.max_length or min(context or Options.max_length, Options.max_length)
    stride = min(Options.stride, max_length // 2) if config.stride is None else config.stride
    if stride >= max_length:
        raise UserError(
            f"--stride {stride} must be smaller than --max_length {max_length}: it is the rows' overlap, 0 where a script "
            "that counts from row to row has --stride as large as --max_length"
        )
    columns = [pair.partition("=")[0] for pair in config.rename_columns if pair.endswith("=text")]
    size = sum(file.stat().st_size for path in config.train_file for file in _files_of(Path(path), config.save_dir))
    options = Options(
        cache, cache, max_length=max_length, stride=stride, text_key=columns[0] if columns else Options.text_key,
        vocab_size=config.vocab_size or fitting_vocab_size(size), encoder_tokens=config.stage == "mlm",
        val_subdir=_VAL if config.val_file else None,
    )  # fmt: skip
    if base is None and config.tokenizer is None:
        return options
    folder = base or find_tokenizer(str(config.tokenizer))
    progress.say(f"tokenizer: that of {folder or 'tiktoken, gpt2'}")
    if folder is None:
        _check_tokenizer(config, None)
        return replace(options, tokenizer_type="tiktoken", tiktoken_encoding="gpt2", encoder_tokens=False)
    _check_tokenizer(config, load_tokenizer(folder, lazy=True))
    return replace(options, tokenizer_type="existing", tokenizer_dir=folder, encoder_tokens=False)


def _check_tokenizer(config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    """UserError, before a corpus is prepared, for a tokenizer that the run cannot use. None: tiktoken's, of writers."""
    named = f"--tokenizer {config.tokenizer}" if config.tokenizer else f"--init_from {config.init_from}"
    if config.stage == "mlm" and (tokenizer is None or tokenizer.mask_token_id is None):
        raise UserError(
            f"{named} has no mask token, which --stage mlm hides words with: take an encoder's, such as bert"
        )
    if tokenizer and config.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"--vocab_size {config.vocab_size} is not that of {named}, which is {tokenizer.vocab_size}: leave it out"
        )


def fitting_vocab_size(size: int) -> int:
    """Ids of a tokenizer trained on so many bytes of text: three times the root of their number, to the next power of two.

    Distinct words grow with about the root of a text's length (Heaps' law), and a token must be frequent enough to be
    learned: 1,024 ids for 0.1 MB, 4,096 for 1 MB, 16,384 for 25 MB; from 512, which hold the bytes, to data_prep_tool.py's
    32,000.
    """
    power = round(math.log2(3 * math.sqrt(max(1, size))))
    return min(max(2**power, 512), Options.vocab_size)


def _files_of(path: Path, save_dir: str) -> list[Path]:
    """A file, or what is read below a folder, without what the run itself writes there."""
    if not path.is_dir():
        return [path]
    return [path / file.path for file in discover(path, exclude=[Path(save_dir)]).files]


def _digest(flag: str, path: str, save_dir: str) -> str:
    """SHA-256 of a file, or of the names and digests of those in a folder. UserError where one cannot be read."""
    try:
        if Path(path).is_dir():
            files = _files_of(Path(path), save_dir)
            named = [(str(file.relative_to(path)), _digest(flag, str(file), save_dir)) for file in files]
            return hashlib.sha256(json.dumps(named).encode()).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); name a text file") from None


def _link(folder: Path, files: dict[str, list[str]]) -> dict[str, str]:
    """Fill `folder` with links to the files, in their order; returns {path in it: the flag and the file it is}."""
    links = {}
    for flag, subdir in (("--train_file", "train"), ("--val_file", _VAL)):
        for number, path in enumerate(files[flag]):
            name = f"{subdir}/{number:04d}_{Path(path).name}"
            if not (Path(path).is_dir() or name.lower().removesuffix(".gz").endswith(_READ_AS_THEY_ARE)):
                name += ".txt"
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(path).resolve())
            links[name] = f"{flag} {path}"
    return links


def _refuse_unusable(folder: Path, links: dict[str, str], text_key: str, save_dir: str) -> None:
    """UserError for the first named file or folder without text; other lines and files are skipped and counted, as ever."""
    found = discover(folder, exclude=[Path(save_dir)])
    reasons = {one.path: one.kind for one in found.skipped}
    for name, words in links.items():
        if (folder / name).is_dir() and not any(file.path.startswith(f"{name}/") for file in found.files):
            raise UserError(
                f"{words} holds no .txt, .md, .json or .jsonl file (nor one of them with .gz) that is not named before; name "
                "each file of another kind"
            )
    for file in found.files:
        if (reason := _why_unusable(folder, file, text_key)) is not None:
            reasons[file.path] = reason
    for name, words in links.items():
        if name in reasons:
            mend = "give a file with text in UTF-8"
            if reasons[name] == NO_TEXT:
                mend = f"it has no {text_key}, and --rename_columns COLUMN=text says which column is the text"
            raise UserError(f"{words} cannot be used: {reasons[name]}; {mend}")


def _why_unusable(folder: Path, file: SourceFile, text_key: str) -> str | None:
    reason = EMPTY
    for item in read_documents(folder, file, 0, file.size, text_key):
        if isinstance(item, Document):
            return None
        reason = item.kind
    return reason
