"""How does a dialogue become one text, as the model's own template writes it?

A chat template is a Jinja program of the tokenizer's folder, as everyone's is, and is rendered as transformers does:
sandboxed, with the tools and the special tokens among its variables. Two are shipped, ChatML and Llama 3's. How the text
becomes token ids is in chat_tokens.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dataprep.chatml import CHATML
from errors import UserError
from finetune_data.examples import Message
from limits import CallTimeout, call_within, memory_within

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
SHIPPED = {"chatml": CHATML, "llama3": LLAMA3}

T = TypeVar("T")

# of one rendering: a dialogue of a million tokens takes a tenth of each
_MAX_SECONDS, _MAX_MEMORY, _MAX_CHARACTERS = 5.0, 1 << 30, 64 << 20
_ROLE_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which a message may hold its reasoning
BEGIN, END = "\ufdd0", "\ufdd1"  # around a marked answer; noncharacters, which no text should hold


class RefusedMessagesError(UserError):
    """The template itself does not take these messages, as when it wants turns to alternate."""


class EndlessTemplateError(UserError):
    """The template takes more time or memory, or writes more, than any dialogue could need."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template. name: a shipped one's, or the file it comes from; tool_source: used instead where tools are given.

    special_tokens: {"bos_token": "<s>", ...}, variables of the template. now: the moment of which it may write the date;
    None is that of the rendering, as transformers has it.
    """

    name: str
    source: str
    tool_source: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    now: datetime | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a dialogue, as transformers' apply_chat_template(tokenize=False) gives it."""
        text = self.render_marked(self.variables(messages), tools, add_generation_prompt)
        return text.replace(BEGIN, "").replace(END, "")

    def variables(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template sees them. Calls that it cannot read are spelled in the content as JSON."""
        made = []
        for message in messages:
            extra, content = dict(message.extra), message.content
            if extra.get("tool_calls") and not self.reads("tool_calls"):
                calls = [json.dumps(call["function"], ensure_ascii=False) for call in extra.pop("tool_calls")]
                content = "\n".join([content, *calls] if content else calls)
            reasoning = next((extra[name] for name in _REASONING if extra.get(name) is not None), None)
            if reasoning is not None:
                extra = {"thinking": reasoning, **extra, "reasoning_content": reasoning}
            made.append({"role": message.role, "content": content, **extra})
        return made

    @cached_property
    def end_of_turn(self) -> str:
        """The text, such as "<|im_end|>", that the template writes behind an answer; empty if there is none."""
        answer = "The answer."
        try:
            text = self.render([Message("user", "The question."), Message("assistant", answer)])
        except RefusedMessagesError:
            return ""
        return text.rpartition(answer)[2].strip() if answer in text else ""

    def reads(self, variable: str) -> bool:
        """Whether the template names a variable, such as tools or tool_calls."""
        return variable in self.source or variable in (self.tool_source or "")

    def render_marked(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        """The text, with U+FDD0 and U+FDD1 around each answer that the template marks."""
        source = self.tool_source if tools and self.tool_source else self.source
        variables = {
            "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt,
            "strftime_now": (self.now or datetime.now()).strftime, **self.special_tokens,
        }  # fmt: skip
        try:
            text = _within_limits(self.name, lambda: _compile(source, self.name).render(variables))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # it is a program
            raise RefusedMessagesError(f"the chat template {self.name} refuses the messages: {error}") from None
        if len(text) > _MAX_CHARACTERS:
            raise EndlessTemplateError(
                f"the chat template {self.name} wrote {len(text):,} characters for {len(messages)} messages; give another with "
                "--chat_template"
            )
        return text


def load_chat_template(
    folder: str | Path, override: str | None = None, now: datetime | None = None
) -> ChatTemplate:  # fmt: skip
    """The chat template of a tokenizer's folder: chat_template.jinja, else tokenizer_config.json's, else ChatML.

    override: "chatml", "llama3", or a file with a Jinja template, instead. now: see ChatTemplate. UserError for a template
    that is not Jinja.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # as transformers: else the file is a leftover
        config |= _read_json(folder / "special_tokens_map.json")
    tokens = {name: _token_text(config[name]) for name in _ROLE_TOKENS if config.get(name)}
    tool_source = None
    if override in SHIPPED:
        name, source = override, SHIPPED[override]
    elif override is not None:
        name, source = override, _read_text(Path(override))
    elif (folder / "chat_template.jinja").exists():
        name = str(folder / "chat_template.jinja")
        source = _read_text(folder / "chat_template.jinja")
        if (folder / "additional_chat_templates" / "tool_use.jinja").exists():
            tool_source = _read_text(folder / "additional_chat_templates" / "tool_use.jinja")
    elif config.get("chat_template"):
        name, source = str(folder / "tokenizer_config.json"), config["chat_template"]
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            if "default" not in named:
                raise UserError(f"{name} names the chat templates {', '.join(named)}, but none default; name one so")
            source, tool_source = named["default"], named.get("tool_use")
    else:
        name, source = "chatml", CHATML
    for text in (source, tool_source):
        if text is not None:
            _within_limits(name, partial(_compile, text, name))
    return ChatTemplate(name, source, tool_source, tokens, now)


# ---- Jinja as transformers has it ------------------------------------------------------------------------------------


def _within_limits(name: str, function: Callable[[], T]) -> T:
    """function(), compiling too, for Jinja computes constants there. EndlessTemplateError where it takes too much."""
    try:
        with memory_within(_MAX_MEMORY):
            return call_within(_MAX_SECONDS, function)
    except CallTimeout:
        why = f"was not done after {_MAX_SECONDS:g} s"
    except RecursionError:
        why = "calls itself without end"
    except (MemoryError, OverflowError):
        why = f"needs more than {_MAX_MEMORY >> 20} MiB of memory"
    raise EndlessTemplateError(f"the chat template {name} {why}; give another with --chat_template")


class _Environment(ImmutableSandboxedEnvironment):
    """Powers are small: a large one is a single step of the interpreter, which nothing stops."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (abs(left) <= 1 << 64 and abs(right) <= 64):
            raise jinja2.TemplateError(f"{left} ** {right} is too large a power")
        return left**right


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what is between is written as it is, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return BEGIN + caller() + END


@lru_cache(maxsize=16)
def _compile(source: str, name: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template {name} is not Jinja: {error.message} in its line {error.lineno}") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # not Jinja's own filter, which writes < and & for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token_text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path} is not readable JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the chat template {path} cannot be read ({error.strerror}); name one of {', '.join(SHIPPED)} or a file"
        ) from None
    except UnicodeError:
        raise UserError(f"the chat template {path} is not UTF-8") from None
