"""How does a folder of text become a dataset: in which order are things done, and what may be taken over?

    lock → list files → up to date? → plan → tokenizer → encode (tasks on processes) → shards → publish → metadata.json

Every step leaves its result under OUT/.prep/PLAN/, whole or not at all, and is skipped when its result is there. The
output depends on the files and the options alone: not on workers, crashes, the clock, or where the folders are.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataprep.assemble import assemble, publish
from dataprep.encoding import Engine, choose_engine, split_pieces
from dataprep.progress import Progress, duration, megabytes
from dataprep.readers import Discovery, Skipped, discover, looks_like_text
from dataprep.shards import (
    BYTES_EXTENSION,
    METADATA_FILE,
    SPLITS,
    Metadata,
    SplitInfo,
    TokenizerInfo,
    load_metadata,
    open_split,
    token_dtype,
)
from dataprep.tasks import (
    EXAMPLES,
    PARTS_FOLDER,
    Plan,
    TaskResult,
    default_task_bytes,
    digest_range,
    done_mark,
    load_result,
    make_tasks,
    read_range,
    sync_folder,
    write_atomic,
)
from dataprep.tokenizers import (
    DEFAULT_EOS,
    TOKENIZER_FILES,
    Tokenizer,
    load_tokenizer,
    tokenizer_config,
    tokenizer_sha256,
)
from dataprep.train_tokenizer import convert_tiktoken, specials_of, train_bpe, train_wordpiece
from dataprep.workers import Job, run_tasks
from errors import UserError

TRAINED = ("bpe", "wordpiece")
TOKENIZER_TYPES = (*TRAINED, "tiktoken", "existing")
STATE_FOLDER = ".prep"
_TOKENIZER_FOLDER = "tokenizer"
_SAMPLE_BLOCK = 1 << 20
_SAMPLE_PIECE = 1 << 16
_PARITY_BYTES = 1 << 20
# the trainer counts pairs in 32 bits (tokenizers, bpe/trainer.rs): more text could overflow them silently
_MAX_TRAIN_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Options:
    """The flags of data_prep_tool.py, under their names; task_bytes is for tests."""

    input_dir: Path
    output_dir: Path
    tokenizer_type: str = "bpe"
    tokenizer_dir: Path | None = None
    vocab_size: int = 32000
    max_length: int = 2048
    stride: int = 1024
    num_workers: int = 4
    tiktoken_encoding: str = "gpt2"
    pretokenizer: str = "llama3"
    val_fraction: float = 0.01
    val_subdir: str | None = None
    text_extensions: tuple[str, ...] = ()
    text_key: str = "text"
    eos_token: str | None = None
    special_tokens: tuple[str, ...] | None = None
    encoder_tokens: bool = False
    lowercase: bool = False
    tokenizer_train_bytes: int = 200_000_000
    shard_tokens: int = 256_000_000
    overwrite: bool = False
    task_bytes: int | None = None

    @property
    def existing_tokenizer(self) -> Path:
        """The folder of --tokenizer_type existing; `check_options` asks for it."""
        assert self.tokenizer_dir is not None
        return self.tokenizer_dir

    @property
    def for_encoder(self) -> bool:
        """Whether a tokenizer trained here has BERT's special tokens."""
        return self.encoder_tokens or self.tokenizer_type == "wordpiece"

    @property
    def begins_with_cls(self) -> bool:
        """Whether documents begin with [CLS], as an encoder's do."""
        if self.tokenizer_type == "existing":
            return load_tokenizer(self.existing_tokenizer, lazy=True, eos_token=self.eos_token).begin_id is not None
        return self.for_encoder

    @property
    def end_of_text(self) -> str:
        """Of a tokenizer trained here."""
        return self.eos_token or ("[SEP]" if self.for_encoder else DEFAULT_EOS)

    def recorded(self) -> dict[str, Any]:
        """The options that the output depends on: no paths and no worker counts."""
        common = ("tokenizer_type", "max_length", "stride", "val_fraction", "text_key", "shard_tokens", "eos_token")
        trained = {
            "bpe": ("vocab_size", "pretokenizer", "tokenizer_train_bytes"),
            "wordpiece": ("vocab_size", "tokenizer_train_bytes"),
            "tiktoken": ("tiktoken_encoding",),
            "existing": (),
        }[self.tokenizer_type]
        options = {name: getattr(self, name) for name in (*common, *trained)}
        if self.tokenizer_type in TRAINED:
            options["eos_token"] = self.end_of_text
            options["special_tokens"] = None if self.special_tokens is None else list(self.special_tokens)
            # None, not False, as datasets have it that were made before these options were there
            if self.tokenizer_type == "wordpiece":
                options["lowercase"] = self.lowercase or None
            else:
                options["encoder_tokens"] = self.encoder_tokens or None
        options["text_extensions"] = sorted(extension.lower() for extension in self.text_extensions)
        if self.tokenizer_type == "existing":
            options["tokenizer_sha256"] = tokenizer_sha256(self.existing_tokenizer)
        options["begins_with_cls"] = self.begins_with_cls or None
        options["val_subdir"] = Path(self.val_subdir).as_posix() if self.val_subdir else None
        return options


def check_options(options: Options) -> None:
    """UserError for a value that no dataset can be made with, naming its flag."""
    if not 0 <= options.stride < options.max_length:
        raise UserError(
            f"--stride {options.stride} is the overlap of two chunks: it must be from 0 to below --max_length "
            f"{options.max_length}"
        )
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val_fraction {options.val_fraction} must be at least 0 and below 1")
    if not 1 <= options.tokenizer_train_bytes <= _MAX_TRAIN_BYTES:
        raise UserError(f"--tokenizer_train_bytes must be from 1 to {_MAX_TRAIN_BYTES} (the trainer counts in 32 bits)")
    for name in ("num_workers", "shard_tokens", "max_length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if options.tokenizer_type in TRAINED:
        specials_of(
            options.tokenizer_type,
            options.vocab_size,
            options.end_of_text,
            options.special_tokens,
            options.for_encoder,
        )
    elif options.special_tokens is not None:
        raise UserError(
            f"--special_tokens belongs to tokenizers that are trained here, and --tokenizer_type is {options.tokenizer_type}; "
            "train.py --stage sft --add_chat_tokens gives a model's tokenizer those of its chat template"
        )
    if options.encoder_tokens and options.tokenizer_type not in TRAINED:
        raise UserError(
            f"--encoder_tokens belongs to tokenizers that are trained here, and --tokenizer_type is {options.tokenizer_type}; "
            "leave it out"
        )
    if options.lowercase and options.tokenizer_type != "wordpiece":
        raise UserError(
            f"--lowercase belongs to --tokenizer_type wordpiece, and it is {options.tokenizer_type}; leave it out"
        )
    if (options.tokenizer_type == "existing") != (options.tokenizer_dir is not None):
        raise UserError("--tokenizer_dir DIR and --tokenizer_type existing go together; give both or neither")
    if options.tokenizer_type == "tiktoken" and options.eos_token:
        raise UserError(
            f"--eos_token cannot be chosen with --tokenizer_type tiktoken; its encodings end in {DEFAULT_EOS}"
        )
    if options.val_subdir and not (options.input_dir / options.val_subdir).is_dir():
        raise UserError(f"--val_subdir {options.val_subdir} is not a folder in --input_dir {options.input_dir}")
    for extension in options.text_extensions:
        if not re.fullmatch(r"\.[^./\\]+", extension):
            raise UserError(f"--text_extensions {extension}: write each extension with its dot, such as .py")


def prepare(options: Options, progress: Progress, exclude: Collection[Path] = ()) -> Metadata:
    """Make (or continue, or find up to date) the dataset in `options.output_dir`; returns its manifest.

    exclude: folders below input_dir that are not read. UserError for what the user can mend: nothing to read, a full disk, a
    killed worker, another dataset in the way.
    """
    check_options(options)
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    started = time.monotonic()
    if input_dir.is_dir() and output_dir.is_dir() and os.path.samefile(input_dir, output_dir):
        raise UserError(f"--output_dir {output_dir} is the input folder; choose another")
    found = discover(input_dir, tuple(e.lower() for e in options.text_extensions), exclude=[output_dir, *exclude])
    _require_files(found, input_dir)
    with locked_folder(output_dir):
        total = sum(file.size for file in found.files)
        plan = Plan(
            input_dir,
            tuple(found.files),
            options.recorded(),
            make_tasks(found.files, options.task_bytes or default_task_bytes(total)),
        )
        existing = _existing(plan, options, progress)
        if existing is not None:
            progress.say(f"{output_dir} is up to date: same input and options")
            return existing
        progress.say(f"reading {len(plan.files):,} files, {megabytes(total)}, from {input_dir}")
        state = _open_state(output_dir, plan, progress)
        tokenizer = _tokenizer(state, plan, options, progress)
        engine = _engine(plan, tokenizer, progress)
        dtype = token_dtype(tokenizer.vocab_size)
        _encode(Job(state, state / _TOKENIZER_FOLDER, engine.name, dtype), plan, options.num_workers, progress)
        results = [load_result(state, task) for task in range(len(plan.tasks))]
        if not sum(sum(result.documents.values()) for result in results):
            raise UserError(_no_documents(input_dir, _tally(found, results, plan)))
        _require_both_splits(plan, options, results)
        progress.say("writing shards")
        splits = assemble(
            state, results, dtype=dtype, shard_tokens=options.shard_tokens,
            val_fraction=0.0 if options.val_subdir else options.val_fraction,
        )  # fmt: skip
        metadata = _metadata(plan, tokenizer, engine, dtype, splits, found, results)
        names = [name for split in splits.values() for shard in split.shards for name in shard.files]
        publish(state, output_dir, names, [state / _TOKENIZER_FOLDER])
        write_atomic(output_dir / METADATA_FILE, metadata.to_json())
        shutil.rmtree(output_dir / STATE_FOLDER)
    _summarise(metadata, found, time.monotonic() - started, progress)
    return metadata


@contextmanager
def locked_folder(output_dir: Path) -> Iterator[None]:
    """Make the output folder and keep other runs out of it; the lock ends with this process, however it ends."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output_dir {output_dir} is not a folder: a file is in its place") from None
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be made ({error.strerror}); choose another folder") from None
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another run is writing to --output_dir {output_dir}; wait for it, or choose another"
        ) from None
    else:
        yield
    finally:
        os.close(descriptor)


def _require_files(found: Discovery, input_dir: Path) -> None:
    if found.files:
        return
    reason = f"--input_dir {input_dir} holds no .txt, .md, .json or .jsonl file (nor one of them with .gz)"
    if found.skipped:
        reason += f" that can be read ({found.skipped[0].kind}: {found.skipped[0].path})"
    for suffix, count in sorted(found.other_suffixes.items(), key=lambda item: (-item[1], item[0])):
        if suffix.startswith(".") and looks_like_text(input_dir / found.other_examples[suffix]):
            how = f"to read them as plain text add --text_extensions {suffix}"
            raise UserError(f"{reason}, but {count:,} {suffix} files; {how}")
    raise UserError(f"{reason}; put text files there")


def _require_both_splits(plan: Plan, options: Options, results: list[TaskResult]) -> None:
    """UserError for --val_subdir where it, or what is beside it, has no document."""
    for split in SPLITS if options.val_subdir else ():
        if not any(result.documents[split] for result in results):
            where = "in it" if split == "val" else "beside it"
            raise UserError(f"--val_subdir {options.val_subdir}: no document {where}, in {plan.input_dir}, can be used")


def _existing(plan: Plan, options: Options, progress: Progress) -> Metadata | None:
    """The finished dataset in the output folder if it is what this run would make; None if there is none to keep.

    UserError when there is another one and --overwrite is not given.
    """
    path = options.output_dir / METADATA_FILE
    if options.overwrite or not path.exists():
        return None
    try:
        metadata = load_metadata(options.output_dir)
    except UserError as error:
        raise UserError(f"{error}; or add --overwrite to replace it") from None
    change = _changed_options(metadata.options, plan.options) or _changed_input(metadata, plan, path)
    if change:
        raise UserError(
            f"{options.output_dir} already holds a dataset made otherwise ({change}); "
            "add --overwrite to replace it, or choose another --output_dir"
        )
    try:
        for split in metadata.splits:
            open_split(options.output_dir, split)
        if tokenizer_sha256(options.output_dir) != metadata.tokenizer.sha256:
            raise UserError(f"{options.output_dir / 'tokenizer.json'} was changed")
    except UserError as error:
        progress.say(f"the dataset is damaged and is made again: {error}")
        return None
    shutil.rmtree(options.output_dir / STATE_FOLDER, ignore_errors=True)
    return metadata


def _changed_options(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    for name in sorted(before.keys() | now.keys()):
        if name in now and before.get(name) != now[name]:
            return f"{name} was {before.get(name)!r} and is {now[name]!r}"
    return None


def _changed_input(metadata: Metadata, plan: Plan, written: Path) -> str | None:
    before = {source["path"]: source for source in metadata.sources}
    for file in plan.files:
        if file.path not in before:
            return f"the input has a new file {file.path}"
        if before[file.path]["bytes"] != file.size:
            return f"the input file {file.path} has another size"
    if len(before) != len(plan.files):
        return f"the input has {len(before) - len(plan.files)} files fewer"
    finished = written.stat().st_mtime_ns
    times = [os.stat(plan.input_dir / file.path) for file in plan.files]
    if all(max(time.st_mtime_ns, time.st_ctime_ns) < finished for time in times):
        return None
    # touched or copied since: only the content can tell
    digests = [[digest_range(plan.input_dir, plan.files, part) for part in task] for task in plan.tasks]
    for file, digest in zip(plan.files, _file_digests(plan, digests), strict=True):
        if before[file.path]["digest"] != digest:
            return f"the input file {file.path} has another content"
    return None


def _file_digests(plan: Plan, digests: list[list[str]]) -> list[str]:
    """One digest a file: that of its bytes, or of its ranges' digests when it was read in several ranges."""
    of_file: list[list[str]] = [[] for _ in plan.files]
    for task, task_digests in zip(plan.tasks, digests, strict=True):
        for part, digest in zip(task, task_digests, strict=True):
            of_file[part.file].append(digest)
    return [
        one[0] if len(one) == 1 else hashlib.blake2b("".join(one).encode(), digest_size=16).hexdigest()
        for one in of_file
    ]


def _open_state(output_dir: Path, plan: Plan, progress: Progress) -> Path:
    """The folder of this plan's intermediate results; those of other plans are removed."""
    base = output_dir / STATE_FOLDER
    state = base / plan.identity
    others = [path for path in base.iterdir() if path != state] if base.is_dir() else []
    if (state / PARTS_FOLDER).is_dir():
        done = sum(done_mark(state, task).exists() for task in range(len(plan.tasks)))
        progress.say(f"continuing the interrupted run: {done:,} of {len(plan.tasks):,} tasks are done")
    elif others:
        progress.say("the input or the options changed since the interrupted run; starting anew")
    for path in others:
        shutil.rmtree(path)
    (state / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    return state


def _tokenizer(state: Path, plan: Plan, options: Options, progress: Progress) -> Tokenizer:
    folder = state / _TOKENIZER_FOLDER
    if not folder.is_dir():
        started = time.monotonic()
        os.environ.setdefault("RAYON_NUM_THREADS", str(options.num_workers))  # read once, when training begins
        files = _make_tokenizer(plan, options, progress)
        temporary = folder.with_name(_TOKENIZER_FOLDER + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, content in files.items():
            write_atomic(temporary / name, content)
        os.replace(temporary, folder)
        sync_folder(state)
        progress.say(f"tokenizer: done in {duration(time.monotonic() - started)}")
    tokenizer = load_tokenizer(folder)
    note = ""
    if options.tokenizer_type in TRAINED and tokenizer.vocab_size < options.vocab_size:
        note = f" (the text has no more that occur twice; --vocab_size {options.vocab_size:,} needs more text)"
    progress.say(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} ids{note}")
    if tokenizer.kind == "wordpiece":
        # so its text is not compared with what was read, as that of a byte-level BPE could be
        progress.say("warning: WordPiece loses text (spaces, unknown characters); for a model that writes, use bpe")
    return tokenizer


def _make_tokenizer(plan: Plan, options: Options, progress: Progress) -> dict[str, bytes]:
    """The files of the tokenizer that the options ask for."""
    kind, max_length = options.tokenizer_type, options.max_length
    if kind == "existing":
        return _existing_tokenizer(options)
    if kind == "tiktoken":
        progress.say(f"tokenizer: converting tiktoken's {options.tiktoken_encoding}")
        return convert_tiktoken(options.tiktoken_encoding, max_length, _sample(plan, _PARITY_BYTES))
    limit = options.tokenizer_train_bytes
    total = min(limit, sum(file.size for file in plan.files))
    progress.say(f"tokenizer: training {kind}, {options.vocab_size:,} ids, on {megabytes(total)} of the text")
    started = time.monotonic()

    def documents() -> Iterator[str]:
        seen = 0
        # validation text teaches nothing, unless there is no other
        splits = ("train",) if next(_sample(plan, limit, ("train",)), None) is not None else ("train", "val")
        for text in _sample(plan, limit, splits):
            yield text
            seen += len(text.encode())
            progress.show("tokenizer", seen, total, started)

    common: dict[str, Any] = {
        "vocab_size": options.vocab_size, "eos_token": options.end_of_text, "max_length": max_length,
        "chosen": options.special_tokens, "say": progress.say,
    }  # fmt: skip
    if kind == "wordpiece":
        return train_wordpiece(documents, lowercase=options.lowercase, **common)
    return train_bpe(documents, pretokenizer=options.pretokenizer, encoder_tokens=options.encoder_tokens, **common)


def _existing_tokenizer(options: Options) -> dict[str, bytes]:
    folder = options.existing_tokenizer
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if options.eos_token or "tokenizer_config.json" not in files:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        if options.eos_token:
            config["eos_token"] = options.eos_token
        else:
            tokenizer = load_tokenizer(folder)
            config = tokenizer_config(tokenizer.eos_token, tokenizer.kind, options.max_length, tokenizer.encoder_roles)
        files["tokenizer_config.json"] = (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def _sample(plan: Plan, limit: int, splits: tuple[str, ...] = SPLITS) -> Iterator[str]:
    """Texts of about `limit` bytes of the corpus in all, or all of it: blocks in the order of a hash of their place.

    Documents come in pieces of at most 64 Ki characters, cut where every pre-tokenizer cuts.
    """
    blocks = []
    for part in (part for task in make_tasks(plan.files, _SAMPLE_BLOCK) for part in task):
        place = f"{plan.files[part.file].path}:{part.start}".encode(errors="surrogateescape")
        blocks.append((hashlib.blake2b(place, digest_size=8).digest(), part))
    if sum(part.stop - part.start for _, part in blocks) > limit:
        blocks.sort(key=lambda block: (block[0], block[1].file, block[1].start))
    taken = 0
    for _, part in blocks:
        for item in read_range(plan, part):
            if isinstance(item, Skipped) or item[1] not in splits:
                continue
            for piece in split_pieces(item[0].chunks(), _SAMPLE_PIECE):
                yield piece
                taken += len(piece.encode())
                if taken >= limit:
                    return


def _engine(plan: Plan, tokenizer: Tokenizer, progress: Progress) -> Engine:
    engine = choose_engine(tokenizer, _sample(plan, _PARITY_BYTES))
    progress.say(f"encoding with {engine.name}: {engine.reason}")
    return engine


def _encode(job: Job, plan: Plan, num_workers: int, progress: Progress) -> None:
    total = sum(plan.task_bytes(task) for task in range(len(plan.tasks)))
    finished = {task: plan.task_bytes(task) for task in range(len(plan.tasks)) if done_mark(job.state, task).exists()}
    before = sum(finished.values())
    done = dict(finished)
    started = time.monotonic()

    def report(task: int, size: int) -> None:
        done[task] = min(size, plan.task_bytes(task))
        progress.show("encoding", sum(done.values()) - before, total - before, started)

    run_tasks(job, plan, num_workers, report)
    seconds = time.monotonic() - started
    if total > before:
        rate = (total - before) / seconds / 1e6
        progress.say(f"encoded {megabytes(total - before)} in {duration(seconds)}, {rate:.1f} MB/s")


def _tally(found: Discovery, results: list[TaskResult], plan: Plan) -> dict[str, dict[str, Any]]:
    """{kind: {"count", "examples": the first few as "file:line"}} of all that was skipped, kinds in order."""
    kinds: dict[str, dict[str, Any]] = {}
    for one in found.skipped:
        _count(kinds, one.kind, 1, [one.path])
    for result in results:
        for kind, skipped in result.skipped.items():
            examples = [
                f"{path}:{_line(plan, path, line, start)}" if line else path for path, line, start in skipped.examples
            ]
            _count(kinds, kind, skipped.count, examples)
    return dict(sorted(kinds.items()))


def _count(kinds: dict[str, dict[str, Any]], kind: str, count: int, examples: list[str]) -> None:
    one = kinds.setdefault(kind, {"count": 0, "examples": []})
    one["count"] += count
    one["examples"] = (one["examples"] + examples)[:EXAMPLES]


def _line(plan: Plan, path: str, line: int, start: int) -> int:
    """The line's number in its file, given its number among the lines that begin at byte `start` or later."""
    before = 0
    with open(plan.input_dir / path, "rb") as file:
        last = b"\n"
        while start > 0 and (block := file.read(min(start, 1 << 23))):
            before += block.count(b"\n")
            start -= len(block)
            last = block[-1:]
    return line + before + (last != b"\n")


def _no_documents(input_dir: Path, skipped: dict[str, dict[str, Any]]) -> str:
    reasons = ", ".join(f"{one['count']:,} × {kind} ({one['examples'][0]})" for kind, one in skipped.items())
    if not skipped:
        return f"--input_dir {input_dir} holds no text"
    return f"no document of --input_dir {input_dir} can be used: {reasons}"


def _metadata(
    plan: Plan,
    tokenizer: Tokenizer,
    engine: Engine,
    dtype: str,
    splits: dict[str, SplitInfo],
    found: Discovery,
    results: list[TaskResult],
) -> Metadata:
    # what follows from the text and is not trained on does not make another dataset of it
    shards = [shard for split in splits.values() for shard in split.shards]
    files = [
        {name: info for name, info in shard.files.items() if not name.endswith(BYTES_EXTENSION)} for shard in shards
    ]
    content = [tokenizer.sha256, dtype, [{name: asdict(info) for name, info in one.items()} for one in files]]
    digests = _file_digests(plan, [result.digests for result in results])
    return Metadata(
        dtype=dtype,
        max_length=plan.options["max_length"],
        stride=plan.options["stride"],
        tokenizer=TokenizerInfo(
            type=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            sha256=tokenizer.sha256,
            eos_token=tokenizer.eos_token,
            eos_token_id=tokenizer.eos_token_id,
        ),
        splits=splits,
        sources=[
            {"path": file.path, "bytes": file.size, "unit": file.unit, "digest": digest}
            for file, digest in zip(plan.files, digests, strict=True)
        ],
        skipped=_tally(found, results, plan),
        options={**plan.options, "engine": engine.name, "engine_check": engine.reason},
        fingerprint=hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest(),
    )


def _summarise(metadata: Metadata, found: Discovery, seconds: float, progress: Progress) -> None:
    for kind, one in metadata.skipped.items():
        more = ", …" if one["count"] > len(one["examples"]) else ""
        progress.say(f"skipped {one['count']:,} × {kind}: {', '.join(one['examples'])}{more}")
    others = sum(found.other_suffixes.values())
    if others:
        kinds = sorted(found.other_suffixes.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:3])
        progress.say(f"left aside {others:,} files of other types: {named}{', …' if len(kinds) > 3 else ''}")
    train, val = metadata.splits["train"], metadata.splits["val"]
    text, tokens = train.bytes + val.bytes, train.tokens + val.tokens
    progress.say(
        f"{train.documents + val.documents:,} documents, {tokens:,} tokens, {text / tokens:.2f} bytes a token, "
        f"{megabytes(text)} in {duration(seconds)}"
    )
    progress.say(f"train: {train.documents:,} documents, {train.tokens:,} tokens in {len(train.shards)} shards")
    progress.say(f"val:   {val.documents:,} documents, {val.tokens:,} tokens in {len(val.shards)} shards")
    if not val.documents and metadata.options["val_fraction"]:
        progress.say(
            f"warning: none of the {train.documents} documents is held out, as each is a large part of the text; for a "
            "validation loss raise --val_fraction or split the text into more files"
        )
