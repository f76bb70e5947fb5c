"""Which documents are held out for validation?

The one rule is the hash of a document's content: it does not move when files are added, renamed or put in another
order, and copies of a document never end up on both sides. Two corpora need more: one text file alone is one document,
so its end is held out; and where no hash falls below the fraction, the document with the lowest hash is taken.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from dataprep.readers import Document

# A single document may be held out in place of the fraction only if it is at most this part of the text.
LARGEST_SHARE = 0.1


def split_of(digest: bytes, fraction: float) -> str:
    """The split, "train" or "val", of a document with this content hash."""
    return "val" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


def hold_out_tail(document: Document, fraction: float) -> list[tuple[Document, str]]:
    """A text cut in two documents, the last `fraction` of its characters for validation, cut after a newline if it can.

    The whole document for training when one of the two would be blank.
    """
    length = sum(map(len, document.chunks()))
    target = round(length * (1 - fraction))
    cut = _after_newline(document.chunks(), target) or target
    head, tail = _part(document, 0, cut, 0), _part(document, cut, length, None)
    if head is None or tail is None:
        return [(document, "train")]
    return [(head, "train"), (tail, "val")]


def _after_newline(chunks: Iterable[str], target: int) -> int:
    """The last position at or before `target` that follows a newline; 0 if none."""
    at = found = 0
    for chunk in chunks:
        newline = chunk.rfind("\n", 0, max(0, target - at))
        found = at + newline + 1 if newline >= 0 else found
        at += len(chunk)
        if at >= target:
            break
    return found


def _part(document: Document, first: int, last: int, position: int | None) -> Document | None:
    """Characters [first, last) of a document as a document; None if they are blank."""
    digest = hashlib.blake2b(digest_size=16)
    at = before = size = 0
    blank = True
    for chunk in document.chunks():
        before += len(chunk[: max(0, first - at)].encode())
        wanted = chunk[max(0, first - at) : max(0, last - at)]
        at += len(chunk)
        blank = blank and not wanted.strip()
        digest.update(wanted.encode())
        size += len(wanted.encode())
    if blank:
        return None
    start = document.position + before if position is None else position
    if document.text is not None:
        return Document(start, size, digest.digest(), document.text[first:last])
    return Document(start, size, digest.digest(), None, document.file, (first, last))


def lowest_hash(hashes: Iterable[np.ndarray], sizes: Iterable[np.ndarray], largest: float) -> tuple[int, int] | None:
    """(array, index) of the document of the lowest hash among those of a size up to `largest`; None if there is none.

    hashes: arrays of V16; sizes: arrays of integers of the same lengths.
    """
    best: tuple[bytes, int, int] | None = None
    for number, (hash_array, size_array) in enumerate(zip(hashes, sizes, strict=True)):
        for index in np.flatnonzero(size_array <= largest):
            candidate = (hash_array[index].tobytes(), number, int(index))
            best = candidate if best is None or candidate < best else best
    return best[1:] if best else None
