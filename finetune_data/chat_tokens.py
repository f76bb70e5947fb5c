"""Which token ids does a dialogue become, and which of them does a model learn to write?

The text that a chat template renders is cut where an answer begins and where it ends, and each segment is tokenised on
its own. So the mask is exact by construction, and a prompt has the same ids when it is trained on and when it is answered:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello<|im_end|> | \\n
    prompt: what the template writes for messages[:i]          answer, learned     the rest
    with add_generation_prompt=True                            with its end

An answer is what the template writes for messages[:i + 1] behind that prompt, up to the last special token if nothing
but space follows it. Where the text of the whole dialogue shows an answer otherwise (Qwen3's template leaves out earlier
reasoning), the dialogue becomes several sequences, each rendered up to an answer (`encode_answers`). Where the template
marks answers ({% generation %}), the marks say what is learned, and the token behind a mark that ends the turn with it.
Special tokens that the template writes become special ids. Spelled in a message they stay text.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from dataprep.special_tokens import MARKS
from dataprep.tokenizers import Tokenizer, pre_tokenizer_steps, without_special_tokens
from errors import UserError
from finetune_data.chat_template import BEGIN, END, ChatTemplate, RefusedMessagesError
from finetune_data.example_files import strings_in
from finetune_data.examples import Message

TRAIN_ON = ("assistant", "last", "all")

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SAMPLE = [Message("user", "Hi"), Message("assistant", "Hello")]
_REASONING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)
_SPECIAL_LOOKING = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>")


class UnmaskableMessagesError(UserError):
    """It cannot be told which text of a rendered dialogue is an answer, or none is."""


class OneRenderingError(UnmaskableMessagesError):
    """The text of the whole dialogue does not show each answer as it would be asked for."""


def encode_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    train_on: str = "assistant",
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (n,) int64, learned (n,) bool) of a dialogue. See the file's docstring for the cuts.

    train_on: "assistant" learns the answers of all messages whose `trained` is True, "last" of the last assistant's
    message, "all" every token. With add_generation_prompt it is a prompt, of which nothing is learned.
    UserError where the template refuses the messages, or does not tell what is an answer, or nothing is learned.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on is {train_on!r}, not one of {', '.join(TRAIN_ON)}")
    dialogue = _prepare(tokenizer, template, messages, tools)
    layout = _lay_out(dialogue, len(messages), add_generation_prompt)
    if add_generation_prompt:
        return _encode(dialogue, layout, None)
    if train_on == "all":
        return _encode(dialogue, layout, [(0, len(layout.text))])
    return _encode(dialogue, layout, _learned_spans(dialogue, layout, train_on))


def encode_answers(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    train_on: str = "assistant",
    tools: list[dict[str, Any]] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(tokens, learned)] of a dialogue, in which each answer is learned once, as it will be asked for.

    One pair, that of `encode_messages`, where one rendering shows every answer so. Many templates write an answer otherwise
    once more turns follow, as those that leave out earlier reasoning do: then the dialogue is rendered up to its last answer,
    up to the last one that this does not show, and so on; pairs are in the order of their last answers. Raises as
    `encode_messages`, where an answer is not even the last one as it is asked for.
    """
    try:
        return [encode_messages(tokenizer, template, messages, train_on=train_on, tools=tools)]
    except OneRenderingError:
        dialogue = _prepare(tokenizer, template, messages, tools)
    turns = _turns(dialogue.dicts)
    left = _wanted(turns, messages, train_on)
    pairs = []
    while left:
        layout = _lay_out(dialogue, turns[max(left)] + 1, False)
        spans = _spans_by_answer(layout, left)
        if max(left) not in spans:
            raise UnmaskableMessagesError(_why_not(dialogue, layout, turns[max(left)]))
        pairs.append(_encode(dialogue, layout, [span for place in sorted(spans) for span in spans[place]]))
        left -= spans.keys()
    return pairs[::-1]


def _with_reasoning_apart(message: Message) -> Message:
    """The reasoning that an answer begins with as the template is to see it: spelled in the content it would stay text."""
    found = _REASONING.fullmatch(message.content) if message.role == "assistant" else None
    if found is None or message.extra.get("reasoning_content") is not None:
        return message
    return replace(message, content=found[2], extra={**message.extra, "reasoning_content": found[1]})


def end_of_turn_id(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The id of the special token that the template writes behind an answer; None if it writes text or nothing."""
    encoder = _encoder(tokenizer, tuple(template.special_tokens.values()))
    found = encoder.pattern.match(template.end_of_turn)
    return encoder.ids[found.group()] if found else None


def stop_token_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The ids that end an answer: the end of a document, and the template's end of a turn where that is a token."""
    turn = end_of_turn_id(tokenizer, template)
    return sorted({tokenizer.eos_token_id, *(() if turn is None else (turn,))})


def missing_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """The special tokens and marks that the template writes, and the tokenizer does not have."""
    encoder = _encoder(tokenizer, tuple(template.special_tokens.values()))
    known = encoder.ids.keys() | {token["content"] for token in tokenizer.definition["added_tokens"]}
    written = _SPECIAL_LOOKING.findall(template.source)
    with contextlib.suppress(RefusedMessagesError):
        written += _SPECIAL_LOOKING.findall(template.render(_SAMPLE[:1], add_generation_prompt=True))
        written += _SPECIAL_LOOKING.findall(template.render(_SAMPLE))
    written += [mark for mark in MARKS if mark in template.source or mark in (template.tool_source or "")]
    return [token for token in dict.fromkeys(written) if token not in known]


def describe_template(tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """Sentences for the user: which template it is, and what of it this tokenizer, or every tokenizer, cannot do."""
    lines = [f"chat template: {template.name}"]
    try:
        prompt, whole = template.render(_SAMPLE[:1], add_generation_prompt=True), template.render(_SAMPLE)
    except RefusedMessagesError as error:
        lines.append(str(error))
    else:
        if not whole.startswith(prompt):
            lines.append(
                "the template does not ask for an answer as it writes one: what is learned is not what is asked"
            )
    if missing := missing_tokens(tokenizer, template):
        ends = "" if end_of_turn_id(tokenizer, template) is not None else f", and {tokenizer.eos_token} ends a dialogue"
        lines.append(
            f"the tokenizer has no {', '.join(missing)}: the template's are encoded as plain text{ends} "
            "(--stage sft --add_chat_tokens makes tokens of them)"
        )
    if not template.reads("tools"):
        lines.append("the template does not write tools: where a dialogue has some, they are left out")
    if template.reads("strftime_now"):
        lines.append("the template writes the date of the day, so another day's tokens differ")
    return lines


# ---- where the answers are -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dialogue:
    """Messages as a template sees them, with stand-ins for what spells a special token. hidden: what these stand for."""

    template: ChatTemplate
    encoder: "_Encoder"
    messages: Sequence[Message]
    dicts: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    hidden: dict[str, str]


@dataclass(frozen=True)
class _Layout:
    """A rendered dialogue. turns: number of each assistant's message; answers: its (start, end) in the text or None.

    marked: the spans that the template marks, each with its place in `turns` or None, or None if it marks none at all.
    """

    text: str
    turns: list[int]
    answers: list[tuple[int, int] | None]
    marked: list[tuple[int, int, int | None]] | None
    cuts: set[int]


def _prepare(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], tools: list[dict[str, Any]] | None
) -> _Dialogue:
    encoder = _encoder(tokenizer, tuple(template.special_tokens.values()))
    if "<think>" in encoder.ids and template.reads("reasoning_content"):
        messages = [_with_reasoning_apart(message) for message in messages]
    seen = [template.variables(messages), tools if template.reads("tools") else None]
    (dicts, tools), hidden = encoder.hide(seen)
    return _Dialogue(template, encoder, messages, dicts, tools, hidden)


def _encode(
    dialogue: _Dialogue, layout: _Layout, learned: list[tuple[int, int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, learned) of a rendering, of which these spans are learned; None for a prompt. Raises where nothing would be."""
    cuts = sorted({0, len(layout.text), *layout.cuts})
    segments = [
        (layout.text[start:end], any(first <= start and end <= last for first, last in learned or ()))
        for start, end in pairwise(cuts)
    ]
    tokens, mask = dialogue.encoder.encode(segments, dialogue.hidden)
    if learned is not None and not mask[1:].any():
        raise UnmaskableMessagesError(
            f"the chat template {dialogue.template.name} gives no token to learn for these messages; check that an "
            "assistant's message is among them, and that the template writes its content"
        )
    return tokens, mask


def _turns(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _wanted(turns: list[int], messages: Sequence[Message], train_on: str) -> set[int]:
    """The places in `turns` of the answers to learn."""
    wanted = {place for place, turn in enumerate(turns) if messages[turn].trained}
    return wanted & {len(turns) - 1} if train_on == "last" else wanted


def _lay_out(dialogue: _Dialogue, stop: int, add_generation_prompt: bool) -> _Layout:
    """Render the messages before `stop`, and find the answers. Cuts before a point of the text depend on nothing behind it."""
    template, encoder, tools, messages = dialogue.template, dialogue.encoder, dialogue.tools, dialogue.dicts[:stop]
    rendered = template.render_marked(messages, tools, add_generation_prompt)
    text = rendered.replace(BEGIN, "").replace(END, "")
    turns = _turns(messages)
    starts = [_length_as_prefix(template, messages[:turn], tools, text) for turn in turns]
    answers = [
        None if start is None else _answer_span(template, encoder, messages[: turn + 1], tools, text, start)
        for turn, start in zip(turns, starts, strict=True)
    ]
    cuts = {point for point in starts if point is not None}
    cuts |= {answer[1] for answer in answers if answer is not None}
    marked: list[tuple[int, int, int | None]] | None = None
    if _MARK.search(template.tool_source if tools and template.tool_source else template.source):
        spans: list[tuple[int, int, int | None]] = []
        for start, end in _marked_spans(rendered):
            end = _end_of_answer(encoder, text, start, end)
            ended = any(found.end() == end for found in encoder.pattern.finditer(text, start, end))
            if not ended and (found := encoder.pattern.match(text, end)):  # the end of the turn behind the mark
                end = found.end()
            inside = [point for point in starts if point is not None and start < point < end]
            start = max([start, *inside])  # a header that the generation prompt supplies is no target
            spans.append((start, end, None))
        marked = _with_owners(spans, starts)
        cuts |= {point for start, end, _ in marked for point in (start, end)}
    return _Layout(text, turns, answers, marked, cuts)


def _render_part(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str | None:
    """What the template writes for the beginning of a dialogue; None if it refuses, as many refuse no messages."""
    try:
        return template.render_marked(messages, tools, prompt).replace(BEGIN, "").replace(END, "")
    except RefusedMessagesError:
        return None


def _length_as_prefix(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, text: str) -> int | None:
    """The length of the prompt that these messages make, if the text begins with it."""
    prompt = _render_part(template, messages, tools, True)
    return len(prompt) if prompt is not None and text.startswith(prompt) else None


def _answer_span(
    template: ChatTemplate, encoder: "_Encoder", messages: list[dict[str, Any]], tools: Any, text: str, start: int
) -> tuple[int, int] | None:
    """Where the last of these messages lies in the text of the whole dialogue, if it is written there as it is alone."""
    part = _render_part(template, messages, tools, False)
    if part is None or len(part) < start:
        return None
    if text.startswith(part):
        return start, _end_of_answer(encoder, text, start, len(part))
    # some templates write more behind the end of the last turn, such as an end-of-text token: up to that end they agree
    pieces = zip(encoder.split(part), encoder.split(text), strict=False)
    agreed = sum(len(piece) for piece, _ in takewhile(lambda pair: pair[0] == pair[1], pieces))
    found = list(encoder.pattern.finditer(text, start, agreed))
    end_token = encoder.pattern.match(template.end_of_turn)
    if found and end_token and found[-1].group() == end_token.group() and not text[found[-1].end() : agreed].strip():
        return start, found[-1].end()
    return None


def _end_of_answer(encoder: "_Encoder", text: str, start: int, end: int) -> int:
    """Behind its last special token, unless there is none, or text follows it."""
    last = max((found.end() for found in encoder.pattern.finditer(text, start, end)), default=end)
    return end if text[last:end].strip() else last


def _marked_spans(rendered: str) -> Iterator[tuple[int, int]]:
    """Positions of marked answers in the text without marks; empty ones are left out."""
    position, start = 0, 0
    for piece in re.split(f"([{BEGIN}{END}])", rendered):
        if piece == BEGIN:
            start = position
        elif piece == END:
            if position > start:
                yield start, position
        else:
            position += len(piece)


def _with_owners(
    spans: list[tuple[int, int, int | None]], starts: list[int | None]
) -> list[tuple[int, int, int | None]]:
    """Each marked span with the place of the turn that it belongs to, where that can be told."""
    if len(spans) == len(starts):
        return [(start, end, place) for place, (start, end, _) in enumerate(spans)]
    known = [(point, place) for place, point in enumerate(starts) if point is not None]
    owners = [max((place for point, place in known if point < end), default=None) for _, end, _ in spans]
    complete = len(known) == len(starts)
    last = len(starts) - 1
    return [
        (start, end, owner if complete or owner == last else None)
        for (start, end, _), owner in zip(spans, owners, strict=True)
    ]


def _learned_spans(dialogue: _Dialogue, layout: _Layout, train_on: str) -> list[tuple[int, int]]:
    """The spans of the text of the whole dialogue to learn. OneRenderingError where it does not show every answer."""
    wanted = _wanted(layout.turns, dialogue.messages, train_on)
    if layout.marked is not None and len(wanted) == len(layout.turns):
        return [(start, end) for start, end, _ in layout.marked]
    spans = _spans_by_answer(layout, wanted)
    if not_shown := wanted - spans.keys():
        raise OneRenderingError(_why_not(dialogue, layout, layout.turns[min(not_shown)]))
    return [span for place in sorted(spans) for span in spans[place]]


def _spans_by_answer(layout: _Layout, wanted: set[int]) -> dict[int, list[tuple[int, int]]]:
    """{place: its spans of the text} of the wanted answers that this rendering shows as they would be asked for."""
    if layout.marked is None:
        shown = {place: layout.answers[place] for place in wanted if place < len(layout.answers)}
        return {place: [span] for place, span in shown.items() if span is not None}
    known = all(owner is not None for _, _, owner in layout.marked)  # else the last one's alone can be told
    told = wanted if known else wanted & {len(layout.turns) - 1} & {owner for _, _, owner in layout.marked}
    spans = {place: [(start, end) for start, end, owner in layout.marked if owner == place] for place in told}
    return {place: found for place, found in spans.items() if place < len(layout.turns)}


def _why_not(dialogue: _Dialogue, layout: _Layout, turn: int) -> str:
    """A sentence that says which message of a dialogue cannot be learned, and why; without the message's own text."""
    name = f"the chat template {dialogue.template.name}"
    if layout.marked is not None:
        return (
            f"{name} does not tell which of its generation marks belongs to message {turn + 1}, and not all of them are to be "
            "learned; mark each answer once"
        )
    before = dialogue.template, dialogue.dicts[:turn], dialogue.tools
    prompt, history = (_render_part(*before, asks) for asks in (True, False))
    if prompt is None:
        why = "it does not ask for it"
    elif layout.text.startswith(prompt):
        why = "once more turns follow, it is written otherwise"
    else:
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, layout.text, strict=False)))
        why = "what stands before an answer changes with the answer"
        if history and prompt.startswith(history) and agreed >= len(history):
            why = f"it is asked for with {prompt[len(history) :]!r}, and written without"
    return (
        f"{name} does not write message {turn + 1} of a dialogue as it would be asked for and answered: {why}; put "
        "{% generation %} and {% endgeneration %} around the answers in the template"
    )


# ---- segments to ids -------------------------------------------------------------------------------------------------


class _Encoder:
    """Text of a template to ids: special tokens to their ids, what is between them as plain text.

    Between two special tokens the ids are those that transformers gives, also with tokenizers that put a space before a
    text's first word ("first"), or before the word behind each special token.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: tuple[str, ...]) -> None:
        added = {token["content"]: token for token in tokenizer.definition["added_tokens"]}
        vocabulary = tokenizer.definition["model"]["vocab"]
        never_text = {*tokens, *tokenizer.special_tokens}
        self.ids = {
            content: token["id"] for content, token in added.items() if token["special"] or content in never_text
        }
        self.ids[tokenizer.eos_token] = tokenizer.eos_token_id
        if isinstance(vocabulary, dict):
            self.ids |= {token: vocabulary[token] for token in tokens if token in vocabulary and token not in added}
        by_length = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, by_length)))
        self._hidden = re.compile("|".join(map(re.escape, [*by_length, BEGIN, END])))
        self._strips_left = {content for content in self.ids if added.get(content, {}).get("lstrip")}
        self._strips_right = {content for content in self.ids if added.get(content, {}).get("rstrip")}
        self._tokenizer = tokenizer
        inner = without_space_before(without_special_tokens(tokenizer.definition, set(self.ids)))
        self._inner = None if inner is None else HFTokenizer.from_str(json.dumps(inner))
        self._first_only = any(
            step.get("prepend_scheme") == "first" for step in pre_tokenizer_steps(tokenizer.definition)
        )

    def hide(self, value: Any) -> tuple[Any, dict[str, str]]:
        """A copy of messages and tools in which no text spells a special token, and {stand-in: what it stands for}."""
        strings = list(strings_in(value))
        found = sorted({spelled for text in strings for spelled in self._hidden.findall(text)})
        if not found:
            return value, {}
        taken = {character for text in strings for character in text if character >= "\U00100000"}
        free = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in taken)  # of private use
        stand_ins = {spelled: next(free) for spelled in found}
        hidden = _map_strings(value, lambda text: self._hidden.sub(lambda match: stand_ins[match.group()], text))
        return hidden, {stand_in: spelled for spelled, stand_in in stand_ins.items()}

    def encode(self, segments: list[tuple[str, bool]], hidden: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, learned) of (text, learned) segments, each tokenised on its own."""
        ids: list[int] = []
        learned: list[bool] = []
        before: str | None = ""  # what a text stands behind: "" nothing, a special token, or None for more text
        for text, learn in segments:
            start = len(ids)
            for plain, special in self._pieces(text):
                plain = plain.lstrip() if before in self._strips_right else plain
                plain = plain.rstrip() if special in self._strips_left else plain
                if plain:
                    ids += self._encode_plain("".join(hidden.get(c, c) for c in plain) if hidden else plain, before)
                    before = None
                if special:
                    ids.append(self.ids[special])
                    before = special
            learned += [learn] * (len(ids) - start)
        return np.array(ids, dtype=np.int64), np.array(learned, dtype=bool)

    def split(self, text: str) -> list[str]:
        """The text in pieces, special tokens and what is between them."""
        return [piece for pair in self._pieces(text) for piece in pair if piece]

    def _pieces(self, text: str) -> Iterator[tuple[str, str | None]]:
        """(plain text, the special token behind it)."""
        position = 0
        for match in self.pattern.finditer(text):
            yield text[position : match.start()], match.group()
            position = match.end()
        yield text[position:], None

    def _encode_plain(self, text: str, before: str | None) -> list[int]:
        if self._inner is None or before == "" or (before is not None and not self._first_only):
            return self._tokenizer.encode(text)
        return self._inner.encode(text, add_special_tokens=False).ids


def without_space_before(definition: dict[str, Any]) -> dict[str, Any] | None:
    """A tokenizer.json that puts no space before a text's first word; None if it does not anyway."""
    changed = json.loads(json.dumps(definition))
    normalizer = changed.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        changed["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for step in pre_tokenizer_steps(changed):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return None if changed == definition else changed


@lru_cache(maxsize=4)
def _encoder(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> _Encoder:
    return _Encoder(tokenizer, tokens)


def _map_strings(value: Any, function: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(name, function): _map_strings(inner, function) for name, inner in value.items()}
    return [_map_strings(inner, function) for inner in value] if isinstance(value, list) else value
