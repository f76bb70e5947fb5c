"""How do the files that people have become examples to fine-tune on, whatever their columns are called?

    kind         columns of a row
    chat         messages, or ShareGPT's conversations [tools, system]; prompt + completion;
                 instruction + output [input, system, history] (alpaca), or instruction + instances (self-instruct)
    preference   chosen + rejected, and prompt (or question, instruction, conversations, messages) unless both are whole
                 transcripts; chosen_messages + rejected_messages
    labelled     label beside a chat's columns; its answer is the last message, or the completion
    prompt       prompt, question or instruction, and any other columns (which rewards may want)
    text         text

The first rows decide, by their columns. A string that is a prompt becomes a user's turn, one that is an answer an
assistant's. Messages may be OpenAI's (role, content as a string or as parts of type text, tool_calls) or ShareGPT's
(from, value, function_call, observation). A `weight` or `loss_weight` of 0 keeps an assistant's turn from being learned.
A row that is wrong is left out, counted, and named in the report. "{{name}}" and the like stay as they are.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError
from finetune_data.example_files import read_rows, strings_in, type_in_words

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")  # whose value is the JSON of a call
_PROMPT_COLUMNS = ("prompt", "question", "instruction")
_ANSWER_COLUMNS = ("completion", "output")
_MESSAGE_COLUMNS = ("messages", "conversations")
_MEDIA_COLUMNS = ("images", "image", "videos", "audios")
_DETECTION_ROWS = 20  # a column may be empty in the first row
_NAMED_ROWS = 5  # of each reason
_HUMAN = re.compile(r"\n\n(Human|Assistant):")  # the transcripts of Anthropic's HH-RLHF


@dataclass(frozen=True)
class Message:
    """A turn. role: system, user, assistant or tool. extra: what else the template may read, such as tool_calls.

    trained: False keeps an assistant's turn from being a target.
    """

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """A row. kind says which fields are filled; columns are those of the row that none of them holds.

    chat: messages. labelled: messages, of which the trained are the answer, and label. text: text.
    preference: prompt, chosen, rejected, the answers beginning with an assistant's turn. prompt: prompt.
    """

    kind: str
    source: str  # "file:row", from 1
    messages: list[Message] = field(default_factory=list)
    prompt: list[Message] = field(default_factory=list)
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    text: str | None = None
    label: bool | None = None
    tools: list[dict[str, Any]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExampleSet:
    """All examples of some files, of one kind; what they were taken for; and sentences on what was read and left out."""

    examples: list[Example]
    format: str
    report: list[str]
    wrong_rows: int = 0

    @property
    def kind(self) -> str:
        return self.examples[0].kind


def read_examples(paths: Sequence[str | Path], *, rename: dict[str, str] | None = None) -> ExampleSet:
    """The examples of files (.json, .jsonl, .csv, .tsv, each also .gz, and .parquet), in their order.

    rename: {their column: the column it is to us}. UserError for a file that cannot be read, whose columns are not those
    of any kind, or without one right row, and for files of different kinds.
    """
    examples: list[Example] = []
    formats: list[str] = []
    report: list[str] = []
    wrong_rows = 0
    for path in map(Path, paths):
        found = _read_file(path, rename or {})
        if examples and found.kind != examples[0].kind:
            raise UserError(
                f"{path} holds {found.kind} examples ({found.format}), but the files before it {examples[0].kind} "
                f"examples ({formats[0]}); give files of one kind together"
            )
        examples += found.examples
        formats += [found.format] if found.format not in formats else []
        report += found.report
        wrong_rows += found.wrong_rows
    if not examples:
        raise UserError("no file of examples is named; name at least one")
    return ExampleSet(examples, "; ".join(formats), report, wrong_rows)


class _WrongRowError(Exception):
    """Why a row is no example, in a few words."""


@dataclass(frozen=True)
class _Format:
    """What a file's rows are. convert: row -> examples of it, without source and columns."""

    name: str
    used: tuple[str, ...]  # columns that end up in an example's other fields
    convert: Callable[[dict[str, Any]], list[Example]]


def _read_file(path: Path, rename: dict[str, str]) -> ExampleSet:
    rows = read_rows(path)
    good = [row for _, row in rows if isinstance(row, dict)]
    if not good:
        first = f"; row {rows[0][0]} is {rows[0][1]}" if rows else ""
        raise UserError(f"{path} holds no row with columns{first}")
    known = {column for row in good for column in row}
    if missing := [column for column in rename if column not in known]:
        raise UserError(f"{path} has no column {missing[0]} to rename; it has {', '.join(sorted(known))}")
    detected = _detect(path, [_renamed(row, rename) for row in good[:_DETECTION_ROWS]])
    examples: list[Example] = []
    wrong: dict[str, list[int]] = {}  # reason -> rows
    for number, row in rows:
        try:
            if isinstance(row, str):
                raise _WrongRowError(row)
            row = _renamed(row, rename)
            _check_row(row)
            columns = {name: value for name, value in row.items() if name not in detected.used}
            made = [
                replace(example, source=f"{path}:{number}", columns=columns, tools=_tools(row))
                for example in detected.convert(row)
            ]
        except _WrongRowError as reason:
            wrong.setdefault(str(reason), []).append(number)
        else:
            examples += made
    count = sum(map(len, wrong.values()))
    left_out = "; ".join(f"{len(numbers)} x {reason} ({_named(path, numbers)})" for reason, numbers in wrong.items())
    if not examples:
        raise UserError(f"{path}, read as {detected.name}, has no right row: {left_out}")
    report = [f"{path}: {len(examples)} examples of kind {examples[0].kind}, read as {detected.name}"]
    if count:
        report.append(f"{path}: {count} of {len(rows)} rows are wrong and left out: {left_out}")
    return ExampleSet(examples, detected.name, report, count)


def _named(path: Path, numbers: list[int]) -> str:
    first = ", ".join(f"{path.name}:{number}" for number in numbers[:_NAMED_ROWS])
    return first + (", ..." if len(numbers) > _NAMED_ROWS else "")


def _renamed(row: dict[str, Any], rename: dict[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if name not in rename}
    return kept | {ours: row[theirs] for theirs, ours in rename.items() if theirs in row}


def _check_row(row: dict[str, Any]) -> None:
    for column in _MEDIA_COLUMNS:
        if row.get(column):
            raise _WrongRowError(f"it has {column}, and only text can be learned")
    for text in strings_in(row):
        if any("\ud800" <= character <= "\udfff" for character in ("" if text.isascii() else text)):
            raise _WrongRowError("lone surrogates, which are not text")


# ---- what a file's rows are ------------------------------------------------------------------------------------------


def _detect(path: Path, rows: Iterable[dict[str, Any]]) -> _Format:
    """The format whose columns the first rows have. UserError, naming the columns, when there is none."""
    columns = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    dialogue = _first_of(_MESSAGE_COLUMNS, columns)
    prompt = _first_of(_PROMPT_COLUMNS, columns)
    answer = _first_of(_ANSWER_COLUMNS, columns)
    asked = (prompt, "system", "history", "tools", *(("input",) if prompt == "instruction" else ()))
    if "chosen_messages" in columns and "rejected_messages" in columns:
        used = ("chosen_messages", "rejected_messages", "tools")
        return _Format(_words("preference pairs", used, columns), used, _from_transcripts)
    if "chosen" in columns and "rejected" in columns:
        used = ("chosen", "rejected", *asked, *_MESSAGE_COLUMNS)
        return _Format(
            _words("preference pairs", used, columns), used, lambda row: _from_preference(row, prompt or dialogue)
        )
    if dialogue:
        labelled = "label" in columns
        used = (dialogue, "system", "tools", *(("label",) if labelled else ()))
        what = {"messages": "messages", "conversations": "ShareGPT conversations"}[dialogue]
        name = _words(what + " with a label" * labelled, used, columns)
        return _Format(name, used, lambda row: _from_dialogue(row, dialogue, labelled))
    if prompt and answer:
        labelled = "label" in columns
        used = (*asked, answer, *(("label",) if labelled else ()))
        what = "alpaca" if prompt == "instruction" else "prompts and completions"
        name = _words(what + " with a label" * labelled, used, columns)
        return _Format(name, used, lambda row: _from_completion(row, prompt, row.get(answer), answer, labelled))
    if "instruction" in columns and "instances" in columns:
        used = (*asked, "instances", "output")
        return _Format(_words("self-instruct tasks", used, columns), used, _from_instances)
    if prompt:
        name = _words("prompts", asked, columns) + " and " + _words("the columns", columns, columns.keys() - set(asked))
        return _Format(name, asked, lambda row: _from_prompt(row, prompt))
    if "text" in columns:
        return _Format(_words("texts", ("text",), columns), ("text",), _from_text)
    raise UserError(
        f"{path} has the columns {', '.join(columns)}, which are of no known kind; rename them to messages, conversations, "
        "prompt and completion, instruction and output, prompt, chosen and rejected, prompt, or text"
    )


def _words(what: str, used: Iterable[str | None], columns: Iterable[str]) -> str:
    """Such as "alpaca (instruction, output)"."""
    named = [column for column in dict.fromkeys(used) if column is not None and column in columns]
    return f"{what} ({', '.join(named)})" if named else what + " (none)"


def _first_of(names: Iterable[str], columns: Iterable[str]) -> str | None:
    return next((name for name in names if name in columns), None)


# ---- rows to examples ------------------------------------------------------------------------------------------------


def _from_dialogue(row: dict[str, Any], column: str, labelled: bool) -> list[Example]:
    messages = _messages(row, column)
    if row.get("system") and messages[0].role != "system":
        messages = [Message("system", _text(row, "system")), *messages]
    if labelled:
        if messages[-1].role != "assistant":
            raise _WrongRowError("the last message is not an assistant's, so there is no answer to label")
        messages = [replace(message, trained=False) for message in messages[:-1]] + messages[-1:]
    return [_chat(messages, _label(row) if labelled else None)]


def _from_completion(row: dict[str, Any], prompt: str, answer: Any, column: str, labelled: bool) -> list[Example]:
    asked = [replace(message, trained=False) for message in _prompt(row, prompt)]
    return [_chat([*asked, *_answer(answer, column)], _label(row) if labelled else None)]


def _from_instances(row: dict[str, Any]) -> list[Example]:
    instances = row.get("instances")
    if (
        not isinstance(instances, list)
        or not all(isinstance(instance, dict) for instance in instances)
        or not instances
    ):
        raise _WrongRowError("instances is not a list of objects")
    made = []
    for instance in instances:
        one = {**row, **instance}
        made += _from_completion(one, "instruction", one.get("output"), "output", labelled=False)
    return made


def _chat(messages: list[Message], label: bool | None) -> Example:
    """A chat, or with a label a labelled one, whose trained answers are there and say something."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise _WrongRowError("no assistant turn")
    for answer in answers:
        _check_answer(answer)
    return Example("chat" if label is None else "labelled", "", messages=messages, label=label)


def _check_answer(message: Message) -> None:
    said = message.content.strip() or message.extra.get("tool_calls")
    if message.role == "assistant" and message.trained and not said:
        raise _WrongRowError("empty answer")


def _from_prompt(row: dict[str, Any], column: str) -> list[Example]:
    prompt = _prompt(row, column)
    if prompt[-1].role == "assistant":
        raise _WrongRowError("the prompt ends with an assistant's turn")
    return [Example("prompt", "", prompt=prompt)]


def _from_text(row: dict[str, Any]) -> list[Example]:
    text = _text(row, "text")
    if not text.strip():
        raise _WrongRowError("empty text")
    return [Example("text", "", text=text)]


def _from_transcripts(row: dict[str, Any]) -> list[Example]:
    return [_split_transcripts(_messages(row, "chosen_messages"), _messages(row, "rejected_messages"))]


def _from_preference(row: dict[str, Any], prompt: str | None) -> list[Example]:
    chosen, rejected = _answer(row.get("chosen"), "chosen"), _answer(row.get("rejected"), "rejected")
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        return [_split_transcripts(chosen, rejected)]  # whole ones; a prompt beside them says the same again
    if prompt is None:
        raise _WrongRowError("no prompt, and chosen and rejected are no transcripts")
    asked = _messages(row, prompt) if prompt in _MESSAGE_COLUMNS else _prompt(row, prompt)
    if row.get("system") and asked[0].role != "system":
        asked = [Message("system", _text(row, "system")), *asked]
    return [_preference(asked, chosen, rejected)]


def _split_transcripts(chosen: list[Message], rejected: list[Message]) -> Example:
    """The prompt is what both begin with, up to a turn of the assistant in both."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise _WrongRowError("chosen and rejected are the same")
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared and not chosen[shared].role == rejected[shared].role == "assistant":
        shared -= 1
    if not shared:
        raise _WrongRowError("chosen and rejected do not begin with the same prompt")
    return _preference(chosen[:shared], chosen[shared:], rejected[shared:])


def _preference(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Example:
    for message in (*chosen, *rejected):
        _check_answer(message)
    if chosen == rejected:
        raise _WrongRowError("chosen and rejected are the same")
    prompt = [replace(message, trained=False) for message in prompt]
    return Example("preference", "", prompt=prompt, chosen=chosen, rejected=rejected)


# ---- parts of a row --------------------------------------------------------------------------------------------------


def _prompt(row: dict[str, Any], column: str) -> list[Message]:
    """The messages before an answer: a list as it is, or a string as the user's, with system and history before it."""
    value = _present(row, column)
    if isinstance(value, list):
        return _messages(row, column)
    text = _text(row, column)
    if transcript := _transcript(text):
        return transcript[:-1] if transcript[-1].role == "assistant" and not transcript[-1].content else transcript
    if column == "instruction":  # alpaca's second part
        text = "\n\n".join(part for part in (text, _text(row, "input") if row.get("input") else "") if part.strip())
    if not text.strip():
        raise _WrongRowError("empty prompt")
    before = [Message("system", _text(row, "system"))] if row.get("system") else []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise _WrongRowError("history is not a list of pairs of texts")
        before += [Message("user", pair[0]), Message("assistant", pair[1])]
    return [*before, Message("user", text)]


def _answer(value: Any, column: str) -> list[Message]:
    """An answer's messages: from a string, a message, a list of messages, or a transcript."""
    if value is None:
        raise _WrongRowError(f"no {column}")
    if isinstance(value, list):
        return _messages({column: value}, column)
    if isinstance(value, dict):
        return [_message(value)]
    if not isinstance(value, str):
        raise _WrongRowError(f"{column} is {type_in_words(value)}, not text")
    return _transcript(value) or [Message("assistant", value)]


def _transcript(text: str) -> list[Message]:
    """The messages of a text such as "\\n\\nHuman: Hi\\n\\nAssistant: Hello"; none of any other text."""
    if not _HUMAN.match(text):
        return []
    parts = _HUMAN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _messages(row: dict[str, Any], column: str) -> list[Message]:
    value = _present(row, column)
    if not isinstance(value, list):
        raise _WrongRowError(f"{column} is {type_in_words(value)}, not a list of messages")
    if not value:
        raise _WrongRowError(f"{column} is an empty list")
    return [_message(message) for message in value]


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _WrongRowError(f"a message is {type_in_words(value)}, not an object")
    said_by = value.get("role") or value.get("from")
    role = _ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise _WrongRowError("a message without a role" if said_by is None else f"unknown role {said_by!r}")
    known = ("role", "from", "content", "value", "weight", "loss_weight", "tool_calls", "function_call")
    extra = {name: inner for name, inner in value.items() if name not in known and inner is not None}
    content = value["content"] if value.get("content") is not None else value.get("value")
    calls = value.get("tool_calls") or ([value["function_call"]] if value.get("function_call") else None)
    if said_by in _CALL_ROLES:
        calls, content = _parsed_calls(content), ""
    if calls:
        extra["tool_calls"] = _tool_calls(calls)
    if content is None and not calls:
        raise _WrongRowError("a message without content")
    return Message(role, _content(content), extra, trained=_trained(value, role))


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(map(_part, content))
    if not isinstance(content, str | None):
        raise _WrongRowError(f"the content of a message is {type_in_words(content)}, not text")
    return content or ""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type_in_words(part)
    text = part.get("text", part.get("value")) if kind == "text" else None
    if not isinstance(text, str):
        raise _WrongRowError(f"a part of type {kind}, and only text can be learned")
    return text


def _trained(message: dict[str, Any], role: str) -> bool:
    weight = message.get("weight", message.get("loss_weight"))
    if role != "assistant" or weight is None:
        return True
    if weight not in (0, 1):
        raise _WrongRowError(f"a message's weight is {weight!r}; only 0 (not learned) and 1 are known")
    return bool(weight)


def _parsed_calls(content: Any) -> list[Any]:
    """The calls in the value of a function_call turn: the JSON of one, or of a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        raise _WrongRowError("a function call that is not JSON") from None
    return calls if isinstance(calls, list) else [calls]


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Calls as templates read them: {"type": "function", "function": {"name", "arguments"}}, arguments parsed."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _WrongRowError("a function call without a name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):  # OpenAI's are a string of JSON, which the model that wrote it may have broken
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise _WrongRowError("a function call whose arguments are not JSON") from None
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        made.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools column: a list of functions, or its JSON, each wrapped as templates expect it."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    except ValueError:
        raise _WrongRowError("tools is not JSON") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _WrongRowError("tools is not a list of functions")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _label(row: dict[str, Any]) -> bool:
    value = _present(row, "label")
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).strip().lower() not in known:
        raise _WrongRowError(f"label is {value!r}, neither true nor false")
    return known[str(value).strip().lower()]


def _present(row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise _WrongRowError(f"no {column}")
    return row[column]


def _text(row: dict[str, Any], column: str) -> str:
    value = _present(row, column)
    if not isinstance(value, str):
        raise _WrongRowError(f"{column} is {type_in_words(value)}, not text")
    return value
