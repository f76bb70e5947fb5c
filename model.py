"""What is trained? One decoder-only transformer, whole, in the order in which a token meets it.

    config → norm, attention, MLP, block → Transformer → key-value cache → loading → counting

It is Llama (Touvron et al. 2023; Grattafiori et al. 2024): RoPE, RMSNorm before each sub-layer, SwiGLU, grouped
queries, no biases. With `qk_norm` it is Qwen3, with `sliding_window` Mistral; families/ says how each one's folder is
written. Fields, module names and the RoPE layout are Hugging Face's, so a checkpoint is a folder with nothing to convert.

Letters in shape comments: B rows, T tokens of a row, S keys, H hidden size, A query heads, K key-value heads,
D head size, F MLP size, V vocabulary, L layers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from families.common import INIT_STD, REQUIRED
from families.names import read_config, write_config
from kernels.attention import attention
from kernels.attention_masks import AttentionMask, document_mask, document_positions, row_mask
from kernels.choice import KernelChoice
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.rotary import checked_scaling, rotary_tables
from kernels.swiglu import swiglu
from paths import inside

# --------------------------------------------------------------------------------------------------------------- config

_DERIVED: Any = None  # a field's default that __post_init__ replaces by what follows from the others


def _not_given(value: Any) -> bool:
    return value is None


@dataclass
class ModelConfig:
    """The shape of the model; names and meanings are those of Hugging Face's config.json.

    num_key_value_heads defaults to num_attention_heads, head_dim to hidden_size / num_attention_heads.
    rope_scaling: None, or {"rope_type": "linear" | "llama3" | "yarn", "factor": …, …} with transformers' keys.
    qk_norm: an RMSNorm on each query and key head before RoPE, as in Qwen3. sliding_window: how many tokens one sees at
    most, itself included, as in Mistral; None: all before it. family: whose folder the model is saved as, by default the
    first one that has its parts. Raises UserError on an impossible shape.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = _DERIVED
    head_dim: int = _DERIVED
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    family: str = _DERIVED
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if _not_given(self.family):
            self.family = "qwen3" if self.qk_norm else "llama" if self.sliding_window is None else "mistral"
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window is {self.sliding_window}; it must be at least 1, or null")
        if _not_given(self.num_key_value_heads):
            self.num_key_value_heads = self.num_attention_heads
        for name in (*REQUIRED, "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        # transformers' LlamaConfig insists on this even where head_dim is given; the others do not
        if self.hidden_size % self.num_attention_heads and (_not_given(self.head_dim) or self.family == "llama"):
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        if _not_given(self.head_dim):
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; change one of them"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.rope_scaling is not None:
            self.rope_scaling = checked_scaling(self.rope_scaling, self.max_position_embeddings)

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict:
        """The contents of config.json, as the family has them. `dtype` is that of the saved weights."""
        return write_config(asdict(self), str(dtype).removeprefix("torch."))

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Read a config.json of one of families/, as transformers 4 or 5 writes it. Raises UserError, naming the field."""
        return cls(**read_config(config))


# --------------------------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, fp32 inside (Zhang & Sennrich 2019).

    The result has the dtype of the matrix product that follows; under autocast the residual stream keeps its fp32.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, implementation: str) -> Tensor:
        return rms_norm(x, self.weight, self.eps, out_dtype=_compute_dtype(x), implementation=implementation)

    def add(self, x: Tensor, update: Tensor | None, implementation: str) -> tuple[Tensor, Tensor]:
        """(norm of x + update, x + update) in one pass over memory; without an update, of x."""
        if update is None:
            return self(x, implementation), x
        return add_rms_norm(
            x, update, self.weight, self.eps, out_dtype=_compute_dtype(x), implementation=implementation
        )


class Shared(NamedTuple):
    """What every block of one forward uses: rotary tables, who may see whom, the cache to append to, the kernels."""

    cos: Tensor
    sin: Tensor
    mask: AttentionMask | None
    cache: "KVCache | None"
    kernels: KernelChoice


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.joint_sizes: list[int] | None = None  # set where adapters project together with the norm before

    def projections(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of x, or x cut in three if it is them already (adapters/lora.py)."""
        if self.joint_sizes:
            return x.split(self.joint_sizes, dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, -1, self.head_dim) for part in self.projections(x))  # (B, T, A or K, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, shared.kernels.rms_norm), self.k_norm(k, shared.kernels.rms_norm)
        q, k = rope(q, k, shared.cos, shared.sin, implementation=shared.kernels.rope)
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k, v)  # (B, S, K, D)
        out = attention(q, k, v, mask=shared.mask)  # (B, T, A, D)
        return self.o_proj(out.reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.joint_sizes: list[int] | None = None  # as in Attention

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        gate, up = (x, None) if self.joint_sizes else (self.gate_proj(x), self.up_proj(x))  # (B, T, F), or packed 2F
        return self.down_proj(swiglu(gate, up, implementation=shared.kernels.swiglu))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each sum is taken by the norm that reads it next."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, update: Tensor | None, shared: Shared) -> tuple[Tensor, Tensor]:
        """The residual stream (B, T, H), and what is still to be added to it (None before the first block); the same two."""
        normed, x = self.input_layernorm.add(x, update, shared.kernels.rms_norm)
        update = self.self_attn(normed, shared)
        normed, x = self.post_attention_layernorm.add(x, update, shared.kernels.rms_norm)
        return x, self.mlp(normed, shared)


# ---------------------------------------------------------------------------------------------------------- transformer

_PLAIN = KernelChoice()
_CUT = 3.0  # standard deviations


class Body(nn.Module):
    """All but the head, under the name that Hugging Face's Llama gives it: `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The model. `forward` ends at the final norm; the head is applied by the loss, chunk by chunk, or by `logits`.

    The constructor leaves torch's default weights: call `init_weights`, or `load_pretrained`. To build a large one:
    `with torch.device("meta"): model = Transformer(config)`, then `model.to_empty(device=…)`, then `init_weights`.
    `kernels` says what its operations run on (kernels/choice.py); by default plain PyTorch. It may be set later.
    """

    def __init__(self, config: ModelConfig, kernels: KernelChoice = _PLAIN):
        super().__init__()
        self.config = config
        self.kernels = kernels
        # gives the head's weight where some rows of it alone learn (adapters/token_rows.py)
        self.head_gradient: Callable[[nn.Module], Tensor] | None = None
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, H): what turns a hidden state into logits; the embedding itself when tied."""
        layer = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if self.head_gradient is None or not torch.is_grad_enabled():
            return layer.weight
        return self.head_gradient(layer)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Hidden states (B, T, H) after the final norm, for input_ids (B, T) int64.

        positions (B, T) or (1, T): each token's place in its document; by default counted from the last boundary of
        cu_seqlens, or from the cache's length.
        cu_seqlens (num_docs + 1,) int32: documents packed into the flattened B*T tokens, each row's start included;
        attention does not cross them. max_seqlen bounds their lengths (default T).
        cache: holds the tokens before these ones; it takes in these ones. Not together with cu_seqlens.
        """
        batch, length = input_ids.shape
        x = self.model.embed_tokens(input_ids)  # (B, T, H)
        past = 0 if cache is None else cache.length
        computed_in: dict[str, Any] = {
            "dtype": _compute_dtype(x), "backend": self.kernels.attention, "window": self.config.sliding_window,
        }  # fmt: skip
        if cu_seqlens is None:
            mask = row_mask(length, past + length, x.device, **computed_in)
        else:
            if cache is not None:
                raise ValueError("packed documents (cu_seqlens) cannot go into a cache; pass one of the two")
            mask = document_mask(cu_seqlens, batch, length, max_seqlen=max_seqlen, **computed_in)
            if positions is None:
                positions = document_positions(cu_seqlens, batch, length)
        if positions is None:
            positions = torch.arange(past, past + length, device=x.device)[None]  # (1, T)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        shared = Shared(cos, sin, mask, cache, self.kernels)
        update = None
        for block in self.model.layers:
            x, update = block(x, update, shared)
        if cache is not None:
            cache.length += length
        return self.model.norm.add(x, update, self.kernels.rms_norm)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, V) fp32 logits of hidden states (…, H). For sampling and tests; training uses linear_cross_entropy."""
        return F.linear(hidden, self.head_weight).float()

    @torch.no_grad()
    def init_weights(self, seed: int, zero_residual: bool, num_real_tokens: int | None = None) -> None:
        """Draw every parameter anew; the result depends on (seed, parameter's name, shape) and on nothing else.

        All matrices: normal, std 0.02, cut at 3 std (OLMo 2). Norms: one. Except:
        zero_residual (the Muon recipe; modded-nanogpt, nanochat): o_proj and down_proj are zero, so each block starts
        as the identity, and an untied head has std 0.001. Otherwise (AdamW): o_proj and down_proj have std
        0.02/√(2L) (GPT-2), and an untied head std 1/√H (torchtitan, OLMo).
        num_real_tokens: ids from there on pad the vocabulary; their rows in the embedding and the head are zero.
        """
        residual_std = 0.0 if zero_residual else INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        head_std = 0.001 if zero_residual else self.config.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = INIT_STD
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = residual_std
            elif name == "lm_head.weight":
                std = head_std
            weight = _draw(seed, name, parameter.shape, std)
            if name in ("model.embed_tokens.weight", "lm_head.weight") and num_real_tokens is not None:
                weight[num_real_tokens:] = 0.0
            parameter.copy_(weight)


def _draw(seed: int, name: str, shape: torch.Size, std: float) -> Tensor:
    """A cut normal sample on the CPU from a generator of this tensor's own, so neither order nor device matters."""
    if std == 0.0:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    weight = torch.empty(shape, device="cpu", dtype=torch.float32)
    return nn.init.trunc_normal_(weight, std=std, a=-_CUT * std, b=_CUT * std, generator=generator)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers will give their output."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ------------------------------------------------------------------------------------------------------ key-value cache


class KVCache:
    """Keys and values of the tokens so far, for generation. All rows of the batch have the same length.

        cache = KVCache(model.config, batch_size=1, max_length=512, device=device, dtype=dtype)
        hidden = model(prompt_ids, cache=cache)                    # (B, T, H); a long prompt may come in several pieces
        while cache.length < cache.max_length:
            next_ids = model.logits(hidden[:, -1]).argmax(-1)      # (B,)
            hidden = model(next_ids[:, None], cache=cache)         # (B, 1, H)

    Run it under `torch.inference_mode()`. `dtype` is that of the model's weights, or autocast's. Setting `length` to a
    smaller number forgets the tokens after it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.num_hidden_layers, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, K, D) of new tokens; return all so far (B, S, K, D). `forward` moves `length`."""
        end = self.length + k.shape[1]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens; {end} are needed")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


# -------------------------------------------------------------------------------------------------------------- loading


def load_pretrained(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A Hugging Face folder (config.json and model.safetensors, or its shards with an index) as a Transformer.

    Raises UserError naming the file and the tensor when something is missing, left over, of the wrong shape or broken.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    model.to(dtype).to_empty(device=device)  # cast first: never more than one copy in memory
    parameters = dict(model.named_parameters())
    files = weight_files(folder)
    found = {name for held in files.values() for name in held}
    # tied, an lm_head is the embedding under a second name; transformers before 4.32 saved the rotary frequencies
    found -= {name for name in found if name.endswith("rotary_emb.inv_freq")}
    found -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := parameters.keys() - found:
        raise UserError(f"{folder}: {len(missing)} weights of the model are missing, {min(missing)} first")
    if unexpected := found - parameters.keys():
        raise UserError(f"{folder}: {len(unexpected)} weights do not belong to the model, {min(unexpected)} first")
    for path, held in files.items():
        with open_safetensors(path) as tensors, torch.no_grad():
            for name in found.intersection(held):
                weight, parameter = tensors.get_tensor(name), parameters[name]
                if weight.shape != parameter.shape:
                    shapes = f"{tuple(weight.shape)}, but config.json asks for {tuple(parameter.shape)}"
                    raise UserError(f"{path}: {name} has the shape {shapes}")
                parameter.copy_(weight)
    return model


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Each weight file of the folder and the tensors to take from it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_safetensors(single) as tensors:
            return {single: list(tensors.keys())}
    if not index.is_file():
        raise UserError(f"{folder}: there is no model.safetensors and no model.safetensors.index.json")
    files: dict[Path, list[str]] = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        files.setdefault(inside(folder, file, index.name), []).append(name)
    for path, held in files.items():
        with open_safetensors(path) as tensors:
            absent = set(held) - set(tensors.keys())
        if absent:
            raise UserError(f"{path}: {min(absent)} is missing, though {index.name} places it there")
    return files


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path}: the file is not a whole safetensors file ({error})") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: the file is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: the file does not hold a JSON object")
    return value


# ------------------------------------------------------------------------------------------------------------- counting


class ParameterCount(NamedTuple):
    """embedding: the input table (it is the head too when tied). non_embedding: the rest, with an untied head."""

    total: int
    embedding: int
    non_embedding: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model of this shape, in closed form: nothing is allocated."""
    embedding = config.vocab_size * config.hidden_size
    norms = config.num_hidden_layers * 2 * config.hidden_size + config.hidden_size
    if config.qk_norm:
        norms += config.num_hidden_layers * 2 * config.head_dim
    head = 0 if config.tie_word_embeddings else embedding
    non_embedding = _layer_matrices(config) + norms + head
    return ParameterCount(embedding + non_embedding, embedding, non_embedding)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token, forward and backward: 6 N + 12 L A D T.

    N: the weights in matrix products, that is all matrices of the layers and the head (tied or not), not the embedding
    look-up. Two per weight forward, four backward. 12 L A D T: scores and weighted values over T keys. It is the
    convention of PaLM (Chowdhery et al. 2022, appendix B), nanoGPT and torchtitan: causality, which lets kernels skip
    half of the second term, and document masks are not deducted; recomputed activations are not added. A sliding window
    is: no token is ever compared with more keys than it holds.
    """
    matrices = _layer_matrices(config) + config.vocab_size * config.hidden_size
    attention_width = config.num_attention_heads * config.head_dim
    keys = min(seq_len, config.sliding_window or seq_len)
    return 6.0 * matrices + 12.0 * config.num_hidden_layers * attention_width * keys


def _layer_matrices(config: ModelConfig) -> int:
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    per_layer = config.hidden_size * (2 * query + 2 * key_value + 3 * config.intermediate_size)
    return config.num_hidden_layers * per_layer
