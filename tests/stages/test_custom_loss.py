"""Does a loss of the user's own take the place of a stage's: the same sums, the same dropout, on every kind of run?"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from stages.custom_loss import choose_loss
from stages.sft import SFT
from tests.forked import Ended, Forked, start_ranks
from tests.stages.example_stages import a_feed, a_model, a_model_with_adapters, some_examples
from tests.tiers import grid
from training.config import TrainConfig, resolve_config

COMMON = (
    "--batch_size 8 --max_length 64 --log_interval 1 --eval_interval 0 --max_steps 4 --save_interval 2 --keep_checkpoints 0 "
    "--sample_prompt= --device cpu"
)
SHAPE = "--hidden_size 32 --num_heads 2"
OF_ITS_OWN = """
import torch.nn.functional as F
from ranks import unwrap

def loss(model, batch, stage_loss):
    inner = unwrap(model)
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
    logits = inner.logits(hidden).flatten(0, 1)
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")
"""
SAME = "def loss(model, batch, stage_loss):\n    return stage_loss(model, batch)\n"
# a penalty, whose metrics are reported beside the stage's
PENALTY = """
def loss(model, batch, stage_loss):
    total, metrics = stage_loss(model, batch)
    size = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    return total + 0.01 * batch.weight * size, metrics | {"size": (size.detach() * batch.weight, batch.weight)}
"""


def a_loss(folder: Path, text: str, stage: SFT):
    (folder / "mine.py").write_text(text)
    config = TrainConfig(stage="sft", loss_file=f"{folder / 'mine.py'}:loss")
    return choose_loss(config, stage.loss)


def test_a_forward_pass_of_its_own_has_the_stages_dropout(tmp_path):
    """Adapters with dropout, whose masks follow the samples: the same loss and gradients as the stage's, to 1e-5."""
    found = []
    for number in range(2):
        stage, model = SFT(a_feed(some_examples(6, 1))), a_model_with_adapters(dropout=0.3).train()
        loss = a_loss(tmp_path, OF_ITS_OWN, stage) if number else stage.loss
        total = loss(model, next(stage.batches(0))[0])[0]
        total.backward()
        found.append((total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (own, own_gradients), (custom, gradients) = found
    assert custom == pytest.approx(own, rel=1e-5)
    assert F.cosine_similarity(own_gradients, gradients, dim=0) > 0.99999


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return 1.0", "line 2, loss: TypeError: it must return the summed loss.* and returned float"),
        ("return model(batch.input_ids, batch.positions, batch.cu_seqlens)", "and returned Tensor of shape .*, 32"),
        ("return stage_loss(model, batch)[0].detach()", "does not depend on what is trained"),
        ("x = 1\n    return batch.no_such_thing", "line 4, loss: AttributeError: 'MicroBatch' object has no attribute"),
    ],
)  # fmt: skip
def test_a_loss_that_is_none_ends_the_run_with_a_sentence(tmp_path, body, sentence):
    stage, model = SFT(a_feed(some_examples(6, 1))), a_model()
    loss = a_loss(tmp_path, f"\ndef loss(model, batch, stage_loss):\n    {body}\n", stage)
    with pytest.raises(UserError, match=sentence) as caught:
        loss(model, next(stage.batches(0))[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("mine.py", "write FILE:FUNCTION"),
        ("nowhere.py:loss", "--loss_file nowhere.py cannot be read"),
        ("mine.py:los", "defines no los; did you mean loss"),
        ("mine.py:helper", "line 4: helper is called with 3 arguments, and does not take so many"),
    ],
)
def test_a_file_without_the_function_is_refused_before_any_data_is_read(tmp_path, monkeypatch, spec, sentence):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def loss(model, batch, stage_loss):\n    return None\n\ndef helper(model): ...\n")
    with pytest.raises(UserError, match=sentence):
        resolve_config({"data_dir": ["nowhere"], "loss_file": spec})


# ------------------------------------------------------------------------------------------------------------- whole runs


def train(folder: Path, words: str, code: int = 0) -> Ended:
    with contextlib.chdir(folder):
        ended = Forked(folder / "streams", words.split()).wait()
    assert ended.code == code, ended.out + ended.err
    return ended


def digest(run: Path, step: int) -> str:
    files = sorted((run / f"checkpoint_step_{step}").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def rows(run: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in lines if key in row}


@pytest.fixture(scope="module")
def place(tiny_data, tmp_path_factory) -> Path:
    """A folder with text, examples, and the files of losses."""
    folder = tmp_path_factory.mktemp("losses")
    (folder / "TEXT").symlink_to(tiny_data)
    (folder / "same.py").write_text(SAME)
    (folder / "penalty.py").write_text(PENALTY)
    examples = [{"prompt": f"the model {n}", "completion": "reads a text"} for n in range(12)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return folder


@pytest.fixture(scope="module")
def base(place) -> Path:
    """A run on the text with the stage's own loss."""
    train(place, f"{COMMON} {KINDS['text']} --save_dir base")
    return place / "base"


KINDS = {
    "text": f"--data_dir TEXT {SHAPE} --num_layers 2",
    "lora": "--stage sft --init_from base --train_data answers.jsonl --lora --lora_dropout 0.2",
    "qlora": "--stage sft --init_from base --train_data answers.jsonl --lora --load_in_4bit",
    "compiled": f"--data_dir TEXT {SHAPE} --num_layers 1 --compile_model",
}


@pytest.mark.parametrize("kind", grid(KINDS, quick=["text"]))
def test_a_run_that_goes_on_is_the_run_that_never_stopped(place, kind, request):
    if "base" in KINDS[kind]:
        request.getfixturevalue("base")
    train(place, f"{COMMON} {KINDS[kind]} --save_dir {kind} --loss_file penalty.py:loss")
    whole, losses = digest(place / kind, 4), rows(place / kind, "loss")
    sizes = rows(place / kind, "size")
    assert len(sizes) == 4 and min(sizes.values()) > 0
    shutil.rmtree(place / kind / "checkpoint_step_4")
    (place / "penalty.py").write_text(f"{PENALTY}# another comment\n")
    ended = train(place, f"--save_dir {kind} --checkpoint latest")
    (place / "penalty.py").write_text(PENALTY)
    assert "--loss_file is not what" in ended.out and "(changed: penalty.py:loss)" in ended.out
    assert digest(place / kind, 4) == whole and rows(place / kind, "loss") == losses


@pytest.mark.exhaustive
def test_the_stages_own_loss_through_a_file_gives_the_same_bits(place, base):
    train(place, f"{COMMON} {KINDS['text']} --save_dir same --loss_file same.py:loss")
    assert digest(place / "same", 4) == digest(base, 4)


@pytest.mark.exhaustive
def test_two_ranks_give_the_losses_of_one(place, tmp_path):
    """With a loss that adds to each micro-batch by its weight; to 1e-5 over 4 steps."""
    words = f"{COMMON} {KINDS['text'].replace('TEXT', str(place / 'TEXT'))} --loss_file {place / 'penalty.py'}:loss"
    train(place, f"{words} --save_dir one --micro_batch_size 3")
    ended = [one.wait() for one in start_ranks(tmp_path, *f"{words} --save_dir {tmp_path / 'two'}".split())]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    for key in ("loss", "size", "grad_norm"):
        one, two = rows(place / "one", key), rows(tmp_path / "two", key)
        assert all(two[step] == pytest.approx(one[step], rel=1e-5) for step in one)
