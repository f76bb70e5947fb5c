"""Which tokens does masked language modelling hide, and what stands in their place?

Of every row anew each time it is seen (Liu et al. 2019, §4.1): a token that is not special is chosen with a probability, BERT's
15% (Devlin et al. 2019, §3.1). Of the chosen, 80% become [MASK], 10% a random token and 10% stay; all of them are to be told.

BERT chooses exactly 15% of a row. Here, as in RoBERTa and transformers, each token (or word) is a draw of its own, so that a row
has 15% in the mean. A draw is a hash of the sample's number and of the place in the row: nothing else enters, so the same sample
has the same masks on any rank, in any micro-batch, after a resume, and other ones in the next epoch, where its number is another.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batches.micro_batch import IGNORE_INDEX, MicroBatch
from dataprep.tokenizers import Tokenizer
from errors import UserError
from kernels.dropout import GOLDEN, mix64

MASKED = "masked"  # column, (masked,) int64: where in the flattened B·T tokens those are that are to be told
_MASKED, _RANDOM = 0.8, 0.1  # shares of the chosen; the others stay
# Streams of the same keys, below 0, where dropout (kernels/dropout.py) has none.
_CHOICE, _ACTION, _REPLACEMENT = -1, -2, -3
_BITS = 53  # of a draw: a probability is exact to 2**-53, and the remainder of any vocabulary's size as good as uniform


@dataclass(frozen=True)
class Masking:
    """probability: that a token is chosen. ordinary: (N,) int64, the ids that are not special, which replacements are drawn from.

    special: (V,) bool, the ids that are never chosen. continues: (V,) bool, the pieces that go on with a word, whose pieces are
    then chosen together; None chooses each token by itself.
    """

    probability: float
    mask_id: int
    ordinary: Tensor
    special: Tensor
    continues: Tensor | None = None


def masking_of(tokenizer: Tokenizer, probability: float, whole_words: bool) -> Masking:
    """What to mask of a tokenizer's rows. UserError where it has no mask token, or no marks of words for whole_words."""
    if not 0.0 < probability < 1.0:
        raise UserError(f"the share of masked tokens must be above 0 and below 1; it is {probability}")
    if tokenizer.mask_token_id is None:
        raise UserError(
            "the tokenizer has no mask token; prepare the data with --tokenizer_type wordpiece, or bpe and --encoder_tokens"
        )
    ordinary = torch.from_numpy(tokenizer.ordinary_ids())
    special = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    special[ordinary] = False
    continues = torch.from_numpy(tokenizer.continuation_pieces()) if whole_words else None
    return Masking(probability, tokenizer.mask_token_id, ordinary, special, continues)


def mask_tokens(input_ids: Tensor, keys: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
    """(input_ids with masks, targets): (B, T) int64; targets are the ids that were chosen, IGNORE_INDEX elsewhere.

    input_ids: (B, T) int64. keys: int64, (B,) of the samples, with which the place in the row makes a token's key, or (B, T) of
    the tokens. A random token may be the one that it replaces. A word is chosen by the key of the place where it begins, and
    what stands for each of its pieces by the piece's own, as in BERT's whole word masking. No special token is chosen, nor
    drawn, and none lies within a word.
    """
    if keys.ndim == 1:
        keys = token_keys(keys, input_ids.shape[1])
    special = masking.special[input_ids]  # (B, T)
    deciding = keys if masking.continues is None else keys.gather(1, _first_pieces(input_ids, masking.continues))
    chosen = (_draws(deciding, _CHOICE) < _threshold(masking.probability)) & ~special

    action = _draws(keys, _ACTION)
    drawn = masking.ordinary[_draws(keys, _REPLACEMENT) % len(masking.ordinary)]
    masked = chosen & (action < _threshold(_MASKED))
    replaced = chosen & ~masked & (action < _threshold(_MASKED + _RANDOM))
    inputs = torch.where(replaced, drawn, input_ids.masked_fill(masked, masking.mask_id))
    return inputs, input_ids.masked_fill(~chosen, IGNORE_INDEX)


def mask_micro_batch(batch: MicroBatch, keys: Tensor, masking: Masking) -> MicroBatch:
    """The micro-batch with masked inputs, the chosen tokens as its targets, their places as MASKED, their number as weight."""
    input_ids, targets = mask_tokens(batch.input_ids, keys, masking)
    places = torch.nonzero(targets.flatten() != IGNORE_INDEX).flatten()  # here, so that a device is never waited for
    columns = {**batch.columns, MASKED: places}
    return replace(batch, input_ids=input_ids, targets=targets, columns=columns, weight=len(places))


def token_keys(sample_keys: Tensor, length: int) -> Tensor:
    """(B, length) int64: a key for each token of a row, of its sample's key (B,) and its place."""
    places = torch.arange(1, length + 1, device=sample_keys.device)
    return mix64(sample_keys[:, None] + GOLDEN * places)


def _first_pieces(input_ids: Tensor, continues: Tensor) -> Tensor:
    """(B, T) int64: where in its row the word of each token begins.

    A word that begins without a mark of it, behind [CLS] or at the start of a row, is taken to begin at the special token, or at
    the row's start: all its pieces do, and no other word.
    """
    begins = ~continues[input_ids]
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.cummax(torch.where(begins, places, 0), dim=1).values


def _draws(keys: Tensor, stream: int) -> Tensor:
    """int64 in [0, 2**53), like `keys`."""
    return (mix64(keys + mix64(torch.tensor(stream, device=keys.device))) >> (64 - _BITS)) & (2**_BITS - 1)


def _threshold(probability: float) -> int:
    return round(probability * 2**_BITS)
