"""Do the files of labelled texts that people have become the examples that they mean, of the right kind?"""

import gzip
import json

import pytest
import torch

from batches.packing import pack
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.labelled import Labels, batch_labels, encode_labelled, read_labelled
from finetune_data.task_layout import find_layout


@pytest.fixture
def read(tmp_path):
    """Reads rows as the .jsonl file rows.jsonl, or the text of a file of another name."""

    def call(*rows: object, name: str = "rows.jsonl", content: str | None = None, **settings):
        path = tmp_path / name
        data = ("\n".join(map(json.dumps, rows)) if content is None else content).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return read_labelled([path], **settings)

    return call


def rows_with(*labels: object, column: str = "label") -> list[dict]:
    return [{"text": f"text {number}", column: label} for number, label in enumerate(labels)]


def found(labelled) -> list:
    return [example.label for example in labelled.examples]


# ---- files and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "so good", "label": "yes"}\n{"text": "bad", "label": "no"}'),
        ("a.json", '[{"sentence": "so good", "label": "yes"}, {"sentence": "bad", "label": "no"}]'),
        ("a.csv", "text,label\nso good,yes\nbad,no\n"),
        ("a.tsv.gz", "label\tsentence\tid\nyes\tso good\t7\nno\tbad\t8\n"),
        ("a.tsv", "so good\tyes\nbad\tno\nso good\tyes\nbad\tno\n"),
        ("a.csv", "yes,so good\nno,bad\nyes,so good\nno,bad again\n"),
        ("a.txt", "yes so good\nno bad\n\nno bad\n"),
        ("a.txt", "__label__yes so good\n__label__no bad\n"),
    ],
)
def test_files_of_every_shape_say_the_same(read, name, content):
    labelled = read(name=name, content=content)
    assert labelled.labels == Labels("single", ("no", "yes"), 2)
    assert [(e.text, e.second, e.label) for e in labelled.examples[:2]] == [("so good", None, 1), ("bad", None, 0)]


def test_parquet_files_name_their_integers(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    table = pyarrow.Table.from_pylist(rows_with(1, 0, -1, 1))
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "a.parquet")
    labelled = read_labelled([tmp_path / "a.parquet"])
    assert labelled.labels.names == ("neg", "pos") and found(labelled) == [1, 0, 1]
    assert any("label -1" in line and "a.parquet:3" in line for line in labelled.report)


def test_each_parquet_file_names_its_own_integers(tmp_path):
    """Two data sets of the same classes, declared in another order."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, classes in (("a", ["neg", "pos"]), ("b", ["pos", "neg"])):
        features = {"label": {"names": classes, "_type": "ClassLabel"}, "text": {"dtype": "string"}}
        table = pyarrow.Table.from_pylist(rows_with(0, 1))
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    first = read_labelled([tmp_path / "a.parquet"])
    assert found(first) == [0, 1]
    assert found(read_labelled([tmp_path / "b.parquet"], wanted=first.labels)) == [1, 0]
    assert found(read_labelled([tmp_path / "a.parquet", tmp_path / "b.parquet"])) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "names", [("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")]
)
def test_pairs_under_their_usual_names(read, names):
    rows = [{names[0]: "a", names[1]: "b", "label": label, "idx": 3} for label in (0, 1)]
    assert [(e.text, e.second) for e in read(*rows).examples] == [("a", "b")] * 2


def test_columns_of_other_names_are_renamed_and_otherwise_named_in_one_sentence(read):
    rows = [{"body": "a", "stars": label} for label in (1, 5)]
    renamed = read(*rows, rename={"body": "text", "stars": "label"})
    assert renamed.labels.names == ("1", "5") and renamed.examples[0].text == "a"
    with pytest.raises(UserError, match=r"columns body, stars; --rename_columns"):
        read(*rows)
    with pytest.raises(UserError, match="no column star to rename"):
        read(*rows, rename={"star": "label"})
    with pytest.raises(UserError, match="columns body, stars"):  # a header is not taken for an example
        read(name="a.tsv", content="body\tstars\na\t1\nb\t5\n")
    with pytest.raises(UserError, match="does not begin each line with a label"):
        read(name="a.txt", content="It was late.\nNobody spoke.\nThe rain fell on.\n")


def test_wrong_rows_are_left_out_counted_and_named(read):
    rows = [*rows_with(0, 1, None, float("nan")), {"text": " ", "label": 1}, {"text": 3, "label": 1}]
    rows.append({"text": "\ud800", "label": 1})
    labelled = read(*rows)
    assert found(labelled) == [0, 1]
    (line,) = [line for line in labelled.report if "are wrong" in line]
    assert "5 of 7 rows" in line
    for place in (
        "no label (rows.jsonl:3, rows.jsonl:4)",
        "empty text (rows.jsonl:5)",
        "text is a number",
        "surrogates",
        ":7",
    ):
        assert place in line


def test_a_damaged_archive_is_one_sentence(tmp_path):
    whole = gzip.compress(b"yes so good\nno bad\n" * 100)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.txt\.gz is broken gzip"):
        read_labelled([tmp_path / "a.txt.gz"])


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "kind", "names", "expected"),
    [
        (["b", "a", "b"], "single", ("a", "b"), [1, 0, 1]),
        ([10, 9, 2], "single", ("2", "9", "10"), [2, 1, 0]),
        (["10", "9", "2"], "single", ("2", "9", "10"), [2, 1, 0]),
        ([True, False], "single", ("false", "true"), [1, 0]),
        ([-1, 1, 0], "single", ("-1", "0", "1"), [0, 2, 1]),
        ([0.5, 3, 1.0], "regression", (), [(0.5,), (3.0,), (1.0,)]),
        (["0.5", "3"], "regression", (), [(0.5,), (3.0,)]),
        ([[0.5, 1.5], [2.0, 3.0]], "regression", (), [(0.5, 1.5), (2.0, 3.0)]),
        ([["b", "a"], [], ["b"]], "multi", ("a", "b"), [(0, 1), (), (1,)]),
        ([[27], [2, 14]], "multi", ("2", "14", "27"), [(2,), (0, 1)]),
        ([[0, 1, 1], [0, 0, 0]], "multi", ("0", "1", "2"), [(1, 2), ()]),
        ([[0, 1], [1, 0], [0]], "multi", ("0", "1"), [(0, 1), (0, 1), (0,)]),
        ([[0, 1], [1, 0]], "multi", ("0", "1"), [(0, 1), (0, 1)]),  # ids, of which none is there twice
        ([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], "multi", ("0", "1", "2"), [(1,), (0,)]),
    ],
)
def test_the_kind_and_the_ids_follow_from_the_labels(read, labels, kind, names, expected):
    labelled = read(*rows_with(*labels))
    assert (labelled.labels.kind, labelled.labels.names, found(labelled)) == (kind, names, expected)
    assert labelled.labels.num_outputs == (len(names) or len(expected[0]))


def test_several_labels_in_a_table(read):
    labelled = read(name="a.csv", content='text,labels\nx,red|blue\ny,red\nz,"[""blue""]"\n')
    assert labelled.labels.names == ("blue", "red") and found(labelled) == [(0, 1), (1,), (0,)]
    one = read(name="a.csv", content="text,label\nx,red|blue\ny,red\n")  # only the column `labels` says several
    assert one.labels == Labels("single", ("red", "red|blue"), 2)
    fasttext = read(name="a.txt", content="__label__red __label__blue so good\n__label__red x\n")
    assert found(fasttext) == [(0, 1), (1,)] and fasttext.examples[0].text == "so good"
    behind = read(name="a.txt", content="so good __label__red __label__blue\nx __label__red\n")
    assert found(behind) == [(0, 1), (1,)] and [example.text for example in behind.examples] == ["so good", "x"]


def test_files_of_several_labels_and_of_one_are_read_together(tmp_path):
    (tmp_path / "p.csv").write_text("text,labels\nx,a|b\ny,a\n")
    (tmp_path / "q.csv").write_text("text,label\nz,b\n")
    for names in (("p.csv", "q.csv"), ("q.csv", "p.csv")):
        both = read_labelled([tmp_path / name for name in names])
        assert (both.labels.kind, both.labels.names) == ("multi", ("a", "b"))
        assert {example.text: example.label for example in both.examples} == {"x": (0, 1), "y": (0,), "z": (1,)}


def test_held_out_lists_of_0_and_1_are_read_as_those_that_were_learned_from(read):
    """[1, 0] and [0, 1] alone could be ids."""
    learned = read(*rows_with([1, 0], [1, 1], [0, 0]))
    assert found(read(*rows_with([1, 0], [0, 1]), wanted=learned.labels)) == [(0,), (1,)]
    by_ids = read(*rows_with([1, 0], [0], [1]))
    assert found(read(*rows_with([1, 0], [0, 1]), wanted=by_ids.labels)) == [(0, 1), (0, 1)]


def test_what_is_wanted_wins_over_what_is_found(read):
    assert read(*rows_with(1, 2), wanted=Labels("regression")).labels == Labels("regression", (), 1)
    assert read(*rows_with(1.0, 2.0), wanted=Labels("single")).labels.names == ("1", "2")
    given = Labels(names=("positive", "negative"))
    assert found(read(*rows_with("negative", "positive"), wanted=given)) == [1, 0]
    assert found(read(*rows_with(0, 1), wanted=given)) == [0, 1], "ids of a model whose labels have names"
    assert read(*rows_with("a", "b"), wanted=Labels("multi")).labels.kind == "multi"


def test_labels_that_do_not_fit_end_in_one_sentence_with_their_row(read):
    with pytest.raises(UserError, match=r"rows\.jsonl:2 has the label 'c', which is none of a, b"):
        read(*rows_with("a", "c"), wanted=Labels("single", ("a", "b"), 2))
    with pytest.raises(UserError, match=r"rows\.jsonl:2 has the label '2', which is none of a, b"):
        read(*rows_with(1, 2), wanted=Labels("single", ("a", "b"), 2))
    with pytest.raises(UserError, match=r"rows\.jsonl:2 has the label 'x', which is no number"):
        read(*rows_with("1", "x"), wanted=Labels("regression"))
    with pytest.raises(UserError, match=r"rows\.jsonl:2 has 1 figures as its label, but others 2"):
        read(*rows_with([0.5, 1.5], [0.5]))
    with pytest.raises(UserError, match=r"every row .* has the label 'a'"):
        read(*rows_with("a", "a"))
    with pytest.raises(UserError, match="says 0 or 1 of 3 labels, but 2 are named"):
        read(*rows_with([0, 1, 1]), wanted=Labels("multi", ("a", "b"), 2))
    with pytest.raises(UserError, match="'many' are not known; choose single"):
        read(*rows_with(0, 1), wanted=Labels("many"))


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], torch.tensor([1, 0, 1])),
        ([["b", "a"], [], ["b"]], torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])),
        ([0.25, 3.5, -1.0], torch.tensor([[0.25], [3.5], [-1.0]])),
    ],
)
def test_the_labels_of_a_micro_batch(read, bert, labels, expected):
    tokenizer = load_tokenizer(bert)
    labelled = read(*rows_with(*labels))
    encoded = encode_labelled(
        tokenizer, find_layout(tokenizer, causal=False), labelled.examples, labelled.labels, max_length=32
    )
    (batch,) = pack([[one] for one in encoded.sequences], max_length=32, micro_batch_size=4)
    given = batch_labels(batch, labelled.labels)
    assert given.dtype == expected.dtype and torch.equal(given, expected)
    assert (batch.targets == -100).all() and batch.weight == 0  # nothing is learned as language


def test_real_files(shared_data):
    pairs = read_labelled([shared_data / "classify" / "msr_para_train.tsv"])
    lines = (shared_data / "classify" / "msr_para_train.tsv").read_text(encoding="utf-8-sig").splitlines()[1:]
    assert [(str(e.label), e.text, e.second) for e in pairs.examples] == [
        (fields[0], fields[3], fields[4]) for fields in (line.split("\t") for line in lines)
    ]
    films = read_labelled([shared_data / "classify" / "sst2_dev.txt"])
    assert len(films.examples) == 872 and films.labels.names == ("0", "1")
