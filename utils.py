#!/usr/bin/env python
"""Everything around training: python utils.py COMMAND --help

A thin door: each command is one file of tools/, imported only when it is chosen.
"""

import importlib
import sys

from arguments import ArgumentParser, did_you_mean
from errors import UserError, run_script

COMMANDS = {
    "setup": "what this machine has, and whether training can run on it",
    "plan": "parameters, memory, tokens and time of a run, before it is started",
    "monitor": "watch one run or many in the terminal",
    "generate": "continue a text with a trained model",
    "chat": "talk with a trained model in the terminal",
    "predict": "fill masks, classify, tag, find answers or embed, a line of JSON a row",
    "merge": "make an adapter part of its base model",
    "average": "make one model of several checkpoints, or of the average that --ema kept",
    "quantise": "write a model in 4 bits, for QLoRA and for bitsandbytes",
    "verify": "check every byte of a dataset or of checkpoints",
    "demo": "from a folder of text to a trained model, in one command",
}


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        listing = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
        print(f"{__doc__.strip()}\n\ncommands:\n{listing}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        raise UserError(
            f"there is no command {name}{did_you_mean(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}"
        )
    tool = importlib.import_module(f"tools.{name}")
    parser = ArgumentParser(prog=f"utils.py {name}", description=tool.__doc__)
    tool.add_arguments(parser)
    return tool.main(parser.parse_args(words[1:]))


if __name__ == "__main__":
    run_script(main)
