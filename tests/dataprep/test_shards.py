"""Are the shards Megatron-LM's format, is every token found and traced, and is every damage named?"""

import hashlib
import json
import struct

import numpy as np
import pytest

from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
from dataprep.shards import load_metadata, open_split, verify_dataset
from dataprep.tokenizers import load_tokenizer
from errors import UserError

TEXTS = [f"Document {n}: " + "some words, 42 numbers\n" * (n % 7 + 1) + "Ünïcödé 日本" * (n % 3) for n in range(60)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 documents in several shards, none larger than 500 tokens."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "in").mkdir()
    with open(folder / "in" / "a.jsonl", "w") as file:
        for text in TEXTS:
            file.write(json.dumps({"text": text}) + "\n")
    options = Options(folder / "in", folder / "out", vocab_size=300, val_fraction=0.2, num_workers=1, shard_tokens=500)
    prepare(options, Progress())
    return folder / "out"


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the dataset to damage."""
    import shutil

    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


def read_megatron(stem):
    """A reader of MMIDIDX version 1 and of its .bin, written from Megatron-LM's description of the format."""
    index = stem.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[code]
    at = 9 + 8 + 1 + 8 + 8
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    pointers = struct.unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    bounds = struct.unpack_from(f"<{documents}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * documents
    assert list(bounds) == list(range(sequences + 1))  # every sequence is a document
    data = stem.with_suffix(".bin").read_bytes()
    size = np.dtype(dtype).itemsize
    return [
        np.frombuffer(data[start : start + length * size], dtype=dtype).tolist()
        for start, length in zip(pointers, lengths, strict=True)
    ]


def test_megatron_reads_the_same_documents(dataset):
    tokenizer = load_tokenizer(dataset)
    texts = []
    for split in ("train", "val"):
        stems = sorted((dataset / "dataset").glob(f"{split}_*.bin"))
        if split == "train":
            assert len(stems) > 3
        documents = [document for stem in stems for document in read_megatron(stem)]
        reader = open_split(dataset, split)
        assert reader.num_documents == len(documents) and reader.num_tokens == sum(map(len, documents))
        assert reader.read(0, reader.num_tokens).tolist() == [token for document in documents for token in document]
        assert all(document[-1] == tokenizer.eos_token_id for document in documents)
        texts += [tokenizer.decode(document[:-1], skip_special=False) for document in documents]
    assert sorted(texts) == sorted(TEXTS)


def test_shards_are_filled_up_to_their_size(dataset):
    sizes = [shard.tokens for shard in load_metadata(dataset).splits["train"].shards]
    longest = max(len(load_tokenizer(dataset).encode(text)) + 1 for text in TEXTS)
    assert max(sizes) <= 500 and min(sizes[:-1]) > 500 - longest


def test_reads_and_boundaries_cross_shards(dataset):
    split = open_split(dataset, "train")
    everything = split.read(0, split.num_tokens)
    eos = load_tokenizer(dataset).eos_token_id
    starts = np.flatnonzero(everything == eos) + 1
    rng = np.random.default_rng(0)
    for _ in range(200):
        start = int(rng.integers(0, split.num_tokens))
        count = int(rng.integers(0, min(1200, split.num_tokens - start) + 1))
        assert np.array_equal(split.read(start, count), everything[start : start + count])
        expected = starts[(starts > start) & (starts < start + count)]
        found = split.document_starts(start, count)
        assert found.dtype == np.int64 and np.array_equal(found, expected)
    assert split.read(0, 0).dtype == np.int64
    for bad in ((-1, 1), (0, split.num_tokens + 1), (split.num_tokens, 1)):
        with pytest.raises(IndexError):
            split.read(*bad)


def test_every_token_is_traced_to_its_line(dataset):
    tokenizer = load_tokenizer(dataset)
    source = (dataset.parent / "in" / "a.jsonl").read_bytes()
    for name in ("train", "val"):
        split = open_split(dataset, name)
        for position in range(0, split.num_tokens, 17):
            origin = split.document_at(position)
            assert origin.start <= position < origin.stop and origin.source == "a.jsonl" and origin.unit == "byte"
            text = json.loads(source[origin.position : source.index(b"\n", origin.position)])["text"]
            assert tokenizer.encode(text) == split.read(origin.start, origin.stop - origin.start - 1).tolist()
            assert origin.content_hash == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            assert split.document(origin.document) == origin


def test_the_manifest_counts_what_is_there(dataset):
    metadata = load_metadata(dataset)
    tokenizer = load_tokenizer(dataset)
    assert metadata.tokenizer.vocab_size == tokenizer.vocab_size and metadata.dtype == "uint16"
    assert sum(split.bytes for split in metadata.splits.values()) == sum(len(text.encode()) for text in TEXTS)
    assert sum(split.documents for split in metadata.splits.values()) == len(TEXTS)
    assert verify_dataset(dataset) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".src"])
@pytest.mark.parametrize("bit", [0, 5])
def test_a_flipped_bit_is_found_and_the_file_named(damaged, suffix, bit):
    path = damaged / "dataset" / f"train_00001{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)
    problems = verify_dataset(damaged)
    assert len(problems) == 1 and str(path) in problems[0] and "checksum" in problems[0]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".src"])
def test_a_file_that_shrank_is_refused_on_opening(damaged, suffix):
    path = damaged / "dataset" / f"train_00000{suffix}"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=path.name):
        open_split(damaged, "train")
    assert any(str(path) in problem for problem in verify_dataset(damaged))


def test_ids_outside_the_vocabulary_are_refused_on_opening(damaged):
    path = damaged / "dataset" / "train_00002.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match="65535"):
        open_split(damaged, "train")


def test_another_tokenizer_is_noticed(damaged):
    path = damaged / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert any("tokenizer.json" in problem for problem in verify_dataset(damaged))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (None, "does not exist"),
        (b"{", "not readable JSON"),
        (b"[]", "does not describe"),
        ({"format_version": 99}, "newer version"),
        ({"splits": {}}, "damaged"),
        ({"dtype": "float64"}, "damaged"),
    ],
)
def test_a_broken_manifest_is_one_sentence(damaged, change, sentence):
    path = damaged / "metadata.json"
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    elif change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    with pytest.raises(UserError, match=sentence):
        load_metadata(damaged)
    assert len(verify_dataset(damaged)) == 1


def test_a_manifest_cannot_point_outside_its_folder(damaged):
    path = damaged / "metadata.json"
    path.write_text(path.read_text().replace("train_00000", "../../train_00000"))
    with pytest.raises(UserError, match="damaged"):
        open_split(damaged, "train")
