"""Does `utils.py merge` write a folder that any tool opens and that computes what base and adapter did together?"""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tools.merge as merge
from adapters.base_models import load_base, save_quantised
from adapters.lora import LoraLinear, add_adapters
from adapters.peft_files import save_adapter
from adapters.scalar_head import RewardModel
from arguments import ArgumentParser
from errors import UserError
from model import Transformer, load_pretrained
from model_config import ModelConfig

IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(5))


def save_base(folder: Path, dtype=torch.float32, **changes) -> Path:
    """A Hugging Face folder, written without our own writers, with the files of a tokenizer."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(vocab_size=97, num_key_value_heads=2, **shape, **changes))
    model.init_weights(seed=1, zero_residual=False)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(dtype)))
    (folder / "tokenizer.json").write_text('{"of": "the base"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    save_file({name: p.detach().to(dtype) for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def adapted(base: Path, adapter: Path, quantise=None, **settings) -> Transformer:
    """The base with an adapter as if it had learned, which is also saved as a PEFT folder."""
    model = load_base(base, quantise=quantise)
    add_adapters(model, rank=4, alpha=6.0, **settings)
    generator = torch.Generator().manual_seed(2)
    for layer in (module for module in model.modules() if isinstance(module, LoraLinear)):
        layer.lora_B["default"].data = 0.05 * torch.randn(layer.lora_B["default"].shape, generator=generator)
    save_adapter(model, adapter, base_model="where/the/base/was")
    return model


def run(base: Path, adapter: Path, output: Path, *words: str) -> dict:
    """Merge; what merge.json says."""
    parser = ArgumentParser(prog="merge")
    merge.add_arguments(parser)
    flags = ["--base", str(base), "--adapter", str(adapter), "--output", str(output), *words]
    assert merge.main(parser.parse_args(flags)) == 0
    return json.loads((output / "merge.json").read_text())


def logits(model) -> torch.Tensor:
    return model.logits(model(IDS)) if isinstance(model, Transformer) else model(IDS).logits


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.mark.parametrize(
    "settings", [{}, {"rslora": True}, {"dora": True}, {"targets": ["v_proj", "up_proj"]}], ids=str
)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qk_norm": True}], ids=str)
def test_any_tool_opens_the_folder_and_computes_what_the_adapter_did(tmp_path, changes, settings):
    base = save_base(tmp_path / "base", **changes)
    model = adapted(base, tmp_path / "adapter", **settings)
    run(base, tmp_path / "adapter", tmp_path / "merged")
    assert not torch.allclose(logits(model), logits(load_pretrained(base)), atol=1e-3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=0)
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "merged")), logits(model), atol=2e-5, rtol=0)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_the_sum_is_exact_and_rounded_once_to_the_bases_dtype(tmp_path):
    base = save_base(tmp_path / "base", torch.bfloat16)
    model = adapted(base, tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", tmp_path / "merged")["dtype"] == "bfloat16"
    assert run(base, tmp_path / "adapter", tmp_path / "wide", "--dtype", "float32")["dtype"] == "float32"
    merged, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "wide"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    layer = model.model.layers[1].mlp.up_proj
    exact = layer.weight.double() + 1.5 * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    assert torch.equal(wide["model.layers.1.mlp.up_proj.weight"], exact.float())
    assert all(torch.equal(merged[name], tensor.to(torch.bfloat16)) for name, tensor in wide.items())


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_a_reward_model_keeps_its_head(tmp_path, base, quantise):
    (base / "tokenizer.json").unlink()  # it is none, and would be asked for a token to pad with
    model = RewardModel.from_pretrained(base, seed=4)
    add_adapters(model, rank=4, quantise=quantise)
    model.model.layers[0].mlp.up_proj.lora_B["default"].data.fill_(0.01)
    save_adapter(model, tmp_path / "adapter")
    run(base, tmp_path / "adapter", tmp_path / "merged")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = IDS.clamp(max=theirs.config.pad_token_id - 1)
    torch.testing.assert_close(theirs(ids).logits, model(ids)[:, -1:], atol=1e-5, rtol=0)
    assert torch.equal(theirs.score.weight, model.score.weight)


@pytest.mark.parametrize("stored", ["full", "4-bit"])
def test_what_learned_over_4_bits_is_merged_into_what_they_stand_for(tmp_path, base, stored):
    """Unless asked otherwise; merge.json says which."""
    model = adapted(base, tmp_path / "adapter", quantise="nf4")
    if stored == "4-bit":
        save_quantised(load_base(base, quantise="nf4"), tmp_path / "four", {})
    source = base if stored == "full" else tmp_path / "four"
    said = run(source, tmp_path / "adapter", tmp_path / "merged")
    assert "NF4, decoded" in said["merged_into"] and said["adapter"]["learned_over"] == "nf4"
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = load_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)
    said = run(source, tmp_path / "adapter", tmp_path / "other", "--merge_into", "stored")
    other = logits(load_pretrained(tmp_path / "other"))
    if stored == "4-bit":
        assert torch.equal(other, logits(merged)) and "NF4, decoded" in said["merged_into"]
        return
    assert "as stored" in said["merged_into"]
    assert (other - logits(model)).abs().max() > 1e-2  # the error of quantisation, added
    plain = adapted(base, tmp_path / "plain")
    torch.testing.assert_close(other, logits(plain), atol=2e-5, rtol=0)
    run(base, tmp_path / "plain", tmp_path / "forced", "--merge_into", "nf4")
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "forced")), logits(model), atol=2e-5, rtol=0)


def test_the_folder_says_what_it_was_made_of(tmp_path, base, capsys):
    adapted(base, tmp_path / "adapter")
    said = run(base, tmp_path / "adapter", tmp_path / "merged")
    assert capsys.readouterr().out.count("\n") == 1
    for part, folder, names in (
        ("base", base, ["config.json", "model.safetensors"]),
        ("adapter", tmp_path / "adapter", ["adapter_config.json", "adapter_model.safetensors"]),
    ):
        assert said[part]["folder"] == str(folder) and list(said[part]["files"]) == names
        for name in names:
            data = (folder / name).read_bytes()
            assert said[part]["files"][name] == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    assert said["adapter"]["base_model_name_or_path"] == "where/the/base/was"
    assert said["adapter"]["r"] == 4 and said["adapter"]["learned_over"] == "full"


def test_the_tokenizer_is_the_adapters_if_it_has_one(tmp_path, base):
    adapted(base, tmp_path / "adapter")
    run(base, tmp_path / "adapter", tmp_path / "plain")
    assert (tmp_path / "plain" / "tokenizer.json").read_text() == '{"of": "the base"}'
    assert (tmp_path / "plain" / "generation_config.json").read_text() == '{"eos_token_id": 3}'
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"of": "the adapter"}')
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    run(base, tmp_path / "adapter", tmp_path / "chat")
    assert (tmp_path / "chat" / "tokenizer.json").read_text() == '{"of": "the adapter"}'
    assert (tmp_path / "chat" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_nothing_is_overwritten_and_mistakes_leave_nothing_behind(tmp_path, base):
    adapter = tmp_path / "adapter"
    adapted(base, adapter)
    for flag, folders in (
        ("--base", (tmp_path, adapter, tmp_path / "new")),
        ("--adapter", (base, base, tmp_path / "new")),
        ("--output", (base, adapter, adapter)),
    ):
        with pytest.raises(UserError, match=f"^{flag} "):
            run(*folders)
    before = sorted(path.name for path in tmp_path.iterdir())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(UserError, match="bias"):
        run(base, adapter, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, base, root):
    """A limit on the size of files stops the weights in the middle, after the configuration was written."""
    adapted(base, tmp_path / "adapter")
    program = """
import resource, sys
from arguments import ArgumentParser
from errors import run_script
from tools import merge
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
parser = ArgumentParser()
merge.add_arguments(parser)
run_script(lambda: merge.main(parser.parse_args()))
"""
    command = [sys.executable, "-c", program, "--base", base, "--adapter", tmp_path / "adapter"]
    done = subprocess.run([*command, "--output", tmp_path / "new"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "limit" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
