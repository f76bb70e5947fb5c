"""Are the ids those that transformers, tokenizers and tiktoken give, exactly reversible, and impossible to forge?"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from dataprep import encoding, train_tokenizer
from dataprep.encoding import NASTY, Encoder, choose_engine, split_pieces
from dataprep.tokenizers import Tokenizer, load_tokenizer
from dataprep.train_tokenizer import PATTERNS, convert_tiktoken, train_bpe, train_wordpiece
from errors import UserError
from tests.tiers import grid

SCRIPTS = (
    "abcdefXYZ 0123456789 .,!?'\"()[]{}/\\-_=+ \n\t\r éßñçøÅ αβγω абвг אבג مرح नमस् 日本語中文 한국 ก"
    "👍🏽\u0301\u200d\u00a0\u2003\u2028"
)


def fuzz_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["the", " the", "ing", "def f(x):\n    return x", "<|endoftext|>", "1234", " \n\n", "don't", "CamelCase"]
    return [
        "".join(rng.choice((rng.choice(SCRIPTS), rng.choice(words))) for _ in range(rng.randint(1, 60)))
        for _ in range(count)
    ]


TRAINING = [*fuzz_texts(400, seed=1), *NASTY]


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def bpe_files(pretokenizer="llama3", documents=TRAINING, vocab_size=600):
    return train_bpe(
        lambda: documents, vocab_size=vocab_size, pretokenizer=pretokenizer, eos_token="<|endoftext|>", max_length=128
    )


def wordpiece_files(documents=TRAINING):
    return train_wordpiece(lambda: iter(documents), vocab_size=900, eos_token="<|endoftext|>", max_length=128)


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def bpe_folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("bpe") / request.param, bpe_files(request.param))


def test_every_text_comes_back_and_nothing_is_forged(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert lengths[tokenizer.eos_token_id] == 0
    for text in (*NASTY, *fuzz_texts(300)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
        assert lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_token_id]) == "a"
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special=False) == "<|endoftext|>"


def test_tiktoken_built_from_the_ranks_gives_the_ids_of_tokenizers(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert choose_engine(tokenizer, []).name == "tiktoken"
    texts = fuzz_texts(1000, seed=2)
    fast = Encoder(tokenizer, "tiktoken").encode_batch(texts)
    slow = Encoder(tokenizer, "tokenizers").encode_batch(texts)
    reference = HFTokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    for text, a, b in zip(texts, fast, slow, strict=True):
        assert a.tolist() == b.tolist()
        if "<|endoftext|>" not in text:
            assert a.tolist() == reference.encode(text, add_special_tokens=False).ids


def test_pieces_of_a_document_give_the_ids_of_the_whole(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    encoder = Encoder(tokenizer, "tokenizers")
    rng = random.Random(3)
    safe = "word words, (x) = y;\n/ * \n\n  日本 é's 12345\t\r\n.\n//x\nq"
    for limit in (30, 57, 200):
        text = "".join(rng.choice(safe) for _ in range(3000)).replace("  ", " a ")
        whole = encoder.encode_batch([text])[0].tolist()
        chunks = [text[i : i + 13] for i in range(0, len(text), 13)]
        pieces = list(split_pieces([text], limit))
        assert pieces == list(split_pieces(chunks, limit)) and max(map(len, pieces)) <= limit
        longest_without_cut = max(map(len, split_pieces([text], 1000)))
        assert len(pieces) > len(text) // limit and longest_without_cut <= 1000
        assert np.concatenate(encoder.encode_batch(pieces)).tolist() == whole


@pytest.mark.parametrize("pretokenizer", sorted(PATTERNS))
def test_without_spaces_documents_are_cut_after_newlines_where_every_pattern_ends(tmp_path, pretokenizer):
    rng = random.Random(4)
    parts = ["ab\ncd", "efg\nh", ")\n/x", "/*\n//", "日\n本", "1.\n2", "\r\n", ";\n\nz", "\n\n\n", "x\t\n"]
    text = "".join(rng.choice(parts) for _ in range(2000))
    # trained on itself, the tokenizer has ids for all that a pattern keeps together
    files = bpe_files(pretokenizer, documents=[text, "\n\n " * 9, "\t\n\n\t " * 9])
    encoder = Encoder(load_tokenizer(write(tmp_path / "t", files)), "tokenizers")
    whole = encoder.encode_batch([text])[0].tolist()
    for limit in (100, 131, 151):
        pieces = list(split_pieces([text], limit))
        assert all(piece.endswith("\n") for piece in pieces[:-1])
        assert np.concatenate(encoder.encode_batch(pieces)).tolist() == whole


def test_a_run_without_a_safe_place_is_cut_at_the_limit_and_still_comes_back(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    for text in ("x" * 250, "日" * 250, " " * 250, "\n" * 250):
        pieces = list(split_pieces([text], 100))
        assert [len(piece) for piece in pieces] == [100, 100, 50]
        ids = np.concatenate(Encoder(tokenizer, "tiktoken").encode_batch(pieces))
        assert tokenizer.decode(ids.tolist()) == text


def test_long_runs_that_stop_tiktokens_regex_are_encoded_by_tokenizers(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "t", bpe_files()))
    text = " " * 1_000_000 + "x"
    [ids] = Encoder(tokenizer, "tiktoken").encode_batch([text])
    assert ids.tolist() == tokenizer.encode(text)


def test_the_engine_is_refused_when_one_id_differs(tmp_path):
    files = bpe_files()
    definition = json.loads(files["tokenizer.json"])
    merges = definition["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]  # ids no longer follow the merges
    files["tokenizer.json"] = json.dumps(definition).encode()
    swapped = load_tokenizer(write(tmp_path / "swapped", files))
    assert choose_engine(swapped, TRAINING).name == "tokenizers"
    definition = json.loads(bpe_files()["tokenizer.json"])
    # {1,2}+ is a repeated group to one regex engine and possessive, so never more than two letters, to the other
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}{1,2}+|\P{L}"
    files["tokenizer.json"] = json.dumps(definition).encode()
    other = load_tokenizer(write(tmp_path / "other", files))
    assert choose_engine(other, TRAINING).name == "tokenizers"


def test_training_does_not_depend_on_the_order_of_documents():
    shuffled = random.Random(5).sample(TRAINING, len(TRAINING))
    assert bpe_files(documents=shuffled) == bpe_files()
    reference = wordpiece_files()
    assert all(wordpiece_files(documents) == reference for documents in (TRAINING, shuffled))


def test_wordpiece_has_its_special_tokens_and_cannot_be_forged(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "wp", wordpiece_files()))
    assert tokenizer.kind == "wordpiece" and choose_engine(tokenizer, []).name == "tokenizers"
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]
    definition = json.loads((tmp_path / "wp" / "tokenizer.json").read_bytes())
    assert [token["content"] for token in definition["added_tokens"]] == specials
    ids = tokenizer.encode("[CLS] the <|endoftext|> [SEP] [PAD] [MASK]")
    unknown = definition["model"]["vocab"]["[UNK]"]
    assert not {definition["model"]["vocab"][special] for special in specials} & set(ids) - {unknown}
    assert tokenizer.decode(tokenizer.encode("the def return")) == "the def return"


def test_a_vocabulary_too_small_for_the_characters_is_an_error():
    with pytest.raises(UserError, match="--vocab_size 20"):
        train_wordpiece(lambda: iter(TRAINING), vocab_size=20, eos_token="<|endoftext|>", max_length=128)


@pytest.mark.parametrize("files", [bpe_files, wordpiece_files])
def test_transformers_gives_the_same_ids_and_text(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "t", files())
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.eos_token_id, 128)
    for text in (*NASTY, *fuzz_texts(100)):
        if any(special in text for special in ours.special_tokens):
            continue  # there transformers makes special tokens of text, which is what ours never does
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
        if files is bpe_files:
            assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", grid(["gpt2", "o200k_base"], quick=["gpt2"]))
def test_tiktokens_encodings_keep_their_ids(shared_data, tmp_path, monkeypatch, name):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data.parent / "tiktoken_cache"))
    folder = write(tmp_path / name, convert_tiktoken(name, 1024, fuzz_texts(50)))
    ours = load_tokenizer(folder)
    theirs = tiktoken.get_encoding({"gpt2": "r50k_base"}.get(name, name))
    assert ours.vocab_size == theirs.n_vocab and ours.eos_token_id == theirs.eot_token and ours.kind == "tiktoken"
    for text in (*NASTY, *fuzz_texts(300, seed=7)):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
    assert choose_engine(ours, fuzz_texts(20)).name == "tiktoken"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "does not exist"), (b"{", "not readable"), (b"{}", "not a tokenizer"), (b"[]", "not a JSON object")],
)
def test_a_broken_tokenizer_is_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path)


def test_the_split_patterns_are_read_back_from_a_tokenizer(bpe_folder):
    definition = load_tokenizer(bpe_folder).definition
    assert encoding.split_pattern(definition) == PATTERNS[bpe_folder.name]


@pytest.mark.parametrize("pretokenizer", sorted(PATTERNS))
def test_text_without_breaks_trains_on_words_of_bounded_length_and_encodes_them_whole(pretokenizer):
    """A word that occurs twice would otherwise become one token of its whole length, merge by merge (tokenizers#1395)."""
    word = "".join(random.Random(1).choices("ACDEFGHIKLMNPQRSTVWY", k=5000))
    files = train_bpe(
        lambda: [word, f" {word}"], vocab_size=9000, pretokenizer=pretokenizer, eos_token="<|endoftext|>", max_length=64
    )
    definition = json.loads(files["tokenizer.json"])
    assert max(len(token) for token in definition["model"]["vocab"]) <= 257
    uncut = [step for step in definition["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"]
    assert len(uncut) == 1  # the tokenizer itself cuts no word
    tokenizer = HFTokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.decode(tokenizer.encode(word).ids) == word


def test_words_up_to_the_bound_train_as_before():
    """The same bytes as without the cut, on words of up to 256 characters."""
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdef", k=rng.choice([3, 9, 60, 250, 255]))) for _ in range(60)]
    text = [" ".join(rng.choices(words, k=40)) for _ in range(20)]
    made = {}
    for longest in (256, 10**5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_tokenizer, "_LONGEST_WORD", longest)
            made[longest] = train_bpe(
                lambda: text, vocab_size=800, pretokenizer="gpt2", eos_token="<|endoftext|>", max_length=64
            )
    assert made[256] == made[10**5]


def test_of_much_text_without_breaks_a_part_is_trained_on_whatever_its_order(monkeypatch):
    """Its words are all new, so the trainer's work would grow with its length as it does not for other text."""
    monkeypatch.setattr(train_tokenizer, "_ALL_KEPT", 10_000)
    rng = random.Random(3)
    runs = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=4000)) for _ in range(20)]
    words = [" ".join(rng.choices(["the", "model", "reads"], k=50)) for _ in range(20)]

    def trained(documents: list[str]) -> tuple[dict[str, bytes], list[str], int]:
        seen, said = [], []
        for text in train_tokenizer._thinned(lambda: documents, said.append):
            seen.append(text)
        settings = {"vocab_size": 700, "pretokenizer": "llama3", "eos_token": "<|endoftext|>", "max_length": 64}
        return train_bpe(lambda: documents, **settings), said, sum(map(len, seen))

    files, said, kept = trained([*runs, *words])
    assert 0.15 * 80_000 < kept - sum(map(len, words)) < 0.35 * 80_000  # a quarter, by the chance of a hash
    assert len(said) == 1 and "no breaks" in said[0]
    assert trained([*words[::-1], *runs[::-1]])[0] == files
    assert trained(words)[1:] == ([], sum(map(len, words)))  # other text is left as it is


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram", "BPE"])
def test_special_tokens_in_a_vocabulary_are_never_text_and_all_other_ids_stay(kind):
    """Without the special token's spelling, and with an added token beyond the vocabulary, the tokenizers library's ids."""
    pieces = ["[UNK]", "END", "a", "b", "c", "E", "N", "D", "##N", "##D", "##b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = {
        "WordPiece": lambda: models.WordPiece(vocabulary, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(vocabulary, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([(piece, -1.0 - index) for index, piece in enumerate(pieces)], unk_id=0),
        "BPE": lambda: models.BPE(vocabulary, [], unk_token="[UNK]", ignore_merges=True),
    }[kind]()
    library = HFTokenizer(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[UNK]", "END"])
    library.add_tokens(["zz"])
    definition = json.loads(library.to_str())
    ours = Tokenizer(definition, {"eos_token": "END"}, path=Path("tokenizer.json"), sha256="")
    for text in ("a zz b", "ab c zz", "E N D ? a", "zz"):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert 1 in library.encode("a END b").ids and 1 not in ours.encode("a END b")
