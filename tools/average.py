"""How do several checkpoints of a run become one model? By the mean of their weights, or the average that --ema has kept.

    python utils.py average --checkpoint_dir checkpoints/mine --last 5 --output averaged
    python utils.py average --checkpoints RUN/checkpoint_step_80 RUN/checkpoint_step_100 --output averaged
    python utils.py average --checkpoint_dir checkpoints/mine --ema --output averaged

The mean is worked out in float64 and rounded once, with one tensor in memory at a time. The new folder is a Hugging Face
model, with the tokenizer; of adapters that --ema averaged it is an adapter. average.json says what it was made of. Nothing
is overwritten, and a folder that is not finished never has its name.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.base_models import json_bytes, new_folder
from adapters.task_heads import TASK_CONFIG
from arguments import ArgumentParser
from checkpointing.load import resolve_checkpoint
from checkpointing.safetensors_writer import file_crc32, safetensors_chunks, write_file
from checkpointing.save import write_weights
from checkpointing.save_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    list_checkpoints,
    verify_checkpoint,
)
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError
from model import open_safetensors, weight_files
from tools.merge import COPIED, DTYPES
from training.averages import EMA_FILE
from training.loading import find_model_or_adapter

RECORD = "average.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # in config.json of transformers 5, and 4
_NOT_COMPUTED = {"_name_or_path", "transformers_version", *_DTYPE_KEYS}
Holders = dict[str, Path]  # the file that holds each tensor


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint_dir", metavar="DIR", help="a run: its --save_dir")
    which.add_argument("--checkpoints", metavar="DIR", nargs="+", help="these checkpoints, or Hugging Face folders")
    add("--last", metavar="N", type=int, help="of --checkpoint_dir: how many of its newest checkpoints (default: 5)")
    add("--ema", action="store_true", help="the average that train.py --ema kept in the newest one, or the one named")
    add("--output", metavar="DIR", required=True, help="the new folder; it must not exist")
    add("--dtype", choices=DTYPES, help="of the weights that are written (default: as they are)")


def main(args: argparse.Namespace) -> int:
    """Average, write, and print one line that says of what."""
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists; choose another name, or remove it first")
    folders = _folders(args)
    if args.ema:
        holders = [_ema_holders(folders[0])]
    else:
        for folder in folders:
            _refuse_adapter(folder)
        holders = [{name: file for file, held in weight_files(folder).items() for name in held} for folder in folders]
    shapes = _shapes(holders[0])
    for folder, held in zip(folders[1:], holders[1:], strict=True):
        _check_alike(folders[0], shapes, folder, _shapes(held))
    stored = _read(holders[0], next(iter(shapes))).dtype
    dtype = getattr(torch, args.dtype) if args.dtype else stored

    def mean(name: str) -> Tensor:
        total = _read(holders[0], name).double()
        for held in holders[1:]:
            total += _read(held, name).double()
        return (total / len(holders)).to(dtype)

    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    with new_folder(output) as folder:
        for name in (*COPIED, GENERATION_CONFIG, ADAPTER_CONFIG, TASK_CONFIG):
            if (folders[0] / name).is_file():
                write_file(folder / name, [(folders[0] / name).read_bytes()])
        write_file(folder / RECORD, [json_bytes(_record(folders, holders, args.ema, dtype))])
        if (folders[0] / ADAPTER_CONFIG).exists():
            with open_safetensors(folders[0] / ADAPTER_WEIGHTS) as adapter:
                described = adapter.metadata()
            write_file(folder / ADAPTER_WEIGHTS, safetensors_chunks(empty, described, mean))
        else:
            write_file(folder / CONFIG, [json_bytes(_config_of(folders[0]) | dict.fromkeys(_DTYPE_KEYS, _name(dtype)))])
            sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
            write_weights(folder, sizes, lambda names: {name: empty[name] for name in names}, read=mean)
    names = ", ".join(one.name for one in folders)
    print(f"{output}: {'the --ema average in' if args.ema else 'the mean of'} {names}, {_name(dtype)}")
    return 0


def _folders(args: argparse.Namespace) -> list[Path]:
    """What is averaged, the newest first of a run; every byte of a checkpoint is as it was written."""
    if args.checkpoints:
        if args.last is not None:
            raise UserError("--last is for --checkpoint_dir, of which it takes the newest checkpoints: leave it out")
        if args.ema and len(args.checkpoints) > 1:
            raise UserError("--ema takes one checkpoint, which holds an average already: name one")
        folders = [find_model_or_adapter(where, "--checkpoints") for where in args.checkpoints]
        return [resolve_checkpoint(one, one).folder if (one / MANIFEST).exists() else one for one in folders]
    if args.ema and args.last is not None:
        raise UserError("--last and --ema are two ways to average: leave one out")
    wanted = 1 if args.ema else 5 if args.last is None else args.last
    if wanted < 1:
        raise UserError(f"--last must be positive, and is {wanted}")
    whole: list[Path] = []
    for _, path in reversed(list_checkpoints(args.checkpoint_dir)):
        if reason := verify_checkpoint(path):
            print(f"skipped {path}: {reason}")
        else:
            whole.append(path)
        if len(whole) == wanted:
            return whole
    if not whole or args.last is not None:
        raise UserError(
            f"--checkpoint_dir {args.checkpoint_dir} holds {len(whole)} whole checkpoints of {wanted} wanted"
        )
    return whole


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{folder} holds an adapter, and the mean of A and B is not that of their products: make models of the "
            "checkpoints with utils.py merge, and average those"
        )


def _ema_holders(folder: Path) -> Holders:
    if not (folder / EMA_FILE).is_file():
        raise UserError(f"{folder} holds no {EMA_FILE}: it was trained without --ema")
    with open_safetensors(folder / EMA_FILE) as tensors:
        return dict.fromkeys(tensors.keys(), folder / EMA_FILE)


def _shapes(holders: Holders) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in dict.fromkeys(holders.values()):
        with open_safetensors(file) as tensors:
            held = [name for name, holder in holders.items() if holder == file]
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in held}
    return shapes


def _check_alike(
    first: Path, shapes: dict[str, tuple[int, ...]], other: Path, others: dict[str, tuple[int, ...]]
) -> None:
    """UserError, naming what differs, for checkpoints that are not of one model and one tokenizer."""
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise UserError(
                f"{other} is not the same model as {first}: {name} is {others.get(name, 'missing')} there and "
                f"{shapes.get(name, 'missing')} here; average checkpoints of one run"
            )
    one, two = _config_of(first), _config_of(other)
    for key in sorted((one.keys() | two.keys()) - _NOT_COMPUTED):
        if one.get(key) != two.get(key):
            raise UserError(
                f"{other} is not the same model as {first}: {key} in {CONFIG} is {two.get(key)} there and {one.get(key)} here"
            )
    for name in TOKENIZER_FILES:
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else b"" for folder in (first, other)]
        if contents[0] != contents[1]:
            raise UserError(f"{other} has another tokenizer than {first}: their {name} differ")


def _read(holders: Holders, name: str) -> Tensor:
    """The file is opened for each: pages read through a mapping count as memory until it is closed."""
    with open_safetensors(holders[name]) as tensors:
        return tensors.get_tensor(name)


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error})") from error


def _record(folders: list[Path], holders: list[Holders], ema: bool, dtype: torch.dtype) -> dict:
    """The contents of average.json: sizes and CRC-32 say which files these were, wherever the folders are now."""
    sources = []
    for folder, held in zip(folders, holders, strict=True):
        files = {
            file.name: {"bytes": file.stat().st_size, "crc32": file_crc32(file)} for file in sorted(set(held.values()))
        }
        sources.append({"folder": str(folder.resolve()), "files": files})
    return {"average": "of the weights of every step, --ema" if ema else "mean", "of": sources, "dtype": _name(dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
