"""Are examples that were made into shards the same examples, in the same order, and files that other tools open?"""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.scalar_head import RewardModel
from checkpointing.tensors import model_tensors
from dataprep.progress import Progress
from dataprep.shards import load_metadata
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.chat_template import load_chat_template
from finetune_data.encoding_examples import encode_example
from finetune_data.example_shards import ExampleOptions, ExampleShards, prepare_examples
from finetune_data.examples import read_examples
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks
from stages.build import build_stage, open_stage_data
from training.config import TrainConfig
from training.precision import choose_precision

MAX_LENGTH = 150  # cuts some of the chats, and leaves others whole
SHAPE = ModelConfig(
    vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=MAX_LENGTH,
)  # fmt: skip
WORDS = [
    "the", "of", "and", "model", "token", "loss", "gradient", "learns", "reads", "writes", "a", "small", "large", "one",
    "two", "three",
]  # fmt: skip


def sentence(start: int, count: int) -> str:
    return " ".join(WORDS[(start * 5 + i * 3) % len(WORDS)] for i in range(count))


ROWS = {
    "chat": [
        {"messages": [
            {"role": "user", "content": sentence(i, 4)}, {"role": "assistant", "content": sentence(i + 1, 2 + 3 * (i % 9))},
            {"role": "user", "content": sentence(i, 2)}, {"role": "assistant", "content": sentence(i + 3, 2 + i % 5)},
        ]} for i in range(20)
    ],
    "text": [{"text": sentence(i, 3 + i)} for i in range(20)],
    "preference": [
        {"prompt": sentence(i, 4), "chosen": sentence(i + 1, 2 + i % 7), "rejected": sentence(i + 2, 3 + i % 5)}
        for i in range(20)
    ],
    "labelled": [
        {"prompt": sentence(i, 4), "completion": sentence(i + 1, 2 + i % 7), "label": i % 3 > 0} for i in range(20)
    ],
}  # fmt: skip
FORMAT = {"chat": "sft", "text": "sft", "preference": "preference", "labelled": "preference"}


class Quiet(Progress):
    """What was said, and nothing on the terminal."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def write(tmp_path):
    """Writes the rows of a kind as files; the rows of a chat over two files."""

    def make(kind: str) -> Path:
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        for name, rows in (("a", ROWS[kind][:8]), ("b", ROWS[kind][8:])):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    return make


def options(rows: Path, output: Path, kind: str, tokenizer: Path, **changes) -> ExampleOptions:
    return ExampleOptions(
        rows, output, FORMAT[kind], tokenizer, **{"max_length": MAX_LENGTH, "shard_tokens": 300} | changes
    )


def encoded_anew(rows: Path, tokenizer_folder: Path) -> list:
    """[(source, sequences)] of the files, as a stage encodes them that reads the files themselves."""
    tokenizer, template = load_tokenizer(tokenizer_folder), load_chat_template(tokenizer_folder)
    found = []
    for example in read_examples([rows / "a.jsonl", rows / "b.jsonl"]).examples:
        encoded = encode_example(tokenizer, template, example, max_length=MAX_LENGTH)
        if encoded.sequences:
            found.append((example.source, encoded.sequences))
    return found


def assert_same_sequence(one, other) -> None:
    assert one.tokens.dtype == other.tokens.dtype and np.array_equal(one.tokens, other.tokens)
    assert one.learned.dtype == other.learned.dtype and np.array_equal(one.learned, other.learned)
    assert one.columns == other.columns and not one.token_columns


# ---- the same examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_read_back_is_what_was_encoded(write, tiny_data, tmp_path, kind):
    rows = write(kind)
    metadata = prepare_examples(options(rows, tmp_path / "data", kind, tiny_data), Quiet())
    assert len(metadata.splits["train"].shards) > 1  # so that the seams are tested too
    shards, expected = ExampleShards(tmp_path / "data"), encoded_anew(rows, tiny_data)
    assert len(shards) == len(expected) > 10
    for place, (source, sequences) in enumerate(expected):
        assert len(shards[place]) == len(sequences) == (2 if kind == "preference" else 1)
        for one, other in zip(shards[place], sequences, strict=True):
            assert_same_sequence(one, other)
        assert rows / shards.source(place) == Path(source)
    some = shards.select([5, 2]).select([1])
    assert len(some) == 1 and some.source(0) == shards.source(2)
    assert [group[0].tokens.tolist() for group in some[:]] == [shards[2][0].tokens.tolist()]
    with pytest.raises(IndexError):
        shards[len(shards)]


STAGES = {
    "sft": ("chat", {"stage": "sft"}),
    "dpo": ("preference", {"stage": "dpo"}),
    "kto": ("labelled", {"stage": "dpo", "dpo_loss": "kto"}),
    "reward": ("preference", {"stage": "reward"}),
}


@pytest.fixture
def base(tiny_data, tmp_path) -> Path:
    """A model's folder: the tokenizer, and the weights of a fixed seed."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_data / name, folder)
    model = Transformer(SHAPE)
    model.init_weights(0, zero_residual=False)
    (folder / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    save_file(model_tensors(model), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_computes_the_same_from_shards_as_from_the_files(write, base, tmp_path, stage):
    kind, settings = STAGES[stage]
    rows = write(kind)
    prepare_examples(options(rows, tmp_path / "data", kind, base), Quiet())
    losses = {}
    for way, data in {
        "files": {"train_data": [str(rows / "a.jsonl"), str(rows / "b.jsonl")]},
        "shards": {"data_dir": [str(tmp_path / "data")]},
    }.items():
        (tmp_path / way).mkdir()
        config = TrainConfig(
            init_from="x", batch_size=4, max_length=MAX_LENGTH, eval_fraction=0.2, save_dir=str(tmp_path / way),
            **settings, **data,
        )  # fmt: skip
        opened = open_stage_data(config, base, MAX_LENGTH)
        losses[way] = [opened.num_samples, opened.max_length, *some_losses(config, opened)]
    assert losses["files"] == losses["shards"]
    assert len(set(losses["files"])) > 8  # they are numbers, and not all the same one


# writes reasoning in front of the last answer only, as Qwen3's template does
HIDES_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_a_template_that_hides_reasoning_gives_the_same_from_files_and_shards(write, tiny_data, tmp_path, stage):
    """Dialogues of several turns are several sequences then, in one part of the data; a pair's sides count as wholes."""
    kind = "chat" if stage == "sft" else "preference"
    rows, template = write(kind), tmp_path / "hides.jinja"
    template.write_text(HIDES_REASONING)
    for number, file in enumerate(sorted(rows.iterdir())):
        changed = [json.loads(line) for line in file.read_text().splitlines()]
        for place, row in enumerate(changed):
            mine = f"{10 * number + place}: "  # by which a dialogue can be told
            if stage == "sft":
                row["messages"][0]["content"] = mine + row["messages"][0]["content"]
                continue
            row["prompt"] = mine + row["prompt"]
            for side in ("chosen", "rejected")[
                : place % 3
            ]:  # a call, what it gave, and the answer: on one side, both, none
                turns = [("assistant", "two"), ("tool", "one"), ("assistant", row[side])]
                row[side] = [{"role": role, "content": content} for role, content in turns]
        file.write_text("\n".join(map(json.dumps, changed)))
    said, base, found = Quiet(), tmp_path / "base", {}
    shutil.copytree(tiny_data, base)
    (base / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    made = options(rows, tmp_path / "data", kind, base, chat_template=str(template), overwrite=True)
    prepare_examples(made, said)
    assert any(re.match(r"\d+ dialogues rendered answer by answer: the template hides", line) for line in said.lines)
    for way, data in {
        "files": {"train_data": [str(rows / "a.jsonl"), str(rows / "b.jsonl")]},
        "shards": {"data_dir": [str(tmp_path / "data")]},
    }.items():
        config = TrainConfig(
            stage=stage, dpo_loss="orpo", init_from="x", batch_size=4, max_length=MAX_LENGTH, eval_fraction=0.2,
            save_dir=str(tmp_path / way), chat_template=str(template), **data,
        )  # fmt: skip
        opened = open_stage_data(config, base, MAX_LENGTH)
        found[way] = [opened.num_samples, *some_losses(config, opened)]
        train, held_out = (
            [bytes(group[0].tokens[:12]) for group in part.groups] for part in (opened.train, opened.held_out)
        )
        assert held_out and not set(train) & set(held_out)  # no prompt is in both
    assert found["files"] == found["shards"] and len(set(found["files"])) > 8


def some_losses(config: TrainConfig, opened) -> list[float]:
    """The summed losses and weights of the first micro-batches of a model with fixed weights, then the held-out figures."""
    model = RewardModel(SHAPE) if config.stage == "reward" else Transformer(SHAPE)
    model.init_weights(0, zero_residual=False)
    ranks = Ranks(0, 1, torch.device("cpu"))
    precision = choose_precision("none", ranks.device)
    pins = {"init_from": {"weights": "those of seed 0", "config": "SHAPE"}}
    stage = build_stage(config, opened, model, ranks, precision, micro_batch_size=2, pins=pins)
    model.model.embed_tokens.weight.data.mul_(1.5)  # away from the reference, or every pair would lose ln 2
    found, batches = [], stage.batches(0)
    for _ in range(5):
        for batch in next(batches):
            found += [stage.loss(model, batch)[0].item(), batch.weight]
    return [*found, *stage.evaluate(model, everything=True).values()]


# ---- files -----------------------------------------------------------------------------------------------------------


def megatron_documents(stem: Path) -> list[np.ndarray]:
    """The documents of a Megatron-LM dataset, read as its format is described (MMIDIDX version 1)."""
    index = Path(f"{stem}.idx").read_bytes()
    magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version, documents) == (b"MMIDIDX\0\0", 1, sequences + 1)
    dtype = {4: "<i4", 8: "<u2"}[code]
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    data = Path(f"{stem}.bin").read_bytes()
    return [
        np.frombuffer(data, dtype, length, pointer) for length, pointer in zip(lengths, pointers, strict=True)
    ]  # fmt: skip


def test_tokens_masks_and_labels_are_datasets_of_megatron(write, tiny_data, tmp_path):
    rows = write("labelled")
    metadata = prepare_examples(options(rows, tmp_path / "data", "labelled", tiny_data), Quiet())
    found = {"": [], "_mask": [], "_label": []}
    for shard in metadata.splits["train"].shards:
        for column, documents in found.items():
            documents += megatron_documents(tmp_path / "data/dataset" / f"{shard.name}{column}")
    expected = [sequences[0] for _, sequences in encoded_anew(rows, tiny_data)]
    assert [document.tolist() for document in found[""]] == [sequence.tokens.tolist() for sequence in expected]
    assert [document.tolist() for document in found["_mask"]] == [s.learned.astype(int).tolist() for s in expected]
    assert [document.tolist() for document in found["_label"]] == [[int(s.columns["label"])] for s in expected]
    assert metadata.options["columns"] == ["label"] and metadata.max_length == MAX_LENGTH
    listed = {file for shard in metadata.splits["train"].shards for file in shard.files} | set(
        metadata.options["further_files"]
    )
    assert listed == set(os.listdir(tmp_path / "data/dataset"))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_rows_are_the_same_bytes_wherever_they_are(write, tiny_data, tmp_path):
    prepare_examples(options(write("chat"), tmp_path / "one", "chat", tiny_data), Quiet())
    shutil.copytree(tmp_path / "rows", tmp_path / "elsewhere/rows")
    prepare_examples(options(tmp_path / "elsewhere/rows", tmp_path / "two", "chat", tiny_data), Quiet())
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_again_is_up_to_date_and_another_dataset_is_not_replaced_unasked(write, tiny_data, tmp_path):
    asked = options(write("labelled"), tmp_path / "data", "labelled", tiny_data)
    prepare_examples(asked, Quiet())
    before, again = digests(tmp_path / "data"), Quiet()
    prepare_examples(asked, again)
    assert again.lines == [f"{tmp_path / 'data'} is up to date: same input and options"]
    other = replace(asked, input_dir=write("chat"), format="sft")
    with pytest.raises(UserError, match="--overwrite"):
        prepare_examples(other, Quiet())
    assert digests(tmp_path / "data") == before
    prepare_examples(replace(other, overwrite=True), Quiet())
    assert not list((tmp_path / "data/dataset").glob("*_label*"))
    assert load_metadata(tmp_path / "data").options["kind"] == "chat"


def test_rows_that_are_cut_or_left_out_are_counted(write, tiny_data, tmp_path):
    rows, said = write("chat"), Quiet()
    metadata = prepare_examples(
        options(rows, tmp_path / "data", "chat", tiny_data, max_length=90, train_on="last"), said
    )
    left_out = [line for line in said.lines if "left out" in line]
    assert len(left_out) == 1 and "lies beyond max_length 90" in left_out[0]
    assert sum(kind["count"] for kind in metadata.skipped.values()) == 20 - len(ExampleShards(tmp_path / "data")) > 0
    assert any("cut off at --max_length 90" in line for line in said.lines)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence(write, tiny_data, tmp_path):
    rows = write("chat")
    asked = options(rows, tmp_path / "data", "chat", tiny_data)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 64}')
    shutil.copy(tiny_data / "tokenizer.json", tmp_path / "model")
    wrong = {
        "--format sft": replace(asked, format="preference"),
        "nowhere does not exist": replace(asked, input_dir=tmp_path / "nowhere"),
        "--max_length 64 or less": replace(asked, tokenizer_from=tmp_path / "model"),
        "at least 2": replace(asked, max_length=1),
        "column=meaning": replace(asked, rename_columns=("messages",)),
        "holds no .json": replace(asked, input_dir=tiny_data / "dataset"),
        "no example of --input_dir": replace(asked, max_length=3),
    }
    for words, one in wrong.items():
        with pytest.raises(UserError) as caught:
            prepare_examples(one, Quiet())
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "data/metadata.json").exists()


def test_shards_that_do_not_fit_the_stage_are_one_sentence(write, tiny_data, tmp_path):
    prepare_examples(options(write("chat"), tmp_path / "data", "chat", tiny_data), Quiet())
    config = TrainConfig(stage="sft", init_from="x", data_dir=[str(tmp_path / "data")], sample_prompt="")
    wrong = {
        "learns from preference": replace(config, stage="dpo"),
        "another chat template than llama3": replace(config, chat_template="llama3"),
        "--max_length 32 is less": replace(config, max_length=32),
        "--train_on assistant": replace(config, train_on="all"),
        "takes one --data_dir": replace(config, data_dir=[str(tmp_path / "data")] * 2),
        "holds text": replace(config, data_dir=[str(tiny_data)]),
        "holds examples to fine-tune on (sft): add --stage": replace(config, stage="pretrain", init_from=None),
    }
    for words, one in wrong.items():
        with pytest.raises(UserError) as caught:
            open_stage_data(one, tiny_data, 256)
        assert words in str(caught.value), (words, str(caught.value))
    with pytest.raises(UserError, match="more than the model"):
        open_stage_data(config, tiny_data, 32)
    other = shutil.copytree(tiny_data, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(UserError, match="--tokenizer_from"):
        open_stage_data(config, other, 256)


def test_a_mask_that_is_cut_short_is_named(write, tiny_data, tmp_path):
    prepare_examples(options(write("chat"), tmp_path / "data", "chat", tiny_data), Quiet())
    mask = tmp_path / "data/dataset/train_00000_mask.bin"
    mask.write_bytes(mask.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_00000_mask\.bin is missing or not as long"):
        ExampleShards(tmp_path / "data")


def test_the_script_makes_them_and_refuses_flags_of_the_other_kind(root, write, tiny_data, tmp_path):
    rows = write("preference")
    command = [sys.executable, "data_prep_tool.py", "--output_dir", tmp_path / "data", "--input_dir", rows / "a.jsonl"]

    def tool(*flags):
        words = [str(word) for word in [*command, *flags]]
        return subprocess.run(words, cwd=root, capture_output=True, text=True)

    made = tool("--format", "preference", "--tokenizer_from", tiny_data, "--max_length", "96")
    assert made.returncode == 0 and made.stderr == "", made.stderr
    assert "8 examples, 16 sequences" in made.stdout and "[[" in made.stdout
    assert made.stdout.splitlines()[-1].startswith("next: python train.py --init_from MODEL --data_dir")
    assert len(ExampleShards(tmp_path / "data")) == 8
    for flags, words in (
        (["--format", "sft"], "--tokenizer_from is missing"),
        (["--format", "sft", "--tokenizer_from", tiny_data, "--stride", "3"], "--stride belongs to --format text"),
        (["--train_on", "all"], "--train_on belongs to --format sft and preference"),
    ):
        refused = tool(*flags)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
