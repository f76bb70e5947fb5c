"""How does an adapter become part of its base model? Writes a plain Hugging Face folder that needs no adapter any more.

    python utils.py merge --base base_model --adapter checkpoints/checkpoint_step_500 --output merged

W + scale · B A is summed in fp32 or better and rounded once. An adapter that learned beside 4-bit weights is merged into
what those 4 bits stand for: beside the original weights it would compute something else than it was trained to do.
merge.json in the new folder says what the base and the adapter were. Tokenizer files come from the adapter's folder if
it has them, otherwise from the base's. Nothing is overwritten, and a folder that is not finished never has its name.
"""

import argparse
import math
from pathlib import Path

import torch

from adapters.base_models import json_bytes, load_base, new_folder, stored_dtype
from adapters.lora import is_quantised, merged_state, plain_shapes, quantise_layers
from adapters.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, learned_over, load_adapter, read_adapter_config
from adapters.scalar_head import RewardModel
from adapters.task_heads import TASK_CONFIG, TaskModel, saved_task
from arguments import ArgumentParser
from checkpointing.safetensors_writer import file_crc32, write_file
from checkpointing.save import write_weights
from checkpointing.save_folder import CONFIG, GENERATION_CONFIG
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError
from model import Transformer
from training.loading import find_adapter, find_base

DTYPES = ("float32", "bfloat16", "float16")
COPIED = (*TOKENIZER_FILES, "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
RECORD = "merge.json"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--base", metavar="DIR", required=True, help="the Hugging Face folder or checkpoint that the adapter belongs to"
    )
    add("--adapter", metavar="DIR", required=True, help=f"a PEFT folder: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    add("--output", metavar="DIR", required=True, help="the new folder; it must not exist")
    add("--dtype", choices=DTYPES, help="of the weights that are written (default: the base's)")
    add(
        "--merge_into",
        choices=("auto", "nf4", "stored"),
        default="auto",
        help="nf4: the base's weights rounded to NF4, as --load_in_4bit trains beside; stored: as they are; "
        "auto: whichever the adapter's file says, stored if it does not say",
    )


def main(args: argparse.Namespace) -> int:
    """Merge, write, and print one line that says what was merged into what."""
    base, adapter, output = find_base(args.base, "--base"), find_adapter(args.adapter), Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists; choose another name, or remove it first")
    stored = stored_dtype(base)
    dtype = getattr(torch, args.dtype) if args.dtype else stored
    into_nf4 = args.merge_into == "nf4" or (args.merge_into == "auto" and learned_over(adapter) == "nf4")
    model: Transformer
    task = saved_task(adapter) if (adapter / TASK_CONFIG).exists() else None
    if task or "score" in (read_adapter_config(adapter).get("modules_to_save") or ()):
        if task:
            model = TaskModel.from_pretrained(base, task, dtype=stored)
        else:
            model = RewardModel.from_pretrained(base, seed=0, dtype=stored)
        if into_nf4:
            quantise_layers(model)
    else:
        model = load_base(base, dtype=stored, quantise="nf4" if into_nf4 else None)
    into_nf4 = is_quantised(model)  # also where the base's folder is in 4 bits
    load_adapter(model, adapter)

    with new_folder(output) as folder:
        write_file(folder / CONFIG, [json_bytes(model.config.to_hf(dtype))])
        for source in further_files(base, adapter):
            write_file(folder / source.name, [source.read_bytes()])
        write_file(folder / RECORD, [json_bytes(record(base, adapter, into_nf4, dtype))])
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in plain_shapes(model).items()}
        write_weights(folder, sizes, lambda names: merged_state(model, dtype=dtype, names=names))
    print(f"{output}: {adapter} merged into {base} ({'NF4, decoded' if into_nf4 else 'as stored'}), {_name(dtype)}")
    return 0


def further_files(base: Path, adapter: Path) -> list[Path]:
    """The tokenizer's files, all from one folder, and generation_config.json, the adapter's or the base's; those that exist."""
    source = adapter if (adapter / TOKENIZER_FILES[0]).is_file() else base
    ends = adapter if (adapter / GENERATION_CONFIG).is_file() else base
    found = [source / name for name in COPIED] + [ends / GENERATION_CONFIG]
    return [path for path in found if path.is_file()]


def record(base: Path, adapter: Path, into_nf4: bool, dtype: torch.dtype) -> dict:
    """The contents of merge.json: sizes and CRC-32 say which files these were, wherever the folders are now."""
    config = read_adapter_config(adapter)
    weights = sorted(path.name for path in base.glob("*.safetensors") if path.name.startswith("model"))
    return {
        "base": {"folder": str(base.resolve()), "files": _files(base, [CONFIG, *weights])},
        "adapter": {
            "folder": str(adapter.resolve()),
            "files": _files(adapter, [ADAPTER_CONFIG, ADAPTER_WEIGHTS]),
            "learned_over": learned_over(adapter) or "not stated",
            **{
                key: config.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora")
            },
        },
        "merged_into": "the base's weights in NF4, decoded" if into_nf4 else "the base's weights as stored",
        "dtype": _name(dtype),
    }


def _files(folder: Path, names: list[str]) -> dict[str, dict]:
    return {name: {"bytes": (folder / name).stat().st_size, "crc32": file_crc32(folder / name)} for name in names}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
