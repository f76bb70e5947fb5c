"""Does it all work here? From a folder of text to a model that writes, in one command and at most ten minutes.

Runs the scripts as a user would: data_prep_tool.py, train.py, then samples, on the Python standard library's own source
files (they are on every machine) or on `--corpus FOLDER`. It prints each command before it runs it. Started again after
it was stopped, it goes on where it was.
"""

import argparse
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from arguments import ArgumentParser
from dataprep.shards import TokenSplit, load_metadata, open_split
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from training.run_files import column, duration, read_history

ROOT = Path(__file__).resolve().parent.parent
_TRAIN_SECONDS = 360  # leaves four of the ten minutes for the tokenizer, the shards, the evaluations and the samples
_PROBE_STEPS = 12
_MIN_STEPS = 20  # on a very slow machine the model is small talk, but the path is whole
_MAX_EPOCHS = 4  # repeated text is nearly as good as new text up to here (Muennighoff et al. 2023)
_XZ_BYTES = 64 * 2**20  # more than this would take longer to compress than to train on


@dataclass(frozen=True)
class Size:
    """What the demo trains on a kind of device: flags of data_prep_tool.py and of train.py."""

    prep: str
    train: str
    batch_size: int
    max_length: int


CPU = Size(
    prep="--vocab_size 4096 --max_length 256 --stride 0",
    train="--hidden_size 256 --num_layers 4 --num_heads 4 --qk_norm --batch_size 16 --learning_rate 4e-3 --weight_decay 0.1",
    batch_size=16,
    max_length=256,
)
GPU = Size(
    prep="--vocab_size 16384 --max_length 1024 --stride 0",
    train="--preset small --qk_norm --batch_size 64 --micro_batch_size 32 --learning_rate 2e-3 --weight_decay 0.1",
    batch_size=64,
    max_length=1024,
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--corpus", metavar="FOLDER", help="folder with your own text (default: Python's standard library)"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", default="demo", help="where everything goes")
    parser.add_argument(
        "--train_seconds",
        type=int,
        default=_TRAIN_SECONDS,
        help="time to train for; the number of steps follows from it",
    )


def main(args: argparse.Namespace) -> int:
    """Run the whole path; the return value is 0 or the failing script's."""
    name = Path(args.corpus).resolve().name if args.corpus else "python-stdlib"
    home = Path(args.output_dir) / re.sub(r"[^\w.-]", "_", name)
    data, run = home / "data", home / "run"
    size = GPU if torch.cuda.is_available() else CPU
    try:
        corpus, more = (
            (Path(args.corpus), "")
            if args.corpus
            else (gather_standard_library(home / "corpus"), "--text_extensions .py")
        )
        title(1, "text to tokenizer and shards")
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        script(
            "data_prep_tool.py",
            "--input_dir",
            corpus,
            "--output_dir",
            data,
            "--num_workers",
            workers,
            *size.prep.split(),
            *more.split(),
        )
        title(2, "train")
        train(size, data, run, args.train_seconds, is_python=not args.corpus)
        title(3, "samples")
        for prompt in prompts(data, is_python=not args.corpus):
            script(
                "utils.py",
                "generate",
                "--checkpoint",
                run,
                "--repetition_penalty",
                1.1,
                "--prompt",
                prompt,
                "--max_new_tokens",
                120,
                "--temperature",
                0.7,
            )
    except subprocess.CalledProcessError as failed:
        print(
            f"\n{Path(failed.cmd[1]).name} ended with exit code {failed.returncode}; run the same command again to go on",
            file=sys.stderr,
        )
        return failed.returncode
    title(4, "what there is now")
    print(summary(home, data, run))
    return 0


def train(size: Size, data: Path, run: Path, seconds: int, is_python: bool) -> None:
    """train.py for as many steps as fit into `seconds` here, or on from where an earlier demo stopped."""
    if any(run.glob("checkpoint_step_*")):
        script("train.py", "--save_dir", run, "--checkpoint", "latest")
        return
    common = ["--data_dir", data, *size.train.split()]
    print("a few steps first, to see how fast this machine is")
    precisions = ["auto"] if torch.cuda.is_available() else ["none", "bf16"]  # bf16 is fast on some CPUs, slow on most
    probe = _PROBE_STEPS if seconds >= 60 else _PROBE_STEPS // 3  # not longer than the training itself
    speeds = {precision: seconds_per_step([*common, "--mixed_precision", precision], probe) for precision in precisions}
    precision = min(speeds, key=speeds.__getitem__)
    windows = load_metadata(data).splits["train"].tokens // size.max_length
    steps = max(_MIN_STEPS, min(int(seconds / speeds[precision]), _MAX_EPOCHS * windows // size.batch_size))
    seen = ", ".join(f"{speed:.2f} s with --mixed_precision {name}" for name, speed in speeds.items())
    print(f"a step takes {seen}: {steps:,} steps, about {duration(steps * speeds[precision])}")
    shutil.rmtree(run, ignore_errors=True)
    script(
        "train.py", *common, "--mixed_precision", precision, "--save_dir", run,
        "--max_steps", steps, "--warmup_steps", max(1, min(40, steps // 10)), "--log_interval", max(1, steps // 60),
        "--eval_interval", -(-steps // 4), "--eval_tokens", 65536, "--sample_prompt", prompts(data, is_python)[0],
    )  # fmt: skip


def seconds_per_step(flags: list, steps: int) -> float:
    """What a step of train.py with these flags takes here: the fastest of a few log lines of a run thrown away."""
    probe = f"--max_steps {steps} --log_interval {steps // 3} --eval_interval 0 --eval_tokens 512".split()
    with tempfile.TemporaryDirectory() as folder:
        script("train.py", *flags, "--save_dir", folder, "--sample_prompt", "", *probe, quiet=True)
        return column(read_history(folder).train, "dt").min()


def gather_standard_library(folder: Path) -> Path:
    """Copy the .py files of this Python's standard library, without installed packages, into `folder`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if not (library / "os.py").exists():
        raise UserError(f"{library} holds no Python source files; name a folder of text with --corpus")
    for source in sorted(library.rglob("*.py")):
        place = source.relative_to(library)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(place.parts):
            target = folder / place
            if not target.exists() or target.stat().st_size != source.stat().st_size:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    return folder


def prompts(data: Path, is_python: bool) -> list[str]:
    """What to continue: openings of Python code, or the first words of the user's own validation text."""
    if is_python:
        return ["def __init__(self", "class Test", "import os\nimport sys\n"]
    tokenizer = load_tokenizer(data)
    split = open_split(data, "val" if load_metadata(data).splits["val"].tokens else "train")
    opening = tokenizer.decode(split.read(0, min(split.num_tokens, 64)).tolist())
    return [" ".join(opening.split()[:3]) or "The"]


def script(name: str, *arguments: object, quiet: bool = False) -> None:
    """Run one of the project's scripts with this Python, showing the command. CalledProcessError when it fails."""
    words = [str(argument) for argument in arguments]
    if not quiet:
        print(
            "$ python "
            + " ".join(
                [name, *(json.dumps(word) if re.search(r"[^\w./=-]", word) or not word else word for word in words)]
            ),
            flush=True,
        )
    command = [sys.executable, str(ROOT / name), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if quiet else None)


def title(number: int, text: str) -> None:
    print(f"\n== {number} of 4: {text} ==", flush=True)


def summary(home: Path, data: Path, run: Path) -> str:
    """The figures reached, the files made, and what to try next."""
    history = read_history(run)
    reached = "no validation figure: the text has too few documents to hold one out"
    if history.evals:
        last = history.evals[-1]
        reached = f"{last.get('val_bpb_all', last['val_bpb']):.3f} bits per byte after {last['step']:,} steps"
        yardstick = xz_bits_per_byte(open_split(data, "val"), load_tokenizer(data))
        reached += f"; xz -9 needs {yardstick:.3f} for the same text" if yardstick else ""
    checkpoint = (run / "latest").read_text().strip()
    return f"""validation: {reached}

  {data}/tokenizer.json            the tokenizer (Hugging Face format)
  {data}/dataset/                  the tokens (Megatron-LM's .bin and .idx)
  {run}/{checkpoint}/      the model (a Hugging Face folder), optimizer state and position in the data
  {run}/metrics.jsonl              every figure of the run
  {run}/curves.png                 the loss curve

next:
  python utils.py generate --checkpoint {run} --prompt "def main("
  python utils.py monitor --checkpoint_dir {home} --once
  python utils.py plan --data_dir {data} --preset small
  python train.py --save_dir {run} --checkpoint latest --max_steps {2 * history.step}"""


def xz_bits_per_byte(split: TokenSplit, tokenizer) -> float | None:
    """Bits that xz -9 needs for each byte of a split's text, or None for a split too large to compress in passing."""
    if split.num_tokens > _XZ_BYTES // 4:
        return None
    text = tokenizer.decode(split.read(0, split.num_tokens).tolist()).encode()
    return 8 * len(lzma.compress(text, preset=9)) / max(1, len(text))
