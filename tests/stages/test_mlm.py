"""Is masked language modelling what BERT's and ModernBERT's classes compute, on masks that follow the samples, to the end?

That a step is the same on 1 rank, on 2, and in any micro-batches is shown in test_every_stage.py.
"""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batches.masking import MASKED, mask_micro_batch, masking_of
from batches.micro_batch import IGNORE_INDEX
from batches.sampler import hash_key, locate
from batches.sentence_pairs import NOT_NEXT, TOKEN_TYPES, open_sentence_pairs
from batches.windows import Windows, open_training_data
from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
from dataprep.shards import open_split
from dataprep.tokenizers import load_tokenizer
from families.weights import stored_views
from model import Transformer, load_pretrained
from model_config import ModelConfig
from ranks import Ranks
from stages.mlm import MLM
from tests.family_models import peer, peer_config, transformers
from tests.forked import Ended, Forked
from tests.ranks import run_ranks
from tests.tiers import grid
from training.loading import load_for_use
from training.precision import choose_precision

CPU = torch.device("cpu")
LENGTH = 32


def a_stage(
    folder: Path, ranks=None, pairs=False, document_mask=True, whole_words=False, eval_tokens=0, micro=8
) -> MLM:
    tokenizer, splits = load_tokenizer(folder), [open_split(folder, name) for name in ("train", "val")]
    train, val = splits
    if pairs:
        data, held_out = (open_sentence_pairs([one], [], tokenizer, max_length=LENGTH, seed=0) for one in splits)
    else:
        data = open_training_data([train], [], max_length=LENGTH, stride=0, document_mask=document_mask, seed=0)
        held_out = Windows(val, LENGTH, 0, document_mask)
    return MLM(
        data=data, validation=held_out, masking=masking_of(tokenizer, 0.3, whole_words), filler_id=tokenizer.filler_id,
        ranks=ranks or Ranks(0, 1, CPU), precision=choose_precision("none", CPU), batch_size=8, micro_batch_size=micro,
        eval_tokens=eval_tokens, z_loss=0.0,
    )  # fmt: skip


def a_bert(folder: Path) -> Transformer:
    """Small, every parameter moved, so that no head is blind."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    config = peer_config("bert", vocab_size=load_tokenizer(folder).vocab_size, max_position_embeddings=LENGTH, **shape)
    model = Transformer(ModelConfig.from_hf({**config.to_dict(), "architectures": ["BertForPreTraining"]}))
    model.init_weights(0, zero_residual=False)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


# -------------------------------------------------------------------------------------------------------- one micro-batch


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()), rtol=0)


def their_loss(theirs: torch.nn.Module, batch, labels: dict) -> torch.Tensor:
    """The mean that transformers takes, of rows whose padding is masked away."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
    if batch.cu_seqlens is not None:  # the second document of a row is its padding
        edges = batch.cu_seqlens.tolist()
        for row in range(len(batch.input_ids)):
            inside = [edge - row * LENGTH for edge in edges if row * LENGTH < edge < (row + 1) * LENGTH]
            inputs["attention_mask"][row, min(inside, default=LENGTH) :] = 0
    return theirs(**inputs, labels=batch.targets, **labels).loss


@pytest.mark.parametrize("name", ["bert", "modernbert", "bert of pairs"])
def test_loss_and_every_gradient_are_those_of_transformers(name, encoder_data, tmp_path):
    """Of rows that are no packed documents: mean masked cross-entropy and, of pairs, mean next-sentence cross-entropy."""
    pairs, sizes = "pairs" in name, {"vocab_size": 128, "pad_token_id": 0}
    if pairs:
        torch.manual_seed(3)
        theirs = transformers.BertForPreTraining(peer_config("bert", **sizes)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    else:
        theirs = peer(name, **sizes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, stage = load_pretrained(tmp_path / "theirs"), a_stage(encoder_data, pairs=pairs, document_mask=False)
    [batch] = next(stage.batches(0))
    assert pairs == (batch.cu_seqlens is not None)
    labels = {}
    if pairs:
        labels = {"token_type_ids": batch.token_columns[TOKEN_TYPES], "next_sentence_label": batch.columns[NOT_NEXT]}
    expected = their_loss(theirs, batch, labels)
    total, figures = stage.loss(ours, batch)
    loss = total / batch.weight
    close(loss, expected)
    told = sum(value / weight for name, (value, weight) in figures.items() if name.endswith("loss"))
    assert float(told) == pytest.approx(loss.item(), rel=1e-6)  # what is reported is what is learned
    for one in (loss, expected):
        one.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = set()
    for name, parameter in ours.named_parameters():
        for stored, gradient in stored_views(ours.config.family, name, parameter.grad).items():
            if stored.endswith("word_embeddings.weight"):  # theirs has no gradient of the row that pads
                gradient[0] = their_gradients[stored][0]
            close(gradient, their_gradients[stored])
            compared.add(stored)
    assert compared == their_gradients.keys()


def test_accuracies_are_the_shares_of_the_best_answers_that_are_right(encoder_data):
    stage, model = a_stage(encoder_data, pairs=True), a_bert(encoder_data)
    [batch] = next(stage.batches(0))
    _, figures = stage.loss(model, batch)
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, token_types=batch.token_columns[TOKEN_TYPES])
    masked = batch.targets != IGNORE_INDEX
    right = (model.logits(hidden).argmax(-1) == batch.targets)[masked]
    nexts = model.next_sentence_logits(hidden[:, 0]).argmax(-1) == batch.columns[NOT_NEXT]
    assert [float(part) for part in figures["masked_accuracy"]] == [right.sum(), masked.sum()]
    assert [float(part) for part in figures["next_sentence_accuracy"]] == [nexts.sum(), 8]
    assert batch.weight == masked.sum() > 0


def test_where_nothing_is_masked_nothing_is_learned(encoder_data):
    stage, model = a_stage(encoder_data), a_bert(encoder_data)
    [batch] = next(stage.batches(0))
    nothing = {"targets": torch.full_like(batch.targets, IGNORE_INDEX), "weight": 0}
    empty = replace(batch, **nothing, columns={**batch.columns, MASKED: batch.columns[MASKED][:0]})
    total, figures = stage.loss(model, empty)
    total.backward()
    assert total == 0 and figures["loss"][1] == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------------------- the rows


def test_rows_are_the_windows_and_documents_begin_with_cls(encoder_data):
    """Behind the masks lie the tokens of the window; special ones are never told; each document's positions begin at [CLS]."""
    stage, tokenizer = a_stage(encoder_data), load_tokenizer(encoder_data)
    split = open_split(encoder_data, "train")
    places = locate(0, 8, num_windows=[len(stage.data.sources[0])], weights=[1.0], seed=0)
    [batch] = next(stage.batches(0))
    num_begins = 0
    for row, window in enumerate(places.window.tolist()):
        told = batch.targets[row] != IGNORE_INDEX
        tokens = torch.from_numpy(split.read(window * LENGTH, LENGTH).astype(np.int64))
        assert torch.equal(batch.targets[row][told], tokens[told])
        assert torch.equal(torch.where(told, tokens, batch.input_ids[row]), tokens)
        assert not set(tokens[told].tolist()) & tokenizer.special_ids
        begins = tokens == tokenizer.cls_token_id
        assert torch.equal((batch.positions[row] == 0)[1:], begins[1:])
        num_begins += int(begins[1:].sum())
    assert num_begins > 3
    assert 0.2 < batch.weight / batch.num_tokens < 0.35


def test_masks_change_from_epoch_to_epoch_and_are_the_same_for_the_same_sample(encoder_data):
    """Every window is seen once an epoch; of most other tokens are told the next time."""
    stage = a_stage(encoder_data, whole_words=True)
    count = len(stage.data.sources[0]) // 8 * 8  # of whole steps
    places = locate(0, 2 * count, num_windows=[len(stage.data.sources[0])], weights=[1.0], seed=0)
    seen: dict[int, list] = {}
    steps = itertools.islice(stage.batches(0), 2 * count // 8)
    rows = [row for [batch] in steps for row in batch.targets.tolist()]
    for window, row in zip(places.window.tolist(), rows, strict=True):
        seen.setdefault(window, []).append(row)
    twice = [found for found in seen.values() if len(found) == 2]
    assert len(twice) > count // 2 and all(first != second for first, second in twice)
    again = next(a_stage(encoder_data, whole_words=True).batches(count))[0]
    assert again.targets.tolist() == rows[count : count + 8]


def test_the_masks_are_those_of_the_sample_keys(encoder_data):
    stage = a_stage(encoder_data)
    [batch] = next(stage.batches(16))
    plain = stage.data.micro_batches(16, 8, 8)[0]
    keys = torch.tensor([hash_key(0, sample) >> 1 for sample in range(16, 24)])
    assert torch.equal(batch.input_ids, mask_micro_batch(plain, keys, stage.masking).input_ids)


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_evaluation_is_that_of_every_document_alone(encoder_data):
    """Each document of each row through the model by itself: what is beside it in the row, padding too, is not seen."""
    stage, model = a_stage(encoder_data), a_bert(encoder_data)
    split, tokenizer = open_split(encoder_data, "val"), load_tokenizer(encoder_data)
    assert (split.num_tokens - 1) % LENGTH  # so there is padding
    loss, right, count = 0.0, 0, 0
    for row in range(-(-(split.num_tokens - 1) // LENGTH)):
        size = min(LENGTH, split.num_tokens - 1 - row * LENGTH)
        tokens = torch.from_numpy(split.read(row * LENGTH, size).astype(np.int64))[None]
        plain = replace(next(stage.batches(0))[0], input_ids=tokens, columns={})
        masked = mask_micro_batch(plain, torch.tensor([hash_key(4, row) >> 1]), stage.masking)
        starts = [place for place in range(1, size) if tokens[0, place] == tokenizer.cls_token_id]
        for begin, end in itertools.pairwise([0, *starts, size]):
            targets = masked.targets[0, begin:end]
            logits = model.logits(model(masked.input_ids[:, begin:end]))[0].double()
            loss += F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX).item()
            right += int((logits.argmax(-1) == targets).sum())
            count += int((targets != IGNORE_INDEX).sum())
    figures = stage.evaluate(model, everything=True)
    assert figures == pytest.approx({"val_loss": loss / count, "val_masked_accuracy": right / count}, rel=1e-5)


@pytest.mark.parametrize("pairs", grid([False, True], quick=[True]))
def test_an_evaluation_is_the_same_each_time_and_on_any_number_of_ranks(pairs, encoder_data):
    def evaluate(rank, world_size):
        stage = a_stage(encoder_data, Ranks(rank, world_size, CPU), pairs, micro=3)
        return stage.evaluate(a_bert(encoder_data), everything=False)

    stage = a_stage(encoder_data, pairs=pairs)
    alone = stage.evaluate(a_bert(encoder_data), everything=False)
    next(stage.batches(0))
    assert stage.evaluate(a_bert(encoder_data), everything=True) == alone  # all of it was read before
    nexts = {"val_next_sentence_loss", "val_next_sentence_accuracy"} if pairs else set()
    assert alone.keys() == {"val_loss", "val_masked_accuracy"} | nexts
    for world_size in (2, 3):
        for figures in run_ranks(evaluate, world_size):
            assert figures == pytest.approx(alone, rel=1e-6)
    some = a_stage(encoder_data, pairs=pairs, eval_tokens=64).evaluate(a_bert(encoder_data), everything=True)
    assert some.keys() == alone.keys() | {f"{name}_all" for name in alone}
    assert some["val_loss_all"] == pytest.approx(alone["val_loss"]) != some["val_loss"]


# ------------------------------------------------------------------------------------------------------- whole path

TINY = "--stage mlm --hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 8 --device cpu --eval_interval 0"


def train(place: Path, words: str, *more: object) -> Ended:
    place.mkdir(exist_ok=True)
    return Forked(place / "streams", [*words.split(), *more, "--save_dir", place / "run"]).wait()


def trained(place: Path, words: str, *more: object) -> Path:
    """The last checkpoint."""
    ended = train(place, words, *more)
    assert ended.code == 0, ended.err
    return place / "run" / (place / "run/latest").read_text().strip()


def figures(place: Path, name: str) -> list[float]:
    """Of a column of metrics.jsonl."""
    rows = map(json.loads, (place / "run/metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(
    ("words", "opened_as"),
    [
        ("--model bert --max_steps 40", "AutoModelForMaskedLM"),
        ("--model bert --next_sentence --max_steps 40", "AutoModelForPreTraining"),
        ("--model modernbert --max_steps 250", "AutoModelForMaskedLM"),
    ],
)
def test_from_text_to_a_folder_that_transformers_opens(words, opened_as, encoder_data, tmp_path):
    """Prepared and trained by the scripts; the loss falls; transformers' class computes what ours does, with its tokenizer."""
    checkpoint = trained(tmp_path, f"{TINY} {words} --learning_rate 1e-2 --log_interval 1", "--data_dir", encoder_data)
    first, *_, last = figures(tmp_path, "loss")
    assert last < first - 0.5
    if "250" in words:  # what stands beside a word is learned, and not only how often each comes
        split = open_split(encoder_data, "val")
        counts = np.bincount(split.read(0, split.num_tokens))[5:]
        shares = counts[counts > 0] / counts.sum()
        assert figures(tmp_path, "val_loss")[-1] < -(shares * np.log(shares)).sum() - 0.3
    theirs, ours = getattr(transformers, opened_as).from_pretrained(checkpoint).eval(), load_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    encoded = tokenizer(["the sun sky cloud [MASK] wind .", "the dog [MASK] ."], padding=True, return_tensors="pt")
    assert tokenizer.mask_token_id == load_tokenizer(checkpoint).mask_token_id and (encoded.input_ids == 4).sum() == 2
    their = theirs(**encoded)
    for row, size in enumerate(encoded.attention_mask.sum(1).tolist()):
        hidden = ours(encoded.input_ids[row : row + 1, :size])
        their_logits = their.prediction_logits if "next" in words else their.logits
        close(ours.logits(hidden)[0], their_logits[row, :size])
        if "next" in words:
            close(ours.next_sentence_logits(hidden[:, 0])[0], their.seq_relationship_logits[row])


@pytest.mark.parametrize("words", ["--model bert --next_sentence --whole_words", "--model modernbert"])
def test_a_run_goes_on_to_the_same_bits(words, encoder_data, tmp_path):
    words = f"{TINY} {words} --dropout 0.1"
    whole = trained(tmp_path / "whole", words, "--data_dir", encoder_data, "--max_steps", 6, "--schedule", "cosine")
    stopped = f"{words} --max_steps 6 --schedule cosine --save_interval 3"
    parts = trained(tmp_path / "parts", stopped, "--data_dir", encoder_data)
    shutil.rmtree(parts)  # as if it had been killed between the two
    again = trained(tmp_path / "parts", "--checkpoint latest --device cpu")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    other = train(tmp_path / "parts", "--checkpoint latest --device cpu --max_steps 9 --mask_probability 0.5")
    assert other.code != 0 and "--mask_probability: 0.5 instead of" in other.err


def test_an_encoder_is_trained_on_and_adapters_open_in_peft(encoder_data, tmp_path):
    """From a folder of transformers; ModernBERT's share is its own; the adapters, merged, give PEFT's logits."""
    peft = pytest.importorskip("peft")
    base = trained(tmp_path / "base", f"{TINY} --model modernbert --max_steps 2", "--data_dir", encoder_data)
    words = f"--stage mlm --batch_size 8 --device cpu --init_from {base} --max_steps 4 --learning_rate 1e-2"
    adapter = trained(tmp_path / "lora", f"{words} --lora --lora_r 4", "--data_dir", encoder_data)
    state = json.loads((adapter / "trainer_state.json").read_text())
    assert state["data_order"]["mask_probability"] == 0.3
    ours = load_for_use(adapter, None, device=CPU, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForMaskedLM.from_pretrained(base), adapter).eval()
    ids = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    close(ours.logits(ours(ids)), theirs(ids).logits)
    assert not torch.equal(theirs(ids).logits, load_pretrained(base).logits(load_pretrained(base)(ids)))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--stage mlm", "--stage mlm trains an encoder: add --model bert or modernbert, or --init_from one"),
        ("--model bert", "--model bert is an encoder, which learns hidden tokens: add --stage mlm"),
        (
            "--stage mlm --model llama",
            "--stage mlm trains an encoder: add --model bert or modernbert, or --init_from one",
        ),
        ("--stage mlm --model bert --sample_prompt The", "--sample_prompt cannot be used with --stage mlm"),
        ("--stage mlm --model modernbert --next_sentence", "--next_sentence is for BERT"),
        ("--stage mlm --model bert --next_sentence --stride 4", "--stride is for rows that are windows of the text"),
        ("--whole_words", "--whole_words is for --stage mlm"),
        (
            "--stage mlm --model bert --mask_probability 1",
            "--mask_probability must lie between 0 and 1, and be neither",
        ),
        ("--stage mlm --init_from BERT --next_sentence", "without a next-sentence head: leave out --next_sentence"),
        ("--stage mlm --init_from PAIRED", "with a next-sentence head: add --next_sentence"),
        ("--stage mlm --init_from BARE", "without a head that tells hidden tokens"),
        ("--stage mlm --init_from LLAMA", "is a llama, which writes text from left to right"),
        ("--init_from BERT", "is a bert, an encoder, which sees what comes after a token and writes no text"),
    ],
)
def test_what_does_not_fit_is_one_sentence(words, sentence, encoder_data, tmp_path):
    tokenizer = {name: (encoder_data / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    classes = {
        "BERT": "BertForMaskedLM",
        "PAIRED": "BertForPreTraining",
        "BARE": "BertModel",
        "LLAMA": "LlamaForCausalLM",
    }
    for name, architecture in classes.items():
        if name in words.split():
            (tmp_path / name).mkdir()
            config = peer_config("llama" if name == "LLAMA" else "bert", num_hidden_layers=1)
            getattr(transformers, architecture)(config).save_pretrained(tmp_path / name)
            for file, content in tokenizer.items():
                (tmp_path / name / file).write_bytes(content)
            words = words.replace(name, str(tmp_path / name))
    ended = train(tmp_path, f"{words} --device cpu --batch_size 2 --max_steps 1", "--data_dir", encoder_data)
    assert ended.code != 0 and sentence in ended.err and len(ended.err.strip().splitlines()) == 1


def test_a_tokenizer_without_a_mask_token_is_told_how_to_get_one(tiny_data, tmp_path):
    ended = train(tmp_path, f"{TINY} --model bert --max_steps 1", "--data_dir", tiny_data)
    assert ended.code != 0
    assert "the tokenizer has no mask token; prepare the data with --tokenizer_type wordpiece, or bpe" in ended.err


@pytest.mark.parametrize("held_out", [[], ["."] * 2])
def test_what_is_held_out_without_pairs_is_not_evaluated_and_says_so(held_out, tmp_path):
    (tmp_path / "text/val").mkdir(parents=True)
    for number, text in enumerate(held_out):
        (tmp_path / f"text/val/{number}.txt").write_text(text)
    texts = [f"the sun sky cloud rain {n} wind storm . the dog runs ." for n in range(30)]
    (tmp_path / "text/a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"tokenizer_type": "wordpiece", "vocab_size": 90, "max_length": 32, "stride": 0, "num_workers": 1}
    split = {"val_subdir": "val"} if held_out else {"val_fraction": 0.0}
    prepare(Options(tmp_path / "text", tmp_path / "data", **split, **settings), Progress())
    words = f"{TINY} --model bert --next_sentence --max_steps 1"
    ended = train(tmp_path, words, "--data_dir", tmp_path / "data")
    assert ended.code == 0, ended.err
    assert "nothing is evaluated: no two documents are held out of which pairs can be made" in ended.out


def test_labels_of_pairs_are_even(encoder_data):
    stage = a_stage(encoder_data, pairs=True)
    labels = Counter(label for [b] in itertools.islice(stage.batches(0), 50) for label in b.columns[NOT_NEXT].tolist())
    assert abs(labels[0] - 200) < 5 * 10  # five standard deviations of 400 draws
