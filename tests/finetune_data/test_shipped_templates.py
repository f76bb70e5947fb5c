"""Is each answer of a dialogue learned as it would be generated, with the templates that models really ship?

The templates are those of the installed trl, of some thirty families; what would be asked and answered is rendered by
transformers. Of a template that marks its answers, transformers' assistant mask is the truth.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dataprep.tokenizers import Tokenizer, bytes_to_characters
from finetune_data.chat_template import ChatTemplate
from finetune_data.encoding_examples import encode_example
from finetune_data.examples import read_examples

trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

FOLDER = Path(trl.__file__).parent / "chat_templates"
OF_IMAGES = ("_vl", "llava", "idefics", "smolvlm")
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not any(word in path.stem for word in OF_IMAGES))
MARKED = [name for name in NAMES if re.search(r"\{%-?\s*generation", (FOLDER / f"{name}.jinja").read_text("utf-8"))]
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
_LOOKS_SPECIAL = re.compile(
    r"<[|｜][^|｜<>\s'\"]+[|｜]>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn)>|<\|?turn\|?>"
)

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"x": {"type": "integer", "description": "one"}}, "required": ["x"]}}}]  # fmt: skip


def talk(*said: str | dict) -> list[dict]:
    """Messages: texts are the user's and the assistant's in turn; whatever else is given as it is."""
    return [
        one if isinstance(one, dict) else {"role": ("user", "assistant")[n % 2], "content": one}
        for n, one in enumerate(said)
    ]


def calling(arguments: object) -> list[dict]:
    call = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return talk(
        "1+1?",
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "call00001", "name": "add"},
        "It is 2.",
    )


def thinking(content: str, reasoning: str) -> dict:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


DIALOGUES = {
    "one turn": talk("Hi", "Hello"),
    "three turns": talk("Hi", "Hello", "And?", "Well", "So?", "Done"),
    "system": [{"role": "system", "content": "Be brief."}, *talk("Hi", "Hello")],
    "tools": calling({"x": 1}),
    "tools, arguments as text": calling('{"x": 1}'),
    "reasoning in an earlier turn": talk("Hi", thinking("Hello", "greet them"), "And?", "Well"),
    "reasoning in the last turn": talk("Hi", "Hello", "And?", thinking("Well", "say it")),
    "reasoning in both": talk("Hi", thinking("Hello", "greet them"), "And?", thinking("Well", "say it")),
    "two assistants in a row": [*talk("Hi", "Hello"), {"role": "assistant", "content": "More"}],
}


@pytest.fixture(scope="module")
def made():
    """(our tokenizer, transformers' with the same ids and the template) of a template's name, made once."""
    known = {}

    def get(name: str) -> tuple[Tokenizer, ChatTemplate, transformers.PreTrainedTokenizerFast]:
        if name not in known:
            source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
            alphabet = {character: index for index, character in enumerate(bytes_to_characters().values())}
            inner = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
            inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            inner.decoder = tokenizers.decoders.ByteLevel()
            special = [*ROLES.values(), *sorted(set(_LOOKS_SPECIAL.findall(source)))]
            inner.add_special_tokens(
                [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
            )
            ours = Tokenizer(json.loads(inner.to_str()), ROLES, path=Path("tokenizer.json"), sha256="")
            theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=source, **ROLES)
            known[name] = ours, ChatTemplate(name, source, special_tokens=ROLES), theirs
        return known[name]

    return get


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Each dialogue as it is read from a file."""
    file = tmp_path_factory.mktemp("dialogues") / "all.jsonl"
    rows = [
        {"messages": messages, **({"tools": TOOLS} if "tools" in name else {})} for name, messages in DIALOGUES.items()
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return dict(zip(DIALOGUES, read_examples([file], rename={}).examples, strict=True))


def as_transformers_has_them(name: str, source: str) -> list[dict]:
    """The messages with calls as objects, or spelled where the template reads none, and reasoning under each of its names."""
    messages = json.loads(json.dumps(DIALOGUES[name]))
    for message in messages:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if "tool_calls" not in source and "tool_calls" in message:
            message["content"] = "".join(json.dumps(call["function"]) for call in message.pop("tool_calls"))
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
    return messages


def rendered(theirs, messages: list[dict], tools: list | None, ask: bool) -> str | None:
    """What transformers writes; None where the template refuses."""
    try:
        return theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    except Exception:  # whatever a template raises
        return None


def learned_runs(tokenizer: Tokenizer, sequence) -> list[tuple[str, str]]:
    """(the text before it, its text) of each run of learned tokens."""
    edges = [0, *(np.flatnonzero(np.diff(sequence.learned)) + 1).tolist(), len(sequence.tokens)]
    texts = [
        tokenizer.decode(sequence.tokens[start:stop].tolist(), skip_special=False) for start, stop in pairwise(edges)
    ]
    return [("".join(texts[:n]), text) for n, text in enumerate(texts) if sequence.learned[edges[n]]]


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in MARKED])
def test_each_answer_is_learned_once_as_it_would_be_generated(name, dialogue, made, examples):
    tokenizer, template, theirs = made(name)
    messages, tools = as_transformers_has_them(dialogue, template.source), examples[dialogue].tools
    encoded = encode_example(tokenizer, template, examples[dialogue], max_length=10**5)
    if rendered(theirs, messages, tools, False) is None:
        assert not encoded.sequences and "refuses the messages" in encoded.dropped
        return
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    asked = {n: rendered(theirs, messages[:n], tools, True) for n in turns}
    written = {n: rendered(theirs, messages[: n + 1], tools, False) for n in turns}
    strange = [n for n in turns if asked[n] is None or written[n] is None or not written[n].startswith(asked[n])]
    if strange:  # no text begins with what is asked and goes on with this answer
        assert not encoded.sequences
        assert re.search(r"does not write message (\d+) of a dialogue as it would be asked for", encoded.dropped)[
            1
        ] in {str(n + 1) for n in strange}
        return
    left = set(turns)
    for sequence in encoded.sequences:
        for before, text in learned_runs(tokenizer, sequence):
            (n,) = [n for n in left if asked[n] == before]
            answer = written[n][len(before) :]
            is_end = len(before + text) == len(tokenizer.decode(sequence.tokens.tolist(), skip_special=False))
            if is_end and not answer.rstrip().endswith((">", ROLES["eos_token"])):
                answer = (
                    answer.rstrip() + ROLES["eos_token"]
                )  # no token of the template ends it, so the end of text does
            assert answer.startswith(text) and answer[len(text) :].strip() in ("", ROLES["eos_token"])
            assert messages[n]["content"] in text and text.strip()
            left.remove(n)
    assert not left
    assert encoded.by_answer == (len(encoded.sequences) > 1)
    whole = written[turns[-1]]
    shown = all(whole.startswith(asked[n] + written[n][len(asked[n]) :].rstrip()) for n in turns)
    assert shown <= (len(encoded.sequences) == 1)  # what one text can show is one sequence


def test_every_training_variant_is_marked():
    assert {name for name in NAMES if name.endswith("_training")} <= set(MARKED)


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", MARKED)
def test_marked_answers_are_those_of_transformers_mask(name, dialogue, made, examples):
    """But for a header in front that the prompt for the answer writes, and the token that ends the turn behind it."""
    tokenizer, template, theirs = made(name)
    messages, tools = as_transformers_has_them(dialogue, template.source), examples[dialogue].tools
    encoded = encode_example(tokenizer, template, examples[dialogue], max_length=10**5)
    if rendered(theirs, messages, tools, False) is None:
        assert not encoded.sequences and "refuses the messages" in encoded.dropped
        return
    truth = theirs.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )  # fmt: skip
    (sequence,) = encoded.sequences
    assert sequence.tokens.tolist()[: len(truth["input_ids"])] == truth["input_ids"]
    wanted = np.array(truth["assistant_masks"], bool)
    found = sequence.learned[: len(wanted)]
    assert wanted.any() and found.any()
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [rendered(theirs, messages[:n], tools, True) for n in turns]

    def text(places: np.ndarray) -> list[str]:
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        return [tokenizer.decode(sequence.tokens[run].tolist(), skip_special=False) for run in runs if len(run)]

    for missing in text(np.flatnonzero(wanted & ~found)):
        assert not missing.strip() or any(prompt and prompt.endswith(missing) for prompt in prompts)
    for more in text(np.flatnonzero(found & ~wanted)):
        assert more.strip() in tokenizer.special_tokens
