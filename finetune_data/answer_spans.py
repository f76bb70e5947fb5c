"""How do questions with answers in a text become windows of tokens, and how do scores of starts and ends become an answer?

    SQuAD      .json as published, version 1.1, or 2.0 with questions that have no answer (is_impossible)
    rows       .jsonl, .json or .parquet with question, context and answers: {"text": […], "answer_start": […]}, or a list of
               {"text", "answer_start"}; none for a question without an answer. answer_start counts characters

A context that is too long is cut into windows that overlap by doc_stride tokens (Devlin et al. 2018, as transformers counts
it), each behind the whole question. A window that does not show the whole answer has "no answer", which is the place of the
first token, [CLS]; in a causal model, which has read nothing there, that of the last token.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batches.packing import Sequence
from dataprep.tokenizers import Tokenizer
from errors import UserError
from finetune_data.task_layout import Layout
from finetune_data.task_rows import Rows, WrongRowError, convert_rows, no_column, read_task_rows, text_in

START, END = "start", "end"  # the columns of a window: the places of the answer's first and last token


@dataclass(frozen=True)
class Question:
    """answers: (text, first character in context), several where people gave several; none if the context has none."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    source: str  # "file:row", or in SQuAD's nested files "file:id"


@dataclass(frozen=True)
class QuestionSet:
    """All questions of some files, whether any has no answer, and sentences on what was read and left out."""

    examples: list[Question]
    report: list[str]

    @property
    def some_without_answer(self) -> bool:
        return not all(example.answers for example in self.examples)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_questions(paths: SequenceOf[str | Path], *, rename: dict[str, str] | None = None) -> QuestionSet:
    """The questions of files, in their order. rename: {their column: the column it is to us}, for files of rows.

    UserError for a file that cannot be read or has not these columns, and for an answer that is not where it is said to be.
    """
    examples: list[Question] = []
    report: list[str] = []
    for path in map(Path, paths):
        rows = _questions_of_articles(path, read_task_rows(path, rename or {}))
        columns = {column: None for _, row in rows if isinstance(row, dict) for column in row}
        if missing := [name for name in ("question", "context", "answers") if name not in columns]:
            raise no_column(path, columns, missing[0])
        found, left_out = convert_rows(path, rows, partial(_question, path))
        unanswered = sum(not example.answers for example in found)
        report += [f"{path}: {len(found)} questions, {unanswered} of them without an answer", *left_out]
        examples += found
    if not examples:
        raise UserError("no file of questions is named; name at least one")
    return QuestionSet(examples, report)


def _questions_of_articles(path: Path, rows: Rows) -> Rows:
    """Rows of questions; of SQuAD's articles, which are one row or a row each, all questions in order."""
    made: Rows = []
    for number, row in rows:
        articles = row.get("data", [row]) if isinstance(row, dict) else None
        if not isinstance(articles, list) or not all(isinstance(a, dict) and "paragraphs" in a for a in articles):
            made.append((number, row))
            continue
        try:
            made += [
                (len(made) + place, {**asked, "context": paragraph["context"], "nested": True})
                for place, (paragraph, asked) in enumerate(
                    ((p, asked) for article in articles for p in article["paragraphs"] for asked in p["qas"]), start=1
                )
            ]
        except (KeyError, TypeError):
            raise UserError(
                f"{path} has data and paragraphs as SQuAD's files, but not context and qas in each paragraph"
            ) from None
    return made


def _question(path: Path, number: int, row: dict[str, Any]) -> Question:
    question, context = text_in(row, "question"), text_in(row, "context")
    own = row.get("id")
    source = f"{path}:{own if row.get('nested') and own is not None else number}"
    answers = () if row.get("is_impossible") else _answers(row.get("answers"))
    for text, start in answers:
        if not text or start < 0 or context[start : start + len(text)] != text:
            found = context.find(text) if text else -1
            advice = f"it begins at {found}" if found >= 0 else "the context does not have it"
            raise UserError(
                f"{source} has the answer {text[:60]!r} at character {start}, but {advice}; correct answer_start"
            )
    return Question(str(own) if own is not None else source, question, context, answers, source)


def _answers(value: Any) -> tuple[tuple[str, int], ...]:
    if value is None:
        raise WrongRowError("no answers")
    try:
        if isinstance(value, dict):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in value]
        if all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
            return tuple(pairs)
    except (KeyError, TypeError, ValueError):
        pass
    raise WrongRowError("answers are not texts with an answer_start each")


# ---- windows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of a context behind its question. sequence: with the columns "start" and "end", tokens that span the answer.

    characters: (n, 2) int32, what of the context each token stands for, white space at its ends left out; (-1, -1) for the
    others. null: the place that stands for "no answer".
    """

    sequence: Sequence
    characters: np.ndarray
    null: int


@dataclass(frozen=True)
class EncodedQuestions:
    """The windows of each question, in order.

    cut_questions: whether each was cut to max_question_length. hidden: how many have an answer that no window shows whole.
    """

    windows: list[list[Window]]
    cut_questions: list[bool]
    hidden: int


def encode_questions(
    tokenizer: Tokenizer,
    layout: Layout,
    examples: SequenceOf[Question],
    *,
    max_length: int,
    doc_stride: int = 128,
    max_question_length: int = 64,
) -> EncodedQuestions:
    """Windows of at most max_length tokens, neighbours sharing doc_stride tokens of the context; the first answer is learned.

    UserError where a question leaves no more room than doc_stride.
    """
    layout = layout.closed
    contexts = list(dict.fromkeys(example.context for example in examples))  # many questions are about one
    encoded = dict(zip(contexts, tokenizer.encode_batch_with_offsets(contexts), strict=True))
    trimmed = {context: _trimmed(context, offsets) for context, (_, offsets) in encoded.items()}
    asked = tokenizer.encode_batch_with_offsets([example.question for example in examples])
    made, hidden = [], 0
    for example, (question, _) in zip(examples, asked, strict=True):
        question = question[:max_question_length]
        room = layout.room(max_length, pair=True) - len(question)
        if not 0 <= doc_stride < room:
            raise UserError(
                f"--max_length {max_length} leaves {max(room, 0)} tokens of context behind the question of {example.source}, "
                f"which must be more than --doc_stride {doc_stride}; raise the one or lower the other"
            )
        ids, characters = encoded[example.context][0], trimmed[example.context]
        span = _span(characters, example.answers[0]) if example.answers else None
        windows = [
            _window(layout, question, ids[first:last], characters[first:last], span, first)
            for first, last in _parts(len(ids), room, doc_stride)
        ]
        hidden += bool(example.answers) and all(window.sequence.columns[END] == window.null for window in windows)
        made.append(windows)
    return EncodedQuestions(made, [len(question) > max_question_length for question, _ in asked], hidden)


def _parts(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Where windows of `room` tokens begin and end that overlap by `stride`; the last one ends with the context."""
    starts = range(0, max(length - stride, 1), room - stride)
    return [(first, min(first + room, length)) for first in starts]


def _trimmed(text: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets (n, 2) without the white space at the ends of what they enclose."""
    trimmed = offsets.copy()
    for place, (begin, end) in enumerate(offsets.tolist()):
        piece = text[begin:end]
        begin += len(piece) - len(piece.lstrip())
        trimmed[place] = begin, max(begin, begin + len(piece.strip()))
    return trimmed


def _span(characters: np.ndarray, answer: tuple[str, int]) -> tuple[int, int] | None:
    """The first and the last token that show a character of the answer; None where the tokenizer leaves nothing of it."""
    text, begin = answer
    shown = np.flatnonzero((characters[:, 1] > begin) & (characters[:, 0] < begin + len(text)) & _shows(characters))
    return (int(shown[0]), int(shown[-1])) if len(shown) else None


def _shows(characters: np.ndarray) -> np.ndarray:
    return characters[:, 0] < characters[:, 1]


def _window(
    layout: Layout,
    question: np.ndarray,
    ids: np.ndarray,
    characters: np.ndarray,
    span: tuple[int, int] | None,
    first: int,
) -> Window:
    """The window whose context begins at the context's token `first`."""
    at = layout.second_at(question)
    total = at + len(ids) + len(layout.after)
    null = total - 1 if layout.causal else 0
    start = end = null
    if span and first <= span[0] and span[1] < first + len(ids):
        start, end = (at - first + place for place in span)
    places = np.full((total, 2), -1, dtype=np.int32)
    places[at : at + len(ids)] = characters
    return Window(layout.sequence(question, ids, {START: float(start), END: float(end)}), places, null)


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """text: the exact characters of the context from the character `start` on, "" for no answer.

    score: the sum of its start's and its end's logits. null_score: of "no answer", the lowest over the windows, for one
    window without an answer says nothing of the others.
    """

    text: str
    start: int
    score: float
    null_score: float


def find_answer(
    context: str,
    windows: SequenceOf[Window],
    start_logits: SequenceOf[np.ndarray],
    end_logits: SequenceOf[np.ndarray],
    *,
    max_answer_length: int = 30,
    may_be_none: bool,
    null_threshold: float = 0.0,
) -> Answer:
    """The span of at most max_answer_length tokens with the highest score in any window, logits (n,) for each.

    may_be_none: whether it is "" where null_score exceeds the best span's score by more than null_threshold (Devlin et al.
    2018, §4.3). Unlike scripts that try the 20 best starts and ends only, every span is looked at.
    """
    best, where = -np.inf, (0, 0)
    null_score = np.inf
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        null_score = min(null_score, float(starts[window.null]) + float(ends[window.null]))
        score, first, last = _best_span(window.characters, starts, ends, max_answer_length)
        if score > best:
            best, where = score, (int(window.characters[first, 0]), int(window.characters[last, 1]))
    none = may_be_none and null_score - best > null_threshold
    return Answer("" if none else context[slice(*where)], where[0], best, null_score)


def _best_span(
    characters: np.ndarray, start_logits: np.ndarray, end_logits: np.ndarray, max_length: int
) -> tuple[float, int, int]:
    """The best score of a span within the context, and its first and last token; -inf where there is none."""
    allowed = _shows(characters)
    starts = np.where(allowed, np.asarray(start_logits, dtype=np.float64), -np.inf)
    ends = np.where(allowed, np.asarray(end_logits, dtype=np.float64), -np.inf)
    best = (-np.inf, 0, 0)
    for width in range(min(max_length, len(starts))):
        scores = starts[: len(starts) - width] + ends[width:]
        first = int(scores.argmax())
        if scores[first] > best[0]:
            best = (float(scores[first]), first, first + width)
    return best
