"""What will a run do, before it does it? Parameters, tokens, FLOPs, memory and schedule, worked out in one place.

train.py prints this table before its first step, and `utils.py plan` prints it without training.

The memory is an estimate of what the run allocates on one rank at its worst moment, part by part. It leaves out the
context and the work space of the libraries (half a GB on CUDA), what a reference forward pass without gradients has in
flight, DDP's buckets, fragmentation, compilation, evaluation, and the data, which lies in the host's memory.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from adapters.lora import ALL_LINEAR, block_linears
from adapters.token_rows import padded
from dataprep.tokenizers import Tokenizer
from errors import UserError
from families.new_models import MIXTURES, parts_of_new
from families.task_names import TASKS
from kernels.linear_cross_entropy import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES, MIN_CHUNK_ROWS
from kernels.recompute import share_kept
from model import ParameterCount, Transformer, count_parameters, flops_per_token
from model_config import ModelConfig
from training.config import TrainConfig
from training.deepspeed_json import read_settings, stage_of
from training.optimizers import HIDDEN, OTHER, parameter_roles, state_bytes

GIB = 2**30
_NF4_BYTES = 4.127 / 8  # a weight: 4 bits, and its share of two levels of absmax (kernels/nf4.py)
_LOSS_CHUNKS = 2  # the logits of a chunk, turned into their gradient in place, and its 16-bit copy or work space
_COPIES = "16-bit copies of the weights"
_DRAWING_BYTES = 24  # a logit while a token is drawn: fp32 and its log-softmax, their fp64 exponentials and sums
_DRAWING = "drawing answers (keys, values, logits)"
_LASTING = ("weights", "adapters", "optimizer", "reference", "reward model")  # how what is always there begins
_MEASURED_EXAMPLES = 2000
_NOUNS = {
    "pretrain": "sequences", "mlm": "sequences", "sft": "examples", "reward": "pairs", "dpo": "pairs", "ppo": "prompts",
    "classify": "texts", "tag": "sentences", "answer": "windows",
}  # fmt: skip
_SCORERS = ("reward", *TASKS)  # a few rows in place of the head, counted as one


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from its options, its data's size and its number of ranks. Sizes in bytes."""

    parameters: ParameterCount
    world_size: int
    micro_batch_size: int  # sequences a forward pass on one rank
    accumulation_steps: int  # forward passes a step on the rank that has most; of examples, which are packed, about
    tokens_per_step: int
    total_tokens: int
    epochs: float | None  # None when the data is not known
    flops_per_token: float
    total_flops: float
    memory: dict[str, float]  # part -> bytes on one rank
    tokens_are: str = ""  # "at most" or "about", where the examples' lengths are not known or differ

    @property
    def memory_total(self) -> float:
        """Answers are drawn when there are no activations and gradients, so of both only the larger counts."""
        drawing = self.memory.get(_DRAWING, 0.0)
        learning = sum(size for part, size in self.memory.items() if not part.startswith((*_LASTING, _DRAWING)))
        return sum(self.memory.values()) - min(drawing, learning)

    def seconds(self, flops_per_second: float) -> float:
        """Time of the whole run at this many useful FLOP/s on each rank."""
        return self.total_flops / (flops_per_second * self.world_size)


def shape_of(
    config: TrainConfig, base: ModelConfig | None, tokenizer: Tokenizer, max_length: int, num_new_tokens: int = 0
) -> ModelConfig:
    """A run's model: the base's shape, which longer rows and new tokens make larger, or that of the options."""
    if base:
        return grown(base, max_length, tokenizer.vocab_size if num_new_tokens else 0)
    ends = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.begin_id
    return model_shape(config, tokenizer.vocab_size, max_length, *ends)


def model_shape(
    config: TrainConfig, vocab_size: int, max_length: int, eos_token_id: int | None, pad_token_id: int | None = None,
    begin_id: int | None = None,
) -> ModelConfig:  # fmt: skip
    """The model that the options ask for, its vocabulary padded to a multiple of 128.

    begin_id: [CLS], where documents begin with it.
    """
    tied, theta = config.tie_word_embeddings, config.rope_theta
    given = {"tie_word_embeddings": tied, "rope_theta": theta, "qk_norm": config.qk_norm or None}
    head_dim = config.hidden_size // config.num_heads
    parts = parts_of_new(config.model, config.num_layers, head_dim) if config.model else {}
    if config.next_sentence:
        parts |= {"pooler": True, "next_sentence": True}
    mlp_size = config.mlp_size
    if config.model in MIXTURES:
        parts |= {"num_experts": config.num_experts, "experts_per_token": config.experts_per_token}
        parts |= {"expert_size": config.width_of_experts}
        given["router_aux_loss_coef"] = config.router_aux_loss_coef
        mlp_size = config.width_of_experts if config.model == "mixtral" else mlp_size
    return ModelConfig(
        vocab_size=padded(vocab_size),
        hidden_size=config.hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        # documents are only parted by the end-of-text token, where nothing begins them: it stands before a text as well as after
        bos_token_id=eos_token_id if begin_id is None else begin_id,
        **parts | {name: value for name, value in given.items() if value is not None},
    )


def grown(shape: ModelConfig, max_length: int, vocab_size: int) -> ModelConfig:
    """The shape of a base, with room for rows of `max_length` tokens and for `vocab_size` ids."""
    num_rows = shape.vocab_size if vocab_size <= shape.vocab_size else padded(vocab_size)
    positions = max(shape.max_position_embeddings, max_length)
    if shape.position_embedding == "learned" and positions > shape.max_position_embeddings:
        raise UserError(
            f"rows of {max_length} tokens are longer than the {shape.max_position_embeddings} positions that the base has "
            "learned; lower --max_length"
        )
    if (shape.rope_scaling or {}).get("rope_type") == "dynamic" and positions > shape.max_position_embeddings:
        raise UserError(
            f"rows of {max_length} tokens are longer than the {shape.max_position_embeddings} from which the base stretches its "
            "rotary embeddings (dynamic), and no folder can say both; lower --max_length"
        )
    return replace(shape, max_position_embeddings=positions, vocab_size=num_rows)


def plan_run(
    config: TrainConfig,
    model: ModelConfig,
    *,
    max_length: int,
    world_size: int,
    half_precision: bool,
    train_windows: int | None,
    tokens_per_example: float | None = None,
    longest_prompt: int | None = None,
    judge_over_base: bool = False,
) -> RunPlan:
    """The plan of a run. A pure function.

    max_length: tokens in a row. half_precision: whether the forward pass computes in 16 bits. train_windows: rows, or
    examples, in the training data, or None when it is not known. tokens_per_example: of all sequences of an example, on
    average, answers that are still to be drawn taken to be as long as they may be; None takes rows of max_length.
    longest_prompt: of those that answers are drawn to; None takes what max_length leaves. judge_over_base: whether
    --reward_model is an adapter over the model that is trained, and so costs next to nothing.
    """
    rows = -(-config.batch_size // (world_size // config.ranks_of_a_batch))
    micro_batch_size = min(config.micro_batch_size or rows, rows)
    sequences = sequences_per_example(config)
    tokens = tokens_per_example or float(sequences * max_length)
    tokens_per_step = round(config.batch_size * tokens)
    # of a pair both answers are in one micro-batch; answers that were drawn are packed one by one
    packed_rows = micro_batch_size * (2 if sequences == 2 and config.stage in ("reward", "dpo") else 1)
    at_once = min(packed_rows * max_length, rows * tokens)
    flops = learning_flops(config, model, min(max_length, tokens / sequences))
    drawn = -(-config.batch_size // world_size) * config.num_minibatches * sequences  # by each rank for itself
    passes = config.resolved_rollout_epochs if config.stage in ("grpo", "ppo") else 1
    return RunPlan(
        parameters=count_parameters(model),
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        accumulation_steps=-(-round(rows * tokens) // (packed_rows * max_length)),
        tokens_per_step=tokens_per_step,
        total_tokens=tokens_per_step * config.max_steps,
        epochs=None if train_windows is None else config.batch_size * config.max_steps / train_windows / passes,
        flops_per_token=flops,
        total_flops=flops * tokens_per_step * config.max_steps,
        memory=_shared_out(config, model, world_size, half_precision, _memory(
            config, model, round(at_once), half_precision,
            drawn_at_once=min(config.rollout_batch_size, drawn),
            drawn_length=(longest_prompt or max(1, max_length - config.max_new_tokens)) + config.max_new_tokens,
            judges=int(config.reward_model is not None and not judge_over_base),
        )),
        tokens_are=_tokens_are(config, tokens_per_example),
    )  # fmt: skip


def _tokens_are(config: TrainConfig, tokens_per_example: float | None) -> str:
    if config.on_text:
        return "at most " if config.next_sentence else ""
    return "at most " if tokens_per_example is None else "about "


def sequences_per_example(config: TrainConfig) -> int:
    """How many sequences are learned from for each of the --batch_size examples of a step."""
    if config.stage == "grpo":
        return config.group_size
    return 2 if config.stage == "reward" or (config.stage == "dpo" and config.dpo_loss != "kto") else 1


def example_sizes(config: TrainConfig, train: Any) -> dict[str, Any]:
    """What plan_run wants to know of the examples, from a stage's data to learn from; {} of text.

    At most 2,000 of them, spread over all, are looked at. Of KTO's groups only the answer itself is learned from.
    """
    if config.on_text:
        return {}
    groups = getattr(train, "groups", train)
    step = -(-len(groups) // _MEASURED_EXAMPLES)
    some = [groups[number] for number in range(0, len(groups), step)]
    if config.stage in ("grpo", "ppo"):
        prompts = [len(prompt.tokens) for prompt in some]
        answered = sum(prompts) / len(prompts) + config.max_new_tokens
        return {"tokens_per_example": answered * sequences_per_example(config), "longest_prompt": max(prompts)}
    learned = [sum(len(one.tokens) for one in group[: sequences_per_example(config)]) for group in some]
    return {"tokens_per_example": sum(learned) / len(learned)}


def learning_flops(config: TrainConfig, model: ModelConfig, length: float) -> float:
    """Useful floating-point operations to learn from one token of a sequence of `length`, forward and backward.

        6 W + 12 L A D T             all of W learns (PaLM, Chowdhery et al. 2022, appendix B); of sliding windows no more than
                                     they hold (model.flops_per_token)
        4 W + 6 P + 12 L A D T       W is frozen: its own gradient, 2 a weight, is never computed, and adapters of P weights
                                     learn beside it (Hu et al. 2021)

    W: the matrices of the layers, and the head but in a reward model, which has one row instead; of a masked language model's
    head the share that is masked, --mask_probability, of which special tokens take a little. PPO's critic is learned in
    the same step, so a second model without a head is added. Nothing else is: not drawing and judging answers, not the
    forward passes for the log-probabilities of a reference, of the policy that drew, and of KTO's KL, not decoding NF4.
    That the first layer's q, k and v need no gradient of their input, where the embedding is frozen, is not deducted.
    """
    head = _head_parameters(model) + (model.hidden_size**2 if model.head == "mlm" else 0)

    no_keys = flops_per_token(model, 0)
    attention = flops_per_token(model, length) - no_keys

    def of_model(matrices: float) -> float:
        if config.lora:
            return 4.0 * matrices + 6.0 * count_adapter_parameters(config, model) + attention
        return 6.0 * matrices + attention

    layers = no_keys / 6.0 - head
    if config.stage in _SCORERS:
        return of_model(layers)
    if config.stage == "mlm":
        return of_model(layers + mask_probability(config, model.family) * head)
    return of_model(layers + head) + (of_model(layers) if config.stage == "ppo" else 0.0)


def mask_probability(config: TrainConfig, family: str) -> float:
    """Of tokens: BERT's 15% (Devlin et al. 2019), or ModernBERT's 30% (Warner et al. 2024)."""
    return config.mask_probability or (0.3 if family == "modernbert" else 0.15)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory(
    config: TrainConfig, model: ModelConfig, tokens: int, half: bool, *,
    drawn_at_once: int, drawn_length: int, judges: int,
) -> dict[str, float]:  # fmt: skip
    """An estimate by part. tokens: of a micro-batch, which --context_parallel ranks share. drawn_at_once: answers, each of
    drawn_length with its prompt.

    judges: reward models beside what learns.
    """
    width = 2 if half else 4
    whole, scorer = count_parameters(model).total, _scorer_parameters(model)
    learning = scorer if config.stage in _SCORERS else whole
    models = 2 if config.stage == "ppo" else 1  # policy and critic, whose forward passes both precede the backward pass
    if config.lora:
        adapters = models * count_adapter_parameters(config, model)
        memory = {
            "weights (frozen)": _frozen_bytes(config, model, learning, width),
            "adapters, gradients and optimizer state (fp32)": 8.0 * adapters + _state_bytes(config, model),
        }
        averaged = count_adapter_parameters(config, model)
    else:
        learning += scorer if config.stage == "ppo" else 0
        memory = {
            "weights (fp32)": 4.0 * learning,
            "gradients (fp32)": 4.0 * learning,
            _state_name(config): float(_state_bytes(config, model)),
        }
        averaged = scorer if config.stage in _SCORERS else whole
    if config.resolved_ema is not None:
        memory["weights' average (fp32)"] = 4.0 * averaged
    rows, tokens = tokens, -(-tokens // config.context_parallel)
    split = config.tensor_parallel
    memory["activations"] = tokens * _activation_bytes(config, model, models, width)
    if config.context_parallel > 1:
        keys_values = 2 * model.num_key_value_heads * model.head_dim * width / split
        memory["keys and values of whole rows"] = float(models * rows * model.num_hidden_layers * keys_values)
    if config.stage not in _SCORERS:
        chunk = max(CUDA_CHUNK_BYTES if half else CPU_CHUNK_BYTES, MIN_CHUNK_ROWS * 4 * model.vocab_size)
        head_gradient = 0.0 if config.lora else 4.0 * model.vocab_size * model.hidden_size / split
        told = tokens * (mask_probability(config, model.family) if config.stage == "mlm" else 1.0)
        memory["loss (one chunk of logits)"] = (
            min(told * model.vocab_size * 4 / split, chunk) * _LOSS_CHUNKS + head_gradient
        )
    if half and not config.lora:
        memory[_COPIES] = 2.0 * learning
    if not config.lora and (config.stage == "ppo" or (config.stage == "grpo" and config.kl_coefficient)):
        memory["reference (frozen)"] = float(width * whole)
    if config.stage in ("grpo", "ppo"):
        if judges:
            memory["reward model (taken to be as large)"] = float(judges * width * scorer)
        keys_values = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * width
        memory[_DRAWING] = float(drawn_at_once * (drawn_length * keys_values + model.vocab_size * _DRAWING_BYTES))
    return memory


def _shared_out(
    config: TrainConfig, model: ModelConfig, world_size: int, half: bool, memory: dict[str, float]
) -> dict[str, float]:
    """The memory of a rank that holds a part of what learns (--tensor_parallel; --strategy fsdp), and under fsdp gathers the rest
    for the time it computes.

    Gathered are embedding, head and last norm, and two blocks, of which one waits; or, where they are not given up, all of them;
    as many gradients; and, to draw answers, all weights. NF4 layers are whole on every rank. DeepSpeed shares out what its
    stage says, and keeps a part of the weights a second time.
    """
    split = config.tensor_parallel  # norms are whole, which is little
    world_size //= split
    sharded = config.strategy != "ddp" and world_size > 1
    if not sharded and split == 1:
        return memory
    ranks = split * (config.shard_size or world_size if sharded else 1)
    parts = ("gradients", "optimizer state", "adapters") + (() if config.load_in_4bit else ("weights",))
    if config.strategy == "deepspeed" and config.deepspeed:
        memory = memory | {"DeepSpeed's copy of its weights (fp32)": memory.get("weights (fp32)", 0.0) / ranks}
        if (stage := stage_of(read_settings(config.deepspeed))) < 3:
            parts = ("optimizer state", "gradients")[:stage]
            return {name: size / ranks if name.startswith(parts) else size for name, size in memory.items()}
    shared = {name: size / ranks if name.startswith(parts) else size for name, size in memory.items()}
    copies = shared.pop(_COPIES, 0.0) / split
    parameters = count_parameters(model)
    if not sharded:
        drawing = {"gathered weights": 4.0 * parameters.total} if config.stage in ("grpo", "ppo") else {}
        return shared | ({_COPIES: copies} if copies else {}) | drawing
    blocks = max(1, model.num_hidden_layers)
    whole, outside = parameters.total, parameters.embedding
    outside += 0 if model.tie_word_embeddings or model.head == "none" else _head_parameters(model)
    gathered = whole
    if config.reshard_after_forward and config.stage not in ("grpo", "ppo"):
        gathered = outside + min(2, blocks) * (whole - outside) // blocks
    width = 2 if half and config.lora else 4
    share = gathered / whole
    gathered //= split
    return shared | {"gathered weights and gradients": gathered * float(width + 4 * (not config.lora)) + share * copies}


def _activation_bytes(config: TrainConfig, model: ModelConfig, models: int, width: int) -> float:
    """A token, of the blocks: what is kept of all of them, and what of the one whose backward pass it is, is computed again."""
    blocks, whole = models * model.num_hidden_layers, float(_kept_per_token(model, config.tensor_parallel) * width)
    # its input, the residual stream, which autocast leaves in fp32, and what is still to be added to it
    inputs = float(model.hidden_size * (width + (width if config.lora else 4)))
    share = share_kept(config.activation_checkpointing)
    if share is None:
        kept = {
            "none": whole,
            "full": inputs,
            "selective": inputs + float(_products_per_token(model, config.tensor_parallel) * width),
        }
        one = kept[config.activation_checkpointing]
    else:
        one = share * whole + (1 - share) * inputs
    again = whole - one if share is None else (whole - inputs) * (share < 1)
    return blocks * one + again


def _products_per_token(model: ModelConfig, split: int) -> int:
    """Values a token that the products and the attention of a block give, but for the last, which is the next block's input.

    split: --tensor_parallel.
    """
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = (2 * query + 2 * key_value) // split + model.hidden_size
    if model.num_experts is None:
        return kept + (2 if model.gated_mlp else 1) * model.intermediate_size // split
    assert model.experts_per_token is not None and model.expert_size is not None
    return kept + model.experts_per_token * (2 * model.expert_size + model.hidden_size)


def _kept_per_token(model: ModelConfig, split: int = 1) -> int:
    """Values a token that autograd keeps for a block's backward pass, counted tensor by tensor. split: --tensor_parallel."""
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    # norm inputs and outputs (2 + 2 widths), attention's output and residual, rotated and plain q and k, v; gate, up,
    # silu(gate), their product, or up and its activation; of experts, those that work on a token, and its copies for them
    kept = 5 * model.hidden_size + (3 * query + 3 * key_value) // split
    if model.norm_position == "both":
        kept += 2 * model.hidden_size
    if model.num_experts is None:
        return kept + (4 if model.gated_mlp else 2) * model.intermediate_size // split
    assert model.experts_per_token is not None and model.expert_size is not None
    return kept + model.experts_per_token * (4 * model.expert_size + 3 * model.hidden_size)


def _head_parameters(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def _scorer_parameters(model: ModelConfig) -> int:
    """Of a reward model or critic: one row in place of the head."""
    parameters = count_parameters(model)
    return parameters.total - (0 if model.tie_word_embeddings else _head_parameters(model)) + model.hidden_size


def _state_name(config: TrainConfig) -> str:
    if config.optimizer_file is not None:
        return "optimizer state (of --optimizer_file: not known, not counted)"
    return f"optimizer state ({'8-bit' if config.optimizer == 'adamw8bit' else 'fp32'})"


def _state_bytes(config: TrainConfig, model: ModelConfig) -> int:
    """Of the optimizer, counted weight by weight; 0 where it is that of --optimizer_file."""
    if config.optimizer_file is not None:
        return 0
    if config.lora:
        rank, adapted = config.lora_r, _adapted_shapes(config, model)
        matrices = [shape for rows, columns in adapted for shape in ((rank, columns), (rows, rank))]
        one = sum(state_bytes(config.optimizer, HIDDEN, torch.empty(shape, device="meta")) for shape in matrices)
        return one * (2 if config.stage == "ppo" else 1)
    with torch.device("meta"):
        policy = Transformer(model)
    row = torch.empty(1, model.hidden_size, device="meta")
    roles, parameters = parameter_roles(policy), dict(policy.named_parameters())

    def held(without: str = "") -> int:
        return sum(state_bytes(config.optimizer, roles[n], p) for n, p in parameters.items() if n != without)

    scorer = held(without="lm_head.weight") + state_bytes(config.optimizer, OTHER, row)
    if config.stage in _SCORERS:
        return scorer
    return held() + (scorer if config.stage == "ppo" else 0)


def _frozen_bytes(config: TrainConfig, model: ModelConfig, weights: int, width: int) -> float:
    """Beside adapters the weights are in the compute dtype or, in the blocks, NF4."""
    if not config.load_in_4bit:
        return float(width * weights)
    outside = count_parameters(model).embedding
    if not (model.tie_word_embeddings or config.stage in _SCORERS):
        outside += _head_parameters(model)
    return outside * float(width) + (weights - outside) * _NF4_BYTES


def count_adapter_parameters(config: TrainConfig, model: ModelConfig) -> int:
    """rank · (inputs + outputs) of every layer that gets an adapter."""
    return sum(config.lora_r * (rows + columns) for rows, columns in _adapted_shapes(config, model))


def _adapted_shapes(config: TrainConfig, model: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every layer that gets an adapter."""
    with torch.device("meta"):
        plain = Transformer(model)
    targets = config.lora_target_modules
    found = []
    for path, stored in block_linears(plain).items():
        if ALL_LINEAR in targets or any(stored.endswith(f".{target}") for target in targets):
            rows, columns = plain.get_parameter(f"{path}.weight").shape
            found.append((rows, columns))
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def format_plan(plan: RunPlan, config: TrainConfig, model: ModelConfig, extra: dict[str, str]) -> str:
    """The table that train.py prints: one `name  value` line each; `extra` adds what only the caller knows."""
    p = plan.parameters
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    memory = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.memory.items())
    schedule = {
        "wsd": f"wsd, linear decay over the last {config.decay_fraction:.0%}",
        "polynomial": f"polynomial, to the power {config.decay_power:g}",
        "restarts": f"cosine with restarts every {config.cycle_steps} steps",
    }.get(config.schedule, config.schedule)
    if config.layer_lr_decay < 1:
        schedule += f", {config.layer_lr_decay:g} of the rate a layer down"
    warmup = config.resolved_warmup_steps
    learned = ""
    if config.lora:
        adapters = "2 adapters of" if config.stage == "ppo" else "adapters of"
        learned = f"; frozen, and {adapters} {count_adapter_parameters(config, model):,} learn"
    active = f"; a token meets {p.active:,}" if model.num_experts else ""
    nouns = _NOUNS.get(config.stage) or f"prompts with {config.group_size} answers"
    if config.stage == "dpo" and config.dpo_loss == "kto":
        nouns = "answers"
    if config.next_sentence:
        nouns = "pairs"
    sharing = config.ranks_of_a_batch
    ranks = (
        f"{plan.world_size} rank(s)" if sharing == 1 else f"{plan.world_size // sharing} group(s) of {sharing} ranks"
    )
    head = ""
    if config.stage == "mlm":
        head = f" (the head's for the {mask_probability(config, model.family):.0%} that are masked)"
    rows = {
        "model": f"{model.hidden_size}x{model.num_hidden_layers}, {model.num_attention_heads} heads of {model.head_dim} "
        f"({model.num_key_value_heads} key/value), {_mlps(model)}, vocabulary {model.vocab_size:,}",
        "parameters": f"{p.total:,} ({p.embedding:,} embedding, {p.non_embedding:,} other){active}{learned}",
        "batch": f"{config.batch_size} {nouns} = {plan.tokens_are}{plan.tokens_per_step:,} tokens a step: "
        f"{ranks} x {plan.tokens_are}{plan.accumulation_steps} micro-batch(es) of {plan.micro_batch_size}",
        "run": f"{config.max_steps:,} steps = {plan.tokens_are}{plan.total_tokens:,} tokens{epochs}",
        "compute": f"{plan.flops_per_token:,.0f} FLOPs a token{head}, {plan.total_flops:.3g} in all",
        "memory estimate": f"{plan.memory_total / GIB:.2f} GiB a rank ({memory})",
        "optimizer": f"{config.optimizer_shown}, peak learning rate {config.learning_rate:g}, "
        f"{warmup:,} steps of warm-up, {schedule}",
        **extra,
    }
    if warmup >= config.max_steps:
        peak = config.learning_rate * config.max_steps / warmup
        rows["warning"] = f"the run ends within its warm-up, at a learning rate of {peak:.2g}; lower --warmup_steps"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _mlps(model: ModelConfig) -> str:
    mixtures = sum(map(model.has_experts, range(model.num_hidden_layers)))
    experts = f"{model.num_experts} experts of {model.expert_size}, {model.experts_per_token} a token"
    if 0 < mixtures < model.num_hidden_layers:
        return f"{experts}, in {mixtures} layers, MLP {model.intermediate_size} in the others"
    return experts if mixtures else f"MLP {model.intermediate_size}"
