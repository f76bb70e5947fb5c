"""How many times faster does data_prep_tool.py encode than the loop that Megatron-LM's preprocess_data.py uses?

    python bench/data_prep.py --input_dir FOLDER [--workers 2] [--rounds 3]

Both encode the same documents with the same trained tokenizer, on the same number of processes, in the same run, in
turns. The loop: a pool of processes encodes documents one by one with `tokenizers` and sends lists of ids to the
parent, which writes them. Prints MB of UTF-8 text a second, median and range, and the ratio of the medians; process
start and tokenizer loading count for both, tokenizer training for neither.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer as HFTokenizer  # noqa: E402

from arguments import ArgumentParser  # noqa: E402
from dataprep.encoding import choose_engine  # noqa: E402
from dataprep.pipeline import Options, prepare  # noqa: E402
from dataprep.progress import Progress  # noqa: E402
from dataprep.readers import Document, discover, read_documents  # noqa: E402
from dataprep.shards import token_dtype  # noqa: E402
from dataprep.tasks import PARTS_FOLDER, Plan, default_task_bytes, load_result, make_tasks  # noqa: E402
from dataprep.tokenizers import load_tokenizer  # noqa: E402
from dataprep.workers import Job, run_tasks  # noqa: E402
from errors import run_script  # noqa: E402

_encoder: HFTokenizer


def _start(path: str) -> None:
    global _encoder
    _encoder = HFTokenizer.from_file(path)


def _encode(text: str) -> list[int]:
    return _encoder.encode(text, add_special_tokens=False).ids


def peer(documents: list[str], tokenizer: Path, workers: int, output: Path) -> int:
    """Encode and write as preprocess_data.py does (Pool.imap with chunks of 32); returns the number of tokens."""
    tokens = 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start, (str(tokenizer),)) as pool, open(output, "wb") as file:
        for ids in pool.imap(_encode, documents, 32):
            file.write(np.array([*ids, 0], dtype=np.uint16).tobytes())
            tokens += len(ids) + 1
    return tokens


def ours(plan: Plan, tokenizer: Path, workers: int, state: Path) -> int:
    """The encoding step of data_prep_tool.py, engine check aside; returns the number of tokens."""
    (state / PARTS_FOLDER).mkdir(parents=True)
    loaded = load_tokenizer(tokenizer.parent)
    job = Job(state, tokenizer.parent, choose_engine(loaded, []).name, token_dtype(loaded.vocab_size))
    run_tasks(job, plan, workers, lambda task, size: None)
    return sum(sum(load_result(state, task).tokens.values()) for task in range(len(plan.tasks)))


def main() -> None:
    parser = ArgumentParser(prog="bench/data_prep.py", description=__doc__)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of text")
    parser.add_argument("--text_extensions", nargs="+", default=[], help="as in data_prep_tool.py")
    parser.add_argument("--vocab_size", type=int, default=32000, help="of the tokenizer trained for both")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, in turns")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = Options(args.input_dir, folder / "data", vocab_size=args.vocab_size, num_workers=args.workers)
        options = replace(options, text_extensions=tuple(args.text_extensions))
        prepare(options, Progress())
        files = tuple(discover(args.input_dir, options.text_extensions).files)
        items = (item for file in files for item in read_documents(args.input_dir, file, 0, file.size, "text"))
        documents = ["".join(item.chunks()) for item in items if isinstance(item, Document)]
        size = sum(len(text.encode()) for text in documents) / 1e6
        tasks = make_tasks(files, default_task_bytes(sum(file.size for file in files)))
        plan = Plan(args.input_dir, files, options.recorded(), tasks)
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(args.rounds):
            counts = {}
            for name in rates:
                started = time.monotonic()
                if name == "ours":
                    counts[name] = ours(plan, folder / "data" / "tokenizer.json", args.workers, folder / f"s{number}")
                else:
                    counts[name] = peer(
                        documents, folder / "data" / "tokenizer.json", args.workers, folder / "peer.bin"
                    )
                rates[name].append(size / (time.monotonic() - started))
            print(f"round {number + 1}: " + ", ".join(f"{name} {rate[-1]:.2f} MB/s" for name, rate in rates.items()))
            if counts["ours"] != counts["peer"]:
                print(
                    f"note: {counts['ours']:,} and {counts['peer']:,} tokens; special tokens spelled in the text differ"
                )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name}: median {medians[name]:.2f} MB/s ({min(values):.2f} to {max(values):.2f})")
    print(f"{medians['ours'] / medians['peer']:.1f} times as fast, {args.workers} processes, {size:.1f} MB")


if __name__ == "__main__":
    run_script(main)
