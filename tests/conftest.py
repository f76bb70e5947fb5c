"""What do all tests share? One thread per test process, Triton's interpreter, and the optional folder of real data."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from tests import interpreter_bf16

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """Nothing is asked of the network. Without `-m gpu`, Triton kernels run under Triton's interpreter. It must be chosen
    before a kernel is defined, so a test process has either the interpreter or the compiler; tests that compile start a
    process of their own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if config.option.markexpr.replace("not gpu", "").find("gpu") < 0 and importlib.util.find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter_bf16.patch()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Bit-equality tests must not depend on how many cores the machine has."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder, from which the scripts are run."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real data beside the project; tests that want it skip in a clone that has none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data is not beside this clone")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A small prepared dataset, made by data_prep_tool.py as a user would: 120 short documents, 400 byte-level tokens."""
    folder = tmp_path_factory.mktemp("tiny_data")
    words = [
        "the",
        "of",
        "and",
        "model",
        "token",
        "loss",
        "gradient",
        "learns",
        "reads",
        "writes",
        "a",
        "small",
        "large",
        "1",
        "2",
        "3",
        "(x)",
        "=",
        "y",
        "+",
        "z;",
        "naïve",
        "日本",
    ]
    random = Random(0)
    documents = []
    for _ in range(120):
        lines = [" ".join(random.choices(words, k=random.randint(3, 12))) for _ in range(random.randint(1, 8))]
        documents.append(json.dumps({"text": "\n".join(lines)}))
    (folder / "text").mkdir()
    (folder / "text" / "documents.jsonl").write_text("\n".join(documents), encoding="utf-8")
    flags = [
        "--vocab_size",
        "400",
        "--max_length",
        "32",
        "--stride",
        "0",
        "--val_fraction",
        "0.2",
        "--num_workers",
        "1",
    ]
    command = [
        sys.executable,
        "data_prep_tool.py",
        "--input_dir",
        folder / "text",
        "--output_dir",
        folder / "data",
        *flags,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder / "data"


@pytest.fixture(scope="session")
def encoder_data(tmp_path_factory) -> Path:
    """As `tiny_data` for an encoder: a WordPiece, and 240 documents, each of sentences on one of three things."""
    folder = tmp_path_factory.mktemp("encoder_data")
    random = Random(0)
    things = ["sun sky cloud rain wind storm", "cat dog bird runner barks sings", "red green paint brush walls room"]
    documents = []
    for _ in range(240):
        words = random.choice(things).split()
        sentences = []
        for _ in range(random.randint(1, 5)):
            first, count = random.randrange(6), random.randint(3, 7)
            sentences.append(" ".join(["the", *(words[(first + i) % 6] for i in range(count)), "."]))
        documents.append(json.dumps({"text": " ".join(sentences)}))
    (folder / "text").mkdir()
    (folder / "text" / "documents.jsonl").write_text("\n".join(documents))
    flags = "--tokenizer_type wordpiece --vocab_size 90 --max_length 32 --stride 0 --val_fraction 0.2 --num_workers 1"
    command = [sys.executable, "data_prep_tool.py", "--input_dir", folder / "text", "--output_dir", folder / "data"]
    subprocess.run([*command, *flags.split()], cwd=ROOT, check=True, capture_output=True, text=True)
    return folder / "data"


@pytest.fixture(scope="session")
def bare_tokenizer():
    """A small byte-level tokenizer that knows the end of text and padding alone, as `--special_tokens` without any makes."""
    from dataprep.tokenizers import Tokenizer  # here: few tests need them
    from dataprep.train_tokenizer import train_bpe

    files = train_bpe(
        lambda: ["the user asks and the assistant answers, system or not"] * 3,
        vocab_size=300, pretokenizer="llama3", eos_token="<|endoftext|>", max_length=128, chosen=(),
    )  # fmt: skip
    return Tokenizer.of_files(files, Path("tokenizer.json"))
