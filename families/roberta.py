"""How is a RoBERTa's folder written? (Liu et al. 2019). A BERT whose positions start after that of the padding."""

from typing import Any

from errors import UserError
from families import bert
from families.common import read_shape, with_prefix

CLASS, ARCHITECTURE = "Roberta", "RobertaForMaskedLM"
NAMES = {
    **{
        ours: f"roberta.{theirs.removeprefix('bert.')}"
        for ours, theirs in bert.NAMES.items()
        if ours.startswith("model.")
    },
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.bias": "lm_head.bias",
}
TRANSPOSED: frozenset[str] = frozenset()
EXPERTS = None
_DEFAULTS = bert.ENCODER_DEFAULTS | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
# the head has the exact GELU whatever hidden_act says, so that the blocks must have it too
_FIXED = bert.FIXED | {"hidden_act": "gelu"}


def read(config: dict) -> dict[str, Any]:
    """ModelConfig's fields from config.json. Raises UserError, naming the field.

    The first token has position pad_token_id + 1: of the table's 514 rows 512 serve.
    """
    fields = read_shape(config, _DEFAULTS, _FIXED, bert.RENAMED)
    if type(fields["pad_token_id"]) is not int or fields["pad_token_id"] < 0:
        raise UserError(
            f"config.json: pad_token_id is {fields['pad_token_id']!r}; a RoBERTa's positions start after it"
        )
    offset = fields["pad_token_id"] + 1
    return {
        **fields,
        **bert.PARTS,
        **bert.read_heads(config, CLASS),
        "hidden_act": "gelu",
        "type_vocab_size": config.get("type_vocab_size", 2),
        "position_offset": offset,
        "max_position_embeddings": fields["max_position_embeddings"] - offset,
    }


def write(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of ModelConfig's fields."""
    rows = fields["max_position_embeddings"] + fields["position_offset"]
    return bert.write_encoder(fields, "roberta", bert.named_class(fields, CLASS), dtype) | {
        "max_position_embeddings": rows
    }


def canonical(name: str) -> str | None:
    """The tensor's name in a folder of today; the head's matrix, tied, and its bias may be there under a second name."""
    if name.endswith("embeddings.position_ids") or name.startswith("lm_head.decoder."):
        return None
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return with_prefix(name, "roberta.", ("embeddings.", "encoder.", "pooler."))
