"""Which special tokens does a tokenizer have, and how does one that lacks those of its chat template get them?

A tokenizer trained here knows them from its first id on (docs/data.md has the table): the end of text and padding, what
ChatML puts around turns, the marks inside a turn, and reserved ones, for whoever needs one later, up to 32 in all. One for
encoders knows BERT's five instead, of which [SEP] ends documents.
The marks are not special to a decoder, so that an answer is shown with its reasoning and its calls; text that spells
them becomes them as little as any other.
"""

import json
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from dataprep.chatml import CHATML
from dataprep.tokenizers import MARKS_KEY, Tokenizer
from errors import UserError

PAD = "<|pad|>"
ENCODER_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of their ids (Devlin et al. 2019)
TURNS = ("<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
NUM_SPECIAL = 32

# letters between signs: no pre-tokenizer here keeps both together, so that no merge of text can become one
_NAME = re.compile(r"<\S*\w\S*>|\[\S*\w\S*\]")


def check_name(flag: str, token: str) -> None:
    """UserError for a name that a merge of text could spell."""
    if not _NAME.fullmatch(token):
        raise UserError(f"{flag} {token!r}: write it as <NAME> or [NAME], without spaces")


def special_tokens(first: Sequence[str], chosen: Sequence[str] | None) -> list[str]:
    """The special tokens of a tokenizer, in the order of their ids. first: those that it has anyway.

    chosen: what --special_tokens names, instead of ChatML's, the marks and the reserved ones, which None stands for.
    UserError for one that cannot be a special token, or is named twice.
    """
    if chosen is None:
        tokens = [*first, *TURNS, *MARKS]
        return [*tokens, *(f"<|reserved_{number}|>" for number in range(NUM_SPECIAL - len(tokens)))]
    for number, token in enumerate(chosen):
        check_name("--special_tokens", token)
        if token in (*first, *chosen[:number]):
            raise UserError(f"--special_tokens names {token} twice, or it is there anyway: leave one out")
    return [*first, *chosen]


def chat_config(tokens: Sequence[str]) -> dict[str, Any]:
    """What tokenizer_config.json says of these tokens: ChatML, where its own are among them, and which are marks."""
    template = {"chat_template": CHATML} if set(TURNS) <= set(tokens) else {}
    marks = [token for token in tokens if token in MARKS]
    return template | ({MARKS_KEY: marks} if marks else {})


def with_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], tokens: Sequence[str]
) -> tuple[Tokenizer, dict[str, bytes]]:
    """(`tokenizer` that knows `tokens` too, its two files). Each takes the next id that is free; other text keeps its ids.

    config: its tokenizer_config.json. UserError where the tokenizers library would give another id.
    """
    definition = json.loads(json.dumps(tokenizer.definition))
    config = json.loads(json.dumps(config))
    marks = [token for token in tokens if token in MARKS]
    vocabulary = definition["model"]["vocab"]
    known = (
        vocabulary if isinstance(vocabulary, dict) else {token: index for index, (token, _) in enumerate(vocabulary)}
    )
    free = count(tokenizer.vocab_size)
    ids = {
        token: known[token] if token in known else next(free) for token in tokens
    }  # some are there as ordinary pieces
    for token, index in ids.items():
        entry = {
            "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": token not in MARKS,
        }  # fmt: skip
        definition["added_tokens"].append({"id": index, **entry})
        if "added_tokens_decoder" in config:  # transformers 4 reads them there
            config["added_tokens_decoder"][str(index)] = entry
    if marks:
        config[MARKS_KEY] = [*config.get(MARKS_KEY, ()), *marks]
    files = {
        "tokenizer.json": _json_bytes(definition),
        "tokenizer_config.json": _json_bytes(config),
    }
    read = HFTokenizer.from_str(files["tokenizer.json"].decode())
    if wrong := [token for token, index in ids.items() if read.token_to_id(token) != index]:
        raise UserError(
            f"{wrong[0]} cannot be added to this tokenizer, whose ids have gaps: choose another --chat_template"
        )
    return Tokenizer.of_files(files, Path("tokenizer.json")), files


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
