"""Is a config.json read as transformers reads it, in either version's spelling, or refused by name?

Each variant is a small random model of transformers', whose logits are compared at positions beyond every original context.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from errors import UserError
from model import load_pretrained
from model_config import ModelConfig

LLAMA3_FIELDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "architectures": ["LlamaForCausalLM"],
}
VARIANTS = {
    "plain": {},
    "theta": {"rope_theta": 5e5},
    "theta int": {"rope_theta": 500000},
    "scaling null": {"rope_scaling": None, "rope_theta": 5e5},
    "params null": {"rope_parameters": None, "rope_theta": 5e5},
    "theta null": {"rope_theta": None},
    "v5 default": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "v5 without type": {"rope_parameters": {"rope_theta": 5e5}},
    "empty params": {"rope_parameters": {}, "rope_theta": 5e5},
    "theta in scaling": {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    "theta in scaling no type": {"rope_scaling": {"rope_theta": 5e5}},
    "theta in scaling linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    "both same": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "both differ": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear int": {"rope_scaling": {"type": "linear", "factor": 4}},
    "linear both names": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
    "linear original nested": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 32}
    },
    "linear original top": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "linear v5": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    "linear no factor": {"rope_scaling": {"rope_type": "linear"}},
    "linear factor below 1": {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3_FIELDS, "original_max_position_embeddings": 32}},
    "llama3 type": {"rope_scaling": {"type": "llama3", **LLAMA3_FIELDS, "original_max_position_embeddings": 32}},
    "llama3 v5": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            **LLAMA3_FIELDS,
            "original_max_position_embeddings": 32,
        }
    },
    "llama3 original top": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3_FIELDS},
        "original_max_position_embeddings": 32,
    },
    "llama3 no original": {"rope_scaling": {"rope_type": "llama3", **LLAMA3_FIELDS}},
    "llama3 theta inside": {
        "rope_scaling": {
            "rope_type": "llama3",
            **LLAMA3_FIELDS,
            "original_max_position_embeddings": 32,
            "rope_theta": 5e5,
        }
    },
    "llama3 ints": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 32,
        }
    },
    "llama3 missing": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn type": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn top original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
    "yarn both originals": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 32,
    },
    "yarn originals differ": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 32,
    },
    "yarn no original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn v5": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 5e5,
        }
    },
    "yarn v5 top original": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5},
        "original_max_position_embeddings": 32,
    },
    "yarn attention_factor": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.3,
        }
    },
    "yarn betas": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    },
    "yarn betas ints": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 32,
            "beta_fast": 16,
            "beta_slow": 2,
        }
    },
    "yarn mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        }
    },
    "yarn mscale equal": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    },
    "yarn mscale alone": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7}
    },
    "yarn truncate": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
    },
    "yarn nulls": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": None,
            "beta_fast": None,
        }
    },
    "yarn other factor": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
    "yarn factor null": {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "longrope": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "factor": 2.0}
    },
    "unknown": {"rope_scaling": {"rope_type": "no such", "factor": 2.0}},
    "partial 1": {"partial_rotary_factor": 1.0},
    "partial half": {"partial_rotary_factor": 0.5},
    "partial half nested": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "head_dim": {"head_dim": 32},
    "head_dim null": {"head_dim": None},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "qwen3 head_dim null": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": None},
    "qwen3 no head_dim": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "qwen3 yarn": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3 yarn v5": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "rope_parameters": {
            "rope_theta": 1e6,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "kv null": {"num_key_value_heads": None},
}

# what transformers takes and groundup refuses, by this word: what it would compute differently, and what contradicts itself
REFUSED = {
    "both differ": "rope_theta",
    "linear factor below 1": "factor",
    "yarn originals differ": "original_max_position_embeddings",
    "partial half": "partial_rotary_factor",
    "partial half nested": "partial_rotary_factor",
}
# what neither takes
BROKEN = {
    "theta null": "rope_theta",
    "linear no factor": "factor",
    "llama3 missing": "high_freq_factor",
    "unknown": "no such",
    "qwen3 head_dim null": "head_dim",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_is_read_as_transformers_reads_it(name, tmp_path):
    config = BASE | VARIANTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name in REFUSED or name in BROKEN:
        with pytest.raises(UserError, match=(REFUSED | BROKEN)[name]):
            ModelConfig.from_hf(config)
        if name in BROKEN:
            with pytest.raises(Exception):  # noqa: B017 - which one is its own affair
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        return
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim > 1:
                parameter *= 6.0  # so that attention looks somewhere, and a wrong angle shows
    save_file(
        {key: t.contiguous() for key, t in peer.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    ours = load_pretrained(tmp_path)
    ids = torch.arange(100)[None] % 64
    with torch.no_grad():
        wanted, found = peer(ids).logits, ours.logits(ours(ids))[..., :64]
    assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()
    # and as it is written again, in either version's fields alone
    written = ours.config.to_hf()
    for gone in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        assert ModelConfig.from_hf({key: value for key, value in written.items() if key not in gone}) == ours.config


def test_the_spellings_differ_where_they_should():
    """The variants are no one model: theta, scaling and original context each change the logits."""
    theta, scaling = (
        ModelConfig.from_hf(BASE | VARIANTS[name]) for name in ("theta in scaling linear", "yarn top original")
    )
    assert theta.rope_theta == 5e5 and scaling.rope_scaling["original_max_position_embeddings"] == 32
    assert transformers.__version__ >= "4.57"
