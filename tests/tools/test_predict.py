"""Does `utils.py predict` say of each row what transformers says of it alone, in the rows' order, and refuse the rest?"""

import gzip
import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

import utils
from adapters.lora import add_adapters
from adapters.peft_files import save_adapter
from adapters.scalar_head import RewardModel
from errors import UserError
from tests.forked import Forked
from tests.stages.task_workshop import DECODERS, FAMILIES, WORDS, a_base, transformers, write_all, write_rows
from tests.tiers import grid
from training.run_files import read_history

ENCODERS = tuple(family for family in FAMILIES if family not in DECODERS)
LINES = [
    "the film is [MASK]", "[MASK] lives in [MASK] and bob was very good in oslo", "a [MASK]", "[MASK]",
    "who is not in rome and where was the very very bad film [MASK] bob",
]  # fmt: skip
PLAIN = [line.replace("[MASK]", "ann") for line in LINES]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A language model of each family, masked ones with the name of their mask in the folder."""
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        a_base(folder / family, family)
        path = folder / family / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": "[MASK]"}))
    return {family: folder / family for family in FAMILIES}


@pytest.fixture
def predict(capsys):
    """Runs `utils.py predict` on the CPU; returns its lines and what it wrote to stderr."""

    def call(checkpoint: Path, *words: object) -> tuple[list[dict], str]:
        command = ["predict", "--device", "cpu", "--checkpoint", checkpoint, *words]
        assert utils.main([str(word) for word in command]) == 0
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return call


def a_task(base: Path, folder: Path, stage: str, labels: tuple[str, ...] = (), **more) -> torch.nn.Module:
    """A model of transformers' class for a task, as it saves it, with the tokenizer of `base` beside it."""
    head = {"classify": "SequenceClassification", "tag": "TokenClassification", "answer": "QuestionAnswering"}[stage]
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}} if labels else {}
    )
    config = transformers.AutoConfig.from_pretrained(base, **names, **more)
    torch.manual_seed(11)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 if parameter.dim() > 1 else 0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return model


def a_tokenizer(folder: Path):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_masks_are_filled_as_transformers_pipeline_fills_them(family, bases, predict, tmp_path):
    rows, _ = predict(bases[family], "--input", write_lines(tmp_path / "l.txt", LINES), "--top_k", 3, "--batch_size", 4)
    fill = transformers.pipeline("fill-mask", model=str(bases[family]), tokenizer=a_tokenizer(bases[family]), top_k=3)
    assert [row["text"] for row in rows] == LINES
    for line, row in zip(LINES, rows, strict=True):
        wanted = fill(line)
        wanted = [wanted] if line.count("[MASK]") == 1 else wanted
        assert [[one["id"] for one in mask] for mask in row["masks"]] == [[w["token"] for w in mask] for mask in wanted]
        assert [[one["token"] for one in mask] for mask in row["masks"]] == [
            [w["token_str"] for w in mask] for mask in wanted
        ]
        for mask, theirs in zip(row["masks"], wanted, strict=True):
            assert np.allclose([one["probability"] for one in mask], [w["score"] for w in theirs], **CLOSE)
        if len(wanted) == 1:
            assert row["filled"] == wanted[0][0]["sequence"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    """A RoBERTa with a byte-level BPE, whose <mask> takes in the space before it, as RoBERTa's own does."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    mask = AddedToken("<mask>", lstrip=True, special=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[*names, mask], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS[6:])] * 5, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<mask>", "unk_token": "<unk>", **roles}
        )
    )
    config = transformers.RobertaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=50, type_vocab_size=1,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.RobertaForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
        model.lm_head.bias[tokenizer.get_vocab_size() :] = 9.0  # rows that pad the vocabulary, which are no tokens
    model.save_pretrained(folder)
    return folder


def test_a_roberta_mask_takes_the_space_before_it_and_padding_of_the_vocabulary_is_no_answer(byte_level, predict):
    text = "the film <mask> good and <mask>."
    ((row,), _) = predict(byte_level, "--text", text)
    tokenizer = a_tokenizer(byte_level)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = transformers.RobertaForMaskedLM.from_pretrained(byte_level).eval()(ids).logits[0]
    wanted = logits[ids[0] == 4][:, : len(tokenizer)].softmax(-1).topk(5)
    for mask, values, tokens in zip(row["masks"], wanted.values, wanted.indices, strict=True):
        assert [one["id"] for one in mask] == tokens.tolist()
        assert np.allclose([one["probability"] for one in mask], values, **CLOSE)


def test_a_short_text_is_padded_with_no_position_that_the_model_has_not(byte_level, predict):
    """Of 48 positions, where rows as wide as kernels like them would be of 64."""
    ((row,), _) = predict(byte_level, "--text", "<mask>", "--top_k", 1)
    with torch.no_grad():
        model = transformers.RobertaForMaskedLM.from_pretrained(byte_level).eval()
        wanted = model(torch.tensor([[0, 4, 2]])).logits[0, 1, : len(a_tokenizer(byte_level))].softmax(-1).max()
    assert np.isclose(row["masks"][0][0]["probability"], wanted, **CLOSE)


def test_a_row_without_a_mask_keeps_its_place_and_says_so(bases, predict, tmp_path):
    lines = ["the film is", *LINES[:2], "", LINES[2]]
    rows, err = predict(bases["bert"], "--input", write_lines(tmp_path / "l.txt", lines), "--batch_size", 1)
    assert [row.get("text") for row in rows] == [None, *LINES[:2], None, LINES[2]]
    assert (rows[0], rows[3]) == ({"row": 1, "error": "no [MASK]"}, {"row": 4, "error": "empty text"})
    assert '2 of 5 rows could not be read and have an "error"' in err


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "pooling"),
    grid(
        [(f, p) for f, p in itertools.product(FAMILIES, ("mean", "cls", "last")) if p != "cls" or f in ENCODERS],
        [("bert", "mean"), ("modernbert", "cls"), ("llama", "last"), ("gpt2", "mean")],
    ),
)
def test_embeddings_are_pooled_features_of_transformers(family, pooling, bases, predict, tmp_path):
    words = ("--task", "embed", "--input", write_lines(tmp_path / "l.txt", PLAIN), "--pooling", pooling)
    features = transformers.pipeline(
        "feature-extraction", model=str(bases[family]), tokenizer=a_tokenizer(bases[family])
    )
    states = [torch.tensor(features(line)[0]) for line in PLAIN]
    wanted = [{"mean": state.mean(0), "cls": state[0], "last": state[-1]}[pooling] for state in states]
    rows, err = predict(bases[family], *words)
    assert f"embeddings: {pooling} over at most" in err and "normalised" not in err
    for row, vector in zip(rows, wanted, strict=True):
        assert np.allclose(row["embedding"], vector, **CLOSE)
    rows, err = predict(bases[family], *words, "--normalise")
    assert "normalised" in err
    for row, vector in zip(rows, wanted, strict=True):
        assert np.allclose(row["embedding"], vector / vector.norm(), **CLOSE)


def a_sentence_transformer(base: Path, folder: Path, *, pooling: str, normalise: bool, **limits) -> Path:
    """A bare model with the files that sentence-transformers writes beside one."""
    transformers.AutoModel.from_pretrained(base).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": n, "name": str(n), "path": paths[n], "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    fields = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    settings = {f"pooling_mode_{name}": name == pooling for name in fields}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **settings}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    return folder


def test_a_bare_model_embeds_as_its_folder_says_and_as_flags_say_in_its_place(bases, predict, tmp_path):
    folder = a_sentence_transformer(
        bases["bert"], tmp_path / "st", pooling="cls_token", normalise=True, max_seq_length=6, do_lower_case=False
    )
    rows, err = predict(folder, "--input", write_lines(tmp_path / "l.txt", PLAIN))
    assert "embeddings: cls over at most 6 tokens, normalised" in err
    tokenizer, model = a_tokenizer(folder), transformers.AutoModel.from_pretrained(folder).eval()
    for line, row in zip(PLAIN, rows, strict=True):
        given = tokenizer(line, truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            first = model(given["input_ids"]).last_hidden_state[0, 0]
        assert np.allclose(row["embedding"], first / first.norm(), **CLOSE)
        assert row.get("truncated", False) == (len(line.split()) > 4)
    _, err = predict(folder, "--pooling", "mean", "--text", "ann")
    assert "embeddings: mean over at most 66 tokens\n" in err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("1_Pooling/config.json", {"pooling_mode_max_tokens": True}), "pools by pooling_mode_max_tokens"),
        (("sentence_bert_config.json", {"do_lower_case": True}), "has do_lower_case"),
        (("config_sentence_transformers.json", {"default_prompt_name": "query"}), "begin with its prompt 'query'"),
        (
            ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "1"}]),
            "Transformer, Dense",
        ),
    ],
)
def test_a_recipe_that_is_not_computed_is_refused(change, sentence, bases, predict, tmp_path):
    folder = a_sentence_transformer(bases["bert"], tmp_path / "st", pooling="mean_tokens", normalise=False)
    (folder / change[0]).write_text(json.dumps(change[1]))
    with pytest.raises(UserError, match=f"{sentence}.*name --pooling"):
        predict(folder, "--text", "ann")
    predict(folder, "--text", "ann", "--pooling", "mean")


# ---- classes, tags, answers ------------------------------------------------------------------------------------------

ROWS = {
    "texts": [{"text": line, "id": n, "label": "its own column"} for n, line in enumerate(PLAIN)],
    "pairs": [{"text_a": one, "text_b": other} for one, other in itertools.pairwise(PLAIN)],
}


@torch.no_grad()
def their_logits(model: torch.nn.Module, folder: Path, row: dict) -> torch.Tensor:
    """(K,) of a text or pair, by transformers' class, alone."""
    pair = [row["text"]] if "text" in row else [row["text_a"], row["text_b"]]
    encoded = a_tokenizer(folder)(*pair, return_token_type_ids=True, return_tensors="pt")
    ids = encoded["input_ids"]
    if (
        len(pair) == 2 and model.config.model_type in DECODERS
    ):  # the texts with a line end between, which is no token here
        ids = torch.tensor([[*a_tokenizer(folder)(pair[0])["input_ids"], *a_tokenizer(folder)(pair[1])["input_ids"]]])
    given = {"token_type_ids": encoded["token_type_ids"]} if model.config.model_type == "bert" else {}
    return model(ids, **given).logits[0]


@pytest.mark.parametrize(
    ("family", "rows"),
    grid(itertools.product(FAMILIES, ROWS), [("bert", "pairs"), ("modernbert", "texts"), ("llama", "texts")]),
)
def test_labels_are_those_of_transformers_class(family, rows, bases, predict, tmp_path):
    labels = ("pro", "con", "neither")
    model = a_task(bases[family], tmp_path / "m", "classify", labels, problem_type="single_label_classification")
    found, _ = predict(tmp_path / "m", "--input", write_rows(tmp_path / "r.jsonl", ROWS[rows]), "--batch_size", 3)
    for row, result in zip(ROWS[rows], found, strict=True):
        wanted = their_logits(model, tmp_path / "m", row).softmax(-1)
        assert result["predicted"] == labels[int(wanted.argmax())]
        assert list(result["probabilities"]) == list(labels)
        assert np.allclose(list(result["probabilities"].values()), wanted, **CLOSE)
        assert row.items() <= result.items()


def test_several_labels_and_figures(bases, predict, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", ROWS["texts"])
    names = ("a", "b", "c", "d")
    model = a_task(bases["bert"], tmp_path / "several", "classify", names, problem_type="multi_label_classification")
    for row, result in zip(ROWS["texts"], predict(tmp_path / "several", "--input", path)[0], strict=True):
        wanted = their_logits(model, tmp_path / "several", row).sigmoid()
        assert np.allclose(list(result["probabilities"].values()), wanted, **CLOSE)
        assert result["predicted"] == [name for name, share in zip(names, wanted, strict=True) if share > 0.5]
    for count in (1, 2):
        folder = tmp_path / f"{count}_figures"
        model = a_task(bases["bert"], folder, "classify", names[:count], problem_type="regression")
        for row, result in zip(ROWS["texts"], predict(folder, "--input", path)[0], strict=True):
            wanted = their_logits(model, folder, row)
            assert np.allclose(result["predicted"], wanted if count == 2 else wanted[0], **CLOSE)
            assert "probabilities" not in result


@pytest.mark.parametrize("family", grid(("bert", "modernbert", "llama", "gpt2"), ["bert", "gpt2"]))
def test_tags_are_those_of_each_words_first_token(family, bases, predict, tmp_path):
    names = ("B-PER", "O", "I-PER", "B-LOC")
    model = a_task(bases[family], tmp_path / "m", "tag", names)
    rows = [{"tokens": line.split()} for line in PLAIN]
    found, _ = predict(tmp_path / "m", "--input", write_rows(tmp_path / "r.jsonl", rows))
    as_text, _ = predict(tmp_path / "m", "--input", write_lines(tmp_path / "l.txt", PLAIN))
    tokenizer, some = a_tokenizer(tmp_path / "m"), 0
    for row, result, other in zip(rows, found, as_text, strict=True):
        # a decoder's last word is followed by the end of text, as in training, which it does not see
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            shares = model(encoded["input_ids"]).logits[0].softmax(-1)
        best = shares[[encoded.word_ids().index(word) for word in range(len(row["tokens"]))]].max(-1)
        assert result["predicted"] == [names[tag] for tag in best.indices]
        assert np.allclose(result["probabilities"], best.values, **CLOSE)
        assert {key: other[key] for key in ("words", "predicted", "entities")} == {
            key: result[key] for key in ("words", "predicted", "entities")
        }
        for one in result["entities"]:
            tags = result["predicted"][one["first"] : one["last"] + 1]
            assert one["text"] == " ".join(row["tokens"][one["first"] : one["last"] + 1])
            assert all(tag.endswith(one["type"]) for tag in tags)
            some += 1
    assert some


def test_a_word_beyond_the_models_length_is_outside_without_a_probability(bases, predict, tmp_path):
    a_task(bases["bert"], tmp_path / "m", "tag", ("O", "B-PER", "I-PER"))
    ((row,), _) = predict(tmp_path / "m", "--text", PLAIN[1], "--max_length", 6)
    assert len(row["words"]) == len(row["predicted"]) == 11
    assert row["probabilities"][4:] == [None] * 7 and None not in row["probabilities"][:4]
    assert row["predicted"][4:] == ["O"] * 7 and row["truncated"] is True


CONTEXT = "ann lives in rome and bob was very good in oslo and where was the film that is not bad in rome"


@pytest.mark.parametrize("family", grid(("bert", "roberta", "modernbert", "llama", "gpt2"), ["bert", "llama"]))
def test_an_answer_is_the_likeliest_span_of_at_most_30_tokens(family, bases, predict, tmp_path):
    model = a_task(bases[family], tmp_path / "m", "answer")
    rows = [{"question": "who lives in rome", "context": CONTEXT}, {"question": "where", "context": "bob was in oslo"}]
    found, _ = predict(tmp_path / "m", "--input", write_rows(tmp_path / "r.jsonl", rows))
    tokenizer = a_tokenizer(tmp_path / "m")
    for row, result in zip(rows, found, strict=True):
        question, context = (tokenizer.convert_tokens_to_ids(row[name].split()) for name in ("question", "context"))
        context = [1 if one is None else one for one in context]
        encoder = family in ENCODERS
        ids = [2, *question, 3, *context, 3] if encoder else [*question, *context, 5]
        begin = len(question) + 2 * encoder
        types = {"token_type_ids": torch.tensor([[0] * begin + [1] * (len(context) + 1)])} if family == "bert" else {}
        with torch.no_grad():
            found_by_them = model(torch.tensor([ids]), **types)
        starts, ends = (
            logits[0].double().softmax(-1) for logits in (found_by_them.start_logits, found_by_them.end_logits)
        )
        spans = {
            (first, last): float(starts[begin + first] * ends[begin + last])
            for first in range(len(context))
            for last in range(first, min(first + 30, len(context)))
        }
        first, last = max(spans, key=spans.__getitem__)
        words = row["context"].split()
        assert (
            result["predicted"] == " ".join(words[first : last + 1]) == row["context"][result["start"] : result["end"]]
        )
        assert np.isclose(result["probability"], spans[first, last], rtol=1e-4, atol=1e-6)
        null = 0 if encoder else len(ids) - 1
        assert np.isclose(result["no_answer_probability"], float(starts[null] * ends[null]), rtol=1e-4, atol=1e-6)


def test_a_long_context_is_read_in_windows_and_the_span_is_where_it_stands(bases, predict, tmp_path):
    a_task(bases["bert"], tmp_path / "m", "answer")
    text = " ".join([CONTEXT] * 6)
    ((row,), _) = predict(tmp_path / "m", "--text", "who lives in rome", text, "--max_length", 30, "--doc_stride", 8)
    assert text[row["start"] : row["end"]] == row["predicted"] and 0 < row["probability"] <= 1
    with pytest.raises(UserError, match="--doc_stride 40"):
        predict(tmp_path / "m", "--text", "who lives in rome", text, "--max_length", 30, "--doc_stride", 40)
    assert "truncated" not in row, "the context is read in windows, not cut"
    a_task(bases["modernbert"], tmp_path / "long", "answer", max_position_embeddings=128)
    question = "who lives in rome " * 20
    ((cut,), _) = predict(tmp_path / "long", "--text", question, "ann lives in rome", "--doc_stride", 8)
    assert cut["truncated"] is True


def test_a_trained_adapter_says_what_its_run_measured(predict, tmp_path):
    """A classifier over a base that is not a classifier: predictions are the run's accuracy; and so with base and --adapter."""
    write_all(tmp_path)
    base = a_base(tmp_path / "bert", "bert")
    flags = (
        f"--stage classify --train_data {tmp_path / 'texts.jsonl'} --eval_data {tmp_path / 'texts.jsonl'} --lora --lora_r 4 \
        --init_from {base} --num_epochs 6 --learning_rate 3e-3 --batch_size 8 --eval_interval 0 --device cpu --seed 2"
    )
    ended = Forked(tmp_path / "streams", [*flags.split(), "--save_dir", tmp_path / "run"]).wait()
    assert ended.code == 0, ended.err
    measured = read_history(tmp_path / "run").evals[-1]["val_accuracy"]
    rows, _ = predict(tmp_path / "run", "--input", tmp_path / "texts.jsonl")
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert np.isclose(right, measured) and measured > 0.6
    assert rows == predict(base, "--adapter", tmp_path / "run", "--input", tmp_path / "texts.jsonl")[0]


@pytest.fixture(scope="module")
def reward_adapter(bases, tmp_path_factory) -> Path:
    """That of a run of --stage reward --lora, whose head and adapters are drawn."""
    model = RewardModel.from_pretrained(bases["llama"], seed=0)
    add_adapters(model, rank=4, alpha=6.0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("reward") / "adapter"
    save_adapter(model, folder, base_model=str(bases["llama"]))
    shutil.copy(bases["llama"] / "config.json", folder)  # so that --checkpoint takes it
    return folder


def test_a_reward_adapter_scores_as_the_model_that_is_made_of_it(bases, reward_adapter, predict, tmp_path, capsys):
    lines = write_lines(tmp_path / "l.txt", PLAIN)
    assert (
        utils.main(
            [
                "merge",
                "--base",
                str(bases["llama"]),
                "--adapter",
                str(reward_adapter),
                "--output",
                str(tmp_path / "whole"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    predict_whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    rows, _ = predict(reward_adapter, "--input", lines)
    tokenizer = a_tokenizer(bases["llama"])
    expected = [predict_whole(**tokenizer(line, return_tensors="pt")).logits.item() for line in PLAIN]
    np.testing.assert_allclose([row["predicted"] for row in rows], expected, **CLOSE)
    assert rows == predict(bases["llama"], "--adapter", reward_adapter, "--input", lines)[0]
    np.testing.assert_allclose(
        [row["predicted"] for row in predict(tmp_path / "whole", "--input", lines)[0]], expected, **CLOSE
    )


@pytest.mark.parametrize("kind", ["encoder", "classifier", "reward adapter"])
def test_what_reads_alone_is_not_asked_to_write(kind, bases, reward_adapter, tmp_path):
    a_task(bases["llama"], tmp_path / "task", "classify", ("a", "b"))
    folder = {"encoder": bases["bert"], "classifier": tmp_path / "task", "reward adapter": reward_adapter}[kind]
    for command in (["generate", "--prompt", "ann"], ["chat"]):
        with pytest.raises(UserError, match=r"reads text and does not write: use python utils\.py predict"):
            utils.main([*command, "--device", "cpu", "--checkpoint", str(folder)])


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_batch(bases, predict, tmp_path):
    path = write_lines(tmp_path / "l.txt", PLAIN * 3)
    one, many = (
        np.array([row["embedding"] for row in predict(bases["modernbert"], "--task", "embed", "--input", path,
                                                        "--batch_size", size)[0]])
        for size in (1, 7)
    )  # fmt: skip
    assert np.allclose(one, many, rtol=1e-5, atol=1e-6) and np.allclose(one[:5], one[5:10], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "csv", "tsv", "jsonl", "stdin text", "stdin json"])
def test_rows_come_from_whatever_people_have(kind, bases, predict, tmp_path, monkeypatch):
    objects = "\n".join(json.dumps({"text": line}) for line in LINES)
    contents = {
        "txt": "\n".join(LINES) + "\n", "csv": "text\n" + "\n".join(LINES),
        "tsv": "n\ttext\n" + "\n".join(f"1\t{line}" for line in LINES),
        "jsonl": objects, "stdin text": "\n".join(LINES), "stdin json": objects,
    }  # fmt: skip
    path = tmp_path / f"rows.{kind}"
    if kind.startswith("stdin"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(contents[kind]))
        path = Path("-")
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress(contents["txt"].encode()))
    else:
        path.write_text(contents[kind])
    rows, _ = predict(bases["bert"], "--input", path)
    assert [row["text"] for row in rows] == LINES and [len(row["masks"]) for row in rows] == [1, 2, 1, 1, 1]


def test_what_is_too_long_is_cut_and_says_so(bases, predict):
    ((row,), err) = predict(bases["bert"], "--text", " ".join(["[MASK]", *["film"] * 90]))
    assert row["truncated"] is True and len(row["masks"]) == 1
    assert '1 of 1 rows were cut, and have "truncated"' in err


def test_a_model_of_half_precision_says_nearly_the_same(bases, predict):
    words = ("--task", "embed", "--normalise", "--text", PLAIN[1])
    (full,), (half,) = (predict(bases["bert"], *words, "--dtype", dtype)[0] for dtype in ("float32", "bfloat16"))
    cosine = float(np.dot(full["embedding"], half["embedding"]))
    assert cosine > 0.99 and full["embedding"] != half["embedding"]


@pytest.mark.parametrize(
    ("family", "words", "sentence"),
    [
        ("llama", ["--text", "ann"], "holds a model that writes text: python utils.py generate"),
        ("llama", ["--text", "ann", "--task", "embed", "--pooling", "cls"], "--pooling cls: the first token"),
        ("bert", [], "give the rows as --input FILE or as --text"),
        ("bert", ["--text", "a", "--input", "x.txt"], "give the rows as --input FILE or as --text"),
        ("bert", ["--text", "a", "b", "c"], "--text has 3 texts; give one text, or two"),
        ("bert", ["--text", "ann"], r"--text has no row to read: row 1 has no \[MASK\]"),
        (
            "bert",
            ["--text", "[MASK]", "--pooling", "mean"],
            "--pooling is for another kind of model: this one would fill",
        ),
        ("bert", ["--text", "[MASK]", "--normalise"], "--normalise is for another kind"),
        ("bert", ["--text", "ann", "--task", "embed", "--top_k", "3"], "--top_k is for another kind"),
        ("bert", ["--text", "[MASK]", "--top_k", "0"], "--top_k is 0; it must be at least 1"),
        ("bert", ["--text", "[MASK]", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (
            "bert",
            ["--text", "[MASK]", "--max_length", "67"],
            "--max_length 67 is more than the model in .* takes, 66 tokens",
        ),
        ("bert", ["--text", "[MASK]", "--max_length", "2"], "--max_length 2 has no room for text"),
        ("bert", ["--input", "absent.txt"], r"absent\.txt cannot be read"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(family, words, sentence, bases, predict):
    with pytest.raises(UserError, match=sentence):
        predict(bases[family], *words)


def test_a_file_without_the_columns_and_a_task_that_the_model_is_not_for(bases, predict, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [{"body": "x [MASK]"}])
    with pytest.raises(UserError, match=r"r\.jsonl has no row to read: row 1 has no column text.* among body"):
        predict(bases["bert"], "--input", path)
    a_task(bases["bert"], tmp_path / "m", "classify", ("a", "b"))
    with pytest.raises(UserError, match=r"--task embed: .* is a BertForSequenceClassification"):
        predict(tmp_path / "m", "--task", "embed", "--text", "ann")
    a_task(bases["bert"], tmp_path / "qa", "answer")
    with pytest.raises(UserError, match="--text has 1 texts; give a question and its context"):
        predict(tmp_path / "qa", "--text", "ann")
