"""Where does a new tokenizer come from: trained on documents (BPE, WordPiece), or converted from tiktoken?

Each function returns the two files of a tokenizer folder as a dict of name to bytes. The same documents in any order,
with any number of threads, give the same bytes.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from dataprep.encoding import GPT2_PATTERN, NASTY
from dataprep.special_tokens import ENCODER_TOKENS, PAD, chat_config, check_name, special_tokens
from dataprep.tokenizers import (
    DEFAULT_EOS,
    MARKS_KEY,
    Tokenizer,
    bytes_to_characters,
    encoder_config,
    tokenizer_config,
)
from errors import UserError

# The split patterns that llama.cpp knows (llama-vocab.cpp: llama-bpe, gpt-2, qwen2, gpt-4o), under our flag's names.
PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": GPT2_PATTERN,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# tiktoken's patterns are rewritten for its regex engine; these split alike (the conversion is compared with tiktoken)
TIKTOKEN_PATTERNS = {"gpt2": "gpt2", "cl100k_base": "llama3", "o200k_base": "gpt4o"}
_LONGEST_WORD = 256  # characters; see _cut
_LONG_RUN = 64  # characters without a space between, from which on a run counts as text without breaks; see _thinned
_ALL_KEPT = 2_000_000  # bytes of such text that are all trained on; of more, a quarter
_ALPHABET_LIMIT = 1000  # characters that WordPiece may learn, the usual figure of BERT tokenizers


def specials_of(
    kind: str, vocab_size: int, eos_token: str, chosen: Sequence[str] | None, encoder_tokens: bool
) -> list[str]:
    """The special tokens of a "bpe" or "wordpiece" tokenizer by id. UserError where `vocab_size` has no room for them.

    With encoder_tokens, BERT's five in front, the end of text where it is none of them, and those chosen: a chat's only then.
    """
    check_name("--eos_token", eos_token)
    if encoder_tokens:
        first = ENCODER_TOKENS if eos_token in ENCODER_TOKENS else (*ENCODER_TOKENS, eos_token)
        specials = special_tokens(first, chosen or ())
    else:
        specials = special_tokens((eos_token, PAD), chosen)
    least = len(specials) + (256 if kind == "bpe" else 1)
    if vocab_size < least:
        bytes_too = "256 bytes and " if kind == "bpe" else ""
        raise UserError(
            f"--vocab_size {vocab_size} is too small: {bytes_too}{len(specials)} special tokens need at least {least}; "
            "raise it"
        )
    return specials


def train_bpe(
    documents: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    pretokenizer: str,
    eos_token: str,
    max_length: int,
    encoder_tokens: bool = False,
    chosen: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, bytes]:
    """A byte-level BPE. Id 0 ends documents and 1 pads, then come the other special tokens, 256 bytes, and merges as learned.

    encoder_tokens: BERT's five come first instead, and a text that transformers encodes is put between [CLS] and [SEP], as
    ModernBERT's. A pair must occur twice to be merged, so a small corpus gives fewer ids than `vocab_size`. chosen: see
    special_tokens. `documents` is iterated twice.
    """
    specials = specials_of("bpe", vocab_size, eos_token, chosen, encoder_tokens)
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = _byte_level(pretokenizer, cut=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=list(bytes_to_characters().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_thinned(documents, say), trainer)
    tokenizer.pre_tokenizer = _byte_level(pretokenizer)
    if encoder_tokens:
        tokenizer.post_processor = _cls_and_sep()
        return _files(tokenizer, encoder_config(eos_token, "bpe", max_length, None) | chat_config(specials))
    return _files(
        tokenizer, tokenizer_config(eos_token, "bpe", max_length, {"pad_token": PAD, **chat_config(specials)})
    )


def train_wordpiece(
    documents: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    eos_token: str,
    max_length: int,
    lowercase: bool = False,
    chosen: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, bytes]:
    """BERT's tokenizer (Devlin et al. 2019): its normaliser, WordPiece, and the ids 0 to 4 for its five special tokens.

    lowercase: letters lose their case and their accents, as in BERT's "uncased" models. transformers opens it as a
    BertTokenizer, which puts a text between [CLS] and [SEP]. eos_token ends documents: BERT's own is [SEP]; another one, and
    the `chosen` special tokens, come after the five. `documents` is iterated twice.

    The trainer numbers characters in the order of a hash map (huggingface/tokenizers#1794), so that two runs differ.
    Here characters are counted first and handed over, sorted, as if they were special; the model is rebuilt without
    that mark afterwards.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # accents go with the case
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in documents():
        counts.update(normalizer.normalize_str(text))
    frequent = sorted(((c, n) for c, n in counts.items() if not c.isspace()), key=lambda item: (-item[1], item[0]))
    alphabet = sorted(character for character, _ in frequent[:_ALPHABET_LIMIT])
    specials = specials_of("wordpiece", vocab_size, eos_token, chosen, encoder_tokens=True)
    given = [*specials, *alphabet, *(f"##{character}" for character in alphabet)]
    if len(given) > vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: the special tokens and the characters of this corpus "
            f"alone need {len(given)} ids"
        )
    learner = HFTokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.Sequence([pre_tokenizer, _cut()])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=given,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(_thinned(documents, say), trainer)
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]

    tokenizer = HFTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([_special(token) for token in specials])
    tokenizer.post_processor = _cls_and_sep()
    normaliser = {"do_lower_case": lowercase, "tokenize_chinese_chars": True}
    return _files(tokenizer, encoder_config(eos_token, "wordpiece", max_length, normaliser) | chat_config(specials))


def convert_tiktoken(encoding_name: str, max_length: int, sample: Iterable[str]) -> dict[str, bytes]:
    """tiktoken's encoding as a tokenizer.json with the same ids, compared with tiktoken on NASTY and on the sample.

    UserError when the encoding's file is neither in TIKTOKEN_CACHE_DIR nor can be downloaded.
    """
    encoding = _load_tiktoken(encoding_name)
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    characters = bytes_to_characters()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    in_order = sorted(ranks, key=ranks.__getitem__)
    halves = [_halves(token, ranks) for token in in_order if len(token) > 1]
    merges = [(spell(left), spell(right)) for left, right in halves]
    specials = encoding._special_tokens
    vocabulary = {spell(token): rank for token, rank in ranks.items()} | specials
    # `ignore_merges` looks a whole piece up before merging, as tiktoken does
    tokenizer = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _byte_level(TIKTOKEN_PATTERNS[encoding_name])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(token) for token in sorted(specials, key=specials.get)])
    config = tokenizer_config(DEFAULT_EOS, "tiktoken", max_length, {})
    files = _files(tokenizer, config)
    ours = Tokenizer.of_files(files, Path("tokenizer.json"))
    for text in (*NASTY, *sample):
        if ours.encode(text) != encoding.encode_ordinary(text):
            raise RuntimeError(f"the converted {encoding_name} gives other ids than tiktoken for {text[:60]!r}")
    return files


def _load_tiktoken(encoding_name: str):
    try:
        import tiktoken
    except ImportError:
        raise UserError("--tokenizer_type tiktoken needs the package tiktoken; pip install tiktoken") from None
    # r50k_base is the same encoding in another file; either file will do
    names = ("r50k_base", "gpt2") if encoding_name == "gpt2" else (encoding_name,)
    for name in names:
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:  # whatever the network or the disk raises
            reason = error
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    where = f"TIKTOKEN_CACHE_DIR={folder} does not hold it" if folder else "TIKTOKEN_CACHE_DIR is not set"
    raise UserError(
        f"the encoding {encoding_name} could not be downloaded ({type(reason).__name__}) and {where}; set "
        "TIKTOKEN_CACHE_DIR to a folder that tiktoken filled on a machine with internet, or name a folder that holds its "
        "tokenizer.json instead"
    )


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The merge that made `token`: what is left of its bytes after merging with every earlier rank."""
    limit = ranks[token]
    cuts = [
        i for i in range(1, len(token)) if ranks.get(token[:i], limit) < limit and ranks.get(token[i:], limit) < limit
    ]
    if len(cuts) == 1:
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(left + right, limit), i) for i, (left, right) in enumerate(pairwise(parts))]
        rank, i = min(candidates)
        if rank >= limit:
            raise RuntimeError(f"token {token!r} of the encoding is not the merge of two earlier tokens")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_level(pretokenizer: str, cut: bool = False) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(PATTERNS[pretokenizer]), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, *([_cut()] if cut else []), to_bytes])


def _cls_and_sep() -> processors.PostProcessor:
    """[CLS] A [SEP] and [CLS] A [SEP] B [SEP], of which B and what ends it have the segment id 1."""
    return processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, ENCODER_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )


def _cut() -> pre_tokenizers.PreTokenizer:
    """Cuts longer words, for training alone, whose work in a word grows with the square of its length (tokenizers#1395).

    Text without breaks, as Chinese and protein sequences are, would train for minutes. No word of ordinary text is as long, and
    a token of so many characters would be of no use; encoding sees words whole.
    """
    return pre_tokenizers.Split(Regex(rf"[\s\S]{{{_LONGEST_WORD}}}"), behavior="isolated")


def _thinned(documents: Callable[[], Iterable[str]], say: Callable[[str], None]) -> Iterator[str]:
    """The documents to train on, of whose text without breaks a part is left out where there is much of it.

    Words of other text come again and again, and are counted once; of Chinese or of protein letters each piece is new, and
    training would take ten times as long for each byte. Which pieces are kept follows from a hash of them, so that their order
    does not matter.
    """
    runs = re.compile(rf"\S{{{_LONG_RUN},}}")
    long = sum(len(run.encode()) for text in documents() for run in runs.findall(text))
    share = 1.0 if long <= _ALL_KEPT else max(_ALL_KEPT, long / 4) / long

    if share < 1.0:
        say(
            f"tokenizer: {long / 1e6:,.1f} MB of the text have no breaks; {share * long / 1e6:,.1f} MB of these are trained on"
        )

    def kept(run: re.Match) -> str:
        pieces = [run[0][start : start + _LONGEST_WORD] for start in range(0, len(run[0]), _LONGEST_WORD)]
        return "\n".join(piece for piece in pieces if _fraction(piece) < share)

    for text in documents():
        yield text if share == 1.0 else runs.sub(kept, text)


def _fraction(text: str) -> float:
    """A number in [0, 1) that follows from the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _files(tokenizer: HFTokenizer, config: dict) -> dict[str, bytes]:
    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in config.get(MARKS_KEY, ())
    return {
        "tokenizer.json": (json.dumps(definition, ensure_ascii=False, indent=1) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode(),
    }
