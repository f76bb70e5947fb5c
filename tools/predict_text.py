"""How are masks filled and texts embedded? What `utils.py predict` does with masked language models and bare ones.

A folder of sentence-transformers says how it pools (modules.json and what it names): `read_recipe`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from errors import UserError
from finetune_data.task_rows import WrongRowError
from model import read_json
from tools.predict_rows import Reader, Result, Texts, encode_texts, numbers, outputs, read_texts

POOLING = ("mean", "cls", "last")
_POOLING_FIELDS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class Recipe:
    """How the states of a text's tokens become its embedding. max_length: in tokens, where the folder bounds it."""

    pooling: str
    normalise: bool
    max_length: int | None = None


def read_recipe(folder: Path) -> Recipe | None:
    """That of a folder of sentence-transformers; None of others. UserError for one that is not computed."""
    if not (folder / "modules.json").exists():
        return None
    try:
        modules = [
            (one["type"].rpartition(".")[2], one["path"]) for one in json.loads((folder / "modules.json").read_text())
        ]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{folder / 'modules.json'} is not the list of modules that sentence-transformers writes"
        ) from None
    advice = "name --pooling, which leaves modules.json aside"
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(f"{folder / 'modules.json'} has {', '.join(kinds)}; that is not computed: {advice}")
    path = folder / modules[1][1] / "config.json"
    chosen = [name for name, value in read_json(path).items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLING_FIELDS:
        raise UserError(f"{path} pools by {' and '.join(chosen) or 'nothing'}; that is not computed: {advice}")
    limits = _optional(folder / "sentence_bert_config.json")
    if limits.get("do_lower_case"):
        raise UserError(f"{folder}: sentence_bert_config.json has do_lower_case; give lower-case texts and {advice}")
    if prompt := _optional(folder / "config_sentence_transformers.json").get("default_prompt_name"):
        raise UserError(f"{folder}: texts begin with its prompt {prompt!r}; write it before each text and {advice}")
    return Recipe(_POOLING_FIELDS[chosen[0]], "Normalize" in kinds, limits.get("max_seq_length"))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def embed(reader: Reader, texts: list[Texts], recipe: Recipe) -> list[Result]:
    """The "embedding" of each: of the hidden states of its tokens, special ones included, the mean, the first or the last.

    In fp32 after the model's last norm; normalised: divided by its length (L2).
    """
    sequences, notes = encode_texts(reader, texts)
    states = outputs(reader, sequences)
    pooled = torch.stack(
        [
            state.float().mean(0) if recipe.pooling == "mean" else state[0 if recipe.pooling == "cls" else -1].float()
            for state in states
        ]
    )  # (N, H)
    if recipe.normalise:
        pooled = F.normalize(pooled, dim=1)
    return [{"embedding": numbers(vector)} | note for vector, note in zip(pooled, notes, strict=True)]


def read_masked(mask_token: str, row: dict[str, Any]) -> Texts:
    """The text of a row, or both. WrongRowError where neither has a mask."""
    texts = read_texts(row)
    if not any(mask_token in text for text in texts if text is not None):
        raise WrongRowError(f"no {mask_token}")
    return texts


@torch.inference_mode()
def fill_masks(reader: Reader, texts: list[Texts], top_k: int) -> list[Result]:
    """Of each text "masks", for each mask the top_k likeliest tokens with their probabilities, and "filled" with the first.

    Each mask is filled as if the others stayed masks. Probabilities are over the tokenizer's ids.
    """
    tokenizer, model = reader.tokenizer, reader.model
    assert tokenizer.mask_token_id is not None
    sequences, notes = encode_texts(reader, texts, masks=True)
    ids = [torch.from_numpy(sequence.tokens) for sequence in sequences]
    masked = [torch.eq(one, tokenizer.mask_token_id).nonzero().flatten() for one in ids]
    states = outputs(reader, sequences)
    at_masks = [state[where.to(state.device)] for state, where in zip(states, masked, strict=True)]
    logits = model.logits(torch.cat(at_masks))[:, : tokenizer.vocab_size]  # (masks, V)
    probabilities, tokens = logits.softmax(-1).topk(min(top_k, tokenizer.vocab_size))  # (masks, k) each
    found = iter(zip(map(numbers, probabilities), tokens.tolist(), strict=True))
    results = []
    for one, where, note in zip(ids, masked, notes, strict=True):
        best = [next(found) for _ in where]
        named = [
            [
                {"token": tokenizer.decode([token], skip_special=False), "id": token, "probability": probability}
                for probability, token in zip(*mask, strict=True)
            ]
            for mask in best
        ]
        filled = one.clone()
        filled[where] = torch.tensor([token for _, (token, *_) in best], dtype=one.dtype)
        results.append({"masks": named, "filled": tokenizer.decode(filled.tolist())} | note)
    return results
