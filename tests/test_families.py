"""Does everything that holds for Llama hold for the other families? One small model of each through the scripts.

What is computed is compared with transformers in tests/test_family_parity.py; here: training, resume, ranks, 4 bits,
merging, saving.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import utils
from checkpointing.tensors import model_tensors
from families.names import FAMILIES
from families.new_models import ENCODERS, NEW_MODELS
from model import Transformer, count_parameters, load_pretrained
from model_config import ModelConfig
from tests.family_models import peer_config
from tests.forked import Forked, start_ranks
from tests.tiers import grid
from training.loading import find_adapter, load_for_use, read_shape

# of each family one; those that differ most run each time
DECODERS = (
    "llama", "mistral", "qwen2 windows", "qwen3", "gpt2", "phi3", "phi4 mini", "gemma2", "gemma3", "olmo2", "olmo3", "smollm3",
    "granite", "mixtral", "qwen3 moe",
)  # fmt: skip
QUICK = ("llama", "gpt2", "phi3", "gemma2", "olmo3", "mixtral")
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
SFT = "--stage sft --init_from base --train_data chat.jsonl --batch_size 4 --max_length 96 --learning_rate 1e-3 \
    --log_interval 1 --eval_interval 0 --save_interval 2 --keep_checkpoints 0 --device cpu"


def sentence(start: int, count: int) -> str:
    words = ["the", "of", "and", "model", "token", "loss", "gradient", "learns", "reads", "writes", "a", "small"]
    return " ".join(words[(start * 5 + i * 3) % len(words)] for i in range(count))


@pytest.fixture(scope="module", params=grid(DECODERS, QUICK))
def place(request, tiny_data, tmp_path_factory) -> Path:
    """A folder with a random base of the family, `base`, and examples that are longer than its window."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    base = folder / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_data / name).read_bytes())
    config = ModelConfig.from_hf(peer_config(request.param, vocab_size=512).to_dict())
    model = Transformer(config)
    model.init_weights(seed=1, zero_residual=False)
    (base / "config.json").write_text(json.dumps(config.to_hf()))
    weights = {name: tensor.contiguous() for name, tensor in model_tensors(model).items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": sentence(i, 6), "completion": sentence(i + 1, 12 + i % 9)} for i in range(24)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_shape(base) == config
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
    train(place, "--max_steps 4 --save_dir whole --dropout 0.1")
    shutil.copytree(place / "whole", place / "parts")
    shutil.rmtree(place / "parts/checkpoint_step_4")
    train(place, "--save_dir parts --checkpoint latest")
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        whole, parts = (place / run / "checkpoint_step_4" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name


def test_two_ranks_are_one(place):
    train(place, "--max_steps 3 --save_dir one --dropout 0.1")
    (place / "streams_of").mkdir()
    with contextlib.chdir(place):
        ranks = start_ranks(
            place / "streams_of", *f"{SFT} --max_steps 3 --micro_batch_size 1 --save_dir two --dropout 0.1".split()
        )
    assert [rank.wait().code for rank in ranks] == [0, 0]
    assert losses(place / "two") == pytest.approx(losses(place / "one"), rel=1e-5)


def test_what_was_trained_is_the_familys_own_folder(place):
    """transformers' class of the family computes what our model does with the saved weights."""
    transformers = pytest.importorskip("transformers")
    train(place, "--max_steps 2 --save_dir saved")
    folder = place / "saved/checkpoint_step_2"
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(peer).__name__ == FAMILIES[read_shape(folder).family].ARCHITECTURE
    ids = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    ours = load_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), peer(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", ["", "--load_in_4bit"])
def test_adapters_learn_and_are_merged(place, bits):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run = f"lora{len(bits)}"
    train(place, f"--lora --lora_r 4 {bits} --max_steps 20 --learning_rate 1e-2 --save_dir {run}")
    first, last = losses(place / run)[0], losses(place / run)[-3:]
    assert sum(last) / 3 < first - 0.2
    merged = place / f"merged{len(bits)}"
    utils.main(["merge", "--base", str(place / "base"), "--adapter", str(place / run), "--output", str(merged)])
    ids = torch.randint(0, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    if bits:  # the merged weights are what was computed with: NF4, decoded, and the adapter
        ours, beside = load_pretrained(merged), load_for_use(place / "base", find_adapter(place / run), **CPU)
        with torch.no_grad():
            expected = beside.logits(beside(ids))
            torch.testing.assert_close(
                ours.logits(ours(ids)), expected, atol=1e-4 * expected.abs().max().item(), rtol=0
            )
        return
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", experts_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, place / run / "checkpoint_step_20").double()
    # both in float64: what is left is that the merged weights were rounded once, and not how fp32 products round here
    ours = load_pretrained(merged, dtype=torch.float64)
    with torch.no_grad():  # the learning rate is high: what was learned makes logits of ten and more
        expected = theirs(ids).logits
        found = ours.logits(ours(ids)).double()
        torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


NEW = [model for model in NEW_MODELS if model not in ENCODERS]


@pytest.mark.parametrize("model", grid(NEW, ["gpt2", "gemma3", "mixtral"]))
def test_a_new_model_is_its_familys(tiny_data, tmp_path, model):
    """--model trains it from nothing, goes on where it stopped, and transformers' class computes what it learned."""
    transformers = pytest.importorskip("transformers")
    words = f"--data_dir {tiny_data} --model {model} --num_layers 7 --hidden_size 64 --num_heads 4 --batch_size 4 \
        --learning_rate 1e-3 --log_interval 1 --eval_interval 0 --save_interval 2 --keep_checkpoints 0 --device cpu"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = Forked(tmp_path / "first", f"{words} --save_dir {whole} --max_steps 4".split()).wait()
    assert ended.code == 0, ended.out + ended.err
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint_step_4")
    again = Forked(tmp_path / "second", f"{words} --save_dir {parts} --max_steps 4 --checkpoint latest".split()).wait()
    assert again.code == 0, again.out + again.err
    folder = tmp_path / "whole/checkpoint_step_4"
    shape = read_shape(folder)
    assert shape.family == NEW_MODELS[model] and f" {count_parameters(shape).total:,} (" in ended.out
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in peer.parameters()) == count_parameters(shape).total
    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    ours = load_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), peer(ids).logits, atol=1e-5, rtol=0)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "parts/checkpoint_step_4" / name).read_bytes()


def test_experts_are_balanced_alike_however_rows_are_batched(tiny_data, tmp_path):
    """Loss and router losses of one rank, of two, and of micro-batches of one row."""
    words = f"--data_dir {tiny_data} --model qwen3_moe --num_experts 5 --num_layers 2 --hidden_size 64 --num_heads 4 \
        --batch_size 4 --max_steps 3 --learning_rate 1e-2 --router_aux_loss_coef 0.5 --log_interval 1 --device cpu"
    for run, more in (("one", ""), ("small", "--micro_batch_size 1")):
        ended = Forked(tmp_path / run, f"{words} --save_dir {tmp_path / f'{run}_run'} {more}".split()).wait()
        assert ended.code == 0, ended.out + ended.err
    (tmp_path / "streams").mkdir()
    ranks = start_ranks(tmp_path / "streams", *f"{words} --save_dir {tmp_path / 'two_run'}".split())
    assert [rank.wait().code for rank in ranks] == [0, 0]
    rows = {
        run: [json.loads(line) for line in (tmp_path / f"{run}_run/metrics.jsonl").read_text().splitlines()]
        for run in ("one", "small", "two")
    }
    for name in ("loss", "balance", "router_z", "experts/busiest", "experts/idle", "grad_norm"):
        one, small, two = ([row[name] for row in rows[run] if name in row] for run in rows)
        assert len(one) == 3 and one == pytest.approx(small, rel=1e-5) and one == pytest.approx(two, rel=1e-5), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model mixtral --num_experts 2 --experts_per_token 3", "--experts_per_token 3 is more than --num_experts 2"),
        (
            "--model qwen3_moe --expert_size 256 --intermediate_size 512",
            "--expert_size 256 and --intermediate_size 512 both say how wide the experts are: leave one out",
        ),
        ("--num_experts 4", "--num_experts is for --model mixtral and qwen3_moe"),
        ("--model gpt2 --rope_theta 5e5", "--rope_theta is for models with a rotary embedding"),
        ("--model gpt2 --num_kv_heads 2", "--num_kv_heads is for models with grouped queries"),
        ("--model gemma3 --qk_norm", "--qk_norm is for models without --model"),
        ("--model gemma3 --no-tie_word_embeddings", "--tie_word_embeddings is for models with a choice"),
    ],
)
def test_what_a_new_model_has_not_is_no_option_of_it(tiny_data, tmp_path, words, said):
    ended = Forked(tmp_path / "streams", f"--data_dir {tiny_data} --save_dir {tmp_path / 'run'} {words}".split()).wait()
    assert ended.code != 0 and said in ended.err and "Traceback" not in ended.err
