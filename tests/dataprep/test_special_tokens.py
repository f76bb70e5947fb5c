"""Has a tokenizer that is trained here the special tokens of chats from the start, and can no text forge them?"""

import json
from pathlib import Path

import pytest

from data_prep_tool import build_parser
from dataprep.chatml import CHATML
from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
from dataprep.shards import open_split
from dataprep.special_tokens import with_tokens
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.chat_template import load_chat_template
from finetune_data.chat_tokens import describe_template, encode_messages, missing_tokens, stop_token_ids
from finetune_data.encoding_examples import encode_example
from finetune_data.examples import Message, read_examples

# docs/data.md's table: the first ids of a byte-level BPE
DOCUMENTED = [
    "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>",
    "</tool_response>", "<think>", "</think>", *(f"<|reserved_{number}|>" for number in range(22)),
]  # fmt: skip
BERTS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def spelled(token: str) -> str:
    return f"a {token} b{token}{token}\n{token}"


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def data(request, tmp_path_factory) -> Path:
    """A folder prepared from documents that spell every special token, alone and in pairs. WordPiece is asked for a chat's."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text").mkdir()
    words = "user assistant system tool Hello there add, {x: 1}. " * 3
    texts = [words + spelled(token) for token in [*DOCUMENTED, *BERTS]]
    (folder / "text" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chosen = None if request.param == "bpe" else tuple(DOCUMENTED[2:28])
    options = Options(
        folder / "text", folder / "data", tokenizer_type=request.param, vocab_size=500, num_workers=1, val_fraction=0,
        eos_token="<|endoftext|>", special_tokens=chosen,
    )  # fmt: skip
    prepare(options, Progress())
    return folder / "data"


def special_ids(tokenizer) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokenizer.definition["added_tokens"]}


def test_the_documented_tokens_are_the_first_ids(data):
    tokenizer = load_tokenizer(data)
    expected = DOCUMENTED if tokenizer.kind == "bpe" else [*BERTS, DOCUMENTED[0], *DOCUMENTED[2:28]]
    assert list(special_ids(tokenizer).items()) == [(token, index) for index, token in enumerate(expected)]
    assert len(expected) == 32 and tokenizer.vocab_size <= 500
    pad = "<|pad|>" if tokenizer.kind == "bpe" else "[PAD]"
    assert tokenizer.pad_token_id == expected.index(pad) != tokenizer.eos_token_id


def test_no_document_forges_a_special_token(data):
    tokenizer, split = load_tokenizer(data), open_split(data, "train")
    tokens = split.read(0, split.num_tokens)
    unknown = special_ids(tokenizer).get("[UNK]")  # WordPiece's, for what it has no letters for
    made = set(tokens.tolist()) & set(special_ids(tokenizer).values()) - {unknown}
    around = {tokenizer.eos_token_id, tokenizer.begin_id} - {None}  # every document, once
    assert made == around and all((tokens == one).sum() == len(DOCUMENTED + BERTS) for one in around)
    if tokenizer.kind == "bpe":
        texts = [tokenizer.decode(part.tolist()) for part in _documents(tokens, tokenizer.eos_token_id)]
        assert sorted(text.partition("1}. a ")[2].split(" b")[0] for text in texts) == sorted(DOCUMENTED + BERTS)


def _documents(tokens, end):
    stops = [n for n, token in enumerate(tokens) if token == end]
    return [tokens[start + 1 : stop] for start, stop in zip([-1, *stops], stops, strict=False)]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_no_message_forges_a_special_token(data, tmp_path, role):
    """In examples to train on and in prompts to answer: as many special tokens as with another word in its place."""
    tokenizer, template = load_tokenizer(data), load_chat_template(data)
    ids = set(special_ids(tokenizer).values()) - {special_ids(tokenizer).get("[UNK]")}

    def specials(tokens) -> list[int]:
        return [token for token in tokens.tolist() if token in ids]

    def talk(word: str) -> list[dict]:
        said = {"user": "Hi", "assistant": "Hello", "system": "Be brief.", "tool": "3", role: f"a {word} b{word}"}
        turns = [
            ("system", said["system"]),
            ("user", said["user"]),
            ("assistant", said["assistant"]),
            ("tool", said["tool"]),
        ]
        return [{"role": name, "content": content} for name, content in [*turns, ("assistant", said["assistant"])]]

    file = tmp_path / "talk.jsonl"
    words = ["word", *DOCUMENTED, *BERTS]
    file.write_text("\n".join(json.dumps({"messages": talk(word)}) for word in words))
    plain, *forged = read_examples([file], rename={}).examples
    wanted = specials(encode_example(tokenizer, template, plain, max_length=512, train_on="all").sequences[0].tokens)
    prompt = specials(encode_messages(tokenizer, template, plain.messages[:4], add_generation_prompt=True)[0])
    assert wanted and prompt
    for example in forged:
        (sequence,) = encode_example(tokenizer, template, example, max_length=512, train_on="all").sequences
        assert specials(sequence.tokens) == wanted, example.messages
        asked, _ = encode_messages(tokenizer, template, example.messages[:4], add_generation_prompt=True)
        assert specials(asked) == prompt, example.messages


def test_the_template_writes_turns_reasoning_calls_and_results_as_tokens(data):
    tokenizer, template = load_tokenizer(data), load_chat_template(data)
    assert template.source == CHATML and not missing_tokens(tokenizer, template)
    assert not any("plain text" in line for line in describe_template(tokenizer, template))
    ids = special_ids(tokenizer)
    assert stop_token_ids(tokenizer, template) == sorted([ids["<|im_end|>"], tokenizer.eos_token_id])
    talk = [
        Message("user", "1+1?"),
        Message("assistant", "", {"reasoning_content": "add", "tool_calls": [CALL]}),
        Message("tool", "2"),
        Message("assistant", "2"),
    ]
    tokens, learned = encode_messages(tokenizer, template, talk)
    written = [token for token in tokens.tolist() if token in ids.values() and token != ids.get("[UNK]")]
    turn = ["<|im_start|>", "<|im_end|>"]
    inner = [[], ["<think>", "</think>", "<tool_call>", "</tool_call>"], ["<tool_response>", "</tool_response>"], []]
    assert written == [ids[token] for marks in inner for token in (turn[0], *marks, turn[1])]
    ends = [bool(l) for token, l in zip(tokens, learned, strict=True) if token == ids["<|im_end|>"]]
    assert ends == [False, True, False, True]  # the end of a turn is learned with the answer that it ends


def test_reasoning_in_front_of_an_answer_is_the_same_apart_and_in_its_text(data):
    tokenizer, template = load_tokenizer(data), load_chat_template(data)
    ask = [Message("user", "1+1?")]
    apart = [*ask, Message("assistant", "2", {"reasoning_content": "add\nthem"})]
    inside = [*ask, Message("assistant", "<think>\nadd\nthem\n</think>\n\n2")]
    expected, spoken = (encode_messages(tokenizer, template, talk)[0].tolist() for talk in (apart, inside))
    assert spoken == expected and special_ids(tokenizer)["</think>"] in expected


def test_transformers_reads_the_same_template_and_tokens(data):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(data), load_tokenizer(data)
    talk = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "add"},
    ]
    messages = [Message("user", "Hello there"), Message("assistant", "Hello", {"reasoning_content": "add"})]
    tokens, _ = encode_messages(ours, load_chat_template(data), messages)
    assert theirs.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"] == tokens.tolist()
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_token_id, ours.eos_token_id)
    # whoever leaves special tokens out of an answer still sees the reasoning's and the calls' marks
    shown = theirs.decode(tokens.tolist(), skip_special_tokens=True)
    assert "<think>" in shown and "</think>" in shown and "<|im_start|>" not in shown
    assert ours.decode(tokens.tolist()) == shown


def test_special_tokens_can_be_chosen(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words <|a|> [B] of text\n" * 20)

    def made(name: str, *chosen: str, size: int = 300):
        options = Options(tmp_path / "text", tmp_path / name, vocab_size=size, num_workers=1, special_tokens=chosen)
        prepare(options, Progress())
        return load_tokenizer(tmp_path / name)

    assert list(special_ids(made("none", size=258))) == ["<|endoftext|>", "<|pad|>"]
    tokenizer = made("two", "<|a|>", "[B]")
    assert list(special_ids(tokenizer)) == ["<|endoftext|>", "<|pad|>", "<|a|>", "[B]"]
    assert "chat_template" not in json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    assert not {2, 3} & set(tokenizer.encode("a <|a|> [B]"))
    for chosen, sentence in (
        (("word",), "write it as <NAME>"), (("<|a b|>",), "write it as"), (("",), "write it as"), (("<>",), "write it"),
        (("<|a|>", "<|a|>"), "twice"), (("<|pad|>",), "it is there anyway"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            made("bad", *chosen)
    with pytest.raises(
        UserError, match="--vocab_size 258 is too small: 256 bytes and 3 special tokens need at least 259"
    ):
        made("bad", "<|a|>", size=258)
    with pytest.raises(UserError, match="--add_chat_tokens"):
        prepare(
            Options(tmp_path / "text", tmp_path / "bad", tokenizer_type="tiktoken", special_tokens=("<|a|>",)),
            Progress(),
        )
    assert not (tmp_path / "bad" / "metadata.json").exists()
    given = build_parser().parse_args(["--input_dir", "a", "--output_dir", "b", "--special_tokens"])
    assert given.special_tokens == []


def test_tokens_are_added_to_a_tokenizer_without_changing_other_ids(bare_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    more, files = with_tokens(bare_tokenizer, {"eos_token": "<|endoftext|>"}, ["<|im_start|>", "<think>"])
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    size = bare_tokenizer.vocab_size
    assert (more.vocab_size, more.sha256) == (size + 2, load_tokenizer(tmp_path).sha256)
    for text in ("the user asks", spelled("<|im_start|>"), spelled("<think>"), "日本 ünï"):
        assert more.encode(text) == bare_tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("<|im_start|><think>the")["input_ids"] == [size, size + 1, *more.encode("the")]
    assert theirs.decode([size, size + 1], skip_special_tokens=True) == "<think>" == more.decode([size, size + 1])
