"""Does everything that holds for Llama hold for the other families? One small model of each through the scripts.

What is computed is compared with transformers in tests/test_model.py; here: training, resume, ranks, 4 bits, merging, saving.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import utils
from families.names import FAMILIES
from model import ModelConfig, Transformer, load_pretrained
from tests.forked import Forked, start_ranks
from training.loading import read_shape

PARTS = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "mistral": {"sliding_window": 9},
}  # a window far shorter than the rows
SFT = "--stage sft --init_from base --train_data chat.jsonl --batch_size 4 --max_length 96 --learning_rate 1e-3 \
    --log_interval 1 --eval_interval 0 --save_interval 2 --keep_checkpoints 0 --device cpu"


def sentence(start: int, count: int) -> str:
    words = ["the", "of", "and", "model", "token", "loss", "gradient", "learns", "reads", "writes", "a", "small"]
    return " ".join(words[(start * 5 + i * 3) % len(words)] for i in range(count))


@pytest.fixture(scope="module", params=FAMILIES)
def place(request, tiny_data, tmp_path_factory) -> Path:
    """A folder with a random base of the family, `base`, and examples that are longer than its window."""
    folder = tmp_path_factory.mktemp(request.param)
    base = folder / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_data / name).read_bytes())
    config = ModelConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **PARTS[request.param],
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(seed=1, zero_residual=False)
    (base / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(dict(model.state_dict()), base / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": sentence(i, 6), "completion": sentence(i + 1, 12 + i % 9)} for i in range(24)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_shape(base).family == request.param
    return folder


def train(folder: Path, words: str) -> None:
    with contextlib.chdir(folder):
        ended = Forked(folder / "streams", f"{SFT} {words}".split()).wait()
    assert ended.code == 0, ended.out + ended.err


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in lines if "loss" in row]


def test_a_run_that_stopped_goes_on_as_one_that_did_not(place):
    """Bit for bit, weights and optimizer, from the checkpoint in the middle."""
    train(place, "--max_steps 4 --save_dir whole")
    shutil.copytree(place / "whole", place / "parts")
    shutil.rmtree(place / "parts/checkpoint_step_4")
    train(place, "--save_dir parts --checkpoint latest")
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        whole, parts = (place / run / "checkpoint_step_4" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name


def test_two_ranks_are_one(place):
    train(place, "--max_steps 3 --save_dir one")
    (place / "streams_of").mkdir()
    with contextlib.chdir(place):
        ranks = start_ranks(place / "streams_of", *f"{SFT} --max_steps 3 --micro_batch_size 1 --save_dir two".split())
    assert [rank.wait().code for rank in ranks] == [0, 0]
    assert losses(place / "two") == pytest.approx(losses(place / "one"), rel=1e-5)


def test_what_was_trained_is_the_familys_own_folder(place):
    """transformers' class of the family computes what our model does with the saved weights."""
    transformers = pytest.importorskip("transformers")
    train(place, "--max_steps 2 --save_dir saved")
    folder = place / "saved/checkpoint_step_2"
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(peer).__name__.lower() == f"{read_shape(folder).family}forcausallm"
    ids = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    ours = load_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), peer(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", ["", "--load_in_4bit"])
def test_adapters_learn_and_are_merged(place, bits):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run = f"lora{len(bits)}"
    train(place, f"--lora --lora_r 4 {bits} --max_steps 12 --learning_rate 1e-2 --save_dir {run}")
    first, last = losses(place / run)[0], losses(place / run)[-3:]
    assert sum(last) / 3 < first - 0.2
    merged = place / f"merged{len(bits)}"
    utils.main(["merge", "--base", str(place / "base"), "--adapter", str(place / run), "--output", str(merged)])
    if bits:
        assert read_shape(merged).family == read_shape(place / "base").family
        return
    ids = torch.randint(0, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    theirs = peft.PeftModel.from_pretrained(base, place / run / "checkpoint_step_12")
    ours = load_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=0)
