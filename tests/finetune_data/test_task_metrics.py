"""Are the figures those of scikit-learn, SciPy, seqeval and SQuAD's scripts, and the same however ranks share the examples?"""

import math
import warnings

import numpy as np
import pytest

from finetune_data.task_metrics import (
    answer_figures,
    answer_scores,
    answer_sums,
    balanced_class_weights,
    class_f1,
    class_figures,
    confusion_counts,
    entities,
    entity_counts,
    entity_figures,
    entity_types,
    marks_entities,
    multi_label_counts,
    multi_label_figures,
    pearson,
    regression_figures,
    spearman,
)

DRAW = np.random.default_rng(0)
NAMES = ["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC")), "B", "I"]


def near(value: float):
    return pytest.approx(value, abs=1e-12, nan_ok=True)


def two_shares(count, *arrays):
    """The sum of a count over two parts of the arrays, as two ranks have it."""
    return count(*(array[:7] for array in arrays)) + count(*(array[7:] for array in arrays))


# ---- classes and labels ----------------------------------------------------------------------------------------------


def test_class_figures_by_hand():
    labels, predictions = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 0])
    counts = confusion_counts(predictions, labels, 5)
    assert counts[0].tolist() == [2, 1, 0, 0, 0] and counts[3].tolist() == [1, 0, 0, 0, 0]
    figures = class_figures(counts)
    # F1: class 0: 2·2/(4+3), class 1: 2·1/(2+2), class 3: 0; the classes 2 and 4 do not occur
    assert figures["accuracy"] == near(3 / 6) and figures["macro_f1"] == near((4 / 7 + 1 / 2 + 0) / 3)
    assert class_f1(counts).tolist() == near([4 / 7, 1 / 2, 0, 0, 0])
    # Matthews for two classes: (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN))
    two = np.array([[50, 10], [5, 35]])
    assert class_figures(two)["mcc"] == near((35 * 50 - 10 * 5) / math.sqrt(45 * 40 * 60 * 55))
    big = two.astype(np.int64) * 10**8  # whose products are beyond 64 bits
    assert class_figures(big)["mcc"] == near(class_figures(two)["mcc"])
    assert class_figures(np.array([[3, 0], [2, 0]]))["mcc"] == 0.0
    assert class_figures(np.zeros((2, 2), dtype=int)) == {"accuracy": 0.0, "macro_f1": 0.0, "mcc": 0.0}


def test_class_and_label_figures_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    for _ in range(40):
        classes, count = int(DRAW.integers(2, 7)), int(DRAW.integers(8, 60))
        labels, predictions = DRAW.integers(0, classes, count), DRAW.integers(0, classes, count)
        figures = class_figures(two_shares(lambda p, l, k=classes: confusion_counts(p, l, k), predictions, labels))
        flags, given = DRAW.random((count, classes)) < 0.3, DRAW.random((count, classes)) < 0.4
        several = multi_label_figures(two_shares(multi_label_counts, given, flags))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without an example
            assert figures["accuracy"] == near(metrics.accuracy_score(labels, predictions))
            assert figures["macro_f1"] == near(metrics.f1_score(labels, predictions, average="macro"))
            assert figures["mcc"] == near(metrics.matthews_corrcoef(labels, predictions))
            for average in ("micro", "macro"):
                assert several[f"{average}_f1"] == near(metrics.f1_score(flags, given, average=average))
            assert several["exact_match"] == near(metrics.accuracy_score(flags, given))


def test_several_labels_by_hand():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    predictions = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 0]])
    figures = multi_label_figures(multi_label_counts(predictions, labels))
    assert figures == {"micro_f1": near(2 * 2 / (3 + 3)), "macro_f1": near((1 + 0 + 0) / 3), "exact_match": near(2 / 3)}


def test_balanced_weights():
    assert balanced_class_weights([0, 0, 0, 2], 4).tolist() == [4 / (2 * 3), 1.0, 4 / (2 * 1), 1.0]
    weights = pytest.importorskip("sklearn.utils.class_weight")
    labels = DRAW.integers(0, 4, 50)
    expected = weights.compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert balanced_class_weights(labels, 4).tolist() == near(expected.tolist())


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_regression_figures_by_hand():
    labels, predictions = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 6.0, 100.0])
    figures = regression_figures(predictions, labels)
    assert figures["mse"] == near((1 + 4 + 9 + 96**2) / 4) and figures["mae"] == near((1 + 2 + 3 + 96) / 4)
    assert figures["spearman"] == near(1.0) and 0.7 < figures["pearson"] < 0.9
    assert pearson(labels, 10 - 3 * labels) == near(-1.0)
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == near(
        4.5 / math.sqrt(4.5 * 5)
    )  # ranks 1 2.5 2.5 4
    assert math.isnan(pearson(labels, np.ones(4)))
    offset = 1e9 + np.array([0.0, 1.0, 2.0, 3.0])  # of which sums of squares would lose the digits
    assert pearson(offset, np.array([0.0, 1.0, 2.0, 4.0])) == pytest.approx(6.5 / math.sqrt(5 * 8.75), abs=1e-9)


def test_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for _ in range(40):
        labels = DRAW.integers(0, 9, (20, 2)).astype(float)
        predictions = labels + np.round(DRAW.normal(size=(20, 2)), 1)
        figures = regression_figures(predictions, labels)
        for name, theirs in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            assert figures[name] == near(np.mean([theirs(predictions[:, k], labels[:, k])[0] for k in range(2)]))


# ---- entities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),  # BIO
        ("I-PER I-PER O I-LOC B-LOC", [("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4)]),  # IOB1
        ("B-PER I-PER E-PER S-LOC S-LOC", [("PER", 0, 2), ("LOC", 3, 3), ("LOC", 4, 4)]),  # IOBES
        ("B-PER I-PER L-PER U-LOC U-LOC", [("PER", 0, 2), ("LOC", 3, 3), ("LOC", 4, 4)]),  # BILOU
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),  # another type begins anew
        ("E-PER I-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("B-a-b I-a-b O B I", [("a-b", 0, 1), ("_", 3, 4)]),
        ("O O", []),
    ],
)
def test_entities_by_hand(tags, expected):
    assert entities(tags.split()) == expected


def test_entity_figures_by_hand():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    predictions = [["B-PER", "O", "O", "B-LOC"], ["B-PER", "O"]]
    types = entity_types(["O", "B-PER", "I-PER", "B-LOC"])
    counts = entity_counts(predictions, labels, types)
    assert types == ("LOC", "PER") and counts.tolist() == [[1, 1, 2], [0, 2, 1], [4, 6, 6]]
    assert entity_figures(counts, types) == {
        "precision": near(1 / 3), "recall": near(1 / 3), "f1": near(1 / 3), "accuracy": near(4 / 6),
        "f1/LOC": near(2 / 3), "f1/PER": 0.0,
    }  # fmt: skip
    halves = [entity_counts(predictions[i : i + 1], labels[i : i + 1], types) for i in range(2)]
    assert (sum(halves) == counts).all()


def test_entities_are_seqevals():
    metrics = pytest.importorskip("seqeval.metrics")
    read = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    types = entity_types(NAMES)
    for _ in range(100):
        labels = [[NAMES[i] for i in DRAW.integers(0, len(NAMES), DRAW.integers(1, 15))] for _ in range(8)]
        given = [[t if DRAW.random() < 0.7 else NAMES[DRAW.integers(len(NAMES))] for t in tags] for tags in labels]
        for tags in labels:
            assert set(entities(tags)) == set(read(tags))
        figures = entity_figures(entity_counts(given, labels, types), types)
        for name in ("precision", "recall", "f1", "accuracy"):
            assert figures[name] == near(getattr(metrics, f"{name}_score")(labels, given))


def test_tags_of_word_classes_mark_no_entities():
    assert marks_entities(NAMES) and marks_entities(["O", "B-PER"])
    assert not marks_entities(["NN", "VB", "O"]) and not marks_entities(["0", "1"]) and not marks_entities(["O"])


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The  Geneva.", ["geneva"], 1, 1),
        ("in Geneva", ["Geneva", "on Tuesday"], 0, 2 / 3),
        ("Geneva Geneva", ["Geneva Bern"], 0, 1 / 2),
        ("a theory", ["the theory"], 1, 1),
        ("anthem", ["them"], 0, 0),  # articles are whole words
        ("U.S.", ["US"], 1, 1),
        ("well-known", ["well known"], 0, 0),  # punctuation goes without leaving a space
        ("“Geneva”", ["Geneva"], 0, 0),  # only ASCII's goes
        ("", [], 1, 1),
        ("The", [], 1, 1),
        ("Geneva", [], 0, 0),
        ("", ["Geneva"], 0, 0),
        ("", ["the"], 1, 1),  # a right answer of which nothing is left is none
        ("the", ["a", "Geneva"], 0, 0),
    ],
)
def test_answers_are_scored_as_by_squads_script(prediction, answers, exact, f1):
    assert answer_scores(prediction, answers) == (exact, near(f1))


def test_version_1_keeps_right_answers_of_which_nothing_is_left():
    assert answer_scores("the", ["a", "Geneva"], version=1) == (1, 0)
    assert answer_scores("in Geneva", ["Geneva"], version=1) == answer_scores("in Geneva", ["Geneva"])


def test_answer_figures_are_means_over_all_and_over_both_kinds():
    predictions = ["Geneva", "in Geneva", "", "x"]
    sums = answer_sums(predictions[:1], [["Geneva"]]) + answer_sums(predictions[1:], [["Geneva"], [], []])
    assert answer_figures(sums) == {
        "exact_match": near(2 / 4), "f1": near((1 + 2 / 3 + 1) / 4),
        "exact_match/has_answer": near(1 / 2), "f1/has_answer": near((1 + 2 / 3) / 2),
        "exact_match/no_answer": near(1 / 2), "f1/no_answer": near(1 / 2),
    }  # fmt: skip
    assert answer_figures(answer_sums(["Geneva"], [["Geneva"]])) == {"exact_match": 1.0, "f1": 1.0}
