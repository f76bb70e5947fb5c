"""How is a model kept in a quarter of its size? With its linear layers in NF4, as bitsandbytes reads and writes it.

    python utils.py quantise --model checkpoints/mine --output mine_4bit

The folder is a quarter of the size. --init_from takes it, so that QLoRA need not round the weights at each start, and so do
transformers' from_pretrained (with bitsandbytes installed) and utils.py generate and chat.
"""

import argparse
from pathlib import Path

from adapters.base_models import load_base, refuse_experts, save_quantised, stored_dtype
from adapters.task_heads import saved_task
from arguments import ArgumentParser
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError
from training.loading import find_base, read_shape

_FURTHER = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        required=True,
        help="a folder of a family in docs/families.md, a checkpoint or a run",
    )
    add("--output", metavar="DIR", required=True, help="the new folder; it must not exist")


def main(args: argparse.Namespace) -> int:
    """Quantise, write, and print one line with both sizes."""
    folder, output = find_base(args.model, "--model"), Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists; choose another name, or remove it first")
    shape = read_shape(folder)
    refuse_experts(shape)
    if saved_task(folder):
        raise UserError(
            f"--model {folder} has the head of a classifier, a tagger or an answer finder, and 4 bits are for models "
            "without one: quantise the model that it was made of"
        )
    model = load_base(folder, dtype=stored_dtype(folder), quantise="nf4")
    files = {name: (folder / name).read_bytes() for name in dict.fromkeys(_FURTHER) if (folder / name).is_file()}
    save_quantised(model, output, files)
    before, after = (
        sum(path.stat().st_size for path in where.glob("model*.safetensors")) for where in (folder, output)
    )
    print(f"{output}: {after / 1e6:,.1f} MB of weights, {before / 1e6:,.1f} MB in {folder}")
    return 0
