"""Is every byte of a dataset or of a checkpoint as it was written? One line for each, `ok` or what is wrong with it.

    python utils.py verify data checkpoints

PATH is a data folder of data_prep_tool.py, a checkpoint, or a run's folder (every checkpoint in it).
Exit code: 0 all is well, 1 something is damaged, 2 a PATH is none of these.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from arguments import ArgumentParser
from checkpointing.save_folder import list_checkpoints, verify_checkpoint
from dataprep.shards import DATASET_FOLDER, METADATA_FILE, verify_dataset
from errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a data folder, a checkpoint, or a run's folder")


def main(args: argparse.Namespace) -> int:
    """Verify everything that the paths mean."""
    # all of them first, so that a wrong PATH is told before the reading
    checks = [check for path in args.paths for check in checks_of(Path(path))]
    damaged = 0
    for path, problems_of in checks:
        if sys.stderr.isatty():
            print(f"reading {path} ({folder_bytes(path) / 1e9:.2f} GB) …", end="\r", file=sys.stderr, flush=True)
        problems = problems_of(path)
        if sys.stderr.isatty():
            print("\x1b[K", end="", file=sys.stderr, flush=True)
        for line in problems or [f"{path}: ok"]:
            print(line, flush=True)
        damaged += bool(problems)
    if len(checks) > 1:
        print(f"{damaged} of {len(checks)} are damaged" if damaged else f"all {len(checks)} are ok")
    return 1 if damaged else 0


def checks_of(path: Path) -> list[tuple[Path, Callable[[Path], list[str]]]]:
    """What to verify for a PATH: (folder, function from the folder to its problems). Raises UserError for neither."""
    if (path / METADATA_FILE).exists() or (path / DATASET_FOLDER).is_dir():
        return [(path, verify_dataset)]
    if (path / "manifest.json").exists() or (path / "trainer_state.json").exists():
        return [(path, checkpoint_problems)]
    if checkpoints := list_checkpoints(path):
        return [(folder, checkpoint_problems) for _, folder in checkpoints]
    if not path.exists():
        raise UserError(f"{path} does not exist; name a data folder, a checkpoint or a run's folder")
    raise UserError(
        f"{path} is not a data folder ({METADATA_FILE}), a checkpoint (manifest.json) or a run with checkpoints in it"
    )


def checkpoint_problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint, as a list of at most one sentence that names the folder and the file."""
    reason = verify_checkpoint(path)
    return [f"{path}: {reason}"] if reason else []


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
