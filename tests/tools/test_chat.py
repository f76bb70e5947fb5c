"""Does `utils.py chat` answer each turn by the checkpoint's own template, and remember, forget and stop when it should?"""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.base_models import load_base
from adapters.lora import add_adapters
from adapters.peft_files import save_adapter
from arguments import ArgumentParser
from checkpointing.save import save_checkpoint
from dataprep.tokenizers import TOKENIZER_FILES, load_tokenizer
from errors import UserError
from finetune_data.chat_template import load_chat_template
from finetune_data.chat_tokens import encode_messages
from finetune_data.examples import Message
from generation.sampling import generate
from model import Transformer, load_pretrained
from model_config import ModelConfig
from tools import chat
from training.optimizers import build_optimizers

CONTEXT = 160
# short, so that prompts of the tiny tokenizer's fit; its end of a turn is text
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '~~' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def finished_run(tiny_data, tmp_path_factory) -> Path:
    """A run with one checkpoint of random weights, whose greedy text varies and does not end."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(tiny_data)
    files = {name: (tiny_data / name).read_bytes() for name in TOKENIZER_FILES if (tiny_data / name).exists()}
    files["chat_template.jinja"] = TEMPLATE.encode()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig(512, **shape, max_position_embeddings=CONTEXT, eos_token_id=tokenizer.eos_token_id)
    model = Transformer(config)
    model.init_weights(seed=1, zero_residual=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5 if parameter.dim() == 2 else 1
        model.head_weight[tokenizer.eos_token_id] = 0
    optimizers = build_optimizers(model, name="adamw", learning_rate=1e-3, weight_decay=0.0)
    saved = save_checkpoint(folder, 1, model=model, optimizers=optimizers, state={}, files=files, keep_checkpoints=0)
    assert saved.ok, saved.message
    return folder


@pytest.fixture
def talk(capsys, monkeypatch):
    """Runs the tool on lines of input; returns what it wrote to stdout and stderr."""

    def call(checkpoint: Path, lines: str, *words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        parser = ArgumentParser(prog="chat")
        chat.add_arguments(parser)
        flags = ["--checkpoint", checkpoint, "--device", "cpu", "--max_new_tokens", 12, "--temperature", 0, *words]
        assert chat.main(parser.parse_args([str(flag) for flag in flags])) == 0
        return capsys.readouterr()

    return call


def copy_model(source: Path, target: Path) -> None:
    """A checkpoint as a plain Hugging Face folder, which a test may change."""
    for name in ("config.json", "model.safetensors", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copy(source / name, target)


def answer(folder: Path, messages: list[Message], count: int = 12, model: Transformer | None = None) -> str:
    """The greedy answer by the library, not the tool, up to where the template's end of a turn would be."""
    tokenizer = load_tokenizer(folder)
    ids, _ = encode_messages(tokenizer, load_chat_template(folder), messages, add_generation_prompt=True)
    model = model or load_pretrained(folder)
    out = generate(
        model, torch.from_numpy(ids)[None], max_new_tokens=count, temperature=0, vocab_size=tokenizer.vocab_size
    )
    return tokenizer.decode(out[0, len(ids) :].tolist()).partition("~~")[0]


def test_each_line_is_a_turn_that_remembers_the_ones_before(finished_run, talk):
    folder = finished_run / "checkpoint_step_1"
    out, _ = talk(finished_run, "the model\n\nwrites a token")
    messages = [Message("user", "the model")]
    first = answer(folder, messages)
    messages += [Message("assistant", first), Message("user", "writes a token")]
    assert out == first + "\n" + answer(folder, messages) + "\n"
    assert first and answer(folder, messages[-1:]) != answer(folder, messages)


def test_reset_forgets_and_exit_ends(finished_run, talk):
    once, _ = talk(finished_run, "the model\n")
    out, err = talk(finished_run, "the model\n/reset\nthe model\n/exit\nthe model\n")
    assert out == once * 2 and "new dialogue" in err
    assert talk(finished_run, "")[0] == ""


def test_a_system_message_begins_every_dialogue(finished_run, talk):
    folder = finished_run / "checkpoint_step_1"
    expected = answer(folder, [Message("system", "reads"), Message("user", "loss")])
    out, _ = talk(finished_run, "loss\n/reset\nloss\n", "--system", "reads")
    assert out == (expected + "\n") * 2 != talk(finished_run, "loss\n/reset\nloss\n")[0]


def test_another_template_is_taken_where_one_is_named(finished_run, talk):
    out, err = talk(finished_run, "loss", "--chat_template", "llama3")
    assert out != talk(finished_run, "loss")[0]
    assert "chat template: llama3" in err and "<|eot_id|>" in err  # which this tokenizer has not


def test_an_answer_ends_with_a_special_token_of_the_template(finished_run, talk, tmp_path):
    """A model that writes the token in place of another one: its answer is the text up to there."""
    copy_model(finished_run / "checkpoint_step_1", tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    end = load_tokenizer(tmp_path).vocab_size  # an id that the padded weights have room for
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    definition["added_tokens"].append({"id": end, "content": "<|done|>", "special": True, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("~~", "<|done|>"))

    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][end] = 0
    save_file(weights, tmp_path / "model.safetensors")
    tokenizer, template = load_tokenizer(tmp_path), load_chat_template(tmp_path)
    prompt, _ = encode_messages(tokenizer, template, [Message("user", "loss")], add_generation_prompt=True)
    assert end in prompt
    ids = generate(
        load_pretrained(tmp_path), torch.from_numpy(prompt)[None], max_new_tokens=12, temperature=0, vocab_size=end
    )
    written = ids[0, len(prompt) :].tolist()
    at = next(n for n in range(1, 12) if written[n] not in written[:n])
    weights["lm_head.weight"][end] = 1.0001 * weights["lm_head.weight"][written[at]]  # likelier wherever that one was
    save_file(weights, tmp_path / "model.safetensors")
    assert talk(tmp_path, "loss")[0] == tokenizer.decode(written[:at]) + "\n"


def test_the_end_of_a_turn_may_be_text_across_pieces():
    text = "one ~~ two"
    for size in range(1, len(text) + 1):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert "".join(chat.up_to(["~~"], pieces)) == "one "
        assert "".join(chat.up_to(["~~~"], pieces)) == "".join(chat.up_to([], pieces)) == text
    assert list(chat.up_to(["~~"], ["a", "b~", "c"]))[:2] == ["a", "b"]  # what cannot be the end is not held back


def test_a_dialogue_that_fills_the_context_is_told_and_goes_on(finished_run, talk):
    out, err = talk(finished_run, "loss " * CONTEXT + "\nloss\n")
    assert out == talk(finished_run, "loss\n")[0]
    assert f"context is {CONTEXT}" in err and "/reset" in err


def test_seeds_repeat(finished_run, talk):
    flags = ("--temperature", 1.5, "--top_k", 0, "--top_p", 1)
    texts = [talk(finished_run, "loss\nloss\n", *flags, "--seed", seed)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_an_adapter_answers_over_the_weights_that_it_learned_beside(finished_run, talk, tmp_path, quantise):
    folder = finished_run / "checkpoint_step_1"
    model = load_base(folder, quantise=quantise)
    add_adapters(model, rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter")
    out, _ = talk(finished_run, "loss", "--adapter", tmp_path / "adapter")
    assert out == answer(folder, [Message("user", "loss")], model=model) + "\n" != talk(finished_run, "loss")[0]


def test_folders_of_another_kind_are_told(finished_run, talk, tmp_path):
    with pytest.raises(UserError, match=r"--adapter .* holds no adapter_config"):
        talk(finished_run, "loss", "--adapter", tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": []}'
    )
    shutil.copy(finished_run / "checkpoint_step_1" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"holds an adapter, and its base .* is not here; give the base and --adapter"):
        talk(tmp_path, "loss")


def test_input_that_is_not_text_does_not_end_a_dialogue(finished_run, talk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"lo\xffss\n"), encoding="utf-8"))
    parser = ArgumentParser(prog="chat")
    chat.add_arguments(parser)
    flags = ["--checkpoint", str(finished_run), "--device", "cpu", "--max_new_tokens", "3"]
    assert chat.main(parser.parse_args(flags)) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", "nan"), ("top_k", -1), ("top_p", 0), ("seed", -1),
        ("system", "\udcff"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_the_flag(finished_run, talk, flag, value):
    with pytest.raises(UserError, match=f"^--{flag} "):
        talk(finished_run, "", f"--{flag}", value)


def test_weights_that_are_not_numbers_are_told(finished_run, talk, tmp_path):
    copy_model(finished_run / "checkpoint_step_1", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        talk(tmp_path, "loss")
