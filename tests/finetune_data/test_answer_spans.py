"""Do windows show the answers where transformers says they are, and is the best answer found, in the context's characters?"""

import json

import numpy as np
import pytest

from batches.packing import pack
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.answer_spans import Question, encode_questions, find_answer, read_questions
from finetune_data.task_layout import find_layout

CONTEXT = "The committee met in Geneva  on Tuesday and elected Anna Müller (née Élan) as its president."
ASKED = {"question": "Where did it meet?", "context": CONTEXT}
GENEVA = {"text": ["Geneva", "in Geneva"], "answer_start": [21, 18]}
NONE = {"text": [], "answer_start": []}


def nested(version: str) -> dict:
    """SQuAD's published form."""
    asked = [
        {"id": "q1", "question": ASKED["question"],
         "answers": [{"text": "Geneva", "answer_start": 21}, {"text": "in Geneva", "answer_start": 18}]},
        {"id": "q2", "question": "Who paid?", "answers": [], "is_impossible": True, "plausible_answers": []},
    ]  # fmt: skip
    if version == "1.1":
        asked = asked[:1]
    paragraphs = [{"context": CONTEXT, "qas": asked}]
    return {"version": version, "data": [{"title": "Geneva", "paragraphs": paragraphs}]}


@pytest.fixture
def write(tmp_path):
    def call(name: str, *rows: dict):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return path

    return call


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_files_of_every_shape_say_the_same(write):
    rows = [{"id": "q1", **ASKED, "answers": GENEVA}, {"id": "q2", **ASKED, "question": "Who paid?", "answers": NONE}]
    listed = [{"text": "Geneva", "answer_start": 21}, {"text": "in Geneva", "answer_start": 18}]
    expected = [
        ("q1", ASKED["question"], CONTEXT, (("Geneva", 21), ("in Geneva", 18))),
        ("q2", "Who paid?", CONTEXT, ()),
    ]
    for path in (
        write("a.json", nested("v2.0")),
        write("a.jsonl", *rows),
        write("b.jsonl", {**rows[0], "answers": listed}, {**rows[1], "answers": []}),
    ):
        questions = read_questions([path])
        assert [(q.id, q.question, q.context, q.answers) for q in questions.examples] == expected
        assert questions.some_without_answer and "2 questions, 1 of them without" in questions.report[0]
    first = read_questions([write("a.json", nested("1.1"))])
    assert not first.some_without_answer and first.examples[0].source.endswith("a.json:q1")


def test_what_is_wrong_ends_in_one_sentence_with_its_place(write):
    beyond = {"text": ["Geneva"], "answer_start": [500]}
    with pytest.raises(UserError, match=r"a\.jsonl:2 has the answer 'Geneva' at character 500, but it begins at 21"):
        read_questions([write("a.jsonl", {**ASKED, "answers": GENEVA}, {**ASKED, "answers": beyond})])
    with pytest.raises(UserError, match=r"at character -1"):
        read_questions([write("a.jsonl", {**ASKED, "answers": {"text": ["."], "answer_start": [-1]}})])
    with pytest.raises(UserError, match="the context does not have it"):
        read_questions([write("a.jsonl", {**ASKED, "answers": {"text": ["Bern"], "answer_start": [3]}})])
    broken = nested("1.1")
    broken["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 20
    with pytest.raises(UserError, match=r"a\.json:q1 has the answer"):
        read_questions([write("a.json", broken)])
    with pytest.raises(UserError, match="columns query, context, answers; --rename_columns can say which is question"):
        read_questions([write("a.jsonl", {"query": "?", "context": "a", "answers": NONE})])
    with pytest.raises(UserError, match="not context and qas"):
        read_questions([write("a.json", {"data": [{"paragraphs": [{"text": "a"}]}]})])
    report = read_questions([write("a.jsonl", {**ASKED, "answers": GENEVA}, {**ASKED, "answers": ["Geneva"]})]).report
    assert any("1 of 2 rows are wrong" in line and "a.jsonl:2" in line for line in report)


# ---- windows ---------------------------------------------------------------------------------------------------------


def random_questions(texts: list[str]) -> list[Question]:
    """About contexts of several texts, each with an answer of whole words."""
    draw, made = np.random.default_rng(3), []
    for number in range(0, len(texts) - 6, 6):
        context = " ".join(texts[number : number + 5])
        words = context.split()
        first = int(draw.integers(len(words)))
        answer = " ".join(words[first : first + int(draw.integers(1, 6))])
        start = len(" ".join(words[:first])) + (first > 0)
        made.append(Question(str(number), texts[number + 5], context, ((answer, start),), f"a:{number}"))
    return made


@pytest.mark.parametrize(("max_length", "stride"), [(100, 20), (130, 0), (64, 15), (2000, 128)])
def test_windows_and_positions_are_those_of_transformers_recipe(bert, random_texts, max_length, stride):
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(bert), load_tokenizer(bert)
    questions = [q for q in random_questions(random_texts(180, 9)) if len(tokenizer.encode(q.question)) < 40]
    encoded = encode_questions(
        tokenizer, find_layout(tokenizer, causal=False), questions, max_length=max_length, doc_stride=stride
    )
    shown = 0
    for question, windows in zip(questions, encoded.windows, strict=True):
        expected = theirs(
            question.question, question.context, truncation="only_second", max_length=max_length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding=False,
        )  # fmt: skip
        assert [one.sequence.tokens.tolist() for one in windows] == expected["input_ids"]
        (text, begin), end = question.answers[0], question.answers[0][1] + len(question.answers[0][0])
        for row, window in enumerate(windows):
            ids, offsets = expected.sequence_ids(row), expected["offset_mapping"][row]
            places = [place for place, number in enumerate(ids) if number == 1]
            assert window.characters[places].tolist() == [list(offsets[place]) for place in places]
            assert (window.characters[[place for place in range(len(ids)) if place not in places]] == -1).all()
            start = stop = 0
            if offsets[places[0]][0] <= begin and offsets[places[-1]][1] >= end:
                start = max(place for place in places if offsets[place][0] <= begin)
                stop = min(place for place in places if offsets[place][1] >= end)
                shown += 1
            assert (window.sequence.columns["start"], window.sequence.columns["end"]) == (start, stop), text
    assert shown >= len(questions) - encoded.hidden and (encoded.hidden == 0 or stride == 0)


def test_positions_reach_the_stage_through_packing(bert):
    tokenizer = load_tokenizer(bert)
    questions = [Question("q", "Where?", CONTEXT, (("Geneva", 21),), ""), Question("r", "Where?", CONTEXT, (), "")]
    encoded = encode_questions(
        tokenizer, find_layout(tokenizer, causal=False), questions, max_length=100, doc_stride=10
    )
    sequences = [window.sequence for windows in encoded.windows for window in windows]
    (batch,) = pack([[one] for one in sequences], max_length=200, micro_batch_size=2)
    start, end = (int(batch.columns[name][0]) for name in ("start", "end"))
    first = batch.input_ids[batch.sequence_ids == 0]
    assert tokenizer.decode(first[start : end + 1].tolist()).replace(" ##", "") == "geneva"
    assert batch.columns["end"].tolist()[1:] == [0.0] * (len(sequences) - 1)


def test_no_room_for_a_context_is_one_sentence(bert):
    tokenizer = load_tokenizer(bert)
    question = [Question("q", "Where?", CONTEXT, (("Geneva", 21),), "a.jsonl:7")]
    with pytest.raises(
        UserError, match=r"--max_length 40 leaves .* a\.jsonl:7, which must be more than --doc_stride 128"
    ):
        encode_questions(tokenizer, find_layout(tokenizer, causal=False), question, max_length=40)


def test_a_long_question_is_cut(bert):
    tokenizer = load_tokenizer(bert)
    question = [Question("q", "where did they meet " * 30, CONTEXT, (("Geneva", 21),), "")]
    encoded = encode_questions(tokenizer, find_layout(tokenizer, causal=False), question, max_length=150, doc_stride=10)
    assert sum(encoded.cut_questions) == 1
    assert encoded.windows[0][0].sequence.tokens.tolist().index(3) == 65  # [CLS], 64 pieces, [SEP]


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "decoder"])
def test_a_model_that_is_right_gives_the_answers_exact_characters(family, request, random_texts):
    tokenizer = load_tokenizer(request.getfixturevalue(family))
    layout = find_layout(tokenizer, causal=family == "decoder")
    odd = [
        Question("o", "who?", CONTEXT, ((text, CONTEXT.index(text)),), "")
        for text in ("Geneva", "Anna Müller (née Élan)", "née Élan", "The committee", "president.")
    ]
    questions = [*odd, *random_questions(random_texts(90, 4)), Question("n", "who?", CONTEXT * 5, (), "")]
    encoded = encode_questions(tokenizer, layout, questions, max_length=150, doc_stride=60)
    assert encoded.hidden == 0
    for question, windows in zip(questions, encoded.windows, strict=True):
        logits: dict[str, list[np.ndarray]] = {"start": [], "end": []}
        for window in windows:
            for name, rows in logits.items():
                place = int(window.sequence.columns[name])
                assert question.answers or place == (len(window.sequence.tokens) - 1 if layout.causal else 0)
                rows.append(np.where(np.arange(len(window.sequence.tokens)) == place, 5.0, 0.0))
        answer = find_answer(
            question.context, windows, logits["start"], logits["end"], may_be_none=True, max_answer_length=60
        )
        assert answer.text == (question.answers[0][0] if question.answers else "")


@pytest.mark.parametrize("longest", [1, 4, 30])
def test_the_best_span_is_that_of_trying_them_all(bert, random_texts, longest):
    tokenizer, draw = load_tokenizer(bert), np.random.default_rng(1)
    questions = random_questions(random_texts(60, 2))
    encoded = encode_questions(
        tokenizer, find_layout(tokenizer, causal=False), questions, max_length=120, doc_stride=20
    )
    nones = 0
    for question, windows in zip(questions, encoded.windows, strict=True):
        starts, ends = ([draw.normal(size=len(w.sequence.tokens)) for w in windows] for _ in range(2))
        tried = [
            (s[i] + e[j], question.context[w.characters[i, 0] : w.characters[j, 1]])
            for w, s, e in zip(windows, starts, ends, strict=True)
            for i in range(len(s))
            for j in range(i, min(i + longest, len(s)))
            if w.characters[i, 0] >= 0 and w.characters[j, 0] >= 0
        ]
        score, text = max(tried)
        null = min(s[0] + e[0] for s, e in zip(starts, ends, strict=True))
        given = find_answer(question.context, windows, starts, ends, max_answer_length=longest, may_be_none=False)
        assert (given.text, given.score, given.null_score) == (text, score, null)
        for threshold in (0.0, null - score + 0.1, null - score - 0.1):
            given = find_answer(
                question.context, windows, starts, ends, max_answer_length=longest, may_be_none=True,
                null_threshold=threshold,
            )  # fmt: skip
            assert given.text == ("" if null - score > threshold else text)
            nones += given.text == ""
    assert nones >= len(questions)
