"""How does a trained model continue a text? Prints the prompt and then, as they come, the pieces that the model writes.

    python utils.py generate --checkpoint checkpoints --prompt "Once upon a time"
    python utils.py generate --checkpoint checkpoints --prompt "def " "class " --num_samples 3 --temperature 0.6

Several samples are numbered; sample i uses the seed --seed + i. The text goes to stdout, everything else to stderr.
"""

import argparse
import io
import math
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from arguments import ArgumentParser
from checkpointing.load import resolve_checkpoint
from checkpointing.save_folder import list_checkpoints
from dataprep.tokenizers import Tokenizer, load_tokenizer
from errors import UserError
from generation.sampling import Ending, stream_text
from model import Transformer
from ranks import choose_device
from training.loading import check_writes, load_for_use
from training.precision import choose_precision


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_shared_arguments(parser)
    add(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        action="extend",
        required=True,
        help="the text to continue; several are done in turn, also when the flag is repeated",
    )
    add("--max_new_tokens", type=int, default=200, help="at most this many tokens are added")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--num_samples", type=int, default=1, help="continuations of each prompt")


def add_shared_arguments(parser: ArgumentParser) -> None:
    """The flags of every tool that lets a model write: which one, where, and how tokens are drawn."""
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="a checkpoint, a run's folder (its newest whole checkpoint), or any folder of a family in docs/families.md",
    )
    add("--temperature", type=float, default=0.8, help="below 1 likely tokens become likelier; 0 takes the likeliest")
    add("--top_k", type=int, default=50, help="draw from this many of the likeliest tokens only; 0 from all")
    add("--top_p", type=float, default=0.95, help="draw from the fewest likely tokens that hold this probability")
    add("--min_p", type=float, default=0.0, help="draw only tokens at least this share as likely as the likeliest")
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1 tokens that the text holds already become less likely; 1.1 is usual",
    )
    add("--stop_strings", metavar="TEXT", nargs="+", default=[], help="end before the first of these texts")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes a GPU if there is one")


def main(args: argparse.Namespace) -> int:
    """Print num_samples continuations of each prompt."""
    check_settings(args, {"prompt": args.prompt}, args.num_samples)
    folder = find_model(args.checkpoint)
    check_writes(folder, None)
    device = choose_device(args.device)
    tokenizer = load_tokenizer(folder)
    model = load_for_use(folder, None, device=device, dtype=choose_precision("auto", device).dtype)
    check_model(folder, model, tokenizer)

    jobs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.num_samples)]
    replace_what_cannot_be_shown(sys.stdout, "backslashreplace")
    for number, (prompt, seed) in enumerate(jobs, start=1):
        if len(jobs) > 1:
            print(f"--- {number} of {len(jobs)}, seed {seed} ---")
        ending = print_continuation(model, tokenizer, prompt, seed, args)
        print_speed(ending)
        if ending.reason == "context":
            limit = model.config.max_position_embeddings
            print(f"stopped: the model's context of {limit} tokens (max_position_embeddings) is full", file=sys.stderr)
    return 0


def replace_what_cannot_be_shown(stream: TextIO, errors: str) -> None:
    """What a terminal that is not UTF-8 cannot show, or what is not text, ends nothing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def print_continuation(
    model: Transformer, tokenizer: Tokenizer, prompt: str, seed: int, args: argparse.Namespace
) -> Ending:
    """Print a prompt and what the model makes of it, piece by piece; return how it ended."""
    pieces = stream_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=args.max_new_tokens,
        stop_strings=args.stop_strings,
        seed=seed,
        **sampling_settings(args),
    )
    print(prompt, end="", flush=True)
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print(flush=True)
            return end.value


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """How a token is drawn, as `stream_ids` takes it."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}


def print_speed(ending: Ending) -> None:
    rate = ending.tokens / max(1e-9, ending.seconds)
    print(f"{ending.tokens:,} tokens, {rate:,.1f} tokens/s", file=sys.stderr)


def check_settings(args: argparse.Namespace, texts: dict[str, list[str]], num_samples: int = 1) -> None:
    """Raises UserError, naming the flag, for a value that means nothing. texts: those of each flag that takes text."""
    limits = {
        "max_new_tokens": (args.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= args.temperature < math.inf, "0 (take the likeliest token) or more"),
        "top_k": (args.top_k >= 0, "at least 1, or 0 to draw from all tokens"),
        "top_p": (0 < args.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= args.min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (0 < args.repetition_penalty < math.inf, "above 0; 1 is none"),
        "num_samples": (num_samples >= 1, "at least 1"),
        "seed": (0 <= args.seed < 2**63 - num_samples, "from 0 to 2^63"),
    }
    for flag, (good, wanted) in limits.items():
        if not good:
            raise UserError(f"--{flag} is {getattr(args, flag)}; it must be {wanted}")
    if "" in args.stop_strings:
        raise UserError("--stop_strings has an empty text, which would end everything before it begins; leave it out")
    for flag, given in (texts | {"stop_strings": args.stop_strings}).items():
        for text in given:
            if any("\ud800" <= character <= "\udfff" for character in text):  # how bytes that are not UTF-8 arrive
                raise UserError(f"--{flag} {text!r} is not UTF-8 text; give it in that encoding")


def find_model(where: str) -> Path:
    """The folder to load from: a checkpoint, the newest whole one of a run, or a folder from elsewhere as it is.

    Reports checkpoints that were passed over. Raises UserError when there is nothing to load.
    """
    path = Path(where)
    if not path.exists():
        raise UserError(f"--checkpoint {where} does not exist; name a checkpoint, a run or a Hugging Face folder")
    ours = (path / "manifest.json").exists() or (path / "trainer_state.json").exists() or list_checkpoints(path)
    if not ours and (path / "config.json").exists():
        return path
    if not ours and path.is_dir():
        raise UserError(
            f"--checkpoint {where} holds neither config.json nor a checkpoint_step_N; name a folder that does"
        )
    found = resolve_checkpoint(path, path)
    for skipped, reason in found.skipped:
        print(f"passed over {skipped}: {reason}", file=sys.stderr)
    if found.path != path:
        print(f"checkpoint: {found.path}", file=sys.stderr)
    return found.folder


def check_model(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Raises UserError when the tokenizer is not this model's, or when the weights are not numbers."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} ids, but the model's vocab_size is "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{folder}: {name} holds NaN or infinity, so the run diverged; name an earlier checkpoint")
