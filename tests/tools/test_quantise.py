"""Does a 4-bit folder hold the same model for us and for transformers, in a quarter of the bytes?"""

import argparse
import json
import subprocess
import sys

import pytest
import torch

from adapters.base_models import load_base
from checkpointing.save import save_checkpoint
from errors import UserError
from model import Transformer
from model_config import ModelConfig
from tools import quantise


@pytest.fixture
def plain(tmp_path):
    """A checkpoint of a small model; widths are multiples of 64, which bitsandbytes' CPU kernels need."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Transformer(ModelConfig(vocab_size=128, **shape))
    model.init_weights(seed=3, zero_residual=False)
    (tmp_path / "run").mkdir()
    files = {"tokenizer_config.json": b"{}\n"}
    saved = save_checkpoint(tmp_path / "run", 1, model=model, optimizers=[], state={}, files=files, keep_checkpoints=0)
    return saved.path


def written(plain, output) -> None:
    assert quantise.main(type("Arguments", (), {"model": str(plain.parent), "output": str(output)})()) == 0


def test_the_folder_gives_what_rounding_at_the_start_gives(plain, tmp_path):
    written(plain, tmp_path / "small")
    ids = torch.arange(24).view(2, 12)
    found, wanted = load_base(tmp_path / "small")(ids), load_base(plain, quantise="nf4")(ids)
    assert torch.equal(found, wanted)
    block_bytes = sum(p.numel() for n, p in Transformer(load_base(plain).config).named_parameters() if "_proj" in n) * 4
    saved = (plain / "model.safetensors").stat().st_size - (tmp_path / "small/model.safetensors").stat().st_size
    assert saved > 0.8 * block_bytes
    assert (tmp_path / "small/tokenizer_config.json").read_bytes() == b"{}\n"


def test_transformers_with_bitsandbytes_loads_it(plain, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    written(plain, tmp_path / "small")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "small").train()
    ids = torch.arange(24).view(2, 12)
    ours = load_base(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, ours.logits(ours(ids)), atol=1e-5, rtol=1e-5)


def test_nothing_is_overwritten(root, plain, tmp_path):
    (tmp_path / "there").mkdir()
    command = [sys.executable, "utils.py", "quantise", "--model", plain, "--output", tmp_path / "there"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "exists" in done.stderr and "Traceback" not in done.stderr


def test_a_mixture_of_experts_is_refused_before_its_weights_are_read(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"family": "mixtral", "num_experts": 4, "experts_per_token": 2, "expert_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig(vocab_size=128, **shape, **parts).to_hf()))
    with pytest.raises(UserError, match="a mixture of experts cannot be saved in 4 bits"):
        quantise.main(argparse.Namespace(model=str(tmp_path), output=str(tmp_path / "four")))


def test_a_classifier_is_refused_before_its_weights_are_read(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=128, **shape).to_hf() | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has the head of a classifier"):
        quantise.main(argparse.Namespace(model=str(tmp_path), output=str(tmp_path / "four")))
