"""Does --add_chat_tokens give a model the special tokens of its template, and do transformers and PEFT read the result?

Bases have room for the new rows or none, and a head of their own or the embedding's; all weights learn, or adapters, over
weights of 32 or 4 bits.
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.base_models import load_base
from adapters.token_rows import learn_rows, token_rows
from dataprep.special_tokens import MARKS, TURNS
from dataprep.tokenizers import load_tokenizer
from finetune_data.chat_template import load_chat_template
from finetune_data.chat_tokens import encode_messages
from finetune_data.examples import Message, read_examples
from model import Transformer
from model_config import ModelConfig
from tests.forked import Ended, Forked, start_ranks
from tools import merge
from training.loading import load_for_use

NEW = [*TURNS, *MARKS]  # what ChatML writes
CASES = {  # (tied, room for the rows, flags)
    "all": (False, False, ""),
    "all_tied": (True, True, ""),
    "lora": (False, True, "--lora"),
    "lora_tied": (True, False, "--lora --lora_r 4"),
    "qlora": (False, False, "--lora --load_in_4bit --lora_dropout 0.1"),
}
STEPS = 4
SMALL = f"--stage sft --add_chat_tokens --batch_size 4 --max_steps {STEPS} --save_interval 2 --keep_checkpoints 0 \
    --learning_rate 1e-2 --log_interval 1 --eval_interval 0 --device cpu --max_length 96"
TALK = [Message("user", "the user asks"), Message("assistant", "answers")]


@pytest.fixture(scope="module")
def bases(bare_tokenizer, tmp_path_factory) -> Path:
    """A folder a case: a model of random weights whose tokenizer knows the end of text and padding alone."""
    folder = tmp_path_factory.mktemp("bases")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, (tied, room, _) in CASES.items():
        size = 384 if room else bare_tokenizer.vocab_size
        model = Transformer(
            ModelConfig(size, **shape, max_position_embeddings=96, tie_word_embeddings=tied, eos_token_id=0)
        )
        model.init_weights(seed=1, zero_residual=False, num_real_tokens=bare_tokenizer.vocab_size)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(model.config.to_hf()))
        (folder / name / "tokenizer.json").write_text(json.dumps(bare_tokenizer.definition))
        (folder / name / "tokenizer_config.json").write_text(
            '{"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
        )
        save_file({n: p.detach() for n, p in model.named_parameters()}, folder / name / "model.safetensors")
    rows = [{"prompt": f"the user {n % 3} asks", "completion": "answers " * (1 + n % 3)} for n in range(12)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(bases: Path, name: str, save_dir: Path, *more: object) -> list[object]:
    flags = f"{SMALL} {CASES[name][2]}".split()
    return [*flags, "--init_from", bases / name, "--train_data", bases / "chat.jsonl", "--eval_data",
            bases / "chat.jsonl", "--save_dir", save_dir, *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(bases):
    """The last checkpoint of a case's run, made once, and what the run said."""
    made = {}

    def get(name: str) -> tuple[Path, Ended]:
        if name not in made:
            ended = Forked(bases / "streams", command(bases, name, bases / f"run_{name}")).wait()
            assert ended.code == 0, ended.out + ended.err
            made[name] = bases / f"run_{name}" / f"checkpoint_step_{STEPS}", ended
        return made[name]

    return get


def prompt(folder: Path) -> torch.Tensor:
    tokenizer = load_tokenizer(folder)
    return torch.from_numpy(encode_messages(tokenizer, load_chat_template(folder), TALK)[0])[None]


def last_val_loss(save_dir: Path) -> float:
    rows = map(json.loads, (save_dir / "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in rows if "val_loss" in row][-1]


def validation_loss(model: Transformer, folder: Path, file: Path) -> float:
    """Nats a learned token, one example at a time."""
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    losses = []
    for example in read_examples([file], rename={}).examples:
        tokens, learned = encode_messages(tokenizer, template, example.messages)
        x = torch.from_numpy(tokens)
        logprobs = model.logits(model(x[None]))[0, :-1].log_softmax(-1).gather(1, x[1:, None])[:, 0]
        losses.append(-logprobs[torch.from_numpy(learned)[1:]])
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("name", CASES)
def test_transformers_and_peft_compute_what_the_run_does(name, bases, trained, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    checkpoint, ended = trained(name)
    before, tokenizer = load_tokenizer(bases / name), load_tokenizer(checkpoint)
    ids = list(range(before.vocab_size, before.vocab_size + len(NEW)))
    assert f"{', '.join(NEW)} are new in the tokenizer, as the ids {ids[0]} to {ids[-1]}" in ended.out
    assert "plain text" not in ended.out and tokenizer.vocab_size == ids[-1] + 1
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert theirs.convert_tokens_to_ids(NEW) == ids
    talk = [{"role": message.role, "content": message.content} for message in TALK]
    x = prompt(checkpoint)
    assert theirs.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"] == x[0].tolist()
    assert {ids[0], ids[1]} <= set(x[0].tolist())
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == [0, ids[1]]

    ours = load_for_use(checkpoint, None, device="cpu", dtype=torch.float32).eval()
    assert abs(validation_loss(ours, checkpoint, bases / "chat.jsonl") - last_val_loss(checkpoint.parent)) < 1e-5
    expected = ours.logits(ours(x))[..., : tokenizer.vocab_size]
    if "--lora" not in CASES[name][2]:
        peer = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        assert (peer(x).logits[..., : tokenizer.vocab_size] - expected).abs().max() < 1e-5
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / name)
    if not CASES[name][1]:  # who opens the adapter over a base without room makes some, as PEFT's own users do
        model.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
    if "4bit" not in CASES[name][2]:  # theirs is not quantised
        peer = peft.PeftModel.from_pretrained(model, checkpoint)
        assert (peer(x).logits[..., : tokenizer.vocab_size] - expected).abs().max() < 1e-5
    merge.main(Namespace(base=bases / name, adapter=checkpoint, output=tmp_path / "m", dtype=None, merge_into="auto"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (merged(prompt(tmp_path / "m")).logits[..., : tokenizer.vocab_size] - expected).abs().max() < 1e-5
    assert merged.generation_config.eos_token_id == [0, ids[1]]
    assert load_tokenizer(tmp_path / "m").sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", CASES)
def test_new_rows_begin_as_the_mean_and_learn(name, bases, trained):
    checkpoint, _ = trained(name)
    size, base = load_tokenizer(bases / name).vocab_size, load_file(bases / name / "model.safetensors")
    mean = base["model.embed_tokens.weight"][:size].mean(0)
    learned = load_for_use(checkpoint, None, device="cpu", dtype=torch.float32)
    rows = learned.model.embed_tokens.weight
    assert len(rows) == 384
    if name != "all_tied":  # the padding that is left learns as part of a head alone
        assert not rows[size + len(NEW) :].any()
    used, unused = rows[[size, size + 1]], rows[size + 2 : size + len(NEW)]
    assert (used - mean).abs().amax(1).min() > 1e-3
    if "--lora" in CASES[name][2]:
        state = load_file(checkpoint / "adapter_model.safetensors")
        layers = [key for key in state if "token_adapter" in key]
        assert len(layers) == (1 if CASES[name][0] else 2) and all(state[key].shape == (8, 32) for key in layers)
        assert torch.equal(rows[:size], base["model.embed_tokens.weight"][:size])  # nothing else of it learns
    if not CASES[name][0]:  # an embedding that is looked up nowhere has no gradient; that of a head always has one
        assert (unused - mean).abs().max() < 1e-6
        assert (learned.lm_head.weight[size : size + len(NEW)] - base["lm_head.weight"][:size].mean(0)).abs().amax(
            1
        ).min() > 1e-4


@pytest.mark.parametrize("name", ["all", "lora_tied", "qlora"])
def test_resumed_is_never_stopped_and_two_ranks_are_one(name, bases, trained, tmp_path):
    checkpoint, _ = trained(name)
    shutil.copytree(checkpoint.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / checkpoint.name)
    again = Forked(tmp_path / "streams", command(bases, name, tmp_path / "run", "--checkpoint", "latest")).wait()
    assert again.code == 0 and "resumed from" in again.out, again.err
    ranks = [one.wait() for one in start_ranks(tmp_path, *command(bases, name, tmp_path / "ranks"))]
    assert [one.code for one in ranks] == [0, 0], ranks[0].err
    file = "adapter_model.safetensors" if "--lora" in CASES[name][2] else "model.safetensors"
    wanted = load_file(checkpoint / file)
    found = load_file(tmp_path / "run" / checkpoint.name / file)
    divided = load_file(tmp_path / "ranks" / checkpoint.name / file)
    assert wanted.keys() == found.keys() == divided.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert all((wanted[key] - divided[key]).abs().max() < 1e-4 for key in wanted)


def test_rows_that_learn_have_the_gradient_of_the_whole_weights(bases):
    """Beside adapters as without: float64, against a model all of whose weights have gradients."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    for name in ("lora", "lora_tied"):
        whole, model = (load_base(bases / name, dtype=torch.float64) for _ in range(2))
        ids = [5, 7, 8, 200]
        model.requires_grad_(False)
        learn_rows(model, ids)
        x = torch.tensor([[5, 9, 7, 7, 200, 1], [3, 5, 5, 2, 11, 8]])
        for one in (whole, model):
            hidden = one(x[:, :-1]).flatten(0, 1)
            linear_cross_entropy(hidden, one.head_weight, x[:, 1:].flatten(), implementation="torch").total.backward()
        layers = {"embed_tokens": whole.model.embed_tokens, "lm_head": getattr(whole, "lm_head", None)}
        for layer, rows in token_rows(model).items():
            wanted = layers[layer].weight.grad[ids]
            assert wanted.abs().min(1).values.max() > 0
            # rows and their gradients are fp32
            assert (rows.trainable_tokens_delta.grad - wanted).abs().max() < 1e-6 * max(1, wanted.abs().max())


def test_what_is_there_already_is_not_added(tiny_data, bases, tmp_path):
    save_dir = tmp_path / "run"
    pretrain = (
        f"--hidden_size 32 --num_layers 1 --num_heads 2 --max_steps 1 --batch_size 2 --eval_interval 0 --device cpu \
        --data_dir {tiny_data} --save_dir {tmp_path / 'base'} --sample_prompt="
    )
    assert Forked(tmp_path / "streams", pretrain.split()).wait().code == 0
    flags = f"{SMALL} --max_steps 1 --max_length 32 --init_from {tmp_path / 'base'} --train_data {bases / 'chat.jsonl'}"
    ended = Forked(tmp_path / "streams", [*flags.split(), "--save_dir", save_dir]).wait()
    assert ended.code == 0, ended.err
    assert "--add_chat_tokens: the tokenizer has every special token that the chat template writes" in ended.out
    assert load_tokenizer(save_dir / "checkpoint_step_1").sha256 == load_tokenizer(tiny_data).sha256


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--stage dpo --add_chat_tokens --train_data chat.jsonl --init_from lora",
            "--add_chat_tokens is for --stage sft",
        ),
        ("--add_chat_tokens --data_dir data", "--add_chat_tokens is for --stage sft"),
        ("--stage sft --add_chat_tokens --data_dir data --init_from lora", "--add_chat_tokens needs --train_data"),
    ],
)
def test_where_it_means_nothing_it_is_refused(flags, sentence, tmp_path):
    ended = Forked(tmp_path / "streams", [*flags.split(), "--save_dir", tmp_path / "run"]).wait()
    assert ended.code == 2 and sentence in ended.err and ended.err.count("\n") == 1
