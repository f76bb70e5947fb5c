"""Does `utils.py average` write the mean of checkpoints, in a folder that any tool opens, and refuse what has no mean?"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import utils
from checkpointing.save import save_checkpoint
from errors import UserError
from model import Transformer
from model_config import ModelConfig
from training.optimizers import build_optimizers

TOKENIZER = {"tokenizer.json": b'{"of": "the run"}', "chat_template.jinja": b"{{ messages }}"}


def save_run(folder: Path, steps=4, files=TOKENIZER, **changes) -> Path:
    """A run's folder with checkpoints of random weights."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    model = Transformer(ModelConfig(**shape | changes))
    optimizers = build_optimizers(model, name="adamw", learning_rate=1e-3, weight_decay=0.0)
    folder.mkdir()
    for step in range(1, steps + 1):
        model.init_weights(seed=step, zero_residual=False)
        saved = save_checkpoint(
            folder, step, model=model, optimizers=optimizers, state={}, files=files, keep_checkpoints=0
        )
        assert saved.ok, saved.message
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return save_run(tmp_path / "run")


def average(*words: object) -> None:
    assert utils.main(["average", *map(str, words)]) == 0


def exact_mean(*checkpoints: Path) -> dict[str, torch.Tensor]:
    states = [load_file(path / "model.safetensors") for path in checkpoints]
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}


def test_the_last_checkpoints_are_averaged_exactly_and_rounded_once(run, tmp_path, capsys):
    average("--checkpoint_dir", run, "--last", 3, "--output", tmp_path / "out")
    average("--checkpoint_dir", run, "--last", 3, "--output", tmp_path / "half", "--dtype", "bfloat16")
    assert capsys.readouterr().out.count("\n") == 2
    exact = exact_mean(*(run / f"checkpoint_step_{step}" for step in (4, 3, 2)))
    for folder, dtype in (("out", torch.float32), ("half", torch.bfloat16)):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == exact.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, exact[name].to(dtype), rtol=0, atol=0)
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TOKENIZER["tokenizer.json"]
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(theirs.model.embed_tokens.weight, exact["model.embed_tokens.weight"].float())


def test_the_folder_says_what_it_was_made_of(run, tmp_path):
    folders = [run / "checkpoint_step_1", run / "checkpoint_step_4"]
    average("--checkpoints", *folders, "--output", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "average.json").read_text())
    assert [one["folder"] for one in said["of"]] == list(map(str, folders)) and said["average"] == "mean"
    for one, folder in zip(said["of"], folders, strict=True):
        data = (folder / "model.safetensors").read_bytes()
        assert one["files"] == {"model.safetensors": {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}}
    exact = exact_mean(*folders)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in exact.items())


def test_a_damaged_checkpoint_is_passed_over_and_said(run, tmp_path, capsys):
    broken = run / "checkpoint_step_4" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    average("--checkpoint_dir", run, "--output", tmp_path / "out")
    assert "skipped" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "average.json").read_text())["of"]) == 3
    with pytest.raises(UserError, match="3 whole checkpoints of 4 wanted"):
        average("--checkpoint_dir", run, "--last", 4, "--output", tmp_path / "four")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        average("--checkpoints", broken.parent, "--output", tmp_path / "one")


def test_checkpoints_of_other_models_are_refused_by_name(run, tmp_path):
    first = run / "checkpoint_step_1"
    for name, options, words in (
        ("wide", {"intermediate_size": 48}, r"checkpoint_step_1 is not the same model .*proj.weight is \(.*there"),
        ("base", {"rope_theta": 5e5}, "rope"),
        ("tokens", {"files": {"tokenizer.json": b"{}"}}, "another tokenizer .* tokenizer.json differ"),
    ):
        other = save_run(tmp_path / name, steps=1, **options)
        with pytest.raises(UserError, match=words):
            average("--checkpoints", first, other / "checkpoint_step_1", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_have_no_mean(run, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"utils\.py merge"):
        average("--checkpoints", adapter, adapter, "--output", tmp_path / "out")


def test_mistakes_are_one_sentence_and_nothing_is_overwritten(run, tmp_path):
    one = run / "checkpoint_step_1"
    for words, said in (
        (["--checkpoint_dir", run, "--ema"], "holds no ema.safetensors"),
        (["--checkpoint_dir", run, "--ema", "--last", 2], "leave one out"),
        (["--checkpoint_dir", run, "--last", 0], "--last must be positive"),
        (["--checkpoint_dir", tmp_path, "--last", 2], "0 whole checkpoints"),
        (["--checkpoints", one, "--last", 2], "--last is for --checkpoint_dir"),
        (["--checkpoints", one, one, "--ema"], "takes one checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            average(*words, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        average("--checkpoint_dir", run, "--output", run)
    assert not (tmp_path / "out").exists()


def test_shards_of_a_large_model_are_averaged_too(run, tmp_path):
    """A Hugging Face folder with an index, beside a checkpoint in one file."""
    sharded = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint_step_2").save_pretrained(
        sharded, max_shard_size="4KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (sharded / name).write_bytes((run / "checkpoint_step_2" / name).read_bytes())
    average("--checkpoints", sharded, run / "checkpoint_step_3", "--output", tmp_path / "out")
    exact = exact_mean(run / "checkpoint_step_2", run / "checkpoint_step_3")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in exact.items())


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_one_tensor_is_in_memory_at_a_time(tmp_path, root):
    """Two folders of 40 tensors of 4 MB: the peak grows by less than half of one of them. glibc gives every block back at once
    here; by itself it keeps some, more of them at one time than at another."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        save_file(
            {f"w{i}": torch.full((1024, 1024), float(i + number)) for i in range(40)}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text("{}")
    program = """
import re, sys
import tools.average, utils
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
utils.main(["average", "--checkpoints", *sys.argv[1:3], "--output", sys.argv[3]])
print(peak() - before)
"""
    command = [sys.executable, "-c", program, *folders, tmp_path / "out"]
    gives_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=gives_back)
    assert float(done.stdout.split()[-1]) < 60
    assert load_file(tmp_path / "out" / "model.safetensors")["w3"][0, 0] == 3.5
