"""How does an example become the sequences that a stage learns from, and what happens to one that is too long?

    chat         one sequence; several where no one rendering shows every answer as it will be asked for (chat_tokens.py).
                 Cut at max_length, its start kept; dropped if no token to learn is left
    text         one sequence, all of it learned. Cut likewise
    labelled     one sequence with the column "label" (1.0 or 0.0), its answer learned. Cut likewise
    preference   [chosen, rejected], which begin with the same prompt ids. Dropped if these fill max_length; else the answers
                 are cut, their starts kept. A side of several turns may be several sequences, as a chat: see ENDS_SIDE
    prompt       the prompt that the template asks an answer to, nothing learned. Dropped if it fills max_length

An end-of-text token is appended once, and learned, unless the template ends answers with a special token of its own.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from batches.packing import Sequence
from dataprep.tokenizers import Tokenizer
from finetune_data.chat_template import ChatTemplate, RefusedMessagesError
from finetune_data.chat_tokens import UnmaskableMessagesError, encode_answers, encode_messages, end_of_turn_id
from finetune_data.examples import Example, Message

ENDS_SIDE = (
    "ends_side"  # the column of a preference's sequences, where sides may have several: 1 for the last of one, else 0
)
_ONE_TEXT = "the chat template {} writes no one text that shows every answer of it as it would be asked for"
_LEARNED, _PLAIN = "\x1b[32m", "\x1b[0m"  # green


@dataclass(frozen=True)
class Encoded:
    """sequences: of one example, none if it was dropped; dropped: why, in words fit for counting, else "".

    truncated: whether tokens were cut off. by_answer: whether several renderings were needed.
    """

    sequences: list[Sequence]
    dropped: str = ""
    truncated: bool = False
    by_answer: bool = False


def say_by_answer(count: int) -> list[str]:
    """A sentence for the user where dialogues became several sequences."""
    words = "dialogue" if count == 1 else "dialogues"
    return [f"{count:,} {words} rendered answer by answer: the template hides earlier reasoning"] if count else []


def encode_example(
    tokenizer: Tokenizer, template: ChatTemplate, example: Example, *, max_length: int, train_on: str = "assistant"
) -> Encoded:
    """The sequences of an example, each of at most max_length tokens, or why there are none (see the file's docstring).

    train_on is for chats, see `encode_messages`. An example whose messages the template refuses or does not write as it asks
    for them, or whose messages have trained=False throughout, is dropped.
    """
    try:
        if example.kind == "preference":
            return _encode_preference(tokenizer, template, example, max_length)
        if example.kind == "prompt":
            tokens, learned = encode_messages(
                tokenizer, template, example.prompt, tools=example.tools, add_generation_prompt=True
            )
            if len(tokens) >= max_length:
                return Encoded([], f"the prompt fills max_length {max_length}")
            return Encoded([Sequence(tokens, learned)])
        if example.kind == "text":
            assert example.text is not None
            tokens = np.array([*tokenizer.encode(example.text), tokenizer.eos_token_id], dtype=np.int64)
            return _cut(tokens, np.ones(len(tokens), dtype=bool), max_length)
        if example.kind == "labelled":
            train_on = "assistant"
        if train_on != "all" and not any(_is_target(message) for message in example.messages):
            return Encoded([], "every assistant's message has weight 0")
        pairs = _encode_dialogue(tokenizer, template, example.messages, example.tools, train_on)
        assert example.label is not None or example.kind != "labelled"
        columns = {"label": float(example.label or 0)} if example.kind == "labelled" else {}
        if example.kind == "labelled" and len(pairs) > 1:
            return Encoded([], _ONE_TEXT.format(template.name))
        cut = [_cut(tokens, learned, max_length, columns) for tokens, learned in pairs]
        kept = [sequence for one in cut for sequence in one.sequences]
        truncated = any(one.truncated for one in cut)
        return Encoded(kept, "" if kept else cut[0].dropped, truncated, by_answer=len(pairs) > 1 and bool(kept))
    except (RefusedMessagesError, UnmaskableMessagesError) as refusal:
        return Encoded([], str(refusal))


def show_example(tokenizer: Tokenizer, sequence: Sequence, *, color: bool) -> str:
    """The text of a sequence with its trained tokens in green, or without colour between [[ and ]]."""
    learned = sequence.learned.copy()
    learned[:1] = False  # nothing precedes the first
    before, after = (_LEARNED, _PLAIN) if color else ("[[", "]]")
    runs = np.flatnonzero(np.diff(learned)) + 1
    shown = []
    for ids, run in zip(np.split(sequence.tokens, runs), np.split(learned, runs), strict=True):
        # control characters of the data, such as an escape, must not reach a terminal
        text = "".join(
            c if c.isprintable() or c in "\n\t" else repr(c)[1:-1]
            for c in tokenizer.decode(ids.tolist(), skip_special=False)
        )
        shown.append(before + text + after if run.any() else text)
    return "".join(shown)


def _is_target(message: Message) -> bool:
    return message.role == "assistant" and message.trained


def _encode_preference(tokenizer: Tokenizer, template: ChatTemplate, example: Example, max_length: int) -> Encoded:
    prompt, _ = encode_messages(tokenizer, template, example.prompt, tools=example.tools, add_generation_prompt=True)
    if len(prompt) >= max_length:
        return Encoded([], f"the prompt fills max_length {max_length}")
    sides, truncated = [], False
    before = [Message(m.role, m.content, m.extra, trained=False) for m in example.prompt]
    for answer in (example.chosen, example.rejected):
        if not any(map(_is_target, answer)):
            return Encoded([], "every assistant's message has weight 0")
        pairs = _encode_dialogue(tokenizer, template, [*before, *answer], example.tools, "assistant")
        if not np.array_equal(pairs[0][0][: len(prompt)], prompt):
            return Encoded(
                [], f"the chat template {template.name} writes the prompt otherwise with an answer behind it"
            )
        cut = [_cut(*pair, max_length) for pair in pairs]
        if cut[0].dropped:
            return cut[0]
        sides.append([sequence for one in cut for sequence in one.sequences])
        truncated |= any(one.truncated for one in cut)
    if max(map(len, sides)) == 1:
        return Encoded([side[0] for side in sides], truncated=truncated)
    return Encoded([one for side in sides for one in _marked(side)], truncated=truncated, by_answer=True)


def _marked(side: SequenceOf[Sequence]) -> list[Sequence]:
    return [replace(one, columns={**one.columns, ENDS_SIDE: float(one is side[-1])}) for one in side]


def with_marked_sides(groups: list[list[Sequence]]) -> list[list[Sequence]]:
    """Preferences with ENDS_SIDE in all of them where one has a side of several sequences; else as they are."""
    if all(len(group) == 2 for group in groups):
        return groups
    return [group if len(group) > 2 else [*_marked(group[:1]), *_marked(group[1:])] for group in groups]


def _encode_dialogue(
    tokenizer: Tokenizer, template: ChatTemplate, messages: SequenceOf[Message], tools: list | None, train_on: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`encode_answers` with an end-of-text token behind a last answer, learned if that is, where no other ends it."""
    pairs = encode_answers(tokenizer, template, messages, train_on=train_on, tools=tools)
    if end_of_turn_id(tokenizer, template) is not None:
        return pairs
    # rendered answer by answer, each text ends with an answer that is learned
    learn = True if len(pairs) > 1 else train_on == "all" or messages[-1].trained
    if len(pairs) == 1 and messages[-1].role != "assistant":
        return pairs
    return [(np.append(tokens, tokenizer.eos_token_id), np.append(learned, learn)) for tokens, learned in pairs]


def _cut(tokens: np.ndarray, learned: np.ndarray, max_length: int, columns: dict[str, float] | None = None) -> Encoded:
    kept = Sequence(tokens[:max_length], learned[:max_length], columns=columns or {})
    if not kept.num_targets:
        return Encoded([], f"all that is to be learned lies beyond max_length {max_length}")
    return Encoded([kept], truncated=len(tokens) > max_length)
