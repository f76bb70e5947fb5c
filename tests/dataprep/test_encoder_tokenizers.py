"""Does an encoder's tokenizer give BERT's ids, in transformers too, and are BERT's and RoBERTa's own folders understood?"""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from dataprep.encoding import NASTY
from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
from dataprep.shards import load_metadata, open_split
from dataprep.special_tokens import ENCODER_TOKENS
from dataprep.tokenizers import load_tokenizer
from dataprep.train_tokenizer import train_bpe, train_wordpiece
from errors import UserError

transformers = pytest.importorskip("transformers")

AWKWARD = (
    *NASTY, "", " ", "naïve Ünïcode ÀÉÎ", "i\u0307stanbul İSTANBUL", "日本語と中文 mixed 한국어", "👍🏽 ok 🇩🇪!", "x" * 101,
    "a" * 5000, "word\x00with\x07control\x1bcharacters\ufffd", "tabs\tand\u00a0spaces\u3000too",
    "don't re-start, (x)=y; $5.00 #1", "Straße ΣΑΣ ﬁ", "zero\u200bwidth\u00adhyphen", "A B C a b c",
)  # fmt: skip
RNG = random.Random(0)
TEXT = "reading reader reads unread Naïve naïvely models model modelling Ünter 日本 中文 42 don't"
WORDS = TEXT.split()
TRAINING = [*AWKWARD, *(" ".join(RNG.choices(WORDS, k=30)) for _ in range(60))]
ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


# Python's str.lower knows a sigma at a word's end; it composes letters (NFC); its Unicode tables are of another version
OTHERWISE_IN_PYTHON = "Σ\u0301\u0307\U0010ffff\ue000"


def spells_a_special_token(text: str) -> bool:
    """Which transformers makes a special token of, as ours never does."""
    return any(token in text for token in ENCODER_TOKENS)


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["cased", "lowercase"])
def wordpiece(request, tmp_path_factory):
    files = train_wordpiece(
        lambda: iter(TRAINING), vocab_size=900, eos_token="[SEP]", max_length=128, lowercase=request.param
    )
    return write(tmp_path_factory.mktemp("wordpiece") / "t", files), request.param


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    files = train_bpe(
        lambda: TRAINING, vocab_size=600, pretokenizer="gpt2", eos_token="[SEP]", max_length=128, encoder_tokens=True
    )
    return write(tmp_path_factory.mktemp("bpe") / "t", files)


def test_transformers_opens_a_wordpiece_as_berts_and_gives_the_same_ids(wordpiece):
    folder, lowercase = wordpiece
    ours = load_tokenizer(folder)
    for opened in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        theirs = opened.from_pretrained(folder)
        assert isinstance(theirs, transformers.BertTokenizerFast)
        assert {role: getattr(theirs, role) for role in ROLES} == ROLES and theirs.model_max_length == 128
        assert theirs.do_lower_case == lowercase
        assert [theirs.convert_tokens_to_ids(token) for token in ENCODER_TOKENS] == [0, 1, 2, 3, 4]
        for text in AWKWARD:
            if not spells_a_special_token(text):
                ids = ours.encode(text)
                assert theirs(text)["input_ids"] == [2, *ids, 3]
                assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
        pair = theirs("model", "reads")
        a, b = ours.encode("model"), ours.encode("reads")
        assert pair["input_ids"] == [2, *a, 3, *b, 3]
        assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        library = HFTokenizer.from_file(str(folder / "tokenizer.json")).encode("model", "reads")
        assert (library.ids, library.type_ids) == (pair["input_ids"], pair["token_type_ids"])


def test_the_vocabulary_alone_makes_the_same_bert_tokenizer(wordpiece):
    """BERT's folders of old held a list of tokens: what BertTokenizer makes of it, and of no normaliser of ours."""
    folder, lowercase = wordpiece
    ours = load_tokenizer(folder)
    vocabulary = ours.definition["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(ours.vocab_size))
    theirs = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase)
    for text in AWKWARD:
        if not spells_a_special_token(text):
            assert theirs(text)["input_ids"] == [2, *ours.encode(text), 3]


def test_the_ids_are_those_of_berts_algorithm_in_python(wordpiece):
    """Longest match first, in words of at most 100 characters (Devlin et al.'s tokenization.py), in transformers' Python."""
    from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer, WordpieceTokenizer

    folder, lowercase = wordpiece
    ours = load_tokenizer(folder)
    vocabulary = ours.definition["model"]["vocab"]
    basic = BasicTokenizer(do_lower_case=lowercase, never_split=[])
    pieces = WordpieceTokenizer(vocabulary, "[UNK]", max_input_chars_per_word=100)
    compared = 0
    for text in TRAINING:
        if any(character in text for character in OTHERWISE_IN_PYTHON):
            continue
        tokens = [piece for word in basic.tokenize(text) for piece in pieces.tokenize(word)]
        assert ours.encode(text) == [vocabulary[token] for token in tokens], text
        compared += 1
    assert compared > 80


def test_lowercase_loses_case_and_accents_and_cased_keeps_them(wordpiece):
    folder, lowercase = wordpiece
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.encode("NAÏVE models") == tokenizer.encode("naive models")) == lowercase
    assert tokenizer.decode(tokenizer.encode("Naïve models")) == ("naive models" if lowercase else "Naïve models")


def test_more_special_tokens_keep_their_ids_in_transformers(tmp_path):
    files = train_wordpiece(
        lambda: iter(TRAINING), vocab_size=900, eos_token="<|end|>", max_length=128, chosen=("[A]", "[B]")
    )
    folder = write(tmp_path / "t", files)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.eos_token_id, theirs.eos_token_id, len(theirs)) == (5, 5, ours.vocab_size)
    assert theirs("[A] reads [B]<|end|>")["input_ids"] == [2, 6, *ours.encode("reads"), 7, 5, 3]
    assert not {5, 6, 7} & set(ours.encode("[A] reads [B]<|end|>"))


def test_a_bpe_for_encoders_has_the_five_and_loses_nothing(bpe):
    ours, theirs = load_tokenizer(bpe), transformers.AutoTokenizer.from_pretrained(bpe)
    assert {role: getattr(theirs, role) for role in ROLES} == ROLES
    assert (ours.cls_token_id, ours.sep_token_id, ours.mask_token_id, ours.pad_token_id) == (2, 3, 4, 0)
    assert ours.eos_token == "[SEP]" and ours.byte_level and ours.special_ids == {0, 1, 2, 3, 4}
    for text in AWKWARD:
        ids = ours.encode(text)
        assert ours.decode(ids) == text and not ours.special_ids & set(ids)
        if not spells_a_special_token(text):
            assert theirs(text)["input_ids"] == [2, *ids, 3]
    assert theirs("a", "b")["input_ids"] == [2, *ours.encode("a"), 3, *ours.encode("b"), 3]
    assert theirs("a [MASK]")["input_ids"][-2] == 4


def test_continuation_pieces_are_those_that_words_go_on_with(wordpiece, bpe):
    """Against the words that the tokenizers library finds, and against the spaces of the text."""
    for folder in (wordpiece[0], bpe):
        tokenizer = load_tokenizer(folder)
        continues = tokenizer.continuation_pieces()
        assert continues.shape == (tokenizer.vocab_size,) and not continues[list(tokenizer.special_ids)].any()
        text = " ".join(random.Random(1).choices([*WORDS, "unmodelled", "rereads"], k=200)).replace("don't", "x")
        encoding = HFTokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False)
        words = encoding.word_ids
        assert [not goes_on for goes_on in continues[encoding.ids[1:]]] == [a != b for a, b in pairwise(words)]
        assert len(set(words)) < len(words)


def test_a_tokenizer_that_does_not_mark_words_is_refused(tmp_path):
    built = HFTokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    built.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="does not mark where words begin"):
        load_tokenizer(tmp_path).continuation_pieces()


def dataset(folder, **options):
    (folder / "text").mkdir(exist_ok=True)
    rows = [json.dumps({"text": text}) for text in TRAINING if text.strip()]
    (folder / "text" / "a.jsonl").write_text("\n".join(rows))
    settings = {"num_workers": 1, "val_fraction": 0, "vocab_size": 900, "task_bytes": 3000}
    prepare(Options(folder / "text", **{"output_dir": folder / "data", **settings, **options}), Progress())
    return folder / options.get("output_dir", "data")


@pytest.mark.parametrize("kind", [{"tokenizer_type": "wordpiece", "lowercase": True}, {"encoder_tokens": True}])
def test_documents_stand_between_cls_and_sep_and_forge_nothing_whatever_the_workers(tmp_path, kind):
    data = dataset(tmp_path, **kind)
    metadata = load_metadata(data)
    assert metadata.tokenizer.eos_token == "[SEP]" and metadata.options["begins_with_cls"]
    split, tokenizer = open_split(data, "train"), load_tokenizer(data)
    texts = [text for text in TRAINING if text.strip()]
    assert split.num_documents == len(texts)
    for number, text in enumerate(texts):
        document = split.document(number)
        ids = split.read(document.start, document.stop - document.start).tolist()
        assert ids == [2, *tokenizer.encode(text), 3]
        assert not {0, 2, 3, 4} & set(ids[1:-1])
    again = dataset(tmp_path, **kind, num_workers=3, output_dir=tmp_path / "again")
    files = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file()]
    assert len(files) > 5 and all((data / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_so_do_those_of_an_encoder_from_elsewhere_and_of_no_other_tokenizer(tmp_path, wordpiece):
    """As its own tokenizer in transformers encodes them; [CLS] once, however long the document is."""
    folder, _ = wordpiece
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for eos in (None, "[SEP]"):
        place = tmp_path / str(eos)
        place.mkdir()
        data = dataset(place, tokenizer_type="existing", tokenizer_dir=folder, vocab_size=0, eos_token=eos)
        split = open_split(data, "train")
        texts = [text for text in TRAINING if text.strip()]
        for number, text in enumerate(texts):
            document = split.document(number)
            ids = split.read(document.start, document.stop - document.start).tolist()
            assert "[" in text or ids == theirs(text).input_ids  # theirs takes a spelled [SEP] for one
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "a.txt").write_text("reader " * 9000)
    long = tmp_path / "long_data"
    prepare(
        Options(tmp_path / "long", long, tokenizer_type="existing", tokenizer_dir=folder, num_workers=1), Progress()
    )
    ids = np.concatenate([open_split(long, s).read(0, open_split(long, s).num_tokens) for s in ("train", "val")])
    assert (ids == 2).sum() == (ids == 3).sum() <= 2 and ids[0] == 2 and ids[-1] == 3
    assert load_metadata(dataset(tmp_path, vocab_size=400)).options["begins_with_cls"] is None


def test_flags_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="--lowercase belongs to --tokenizer_type wordpiece"):
        dataset(tmp_path, lowercase=True)
    with pytest.raises(UserError, match="--encoder_tokens belongs to tokenizers that are trained here"):
        dataset(tmp_path, tokenizer_type="tiktoken", encoder_tokens=True)
    with pytest.raises(UserError, match="256 bytes and 5 special tokens need at least 261"):
        dataset(tmp_path, encoder_tokens=True, vocab_size=260)


def test_another_choice_is_another_dataset(tmp_path):
    dataset(tmp_path, tokenizer_type="wordpiece", lowercase=True)
    with pytest.raises(UserError, match="lowercase was True and is None"):
        dataset(tmp_path, tokenizer_type="wordpiece")


def test_berts_own_folder_is_understood(wordpiece, tmp_path):
    """Its tokenizer_config.json names no token: they are what BERT's class takes for granted."""
    folder, lowercase = wordpiece
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "bert")
    config = {"do_lower_case": lowercase, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(config))
    data = dataset(tmp_path, tokenizer_type="existing", tokenizer_dir=tmp_path / "bert")
    tokenizer = load_tokenizer(data)
    assert (tokenizer.kind, tokenizer.eos_token) == ("wordpiece", "[SEP]")
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id) == (0, 2, 4)
    text = "Naïve reading models"
    assert transformers.AutoTokenizer.from_pretrained(data)(text)["input_ids"] == [2, *tokenizer.encode(text), 3]


def test_robertas_own_folder_is_understood(tmp_path):
    """Its vocabulary has GPT-2's <|endoftext|> too, as an ordinary entry; </s> ends its documents."""
    built = HFTokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    built.train_from_iterator(TRAINING, trainer)
    built.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    definition = json.loads(built.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] != "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) == (0, 2, 1)
    assert (tokenizer.eos_token, tokenizer.mask_token_id) == ("</s>", tokenizer.vocab_size - 1)
    assert not tokenizer.special_ids & set(tokenizer.encode("a <mask> </s>"))
