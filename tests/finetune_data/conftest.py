"""Small tokenizers of three families, as folders: BERT's WordPiece, RoBERTa's byte-level BPE, and a decoder's."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    "The committee met in Geneva on Tuesday and elected Anna Müller as its president. It was founded in 1921 by engineers "
    "from Norway, who built bridges across the fjords; the longest is 1,892 metres. What did they build? Where was she born? "
    "a stirring , funny and finally transporting re-imagining of beauty and the beast . U.N. official Ekeus heads for Baghdad"
)


def _save(folder: Path, tokenizer: Tokenizer, **roles: str) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))
    return folder


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 2, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,;:?!-"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=64)  # as many published tokenizer.json files have it
    tokenizer.enable_truncation(64)
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return _save(tmp_path_factory.mktemp("bert"), tokenizer, **roles)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory) -> Path:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    roles = {"cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return _save(tmp_path_factory.mktemp("roberta"), tokenizer, **roles)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("decoder"), _byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def random_texts() -> Callable[[int, int], list[str]]:
    """Gives so many texts of 1 to 30 words, drawn with a seed."""

    def draw(count: int, seed: int) -> list[str]:
        words, source = WORDS.split(), random.Random(seed)
        return [" ".join(source.choices(words, k=source.randint(1, 30))) for _ in range(count)]

    return draw
