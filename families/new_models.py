"""What does a new model of a family have, beside its sizes? The parts of its folders, and the constants of its published ones."""

from typing import Any

from families.common import DEFAULTS, FULL, REQUIRED
from families.names import FAMILIES

# --model's word for a family: the model_type of its folder
NEW_MODELS = {
    "llama": "llama",
    "gpt2": "gpt2",
    "mistral": "mistral",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "bert": "bert",
    "modernbert": "modernbert",
}
ENCODERS = ("bert", "modernbert")
MIXTURES = ("mixtral", "qwen3_moe")
# where published models differ from what transformers assumes of a silent config.json; router_aux_loss_coef is our own
_USUAL: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"rms_norm_eps": 1e-5},
    "qwen3": {"rope_theta": 1e6},
    "gemma3_text": {"sliding_window": 512},
    "olmo2": {"rope_theta": 5e5, "rms_norm_eps": 1e-6},
    "mixtral": {"router_aux_loss_coef": 0.01},
    "qwen3_moe": {"rope_theta": 1e6, "normalise_routing": True, "router_aux_loss_coef": 0.01},
}
_GPT2_SIZES = {"n_embd": 2, "n_layer": 1, "n_head": 1}
_SIZES = {*REQUIRED, *DEFAULTS} - {"rms_norm_eps", "tie_word_embeddings"}
_SIZES |= {"num_experts", "experts_per_token", "expert_size"}


def parts_of_new(model: str, num_layers: int, head_dim: int) -> dict[str, Any]:
    """ModelConfig's fields of a new model, `family` among them, without its sizes and the ids of special tokens."""
    family = NEW_MODELS[model]
    silent = {**dict.fromkeys(REQUIRED, 2), **_GPT2_SIZES, "num_hidden_layers": num_layers, "n_layer": num_layers}
    fields = FAMILIES[family].read(silent) | _USUAL.get(family, {}) | {"family": family}
    kinds = fields.get("layer_types")
    if kinds and FULL not in kinds:  # of few layers the family's pattern reaches none that sees all
        fields["layer_types"] = [*kinds[:-1], FULL]
    if fields.get("attention_scale") is not None:  # a Gemma's, which its published sizes take for heads of their width
        fields["attention_scale"] = head_dim**-0.5
    return {name: value for name, value in fields.items() if name not in _SIZES}
