"""What will a run do, before it does it? Parameters, tokens, FLOPs, memory and schedule, worked out in one place.

train.py prints this table before its first step, and `utils.py plan` prints it without training.
"""

from dataclasses import dataclass

from kernels.linear_cross_entropy import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES, MIN_CHUNK_ROWS
from model import ModelConfig, ParameterCount, count_parameters, flops_per_token
from training.config import TrainConfig

GIB = 2**30
VOCAB_MULTIPLE = 128  # rows of the embedding and head: whole tiles for the matrix units
_ADAMW_STATE_BYTES = 8  # two fp32 moments a parameter
_NF4_BYTES = 4.127 / 8  # a weight: 4 bits, and its share of two levels of absmax (kernels/nf4.py)
_MUON_STATE_BYTES = 4  # one fp32 momentum a parameter
_LOSS_CHUNKS = 2  # the logits of a chunk, turned into their gradient in place, and its 16-bit copy or work space


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from its options, its data's size and its number of ranks. Sizes in bytes."""

    parameters: ParameterCount
    world_size: int
    micro_batch_size: int  # sequences a forward pass on one rank
    accumulation_steps: int  # forward passes a step on the rank that has most
    tokens_per_step: int
    total_tokens: int
    epochs: float | None  # None when the data is not known
    flops_per_token: float
    total_flops: float
    memory: dict[str, float]  # part -> bytes on one rank

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    def seconds(self, flops_per_second: float) -> float:
        """Time of the whole run at this many useful FLOP/s on each rank."""
        return self.total_flops / (flops_per_second * self.world_size)


def model_shape(config: TrainConfig, vocab_size: int, max_length: int, eos_token_id: int | None) -> ModelConfig:
    """The model that the options ask for, its vocabulary padded to a multiple of 128."""
    return ModelConfig(
        vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=max_length,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_word_embeddings,
        qk_norm=config.qk_norm,
        eos_token_id=eos_token_id,
        bos_token_id=eos_token_id,  # documents are only parted by it: it stands before a text as well as after
    )


def plan_run(
    config: TrainConfig,
    model: ModelConfig,
    *,
    max_length: int,
    world_size: int,
    half_precision: bool,
    train_windows: int | None,
) -> RunPlan:
    """The plan of a run. A pure function.

    max_length: tokens in a row. half_precision: whether the forward pass computes in 16 bits.
    train_windows: rows in the training data, or None when it is not known.
    """
    rows = -(-config.batch_size // world_size)
    micro_batch_size = min(config.micro_batch_size or rows, rows)
    parameters = count_parameters(model)
    tokens_per_step = config.batch_size * max_length
    total_tokens = tokens_per_step * config.max_steps
    flops = flops_per_token(model, max_length)
    return RunPlan(
        parameters=parameters,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        accumulation_steps=-(-rows // micro_batch_size),
        tokens_per_step=tokens_per_step,
        total_tokens=total_tokens,
        epochs=None if train_windows is None else config.batch_size * config.max_steps / train_windows,
        flops_per_token=flops,
        total_flops=flops * total_tokens,
        memory=_memory(config, model, parameters, micro_batch_size * max_length, half_precision, world_size),
    )


def _memory(
    config: TrainConfig, model: ModelConfig, parameters: ParameterCount, tokens: int, half: bool, world_size: int
) -> dict[str, float]:
    """An estimate by part. Activations: what autograd keeps for a block's backward pass, counted tensor by tensor."""
    width = 2 if half else 4
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    # norm inputs and outputs (2 + 2 widths), attention's output and residual, rotated and plain q and k, v; gate, up,
    # silu(gate), their product
    chunk = max(CUDA_CHUNK_BYTES if half else CPU_CHUNK_BYTES, MIN_CHUNK_ROWS * 4 * model.vocab_size)
    kept = 5 * model.hidden_size + 3 * query + 3 * key_value + 4 * model.intermediate_size
    matrices = parameters.total - parameters.embedding * (1 if model.tie_word_embeddings else 2)
    state = parameters.total * _ADAMW_STATE_BYTES
    if config.lora:
        return _adapter_memory(config, model, parameters, tokens * model.num_hidden_layers * kept * width, width, chunk)
    if config.optimizer == "muon":
        state = matrices * _MUON_STATE_BYTES + (parameters.total - matrices) * _ADAMW_STATE_BYTES
    memory = {
        "weights (fp32)": 4.0 * parameters.total,
        "gradients (fp32)": 4.0 * parameters.total,
        "optimizer state (fp32)": float(state),
        "activations": float(tokens) * model.num_hidden_layers * kept * width,
        "loss (one chunk of logits)": float(min(tokens * model.vocab_size * 4, chunk) * _LOSS_CHUNKS)
        + 4.0 * parameters.embedding,
    }
    if half:
        memory["16-bit copies of the weights"] = 2.0 * parameters.total
    return memory


def _adapter_memory(
    config: TrainConfig, model: ModelConfig, parameters: ParameterCount, activations: int, width: int, chunk: int
) -> dict[str, float]:
    """The parts where adapters learn beside frozen weights, which are in the compute dtype or, in the blocks, NF4."""
    frozen = parameters.total * float(width)
    if config.load_in_4bit:
        head = parameters.embedding * (1 if model.tie_word_embeddings else 2)
        frozen = head * float(width) + (parameters.total - head) * _NF4_BYTES
    adapters = count_adapter_parameters(config, model)
    return {
        "weights (frozen)": frozen,
        "adapters, gradients and optimizer state (fp32)": adapters * (8.0 + _ADAMW_STATE_BYTES),
        "activations": float(activations),
        "loss (one chunk of logits)": float(chunk * _LOSS_CHUNKS),
    }


def count_adapter_parameters(config: TrainConfig, model: ModelConfig) -> int:
    """rank · (inputs + outputs) of every layer that gets an adapter."""
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    hidden, mlp = model.hidden_size, model.intermediate_size
    sizes = {
        "q_proj": hidden + query, "k_proj": hidden + key_value, "v_proj": hidden + key_value, "o_proj": query + hidden,
        "gate_proj": hidden + mlp, "up_proj": hidden + mlp, "down_proj": mlp + hidden,
    }  # fmt: skip
    targets = sizes if config.lora_target_modules == ["all-linear"] else config.lora_target_modules
    return config.lora_r * model.num_hidden_layers * sum(sizes[name] for name in targets if name in sizes)


def format_plan(plan: RunPlan, config: TrainConfig, model: ModelConfig, extra: dict[str, str]) -> str:
    """The table that train.py prints: one `name  value` line each; `extra` adds what only the caller knows."""
    p = plan.parameters
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    memory = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.memory.items())
    schedule = config.schedule
    if schedule == "wsd":
        schedule = f"wsd, linear decay over the last {config.decay_fraction:.0%}"
    warmup = config.resolved_warmup_steps
    rows = {
        "model": f"{model.hidden_size}x{model.num_hidden_layers}, {model.num_attention_heads} heads of {model.head_dim} "
        f"({model.num_key_value_heads} key/value), MLP {model.intermediate_size}, vocabulary {model.vocab_size:,}",
        "parameters": f"{p.total:,} ({p.embedding:,} embedding, {p.non_embedding:,} other)",
        "batch": f"{config.batch_size} sequences = {plan.tokens_per_step:,} tokens a step: {plan.world_size} rank(s) x "
        f"{plan.accumulation_steps} micro-batch(es) of {plan.micro_batch_size}",
        "run": f"{config.max_steps:,} steps = {plan.total_tokens:,} tokens{epochs}",
        "compute": f"{plan.flops_per_token:,.0f} FLOPs a token, {plan.total_flops:.3g} in all",
        "memory estimate": f"{plan.memory_total / GIB:.2f} GiB a rank ({memory})",
        "optimizer": f"{config.optimizer}, peak learning rate {config.learning_rate:g}, {warmup:,} steps of warm-up, {schedule}",
        **extra,
    }
    if warmup >= config.max_steps:
        peak = config.learning_rate * config.max_steps / warmup
        rows["warning"] = f"the run ends within its warm-up, at a learning rate of {peak:.2g}; lower --warmup_steps"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
