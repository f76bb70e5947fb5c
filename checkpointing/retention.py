"""Which checkpoints of a run are kept, and which of them with their optimizer state?

What goes was whole and is whole until it has another name, or another manifest: a kill at any moment leaves nothing half.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from checkpointing.save_folder import (
    MANIFEST,
    OPTIMIZER,
    REMOVED,
    fsync_folder,
    json_bytes,
    list_checkpoints,
    move_aside,
    read_json,
    read_pointer,
    replace_file,
    verify_checkpoint,
)


@dataclass(frozen=True)
class Retention:
    """newest: how many of the newest stay; every: also each whose step is a multiple of it. None or 0: all; none more.

    optimizers: "all" keep their optimizer state, or the "last" one alone.
    """

    newest: int | None = None
    every: int | None = None
    optimizers: str = "all"


def retire_old(save_dir: Path, published: Path, retention: Retention) -> None:
    """Delete what is not to be kept, never `published` or what `best` names; broken ones are neither counted nor touched.

    Raises OSError.
    """
    whole = [(step, path) for step, path in list_checkpoints(save_dir) if verify_checkpoint(path, deep=False) is None]
    if retention.newest:
        kept = {*(path for _, path in whole[-retention.newest :]), published, read_pointer(save_dir, "best")}
        kept |= {path for step, path in whole if retention.every and step % retention.every == 0}
        for _, path in whole:
            if path not in kept:
                # Renamed first, so that a checkpoint is never seen half deleted.
                shutil.rmtree(move_aside(path, ".del"), ignore_errors=True)
        whole = [(step, path) for step, path in whole if path in kept]
    if retention.optimizers == "last":
        for _, path in whole:
            if path not in (published, whole[-1][1]):
                remove_optimizer(path)


def remove_optimizer(path: Path) -> None:
    """Take the optimizer state out of a checkpoint. Does the rest where an earlier call was cut short. Raises OSError.

    First the manifest gives way to one without the file, which from then on is one of those that do not count.
    """
    if not (path / OPTIMIZER).exists():
        return
    manifest = read_json(path / MANIFEST)
    if manifest["files"].pop(OPTIMIZER, None):
        replace_file(path.parent, path / MANIFEST, json_bytes({**manifest, REMOVED: [OPTIMIZER]}))
    (path / OPTIMIZER).unlink()
    fsync_folder(path)
