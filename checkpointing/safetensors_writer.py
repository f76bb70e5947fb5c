"""How do tensors reach the disk in the safetensors format, with a checksum, and without a second copy in memory?

One pass: each tensor is copied from its device, checksummed and written before the next one is touched, so a
checkpoint needs host memory for its largest tensor only, and the checksum costs no second read. The safetensors library
reads the files.
Format: https://github.com/huggingface/safetensors#format (8 bytes header length, JSON header, the tensors' bytes).
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sharding import whole

READ_BYTES = 16 << 20

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_chunks(
    tensors: dict[str, Tensor], metadata: dict[str, str], read: Callable[[str], Tensor] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file holding `tensors` (any device), piece by piece; the same for the same tensors.

    Those of which each rank holds a part are put together one by one: every rank goes through the pieces then.
    read: gives the tensor of a name when its turn comes, where those in `tensors` are on "meta" and only say its size.
    """
    # Wide types first: then every tensor begins at a multiple of its element size, as memory mapping wants.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded)) + encoded
    for name in names:
        tensor = tensors[name] if read is None else read(name)
        flat = whole(tensor.detach()).cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


@dataclass
class TensorFile:
    """A safetensors file that is to be written: its bytes piece by piece, each time that it is gone through."""

    tensors: dict[str, Tensor]  # on any device, of sharded models too
    metadata: dict[str, str]

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return safetensors_chunks(self.tensors, self.metadata)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a new file, flush it to the disk: {"bytes", "crc32" (8 hex digits)}. Raises OSError; never overwrites."""
    size = crc = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                # A raw write may stop short of what it was given; the checksum covers only what was taken.
                written = file.write(view[:READ_BYTES])
                crc = zlib.crc32(view[:written], crc)
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": f"{crc:08x}"}


def file_crc32(path: Path) -> str:
    """The CRC-32 of a file as 8 hex digits."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"
