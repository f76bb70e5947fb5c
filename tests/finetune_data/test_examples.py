"""Do the rows that people have become the examples that they mean, and is each wrong row counted and named?"""

import csv
import gzip
import json
import sys

import pytest

from errors import UserError
from finetune_data.examples import Message, read_examples

USER, HELLO = Message("user", "Hi"), Message("assistant", "Hello")
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def read(tmp_path):
    """Reads rows as the .jsonl file rows.jsonl."""

    def call(*rows: object, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return read_examples([path], **settings)

    return call


def said(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


# ---- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": TURNS},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]}, TURNS[1]]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"question": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "output": "Hello", "input": None},
        {"instruction": "Hi", "output": "Hello", "text": "Below is an instruction. Hi Hello"},
        {"prompt": "Hi", "prompt_id": "7", "messages": TURNS},
    ],
)  # fmt: skip
def test_every_shape_of_a_chat_says_the_same(read, row):
    found = read(row)
    assert found.kind == "chat" and found.wrong_rows == 0
    assert said(found.examples[0].messages) == [("user", "Hi"), ("assistant", "Hello")]
    assert [message.trained for message in found.examples[0].messages if message.role == "assistant"] == [True]


def test_alpaca_input_system_and_history_come_before_the_answer(read):
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief."}
    (example,) = read({**row, "history": [["Hi", "Hello"]]}).examples
    assert said(example.messages) == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Translate.\n\nHund"), ("assistant", "dog"),
    ]  # fmt: skip
    assert [message.trained for message in example.messages if message.role == "assistant"] == [False, True]


def test_self_instruct_tasks_give_an_example_an_instance(read):
    instances = [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]
    examples = read({"id": "t", "instruction": "Do.", "instances": instances}).examples
    assert [said(example.messages) for example in examples] == [
        [("user", "Do.\n\na"), ("assistant", "b")],
        [("user", "Do."), ("assistant", "c")],
    ]


def test_template_variables_stay_as_they_are(read):
    (example,) = read({"instruction": "Who?", "input": "", "output": "I am {{name}} by {{author}}."}).examples
    assert example.messages[-1].content == "I am {{name}} by {{author}}."


def test_tools_and_calls_have_the_shape_that_templates_read(read):
    function = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    result = [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}]
    share_gpt = {
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"x": 1}})},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "It is 2."},
        ],
        "tools": json.dumps([function]),
    }
    spelled = {"id": "c1", **call, "function": {"name": "add", "arguments": '{"x": 1}'}}
    asked = [{"role": "user", "content": "1+1?"}]
    openai = {
        "messages": [*asked, {"role": "assistant", "content": None, "tool_calls": [spelled]}, *result],
        "tools": [{"type": "function", "function": function}],
    }
    for row, identity in ((share_gpt, {}), (openai, {"id": "c1"})):
        (example,) = read(row).examples
        assert said(example.messages) == [
            ("user", "1+1?"), ("assistant", ""), ("tool", "2"), ("assistant", "It is 2."),
        ]  # fmt: skip
        assert example.messages[1].extra["tool_calls"] == [{**identity, **call}]
        assert example.tools == [{"type": "function", "function": function}]
    assert read({"messages": TURNS, "tools": ""}).examples[0].tools is None


def test_a_weight_of_0_keeps_an_answer_from_being_learned(read):
    for name in ("weight", "loss_weight"):
        turns = [TURNS[0], {**TURNS[1], name: 0}, TURNS[0], {**TURNS[1], name: 1.0}]
        messages = read({"messages": turns}).examples[0].messages
        assert [message.trained for message in messages] == [True, False, True, True]
        assert all(message.extra == {} for message in messages)  # the template has no use for it


def test_what_a_message_says_beside_its_content_goes_to_the_template(read):
    row = {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "hm", "name": None}]}
    assert read(row).examples[0].messages[1].extra == {"reasoning_content": "hm"}


# ---- other kinds -----------------------------------------------------------------------------------------------------

ANSWER, OTHER = {"role": "assistant", "content": "Good"}, {"role": "assistant", "content": "Bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"question": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"instruction": "Hi", "input": "", "chosen": "Good", "rejected": "Bad"},
        {"prompt": TURNS[:1], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Hi", "chosen": [TURNS[0], ANSWER], "rejected": [TURNS[0], OTHER], "messages": [TURNS[0], ANSWER]},
        {"chosen": [TURNS[0], ANSWER], "rejected": [TURNS[0], OTHER], "score_chosen": 2.0},
        {"chosen_messages": [TURNS[0], ANSWER], "rejected_messages": [TURNS[0], OTHER]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Good", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Good", "rejected": " Bad"},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Good"},
            "rejected": {"from": "gpt", "value": "Bad"},
        },
    ],
)
def test_every_shape_of_a_preference_says_the_same(read, row):
    found = read(row)
    (example,) = found.examples
    assert found.kind == "preference" and said(example.prompt) == [("user", "Hi")]
    answers = [(role, content.strip()) for role, content in [*said(example.chosen), *said(example.rejected)]]
    assert answers == [("assistant", "Good"), ("assistant", "Bad")]
    assert example.columns == ({"score_chosen": 2.0} if "score_chosen" in row else {})


def test_transcripts_part_at_the_first_answer_that_differs(read):
    again = {"role": "user", "content": "Again?"}
    row = {"chosen": [*TURNS, again, ANSWER], "rejected": [*TURNS, again, OTHER]}
    (example,) = read(row).examples
    assert (len(example.prompt), said(example.chosen)) == (3, [("assistant", "Good")])
    # they part at a user's turn: the answer before it, which both share, begins the answers
    row = {"chosen": [*TURNS, again, ANSWER], "rejected": [*TURNS, {"role": "user", "content": "What?"}, OTHER]}
    (example,) = read(row).examples
    assert said(example.prompt) == [("user", "Hi")]
    assert [role for role, _ in said(example.rejected)] == ["assistant", "user", "assistant"]
    # one is the beginning of the other
    (example,) = read({"chosen": [*TURNS, again, ANSWER], "rejected": TURNS}).examples
    assert (len(example.prompt), len(example.chosen), len(example.rejected)) == (1, 3, 1)


@pytest.mark.parametrize("label", [True, 1, "true", "1"])
def test_labels(read, label):
    for row in ({"prompt": "Hi", "completion": "Hello"}, {"messages": TURNS}, {"instruction": "Hi", "output": "Hello"}):
        found = read({**row, "label": label}, {**row, "label": False})
        assert found.kind == "labelled" and [example.label for example in found.examples] == [True, False]
        assert said(found.examples[0].messages) == [("user", "Hi"), ("assistant", "Hello")]


def test_only_the_last_answer_of_a_dialogue_is_labelled(read):
    (example,) = read({"messages": [*TURNS, *TURNS], "label": True}).examples
    assert [message.trained for message in example.messages if message.role == "assistant"] == [False, True]


def test_prompts_keep_every_other_column_for_rewards(read):
    for name in ("prompt", "question"):
        found = read({name: "1+1?", "answer": "#### 2", "level": 3, "text": None})
        (example,) = found.examples
        assert found.kind == "prompt" and said(example.prompt) == [("user", "1+1?")]
        assert example.columns == {"answer": "#### 2", "level": 3, "text": None}
    assert "answer" in found.format
    (example,) = read({"prompt": [{"role": "system", "content": "s"}, TURNS[0]]}).examples
    assert said(example.prompt) == [("system", "s"), ("user", "Hi")]


def test_texts(read):
    found = read({"text": " a\n", "meta": 1})
    assert found.kind == "text" and found.examples[0].text == " a\n"
    assert found.examples[0].columns == {"meta": 1}


def test_columns_can_be_renamed(read):
    row = {"question": "Hi", "answer": "Hello", "prompt": "unused"}
    (example,) = read(row, rename={"question": "prompt", "answer": "completion"}).examples
    assert said(example.messages) == [("user", "Hi"), ("assistant", "Hello")]
    with pytest.raises(UserError, match=r"no column querstion .* question"):
        read(row, rename={"querstion": "prompt"})
    with pytest.raises(UserError, match=r"theme, reply.*rename"):
        read({"theme": "Hi", "reply": "Hello"})


# ---- wrong rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"messages": []}, "empty list"),
        ({"messages": "Hi"}, "messages is text, not a list of messages"),
        ({"messages": None}, "no messages"),
        ({"text": "x"}, "no messages"),
        ({"messages": ["Hi"]}, "a message is text, not an object"),
        ({"messages": TURNS[:1]}, "no assistant turn"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "empty answer"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "a message without content"),
        ({"messages": [{"role": "narrator", "content": "x"}, *TURNS]}, "unknown role 'narrator'"),
        ({"messages": [{"content": "x"}, *TURNS]}, "a message without a role"),
        ({"messages": [{"role": "user", "content": 3}, TURNS[1]]}, "content of a message is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "value": "a.jpg"}]}, TURNS[1]]}, "image_url"),
        ({"messages": TURNS, "images": ["a.jpg"]}, "it has images"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, "weight is 0.5"),
        ({"messages": [TURNS[0], {"from": "function_call", "value": "add(1)"}]}, "not JSON"),
        ({"messages": TURNS, "tools": "[{"}, "tools is not JSON"),
        ({"messages": [{"role": "user", "content": "\ud800"}, TURNS[1]]}, "surrogates"),
        ([1, 2], "a list, not an object"),
    ],
)
def test_a_wrong_row_is_left_out_counted_and_named(read, wrong, words):
    found = read({"messages": TURNS}, wrong, {"messages": TURNS})
    assert len(found.examples) == 2 and found.wrong_rows == 1
    assert [example.source.rpartition("/")[2] for example in found.examples] == ["rows.jsonl:1", "rows.jsonl:3"]
    told = found.report[1]
    assert words in told and "1 of 3 rows" in told and "rows.jsonl:2" in told


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ({"instruction": "Hi", "output": "Hello"}, {"instruction": "Hi", "output": ""}, "empty answer"),
        ({"instruction": "Hi", "output": "Hello"}, {"instruction": "Hi"}, "no output"),
        ({"instruction": "Hi", "output": "Hello"}, {"instruction": "", "output": "x"}, "empty prompt"),
        (
            {"instruction": "Hi", "output": "Hello"},
            {"instruction": 5, "output": "x"},
            "instruction is a number, not text",
        ),
        ({"instruction": "Hi", "output": "Hello"}, {"instruction": "a", "output": "x", "history": "b"}, "history"),
        ({"text": "a"}, {"text": "  "}, "empty text"),
        ({"prompt": "a", "x": 1}, {"prompt": TURNS}, "ends with an assistant's turn"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "chosen": "b", "rejected": ""},
            "empty answer",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}, "no rejected"),
        ({"chosen": TURNS, "rejected": [TURNS[0], OTHER]}, {"chosen": "b", "rejected": "c"}, "no prompt"),
        (
            {"chosen": TURNS, "rejected": [TURNS[0], OTHER]},
            {"chosen": TURNS, "rejected": [TURNS[1], OTHER]},
            "same prompt",
        ),
        ({"messages": TURNS, "label": True}, {"messages": TURNS, "label": "maybe"}, "neither true nor false"),
        ({"messages": TURNS, "label": True}, {"messages": TURNS}, "no label"),
        ({"messages": TURNS, "label": True}, {"messages": TURNS[:1], "label": True}, "no answer to label"),
        (
            {"instruction": "a", "instances": [{"output": "b"}]},
            {"instruction": "a", "instances": "b"},
            "list of objects",
        ),
    ],
)
def test_wrong_rows_of_other_kinds(read, right, wrong, words):
    found = read(right, wrong)
    assert len(found.examples) == 1 and words in found.report[-1] and "rows.jsonl:2" in found.report[-1]


def test_many_wrong_rows_are_grouped_and_the_first_named(read):
    found = read({"text": "a"}, *[{"text": ""}] * 9, {"text": 1})
    assert found.wrong_rows == 10
    assert (
        "9 x empty text (rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, rows.jsonl:5, rows.jsonl:6, ...)" in found.report[1]
    )
    assert "1 x text is a number, not text (rows.jsonl:11)" in found.report[1]


def test_no_right_row_is_an_error(read, tmp_path):
    with pytest.raises(UserError, match=r"no right row: 2 x empty text \(rows\.jsonl:1"):
        read({"text": ""}, {"text": ""})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no row"):
        read_examples([tmp_path / "empty.jsonl"])
    with pytest.raises(UserError, match="no file"):
        read_examples([])


# ---- files -----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": 'a,\t"b"\n', "completion": "ü 日本"}, {"prompt": "c", "completion": "d\u2028e"}]


def write_as(path, rows):
    """The same rows in the format that the file's name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8-sig" if kind == "csv" else "utf-8", newline="") as file:
        if kind in ("csv", "tsv"):
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file, ensure_ascii=False, indent=1)
        else:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.json.gz", "a.JSONL.gz", "a.csv.gz", "a.tsv.gz"]
)
def test_every_kind_of_file_holds_the_same_examples(tmp_path, name):
    write_as(tmp_path / name, ROWS)
    found = read_examples([tmp_path / name])
    assert [(e.messages[0].content, e.messages[1].content) for e in found.examples] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]
    assert found.examples[1].source == f"{tmp_path / name}:2"


def test_a_parquet_file_holds_messages(tmp_path):
    write_as(
        tmp_path / "a.parquet", [{"messages": TURNS, "tools": None}, {"messages": [*TURNS, *TURNS], "tools": None}]
    )
    assert [len(example.messages) for example in read_examples([tmp_path / "a.parquet"]).examples] == [2, 4]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_examples([tmp_path / "a.parquet"])


def test_a_table_holds_messages_as_json_and_texts_that_look_like_it(tmp_path):
    rows = [{"messages": json.dumps(TURNS), "label": "1"}]
    write_as(tmp_path / "a.csv", rows)
    assert said(read_examples([tmp_path / "a.csv"]).examples[0].messages) == [("user", "Hi"), ("assistant", "Hello")]
    write_as(tmp_path / "b.csv", [{"prompt": "As JSON?", "completion": '[{"a": 1}]'}])
    assert read_examples([tmp_path / "b.csv"]).examples[0].messages[1].content == '[{"a": 1}]'


def test_stray_quotes_in_a_tsv_are_characters(tmp_path):
    (tmp_path / "a.tsv").write_text(
        'prompt\tcompletion\n"Hi" he said\tsaid "x"\n"open\tclose\none field\n', "utf-8-sig"
    )
    found = read_examples([tmp_path / "a.tsv"])
    assert [example.messages[0].content for example in found.examples] == ['"Hi" he said', '"open']
    assert "1 fields instead of 2 (a.tsv:3)" in found.report[1]


def test_broken_lines_are_wrong_rows_and_broken_files_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n\xff\n"b"\n{"text": "c"}\n')
    found = read_examples([path])
    assert [example.text for example in found.examples] == ["a", "c"]
    assert all(words in found.report[1] for words in ("broken JSON (a.jsonl:2)", "not UTF-8 (a.jsonl:3)", "a.jsonl:4"))
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text"')
    (tmp_path / "a.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "a.xml").write_text("<a/>")
    for name, words in (
        ("a.json", "not JSON"),
        ("a.csv.gz", "broken gzip"),
        ("a.xml", "no kind"),
        ("b.csv", "No such file"),
    ):
        with pytest.raises(UserError, match=words):
            read_examples([tmp_path / name])


def test_files_of_one_kind_go_together_and_others_do_not(tmp_path):
    write_as(tmp_path / "a.json", ROWS)
    write_as(tmp_path / "b.jsonl", [{"messages": TURNS}])
    write_as(tmp_path / "c.jsonl", [{"text": "a"}])
    found = read_examples([tmp_path / "a.json", str(tmp_path / "b.jsonl")])
    assert len(found.examples) == 3 and "prompts and completions" in found.format and "messages" in found.format
    with pytest.raises(UserError, match=r"c\.jsonl holds text examples"):
        read_examples([tmp_path / "a.json", tmp_path / "c.jsonl"])


def test_utf_16_with_its_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ü日"}\n', encoding="utf-16")
    assert read_examples([tmp_path / "a.jsonl"]).examples[0].text == "ü日"


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("sft/alpaca_en_demo.json", "chat", 999),
        ("sft/alpaca_zh_demo.json", "chat", 1000),
        ("sft/identity.json", "chat", 91),
        ("sft/self_instruct_seed_tasks.jsonl", "chat", 175),
        ("chat/fastchat_dummy_conversation.json", "chat", 500),
        ("chat/glaive_toolcall_en_demo.json", "chat", 300),
        ("chat/v1_sft_demo.jsonl", "chat", 500),
        ("preference/dpo_en_demo.json", "preference", 300),
        ("preference/kto_en_demo.json", "labelled", 300),
        ("preference/v1_dpo_demo.jsonl", "preference", 10),
        ("rlvr/gsm8k_train.jsonl", "prompt", 7473),
        ("rlvr/gsm8k_test.jsonl", "prompt", 1319),
    ],
)
def test_real_files_are_read_whole(shared_data, name, kind, count):
    found = read_examples([shared_data / name])
    assert (found.kind, len(found.examples), found.wrong_rows) == (kind, count, 0), found.report
