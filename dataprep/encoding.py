"""How are texts encoded fast, and how is it proved that the fast ids are the tokenizer's own?

tiktoken's encoder runs a byte-level BPE 6 to 9 times faster than the `tokenizers` library. It is built from the same
vocabulary and split pattern, compared with `tokenizers` on a sample of the corpus and on NASTY, and used only when
every id is equal; otherwise `tokenizers` does the work. Long documents are encoded in pieces (`split_pieces`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dataprep.tokenizers import (
    Tokenizer,
    bytes_to_characters,
    is_byte_level,
    pre_tokenizer_steps,
    split_merge,
    without_special_tokens,
)

PIECE_CHARACTERS = 1 << 14  # the work in a word grows faster than its length; a longer one is cut: split_pieces

# The split pattern that `ByteLevel(use_regex=True)` has built in.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

NASTY = (
    "a <|endoftext|> b<|endoftext|>",
    "[CLS] x [SEP] <s> </s> <pad> <|im_end|>",
    " leading",
    "trailing ",
    "   many   spaces   ",
    "\n\n\n  \n \t\n",
    "\r\nCRLF\r\n\r\n",
    "x\n  ",
    "x  \n",
    "x \n\n  \n  y",
    "tab\tx\t\ty",
    "I'm you'll WE'VE it'S don't ’tis",
    "1234567 1,234.5 0x1F ٣٤٥ ⅷ ²",
    "naïve café e\u0301 \u0301start",
    "日本語の文章。中文，没有空格",
    "한국어 조선말",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "עברית ภาษาไทย",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "\u00a0nbsp\u2003em\u3000ideographic\u2028line\u0085nel",
    "\ufeffbom\u200bzero\u200dwidth\u2060",
    "\x00\x01\x1b[0m\x7f\x80",
    "\U0010ffff\ue000\ufffd",
    "if (a&&b)//c\n\t{ return a[i]->x; }\n\n/* ** */ ////\n/",
    "http://example.com/?a=b&c=%20d#e",
    "AaBbCC camelCaseHTTPServer snake_case SHOUTİ ǅ ß ſ K",
    "'s't're",
    "=" * 70,
    " " * 70 + "x",
    "a" * 300,
)


if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class Engine:
    """The chosen encoder. name: "tiktoken" or "tokenizers"; reason: the result of the comparison, one sentence."""

    name: str
    reason: str


class Encoder:
    """Encodes texts with one engine. `encode_batch` gives, for each text, a (n,) uint32 array of ids."""

    def __init__(self, tokenizer: Tokenizer, engine: str) -> None:
        self._tokenizer = tokenizer
        self._fast = _tiktoken_encoding(tokenizer) if engine == "tiktoken" else None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is None:
            return [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.encode_batch(texts)]
        return [self._encode(text, self._fast) for text in texts]

    def _encode(self, text: str, fast: "tiktoken.Encoding") -> np.ndarray:
        try:
            return fast.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its regex engine gives up on runs of hundreds of thousands of spaces; the other does not
            return np.array(self._tokenizer.encode(text), dtype=np.uint32)


def choose_engine(tokenizer: Tokenizer, sample: Iterable[str]) -> Engine:
    """tiktoken when it gives exactly the ids of `tokenizers` on NASTY and on the sample's texts, else tokenizers."""
    obstacle = _obstacle(tokenizer)
    if obstacle:
        return Engine("tokenizers", obstacle)
    try:
        encoder = Encoder(tokenizer, "tiktoken")
    except ImportError:
        return Engine("tokenizers", "tiktoken is not installed")
    except ValueError as error:
        return Engine("tokenizers", f"tiktoken does not take its split pattern ({error})")
    compared = characters = 0
    for text in (*NASTY, *sample):
        if encoder.encode_batch([text])[0].tolist() != tokenizer.encode_batch([text])[0]:
            return Engine("tokenizers", f"tiktoken gives other ids for the text {text[:40]!r}")
        compared += 1
        characters += len(text)
    return Engine("tiktoken", f"ids equal to tokenizers' on {compared:,} texts of {characters:,} characters")


def split_pieces(chunks: Iterable[str], limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a document, given as any chunks, into pieces of at most `limit` characters; the cuts ignore the chunks.

    Encoded one by one, pieces give the ids of the whole document if every cut is at a safe place, one where each
    pattern of train_tokenizer.PATTERNS ends a match whatever follows: between a non-space and a space (no pattern goes
    on over a space), or after a single newline between two non-spaces of which the second is not "/" (gpt4o's pattern
    takes slashes after newlines). A run of `limit` characters without a safe place is cut at `limit`.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            cut = _last_safe_cut(rest, start, start + limit)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _last_safe_cut(text: str, start: int, stop: int) -> int:
    """The last safe place between them; `stop` where there is none."""
    space = text.rfind(" ", start + 1, stop)
    while space > 0 and text[space - 1].isspace():
        space = text.rfind(" ", start + 1, space)
    newline = text.rfind("\n", start + 1, stop)
    while newline > 0 and (text[newline - 1].isspace() or text[newline + 1].isspace() or text[newline + 1] == "/"):
        newline = text.rfind("\n", start + 1, newline)
    cut = max(space, newline + 1 if newline > 0 else 0)
    return cut if cut > 0 else stop


def _obstacle(tokenizer: Tokenizer) -> str | None:
    """Why tiktoken cannot stand in for this tokenizer, or None."""
    definition = tokenizer.definition
    if not is_byte_level(definition):
        return "not a byte-level BPE, so tiktoken cannot encode it"
    model = definition["model"]
    if without_special_tokens(definition, tokenizer.special_tokens)["added_tokens"]:
        return "it has added tokens that are ordinary text, which tiktoken cannot express"
    if model["dropout"] or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "it has options that tiktoken cannot express"
    if split_pattern(definition) is None:
        return "its pre-tokenizer is not one split pattern, so tiktoken cannot encode it"
    try:
        ranks = _ranks(tokenizer)
    except (KeyError, ValueError):
        return "its vocabulary is not the byte alphabet and merges of it"
    # tiktoken merges in the order of ids, so ids must follow the merges
    merged = [ranks[b] for b in map(_to_bytes, ("".join(split_merge(m)) for m in model["merges"]))]
    if any(later <= earlier for earlier, later in pairwise(merged)):
        return "its ids do not follow the order of its merges"
    return None


def split_pattern(definition: dict) -> str | None:
    """The one regular expression by which a byte-level tokenizer.json splits text, or None if it is not one."""
    match pre_tokenizer_steps(definition):
        case [{"type": "ByteLevel", "use_regex": True}]:
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            return pattern
    return None


def _tiktoken_encoding(tokenizer: Tokenizer) -> "tiktoken.Encoding":
    import tiktoken  # here: only this engine needs it

    pattern = split_pattern(tokenizer.definition)
    assert pattern is not None, "the engine is chosen by the pattern"
    return tiktoken.Encoding(
        "groundup",
        pat_str=pattern,
        mergeable_ranks=_ranks(tokenizer),
        special_tokens={},
    )


def _ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Bytes to id for every id that text can become. KeyError or ValueError if they are not bytes and merges."""
    model = without_special_tokens(tokenizer.definition, tokenizer.special_tokens)["model"]
    made = {"".join(split_merge(merge)) for merge in model["merges"]}
    if set(model["vocab"]) != made | set(bytes_to_characters().values()):
        raise ValueError("the vocabulary is not the byte alphabet and its merges")
    return {_to_bytes(token): index for token, index in model["vocab"].items()}


@cache
def _characters_to_bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_characters().items()}


def _to_bytes(token: str) -> bytes:
    table = _characters_to_bytes()
    return bytes(table[character] for character in token)
