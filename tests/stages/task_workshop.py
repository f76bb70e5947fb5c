"""What do the tests of stages that classify, tag and answer share? Small models of words, and examples that can be learned."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, processors

from tests.family_models import transformers

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "</s>",
    "good",
    "bad",
    "film",
    "is",
    "was",
    "the",
    "a",
    "very",
    "ann",
    "bob",
    "rome",
    "oslo",
    "lives",
    "in",
    "and",
    "who",
    "where",
    "not",
]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5,
}  # fmt: skip
FAMILIES = {
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {"type_vocab_size": 1}),
    "modernbert": (
        "ModernBertConfig", "ModernBertForMaskedLM",
        {"local_attention": 16, "cls_token_id": 2, "sep_token_id": 3, "classifier_pooling": "mean"},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66, "n_inner": 64},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 1}),
}  # fmt: skip
DECODERS = ("llama", "gpt2", "qwen2")


def a_base(folder: Path, family: str) -> Path:
    """A model of transformers with a tokenizer of WORDS: BERT's template around a text, or nothing of a decoder."""
    config_class, model_class, changes = FAMILIES[family]
    sizes = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 5} if family == "gpt2" else SIZES
    torch.manual_seed(5)
    config = getattr(transformers, config_class)(**{**sizes, **changes})
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than usual, so that a few steps tell texts apart
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer = HFTokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:6])
    if family not in DECODERS:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {
        "eos_token": "</s>",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles}))
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def texts(count: int) -> list[dict]:
    """Reviews of films in which one word decides."""
    fill = ["the film is", "a very very", "ann and bob", "the film was in rome and", "is"]
    return [
        {
            "text": f"{fill[n % 5]} {('good', 'bad', 'not')[n % 3]} {fill[(n // 3) % 5]}",
            "label": ("pro", "con", "?")[n % 3],
        }
        for n in range(count)
    ]


def pairs(count: int) -> list[dict]:
    """Two texts of which it is to be said whether they have the same word."""
    words = ("good", "bad")
    return [
        {
            "text_a": f"the film is {words[n % 2]}",
            "text_b": f"very {words[n // 2 % 2]}",
            "label": int(n % 2 == n // 2 % 2),
        }
        for n in range(count)
    ]


def figures(count: int) -> list[dict]:
    rows = [" ".join(["good"] * (n % 4) + ["film"] * (1 + n % 3)) for n in range(count)]
    return [{"text": row, "label": row.count("good") / 2 + 0.25} for row in rows]


def several(count: int) -> list[dict]:
    rows = [[name for place, name in enumerate(("ann", "bob", "rome")) if n >> place & 1] for n in range(count)]
    return [{"text": f"the film {' and '.join(row)}", "labels": row} for row in rows]


def sentences(count: int) -> list[dict]:
    people, places = ("ann", "bob", "ann bob"), ("rome", "oslo")
    made = []
    for n in range(count):
        who, where = people[n % 3].split(), places[n % 2]
        words = [*who, "lives", "in", where, *["and", "was", "good"][: n % 4]]
        tags = ["B-PER", "I-PER"][: len(who)] + ["O", "O", "B-LOC"] + ["O"] * (len(words) - len(who) - 3)
        made.append({"tokens": words, "tags": tags})
    return made


def questions(count: int, *, unanswerable: bool = True) -> list[dict]:
    """Some contexts are longer than a window; every fourth question has no answer."""
    people, places, made = ("ann", "bob"), ("rome", "oslo"), []
    for n in range(count):
        who, where = people[n % 2], places[n // 2 % 2]
        filler = " ".join(["the film was very good and"] * (n % 3))
        context = f"{filler} {who} lives in {where} and the film is bad".strip()
        if unanswerable and n % 4 == 3:
            row = {"question": "who is not in", "context": context, "answers": {"text": [], "answer_start": []}}
        else:
            text = where if n % 2 else who
            asked = "where lives" if n % 2 else "who lives"
            row = {
                "question": asked,
                "context": context,
                "answers": {"text": [text], "answer_start": [context.index(text)]},
            }
        made.append({"id": str(n), **row})
    return made


def write_all(folder: Path) -> None:
    """All kinds of examples, 48 of each."""
    made = {
        "texts": texts,
        "pairs": pairs,
        "figures": figures,
        "several": several,
        "sentences": sentences,
        "questions": questions,
    }
    for name, make in made.items():
        write_rows(folder / f"{name}.jsonl", make(48))
    write_rows(folder / "answerable.jsonl", questions(48, unanswerable=False))
