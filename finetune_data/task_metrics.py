"""How good are predictions of classes, of several labels, of figures, of entities and of answers?

Where the figures follow from sums (classes, labels, entities, answers), a function gives these as an array that ranks may
add up, and another the figures of the sum: so they are exact, and not means of ranks' means. Correlations of ranks need all
predictions and take whole arrays. Every figure is a fraction, 1.0 for all right.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

Figures = dict[str, float]

# ---- one of several classes ------------------------------------------------------------------------------------------


def confusion_counts(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes, num_classes) int64: how often a label (row) was predicted as a class (column), from (n,) ids of both."""
    pairs = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predictions, dtype=np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_figures(counts: np.ndarray) -> Figures:
    """accuracy, macro_f1, and mcc, Matthews' correlation for any number of classes (Gorodkin 2004), of confusion counts.

    The mean of macro_f1 is over the classes that occur among labels or predictions, as scikit-learn's; mcc is 0.0 where all
    labels or all predictions are of one class.
    """
    total, right = int(counts.sum()), int(np.trace(counts))
    of_labels, of_predictions = counts.sum(axis=1), counts.sum(axis=0)
    occurs = of_labels + of_predictions > 0
    f1 = class_f1(counts)[occurs]
    # in Python's integers: the products of counts may exceed 64 bits
    labelled, predicted = ([int(n) for n in margin] for margin in (of_labels, of_predictions))
    shared = right * total - sum(a * b for a, b in zip(labelled, predicted, strict=True))
    spread = (total**2 - sum(n * n for n in labelled)) * (total**2 - sum(n * n for n in predicted))
    return {
        "accuracy": right / total if total else 0.0,
        "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        "mcc": shared / spread**0.5 if spread else 0.0,
    }


def class_f1(counts: np.ndarray) -> np.ndarray:
    """(num_classes,) float64: the F1 of each class, of confusion counts; 0.0 for one that does not occur."""
    return f1_of(np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))


def f1_of(right: np.ndarray, predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """2 · right / (predicted + labelled), the harmonic mean of precision and recall; 0.0 where there are none."""
    return _ratio(2 * right, np.asarray(predicted) + labelled)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)


def balanced_class_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes,) float64: n / (k · count), k classes having examples (King & Zeng 2001); 1.0 for one that has none."""
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)
    occurring = max(int((counts > 0).sum()), 1)
    return np.where(counts > 0, counts.sum() / (occurring * np.maximum(counts, 1)), 1.0)


# ---- any of several labels -------------------------------------------------------------------------------------------


def multi_label_counts(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K + 1, 3) int64 from (n, K) booleans: for each label how often it is rightly predicted, predicted, and there.

    The last row counts the examples: those with every label right, all, and all once more.
    """
    predictions, labels = np.asarray(predictions, dtype=bool), np.asarray(labels, dtype=bool)
    of_labels = np.stack([(predictions & labels).sum(axis=0), predictions.sum(axis=0), labels.sum(axis=0)], axis=1)
    exact = int((predictions == labels).all(axis=1).sum())
    return np.concatenate([of_labels, [[exact, len(labels), len(labels)]]]).astype(np.int64)


def multi_label_figures(counts: np.ndarray) -> Figures:
    """micro_f1, macro_f1 over all labels, and exact_match, the share of examples with every label right."""
    right, predicted, labelled = counts[:-1].T
    return {
        "micro_f1": float(f1_of(right.sum(), predicted.sum(), labelled.sum())),
        "macro_f1": float(f1_of(right, predicted, labelled).mean()),
        "exact_match": float(_ratio(counts[-1, 0], counts[-1, 1])),
    }


# ---- figures ---------------------------------------------------------------------------------------------------------


def regression_figures(predictions: np.ndarray, labels: np.ndarray) -> Figures:
    """mse, mae, pearson and spearman of (n,) or (n, K) figures, correlations as means over the K; in float64.

    A correlation is nan where all labels or all predictions are the same, for then there is none.
    """
    predictions, labels = (np.asarray(v, dtype=np.float64).reshape(len(v), -1) for v in (predictions, labels))
    columns = list(zip(predictions.T, labels.T, strict=True))
    return {
        "mse": float(np.square(predictions - labels).mean()),
        "mae": float(np.abs(predictions - labels).mean()),
        "pearson": float(np.mean([pearson(a, b) for a, b in columns])),
        "spearman": float(np.mean([spearman(a, b) for a, b in columns])),
    }


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """The linear correlation of two (n,) arrays; nan where one does not vary."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (a, b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks of two (n,) arrays, equal values sharing their mean rank; nan where one does not vary."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


# ---- entities --------------------------------------------------------------------------------------------------------

_CHUNK_TAG = re.compile(r"[BIESLUM](-.+)?")
_SAME_AS = {"L": "E", "U": "S", "M": "I"}  # BILOU's and BMES's letters


def marks_entities(names: Sequence[str]) -> bool:
    """Whether tags mark entities (O, B-PER, I-PER, …), so that these can be counted; tags of word classes do not."""
    marks = [name for name in names if name != "O"]
    return bool(marks) and all(_CHUNK_TAG.fullmatch(name) for name in marks)


def entity_types(names: Sequence[str]) -> tuple[str, ...]:
    """The types of entities that tags name, sorted: the rows of `entity_counts`. "_" where a tag is a letter alone."""
    return tuple(sorted({_parts(name)[1] for name in names if name != "O"}))


def _parts(tag: str) -> tuple[str, str]:
    letter, _, kind = tag.partition("-")
    return _SAME_AS.get(letter, letter), kind or "_"


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of the entities of one sentence, as conlleval and seqeval's default mode read tags.

    That takes BIO, IOB1 and IOBES alike: an I or E goes on with an entity of its own type that a B or I left open before
    it, and begins one otherwise.
    """
    found: list[tuple[str, int, int]] = []
    before = "O"
    for place, tag in enumerate(tags):
        letter, kind = ("O", "") if tag == "O" else _parts(tag)
        if letter in "IE" and before in "BI" and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], place)
        elif letter != "O":
            found.append((kind, place, place))
        before = letter
    return found


def entity_counts(
    predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]], types: Sequence[str]
) -> np.ndarray:
    """(types + 1, 3) int64 from the tags of sentences: for each type how many entities are right, predicted, and there.

    One is right where its type, its first and its last word are. The last row is of the words: rightly tagged, all, all.
    """
    rows = {name: row for row, name in enumerate(types)}
    counts = np.zeros((len(rows) + 1, 3), dtype=np.int64)
    for predicted, labelled in zip(predictions, labels, strict=True):
        ours, theirs = set(entities(predicted)), set(entities(labelled))
        for column, found in enumerate((ours & theirs, ours, theirs)):
            for kind, _, _ in found:
                counts[rows[kind], column] += 1
        right = sum(a == b for a, b in zip(predicted, labelled, strict=True))
        counts[-1] += (right, len(labelled), len(labelled))
    return counts


def entity_figures(counts: np.ndarray, types: Sequence[str]) -> Figures:
    """precision, recall and f1 over all entities, f1/TYPE of each type, and accuracy, the share of words with the right tag."""
    right, predicted, labelled = counts[:-1].T
    of_types = f1_of(right, predicted, labelled)
    return {
        "precision": float(_ratio(right.sum(), predicted.sum())),
        "recall": float(_ratio(right.sum(), labelled.sum())),
        "f1": float(f1_of(right.sum(), predicted.sum(), labelled.sum())),
        "accuracy": float(_ratio(counts[-1, 0], counts[-1, 1])),
        **{f"f1/{name}": float(f1) for name, f1 in zip(types, of_types, strict=True)},
    }


# ---- answers ---------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII alone, as in SQuAD's script


def normalised_answer(text: str) -> str:
    """Lower case, without punctuation and English articles, words with one space between them (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_scores(prediction: str, answers: Sequence[str], *, version: int = 2) -> tuple[float, float]:
    """(exact match, F1 of words) of an answer: the most over the right ones, "" being the right one where there are none.

    version: of SQuAD's evaluation script. 2 leaves out right answers of which normalising leaves nothing; 1 does not, and
    gives an F1 of 0 where two answers share no word because neither has one.
    """
    if version == 2:
        answers = [answer for answer in answers if normalised_answer(answer)]
    ours = normalised_answer(prediction)
    pairs = [_scores(ours, normalised_answer(answer), version) for answer in answers or [""]]
    return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)


def _scores(ours: str, theirs: str, version: int) -> tuple[float, float]:
    exact = float(ours == theirs)
    words, right_words = ours.split(), theirs.split()
    if not words or not right_words:
        return exact, exact if version == 2 else 0.0
    shared = sum((Counter(words) & Counter(right_words)).values())
    return exact, 2 * shared / (len(words) + len(right_words))


def answer_sums(predictions: Sequence[str], answers: Sequence[Sequence[str]], *, version: int = 2) -> np.ndarray:
    """(2, 3) float64: exact matches, F1s, and how many there are, of questions that have an answer, and of others."""
    sums = np.zeros((2, 3))
    for prediction, right in zip(predictions, answers, strict=True):
        sums[0 if right else 1] += (*answer_scores(prediction, right, version=version), 1)
    return sums


def answer_figures(sums: np.ndarray) -> Figures:
    """exact_match and f1 over all questions; where some have no answer also of both kinds: exact_match/has_answer, …"""
    exact, f1, count = sums.sum(axis=0)
    figures = {"exact_match": float(exact / count) if count else 0.0, "f1": float(f1 / count) if count else 0.0}
    if sums[1, 2]:
        for row, kind in zip(sums, ("has_answer", "no_answer"), strict=True):
            if row[2]:
                figures |= {f"exact_match/{kind}": float(row[0] / row[2]), f"f1/{kind}": float(row[1] / row[2])}
    return figures
