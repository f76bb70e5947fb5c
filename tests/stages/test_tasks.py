"""Do stages that classify, tag and find answers learn, exactly, and leave what transformers and PEFT open?

Runs are train.py's own, on models of 24 words. What a run says of held-out examples is compared with what transformers'
classes, opened from its checkpoint, make of each text by itself.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that
from safetensors.torch import load_file

from adapters.task_heads import TaskModel
from arguments import ArgumentParser
from errors import UserError
from families.task_names import TASKS
from ranks import Ranks, unwrap
from tests.forked import Forked
from tests.ranks import run_ranks
from tests.stages.task_workshop import DECODERS, FAMILIES, WORDS, a_base, texts, transformers, write_all, write_rows
from tests.tiers import grid
from train import Run, build_run
from training.config import add_options
from training.metrics import reduce_metrics
from training.run_files import read_history
from utils import main as utils_main

CPU = torch.device("cpu")
DATA = {
    "texts": "--stage classify --train_data texts.jsonl --eval_data texts.jsonl",
    "pairs": "--stage classify --train_data pairs.jsonl --eval_data pairs.jsonl",
    "figures": "--stage classify --train_data figures.jsonl --eval_data figures.jsonl",
    "several": "--stage classify --train_data several.jsonl --eval_data several.jsonl",
    "sentences": "--stage tag --train_data sentences.jsonl --eval_data sentences.jsonl",
    "questions": "--stage answer --train_data questions.jsonl --eval_data questions.jsonl --max_length 24 --doc_stride 4",
    "answerable": "--stage answer --train_data answerable.jsonl --eval_data answerable.jsonl --max_length 24 --doc_stride 4",
}  # fmt: skip
CELLS = [(family, kind) for family in FAMILIES for kind in DATA]
GOOD = {
    "texts": ("val_accuracy", "val_f1", "val_matthews"), "pairs": ("val_accuracy",), "figures": ("val_pearson",),
    "several": ("val_f1", "val_exact_match"), "sentences": ("val_f1", "val_accuracy", "val_f1/PER"),
    "questions": ("val_exact_match", "val_f1", "val_f1/no_answer"), "answerable": ("val_exact_match", "val_f1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_all(folder)
    for family in FAMILIES:
        a_base(folder / family, family)
    return folder


def words_of(workshop: Path, family: str, words: str, save_dir: Path) -> list[str]:
    places = {path.name: str(path) for path in workshop.iterdir()}
    every = f"{words} --init_from {family} --device cpu --batch_size 8 --eval_interval 0 --save_dir {save_dir}"
    return [places.get(word, word) for word in every.split()]


def train(workshop: Path, family: str, words: str, save_dir: Path) -> Path:
    """The last checkpoint of a run."""
    ended = Forked(save_dir.parent / f"{save_dir.name}_streams", words_of(workshop, family, words, save_dir)).wait()
    assert ended.code == 0, ended.err
    return max(save_dir.glob("checkpoint_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def last_figures(save_dir: Path) -> dict:
    return read_history(save_dir).evals[-1]


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("family", "kind"), grid(CELLS, [("bert", "texts"), ("llama", "sentences"), ("gpt2", "answerable")])
)
def test_it_learns_and_draws_what_it_confuses(family, kind, workshop, tmp_path):
    """Every held-out figure above 0.95 after what a few seconds teach."""
    save_dir = tmp_path / "run"
    train(workshop, family, f"{DATA[kind]} --num_epochs 60 --learning_rate 3e-3 --seed 2", save_dir)
    figures = last_figures(save_dir)
    assert all(figures[name] > 0.95 for name in GOOD[kind]), figures
    assert (save_dir / "confusion.png").exists() == (kind in ("texts", "pairs")) and (save_dir / "curves.png").exists()


def opened(path: Path, stage: str, **given):
    """(transformers' tokenizer, its model) of a checkpoint."""
    auto = getattr(transformers, f"AutoModelFor{TASKS[stage]}")
    model, report = auto.from_pretrained(path, output_loading_info=True, **given)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return a_tokenizer(path), model.eval()


def a_tokenizer(path: Path):
    """As the files say: AutoTokenizer makes of a Qwen 2's a BPE, and words are not of these."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


def rows_of(workshop: Path, kind: str) -> list[dict]:
    return [json.loads(line) for line in (workshop / f"{kind}.jsonl").read_text().splitlines()]


@torch.no_grad()
def their_figures(path: Path, kind: str, rows: list[dict], model=None) -> dict[str, float]:
    """The held-out loss and a figure, of transformers' model of a checkpoint, one text at a time."""
    stage = DATA[kind].split()[1]
    tokenizer, own = (None, None) if model else opened(path, stage)
    if model:
        tokenizer, own = a_tokenizer(path), model
    losses, right = [], []
    for row in rows:
        if kind == "sentences":
            encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            found = own(encoded["input_ids"]).logits[0]
            places = [encoded.word_ids().index(word) for word in range(len(row["tokens"]))]
            tags = torch.tensor([own.config.label2id[tag] for tag in row["tags"]])
            losses += torch.nn.functional.cross_entropy(found[places], tags, reduction="none").tolist()
            right += (found[places].argmax(1) == tags).tolist()
            continue
        pair = [row["text"]] if "text" in row else [row["text_a"], row["text_b"]]
        if len(pair) == 2 and own.config.model_type in DECODERS:
            ids = [tokenizer.convert_tokens_to_ids(word) for word in " ".join(pair).split()]
            given = {"input_ids": torch.tensor([ids])}
        else:
            encoded = tokenizer(*pair, return_token_type_ids=True, return_tensors="pt")
            given = {name: encoded[name] for name in ("input_ids",)}
            if own.config.model_type == "bert":
                given["token_type_ids"] = encoded["token_type_ids"]
        label = row["labels"] if kind == "several" else row["label"]
        if kind == "several":
            target = torch.zeros(1, own.config.num_labels)
            target[0, [own.config.label2id[name] for name in label]] = 1
        elif kind == "figures":
            target = torch.tensor([[label]])
        else:
            target = torch.tensor([own.config.label2id[str(label)]])
        out = own(**given, labels=target)
        losses.append(float(out.loss))
        if kind == "several":
            right.append(bool(((out.logits > 0) == (target > 0)).all()))
        else:
            right.append(abs(float(out.logits) - label) if kind == "figures" else bool(out.logits.argmax() == target))
    return {"val_loss": float(np.mean(losses)), "figure": float(np.mean(right))}


FIGURE = {
    "texts": "val_accuracy", "pairs": "val_accuracy", "figures": "val_mae", "several": "val_exact_match",
    "sentences": "val_accuracy",
}  # fmt: skip
JUDGED = [
    (family, kind, lora)
    for family in FAMILIES
    for kind in FIGURE
    for lora in ("", "--lora")
    if not (kind == "pairs" and family in ("roberta", "modernbert", *DECODERS))  # templates of their own
]


@pytest.mark.parametrize(
    ("family", "kind", "lora"),
    grid(JUDGED, [("bert", "pairs", ""), ("llama", "texts", ""), ("modernbert", "texts", ""), ("gpt2", "sentences", "--lora"),
                  ("bert", "texts", "--lora"), ("roberta", "figures", "")]),
)  # fmt: skip
def test_held_out_figures_are_those_that_transformers_finds(family, kind, lora, workshop, tmp_path):
    """After little training, so that not all is right; the loss to 1e-4. With LoRA: PEFT's adapter on transformers' class of
    the base, and the merged folder."""
    save_dir = tmp_path / "run"
    path = train(workshop, family, f"{DATA[kind]} --max_steps 12 --learning_rate 2e-3 {lora}", save_dir)
    figures = last_figures(save_dir)
    models = [(path, None)]
    if lora:
        merged = tmp_path / "merged"
        assert (
            utils_main(["merge", "--base", str(workshop / family), "--adapter", str(path), "--output", str(merged)])
            == 0
        )
        models = [(merged, None), (path, peft_model(workshop / family, path, DATA[kind].split()[1]))]
    for folder, model in models:
        found = their_figures(folder, kind, rows_of(workshop, kind), model)
        assert math.isclose(found["val_loss"], figures["val_loss"], rel_tol=1e-4), (found, figures)
        assert math.isclose(found["figure"], figures[FIGURE[kind]], rel_tol=1e-3, abs_tol=1e-6)


def peft_model(base: Path, adapter: Path, stage: str):
    """PEFT's adapter on transformers' class over the base, as its user opens it."""
    peft = pytest.importorskip("peft")
    config = transformers.AutoConfig.from_pretrained(adapter / "task_config.json")
    auto = getattr(transformers, f"AutoModelFor{TASKS[stage]}")
    # their classes of Llama and its like for answers look for the body under another name than a language model's folder has
    renamed = {"^model[.]": "transformer."} if stage == "answer" and config.model_type in ("llama", "qwen2") else None
    model = auto.from_pretrained(base, config=config, key_mapping=renamed)
    # PEFT's own forward for answers drops token_type_ids
    return peft.PeftModel.from_pretrained(model, adapter).eval().base_model


@torch.no_grad()
def their_answer_loss(path: Path, windows: list, model=None) -> float:
    """A window's mean loss of transformers' model on the same windows, one at a time."""
    own = model or opened(path, "answer")[1]
    losses = []
    for window in windows:
        sequence, given = window.sequence, {}
        if own.config.model_type == "bert":
            starts = sequence.columns["second_starts"]
            given["token_type_ids"] = (torch.arange(len(sequence.tokens)) >= starts).long()[None]
        places = {f"{side}_positions": torch.tensor([int(sequence.columns[side])]) for side in ("start", "end")}
        losses.append(float(own(torch.tensor(sequence.tokens, dtype=torch.int64)[None], **given, **places).loss))
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("family", "lora"),
    grid([(f, l) for f in FAMILIES for l in ("", "--lora")], [("llama", ""), ("bert", "--lora")]),
)  # fmt: skip
def test_answers_are_those_that_transformers_finds(family, lora, workshop, tmp_path):
    """With LoRA as above."""
    save_dir = tmp_path / "run"
    words = f"{DATA['questions']} --max_steps 12 --learning_rate 2e-3 {lora}"
    path = train(workshop, family, words, save_dir)
    run = build(workshop, family, words, tmp_path / "again")
    windows = [window for windows in run.stage.windows for window in windows]
    assert len(windows) > len(run.stage.questions)
    wanted = last_figures(save_dir)["val_loss"]
    folders = [(path, None)]
    if lora:
        merged = tmp_path / "merged"
        assert (
            utils_main(["merge", "--base", str(workshop / family), "--adapter", str(path), "--output", str(merged)])
            == 0
        )
        folders = [(merged, None), (path, peft_model(workshop / family, path, "answer"))]
    for folder, model in folders:
        assert math.isclose(their_answer_loss(folder, windows, model), wanted, rel_tol=1e-4)


@pytest.mark.parametrize("family", grid(FAMILIES, ["llama"]))
def test_over_4_bits_the_head_is_whole_and_merging_gives_the_same(family, workshop, tmp_path):
    """The merged folder holds the decoded 4-bit weights and the adapter: the same held-out loss to 1e-4."""
    save_dir, merged = tmp_path / "run", tmp_path / "merged"
    path = train(
        workshop, family, f"{DATA['texts']} --max_steps 12 --learning_rate 2e-3 --lora --load_in_4bit", save_dir
    )
    held = load_file(path / "adapter_model.safetensors")
    whole = [name for name in held if ".lora_" not in name]
    assert whole and all(held[name].dtype == torch.float32 for name in whole)
    assert utils_main(["merge", "--base", str(workshop / family), "--adapter", str(path), "--output", str(merged)]) == 0
    found = their_figures(merged, "texts", rows_of(workshop, "texts"))
    assert math.isclose(found["val_loss"], last_figures(save_dir)["val_loss"], rel_tol=1e-4)


# ------------------------------------------------------------------------------------------------------------- the loop


def build(workshop: Path, family: str, words: str, save_dir: Path, rank: int = 0, world_size: int = 1) -> Run:
    save_dir.mkdir(exist_ok=True, parents=True)
    parser = ArgumentParser()
    add_options(parser)
    given = vars(parser.parse_args(words_of(workshop, family, words, save_dir)))
    return build_run(given, Ranks(rank, world_size, CPU), None)


def step(rank: int, world_size: int, workshop: Path, family: str, words: str, save_dir: Path):
    """(weights of this rank's micro-batches, figures, held-out figures, gradients by name) of a first step."""
    run = build(workshop, family, f"{words} --grad_clip 0", save_dir, rank, world_size)
    micro_batches, gradients = next(run.stage.batches(0)), {}

    def keep(*_) -> None:
        named = unwrap(run.model).named_parameters()
        gradients.update({name: p.grad.numpy().copy() for name, p in named if p.grad is not None})

    held_out = run.stage.evaluate(run.model, everything=True)
    run.optimizers[0].register_step_pre_hook(keep)
    sums, norm, _ = run.optimizer_step(micro_batches, 1.0, False)
    figures = reduce_metrics(sums, run.ranks) | {"grad_norm": norm.item()}
    return [batch.weight for batch in micro_batches], figures, held_out, gradients


DIVIDED = [
    ("bert", f"{DATA['texts']} --class_weights balanced --dropout 0.3"), ("bert", DATA["pairs"]),
    ("roberta", DATA["figures"]), ("modernbert", DATA["several"]), ("llama", f"{DATA['texts']} --lora --lora_dropout 0.3"),
    ("llama", f"{DATA['sentences']} --class_weights balanced --dropout 0.3"), ("bert", f"{DATA['sentences']} --lora"),
    ("gpt2", DATA["questions"]), ("bert", f"{DATA['questions']} --dropout 0.3"),
    ("qwen2", f"{DATA['questions']} --lora --load_in_4bit"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words"), grid(DIVIDED, [DIVIDED[0], DIVIDED[5], DIVIDED[8]]))
def test_a_step_and_its_judgement_are_the_same_however_divided(family, words, workshop, tmp_path):
    """One rank at once, in micro-batches of one row of 24 tokens or fewer, and two ranks: figures and every gradient to 1e-5."""
    words = words if "--max_length" in words else f"{words} --max_length 24"
    whole, wanted, judged, expected = step(0, 1, workshop, family, words, tmp_path / "whole")
    for world_size in (1, 2):
        divided = workshop, family, f"{words} --micro_batch_size 1", tmp_path / f"{world_size}"
        results = [step(0, 1, *divided)] if world_size == 1 else run_ranks(step, 2, *divided)
        weights = [weight for weights, *_ in results for weight in weights]
        assert sum(weights) == sum(whole) and len(weights) > len(whole)
        for _, figures, held_out, gradients in results:
            assert figures == pytest.approx(wanted, rel=1e-5) and held_out == pytest.approx(judged, rel=1e-5, abs=1e-7)
            norm = wanted["grad_norm"]
            for name, gradient in expected.items():
                assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * (np.linalg.norm(gradient) + 1e-2 * norm), (
                    name
                )


@pytest.mark.parametrize(("family", "words"), grid(DIVIDED, [DIVIDED[4], DIVIDED[8]]))
def test_a_run_that_goes_on_has_the_same_bits(family, words, workshop, tmp_path):
    whole = tmp_path / "whole"
    words = f"{words} --max_steps 6 --save_interval 3 --learning_rate 1e-3"
    last = train(workshop, family, words, whole)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / last.name)
    found = train(workshop, family, f"{words} --checkpoint latest", again)
    assert found.name == last.name == "checkpoint_step_6"
    for file in last.glob("*.safetensors"):
        first, second = load_file(file), load_file(found / file.name)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("words", grid(["--mixed_precision bf16", "--compile_model", "--optimizer muon"], []))
@pytest.mark.parametrize("kind", grid(DATA, []))
def test_other_numerics_learn_the_same(words, kind, workshop, tmp_path):
    figures = []
    for more in ("", words):
        save_dir = tmp_path / f"run{len(figures)}"
        train(
            workshop,
            "bert",
            f"{DATA[kind]} --max_steps 10 --learning_rate 1e-3 --mixed_precision none {more}",
            save_dir,
        )
        figures.append(last_figures(save_dir)["val_loss"])
    assert math.isclose(*figures, rel_tol=0.25 if "muon" in words else 0.02), figures


def test_a_word_beyond_the_length_is_wrong_where_no_tag_means_outside(workshop, tmp_path):
    """Tags of a segmenter, which have no O; the model says S of every word that it sees, the first of three."""
    rows = [{"tokens": ["ann", "rome", "bob"], "tags": list(tags)} for tags in ("SSS", "BME")]
    write_rows(tmp_path / "t.jsonl", rows)
    words = f"--stage tag --train_data {tmp_path}/t.jsonl --eval_data {tmp_path}/t.jsonl --max_length 3"
    run = build(workshop, "bert", words, tmp_path / "run")
    assert run.stage.names == ("B", "E", "M", "S")
    head = dict(run.model.named_parameters())
    with torch.no_grad():
        head["classifier.weight"].zero_()
        head["classifier.bias"].copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert math.isclose(run.stage.evaluate(run.model, everything=True)["val_accuracy"], 1 / 6)


def test_class_weights_change_the_loss_as_said(workshop, tmp_path):
    """n / (k · count) of each label: the weighted mean of the labels' losses, each label counting the same."""
    rows = [row for row in texts(48) if row["label"] != "?"] + texts(3)[2:]
    write_rows(tmp_path / "rare.jsonl", rows)
    words = f"--stage classify --train_data {tmp_path}/rare.jsonl --eval_data {tmp_path}/rare.jsonl"
    losses = {}
    for weights in ("none", "balanced"):
        run = build(workshop, "bert", f"{words} --class_weights {weights}", tmp_path / weights)
        losses[weights] = run.stage.evaluate(run.model, everything=True)["val_loss"]
    found = their_figures_by_label(run, rows)
    counts = {label: len(values) for label, values in found.items()}
    assert counts == {"pro": 16, "con": 16, "?": 1}
    assert math.isclose(losses["none"], np.mean(np.concatenate(list(found.values()))), rel_tol=1e-5)
    assert math.isclose(losses["balanced"], np.mean([np.mean(values) for values in found.values()]), rel_tol=1e-5)


@torch.no_grad()
def their_figures_by_label(run: Run, rows: list[dict]) -> dict[str, list[float]]:
    """The loss of each text, alone, by its label."""
    names, found = run.stage.labels.names, {}
    for row in rows:
        ids = [2, *(WORDS.index(word) for word in row["text"].split()), 3]
        logits = run.model(torch.tensor([ids]))[0, 0]
        found.setdefault(row["label"], []).append(-float(logits.log_softmax(0)[names.index(row["label"])]))
    return found


def test_a_trained_classifier_goes_on_with_its_labels(workshop, tmp_path):
    """Its head and its names, in their order, though the new file has fewer; a name that it has not is refused."""
    first = train(workshop, "bert", f"{DATA['texts']} --max_steps 4 --learning_rate 1e-3", tmp_path / "first")
    two = write_rows(tmp_path / "two.jsonl", [row for row in texts(12) if row["label"] != "?"])
    words = f"--stage classify --train_data {two} --eval_fraction 0"
    run = build(workshop, str(first), words, tmp_path / "second")
    assert run.stage.labels.names == ("?", "con", "pro")
    assert torch.equal(run.model.classifier.weight, TaskModel.from_pretrained(first).classifier.weight)
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"text": "good", "label": "pro"}, {"text": "bad", "label": "meh"}])
    with pytest.raises(UserError, match=r"wrong.jsonl:2 has the label 'meh', which is none of \?, con, pro"):
        build(workshop, str(first), words.replace(str(two), str(wrong)), tmp_path / "third")


def test_questions_about_one_text_are_held_out_together(workshop, tmp_path):
    words = DATA["questions"].replace("--eval_data questions.jsonl", "--eval_fraction 0.2")
    run = build(workshop, "bert", words, tmp_path / "run")
    kept = {question.context for question in run.stage.questions}
    learned = {question.context for question in run.data.task.train.read}
    assert kept and learned and not kept & learned


TWO = [{"text": "good", "label": "x"}, {"text": "bad", "label": "y"}]
BAD = {
    "label of held-out rows": (
        "classify", TWO, [{"text": "good", "label": "z"}], "", r"held.jsonl:1 has the label 'z', which is none of x, y"
    ),
    "tags of another length": (
        "tag", [{"tokens": ["ann", "is"], "tags": ["O"]}], None, "", "rows.jsonl:1 has 2 tokens but 1 tags"
    ),
    "tag that is not known": (
        "tag", [{"tokens": ["ann"], "tags": ["O"]}], [{"tokens": ["ann"], "tags": ["B-X"]}], "", "has the label 'B-X'"
    ),
    "span outside the context": (
        "answer", [{"question": "who", "context": "ann is", "answers": {"text": ["bob"], "answer_start": [40]}}], None, "",
        "rows.jsonl:1 has the answer 'bob' at character 40, but the context does not have it",
    ),
    "weights of figures": (
        "classify", [{"text": "good", "label": 0.5}, {"text": "bad", "label": 1.5}], None, "--class_weights balanced",
        "--class_weights is for one label a text, and these are regression labels",
    ),
    "weights of answers": ("answer", [], None, "--class_weights balanced", "--class_weights is for --stage classify and tag"),
    "stride as long as the window": (
        "answer", [{"question": "who", "context": "ann is", "answers": {"text": ["ann"], "answer_start": [0]}}], None,
        "--max_length 16 --doc_stride 16", "must be more than --doc_stride 16",
    ),
    "rows too long": ("classify", TWO, None, "--max_length 4096", "--max_length 4096 is more than the model in .* takes, 66"),
    "a sample": ("classify", TWO, None, "--sample_prompt good", "the model writes no text"),
    "no columns": ("classify", [{"body": "good", "stars": 1}], None, "", "--rename_columns can say which is text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, workshop, tmp_path):
    stage, rows, held_out, more, sentence = BAD[case]
    words = f"--stage {stage} --train_data {write_rows(tmp_path / 'rows.jsonl', rows)} {more}"
    if held_out:
        words += f" --eval_data {write_rows(tmp_path / 'held.jsonl', held_out)}"
    with pytest.raises(UserError, match=sentence) as raised:
        build(workshop, "bert", words, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_the_plan_counts_the_examples(workshop, tmp_path, capsys):
    words = [word for word in words_of(workshop, "bert", DATA["questions"], tmp_path / "run")]
    assert utils_main(["plan", *words]) == 0
    said = capsys.readouterr().out
    run = build(workshop, "bert", DATA["questions"], tmp_path / "run")
    assert f"{len(run.data.train.groups):,} examples to learn from" in said and "8 windows = about" in said
