"""Does the script do what its help says, and does each mistake end in one sentence and exit code 2?"""

import json
import os
import subprocess
import sys

import pytest
import tokenizers

from dataprep.shards import load_metadata, open_split, verify_dataset
from dataprep.tokenizers import load_tokenizer
from tests.tiers import grid


@pytest.fixture
def tool(root):
    """Run the script with flags and an environment of its own; returns the finished process."""

    def run(*flags, **environment):
        command = [sys.executable, "data_prep_tool.py", *map(str, flags)]
        return subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)

    return run


def refused(process, *words):
    """The one sentence of a refused run, which must name `words`."""
    assert process.returncode == 2
    assert (
        process.stderr.startswith("error: ") and process.stderr.count("\n") == 1 and "Traceback" not in process.stderr
    )
    for word in words:
        assert word in process.stderr
    return process.stderr


def test_a_folder_becomes_a_dataset_and_the_next_command_is_named(tool, tmp_path):
    (tmp_path / "my text").mkdir()
    for n in range(40):
        (tmp_path / "my text" / f"{n}.txt").write_text(f"The {n}. text about tokens and models.\n" * (n + 1))
    (tmp_path / "my text" / "binary.md").write_bytes(b"\0\1")
    (tmp_path / "my text" / "archive.zip").write_bytes(b"PK")
    flags = ["--input-dir", tmp_path / "my text", "--output_dir", tmp_path / "my data", "--vocab_size", "300"]
    process = tool(*flags, "--max_length=64", "--stride", "16", "--num_workers", "2")
    assert process.returncode == 0 and process.stderr == ""
    said = process.stdout
    assert "\r" not in said and len(said.splitlines()) < 20
    assert said.endswith(f"next: python train.py --data_dir '{tmp_path / 'my data'}'\n")
    assert "skipped 1 × binary file (NUL bytes): binary.md" in said and "1 .zip" in said
    metadata = load_metadata(tmp_path / "my data")
    assert (metadata.max_length, metadata.stride, metadata.tokenizer.eos_token) == (64, 16, "<|endoftext|>")
    assert sum(split.documents for split in metadata.splits.values()) == 40
    assert f"{sum(split.tokens for split in metadata.splits.values()):,} tokens" in said
    content = (tmp_path / "my data" / "metadata.json").read_text()
    assert str(tmp_path) not in content and "num_workers" not in content
    assert "is up to date" in tool(*flags, "--max_length=64", "--stride", "16").stdout


def test_help_names_every_flag_with_its_default(tool):
    said = tool("--help").stdout
    for flag in (
        "--input_dir",
        "--output_dir",
        "--tokenizer_type",
        "--tiktoken_encoding",
        "--pretokenizer",
        "--val_fraction",
    ):
        assert flag in said
    for default in ("(default: 32000)", "(default: 2048)", "(default: 1024,", "(default: 4)"):
        assert default in said


def test_an_unknown_flag_names_the_closest(tool):
    refused(
        tool("--input_dir", "a", "--output_dir", "b", "--vocab_sise", "1"), "--vocab_sise", "did you mean --vocab_size"
    )


def test_folders_that_give_nothing(tool, tmp_path):
    out = tmp_path / "out"
    refused(tool("--input_dir", tmp_path / "missing", "--output_dir", out), "missing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tool("--input_dir", tmp_path / "empty", "--output_dir", out), "empty", "--input_dir")
    (tmp_path / "code").mkdir()
    for n in range(120):
        (tmp_path / "code" / f"{n}.py").write_text(f"x = {n}\n")
        (tmp_path / "code" / f"{n}a.pyc").write_bytes(b"\0")
        (tmp_path / "code" / f"{n}b.pyc").write_bytes(b"\0")
    refused(tool("--input_dir", tmp_path / "code", "--output_dir", out), "120 .py files", "--text_extensions .py")
    assert not out.exists()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "bad" / "b.jsonl").write_bytes(b"{broken\n")
    refused(
        tool("--input_dir", tmp_path / "bad", "--output_dir", out), "invalid UTF-8 (a.txt)", "broken JSON (b.jsonl:1)"
    )
    assert not (out / "metadata.json").exists()


def test_an_output_folder_that_cannot_be_made(tool, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    refused(tool("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "in" / "a.txt"), "a file is in its place")
    refused(tool("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "in" / "a.txt" / "x"), "a.txt")
    refused(tool("--input_dir", tmp_path / "in", "--output_dir", "/proc/nowhere/x"), "/proc/nowhere/x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write(tool, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "out").mkdir(mode=0o500)
    refused(tool("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out"), "permission")


def test_a_tiktoken_encoding_that_is_nowhere(tool, tmp_path):
    pytest.importorskip("tiktoken")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    flags = ["--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--tokenizer_type", "tiktoken"]
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    refused(tool(*flags, **nowhere), "gpt2", "TIKTOKEN_CACHE_DIR")


def test_wordpiece_warns_that_it_loses_text(tool, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some words and some more words\n" * 50)
    flags = ["--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--tokenizer_type", "wordpiece"]
    process = tool(*flags, "--vocab_size", "200")
    assert process.returncode == 0 and "warning: WordPiece loses text" in process.stdout


def test_preparing_data_does_not_import_torch(root):
    script = "import sys, data_prep_tool; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 0


@pytest.mark.parametrize(
    "kind", grid([["bpe"], ["wordpiece"], ["tiktoken", "--tiktoken_encoding", "gpt2"]], quick=[["bpe"]])
)
def test_real_texts_come_back(tool, shared_data, tmp_path, kind):
    output, source = tmp_path / "out", shared_data / "pretrain"
    cache = {"TIKTOKEN_CACHE_DIR": str(shared_data.parent / "tiktoken_cache")}
    flags = ["--input_dir", source, "--output_dir", output, "--vocab_size", "4096", "--num_workers", "2"]
    process = tool(*flags, "--tokenizer_type", *kind, **cache)
    assert process.returncode == 0 and "3 .zip" in process.stdout
    assert verify_dataset(output) == []
    tokenizer, documents = load_tokenizer(output), 0
    for name in ("train", "val"):
        split = open_split(output, name)
        for number in range(split.num_documents):
            origin = split.document(number)
            ids = split.read(origin.start, origin.stop - origin.start - 1)
            content = (source / origin.source).read_bytes()
            if origin.source.endswith(".jsonl"):
                text = json.loads(content[origin.position : content.index(b"\n", origin.position)])["text"]
            else:
                text = content.decode("utf-8-sig")
            if kind == [
                "wordpiece"
            ]:  # it loses text: its documents are framed by [CLS] and [SEP], as tokenizers does it
                framed, theirs = split.read(origin.start, origin.stop - origin.start), tokenizers.Tokenizer
                assert framed.tolist() == theirs.from_file(str(output / "tokenizer.json")).encode(text).ids
            else:
                assert tokenizer.decode(ids, skip_special=False) == text
            documents += 1
    assert documents == 305


def test_defaults_fit_each_other(tool, tmp_path):
    """--stride follows a short --max_length, and a --vocab_size that cannot be used is said, not swallowed."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some words, and some more words\n" * 50)
    flags = [
        "--input_dir",
        tmp_path / "in",
        "--output_dir",
        tmp_path / "out",
        "--max_length",
        "64",
        "--num_workers",
        "1",
    ]
    assert tool(*flags).returncode == 0
    assert load_metadata(tmp_path / "out").stride == 32
    again = ["--tokenizer_type", "existing", "--tokenizer_dir", tmp_path / "out", "--vocab_size", "999"]
    flags[3] = tmp_path / "again"
    assert "--vocab_size is not used" in tool(*flags, *again).stdout


def test_a_folder_of_the_input_is_the_validation_split(tool, tmp_path):
    for split in ("train", "val", "valley"):
        (tmp_path / "text" / split).mkdir(parents=True)
        (tmp_path / "text" / split / "one.txt").write_text(f"what the {split} folder says\n" * 20)
    flags = ["--input_dir", tmp_path / "text", "--vocab_size", "300", "--max_length", "16", "--num_workers", "1"]

    def texts(folder, split):
        opened = open_split(tmp_path / folder, split)
        return load_tokenizer(tmp_path / folder).decode(opened.read(0, opened.num_tokens).tolist())

    assert tool(*flags, "--output_dir", tmp_path / "a", "--val_subdir", "val/").returncode == 0
    assert texts("a", "val") == "what the val folder says\n" * 20
    assert texts("a", "train") == "what the train folder says\n" * 20 + "what the valley folder says\n" * 20
    # the options are the dataset's, as all are
    refused(tool(*flags, "--output_dir", tmp_path / "a"), "val_subdir was 'val' and is None")
    refused(tool(*flags, "--output_dir", tmp_path / "b", "--val_subdir", "test"), "--val_subdir test is not a folder")
    for split, words in (("val", "no document in it"), ("valley", "no document beside it")):
        (tmp_path / "text" / split / "one.txt").write_text(" ")
        if split == "valley":
            (tmp_path / "text" / "val" / "one.txt").write_text("text")
            (tmp_path / "text" / "train" / "one.txt").write_text(" ")
        refused(tool(*flags, "--output_dir", tmp_path / "b", "--val_subdir", "val"), words)
