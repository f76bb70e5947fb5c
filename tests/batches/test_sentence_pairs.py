"""Are true pairs contiguous, false ones of two documents, both alike in form, and the same whoever asks for them?"""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from batches.masking import mask_micro_batch, masking_of
from batches.micro_batch import IGNORE_INDEX
from batches.sentence_pairs import NOT_NEXT, TOKEN_TYPES, open_sentence_pairs
from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
from dataprep.shards import open_split
from dataprep.tokenizers import load_tokenizer
from errors import UserError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, MASK = 2, 3, 4


def prepared(folder, lengths, **options):
    """A dataset whose every token is another one: document d of n tokens has the ids after those of the documents before."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(lengths)
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *(f"w{n}" for n in range(total))])}
    built = HFTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(SPECIALS)
    (folder / "tokenizer").mkdir()
    built.save(str(folder / "tokenizer" / "tokenizer.json"))
    texts, at = [], 0
    for length in lengths:
        texts.append(" ".join(f"w{n}" for n in range(at, at + length)))
        at += length
    (folder / "text").mkdir()
    (folder / "text" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"max_length": 32, "stride": 0, "num_workers": 1, "val_fraction": 0.2, "shard_tokens": 2000}
    prepare(
        Options(
            folder / "text", folder / "data", tokenizer_type="existing", tokenizer_dir=folder / "tokenizer",
            **settings | options,
        ),
        Progress(),
    )  # fmt: skip
    return folder / "data"


LENGTHS = [*random.Random(0).choices(range(1, 120), k=150), 900, 1, 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("pairs"), LENGTHS)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Without a document that is longer than all others."""
    return prepared(tmp_path_factory.mktemp("even"), [*LENGTHS[:150], *LENGTHS[:150]], val_fraction=0)


def opened(data, split="train", max_length=32, seed=1, **more):
    return open_sentence_pairs(
        [open_split(data, split)], [], load_tokenizer(data), max_length=max_length, seed=seed, **more
    )


def documents_of(split):
    """{token: (document, place in it)}, read from the split; what stands around every document is left out."""
    places = {}
    for number in range(split.num_documents):
        document = split.document(number)
        begin, *text, end = split.read(document.start, document.stop - document.start).tolist()
        assert (begin, end) == (CLS, SEP)
        places |= {token: (number, place) for place, token in enumerate(text)}
    return places


def rows_of(batches):
    """(A, B, label) of each row, cut at the special tokens, after its form has been checked."""
    for batch in batches:
        for row, (ids, types, label) in enumerate(
            zip(
                batch.input_ids.tolist(),
                batch.token_columns[TOKEN_TYPES].tolist(),
                batch.columns[NOT_NEXT].tolist(),
                strict=True,
            )
        ):
            first, second = [place for place, token in enumerate(ids) if token == SEP]
            assert ids[0] == CLS and set(ids[second + 1 :]) <= {0} and ids.count(CLS) == 1
            assert types == [0] * (first + 1) + [1] * (second - first) + [0] * (len(ids) - second - 1)
            assert batch.positions[row, : second + 1].tolist() == list(range(second + 1))
            yield ids[1:first], ids[first + 1 : second], label


def in_order(places, tokens):
    """The (document, first place, last place) of tokens that lie one after another in one document."""
    found = [places[token] for token in tokens]
    assert found == [(found[0][0], found[0][1] + step) for step in range(len(found))]
    return found[0][0], found[0][1], found[-1][1]


@pytest.mark.parametrize("max_length", [5, 32, 200])
def test_true_pairs_are_contiguous_and_false_ones_are_of_two_documents(data, max_length):
    pairs = opened(data, max_length=max_length)
    places, labels = documents_of(pairs.sources[0]), Counter()
    for first, second, label in rows_of(pairs.micro_batches(0, 2000, 16)):
        assert len(first) >= 1 and len(second) >= 1 and len(first) + len(second) + 3 <= max_length
        a, b = in_order(places, first), in_order(places, second)
        if label == 0:
            assert a[0] == b[0] and b[1] == a[2] + 1
        else:
            assert a[0] != b[0]
        labels[label] += 1
    assert abs(labels[1] - 1000) < 5 * math.sqrt(500)


def test_nothing_is_of_the_other_split(data):
    seen = {}
    for name in ("train", "val"):
        pairs = opened(data, name)
        rows = list(rows_of(pairs.micro_batches(0, 3000, 64)))
        seen[name] = {token for first, second, _ in rows for token in (*first, *second)}
        assert seen[name] <= set(documents_of(pairs.sources[0]))
    assert seen["val"] and not seen["train"] & seen["val"]


def test_an_epoch_takes_something_of_every_part_of_the_text(data):
    """Almost every token is in some row after a few epochs, and a row begins in every window of each."""
    pairs = opened(data)
    windows = pairs.num_windows(0)
    assert windows == -(-pairs.sources[0].num_tokens // 29) and pairs.epoch(windows) == 1.0
    seen = {
        token for first, second, _ in rows_of(pairs.micro_batches(0, 8 * windows, 64)) for token in (*first, *second)
    }
    assert len(seen) > 0.98 * len(documents_of(pairs.sources[0]))


@pytest.mark.parametrize("world_size,micro", [(1, 12), (1, 5), (2, 3), (5, 1)])
def test_ranks_and_micro_batches_only_divide_the_step(data, world_size, micro):
    pairs = opened(data)
    whole = list(rows_of(pairs.micro_batches(24, 12, 12)))
    parts = [batch for rank in range(world_size) for batch in pairs.micro_batches(24, 12, micro, rank, world_size)]
    assert list(rows_of(parts)) == whole
    assert max(len(batch.input_ids) for batch in parts) <= micro
    # a run that begins in the middle has the samples of one that came there
    assert list(rows_of(opened(data).micro_batches(0, 40, 40)))[24:36] == whole
    assert list(rows_of(opened(data, seed=2).micro_batches(24, 12, 12))) != whole


@pytest.mark.parametrize("max_length", [32, 64, 200])
def test_the_form_of_a_row_does_not_tell_its_label(even, max_length):
    """A's and B's lengths, the row's, and where B begins and ends in its document, of both kinds: the same means."""
    pairs = opened(even, max_length=max_length)
    places = documents_of(pairs.sources[0])
    length_of = Counter(document for document, _ in places.values())
    features = {0: [], 1: []}
    for first, second, label in rows_of(pairs.micro_batches(0, 12000, 64)):
        document, begin, end = in_order(places, second)
        at_end = end == length_of[document] - 1
        features[label].append((len(first), len(second), len(first) + len(second), begin == 0, at_end))
    true, false = (np.array(features[label], dtype=np.float64) for label in (0, 1))
    assert not true[:, 3].any()
    assert false[:, 3].mean() < 0.005  # a document of one token has no other beginning
    for column in (0, 1, 2, 4):
        error = math.sqrt(true[:, column].var() / len(true) + false[:, column].var() / len(false))
        assert abs(true[:, column].mean() - false[:, column].mean()) < 5 * error + 0.02 * true[:, column].mean(), column


def test_long_documents_fill_every_row(tmp_path):
    data = prepared(tmp_path, [200] * 12, val_fraction=0)
    [batch] = opened(data, max_length=40).micro_batches(0, 64, 64)
    assert batch.input_ids.shape == (64, 40) and batch.cu_seqlens is None and batch.num_tokens == 64 * 40
    starts = Counter(len(first) for first, _, _ in rows_of([batch]))
    assert min(starts) < 8 and max(starts) > 28  # cut anywhere


def test_padding_after_a_pair_is_a_document_of_its_own(data):
    for batch in opened(data, max_length=200).micro_batches(0, 64, 8):
        width = batch.input_ids.shape[1]
        assert width % 64 == 0 or width == 200
        sizes = [len(first) + len(second) + 3 for first, second, _ in rows_of([batch])]
        starts = {place for row, size in enumerate(sizes) for place in (row * width, row * width + size)}
        assert set(batch.cu_seqlens.tolist()) == starts | {8 * width}
        assert batch.num_tokens == sum(sizes) and max(sizes) <= width < max(sizes) + 64
        assert batch.weight == 0 and (batch.targets == IGNORE_INDEX).all()
        assert batch.token_columns[TOKEN_TYPES].dtype == batch.columns[NOT_NEXT].dtype == torch.int64


def test_pairs_are_masked_as_other_rows(data):
    pairs = opened(data)
    [batch] = pairs.micro_batches(0, 64, 64)
    masked = mask_micro_batch(batch, torch.arange(64), masking_of(load_tokenizer(data), 0.15, whole_words=False))
    assert masked.weight > 0 and not set(masked.targets.unique().tolist()) & {0, 1, 2, 3, 4}
    assert torch.equal(masked.input_ids == SEP, batch.input_ids == SEP)
    assert torch.equal(masked.columns[NOT_NEXT], batch.columns[NOT_NEXT])


def test_sources_are_mixed_and_never_within_a_pair(tmp_path):
    few, many = prepared(tmp_path / "a", [50] * 8, val_fraction=0), prepared(tmp_path / "b", [50] * 40, val_fraction=0)
    splits = [open_split(folder, "train") for folder in (few, many)]
    pairs = open_sentence_pairs(splits, [3.0, 1.0], load_tokenizer(many), max_length=32, seed=0)
    drawn = list(pairs.pairs(0, 4096))
    assert Counter(pair.source for pair in drawn) == {0: 3072, 1: 1024}
    for pair in drawn:
        assert max(pair.first.document, pair.second.document) < splits[pair.source].num_documents
        assert (pair.first.document != pair.second.document) == bool(pair.label)


@pytest.mark.parametrize("lengths", [[1000, 2], [500, 1], [1, 1, 1, 1, 1, 1, 40, 1]])
def test_the_least_that_pairs_can_be_made_of(tmp_path, lengths):
    """Of documents of one token none is A; one long document finds the only other one, however short."""
    pairs = opened(prepared(tmp_path, lengths, val_fraction=0), max_length=32)
    places, labels = documents_of(pairs.sources[0]), Counter()
    long = max(range(len(lengths)), key=lengths.__getitem__)
    for first, second, label in rows_of(pairs.micro_batches(0, 200, 8)):
        a, b = in_order(places, first), in_order(places, second)
        assert (a[0] == b[0]) == (label == 0) and lengths[a[0]] >= 2
        labels[label, a[0] == long] += 1
    assert labels[0, True] > 50 and labels[1, True] > 50


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_the_same_rows_whoever_shares_them(data, world_size):
    pairs = opened(data, "val")
    whole = list(rows_of(pairs.evaluation_micro_batches(7, 0)))
    assert len(whole) == pairs.num_windows(0) > 5
    parts = [b for rank in range(world_size) for b in pairs.evaluation_micro_batches(4, 0, rank, world_size)]
    assert list(rows_of(parts)) == whole
    some = list(rows_of(pairs.evaluation_micro_batches(7, 100)))
    assert some == whole[:4]  # ceil(100 / 32) rows


def test_what_no_pairs_can_be_made_of_is_one_sentence(data, tmp_path, tiny_data, bare_tokenizer):
    with pytest.raises(UserError, match="no room for a pair; the least is 5"):
        opened(data, max_length=4)
    with pytest.raises(UserError, match=r"no \[CLS\] and \[SEP\]"):
        open_sentence_pairs([open_split(tiny_data, "train")], [], bare_tokenizer, max_length=32, seed=0)
    with pytest.raises(UserError, match="the train split has no two documents of which pairs can be made"):
        opened(prepared(tmp_path / "one", [50], val_fraction=0))
    with pytest.raises(UserError, match="no two documents of which pairs can be made"):
        opened(prepared(tmp_path / "ones", [1, 1, 1], val_fraction=0))
