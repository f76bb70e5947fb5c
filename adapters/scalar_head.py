"""How does a language model give a score instead of a word? One number a token, from the last hidden state.

`RewardModel` is the transformer with `score`, a matrix of one row, in place of the head. Its folder is that of
the family's …ForSequenceClassification in transformers, with one label.

transformers reads the score at the last token that is not config.pad_token_id, and pads with its tokenizer's pad token. So
both must be the same, and one that ends no sequence, which many models' is not: `padding_token` chooses it.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing.load import load_model
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from families.names import FAMILIES
from finetune_data.chat_template import SHIPPED, ChatTemplate, load_chat_template
from kernels.choice import KernelChoice
from model import Transformer, load_pretrained, read_json
from model_config import ModelConfig

NEW_PAD_TOKEN = "<|pad|>"


@dataclass
class RewardConfig(ModelConfig):
    """As ModelConfig, and saved as a classifier with one label.

    Where pad_token_id is not given, or is an end-of-text id, it becomes the largest id that is not one.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = _end_ids(self)
        if self.pad_token_id is None or self.pad_token_id in ends:
            self.pad_token_id = max(set(range(self.vocab_size - len(ends) - 1, self.vocab_size)) - set(ends))

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict:
        """The contents of config.json."""
        return super().to_hf(dtype) | {
            "architectures": [f"{FAMILIES[self.family].CLASS}ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},  # num_labels is read off these
            "label2id": {"LABEL_0": 0},
        }

    @classmethod
    def from_model(cls, config: ModelConfig) -> "RewardConfig":
        return cls(**asdict(config))


class RewardModel(Transformer):
    """A transformer whose forward gives scores. Parameters: `model.…` and `score.weight` (1, H), named as transformers'."""

    config: RewardConfig
    heads = ("score",)  # what is trained whole beside adapters

    def __init__(self, config: ModelConfig, kernels: KernelChoice | None = None):
        super().__init__(RewardConfig.from_model(config), kernels or KernelChoice())
        if not config.tie_word_embeddings:
            del self.lm_head
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(  # type: ignore[override]  # scores are of whole texts: there is no cache to go on from
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """(B, T) fp32: the score of each token's prefix of its document. Arguments as in Transformer.forward."""
        hidden = super().forward(input_ids, positions, cu_seqlens, max_seqlen)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.score.weight[0].float()  # (B, T, H) @ (H,)

    @torch.no_grad()
    def init_score(self, seed: int) -> None:
        """Draw the head anew: normal, variance 1/(H+1) (Stiennon et al. 2020; Huang et al. 2024, detail 4.4)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(self.score.weight.shape, generator=generator, device="cpu")
        self.score.weight.copy_(drawn / math.sqrt(self.config.hidden_size + 1))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kernels: KernelChoice | None = None,
    ) -> "RewardModel":
        """From a folder with a reward model's weights, head and all; or from a language model's, with a new head.

        dtype: of the transformer; the head is fp32. Raises UserError as load_pretrained and load_model do,
        and for a classifier with another number of labels than one.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        is_classifier = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
        shape = ModelConfig.from_hf(config)
        if (padding := padding_token(folder, shape)) is not None:
            shape.pad_token_id = padding[0]
        with torch.device("meta"):
            model = cls(shape, kernels)
        if is_classifier:
            if (labels := len(config.get("id2label") or (0, 1))) != 1:
                raise UserError(f"{folder}: the classifier has {labels} labels; a reward model has one")
            model.to(dtype).to_empty(device=device)
            model.score.float()
            load_model(folder, model)
            return model
        model.model = load_pretrained(folder, device, dtype).model
        model.score.to_empty(device=device)
        model.init_score(seed)
        return model


# ---- the pad token ---------------------------------------------------------------------------------------------------


def padding_token(folder: str | Path, config: ModelConfig) -> tuple[int, str] | None:
    """(id, text) of the token that rows of a batch are padded with, for the tokenizer in a model's folder.

    In this order: the tokenizer's own, unless a sequence may end in it; a special token with "pad" in its name; a new one
    behind the vocabulary, where the embedding has a row for it; another special token that neither begins nor ends a
    sequence. None where there is no tokenizer or none of these.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = load_tokenizer(folder, lazy=True)
    added = {token["content"]: token for token in tokenizer.definition["added_tokens"]}
    special = {content: token["id"] for content, token in added.items() if token["special"]}
    template = load_chat_template(folder)
    roles = template.special_tokens
    turns = [one.end_of_turn for one in (template, *(ChatTemplate(name, text) for name, text in SHIPPED.items()))]
    ends = {*_end_ids(config), tokenizer.eos_token_id}
    ids = {content: index for content, index in special.items() if index not in ends and index < config.vocab_size}
    ids = {content: index for content, index in ids.items() if not any(turn.startswith(content) for turn in turns)}
    if roles.get("pad_token") in ids:
        return ids[roles["pad_token"]], roles["pad_token"]
    if named := sorted(content for content in ids if "pad" in content.lower()):
        return ids[named[0]], named[0]
    vocabulary = tokenizer.definition["model"]["vocab"]
    taken = {*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))}
    taken |= {token["id"] for token in added.values()}
    if len(taken) == tokenizer.vocab_size < config.vocab_size:  # without gaps, so that every library gives it this id
        return tokenizer.vocab_size, NEW_PAD_TOKEN
    others = [content for content in ids if content != roles.get("bos_token")]
    return max(((ids[content], content) for content in others), default=None)


def padding_files(folder: str | Path) -> dict[str, bytes]:
    """The tokenizer's files that name its pad token, as a reward model's folder must have them; `folder` is its base's.

    Where there is no token to pad with, none is named: transformers then refuses to pad, instead of reading a wrong score.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    return files_naming_pad(folder, padding_token(folder, ModelConfig.from_hf(config)))


def files_naming_pad(folder: Path, found: tuple[int, str] | None) -> dict[str, bytes]:
    """The tokenizer's files of a folder in which (id, text) is the pad token, or none is."""
    files = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "tokenizer_config.json" or (folder / name).exists():
            content = read_json(folder / name) if (folder / name).exists() else {}
            content = {key: value for key, value in content.items() if key != "pad_token"}
            content |= {} if found is None else {"pad_token": found[1]}
            files[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _end_ids(config: ModelConfig) -> list[int | None]:
    return [*config.eos_token_id] if isinstance(config.eos_token_id, list) else [config.eos_token_id]
