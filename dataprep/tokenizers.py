"""What does a tokenizer folder give: text to ids, ids to text, and how many bytes each id stands for?

The folder holds `tokenizer.json` (Hugging Face `tokenizers`, the one truth about ids) and `tokenizer_config.json`
(how transformers, 4 and 5, wraps it). Here text never becomes a special token: "<|endoftext|>" spelled in a document
is encoded as the characters that it is, otherwise any document could forge the end of a document.
"""

import hashlib
import json
import re
from collections.abc import Collection
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from errors import UserError

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_OLDER_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")  # which say ids, but not all of the rest
DEFAULT_EOS = "<|endoftext|>"
METASPACE = "\u2581"  # SentencePiece's mark of a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # byte fallback's
# in tokenizer_config.json, where transformers keeps keys that it does not know
_KIND_KEY = "groundup_tokenizer_type"
MARKS_KEY = "groundup_marks"  # added tokens that a decoder shows, and that text still never becomes
# What BERT's and RoBERTa's tokenizer classes take for granted, so that their tokenizer_config.json may leave it out.
_ENCODER_ROLES: tuple[dict[str, str], ...] = (
    {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]"},
    {"cls": "<s>", "sep": "</s>", "mask": "<mask>", "pad": "<pad>"},
)


def load_tokenizer(folder: str | Path, *, lazy: bool = False, eos_token: str | None = None) -> "Tokenizer":
    """The tokenizer of a data folder, a checkpoint folder, or any folder with a Hugging Face tokenizer.json.

    `lazy` puts off building the `tokenizers` object, seconds for a vocabulary of 200,000, until a method needs it.
    eos_token: ends documents in place of the folder's own.
    UserError when tokenizer.json is missing or broken, or when no end-of-text token can be found.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json", required=False)
    if eos_token:
        config = config | {"eos_token": eos_token}
    if not (folder / "tokenizer.json").exists() and any((folder / name).exists() for name in _OLDER_FILES):
        raise UserError(
            f"{folder} has a tokenizer, but no tokenizer.json; with transformers installed, write one with: "
            f'python -c "from transformers import AutoTokenizer as T; T.from_pretrained({str(folder)!r})'
            f'.save_pretrained({str(folder)!r})"'
        )
    definition = _read_json(folder / "tokenizer.json", required=True)
    tokenizer = Tokenizer(definition, config, path=folder / "tokenizer.json", sha256=tokenizer_sha256(folder))
    if not lazy:
        tokenizer.decode([])
    return tokenizer


def tokenizer_sha256(folder: str | Path) -> str:
    """Hexadecimal sha256 of FOLDER/tokenizer.json. UserError when it cannot be read."""
    path = Path(folder) / "tokenizer.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise UserError(f"{path} does not exist or cannot be read") from None


class Tokenizer:
    """Text to ids and back.

    vocab_size:   number of ids, that is the largest id + 1 (tiktoken's encodings leave gaps)
    eos_token, eos_token_id: the token that ends every document
    pad_token_id: of a token for padding alone, or None
    cls_token_id, sep_token_id, mask_token_id: of an encoder's tokenizer, else None
    encoder_roles: {"mask_token": "[MASK]", …} of an encoder's tokenizer, else {}
    special_ids:  frozenset of the ids of special_tokens
    special_tokens: those that no text becomes
    sha256:       of tokenizer.json
    kind:         "bpe", "wordpiece", "tiktoken", or the lower-case model type of a tokenizer from elsewhere
    definition:   tokenizer.json, parsed (not to be changed)
    """

    def __init__(self, definition: dict[str, Any], config: dict[str, Any], *, path: Path, sha256: str) -> None:
        self.definition = definition
        self.sha256 = sha256
        self._path = path
        try:
            self.kind: str = config.get(_KIND_KEY) or definition["model"]["type"].lower()
            entries = definition["model"]["vocab"]
            # a list of [token, score] in Unigram models
            self._vocabulary = dict(entries) if isinstance(entries, dict) else {e[0]: i for i, e in enumerate(entries)}
            self._vocabulary |= {token["content"]: token["id"] for token in definition["added_tokens"]}
            marked = {token["content"] for token in definition["added_tokens"] if token["special"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(error) from None
        self.vocab_size: int = max(self._vocabulary.values()) + 1
        roles = {role: _content(config.get(f"{role}_token")) for role in ("bos", "eos", "pad", "cls", "sep", "mask")}
        for names in _ENCODER_ROLES:
            if names["mask"] in marked:
                roles |= {role: name for role, name in names.items() if roles[role] is None}
                roles["eos"] = roles["eos"] or roles["sep"]
        self.eos_token: str = _find_eos(roles["eos"], self._vocabulary, path)
        self.eos_token_id: int = self._vocabulary[self.eos_token]
        named = {*roles.values(), *config.get(MARKS_KEY, ())} - {None}
        self.special_tokens: frozenset[str] = frozenset(marked | named | {self.eos_token})
        self.special_ids: frozenset[int] = frozenset(
            self._vocabulary[token] for token in self.special_tokens if token in self._vocabulary
        )
        pad = self._vocabulary.get(roles["pad"])
        self.pad_token_id: int | None = None if roles["pad"] in (self.eos_token, roles["bos"]) else pad
        self.cls_token_id, self.sep_token_id, self.mask_token_id = (
            self._vocabulary.get(roles[role]) for role in ("cls", "sep", "mask")
        )
        self.encoder_roles: dict[str, str] = {}
        if self.mask_token_id is not None:
            named_roles = {f"{role}_token": roles[role] for role in ("cls", "sep", "mask", "pad")}
            self.encoder_roles = {role: token for role, token in named_roles.items() if token is not None}

    @classmethod
    def of_files(cls, files: dict[str, bytes], path: Path) -> "Tokenizer":
        """From the contents of a folder's files, which sentences call `path`."""
        definition, config = (json.loads(files[name]) for name in TOKENIZER_FILES[:2])
        return cls(definition, config, path=path, sha256=hashlib.sha256(files["tokenizer.json"]).hexdigest())

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self._path} is not a tokenizer that the tokenizers library reads ({error})")

    @cached_property
    def _hf(self) -> HFTokenizer:
        try:
            return HFTokenizer.from_str(json.dumps(self.definition))
        except Exception as error:  # the library raises bare Exception
            raise self._unreadable(error) from None

    @cached_property
    def _plain(self) -> HFTokenizer:
        """The tokenizer that knows no special token; built when first needed, since workers mostly do not."""
        plain = HFTokenizer.from_str(json.dumps(without_special_tokens(self.definition, self.special_tokens)))
        plain.no_padding()
        plain.no_truncation()
        return plain

    @property
    def begin_id(self) -> int | None:
        """[CLS], with which prepared documents begin if the tokenizer is an encoder's, that is, has a mask token; else None."""
        return None if self.mask_token_id is None else self.cls_token_id

    @property
    def filler_id(self) -> int:
        """What fills up a row: the token for padding or, where there is none, that which ends documents."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id

    @cached_property
    def _masking(self) -> HFTokenizer:
        """As `_plain`, but it knows the mask token."""
        masks = [token for token in self.definition["added_tokens"] if token["id"] == self.mask_token_id]
        others = [token for token in self.definition["added_tokens"] if token["id"] != self.mask_token_id]
        shown = {**self.definition, "added_tokens": [*others, *({**token, "special": False} for token in masks)]}
        hidden = self.special_tokens - {token["content"] for token in masks}
        masking = HFTokenizer.from_str(json.dumps(without_special_tokens(shown, hidden)))
        masking.no_padding()
        masking.no_truncation()
        return masking

    @property
    def byte_level(self) -> bool:
        """Whether ids are pieces of bytes without normalisation, so that every text comes back exactly."""
        return is_byte_level(self.definition)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: no special token is added, and none is made out of text that spells one."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [one.ids for one in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch_with_masks(self, texts: list[str]) -> list[list[int]]:
        """As `encode_batch`, but the mask token, spelled out in a text, is the mask, as in transformers' tokenizers."""
        return [one.ids for one in self._masking.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch_with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text what `encode` gives, (n,) int32, and which characters [start, end) each id stands for, (n, 2) int32.

        A byte-level piece has the space before its word among its characters; the pieces of one character each have all of it.
        """
        encoded = self._plain.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(one.ids, dtype=np.int32), np.array(one.offsets, dtype=np.int32).reshape(-1, 2)) for one in encoded
        ]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out unless `skip_special` is False."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: the UTF-8 bytes that each id spells; 0 for special tokens and unused ids.

        For byte-level tokenizers without a normaliser that is what was encoded; for others it is what to share a document's
        bytes out by (dataprep/token_bytes.py). "▁" is the space that it stands for, "<0xE3>" one byte. A WordPiece id counts
        its piece without `##`, and not the space before a word.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        in_byte_alphabet = uses_byte_alphabet(self.definition)
        # entries of the vocabulary that are spelled in UTF-8, not in the byte alphabet
        literal = {token["id"] for token in self.definition["added_tokens"]}
        prefix = self.definition["model"].get("continuing_subword_prefix") or ""
        spaced = uses_metaspace(self.definition)
        for token, index in self._vocabulary.items():
            if index in self.special_ids:
                continue
            if index in literal:
                lengths[index] = len(token.encode())
            elif in_byte_alphabet:
                lengths[index] = len(token)  # one character of the alphabet is one byte
            elif _BYTE_TOKEN.fullmatch(token):
                lengths[index] = 1
            else:
                text = token.replace(METASPACE, " ") if spaced else token.removeprefix(prefix)
                lengths[index] = len(text.encode())
        return lengths

    def ordinary_ids(self) -> np.ndarray:
        """(N,) int64, ascending: the ids that text can become. Special ones and gaps in the numbers are not among them."""
        return np.array(sorted(set(self._vocabulary.values()) - self.special_ids), dtype=np.int64)

    def continuation_pieces(self) -> np.ndarray:
        """(vocab_size,) bool: whether an id goes on with the word of the id before it.

        WordPiece's "##…"; of a tokenizer that keeps the space before a word with it (byte-level BPE, SentencePiece), every piece
        that does not begin with a space, a tab or a line end. So there "word," is one word, and so is a line of Chinese.
        Never a special token. UserError for a tokenizer that marks neither.
        """
        prefix = self.definition["model"].get("continuing_subword_prefix") or ""
        begins: tuple[str, ...] = tuple(bytes_to_characters()[byte] for byte in b" \t\n\r")
        if not uses_byte_alphabet(self.definition):
            begins = (METASPACE, "\n", "\t")
            if not prefix and not uses_metaspace(self.definition):
                raise UserError(f"{self._path} does not mark where words begin, so whole words cannot be masked")
        continues = np.zeros(self.vocab_size, dtype=bool)
        for token, index in self._vocabulary.items():
            continues[index] = token.startswith(prefix) if prefix else not token.startswith(begins)
        continues[list(self.special_ids)] = False
        return continues


def uses_byte_alphabet(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json spells its vocabulary in byte-level BPE's characters, one a byte."""
    return any(step["type"] == "ByteLevel" for step in _all_steps(definition))


def uses_metaspace(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json writes a space as "▁", as SentencePiece's models do."""
    steps = _all_steps(definition)
    return any(step["type"] == "Metaspace" or METASPACE in json.dumps(step, ensure_ascii=False) for step in steps)


def _all_steps(definition: dict[str, Any]) -> list[dict[str, Any]]:
    parts = (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders"))
    return [step for part, inner in parts for step in _steps(definition, part, inner)]


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a byte-level BPE that loses nothing (no normaliser, no added space)."""
    return (
        definition["model"]["type"] == "BPE"
        and definition.get("normalizer") is None
        and any(
            step["type"] == "ByteLevel" and not step["add_prefix_space"] for step in pre_tokenizer_steps(definition)
        )
    )


def pre_tokenizer_steps(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer of a tokenizer.json as a flat list of its steps."""
    return _steps(definition, "pre_tokenizer", "pretokenizers")


def _steps(definition: dict[str, Any], part: str, inner: str) -> list[dict[str, Any]]:
    step = definition.get(part)
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def without_special_tokens(definition: dict[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """A copy of a tokenizer.json in which no text can become a special token, nor one of the tokens in `also`."""
    hidden = {token["content"] for token in definition["added_tokens"] if token["special"]} | set(also)
    model = dict(definition["model"])
    added = [token for token in definition["added_tokens"] if token["content"] not in hidden]
    entries = model["vocab"]
    keep = {model.get("unk_token")}  # which the model itself needs
    if model["type"] == "BPE":
        # with `ignore_merges` a whole piece is looked up in the vocabulary
        keep |= {*bytes_to_characters().values(), *("".join(pair) for pair in map(split_merge, model["merges"]))}
    unwritten = hidden - keep
    if isinstance(entries, list):  # Unigram's [piece, score], whose places are the ids
        model["vocab"] = [
            [_never(i) if piece in unwritten else piece, score] for i, (piece, score) in enumerate(entries)
        ]
    elif model["type"] == "BPE" and not added:
        model["vocab"] = {token: index for token, index in entries.items() if token not in unwritten}
    else:  # added tokens outside the vocabulary are numbered by its size, which stays
        model["vocab"] = {_never(index) if token in unwritten else token: index for token, index in entries.items()}
    return {**definition, "model": model, "added_tokens": added, "post_processor": None}


def _never(index: int) -> str:
    """A piece that no text is: files with NUL are no text."""
    return f"\0{index}"


def split_merge(merge: str | list[str]) -> list[str]:
    """The two halves of a merge: newer tokenizer.json files hold a pair, older ones a string with a space."""
    return merge.split(" ") if isinstance(merge, str) else merge


@cache
def bytes_to_characters() -> dict[int, str]:
    """The alphabet of byte-level BPE: a printable character for each byte (GPT-2, `bytes_to_unicode` of encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def tokenizer_config(eos_token: str, kind: str, model_max_length: int, tokens: dict[str, str]) -> dict[str, Any]:
    """What tokenizer_config.json must hold so that transformers 4 and 5 give exactly the ids of tokenizer.json.

    `tokens` adds roles such as {"unk_token": "[UNK]"}, and what else it should hold; the end-of-text token also begins and
    pads unless they say more.
    """
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": eos_token,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "model_max_length": model_max_length,
        "pad_token": eos_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
        _KIND_KEY: kind,
        **tokens,
    }


def encoder_config(
    eos_token: str, kind: str, model_max_length: int, normaliser: dict[str, bool] | None
) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer with BERT's five special tokens.

    Without add_bos_token and add_eos_token, for which transformers 5 would replace tokenizer.json's [CLS] … [SEP].
    normaliser: of a WordPiece, which transformers 5 builds anew from these keys and the vocabulary.
    """
    return {
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "model_max_length": model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast" if normaliser is None else "BertTokenizer",
        "unk_token": "[UNK]",
        _KIND_KEY: kind,
        **{f"{role}_token": name for role, name in _ENCODER_ROLES[0].items()},
        **(normaliser or {}),
    }


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a token as a tokenizer_config.json gives it to a role; None for no token."""
    return (token["content"] if isinstance(token, dict) else token) or None


def _find_eos(named: str | None, vocabulary: dict[str, int], path: Path) -> str:
    for token in (named,) if named else (DEFAULT_EOS, "</s>", "[SEP]"):
        if token in vocabulary:
            return token
    if named:
        raise UserError(f"{path} has no token {named!r}, which should end a document; name another end-of-text token")
    raise UserError(
        f"{path} has no end-of-text token; name one as eos_token in {path.parent / 'tokenizer_config.json'}"
    )


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise UserError(f"{path} does not exist; name a folder that holds a tokenizer.json") from None
        return {}
    except (OSError, ValueError):
        raise UserError(f"{path} is not readable JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
