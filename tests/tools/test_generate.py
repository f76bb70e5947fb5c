"""Does `utils.py generate` write the model's text, from any folder that holds a model, and refuse what it cannot do?"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import utils
from checkpointing.save import save_checkpoint
from dataprep.tokenizers import TOKENIZER_FILES, load_tokenizer
from errors import UserError
from generation.sampling import generate
from model import Transformer, load_pretrained
from model_config import ModelConfig
from training.optimizers import build_optimizers

CONTEXT = 64


@pytest.fixture(scope="module")
def finished_run(tiny_data, tmp_path_factory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2, of different random weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(tiny_data)
    files = {name: (tiny_data / name).read_bytes() for name in TOKENIZER_FILES if (tiny_data / name).exists()}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    padded = -(-tokenizer.vocab_size // 128) * 128
    config = ModelConfig(padded, **shape, max_position_embeddings=CONTEXT, eos_token_id=tokenizer.eos_token_id)
    for step in (1, 2):
        model = Transformer(config)
        model.init_weights(seed=step, zero_residual=False)
        with torch.no_grad():  # so that greedy text varies
            for parameter in model.parameters():
                parameter *= 5 if parameter.dim() == 2 else 1
            model.head_weight[tokenizer.eos_token_id] = 0
        optimizers = build_optimizers(model, name="adamw", learning_rate=1e-3, weight_decay=0.0)
        saved = save_checkpoint(
            folder, step, model=model, optimizers=optimizers, state={}, files=files, keep_checkpoints=0
        )
        assert saved.ok, saved.message
    return folder


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def write(capsys):
    """Runs `utils.py generate` on the CPU; returns what it wrote to stdout and stderr."""

    def call(checkpoint: Path, *words: object) -> tuple[str, str]:
        words = words if "--prompt" in words else ("--prompt", "the model", *words)
        command = ["generate", "--device", "cpu", "--checkpoint", checkpoint, *words]
        assert utils.main([str(word) for word in command]) == 0
        return capsys.readouterr()

    return call


def greedy(checkpoint: Path, prompt: str, count: int) -> str:
    """Prompt and continuation by the library, not the tool."""
    tokenizer = load_tokenizer(checkpoint)
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = load_pretrained(checkpoint)
    out = generate(model, ids, max_new_tokens=count, temperature=0, vocab_size=tokenizer.vocab_size)
    return prompt + tokenizer.decode(out[0, ids.shape[1] :].tolist())


def test_it_prints_the_prompt_and_its_continuation(finished_run, write):
    checkpoint = finished_run / "checkpoint_step_1"
    out, err = write(checkpoint, "--prompt", "日本 the", "--temperature", 0, "--max_new_tokens", 20)
    assert out == greedy(checkpoint, "日本 the", 20) + "\n"
    assert re.fullmatch(r"20 tokens, [\d,.]+ tokens/s\n", err)


def test_a_run_means_its_newest_checkpoint(finished_run, write):
    out, err = write(finished_run, "--temperature", 0, "--max_new_tokens", 20)
    assert out == greedy(finished_run / "checkpoint_step_2", "the model", 20) + "\n"
    assert out != greedy(finished_run / "checkpoint_step_1", "the model", 20) + "\n"
    assert "checkpoint_step_2" in err


def test_a_broken_newest_checkpoint_is_passed_over_and_reported(run, write):
    weights = run / "checkpoint_step_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out, err = write(run, "--temperature", 0, "--max_new_tokens", 20)
    assert out == greedy(run / "checkpoint_step_1", "the model", 20) + "\n"
    assert "checkpoint_step_2: model.safetensors" in err
    with pytest.raises(UserError, match=r"model\.safetensors"):  # but not where it was asked for by name
        write(run / "checkpoint_step_2")


def test_a_hugging_face_folder_works_as_it_is(tiny_data, tmp_path, write):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen3Config(
        vocab_size=500, num_key_value_heads=1, head_dim=16, initializer_range=0.2, **sizes
    )
    torch.manual_seed(0)
    peer = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        peer.lm_head.weight[load_tokenizer(tiny_data).vocab_size :] = 0  # transformers does not know that it is padding
    peer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_data / name, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("the model", return_tensors="pt").input_ids
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    out, _ = write(tmp_path, "--temperature", 0, "--max_new_tokens", 20)
    assert out == tokenizer.decode(theirs[0], skip_special_tokens=True) + "\n"


def test_seeds_repeat_and_samples_differ(finished_run, write):
    alone = {seed: write(finished_run, "--seed", seed, "--max_new_tokens", 20)[0] for seed in (0, 1, 2)}
    assert len(set(alone.values())) == 3
    out, _ = write(finished_run, "--num_samples", 3, "--max_new_tokens", 20)
    assert all(text in out for text in alone.values())
    out, _ = write(finished_run, "--prompt", "a", "z", "--num_samples", 2, "--max_new_tokens", 3, "--temperature", 0)
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert titles == [f"--- {number} of 4, seed {(number - 1) % 2} ---" for number in range(1, 5)]


def test_the_prompt_flag_may_be_repeated(finished_run, write):
    settings = ("--max_new_tokens", 3, "--temperature", 0)
    together, _ = write(finished_run, "--prompt", "a", "z", *settings)
    assert write(finished_run, "--prompt", "a", *settings, "--prompt", "z")[0] == together


def test_top_k_1_and_a_tiny_top_p_are_greedy(finished_run, write):
    text = greedy(finished_run / "checkpoint_step_2", "the model", 20) + "\n"
    for flags in (("--top_k", 1), ("--top_p", 1e-6), ("--temperature", 1e-30)):
        assert write(finished_run, *flags, "--max_new_tokens", 20)[0] == text
    assert write(finished_run, "--temperature", 3, "--max_new_tokens", 20)[0] != text


def test_a_full_context_is_said(finished_run, write):
    out, err = write(finished_run, "--max_new_tokens", CONTEXT, "--temperature", 0)
    room = CONTEXT - len(load_tokenizer(finished_run / "checkpoint_step_2").encode("the model"))
    assert out == greedy(finished_run / "checkpoint_step_2", "the model", room) + "\n"
    assert f"context of {CONTEXT} tokens" in err.splitlines()[-1]
    _, err = write(finished_run, "--max_new_tokens", room, "--temperature", 0)
    assert "context" not in err


def test_a_prompt_that_does_not_fit_is_an_error_with_both_numbers(finished_run, write):
    tokens = len(load_tokenizer(finished_run / "checkpoint_step_2").encode("日" * CONTEXT))
    with pytest.raises(UserError, match=rf"\b{tokens}\b.*\b{CONTEXT}\b"):
        write(finished_run, "--prompt", "日" * CONTEXT)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("num_samples", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("prompt", "\udcff"),
    ],
)
def test_a_value_out_of_range_names_the_flag(finished_run, write, flag, value):
    with pytest.raises(UserError, match=f"^--{flag} "):
        write(finished_run, f"--{flag}", value)


def test_folders_without_a_model_are_refused(tmp_path, write):
    with pytest.raises(UserError, match="does not exist"):
        write(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.json"):
        write(tmp_path)
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match=r"model\.pt"):
        write(tmp_path / "model.pt")


def test_weights_that_are_not_numbers_are_told(run, write, tmp_path):
    for name in ("config.json", *TOKENIZER_FILES):
        if (run / "checkpoint_step_2" / name).exists():
            shutil.copy(run / "checkpoint_step_2" / name, tmp_path)
    weights = load_file(run / "checkpoint_step_2" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        write(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_told(tiny_data, tmp_path, write):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path)
    shutil.copy(tiny_data / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json has \d+ ids.* 100"):
        write(tmp_path)


@pytest.mark.gpu
def test_a_gpu_writes_in_bf16_and_repeats_itself(finished_run, write):
    words = ("--prompt", "the model", "--max_new_tokens", 20)
    texts = [write(finished_run, *words, "--device", "cuda", "--seed", seed)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the model")


def test_a_terminal_without_utf8_gets_escapes_and_no_error(finished_run, root):
    words = ["--prompt", "日本", "--max_new_tokens", "5", "--device", "cpu", "--checkpoint", finished_run]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "utils.py", "generate", *words], cwd=root, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"\\u65e5\\u672c")
