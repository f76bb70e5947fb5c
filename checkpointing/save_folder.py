"""Who may write in a run's --save_dir, what lies there, and which of it is whole?

    SAVE_DIR/
      .lock                      held by the one trainer that writes here
      latest, best               one line each, the name of a checkpoint folder; hints only
      checkpoint_step_1000/      exists only when whole, and is never changed, but that --keep_optimizer last takes a file out
      .tmp_step_1100_PID_RANDOM/ being written; .old_… being replaced; .del_… being deleted

No tensor format notices a flipped bit by itself, so a checkpoint's manifest.json has the size and CRC-32 of each file.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from checkpointing.safetensors_writer import file_crc32, write_file
from errors import UserError, explain_os_error
from paths import is_plain_name

FORMAT = 1
MANIFEST, CONFIG, TRAINER_STATE = "manifest.json", "config.json", "trainer_state.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
WEIGHTS, WEIGHTS_INDEX, OPTIMIZER = "model.safetensors", "model.safetensors.index.json", "optimizer.safetensors"

REMOVED = "removed"  # in a manifest: the optimizer's file, where it was taken out (retention.py)

# What reading a JSON file that anybody may have written can raise, from a missing key to nesting without end.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

_CHECKPOINT_NAME = re.compile(r"checkpoint_step_(\d+)")
_TEMPORARY_NAME = re.compile(r"\.tmp_.+_(\d+)_[0-9a-f]+")
_REPLACED_NAME = re.compile(r"\.old_(checkpoint_step_\d+)_[0-9a-f]+")


# ---- one writer ------------------------------------------------------------------------------------------------------


def write_probe(save_dir: str | os.PathLike) -> None:
    """Make `save_dir` and prove, before the first step, that a checkpoint can be written there.

    Every rank calls it; rank 0 tries. Raises UserError on every rank.
    """
    save_dir = Path(save_dir)

    def probe() -> None:
        temporary = temporary_path(save_dir, "probe")
        try:
            save_dir.mkdir(parents=True, exist_ok=True)
            write_file(temporary, [b"groundup"])
            temporary.unlink()
        except OSError as error:
            error.filename = str(save_dir)
            reason = explain_os_error(error) or f"{save_dir}: {error.strerror}; choose another folder"
            raise UserError(f"--save_dir cannot hold checkpoints: {reason}") from error

    from_rank_0(probe)


def lock(save_dir: str | os.PathLike) -> contextlib.ExitStack:
    """Be the one trainer that writes to `save_dir` (made if missing) until the result is closed or the process ends.

    Every rank calls it; rank 0 holds the lock. The kernel frees it however the process ends.
    Raises UserError, on every rank, naming who holds it.
    """
    save_dir = Path(save_dir)
    held = contextlib.ExitStack()

    def take() -> None:
        save_dir.mkdir(parents=True, exist_ok=True)
        file = open(save_dir / ".lock", "a+")  # noqa: SIM115 - stays open for the life of the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(
                f"another trainer is writing to {save_dir} ({holder}); stop it or choose another --save_dir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
        file.flush()
        held.callback(file.close)
        # A forked helper (a data worker, say) that outlives the trainer must not go on holding the lock.
        os.register_at_fork(after_in_child=file.close)

    from_rank_0(take)
    return held


def clean(save_dir: str | os.PathLike) -> list[str]:
    """Remove what killed trainers left, put back a checkpoint whose replacement was cut short; returns their names.

    For the holder of `lock`; every rank calls it. What another live process on this machine is writing is left alone.
    """
    save_dir = Path(save_dir)

    def sweep() -> list[str]:
        touched = []
        for path in sorted(save_dir.iterdir()):
            if not path.name.startswith((".tmp_", ".old_", ".del_")):
                continue
            temporary, replaced = _TEMPORARY_NAME.fullmatch(path.name), _REPLACED_NAME.fullmatch(path.name)
            if temporary and int(temporary[1]) != os.getpid() and _is_alive(int(temporary[1])):
                continue
            if replaced and not (save_dir / replaced[1]).exists():
                os.rename(path, save_dir / replaced[1])
                fsync_folder(save_dir)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            touched.append(path.name)
        return touched

    return from_rank_0(sweep)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives and belongs to somebody else
    return True


def temporary_path(save_dir: Path, purpose: str) -> Path:
    """A name nobody else uses, which tells `clean` whose it is."""
    return save_dir / f".tmp_{purpose}_{os.getpid()}_{secrets.token_hex(4)}"


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries: without it a file or a rename in it may be gone after a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint, whole, to a name that `clean` knows (".old" or ".del")."""
    aside = path.with_name(f"{prefix}_{path.name}_{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


# ---- what lies there -------------------------------------------------------------------------------------------------


def write_pointer(save_dir: Path, name: str, target: str) -> None:
    """Replace the one-line file `name` ("latest" or "best") atomically. Raises OSError."""
    replace_file(save_dir, save_dir / name, f"{target}\n".encode())


def replace_file(save_dir: Path, path: Path, content: bytes) -> None:
    """Replace a small file in `save_dir`, or in a folder of it, atomically. Raises OSError."""
    temporary = temporary_path(save_dir, path.name)
    try:
        write_file(temporary, [content])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_pointer(save_dir: Path, name: str) -> Path | None:
    """The folder a pointer names, which may be gone; None without a pointer or where it holds anything else."""
    try:
        target = (save_dir / name).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return save_dir / target if _CHECKPOINT_NAME.fullmatch(target) else None


def list_checkpoints(save_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """(step, folder) of everything in `save_dir` that has a checkpoint's name, whole or not, by step. No folder: []."""
    try:
        with os.scandir(os.fspath(save_dir)) as entries:
            folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = [match for name in folders if (match := _CHECKPOINT_NAME.fullmatch(name))]
    return sorted((int(match[1]), Path(save_dir) / match[0]) for match in matches)


def verify_checkpoint(path: str | os.PathLike, deep: bool = True) -> str | None:
    """None if the checkpoint is whole, else the reason, naming the file. Only files in the manifest count.

    `deep` reads every byte (about 2 GB/s); otherwise only sizes are compared.
    """
    path = Path(path)
    try:
        manifest = read_json(path / MANIFEST)
        version, step = manifest["format"], manifest["step"]
        entries = {name: (entry["bytes"], entry["crc32"]) for name, entry in manifest["files"].items()}
        needed = [OPTIMIZER] if manifest.get(REMOVED) != [OPTIMIZER] else []
    except FileNotFoundError:
        return f"{MANIFEST}: missing, so this is no checkpoint or an unfinished copy of one"
    except UNREADABLE as error:
        return f"{MANIFEST}: unreadable ({type(error).__name__}: {error})"
    if type(version) is not int or version < 1:
        return f"{MANIFEST}: format {version!r} is unknown"
    if version > FORMAT:
        return f"written by a newer version of groundup (format {version}; this one reads up to {FORMAT})"
    model = CONFIG, WEIGHTS_INDEX if WEIGHTS_INDEX in entries else WEIGHTS
    if ADAPTER_CONFIG in entries:
        model = ADAPTER_CONFIG, ADAPTER_WEIGHTS
    for required in (*model, *needed, TRAINER_STATE):
        if required not in entries:
            return f"{MANIFEST}: does not list {required}"
    for name, (size, crc) in entries.items():
        if reason := _check_file(path, name, size, crc, deep):
            return reason
    if deep:
        try:
            same_step = read_json(path / TRAINER_STATE)["step"] == step
        except UNREADABLE as error:
            return f"{TRAINER_STATE}: unreadable ({type(error).__name__}: {error})"
        if not same_step:
            return f"{MANIFEST}: step {step!r} is not the step of {TRAINER_STATE}"
    return None


def has_optimizer(path: Path) -> bool:
    """Whether a run can go on from a checkpoint that is whole."""
    return OPTIMIZER in read_json(path / MANIFEST)["files"]


def _check_file(folder: Path, name: str, size: int, crc: str, deep: bool) -> str | None:
    """Why a listed file is not as the manifest says, or None."""
    if not is_plain_name(name):
        return f"{MANIFEST}: unsafe file name {name!r}"
    try:
        status = os.lstat(folder / name)
        if not stat.S_ISREG(status.st_mode):
            return f"{name}: not a plain file"
        if status.st_size != size:
            return f"{name}: {status.st_size} bytes, {MANIFEST} says {size}"
        if deep and file_crc32(folder / name) != crc:
            return f"{name}: checksum mismatch, its bytes have changed since it was written"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


def read_json(path: Path) -> dict:
    """A JSON file that is no symbolic link (one could point anywhere). Raises OSError or ValueError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return json.load(file)


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


# ---- all ranks agree -------------------------------------------------------------------------------------------------


def from_rank_0(function: Callable, patience: timedelta | None = None):
    """What `function` returns on rank 0, on every rank. A UserError or OSError it raises is raised on every rank.

    patience: how long the other ranks wait, where the time that they wait for one another (ranks.py) may be too short.
    """
    outcome: list = [None, None]
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    group = dist.new_group(timeout=patience, backend="gloo") if distributed and patience else None
    if not distributed or dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = error
    if distributed:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
