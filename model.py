"""What is trained? One transformer, whole, in the order in which a token meets it.

    Transformer: embedding → blocks (layers.py) → head → initialisation → key-value cache → loading → counting

By default it is Llama (Touvron et al. 2023; Grattafiori et al. 2024): RoPE, RMSNorm before each sub-layer, SwiGLU, grouped
queries, no biases. The fields of model_config.py make other models of it; families/ says how each one's folder is
written. Module names and the RoPE layout are those of Hugging Face's Llama, and a checkpoint is a Hugging Face folder.

Letters in shape comments: B rows, T tokens of a row, H hidden size, V vocabulary, L layers.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from context import Context, RowShare
from errors import UserError
from experts import Routing
from families.common import INIT_STD
from families.weights import canonical_name, stored_views
from kernels.attention_masks import (
    AttentionMask,
    document_ids,
    document_mask,
    document_positions,
    row_mask,
    share_mask,
)
from kernels.choice import KernelChoice
from kernels.linear import linear
from kernels.linear_cross_entropy import LossSums, TokenStatistics, linear_cross_entropy, token_statistics
from kernels.rotary import BY_LENGTH, rotary_tables
from kernels.split_vocabulary import SplitStatistics, split_token_statistics
from layers import Block, Embedding, PredictionHead, Shared, compute_dtype, norm_of
from model_config import FULL, SLIDING, ModelConfig
from paths import inside
from sharding import fill
from tensor_parallel import TensorGroup, own

# ---------------------------------------------------------------------------------------------------------- transformer

_PLAIN = KernelChoice()
_CUT = 3.0  # standard deviations
_BIAS_COLUMNS = 8  # of which one is the bias: rows stay aligned for the matrix product
_NO_TARGET = -100  # what linear_cross_entropy leaves out


class Body(nn.Module):
    """All but the head, under the name that Hugging Face's Llama gives it: `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings + config.position_offset, size)
        if config.type_vocab_size:
            self.embed_types = nn.Embedding(config.type_vocab_size, size)
        if config.embedding_norm:
            self.embed_norm = norm_of(config, size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        if config.final_norm:
            self.norm = norm_of(config, size)
        if config.pooler:
            self.pooler = nn.Linear(size, size)


class Transformer(nn.Module):
    """The model. `forward` ends at the final norm; the head is applied by the loss, chunk by chunk, or by `logits`.

    The constructor leaves torch's default weights: call `init_weights`, or `load_pretrained`. To build a large one:
    `with torch.device("meta"): model = Transformer(config)`, then `model.to_empty(device=…)`, then `init_weights`.
    `kernels` says what its operations run on (kernels/choice.py); by default plain PyTorch. It may be set later, as may
    `dropout`: the probability in training mode, after the embedding and after each sub-layer (not of attention's
    probabilities), decided by `token_keys` (B, T), which adapters.lora.set_token_keys sets. With a `context` several ranks
    share rows (context.py): each gives `forward`, and the loss, all of them, and gets the same result. group: of ranks that
    share the matrices, each with its part (tensor_parallel.py).
    """

    def __init__(self, config: ModelConfig, kernels: KernelChoice = _PLAIN):
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.dropout = 0.0
        self.token_keys: Tensor | None = None
        self.context: Context | None = None
        self.group: TensorGroup | None = None
        # gives the head's weight where some rows of it alone learn (adapters/token_rows.py)
        self.head_gradient: Callable[[nn.Module], Tensor] | None = None
        self.model = Body(config)
        if config.head == "mlm":
            self.head = PredictionHead(config)
        if config.next_sentence:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)
        if config.head != "none" and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, H): what turns a hidden state into logits; the embedding itself when tied. Of a `group` this rank's rows."""
        layer = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if self.group is not None:
            return own(layer.weight)
        if self.head_gradient is None or not torch.is_grad_enabled():
            return layer.weight
        return self.head_gradient(layer)

    @property
    def softcap(self) -> float:
        """Of the logits; 0 where they have none."""
        return self.config.final_logit_softcapping or 0.0

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: "KVCache | None" = None,
        token_types: Tensor | None = None,
        with_routing: bool = False,
    ) -> Any:
        """Hidden states (B, T, H) after the final norm, for input_ids (B, T) int64.

        positions (B, T) or (1, T): each token's place in its document; by default counted from the last boundary of
        cu_seqlens, or from the cache's length.
        cu_seqlens (num_docs + 1,) int32: documents packed into the flattened B*T tokens, each row's start included;
        attention does not cross them. max_seqlen bounds their lengths (default T).
        cache: holds the tokens before these ones; it takes in these ones. Not together with cu_seqlens.
        token_types (B, T) int64: of models that tell segments apart; 0 by default.
        with_routing: the result is (hidden states, what each layer's router did: a list of experts.Routing).
        """
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.length
        if cu_seqlens is not None and cache is not None:
            raise ValueError("packed documents (cu_seqlens) cannot go into a cache; pass one of the two")
        if positions is None and cu_seqlens is not None:
            positions = document_positions(cu_seqlens, batch, length)
        elif positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)[None]  # (1, T)
        share = None
        if self.context is not None and cache is None:
            share = self.context.share(length, input_ids.device)  # T is now this rank's share of the tokens
            input_ids, positions = share.take(input_ids), share.take(positions)
            token_types = None if token_types is None else share.take(token_types)
        x = self.embedded(input_ids, positions, token_types)  # (B, T, H)
        shared = Shared(
            self._rotary(positions, past + length, cu_seqlens, share),
            self._masks(x, past, length, cu_seqlens, max_seqlen, share),
            cache, self.kernels, self.dropout if self.training else 0.0, self.token_keys, with_routing, share,
        )  # fmt: skip
        x, update = shared.dropped(x, 2 * self.config.num_hidden_layers), None
        routing: list[Routing] = []
        for block in self.model.layers:
            x, update, routed = block(x, update, shared)
            routing += [] if routed is None else [routed]
        if cache is not None:
            cache.length += length
        if self.config.final_norm:
            x, update = self.model.norm.add(x, update, self.kernels.rms_norm)[0], None
        hidden = x if update is None else x + update
        if share is not None:
            assert self.context is not None
            hidden = share.gather(hidden)  # of all tokens again
            routing = [Routing(*(self.context.sum(part) for part in layer)) for layer in routing]
        return (hidden, routing) if with_routing else hidden

    def embedded(self, input_ids: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """(B, T, H): what the first block reads."""
        config, body = self.config, self.model
        x = body.embed_tokens(input_ids)
        if config.scale_embedding:  # rounded to the weights' dtype, as Gemma's reference does
            x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        if config.embedding_multiplier != 1.0:
            x = x * config.embedding_multiplier
        if config.type_vocab_size:
            x = x + body.embed_types(torch.zeros_like(input_ids) if token_types is None else token_types)
        if config.position_embedding == "learned":
            x = x + body.embed_positions(positions + config.position_offset)
        return body.embed_norm.in_its_dtype(x) if config.embedding_norm else x

    def _rotary(
        self, positions: Tensor, length: int, cu_seqlens: Tensor | None, share: RowShare | None
    ) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
        """cos and sin of each kind of layer, each (B or 1, T, D/2) fp32, in rows of `length` tokens."""
        config = self.config
        if config.position_embedding != "rotary":
            return {}
        lengths = None
        if config.rope_scaling is not None and config.rope_scaling["rope_type"] in BY_LENGTH:
            lengths = torch.full_like(positions, length)
            if cu_seqlens is not None:
                lengths = cu_seqlens.diff()[document_ids(cu_seqlens, len(positions), length)]
                lengths = lengths if share is None else share.take(lengths)
        tables = {}
        for kind in config.layer_kinds():
            theta, scaling = config.rope_theta, config.rope_scaling
            if kind == SLIDING and config.local_rope_theta is not None:
                theta, scaling = config.local_rope_theta, None
            tables[kind] = rotary_tables(positions, config.rotary_width, theta, scaling, lengths)
        return tables

    def _masks(
        self,
        x: Tensor,
        past: int,
        length: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        share: RowShare | None,
    ) -> dict[str, AttentionMask | None]:
        """Who may see whom in each kind of layer, for the embedded tokens (B, T, H) after `past` ones in a cache, or for a share
        of rows of `length` tokens."""
        batch = len(x)
        masks: dict[str, AttentionMask | None] = {}
        for kind in self.config.layer_kinds():
            settings: dict[str, Any] = {
                "dtype": compute_dtype(x), "backend": self.kernels.attention, "causal": self.config.causal,
                "window": self.config.sliding_window if kind == SLIDING else None,
                "softcap": self.config.attn_logit_softcapping is not None,
            }  # fmt: skip
            if share is not None:
                masks[kind] = share_mask(share.places, cu_seqlens, batch, length, **settings)
            elif cu_seqlens is None:
                masks[kind] = row_mask(length, past + length, x.device, **settings)
            else:
                masks[kind] = document_mask(cu_seqlens, batch, length, max_seqlen=max_seqlen, **settings)
        return masks

    def pooled(self, first: Tensor) -> Tensor:
        """(N, H): what stands for whole texts, of the hidden states (N, H) of their first tokens."""
        return torch.tanh(self.model.pooler(first))

    def next_sentence_logits(self, first: Tensor) -> Tensor:
        """(N, 2) fp32, of the first tokens' hidden states (N, H): the second segment follows the first; it does not."""
        return self.seq_relationship(self.pooled(first)).float()

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(x, w) of which x wᵀ are the logits before their softcap, for hidden states (…, H).

        A masked language model's bias is one more column of w, beside a one in x.
        """
        if self.config.head != "mlm":
            x = hidden if self.config.logits_scaling == 1.0 else hidden / self.config.logits_scaling
            return x, self.head_weight
        x = self.head(hidden, self.kernels.rms_norm)
        if self.head.bias is None:
            return x, self.head_weight
        ones = torch.zeros(*x.shape[:-1], _BIAS_COLUMNS, dtype=x.dtype, device=x.device)
        ones[..., 0] = 1.0
        return torch.cat([x, ones], dim=-1), torch.cat(
            [self.head_weight, F.pad(own(self.head.bias)[:, None], (0, _BIAS_COLUMNS - 1))], dim=1
        )

    def cross_entropy(self, hidden: Tensor, targets: Tensor, z_loss: float = 0.0) -> LossSums:
        """`linear_cross_entropy` of the logits of hidden states (N, H), for targets (N,) int64."""
        hidden, targets, _ = self._shared_out(hidden, targets)
        if self.group is None:
            sums = linear_cross_entropy(
                *self.head_inputs(hidden), targets,
                softcap=self.softcap, z_loss=z_loss, implementation=self.kernels.linear_cross_entropy,
            )  # fmt: skip
        else:
            split = self._split_statistics(hidden, targets, self.group)
            cross_entropy = -split.logprobs.sum()
            sums = LossSums(cross_entropy + z_loss * split.lse.square().sum(), cross_entropy.detach())
        return sums if self.context is None else LossSums(*(self.context.sum(one) for one in sums))

    def token_statistics(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None
    ) -> TokenStatistics:
        """`token_statistics` of the logits of hidden states (N, H), or of the first vocab_size of them, for targets (N,)."""
        hidden, targets, share = self._shared_out(hidden, targets)
        if self.group is None:
            states, weight = self.head_inputs(hidden)
            found = token_statistics(
                states, weight[:vocab_size], targets,
                temperature=temperature, softcap=self.softcap, implementation=self.kernels.linear_cross_entropy,
            )  # fmt: skip
        else:
            split = self._split_statistics(hidden, targets, self.group, temperature=temperature, vocab_size=vocab_size)
            found = TokenStatistics(split.logprobs, split.entropy, split.top1)
        return found if share is None else TokenStatistics(*(share.gather(one[None])[0] for one in found))

    def _shared_out(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, RowShare | None]:
        """Hidden states and targets of the tokens whose logits this rank computes: all, but where ranks share rows."""
        if self.context is None:
            return hidden, targets, None
        share = self.context.share(len(targets), targets.device)
        targets = targets[share.places]
        targets[share.num_real :] = _NO_TARGET
        return hidden[share.places], targets, share

    def _split_statistics(
        self,
        hidden: Tensor,
        targets: Tensor,
        group: TensorGroup,
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> SplitStatistics:
        """What the logits of all ranks say, of whose tokens of the vocabulary this one has some."""
        states, weight = self.head_inputs(hidden)
        first = group.first(self.config.vocab_size)
        weight = weight if vocab_size is None else weight[: max(0, vocab_size - first)]
        return split_token_statistics(
            group.entering(states), weight, targets,
            group=group.group, size=group.size, first=first, temperature=temperature, softcap=self.softcap,
        )  # fmt: skip

    def own_tokens(self, x: Tensor) -> Tensor:
        """Of figures (B, T, …) of tokens those that this rank computes: all, but where ranks share rows."""
        return x if self.context is None else self.context.share(x.shape[1], x.device).take(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, V) fp32 logits of hidden states (…, H). For sampling and tests; training uses linear_cross_entropy."""
        logits = linear(*self.head_inputs(hidden)).float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.no_grad()
    def init_weights(self, seed: int, zero_residual: bool, num_real_tokens: int | None = None) -> None:
        """Draw every parameter anew; the result depends on (seed, parameter's name, shape) and on nothing else.

        All matrices: normal, std 0.02, cut at 3 std (OLMo 2). Norms: one; biases: zero. Except:
        zero_residual (the Muon recipe; modded-nanogpt, nanochat): o_proj and down_proj are zero, so each block starts
        as the identity, and an untied head has std 0.001. Otherwise (AdamW): o_proj and down_proj have std
        0.02/√(2L) (GPT-2), and an untied head std 1/√H (torchtitan, OLMo).
        num_real_tokens: ids from there on pad the vocabulary; their rows in the embedding and the head are zero.
        """
        residual_std = 0.0 if zero_residual else INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        head_std = 0.001 if zero_residual else self.config.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                counts_from_one = self.config.norm == "rms" and self.config.norm_offset
                parameter.fill_(0.0 if name.endswith(".bias") or counts_from_one else 1.0)
                continue
            std = INIT_STD
            if name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down_proj")):
                std = residual_std
            elif name == "lm_head.weight":
                std = head_std
            weight = _draw(seed, name, parameter.shape, std)
            if name in ("model.embed_tokens.weight", "lm_head.weight") and num_real_tokens is not None:
                weight[num_real_tokens:] = 0.0
            fill(parameter, weight)


def _draw(seed: int, name: str, shape: torch.Size, std: float) -> Tensor:
    """A cut normal sample on the CPU from a generator of this tensor's own, so neither order nor device matters."""
    if std == 0.0:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    weight = torch.empty(shape, device="cpu", dtype=torch.float32)
    return nn.init.trunc_normal_(weight, std=std, a=-_CUT * std, b=_CUT * std, generator=generator)


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
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    spread: Callable[[nn.Module], None] | None = None,
) -> Transformer:  # fmt: skip
    """A Hugging Face folder (config.json and model.safetensors, or its shards with an index) as a Transformer.

    spread: leaves this rank a part of the parameters, before there is memory for any.

    Raises UserError naming the file and the tensor when something is missing, left over, of the wrong shape or broken.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    model.to(dtype)
    if spread:
        spread(model)
    model.to_empty(device=device)  # after the cast: never more than one copy in memory
    with torch.no_grad():
        load_weights(folder, model)
    return model


def load_weights(folder: Path, model: Transformer) -> None:
    """Copy a folder's weights into the model's, one after another. UserError as in `load_pretrained`."""
    targets: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        targets |= stored_views(model.config.family, name, parameter)
    holders = stored_names(folder, model.config)
    if missing := targets.keys() - holders.keys():
        raise UserError(f"{folder}: {len(missing)} weights of the model are missing, {min(missing)} first")
    if unexpected := holders.keys() - targets.keys():
        raise UserError(f"{folder}: {len(unexpected)} weights do not belong to the model, {min(unexpected)} first")
    for path in dict.fromkeys(path for path, _ in holders.values()):
        with open_safetensors(path) as tensors:
            for name, (holder, found_as) in holders.items():
                if holder != path:
                    continue
                weight, target = tensors.get_tensor(found_as), targets[name]
                if weight.shape != target.shape:
                    shapes = f"{tuple(weight.shape)}, but config.json asks for {tuple(target.shape)}"
                    raise UserError(f"{path}: {found_as} has the shape {shapes}")
                fill(target, weight)


def stored_names(folder: Path, config: ModelConfig) -> dict[str, tuple[Path, str]]:
    """The tensors of a folder by the family's own name for each: (the file that holds it, its name there).

    Left out are buffers that old versions stored, a tied head, which is the embedding under a second name, and heads that
    the class which config.json names has not: BERT's own folders hold a pooler that its masked language model ignores.
    """
    found: dict[str, tuple[Path, str]] = {}
    for path, held in weight_files(folder).items():
        for name in held:
            canonical = canonical_name(config.family, name)
            if canonical is not None:
                found[canonical] = path, name
    left_out = ["lm_head.weight"] if config.tie_word_embeddings or config.head == "none" else []
    left_out += [] if config.pooler else ["model.pooler.weight", "model.pooler.bias"]
    left_out += [] if config.next_sentence else ["seq_relationship.weight", "seq_relationship.bias"]
    for name in left_out:
        for stored in stored_views(config.family, name, torch.empty(0, 0)):
            found.pop(stored, None)
    return found


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Each weight file of the folder and the tensors to take from it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_safetensors(single) as tensors:
            return {single: list(tensors.keys())}
    if not index.is_file():
        raise UserError(_without_safetensors(folder))
    files: dict[Path, list[str]] = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        files.setdefault(inside(folder, file, index.name), []).append(name)
    for path, held in files.items():
        with open_safetensors(path) as tensors:
            absent = set(held) - set(tensors.keys())
        if absent:
            raise UserError(f"{path}: {min(absent)} is missing, though {index.name} places it there")
    return files


def _without_safetensors(folder: Path) -> str:
    """The sentence for a folder without weights, with what a pickle's owner can run; loading one runs what is in it."""
    if not any(folder.glob("pytorch_model*.bin")):
        return f"{folder}: there is no model.safetensors and no model.safetensors.index.json"
    pickles, output = f"{folder}/pytorch_model*.bin", f"{folder}/model.safetensors"
    return (
        f"{folder} has its weights as a pickle, pytorch_model.bin, which is never loaded here; write them anew with: "
        'python -c "import glob, torch; from safetensors.torch import save_file; save_file({n: t.clone().contiguous() '
        f"for f in glob.glob({pickles!r}) for n, t in torch.load(f, map_location='cpu', weights_only=True).items()}}, "
        f"{output!r}, {{'format': 'pt'}})\""
    )


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
    """embedding: the input tables (that of tokens is the head too when tied). non_embedding: the rest, with an untied head.
    active: of total those that a token meets, which of a mixture's experts are a few.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model of this shape; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embedding = sum(table.weight.numel() for table in tables)
    stacks = [parameter for parameter in model.parameters() if parameter.dim() == 3]  # of experts
    idle = sum(stack[0].numel() * (len(stack) - (config.experts_per_token or 0)) for stack in stacks)
    return ParameterCount(total, embedding, total - embedding, total - idle)


def flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """Floating-point operations to train on one token, forward and backward: 6 N + 12 L A D T.

    N: the weights in matrix products that a token meets, that is all matrices of the layers, of experts those that work
    on it, and the head (tied or not), not the embedding look-up. Two per weight forward, four backward. 12 L A D T:
    scores and weighted values over T keys. It is the convention of PaLM (Chowdhery et al. 2022, appendix B), nanoGPT and
    torchtitan: causality, which lets kernels skip half of the second term, and document masks are not deducted;
    recomputed activations are not added. A sliding window is: no token is ever compared with more keys than it holds.
    """
    with torch.device("meta"):
        model = Transformer(config)
    matrices = config.vocab_size * config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:  # experts
            matrices += parameter[0].numel() * (config.experts_per_token or 0)
        elif parameter.dim() == 2 and name.startswith(("model.layers.", "head.")):
            matrices += parameter.numel()
    keys = 0.0
    for layer in range(config.num_hidden_layers):
        window = seq_len if config.layer_kind(layer) == FULL else config.sliding_window or seq_len
        keys += min(seq_len, window if config.causal else 2 * window - 1)  # which holds the token itself once
    return 6.0 * matrices + 12.0 * config.num_attention_heads * config.head_dim * keys
