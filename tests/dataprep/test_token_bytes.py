"""Do the bytes of a document's tokens add up to its UTF-8 bytes, with every kind of tokenizer and on ten scripts?"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
from dataprep.shards import open_split
from dataprep.token_bytes import TokenBytes, shared_out
from dataprep.tokenizers import load_tokenizer

SCRIPTS = {
    "latin": "  Naïve cafe\u0301s in Zürich, ﬁnally open: 3½ km  away…",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, ΑΝΘΡΩΠΟΙ.",
    "arabic": "كُلُّ الطُّرُقِ تُؤَدِّي إلى روما ٣٤٥",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "devanagari": "नमस्ते दुनिया, यह एक परीक्षा है।",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "中文没有空格，标点也不同。\u3000全形空格",
    "japanese": "日本語のカタカナとひらがな、ｶﾞｷﾞ①㌔。",
    "korean": "한국어 조선말 \u1112\u1161\u11ab 띄어쓰기",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 👍🏽 \u0301 x\u0001y",
    "spelled": "a <|endoftext|> b </s> ▁ <0xE3> [SEP] ##ing",
    "tabs": "\t\n  \r\n x",
    "one": "a",
}


def byte_level(normalizer=None, prefix=False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(list(SCRIPTS.values()) * 2, trainer)
    return tokenizer


def qwen2() -> Tokenizer:
    tokenizer = byte_level(normalizers.NFC())
    split = pre_tokenizers.Split(Regex(r"\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}]+|\\s+".replace("\\\\", "\\")), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def llama2() -> Tokenizer:
    """SentencePiece's BPE as Llama 2 has it: a ▁ put in front, byte fallback."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁a",
        "en",
    ]
    merges = [("▁", "a"), ("e", "n")]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(vocabulary)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*SCRIPTS.values()][:4] * 4, trainer)
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([*SCRIPTS.values()][:5] * 4, trainer)
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte-level, prefix space": lambda: byte_level(prefix=True),
    "byte-level, NFKC and prefix space": lambda: byte_level(normalizers.NFKC(), True),
    "qwen2": qwen2,
    "llama2": llama2,
    "unigram": unigram,
    "bert": bert,
}


def prepared(folder: Path, kind: str, **options) -> Path:
    (folder / "text").mkdir()
    rows = [json.dumps({"text": text}) for text in SCRIPTS.values()]
    (folder / "text" / "scripts.jsonl").write_text("\n".join(rows))
    if kind in KINDS:
        (folder / "tokenizer").mkdir()
        tokenizer = KINDS[kind]()
        tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
        end = next(token for token in ("<|endoftext|>", "</s>", "[SEP]") if tokenizer.token_to_id(token) is not None)
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        options |= {"tokenizer_type": "existing", "tokenizer_dir": folder / "tokenizer"}
    else:
        options |= {"tokenizer_type": kind, "vocab_size": 700}
    prepare(
        Options(folder / "text", folder / "data", max_length=32, stride=0, num_workers=1, val_fraction=0.0, **options),
        Progress(),
    )
    return folder / "data"


@pytest.mark.parametrize("kind", [*KINDS, "bpe", "wordpiece"])
def test_bytes_add_up_to_those_that_were_encoded(kind, tmp_path):
    data = prepared(tmp_path, kind)
    split, tokenizer = open_split(data, "train"), load_tokenizer(data)
    token_bytes = TokenBytes(split, tokenizer)
    assert token_bytes.exact and split.num_documents == len(SCRIPTS)
    for number, text in enumerate(SCRIPTS.values()):
        document = split.document(number)
        shares = token_bytes.of(document.start, document.stop - document.start)
        assert shares.sum() == len(text.encode()) and (shares >= 0).all()
        if shares[:-1].any():
            assert shares[-1] == 0  # the end of the text stands for nothing
    # any window of the split is a part of the whole, in any order
    whole = token_bytes.of(0, split.num_tokens)
    assert whole.sum() == split.num_bytes == sum(len(text.encode()) for text in SCRIPTS.values())
    for start in range(0, split.num_tokens - 40, 37):
        assert np.array_equal(token_bytes.of(start, 40), whole[start : start + 40])
    if kind in ("byte-level", "bpe"):
        spelled = tokenizer.token_byte_lengths()
        assert np.array_equal(whole, spelled[split.read(0, split.num_tokens)])


def test_the_same_tokens_with_a_normaliser_that_changes_nothing_have_the_same_bytes(tmp_path):
    """10.21 bits per byte became 5.17 when NFC was added: the length of the byte alphabet's spelling was counted."""
    plain = byte_level()
    with_nfc = Tokenizer.from_str(plain.to_str())
    with_nfc.normalizer = normalizers.NFC()
    for name, tokenizer in (("plain", plain), ("nfc", with_nfc)):
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    lengths = [load_tokenizer(tmp_path / name).token_byte_lengths() for name in ("plain", "nfc")]
    assert np.array_equal(*lengths) and lengths[0].sum() > 0


def test_a_folder_of_an_older_version_shares_out_the_bytes_of_the_split(tmp_path):
    data = prepared(tmp_path, "llama2")
    metadata = json.loads((data / "metadata.json").read_text())
    metadata["format_version"] = 1
    for split in metadata["splits"].values():
        for shard in split["shards"]:
            del shard["files"][shard["name"] + ".bytes"]
    (data / "metadata.json").write_text(json.dumps(metadata))
    split = open_split(data, "train")
    token_bytes = TokenBytes(split, load_tokenizer(data))
    assert not token_bytes.exact
    assert math.isclose(token_bytes.of(0, split.num_tokens).sum(), split.num_bytes, rel_tol=1e-12)


@pytest.mark.parametrize("total", [0, 1, 7, 10**6, 10**13])
def test_what_is_shared_out_is_whole_and_in_proportion(total):
    weights = np.random.default_rng(total % 97).integers(0, 50, 1000)
    parts = shared_out(total, weights)
    assert parts.sum() == total and not parts[weights == 0].any() and parts.min() >= 0
    assert np.abs(parts - weights * (total / weights.sum())).max() <= 1 + 1e-9 * total
