"""Is a run on --train_file the run on what data_prep_tool.py makes of the same files, however often it is started?"""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.save_folder import from_rank_0
from dataprep.shards import load_metadata, open_split
from dataprep.tokenizers import load_tokenizer
from tests.forked import Ended, Forked, start_ranks, wait_for
from tests.ranks import run_ranks
from training.text_files import fitting_vocab_size

SMALL = [
    "--hidden_size", 32, "--num_layers", 1, "--num_heads", 2, "--batch_size", 4, "--max_length", 32, "--stride", 8,
    "--learning_rate", 3e-3, "--warmup_steps", 1, "--log_interval", 1, "--eval_freq", 3, "--eval_iter", 2,
    "--start_context", "the", "--device", "cpu",
]  # fmt: skip
WORDS = (
    "the", "of", "and", "model", "token", "loss", "gradient", "learns", "reads", "writes", "a", "small", "(x)", "=", "naïve",
    "日本",
)  # fmt: skip


def text_of(seed: int, size: int) -> str:
    """Lines of words, about `size` characters."""
    chosen = random.Random(seed)
    return "".join(" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12))) + "\n" for _ in range(size // 35))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed, (name, size) in enumerate({"one.txt": 9000, "two": 5000, "held_out.txt": 3000}.items()):
        (folder / name).write_text(text_of(seed, size), encoding="utf-8")
    return folder


@pytest.fixture
def train(tmp_path):
    def run(save_dir: Path, *flags: object, code: int = 0) -> Ended:
        ended = Forked(tmp_path / "streams", ["--save_dir", save_dir, *flags]).wait()
        assert ended.code == code and "Traceback" not in ended.err, ended.out + ended.err
        return ended

    return run


def files(texts: Path) -> list[object]:
    return ["--train_file", texts / "one.txt", texts / "two", "--val_file", texts / "held_out.txt"]


def refused(ended: Ended, *words: str) -> None:
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert all(word in ended.err for word in words), ended.err


def figures(save_dir: Path) -> list[tuple]:
    rows = map(json.loads, (save_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("val_loss"), row.get("val_bpb")) for row in rows if "step" in row]


def prepared(save_dir: Path) -> Path:
    (folder,) = (save_dir / "data").iterdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Of a folder of shards, without the links to the text."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "text" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_run_is_that_of_data_prep_tool_and_data_dir_bit_for_bit(texts, train, tmp_path, root):
    hand = tmp_path / "hand"
    for split, name, place in (
        ("train", "one.txt", "1.txt"),
        ("train", "two", "2.txt"),
        ("val", "held_out.txt", "v.txt"),
    ):
        (hand / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(texts / name, hand / split / place)
    command = f"--input_dir {hand} --output_dir {tmp_path / 'data'} --val_subdir val --max_length 32 --stride 8"
    size = fitting_vocab_size(sum((texts / name).stat().st_size for name in ("one.txt", "two")))
    command = [sys.executable, "data_prep_tool.py", *command.split(), "--vocab_size", str(size)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    train(tmp_path / "by_hand", "--data_dir", tmp_path / "data", *SMALL, "--max_steps", 6)
    said = train(tmp_path / "run", *files(texts), *SMALL, "--max_steps", 6).out
    assert figures(tmp_path / "run") == figures(tmp_path / "by_hand") and len(figures(tmp_path / "run")) >= 8
    weights = "checkpoint_step_6/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "by_hand" / weights).read_bytes()
    assert "next: python train.py" not in said
    # --val_file is what is held out, and nothing else
    folder = prepared(tmp_path / "run")
    split, tokenizer = open_split(folder, "val"), load_tokenizer(folder)
    assert tokenizer.decode(split.read(0, split.num_tokens).tolist()) == (texts / "held_out.txt").read_text("utf-8")
    assert load_metadata(folder).splits["train"].documents == 2


@pytest.mark.exhaustive
def test_a_second_start_finds_what_the_first_prepared_and_other_text_is_prepared_beside_it(texts, train, tmp_path):
    copies = tmp_path / "copies"
    shutil.copytree(texts, copies)
    flags = [*files(copies), *SMALL]
    train(tmp_path / "run", *flags, "--max_steps", 3)
    before = contents(prepared(tmp_path / "run"))
    time = (prepared(tmp_path / "run") / "metadata.json").stat().st_mtime_ns
    said = train(tmp_path / "run", "--checkpoint", "latest", "--max_steps", 5).out
    assert "is up to date" in said and "resumed from" in said and "training bpe" not in said
    assert contents(prepared(tmp_path / "run")) == before
    assert (prepared(tmp_path / "run") / "metadata.json").stat().st_mtime_ns == time
    # a cache that was lost is made again as it was
    shutil.rmtree(tmp_path / "run" / "data")
    train(tmp_path / "run", "--checkpoint", "latest", "--max_steps", 6)
    assert contents(prepared(tmp_path / "run")) == before
    # without a checkpoint the files may be others
    for path in (tmp_path / "run").glob("checkpoint_step_*"):
        shutil.rmtree(path)
    (copies / "two").write_text(text_of(9, 5000), encoding="utf-8")
    train(tmp_path / "run", *flags, "--max_steps", 1)
    assert len(list((tmp_path / "run" / "data").iterdir())) == 2


def test_changed_text_is_refused_when_a_run_goes_on_and_before_it_is_prepared(texts, train, tmp_path):
    copies = tmp_path / "copies"
    shutil.copytree(texts, copies)
    train(tmp_path / "run", *files(copies), *SMALL, "--max_steps", 2)
    for name, flag in (("two", "--train_file"), ("held_out.txt", "--val_file")):
        text = (copies / name).read_text("utf-8")
        (copies / name).write_text(text + "more\n", encoding="utf-8")
        ended = train(tmp_path / "run", "--checkpoint", "latest", "--max_steps", 4, code=2)
        refused(ended, f"{flag}: other content", "checkpoint_step_2")
        assert len(list((tmp_path / "run" / "data").iterdir())) == 1
        (copies / name).write_text(text, encoding="utf-8")
    train(tmp_path / "run", "--checkpoint", "latest", "--max_steps", 3)
    # nor does --tokenizer change, though the text did not
    ended = train(tmp_path / "run", "--checkpoint", "latest", "--vocab_size", 300, "--max_steps", 4, code=2)
    refused(ended, "--tokenizer: other content")


@pytest.mark.exhaustive
def test_killed_while_it_prepares_and_started_again(train, tmp_path):
    (tmp_path / "long.txt").write_text(text_of(7, 2_000_000), encoding="utf-8")
    flags = ["--train_file", tmp_path / "long.txt", *SMALL, "--max_steps", 1]
    train(tmp_path / "whole", *flags)
    killed = Forked(tmp_path / "killed_streams", ["--save_dir", tmp_path / "killed", *flags])
    wait_for(lambda: list((tmp_path / "killed").glob("data/*/.prep/*/parts")))
    killed.send(signal.SIGKILL)
    killed.wait()
    assert not (prepared(tmp_path / "killed") / "metadata.json").exists()
    train(tmp_path / "killed", *flags)
    assert contents(prepared(tmp_path / "killed")) == contents(prepared(tmp_path / "whole"))
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


def test_on_two_ranks_one_prepares(texts, train, tmp_path):
    flags = [*files(texts), *SMALL, "--max_steps", 4]
    train(tmp_path / "one", *flags)
    ended = [one.wait() for one in start_ranks(tmp_path, "--save_dir", tmp_path / "two", *flags)]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    assert "writing shards" in ended[0].out and "writing shards" not in ended[1].out
    assert contents(prepared(tmp_path / "two")) == contents(prepared(tmp_path / "one"))
    for ours, theirs in zip(figures(tmp_path / "two"), figures(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)  # an evaluation of --eval_iter reads the same, too
    # each rank ends with the sentence of the one that read
    ended = [one.wait() for one in start_ranks(tmp_path, "--save_dir", tmp_path / "no", *SMALL, "--train_file", "none")]
    assert [one.code for one in ended] == [2, 2] and all("--train_file none" in one.err for one in ended)


def _slow_answer(rank: int, world_size: int, store: str) -> str:
    """Where ranks wait a second for one another, and the first takes three."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    dist.destroy_process_group()
    short = timedelta(seconds=1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=short)
    return from_rank_0(lambda: time.sleep(3) or "prepared", timedelta(minutes=1))


def test_ranks_wait_as_long_as_it_takes(tmp_path):
    assert run_ranks(_slow_answer, 2, str(tmp_path / "store")) == ["prepared"] * 2


BAD = {
    "missing.txt": (None, "cannot be read (No such file or directory)"),
    "empty.txt": (b"", "empty document"),
    "blank.txt": (b" \n\n", "empty document"),
    "latin.txt": ("naïve".encode("latin-1") * 100, "invalid UTF-8"),
    "binary.txt": (b"text\0text", "binary file"),
    "blank.jsonl": (b"\n\n", "empty document"),
    "named_otherwise.jsonl": (b'{"body": "words"}\n', "it has no text, and --rename_columns COLUMN=text says"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_one_sentence(name, texts, train, tmp_path):
    content, words = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    good = texts / "one.txt"
    for flags in (
        ["--train_file", good, tmp_path / name],
        ["--train_file", good, "--val_file", tmp_path / name],
    ):
        ended = train(tmp_path / "run", *flags, *SMALL, code=2)
        refused(ended, f"{flags[-2] if len(flags) == 4 else '--train_file'} {tmp_path / name} ", words)
    assert not list(tmp_path.glob("run/data/*/metadata.json"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--stride 32", ["--stride 32 must be smaller than --max_length 32", "from row to row"]),
        ("--tokenizer gpt", ["--tokenizer gpt is no folder", "gpt2, llama, bert", "did you mean gpt2"]),
        ("--data_dir d", ["--train_file and --data_dir say one thing in two ways"]),
        ("--stage sft --init_from m", ["--train_data is missing"]),
        ("--init_from m --tokenizer gpt2", ["--tokenizer is for models trained from nothing"]),
    ],
)
def test_flags_that_cannot_work_are_one_sentence(flags, words, texts, train, tmp_path):
    ended = train(tmp_path / "run", "--train_file", texts / "one.txt", *SMALL, *flags.split(), code=2)
    refused(ended, *words)


@pytest.mark.parametrize(
    ("name", "renaming", "words"),
    [
        ("d.csv", "review=text", ["d.csv is a table", ".jsonl", "--train_data"]),
        ("d.tsv.gz", "", ["d.tsv.gz is a table"]),
        ("d.jsonl", "review=content", ["--rename_columns review=content", "COLUMN=text"]),
        ("d.txt", "review=text", ["--rename_columns is for .json and .jsonl files"]),
    ],
)
def test_columns_that_would_not_be_read_are_one_sentence(name, renaming, words, train, tmp_path):
    (tmp_path / name).write_text("review,label\ngood,1\n")
    flags = ["--rename_columns", renaming] if renaming else []
    refused(train(tmp_path / "run", "--train_file", tmp_path / name, *SMALL, *flags, code=2), *words)


def test_val_file_and_tokenizer_are_for_train_file(tiny_data, texts, train, tmp_path):
    for flag, value in (("--val_file", texts / "held_out.txt"), ("--tokenizer", "gpt2")):
        refused(train(tmp_path / "run", "--data_dir", tiny_data, flag, value, code=2), f"{flag} is for --train_file")


def test_the_tokenizer_is_the_folder_s_or_the_base_s(tiny_data, texts, train, tmp_path):
    of_folder = (tiny_data / "tokenizer.json").read_bytes()
    train(tmp_path / "first", *files(texts), *SMALL, "--tokenizer", tiny_data, "--max_steps", 1)
    assert (prepared(tmp_path / "first") / "tokenizer.json").read_bytes() == of_folder
    words = [*SMALL, "--max_steps", 1, "--load_model", tmp_path / "first"]
    of_model = ("--hidden_size", "--num_layers", "--num_heads")
    words = [word for at, word in enumerate(words) if not {word, words[at - 1]} & {*of_model}]
    train(tmp_path / "second", *files(texts), *words)
    assert (prepared(tmp_path / "second") / "tokenizer.json").read_bytes() == of_folder


def test_rows_of_text_and_folders_are_read_as_data_prep_tool_reads_them(train, tmp_path):
    """One file of rows whose column has another name, and a folder with another: bad lines are skipped and counted."""
    rows = [json.dumps({"body": text_of(seed, 200)}) for seed in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:30], "{broken"]), encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rows.jsonl").write_text("\n".join(rows[30:]), encoding="utf-8")
    given = ["--train_file", tmp_path / "rows.jsonl", tmp_path / "more", "--rename_columns", "body=text"]
    said = train(tmp_path / "run", *given, *SMALL, "--epochs", 1).out
    assert "broken JSON" in said
    metadata = load_metadata(prepared(tmp_path / "run"))
    assert sum(split.documents for split in metadata.splits.values()) == 60
    assert any("= 1.0" in line for line in said.splitlines() if line.startswith("run "))  # epochs


def test_an_encoder_learns_from_a_file_of_text(texts, train, tmp_path):
    flags = [word for word in SMALL if word not in ("--start_context", "the")]
    train(tmp_path / "run", "--stage", "mlm", "--model", "bert", *files(texts), *flags, "--max_steps", 2)
    assert load_tokenizer(prepared(tmp_path / "run")).mask_token_id is not None


def test_a_vocabulary_that_the_text_cannot_fill_is_as_large_as_it_can_be(texts, train, tmp_path):
    train(tmp_path / "run", *files(texts), *SMALL, "--vocab_size", 5000, "--max_steps", 1)
    assert 300 < load_tokenizer(prepared(tmp_path / "run")).vocab_size < 5000


def test_a_longer_text_gets_a_larger_vocabulary():
    assert [fitting_vocab_size(size) for size in (1, 100_000, 1_000_000, 25_000_000, 10**12)] == [
        512, 1024, 4096, 16384, 32000,
    ]  # fmt: skip


def test_a_folder_that_holds_the_run_is_read_without_what_the_run_writes(texts, train, tmp_path):
    proj = Path(shutil.copytree(texts, tmp_path / "proj"))
    train(proj / "run", "--train_file", proj, *SMALL, "--max_steps", 2)
    said = train(proj / "run", "--train_file", proj, *SMALL, "--checkpoint", "latest", "--max_steps", 3).out
    assert "is up to date" in said and "resumed from" in said
    assert sum(split.documents for split in load_metadata(prepared(proj / "run")).splits.values()) == 2  # the two .txt


def test_a_folder_without_text_is_one_sentence_in_words_that_were_typed(texts, train, tmp_path):
    (tmp_path / "empty").mkdir()
    for beside in ([], [texts / "one.txt"]):
        ended = train(tmp_path / "run", "--train_file", *beside, tmp_path / "empty", *SMALL, code=2)
        refused(ended, f"--train_file {tmp_path / 'empty'} holds no .txt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--stage mlm --model bert", ["--tokenizer", "has no mask token", "such as bert"]),
        ("--vocab_size 999", ["--vocab_size 999 is not that of --tokenizer", "leave it out"]),
    ],
)
def test_a_tokenizer_that_cannot_do_is_refused_before_text_is_prepared(flags, words, tiny_data, texts, train, tmp_path):
    small = [word for word in SMALL if word not in ("--start_context", "the")]
    ended = train(tmp_path / "run", *files(texts), *small, *flags.split(), "--tokenizer", tiny_data, code=2)
    refused(ended, *words)
    assert not list(tmp_path.glob("run/data/*"))
