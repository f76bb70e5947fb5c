"""How does one talk to a trained model? A dialogue in the terminal, written by the checkpoint's own chat template.

    python utils.py chat --checkpoint checkpoints
    python utils.py chat --checkpoint base_model --adapter checkpoints --system "Answer briefly."
    echo "What is a token?" | python utils.py chat --checkpoint checkpoints --temperature 0

A line is a turn; /reset begins a new dialogue, /exit or the end of the input ends the program. Answers go to stdout,
everything else to stderr. An answer ends with the template's end of a turn or with the end-of-text token.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from arguments import ArgumentParser
from dataprep.chat_template import ChatTemplate, load_chat_template
from dataprep.chat_tokens import describe_template, encode_messages, end_of_turn_id, stop_token_ids
from dataprep.examples import Message
from dataprep.tokenizers import Tokenizer, load_tokenizer
from model import Transformer
from tools.generate import add_shared_arguments, check_model, check_settings, find_model
from training.generation import TextDecoder, stream_ids
from training.loading import find_adapter, load_for_use
from training.parallel import choose_device
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
    # what a terminal cannot show, or what is not text, must not end a dialogue
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")
    converse(model, tokenizer, template, args)
    return 0


def load(checkpoint: str, adapter: str | None, device: torch.device) -> tuple[Transformer, Path]:
    """The model, and the folder whose tokenizer and template it talks with: the adapter's own if it has them."""
    folder, adapter_folder = find_model(checkpoint), find_adapter(adapter) if adapter else None
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
    decoder = TextDecoder(tokenizer, prompt)
    columns = stream_ids(
        model,
        torch.tensor([prompt]),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_token_id=sorted(stops),
        vocab_size=tokenizer.vocab_size,
        generator=generator,
    )

    def pieces() -> Iterator[str]:
        for token in map(int, columns):
            if token not in stops:
                yield decoder.add(token)
        yield decoder.finish()

    # where the end of a turn is no token of this tokenizer it is written as text
    yield from up_to("" if end_of_turn_id(tokenizer, template) is not None else template.end_of_turn, pieces())


def up_to(end: str, pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text up to where `end` begins, which may lie across pieces; all of it if `end` is empty."""
    held = ""
    for piece in pieces:
        held += piece
        if end and end in held:
            yield held.partition(end)[0]
            return
        begun = next((size for size in range(len(end) - 1, 0, -1) if held.endswith(end[:size])), 0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held
