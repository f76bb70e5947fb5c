"""Where may a name that was read from a file lead? To a file in that file's own folder, and nowhere else.

Lowest layer, beside errors.py. Weight maps, manifests and metadata come with folders from anywhere: a name in one of them
must not make groundup read what lies elsewhere on this machine.
"""

import os
from pathlib import Path

from errors import UserError


def is_plain_name(name: object) -> bool:
    """Does it name a file in the folder itself: no path, no parent, nothing hidden?"""
    if not isinstance(name, str):
        return False
    return name == os.path.basename(name) != "" and not name.startswith(".") and not set(name) & {"\0", "\\"}


def inside(folder: Path, name: object, named_in: str) -> Path:
    """folder / name. named_in: the file that the name was read from. UserError where it leads out of the folder.

    A link may lead to a file of the same folder, or, in Hugging Face's cache, from snapshots/COMMIT to the blobs of the same
    model; the folder itself may be reached through links, for that is the user's own doing.
    """
    if not isinstance(name, str) or not is_plain_name(name):
        raise UserError(
            f"{folder / named_in} names the file {name!r}, which is not a plain name of a file beside it; correct the folder"
        )
    path, home = folder / name, folder.resolve()
    if path.is_symlink():
        target = path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if target.parent not in (home, blobs):
            raise UserError(
                f"{folder / named_in} names {name}, which is a link out of its folder, to {target}; put the file itself there"
            )
    return path
