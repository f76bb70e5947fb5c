"""Do tagged words become the pieces and labels that transformers' recipe gives, and do predictions come back to words?"""

import json

import numpy as np
import pytest

from batches.micro_batch import IGNORE_INDEX
from batches.packing import pack
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.tagged import TaggedWords, batch_tags, encode_tagged, read_tagged, word_tags
from finetune_data.task_layout import find_layout

CONLL = """-DOCSTART- -X- -X- O

U.N. NNP I-NP I-ORG
official NN I-NP O
Ekeus NNP I-NP I-PER
. . O O

Baghdad NNP I-NP I-LOC
"""
SENTENCES = [["U.N.", "official", "Ekeus", "."], ["Baghdad"]]
TAGS = [["I-ORG", "O", "I-PER", "O"], ["I-LOC"]]


@pytest.fixture
def write(tmp_path):
    def call(name: str, content: str | list[dict]):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)), encoding="utf-8")
        return path

    return call


def as_rows(**columns: list) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.conll", CONLL),
        ("a.txt", CONLL.replace("\n", "\r\n")),
        ("a.tsv", CONLL.replace(" ", "\t")),
        ("a.jsonl", as_rows(tokens=SENTENCES, tags=TAGS)),
        ("a.jsonl", as_rows(words=SENTENCES, ner_tags=TAGS)),
    ],
)
def test_files_of_every_shape_say_the_same(write, name, content):
    tagged = read_tagged([write(name, content)])
    assert tagged.names == ("I-LOC", "I-ORG", "I-PER", "O")
    assert [list(one.words) for one in tagged.examples] == SENTENCES
    assert [[tagged.names[tag] for tag in one.tags] for one in tagged.examples] == TAGS


def test_integers_keep_their_order_and_parquet_names_them(write, tmp_path):
    rows = as_rows(tokens=SENTENCES, ner_tags=[[10, 0, 2, 0], [9]])
    plain = read_tagged([write("a.jsonl", rows)])
    assert plain.names == ("0", "2", "9", "10") and plain.examples[0].tags == (3, 0, 1, 0)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["O", *(f"{letter}-{kind}" for kind in "ABCDE" for letter in "BI")]
    features = {"ner_tags": {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    named = read_tagged([tmp_path / "a.parquet"])
    assert named.names == tuple(names) and named.examples[0].tags == (10, 0, 2, 0)


def test_what_is_wrong_ends_in_one_sentence_with_its_place(write):
    with pytest.raises(UserError, match=r"a\.jsonl:2 has 1 tokens but 2 tags"):
        read_tagged([write("a.jsonl", as_rows(tokens=SENTENCES, tags=[TAGS[0], ["O", "O"]]))])
    with pytest.raises(UserError, match=r"a\.conll:2 has a word without a tag"):
        read_tagged([write("a.conll", "U.N. O\nofficial\n")])
    with pytest.raises(UserError, match=r"a\.conll:7 has the label 'I-LOC', which is none of I-ORG, I-PER, O"):
        read_tagged(
            [write("a.conll", CONLL[CONLL.index("U.N.") :].replace("\n\n", "\n\n\n"))], names=["I-ORG", "I-PER", "O"]
        )
    with pytest.raises(UserError, match="columns pieces, tags; --rename_columns"):
        read_tagged([write("a.jsonl", as_rows(pieces=SENTENCES, tags=TAGS))])
    report = read_tagged([write("a.jsonl", [*as_rows(tokens=SENTENCES, tags=TAGS), {"tokens": [], "tags": []}])]).report
    assert any("1 of 3 rows are wrong" in line and "a.jsonl:3" in line for line in report)


def random_sentences(texts: list[str]) -> list[TaggedWords]:
    draw = np.random.default_rng(0)
    return [TaggedWords(tuple(t.split()), tuple(draw.integers(0, 5, len(t.split())).tolist()), "") for t in texts]


@pytest.mark.parametrize("max_length", [12, 300])
def test_labels_are_those_of_transformers_recipe(bert, random_texts, max_length):
    """Its tokenizer splits each word by itself and says of which word a piece is; the first piece has the label."""
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(bert), load_tokenizer(bert)
    examples = random_sentences(random_texts(30, 5))
    encoded = encode_tagged(tokenizer, find_layout(tokenizer, causal=False), examples, max_length=max_length)
    expected = theirs(
        [list(one.words) for one in examples], is_split_into_words=True, truncation=True, max_length=max_length,
        padding=False,
    )  # fmt: skip
    assert [one.tokens.tolist() for one in encoded.sequences] == expected["input_ids"]
    batches = pack([[one] for one in encoded.sequences], max_length=max_length, micro_batch_size=4)
    tags = [batch_tags(b)[b.sequence_ids == n].tolist() for b in batches for n in range(b.num_sequences)]
    shown = 0
    for row, (example, found) in enumerate(zip(examples, tags, strict=True)):
        words = expected.word_ids(row)
        first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        labels = [example.tags[w] if new else IGNORE_INDEX for w, new in zip(words, first, strict=True)]
        assert found == labels
        shown += sum(first)
    assert encoded.words_without_place == sum(len(one.words) for one in examples) - shown
    whole = theirs([list(one.words) for one in examples], is_split_into_words=True, truncation=False, padding=False)
    assert sum(encoded.truncated) == sum(len(ids) > max_length for ids in whole["input_ids"])


@pytest.mark.parametrize("family", ["bert", "roberta", "decoder"])
def test_every_word_gets_its_own_tag_back(family, request, random_texts):
    tokenizer = load_tokenizer(request.getfixturevalue(family))
    odd = [TaggedWords(("New York", "Müller", "né", "京都", "x"), (1, 2, 3, 4, 0), "")]
    examples = [*odd, *random_sentences(random_texts(20, 6))]
    layout = find_layout(tokenizer, causal=family == "decoder")
    encoded = encode_tagged(tokenizer, layout, examples, max_length=300)
    assert encoded.words_without_place == 0 and not any(encoded.truncated)
    batches = pack([[one] for one in encoded.sequences], max_length=300, micro_batch_size=2)
    tags = [batch_tags(b)[b.sequence_ids == n].numpy() for b in batches for n in range(b.num_sequences)]
    for example, found, places in zip(examples, tags, encoded.places, strict=True):
        assert (found != IGNORE_INDEX).sum() == len(example.words)
        assert tuple(word_tags(found, places, missing=-7)) == example.tags


def test_the_first_piece_begins_the_word_in_its_text(roberta):
    tokenizer = load_tokenizer(roberta)
    example = TaggedWords(("the", "engineers", "zzz"), (0, 1, 2), "")
    encoded = encode_tagged(tokenizer, find_layout(tokenizer, causal=False), [example], max_length=50)
    (sequence,), (places,) = encoded.sequences, encoded.places
    ends = [*places[1:], len(sequence.tokens) - 1]
    shown = [tokenizer.decode(sequence.tokens[a:b].tolist()) for a, b in zip(places, ends, strict=True)]
    assert shown == ["the", " engineers", " zzz"]


def test_words_of_which_nothing_is_left_count_as_missing(bert):
    tokenizer = load_tokenizer(bert)
    examples = [TaggedWords(("the", "\u200b", "", "beast"), (1, 2, 3, 4), "")]
    encoded = encode_tagged(tokenizer, find_layout(tokenizer, causal=False), examples, max_length=50)
    assert encoded.words_without_place == 2
    predicted = np.full(len(encoded.sequences[0].tokens), 6)
    assert word_tags(predicted, encoded.places[0], missing=0).tolist() == [6, 0, 0, 6]
