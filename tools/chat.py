"""How does one talk to a trained model? A dialogue in the terminal, written by the checkpoint's own chat template.

    python utils.py chat --checkpoint checkpoints
    python utils.py chat --checkpoint base_model --adapter checkpoints --system "Answer briefly."
    echo "What is a token?" | python utils.py chat --checkpoint checkpoints --temperature 0

A line is a turn; /reset begins a new dialogue, /exit or the end of the input ends the program. Answers go to stdout,
everything else to stderr. An answer ends with the template's end of a turn or with the end-of-text token.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from arguments import ArgumentParser
from dataprep.tokenizers import Tokenizer, load_tokenizer
from finetune_data.chat_template import ChatTemplate, load_chat_template
from finetune_data.chat_tokens import describe_template, encode_messages, end_of_turn_id, stop_token_ids
from finetune_data.examples import Message
from generation.sampling import Ending, TextDecoder, decoded, stream_ids, up_to
from model import Transformer
from ranks import choose_device
from tools.generate import (
    add_shared_arguments,
    check_model,
    check_settings,
    find_model,
    print_speed,
    replace_what_cannot_be_shown,
    sampling_settings,
)
from training.loading import check_writes, find_adapter, load_for_use
from training.precision import choose_precision


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_shared_arguments(parser)
    add("--adapter", metavar="DIR", help="a PEFT folder, or a run that trained adapters, to put on that model")
    add("--system", metavar="TEXT", help="a system message at the beginning of every dialogue")
    add("--chat_template", metavar="NAME", help="chatml, llama3 or a Jinja file (default: the checkpoint's own)")
    add("--max_new_tokens", type=int, default=512, help="an answer has at most this many tokens")
    add("--seed", type=int, default=0, help="the same seed and turns give the same answers")


def main(args: argparse.Namespace) -> int:
    """Answer the lines of stdin."""
    check_settings(args, {"system": [args.system] if args.system else []})
    device = choose_device(args.device)
    model, folder = load(args.checkpoint, args.adapter, device)
    tokenizer = load_tokenizer(folder)
    check_model(folder, model, tokenizer)
    template = load_chat_template(folder, override=args.chat_template)
    for line in describe_template(tokenizer, template):
        print(line, file=sys.stderr)
    replace_what_cannot_be_shown(sys.stdin, "replace")
    replace_what_cannot_be_shown(sys.stdout, "backslashreplace")
    converse(model, tokenizer, template, args)
    return 0


def load(checkpoint: str, adapter: str | None, device: torch.device) -> tuple[Transformer, Path]:
    """The model, and the folder whose tokenizer and template it talks with: the adapter's own if it has them."""
    folder, adapter_folder = find_model(checkpoint), find_adapter(adapter) if adapter else None
    check_writes(folder, adapter_folder)
    model = load_for_use(folder, adapter_folder, device=device, dtype=choose_precision("auto", device).dtype)
    if adapter_folder and (adapter_folder / "tokenizer.json").exists():
        return model, adapter_folder
    return model, folder


def converse(model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, args: argparse.Namespace) -> None:
    """Print an answer to each turn until there are no more."""
    begin = [Message("system", args.system)] if args.system else []
    messages = list(begin)
    context = model.config.max_position_embeddings
    generator = torch.Generator(model.head_weight.device).manual_seed(args.seed)
    for said in turns():
        if said == "/exit":
            return
        if said == "/reset":
            messages = list(begin)
            print("a new dialogue", file=sys.stderr)
            continue
        asked = [*messages, Message("user", said)]
        prompt = encode_messages(tokenizer, template, asked, add_generation_prompt=True)[0].tolist()
        if len(prompt) >= context:
            print(
                f"the dialogue has {len(prompt)} tokens, and the model's context is {context}, the answer included; "
                "say less, or begin anew with /reset",
                file=sys.stderr,
            )
            continue
        answer = ""
        for piece in answer_pieces(model, tokenizer, template, prompt, generator, args):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        messages = [*asked, Message("assistant", answer)]


def turns() -> Iterator[str]:
    """The lines of stdin that say something, asked for where a person types them."""
    while True:
        if sys.stdin.isatty():
            try:
                line = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
        elif not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def answer_pieces(
    model: Transformer,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompt: list[int],
    generator: torch.Generator,
    args: argparse.Namespace,
) -> Iterator[str]:
    """The model's answer to a prompt in pieces of whole characters, without what ends it."""
    eos = model.config.eos_token_id
    stops = {*stop_token_ids(tokenizer, template), *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    columns = stream_ids(
        model,
        torch.tensor([prompt]),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(stops),
        vocab_size=tokenizer.vocab_size,
        generator=generator,
        **sampling_settings(args),
    )
    # where the end of a turn is no token of this tokenizer it is written as text
    end = template.end_of_turn if end_of_turn_id(tokenizer, template) is None else ""
    ends = [text for text in (end, *args.stop_strings) if text]
    ending, start = Ending(), time.perf_counter()
    yield from up_to(ends, decoded(columns, stops, TextDecoder(tokenizer, prompt), ending))
    ending.seconds = time.perf_counter() - start
    if sys.stdin.isatty() or sys.stderr.isatty():
        print_speed(ending)
