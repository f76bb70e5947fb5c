"""What do classifiers, taggers and answer finders say of a row? What `utils.py predict` does with the models of those stages.

Models are adapters.task_heads.TaskModel; a row is read and encoded as in training (finetune_data/).
"""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adapters.task_heads import Task
from finetune_data.answer_spans import Answer, Question, encode_questions, find_answer
from finetune_data.tagged import WORDS, TaggedWords, encode_tagged, outside, word_tags
from finetune_data.task_metrics import entities, marks_entities
from finetune_data.task_rows import WrongRowError, check_text, text_in
from tools.predict_rows import Reader, Result, Texts, encode_texts, numbers, outputs


def classify(reader: Reader, texts: list[Texts], task: Task) -> list[Result]:
    """Of each "predicted" and "probabilities" by label.

    predicted: the likeliest label; of a model of several labels all above one half; of a regression its figure, or figures,
    without probabilities.
    """
    sequences, notes = encode_texts(reader, texts)
    # the token that the stage reads (stages/classify.py)
    logits = [one[-1 if reader.layout.causal else 0] for one in outputs(reader, sequences)]
    return [_label(one, task) | note for one, note in zip(logits, notes, strict=True)]


def _label(logits: Tensor, task: Task) -> Result:
    if task.kind == "regression":
        figures = numbers(logits)
        return {"predicted": figures[0] if len(figures) == 1 else figures}
    if task.kind == "multi":
        chosen: Any = [label for label, logit in zip(task.labels, logits.tolist(), strict=True) if logit > 0]
        probabilities = logits.sigmoid()
    else:
        chosen = task.labels[int(logits.argmax())]
        probabilities = logits.softmax(-1)
    return {"predicted": chosen, "probabilities": dict(zip(task.labels, numbers(probabilities), strict=True))}


# ---- tags ------------------------------------------------------------------------------------------------------------


def read_words(row: dict[str, Any]) -> tuple[str, ...]:
    """The words of a row: its tokens (or words), or those of its text between white space. Raises WrongRowError."""
    column = next((name for name in WORDS if name in row), None)
    if column is None:
        return tuple(text_in(row, "text").split())
    words = row[column]
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(word, str) and word.split() == [word] for word in words)
    ):
        raise WrongRowError(f"{column} is not a list of words")
    check_text(words)
    return tuple(words)


def tag(reader: Reader, sentences: list[tuple[str, ...]], task: Task) -> list[Result]:
    """Of each its "words", the "predicted" tag of each word, its "probabilities", and "entities" where tags mark them.

    A word's tag is that of its first token; a word that has none, or is beyond max_length, has "O" (null where there is no
    such tag) and no probability. An entity has its type, its text, and its first and last word, counted from 0.
    """
    read = [TaggedWords(words, (0,) * len(words), "") for words in sentences]
    encoded = encode_tagged(reader.tokenizer, reader.layout, read, max_length=reader.max_length)
    results = []
    every = zip(sentences, outputs(reader, encoded.sequences), encoded.places, encoded.truncated, strict=True)
    for words, logits, places, cut in every:
        best, tags = logits.softmax(-1).max(-1)
        likely = numbers(best)
        named = [
            None if one < 0 else task.labels[one]
            for one in word_tags(tags.cpu().numpy(), places, missing=outside(task.labels))
        ]
        probabilities = [likely[place] if place >= 0 else None for place in places]
        result: Result = {"words": list(words), "predicted": named, "probabilities": probabilities}
        if marks_entities(task.labels):
            result["entities"] = [
                {"type": kind, "text": " ".join(words[first : last + 1]), "first": first, "last": last}
                for kind, first, last in entities([one or "O" for one in named])
            ]
        results.append(result | ({"truncated": True} if cut else {}))
    return results


# ---- answers ---------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    question: str
    context: str


def read_question(row: dict[str, Any]) -> Asked:
    """The question of a row and the context that it is about. Raises WrongRowError."""
    return Asked(text_in(row, "question"), text_in(row, "context"))


def answer(reader: Reader, asked: list[Asked], doc_stride: int) -> list[Result]:
    """Of each the likeliest span of the context: "predicted", its characters from "start" on to before "end", "probability".

    That is, in the window in which the span stands, the start's times the end's, each over all tokens as it is trained.
    "no_answer_probability" is the same of no answer, the lowest over the windows; null as "predicted" says that no token is
    left of the context.
    """
    questions = [Question("", one.question, one.context, (), "the row") for one in asked]
    encoded = encode_questions(
        reader.tokenizer, reader.layout, questions, max_length=reader.max_length, doc_stride=doc_stride
    )
    results = []
    for one, its_windows, cut in zip(asked, encoded.windows, encoded.cut_questions, strict=True):
        # one question at a time: its windows are as many as its context is long
        logits = [
            found.cpu().double().numpy() for found in outputs(reader, [window.sequence for window in its_windows])
        ]
        spans = [
            find_answer(one.context, [window], [found[:, 0]], [found[:, 1]], may_be_none=False)
            for window, found in zip(its_windows, logits, strict=True)
        ]
        totals = np.array([np.logaddexp.reduce(found, axis=0).sum() for found in logits])
        results.append(_span(spans, totals) | ({"truncated": True} if cut else {}))
    return results


def _span(spans: list[Answer], totals: np.ndarray) -> Result:
    """The best span of all windows. totals: of each window what its scores are to be lowered by to be log-probabilities."""
    best = int(np.argmax([span.score for span in spans]))
    none = min(float(np.exp(span.null_score - total)) for span, total in zip(spans, totals, strict=True))
    if not np.isfinite(spans[best].score):
        return {"predicted": None, "no_answer_probability": round(none, 7)}
    return {
        "predicted": spans[best].text,
        "start": spans[best].start,
        "end": spans[best].start + len(spans[best].text),
        "probability": round(float(np.exp(spans[best].score - totals[best])), 7),
        "no_answer_probability": round(none, 7),
    }
