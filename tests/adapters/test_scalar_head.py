"""Is a reward model's folder the classifier that transformers knows, with the same scores in both?"""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from adapters.lora import adapters_off, add_adapters
from adapters.peft_files import peft_files
from adapters.scalar_head import RewardModel, padding_files
from checkpointing.save import save_checkpoint
from checkpointing.tensors import model_tensors
from errors import UserError
from model import Transformer
from model_config import ModelConfig

EOS, VOCABULARY = 2, 97
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def a_config(**changes) -> ModelConfig:
    return ModelConfig(vocab_size=VOCABULARY, eos_token_id=EOS, **SHAPE, **changes)


def a_reward_model(**changes) -> RewardModel:
    model = RewardModel(a_config(**changes))
    language_model = a_language_model(**changes)
    model.model.load_state_dict(language_model.model.state_dict())
    model.init_score(5)
    return model


def a_language_model(**changes) -> Transformer:
    model = Transformer(a_config(**changes))
    model.init_weights(1, zero_residual=False)
    return model


def save(model, folder):
    result = save_checkpoint(folder, 1, model=model, optimizers=[], state={}, files={}, keep_checkpoints=0)
    assert result.ok, result.message
    return result.path


def some_rows() -> list[torch.Tensor]:
    """Rows of different lengths, each ending in the end-of-text token, as trained sequences do."""
    generator = torch.Generator().manual_seed(0)
    return [torch.cat([torch.randint(3, 96, (n,), generator=generator), torch.tensor([EOS])]) for n in (3, 9, 20)]


def transformers_scores(model, pad: int, side: str) -> torch.Tensor:
    """(3,) what transformers returns for a padded batch: the score at the token that it takes for the last."""
    rows = some_rows()
    ids, mask = torch.full((3, 21), pad), torch.zeros(3, 21, dtype=torch.long)
    for row, (tokens, line, seen) in enumerate(zip(rows, ids, mask, strict=True)):
        place = slice(0, len(tokens)) if side == "right" else slice(21 - len(tokens), 21)
        line[place], seen[place] = rows[row], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions).logits[:, 0]


@pytest.mark.parametrize("family", [{}, {"qk_norm": True, "head_dim": 16}, {"tie_word_embeddings": True}])
def test_transformers_opens_a_checkpoint_and_reads_the_same_scores(family, tmp_path):
    """AutoModelForSequenceClassification, padded right and left, to 1e-5 of scores of size one."""
    from transformers import AutoModelForSequenceClassification

    model = a_reward_model(**family)
    path = save(model, tmp_path)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert type(theirs).__name__ == ("Qwen3" if "qk_norm" in family else "Llama") + "ForSequenceClassification"
    assert theirs.config.num_labels == 1 and not report["missing_keys"] and not report["unexpected_keys"]
    ours = torch.stack([model(tokens[None])[0, -1] for tokens in some_rows()])
    for side in ("right", "left"):
        found = transformers_scores(theirs, theirs.config.pad_token_id, side)
        torch.testing.assert_close(found, ours.detach(), atol=1e-5, rtol=1e-5)
    again = RewardModel.from_pretrained(path, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.config == model.config


def test_a_classifier_that_transformers_saved_is_opened(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, eos_token_id=EOS, **SHAPE)
    theirs = LlamaForSequenceClassification(config)
    theirs.save_pretrained(tmp_path)
    ours = RewardModel.from_pretrained(tmp_path, seed=0)
    assert ours.config.pad_token_id == 0
    scores = torch.stack([ours(tokens[None])[0, -1] for tokens in some_rows()])
    torch.testing.assert_close(transformers_scores(theirs, 0, "right"), scores.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_gets_a_new_head_that_the_seed_decides(tied, tmp_path):
    plain = a_language_model(tie_word_embeddings=tied)
    path = save(plain, tmp_path)
    first, again, other = (RewardModel.from_pretrained(path, seed=seed) for seed in (1, 1, 2))
    names = [name for name, _ in first.named_parameters()]
    assert names == [n for n, _ in plain.named_parameters() if n != "lm_head.weight"] + ["score.weight"]
    assert all(torch.equal(first.get_parameter(n), plain.get_parameter(n)) for n in names[:-1])
    assert torch.equal(first.score.weight, again.score.weight) and not torch.equal(
        first.score.weight, other.score.weight
    )
    assert first.score.weight.requires_grad and first.score.weight.dtype == torch.float32


def test_the_head_is_normal_with_variance_one_over_width_plus_one():
    """16,384 draws: mean and variance within four standard errors."""
    width = 16384
    with torch.device("meta"):
        model = RewardModel(ModelConfig(vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=128))  # fmt: skip
    model.score.to_empty(device="cpu")
    model.init_score(3)
    scaled = model.score.weight.detach() * math.sqrt(width + 1)
    assert abs(scaled.mean()) < 4 / math.sqrt(width) and abs(scaled.var() - 1) < 4 * math.sqrt(2 / width)


def test_scores_of_packed_documents_are_those_of_each_alone():
    model, rows = a_reward_model(), some_rows()
    lengths = torch.tensor([len(row) for row in rows])
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    scores = model(torch.cat(rows)[None], cu_seqlens=boundaries)
    assert scores.shape == (1, lengths.sum()) and scores.dtype == torch.float32
    alone = torch.cat([model(row[None]) for row in rows], dim=1)
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)


def test_under_autocast_and_over_bf16_weights_the_head_stays_fp32(tmp_path):
    """bf16 scores near 1 would lie on a grid of 2⁻⁸, and pairs would tie."""
    model = a_reward_model()
    model.score.weight.data *= 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(torch.stack([torch.arange(3, 60)]))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())
    path = save(a_reward_model(), tmp_path)
    half = RewardModel.from_pretrained(path, seed=0, dtype=torch.bfloat16)
    assert half.score.weight.dtype == torch.float32 and half.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(half.score.weight, a_reward_model().score.weight)


def test_adapters_on_its_blocks():
    model, plain = a_reward_model(), a_reward_model()
    add_adapters(model, rank=4, alpha=8.0)
    ids = some_rows()[1][None]
    assert torch.equal(model(ids), plain(ids))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.1)
    assert not torch.allclose(model(ids), plain(ids), atol=1e-3)
    with adapters_off(model):
        assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize(
    ("given", "pad"),
    [({"eos_token_id": 2}, 96), ({"eos_token_id": [95, 96]}, 94), ({"eos_token_id": None}, 96),
     ({"eos_token_id": 2, "pad_token_id": 2}, 96), ({"eos_token_id": 2, "pad_token_id": 0}, 0)],
)  # fmt: skip
def test_the_pad_token_is_never_one_that_ends_a_sequence(given, pad):
    """transformers would look past it and read the score of the token before."""
    model = RewardModel(ModelConfig(vocab_size=VOCABULARY, **SHAPE, **given))
    assert model.config.pad_token_id == pad and model.config.to_hf()["pad_token_id"] == pad


# special tokens, the role "pad_token", words in the vocabulary (the embedding has 97 rows), and what must be padded with
TOKENIZERS = {
    "no pad token": (["</s>"], None, 90, "<|pad|>"),
    "pad token": (["</s>", "[PAD]"], "[PAD]", 97, "[PAD]"),
    "pad token of another name": (["</s>", "<filler>"], "<filler>", 97, "<filler>"),
    "pad is eos, and rows are left": (["</s>", "<s>"], "</s>", 90, "<|pad|>"),
    "pad is eos, and no row is left": (["<s>", "<|im_start|>", "<|im_end|>", "<extra>"], "<|im_end|>", 97, "<extra>"),
    "pad ends turns": (["</s>", "<|im_end|>", "<unused>"], "<|im_end|>", 97, "<unused>"),
    "pad is named": (["</s>", "<|finetune_right_pad_id|>", "<x>"], "</s>", 90, "<|finetune_right_pad_id|>"),
    "nothing to pad with": (["</s>"], "</s>", 97, None),
}


def a_base(folder, kind: str):
    """A language model with a tokenizer of words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special, pad, size, _ = TOKENIZERS[kind]
    folder.mkdir()
    words = [*special, *(f"w{number}" for number in range(size - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = "<|im_end|>" if special[0] == "<s>" else "</s>"
    roles = {"eos_token": eos, "bos_token": "<s>" if "<s>" in special else None, "pad_token": pad}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | {name: token for name, token in roles.items() if token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = ModelConfig(vocab_size=VOCABULARY, eos_token_id=words.index(eos), **SHAPE)
    shape.pad_token_id = words.index(pad) if pad else None
    model = Transformer(shape)
    model.init_weights(1, zero_residual=False)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    save_file(model_tensors(model), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_batch_padded_by_the_saved_tokenizer_has_our_scores(kind, lora, tmp_path):
    """transformers alone, tokenizer and model from the checkpoint (PEFT's on the base), against each text by itself here."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base, expected = a_base(tmp_path / "base", kind), TOKENIZERS[kind][-1]
    model = RewardModel.from_pretrained(base, seed=5)
    files = {name: (base / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    adapter = None
    if lora:
        add_adapters(model, rank=4, alpha=8.0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.fill_(0.1)
        adapter = peft_files(model, "default", str(base))
    result = save_checkpoint(
        tmp_path, 1, model=model, optimizers=[], state={}, files=files | padding_files(base), keep_checkpoints=0,
        adapter=adapter,
    )  # fmt: skip
    assert result.ok, result.message
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    assert tokenizer.pad_token == expected
    assert (result.path / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    texts = ["w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14"]
    texts = [f"{text} {tokenizer.eos_token}" for text in texts]
    if expected is None:  # better no score than a wrong one
        with pytest.raises(ValueError, match="padding token"):
            tokenizer(texts, padding=True)
        return
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert padded["input_ids"][0, -1] == tokenizer.pad_token_id != tokenizer.eos_token_id
    if lora:
        peft = pytest.importorskip("peft")
        theirs = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        theirs = peft.PeftModel.from_pretrained(theirs, result.path)
    else:
        theirs = AutoModelForSequenceClassification.from_pretrained(result.path)
    with torch.no_grad():
        found = theirs(**padded).logits[:, 0]
        ours = torch.stack([model(torch.tensor([tokenizer(text)["input_ids"]]))[0, -1] for text in texts])
    assert ours.std() > 1e-2
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config.json"):
        RewardModel.from_pretrained(tmp_path, seed=0)
    path = save(a_reward_model(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["id2label"] = {str(n): str(n) for n in range(3)}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="3 labels"):
        RewardModel.from_pretrained(path, seed=0)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        RewardModel.from_pretrained(path, seed=0)
