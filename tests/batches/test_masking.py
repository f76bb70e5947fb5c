"""Are as many tokens hidden as should be, in the shares that should be, and the same ones whoever shares the rows?"""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from batches.masking import Masking, mask_micro_batch, mask_tokens, masking_of, token_keys
from batches.micro_batch import IGNORE_INDEX
from batches.sampler import hash_key
from batches.windows import make_micro_batch
from dataprep.tokenizers import Tokenizer
from dataprep.train_tokenizer import train_bpe, train_wordpiece
from errors import UserError

TEXT = "the reader reads unreadable books and rereads them, while models are modelling readers of models"
WORDS = TEXT.split()
VOCAB, SPECIAL, MASK = 500, [0, 1, 2, 3, 4, 77], 4


def plain(probability=0.15) -> Masking:
    special = torch.zeros(VOCAB, dtype=torch.bool)
    special[SPECIAL] = True
    return Masking(probability, MASK, torch.nonzero(~special).flatten(), special)


def sample_keys(count, first=0, seed=3):
    return torch.tensor([hash_key(seed, sample) >> 1 for sample in range(first, first + count)])


def rows(count, length=128, seed=0):
    """Rows of ids, of which about one in eight is special."""
    ids = torch.randint(5, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    specials = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), ids.shape, generator=torch.Generator().manual_seed(1))]
    places = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.125
    return torch.where(places, specials, ids)


def assert_share(successes: int, trials: int, probability: float):
    """Within five standard deviations of a binomial: a right share fails once in two million runs of such draws."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(successes - trials * probability) < 5 * deviation, f"{successes / trials:.4f}, not {probability}"


def shares(ids, inputs, targets, special):
    """(chosen, candidates, masked, changed otherwise) as numbers."""
    chosen = targets != IGNORE_INDEX
    masked = chosen & (inputs == MASK)
    return (
        int(chosen.sum()),
        int((~special[ids]).sum()),
        int(masked.sum()),
        int((chosen & ~masked & (inputs != ids)).sum()),
    )


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_fifteen_percent_are_chosen_and_of_them_80_10_10(probability):
    masking, ids = plain(probability), rows(2000)
    inputs, targets = mask_tokens(ids, sample_keys(2000), masking)
    chosen, candidates, masked, changed = shares(ids, inputs, targets, masking.special)
    assert_share(chosen, candidates, probability)
    assert_share(masked, chosen, 0.8)
    n = len(masking.ordinary)
    assert_share(changed, chosen, 0.1 * (1 - 1 / n))  # one in n random tokens is the one that was there
    assert inputs.dtype == targets.dtype == torch.int64


def test_the_shares_are_those_of_transformers_collator():
    """The same rows through DataCollatorForLanguageModeling: the four counts differ as two draws of one binomial do."""
    transformers = pytest.importorskip("transformers")
    masking, ids = plain(), rows(2000)
    ours = shares(ids, *mask_tokens(ids, sample_keys(2000), masking), masking.special)

    class Named(transformers.PreTrainedTokenizerFast):
        def __len__(self):
            return VOCAB

    tokenizer = Named(tokenizer_object=_library_tokenizer(), mask_token="[MASK]", pad_token="[PAD]")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=5)
    inputs, targets = collator.torch_mask_tokens(ids.clone(), special_tokens_mask=masking.special[ids])
    theirs = shares(ids, inputs, targets, masking.special)
    assert ours[1] == theirs[1]
    for a, b, trials in ((0, 0, 1), (2, 2, 0), (3, 3, 0)):
        share = theirs[b] / theirs[trials]
        assert abs(ours[a] - theirs[b]) < 5 * math.sqrt(2 * theirs[trials] * share * (1 - share)), (ours, theirs)


def _library_tokenizer():
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models

    names = {f"w{index}": index for index in range(VOCAB)} | {"[MASK]": MASK, "[PAD]": 0}
    return HFTokenizer(models.WordLevel({name: i for name, i in names.items() if name not in ("w0", f"w{MASK}")}))


def test_targets_are_what_was_there_and_all_else_stays():
    masking, ids = plain(0.5), rows(200)
    before = ids.clone()
    inputs, targets = mask_tokens(ids, sample_keys(200), masking)
    assert torch.equal(ids, before)
    chosen = targets != IGNORE_INDEX
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])


def test_special_tokens_are_never_chosen_nor_drawn():
    masking, ids = plain(0.9), rows(500)
    inputs, targets = mask_tokens(ids, sample_keys(500), masking)
    special = masking.special[ids]
    assert (
        special.sum() > 5000 and (targets[special] == IGNORE_INDEX).all() and torch.equal(inputs[special], ids[special])
    )
    drawn = inputs[(inputs != ids) & (inputs != MASK)]
    assert len(drawn) > 4000 and not masking.special[drawn].any()
    # every ordinary id is drawn about as often: chi-squared of n - 1 degrees, whose deviation is sqrt(2n)
    counts = torch.bincount(drawn, minlength=VOCAB)[masking.ordinary].double()
    n, expected = len(counts), len(drawn) / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < n + 5 * math.sqrt(2 * n)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [5, 5, 5, 5, 4], [7, 17]])
def test_masks_do_not_depend_on_how_rows_are_shared(cuts, whole_words):
    masking, ids, keys = plain(), rows(24), sample_keys(24, first=100)
    if whole_words:
        masking = Masking(**{**vars(masking), "continues": torch.arange(VOCAB) % 3 == 0})
    whole = mask_tokens(ids, keys, masking)
    at, parts = 0, []
    for size in cuts:
        parts.append(mask_tokens(ids[at : at + size], keys[at : at + size], masking))
        at += size
    for number in (0, 1):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(mask_tokens(ids, token_keys(keys, 128), masking), whole, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # no generator is drawn from
    # a wider row, filled with padding, has the same masks at its tokens
    padded = torch.cat([ids, torch.zeros(24, 64, dtype=torch.int64)], dim=1)
    assert all(torch.equal(a[:, :128], b) for a, b in zip(mask_tokens(padded, keys, masking), whole, strict=True))


def test_the_same_text_has_other_masks_in_the_next_epoch():
    masking, ids = plain(), rows(1).expand(3000, -1)
    chosen = mask_tokens(ids, sample_keys(3000), masking)[1] != IGNORE_INDEX
    candidates = ~masking.special[ids[0]]
    both = (chosen[0::2] & chosen[1::2])[:, candidates]
    assert_share(int(both.sum()), both.numel(), 0.15**2)  # two samples choose independently
    neighbours = chosen[:, :-1] & chosen[:, 1:] & candidates[:-1] & candidates[1:]
    assert_share(int(neighbours.sum()), 3000 * int((candidates[:-1] & candidates[1:]).sum()), 0.15**2)  # and two places
    assert_share(int(chosen.sum()), 3000 * int(candidates.sum()), 0.15)


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request) -> Tokenizer:
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    common = {"eos_token": "[SEP]", "max_length": 64}
    if request.param == "wordpiece":
        files = train_wordpiece(lambda: iter(texts), vocab_size=60, **common)
    else:
        files = train_bpe(lambda: texts, vocab_size=300, pretokenizer="gpt2", encoder_tokens=True, **common)
    return Tokenizer.of_files(files, Path("tokenizer.json"))


def test_the_pieces_of_a_word_are_chosen_together(tokenizer):
    """Words are cut at the spaces of the text here, one encoded by itself after another; documents stand between [SEP]."""
    masking = masking_of(tokenizer, 0.15, whole_words=True)
    words = []  # (document, its word) of each token, or None
    ids = []
    for document in range(12):
        text = [word.strip(",") for word in (WORDS * 3)[document : document + 9]]
        for number, word in enumerate(text):
            pieces = tokenizer.encode(word if number == 0 or tokenizer.kind == "wordpiece" else f" {word}")
            ids += pieces
            words += [(document, number)] * len(pieces)
        ids.append(tokenizer.eos_token_id)
        words.append(None)
    assert any(a == b for a, b in pairwise(words))
    count = 4000
    batch = torch.tensor([ids]).expand(count, -1)
    inputs, targets = mask_tokens(batch, sample_keys(count), masking)
    chosen = targets != IGNORE_INDEX
    number_of_words = 0
    for word in set(words) - {None}:
        places = [place for place, one in enumerate(words) if one == word]
        of_word = chosen[:, places]
        assert (of_word == of_word[:, :1]).all()
        number_of_words += 1
        assert_share(int(of_word[:, 0].sum()), count, 0.15)
    assert_share(
        sum(int(chosen[:, words.index(word)].sum()) for word in set(words) - {None}), count * number_of_words, 0.15
    )
    assert_share(int((inputs[chosen] == tokenizer.mask_token_id).sum()), int(chosen.sum()), 0.8)
    assert not chosen[:, [place for place, word in enumerate(words) if word is None]].any()
    # the pieces of a word are not all treated alike
    long = next(p for p, (a, b) in enumerate(pairwise(words)) if a == b)
    both = chosen[:, long]
    masked = inputs[both][:, [long, long + 1]] == tokenizer.mask_token_id
    assert_share(int(masked.all(dim=1).sum()), int(both.sum()), 0.64)


def test_without_whole_words_pieces_are_chosen_apart(tokenizer):
    masking = masking_of(tokenizer, 0.15, whole_words=False)
    assert masking.continues is None and masking.mask_id == 4
    assert masking.special.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert masking.ordinary.tolist() == list(range(5, tokenizer.vocab_size))


def test_a_micro_batch_counts_its_new_targets():
    batch = make_micro_batch([(np.arange(5, 38), np.array([], dtype=np.int64))] * 3)
    masked = mask_micro_batch(batch, sample_keys(3), plain(0.3))
    assert masked.weight == int((masked.targets != IGNORE_INDEX).sum()) > 0
    assert torch.equal(masked.positions, batch.positions) and masked.num_tokens == batch.num_tokens
    chosen = masked.targets != IGNORE_INDEX
    assert torch.equal(masked.targets[chosen], batch.input_ids[chosen])  # the token itself, not the next one


def test_what_cannot_be_masked_is_one_sentence(bare_tokenizer, tokenizer):
    with pytest.raises(UserError, match="no mask token; prepare the data with --tokenizer_type wordpiece"):
        masking_of(bare_tokenizer, 0.15, False)
    for share in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match="above 0 and below 1"):
            masking_of(tokenizer, share, False)
