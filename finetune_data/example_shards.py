"""How do examples become shards once, so that no start of a run encodes them again, and how are they read back?

    python data_prep_tool.py --format sft --input_dir answers.jsonl --tokenizer_from MODEL --output_dir data/answers

The folder is a dataset as shards.py has it. Its documents, all in the split train, are the sequences that
encoding_examples.py makes, in order; a preference is two neighbours, chosen and rejected; a dialogue that is rendered answer
by answer is several, which name the same row. Beside each shard lie

    dataset/train_00000_mask.bin, .idx     for each token whether it is learned: 1 or 0, as uint16
    dataset/train_00000_label.bin, .idx    of labelled answers only: for each document its label, 1 or 0, as uint16
    dataset/train_00000_ends_side.bin, …   of preferences only, where a side may be several documents: 1 for its last, else 0

which are datasets of Megatron-LM too: document n of the mask belongs to document n of the tokens. metadata.json has in its
`options` the format, the kind of the examples, their columns, what was learned, the chat template's digest, and the sizes
and checksums of these further files. The tokenizer's files are those of --tokenizer_from.
"""

import hashlib
import io
import json
import os
import shlex
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batches.packing import Sequence
from checkpointing.safetensors_writer import write_file
from dataprep.assemble import SHARDS_FOLDER, publish
from dataprep.file_array import FileArray
from dataprep.pipeline import STATE_FOLDER, locked_folder
from dataprep.progress import Progress
from dataprep.shards import (
    DATASET_FOLDER,
    METADATA_FILE,
    SOURCE_DTYPE,
    FileInfo,
    Metadata,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
    load_metadata,
    open_split,
    token_dtype,
    write_index,
)
from dataprep.tasks import write_atomic
from dataprep.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer, tokenizer_sha256
from errors import UserError
from finetune_data.chat_template import ChatTemplate, load_chat_template
from finetune_data.chat_tokens import describe_template
from finetune_data.encoding_examples import ENDS_SIDE, encode_example, say_by_answer, show_example, with_marked_sides
from finetune_data.examples import ExampleSet, read_examples
from paths import inside

FORMATS = {"sft": ("chat", "text"), "preference": ("preference", "labelled")}  # the kinds of examples that each takes
FLAG_DTYPE = "uint16"  # of masks and labels: the narrowest that write_index knows

_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_EMPTY_SPLIT = SplitInfo(tokens=0, documents=0, bytes=0, shards=())


@dataclass(frozen=True)
class ExampleOptions:
    """The flags of data_prep_tool.py for --format sft and preference, under their names. input_dir may be one file."""

    input_dir: Path
    output_dir: Path
    format: str
    tokenizer_from: Path
    max_length: int = 2048
    train_on: str = "assistant"
    chat_template: str | None = None
    rename_columns: tuple[str, ...] = ()
    shard_tokens: int = 256_000_000
    overwrite: bool = False


class _Encoded(NamedTuple):
    """One example that can be learned from: its sequences, and where it came from, "file:row"."""

    sequences: list[Sequence]
    source: str


# ---- writing ---------------------------------------------------------------------------------------------------------


def prepare_examples(options: ExampleOptions, progress: Progress) -> Metadata:
    """Make the dataset of examples in options.output_dir, or find it up to date; returns its manifest. Raises UserError."""
    paths = _example_files(options)
    tokenizer = load_tokenizer(options.tokenizer_from)
    template = load_chat_template(options.tokenizer_from, override=options.chat_template)
    _check_context(options)
    examples = read_examples(paths, rename=_renames(options))
    if examples.kind not in FORMATS[options.format]:
        fitting = next((name for name, kinds in FORMATS.items() if examples.kind in kinds), None)
        advice = f"give --format {fitting}" if fitting else "--rename_columns can say what the columns mean"
        raise UserError(
            f"--input_dir {options.input_dir} holds {examples.kind} examples ({examples.format}), and --format "
            f"{options.format} is for {' or '.join(FORMATS[options.format])} examples; {advice}"
        )
    recorded: dict[str, Any] = {
        "format": options.format, "kind": examples.kind, "train_on": options.train_on,
        "columns": ["label"] if examples.kind == "labelled" else [], "max_length": options.max_length,
        "rename_columns": sorted(options.rename_columns), "shard_tokens": options.shard_tokens,
        "template": template_digest(template), "tokenizer_sha256": tokenizer.sha256,
    }  # fmt: skip
    sources = [_describe_source(path, options.input_dir) for path in paths]
    with locked_folder(options.output_dir):
        if (existing := _existing(options, recorded, sources)) is not None:
            progress.say(f"{options.output_dir} is up to date: same input and options")
            return existing
        for line in (*describe_template(tokenizer, template), f"examples: {examples.format}", *examples.report):
            progress.say(line)
        encoded, skipped, by_answer = _encode(options, examples, tokenizer, template, progress)
        state = options.output_dir / STATE_FOLDER
        shutil.rmtree(state, ignore_errors=True)  # of a run that was interrupted: all of it is quickly made again
        _copy_tokenizer(options.tokenizer_from, state / "tokenizer")
        shards, further = _write_shards(state, encoded, tokenizer, [str(path) for path in paths], options.shard_tokens)
        further_options = {
            "further_files": {name: asdict(info) for name, info in further.items()},
            "further_columns": [name for name in encoded[0].sequences[0].columns if name not in recorded["columns"]],
            "by_answer": by_answer,
        }
        metadata = _metadata(options, recorded, further_options, sources, tokenizer, shards, skipped)
        _publish(state, options.output_dir, metadata)
    _summarise(metadata, tokenizer, encoded, options.output_dir, progress)
    return metadata


def template_digest(template: ChatTemplate) -> str:
    """Hexadecimal sha256 of a chat template's text."""
    return hashlib.sha256((template.source + (template.tool_source or "")).encode()).hexdigest()


def _example_files(options: ExampleOptions) -> list[Path]:
    """The files of examples of --input_dir, sorted by path."""
    if options.input_dir.is_file():
        return [options.input_dir]
    if not options.input_dir.is_dir():
        raise UserError(f"--input_dir {options.input_dir} does not exist; name a file of examples or a folder of them")
    found = []
    for path in options.input_dir.rglob("*"):
        name = path.name.lower()
        holds_examples = name.removesuffix(".gz").endswith(_SUFFIXES) or name.endswith(".parquet")
        if holds_examples and path.is_file() and not path.is_relative_to(options.output_dir):
            found.append(path)
    if not found:
        raise UserError(
            f"--input_dir {options.input_dir} holds no .json, .jsonl, .csv, .tsv (also .gz) or .parquet file"
        )
    return sorted(found)


def _renames(options: ExampleOptions) -> dict[str, str]:
    for pair in options.rename_columns:
        if not all(pair.partition("=")):
            raise UserError(f"--rename_columns {pair}: write column=meaning, such as question=prompt")
    return dict(pair.split("=", 1) for pair in options.rename_columns)


def _check_context(options: ExampleOptions) -> None:
    """UserError where --tokenizer_from is a model that takes fewer tokens than --max_length."""
    config = options.tokenizer_from / "config.json"
    if options.max_length < 2:
        raise UserError(f"--max_length {options.max_length} leaves nothing to learn; it must be at least 2")
    try:
        context = json.loads(config.read_bytes()).get("max_position_embeddings") if config.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read ({error})") from error
    if context is not None and options.max_length > context:
        raise UserError(
            f"--max_length {options.max_length} is more than the model in {options.tokenizer_from} takes; give "
            f"--max_length {context} or less"
        )


def _describe_source(path: Path, input_dir: Path) -> dict[str, Any]:
    name = path.name if path == input_dir else path.relative_to(input_dir).as_posix()
    content = path.read_bytes()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"path": name, "bytes": len(content), "unit": "record", "digest": digest}


def _existing(options: ExampleOptions, recorded: dict[str, Any], sources: list[dict[str, Any]]) -> Metadata | None:
    """The dataset that is there if it is the one to be made, None if there is none. UserError for another one."""
    if options.overwrite or not (options.output_dir / METADATA_FILE).exists():
        return None
    metadata = load_metadata(options.output_dir)
    if metadata.sources != sources or {name: metadata.options.get(name) for name in recorded} != recorded:
        raise UserError(
            f"{options.output_dir} already holds a dataset made of other input or with other options; add --overwrite to "
            "replace it, or choose another --output_dir"
        )
    ExampleShards(options.output_dir)
    if tokenizer_sha256(options.output_dir) != metadata.tokenizer.sha256:
        raise UserError(
            f"{options.output_dir / 'tokenizer.json'} was changed; add --overwrite to make the dataset anew"
        )
    return metadata


def _encode(
    options: ExampleOptions, examples: ExampleSet, tokenizer: Tokenizer, template: ChatTemplate, progress: Progress
) -> tuple[list[_Encoded], Counter[str], int]:
    """The examples that can be learned from, in order; how many others there are for each reason; how many by answer."""
    encoded: list[_Encoded] = []
    dropped: Counter[str] = Counter()
    truncated = by_answer = 0
    for example in examples.examples:
        one = encode_example(
            tokenizer, template, example, max_length=options.max_length, train_on=options.train_on
        )  # fmt: skip
        truncated += one.truncated
        by_answer += one.by_answer
        if one.sequences:
            encoded.append(_Encoded(one.sequences, example.source))
        else:
            dropped[one.dropped] += 1
    for reason, count in dropped.most_common():
        progress.say(f"{count:,} examples left out: {reason}")
    if truncated:
        progress.say(f"{truncated:,} examples cut off at --max_length {options.max_length}")
    for line in say_by_answer(by_answer):
        progress.say(line)
    if examples.kind == "preference":
        groups = with_marked_sides([one.sequences for one in encoded])
        encoded = [one._replace(sequences=group) for one, group in zip(encoded, groups, strict=True)]
    if not encoded:
        raise UserError(f"no example of --input_dir {options.input_dir} can be learned from: {'; '.join(dropped)}")
    return encoded, dropped, by_answer


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_shards(
    state: Path, encoded: list[_Encoded], tokenizer: Tokenizer, paths: list[str], shard_tokens: int
) -> tuple[list[ShardInfo], dict[str, FileInfo]]:
    """Shards of at most `shard_tokens` tokens (a larger example has its own), and the files that are not Megatron's tokens."""
    folder = state / SHARDS_FOLDER
    folder.mkdir(parents=True)
    dtype, byte_lengths = token_dtype(tokenizer.vocab_size), tokenizer.token_byte_lengths()
    file_numbers = {path: number for number, path in enumerate(paths)}
    shards: list[ShardInfo] = []
    further: dict[str, FileInfo] = {}
    for number, part in enumerate(_parts(encoded, shard_tokens)):
        name = f"train_{number:05d}"
        sequences = [sequence for one in part for sequence in one.sequences]
        tokens = np.concatenate([sequence.tokens for sequence in sequences])
        lengths = [len(sequence.tokens) for sequence in sequences]
        files = _write_dataset(folder / name, tokens, lengths, dtype)
        sources = np.array(
            [_source_record(one.source, sequence, file_numbers) for one in part for sequence in one.sequences],
            dtype=SOURCE_DTYPE,
        )
        files |= _write(folder / f"{name}.src", sources.tobytes())
        learned = np.concatenate([sequence.learned for sequence in sequences])
        further |= _write_dataset(folder / f"{name}_mask", learned, lengths, FLAG_DTYPE)
        for column in sequences[0].columns:
            flags = np.array([sequence.columns[column] for sequence in sequences])
            further |= _write_dataset(folder / f"{name}_{column}", flags, [1] * len(flags), FLAG_DTYPE)
        text_bytes = int(byte_lengths[tokens].sum(dtype=np.int64))
        shards.append(ShardInfo(name, len(tokens), len(sequences), text_bytes, files))
    return shards, further


def _parts(encoded: list[_Encoded], shard_tokens: int) -> list[list[_Encoded]]:
    parts: list[list[_Encoded]] = [[]]
    filled = 0
    for one in encoded:
        size = sum(len(sequence.tokens) for sequence in one.sequences)
        if parts[-1] and filled + size > shard_tokens:
            parts.append([])
            filled = 0
        parts[-1].append(one)
        filled += size
    return parts


def _source_record(source: str, sequence: Sequence, file_numbers: dict[str, int]) -> tuple[int, int, bytes]:
    """SOURCE_DTYPE: the row counted from 0; of the content there are no bytes, so the hash is of the ids as int64."""
    path, _, row = source.rpartition(":")
    return file_numbers[path], int(row) - 1, hashlib.blake2b(sequence.tokens.tobytes(), digest_size=16).digest()


def _write_dataset(stem: Path, values: np.ndarray, lengths: list[int], dtype: str) -> dict[str, FileInfo]:
    """A Megatron-LM dataset: stem.bin holds `values`, stem.idx its documents of `lengths`."""
    index = io.BytesIO()
    write_index(index, lengths, dtype)
    data = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    return _write(Path(f"{stem}.bin"), data.tobytes()) | _write(Path(f"{stem}.idx"), index.getvalue())


def _write(path: Path, content: bytes) -> dict[str, FileInfo]:
    entry = write_file(path, [content])
    return {path.name: FileInfo(int(entry["bytes"]), int(str(entry["crc32"]), 16))}


def _metadata(
    options: ExampleOptions, recorded: dict[str, Any], further: dict[str, Any], sources: list[dict[str, Any]],
    tokenizer: Tokenizer, shards: list[ShardInfo], skipped: Counter[str],
) -> Metadata:  # fmt: skip
    files = {name: asdict(info) for shard in shards for name, info in shard.files.items()}
    dtype = token_dtype(tokenizer.vocab_size)
    content = json.dumps([tokenizer.sha256, dtype, recorded, files, further["further_files"]], sort_keys=True)
    totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents", "bytes")}
    return Metadata(
        dtype=dtype,
        max_length=options.max_length,
        stride=0,
        tokenizer=TokenizerInfo(
            tokenizer.kind, tokenizer.vocab_size, tokenizer.sha256, tokenizer.eos_token, tokenizer.eos_token_id
        ),
        splits={"train": SplitInfo(**totals, shards=tuple(shards)), "val": _EMPTY_SPLIT},
        sources=sources,
        skipped={reason: {"count": count, "examples": []} for reason, count in sorted(skipped.items())},
        options={**recorded, **further},
        fingerprint=hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
    )


def _publish(state: Path, output_dir: Path, metadata: Metadata) -> None:
    """Move everything into place, the manifest last, and remove the further files of a dataset that was there before."""
    names = [name for shard in metadata.splits["train"].shards for name in shard.files]
    further = list(metadata.options["further_files"])
    publish(state, output_dir, [*names, *further], [state / "tokenizer"])
    for column in ("mask", "label", ENDS_SIDE):
        for path in (output_dir / DATASET_FOLDER).glob(f"train_*_{column}.*"):
            if path.name not in further:
                path.unlink()
    write_atomic(output_dir / METADATA_FILE, metadata.to_json())
    shutil.rmtree(state)


def _summarise(
    metadata: Metadata, tokenizer: Tokenizer, encoded: list[_Encoded], output_dir: Path, progress: Progress
) -> None:
    train = metadata.splits["train"]
    learned = sum(sequence.num_targets for one in encoded for sequence in one.sequences)
    progress.say(
        f"{len(encoded):,} examples, {train.documents:,} sequences, {train.tokens:,} tokens, {learned:,} of them learned, "
        f"in {len(train.shards)} shards; the first, what is learned marked:"
    )
    progress.say(show_example(tokenizer, encoded[0].sequences[0], color=False))
    stage = {"preference": "dpo (or reward)", "labelled": "dpo --dpo_loss kto"}.get(metadata.options["kind"], "sft")
    folder = shlex.quote(str(output_dir))
    progress.say(f"next: python train.py --init_from MODEL --data_dir {folder} --stage {stage}")


# ---- reading ---------------------------------------------------------------------------------------------------------


class ExampleShards(SequenceOf):
    """The examples of a folder, each a list of its Sequences, in order; an example is read when it is asked for.

    `metadata.options` says what they are. UserError where the folder holds none, or a file is not as its manifest says.
    """

    def __init__(self, data_dir: str | Path, numbers: np.ndarray | None = None) -> None:
        self.metadata = load_metadata(data_dir)
        options = self.metadata.options
        if options.get("format") not in FORMATS:
            raise UserError(
                f"{data_dir} holds text, and no examples to fine-tune on; make them with data_prep_tool.py --format sft "
                "or preference"
            )
        self._tokens = open_split(data_dir, "train")
        shards = self.metadata.splits["train"].shards
        folder, further = Path(data_dir) / DATASET_FOLDER, options["further_files"]
        for name, info in further.items():
            path = inside(folder, name, f"../{METADATA_FILE}")
            if not path.is_file() or os.path.getsize(path) != info["bytes"]:
                raise UserError(
                    f"{path} is missing or not as long as {METADATA_FILE} says; prepare the data again with "
                    "data_prep_tool.py"
                )
        self._columns = [*options["columns"], *options.get("further_columns", ())]
        self._flags = {
            name: [FileArray(folder / f"{shard.name}_{name}.bin", "<u2") for shard in shards]
            for name in ("mask", *self._columns)
        }
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)]).tolist()
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)]).tolist()
        size = 2 if options["kind"] == "preference" else 1
        self._group_starts = np.arange(0, self._tokens.num_documents + 1, size)
        if ENDS_SIDE in self._columns:
            ends = np.flatnonzero(
                np.concatenate([flags[:] for flags in self._flags[ENDS_SIDE]])
            )  # of chosen, rejected, chosen, …
            self._group_starts = np.concatenate([[0], ends[1::2] + 1])
        self._numbers = np.arange(len(self._group_starts) - 1) if numbers is None else numbers
        self._folder = data_dir

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self._group(number) for number in self._numbers[place].tolist()]
        return self._group(int(self._numbers[place]))

    def select(self, places: SequenceOf[int]) -> "ExampleShards":
        """Only the examples at these places, in their order."""
        return ExampleShards(self._folder, self._numbers[np.array(places, dtype=np.int64)])

    def dialogues(self) -> list[list[int]]:
        """The places of each dialogue's sequences: more than one where it was rendered answer by answer."""
        if not self.metadata.options.get("by_answer") or self.metadata.options["kind"] == "preference":
            return [[place] for place in range(len(self))]
        found: dict[tuple[str, int], list[int]] = {}
        for place, number in enumerate(self._numbers.tolist()):
            origin = self._tokens.document(int(self._group_starts[number]))
            found.setdefault((origin.source, origin.position), []).append(place)
        return list(found.values())

    def source(self, place: int) -> str:
        """Where the example at `place` came from: "file:row", rows counted from 1."""
        origin = self._tokens.document(int(self._group_starts[self._numbers[place]]))
        return f"{origin.source}:{origin.position + 1}"

    def _group(self, number: int) -> list[Sequence]:
        return [self._sequence(document) for document in range(*self._group_starts[number : number + 2].tolist())]

    def _sequence(self, number: int) -> Sequence:
        origin = self._tokens.document(number)
        shard = bisect_right(self._token_starts, origin.start) - 1
        start, stop = (position - self._token_starts[shard] for position in (origin.start, origin.stop))
        local = number - self._document_starts[shard]
        return Sequence(
            self._tokens.read(origin.start, origin.stop - origin.start),
            self._flags["mask"][shard][start:stop].astype(bool),
            columns={name: float(self._flags[name][shard][local]) for name in self._columns},
        )
