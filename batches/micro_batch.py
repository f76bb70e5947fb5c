"""What does one rank put through the model at once?"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100  # the target that is not learned; the field's usual value
# cu_seqlens is padded with its last entry, so that few lengths occur and compile seldom again
_CU_SEQLENS_MULTIPLE = 64


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank puts through the model at once. B rows of T tokens.

    input_ids, targets, positions: (B, T) int64; targets are `IGNORE_INDEX` where nothing is learned.
    cu_seqlens: (num_docs + 1,) int32 over the flattened B·T tokens, padded by repeating its last entry, or None when
    every row is a single document. weight: how many targets are learned, the number that its summed loss is over.
    num_tokens: tokens that are not padding, for the rate.

    Packed sequences (packing.py) bring more: sequence_ids (B, T) int64, the number of each token's sequence, with the
    number of sequences for padding; last_tokens (sequences,) int64, where each ends in the flattened B·T tokens;
    token_columns {name: (B, T) float32}, figures of the targets; columns {name: (sequences,) float32}. What else a stage
    knows of its rows travels in these two under names of its own.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor | None
    weight: int
    num_tokens: int
    sequence_ids: Tensor | None = None
    last_tokens: Tensor | None = None
    token_columns: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """Of packed sequences only."""
        assert self.last_tokens is not None, "these rows are not packed sequences"
        return len(self.last_tokens)

    @property
    def first_tokens(self) -> Tensor:
        """(sequences,) int64, where each begins in the flattened B·T tokens; of packed sequences only."""
        assert self.last_tokens is not None, "these rows are not packed sequences"
        return self.last_tokens - self.positions.flatten()[self.last_tokens]

    @property
    def places(self) -> list[slice]:
        """Where each sequence stands in the flattened B·T tokens; of packed sequences only."""
        assert self.last_tokens is not None, "these rows are not packed sequences"
        bounds = zip(self.first_tokens.tolist(), self.last_tokens.tolist(), strict=True)
        return [slice(first, last + 1) for first, last in bounds]

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`; to CUDA through pinned memory, so that the copy overlaps with computing."""
        if device.type == "cpu":
            return self

        batch = self.pinned() if device.type == "cuda" else self
        return batch._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """A copy in pinned memory, or what is there already."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return replace(
            self,
            input_ids=move(self.input_ids),
            targets=move(self.targets),
            positions=move(self.positions),
            cu_seqlens=None if self.cu_seqlens is None else move(self.cu_seqlens),
            sequence_ids=None if self.sequence_ids is None else move(self.sequence_ids),
            last_tokens=None if self.last_tokens is None else move(self.last_tokens),
            token_columns={name: move(column) for name, column in self.token_columns.items()},
            columns={name: move(column) for name, column in self.columns.items()},
        )


def pad_boundaries(boundaries: list[int]) -> Tensor:
    """cu_seqlens int32 from where documents start and the last ends, padded so that few lengths occur."""
    padding = -len(boundaries) % _CU_SEQLENS_MULTIPLE
    return torch.from_numpy(np.pad(np.array(boundaries), (0, padding), mode="edge").astype(np.int32))
