"""From what does a run's model start: from nothing, from another model, with adapters, or from its own checkpoint?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.actor_critic import POLICY_ADAPTER, REWARD_ADAPTER, REWARD_HEAD, VALUE_ADAPTER, ActorCritic, new_critic
from adapters.base_models import load_base
from adapters.lora import (
    LoraLinear,
    add_adapters,
    quantise_layers,
    set_aside,
    store_after_steps,
    store_learned,
)
from adapters.peft_files import adapter_state, learned_over, load_adapter, peft_files, read_adapter_config
from adapters.scalar_head import RewardModel
from adapters.task_heads import Task, TaskModel, saved_task
from adapters.token_rows import grow_vocabulary, learn_rows, start_rows
from checkpointing.load import load_model, load_optimizers, resolve_checkpoint
from checkpointing.safetensors_writer import TensorFile
from checkpointing.save_folder import ADAPTER_CONFIG, list_checkpoints
from checkpointing.tensors import model_tensors
from errors import UserError
from families.task_names import TASKS
from kernels.choice import KernelChoice
from model import Transformer, read_json
from model_config import ModelConfig
from ranks import Ranks, unwrap
from training.averages import EMA_FILE, Ema, train_on
from training.config import TrainConfig
from training.deepspeed import start_engine
from training.optimizers import build_optimizers
from training.precision import Precision
from training.update_rules import skip_flag

_DESCRIPTIONS = ("config.json", ADAPTER_CONFIG)  # of a model, of an adapter
CRITIC_FILE = "critic.safetensors"  # of a PPO run: what its checkpoint holds beside the policy


def find_base(init_from: str, flag: str = "--init_from") -> Path:
    """The folder that a flag such as --init_from means: a Hugging Face folder as it is, or a run's newest whole checkpoint.

    Raises UserError where there is none, or where it holds adapters alone.
    """
    path = find_model_or_adapter(init_from, flag)
    if (path / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{flag} {path} holds adapters, not a model: make one of them and their base with utils.py merge"
        )
    return path


def find_model_or_adapter(where: str, flag: str) -> Path:
    """As `find_base`, and an adapter's folder will do."""
    path = Path(where)
    if not path.is_dir():
        raise UserError(f"{flag} {where} is not a folder; name a Hugging Face folder, a run or a checkpoint")
    path = _newest(path)
    if not any((path / name).exists() for name in _DESCRIPTIONS):
        raise UserError(f"{flag} {where} holds neither config.json nor a checkpoint_step_N; name a folder that does")
    return path


def _newest(folder: Path) -> Path:
    """The folder itself, or, of a run, its newest whole checkpoint. Raises UserError where a run has none that is whole."""
    if not any((folder / name).exists() for name in _DESCRIPTIONS) and list_checkpoints(folder):
        return resolve_checkpoint(folder, folder).folder
    return folder


def read_shape(folder: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder. Raises UserError."""
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)  # how the weights are kept is `load_base`'s to know
    return ModelConfig.from_hf(config)


def read_base_shape(config: TrainConfig, base: Path) -> ModelConfig:
    """The shape of the model of --init_from. UserError where the stage cannot learn with its head or its weights."""
    shape = read_shape(base)
    described = read_json(base / "config.json")
    if described.get("quantization_config"):
        _refuse_frozen(config)
    named = f"--init_from {config.init_from} is a {shape.family}"
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if shape.num_experts is None and getattr(config, name) != getattr(TrainConfig, name):
            raise UserError(f"{named} without experts, and --{name} is for mixtures of experts: leave it out")
    if config.stage in TASKS:
        return shape
    task = saved_task(base)
    named_class = (described.get("architectures") or [""])[0]
    if task and not (config.stage == "reward" and task.stage == "classify"):  # a reward model learns on
        raise UserError(
            f"--init_from {config.init_from} is a {named_class}, without the head that "
            f"--stage {config.stage} needs: start from the model that it was made of"
        )
    if config.stage != "mlm":
        if not shape.causal:
            raise UserError(
                f"{named}, an encoder, which sees what comes after a token and writes no text: --stage mlm trains it on, and "
                f"{', '.join(TASKS)} give it a task"
            )
        return shape
    if shape.causal:
        raise UserError(
            f"{named}, which writes text from left to right: --stage mlm takes an encoder, and --stage pretrain this one"
        )
    if shape.head != "mlm":
        raise UserError(f"{named} without a head that tells hidden tokens, which --stage mlm learns with")
    if shape.next_sentence != config.next_sentence:
        words = "with a next-sentence head: add" if shape.next_sentence else "without a next-sentence head: leave out"
        raise UserError(f"{named} {words} --next_sentence")
    return shape


def _refuse_frozen(config: TrainConfig) -> None:
    """UserError for a run in which weights of --init_from would have to learn, or to get a head, that lie there in 4 bits."""
    named = f"--init_from {config.init_from} holds 4-bit weights"
    if config.stage in ("reward", *TASKS):
        raise UserError(
            f"{named}, and --stage {config.stage} puts a head on others: start from the model that it was made of, with "
            "--lora --load_in_4bit to learn beside the same rounded weights"
        )
    if not config.lora:
        raise UserError(f"{named}, which do not learn: add --lora, or start from the model that it was made of")


def build_model(
    config: TrainConfig, shape: ModelConfig, base: Path | None, checkpoint: Path | None, *,
    kernels: KernelChoice, num_real_tokens: int, device: torch.device, precision: Precision, rows: int, num_new_tokens: int = 0,
    task: Task | None = None, shard: Callable[[nn.Module], None] | None = None,
) -> Transformer | ActorCritic:  # fmt: skip
    """The model of a run at its start, or as `checkpoint` holds it. base: the folder of --init_from, or None.

    num_real_tokens: ids of the tokenizer; the last num_new_tokens of them the base did not have, and their rows learn.
    rows: tokens of a micro-batch. Weights that learn are fp32; frozen ones are in the dtype that the run computes in, or
    NF4 with --load_in_4bit. A --reward_model that is an adapter over the same base becomes one more adapter, "reward".
    task: what the head of a model is for that classifies, tags or answers.
    shard: leaves this rank a part of every parameter. A model of which all weights learn is never whole on any rank; one that
    is put together of several parts is, in the host's memory, before it is shared out.
    """
    put_together = config.lora or config.stage in ("reward", "ppo") or task is not None or num_new_tokens > 0
    if shard and (put_together or config.offload == "all"):
        device = torch.device("cpu")
    spread = None if put_together else shard
    if base is None:
        plain = _from_nothing(config, shape, kernels, device, spread, num_real_tokens, drawn=checkpoint is None)
    elif config.stage == "reward" or task is not None:
        plain = _with_head(config, base, task, kernels, device, precision)
    else:
        dtype = precision.dtype if config.lora else torch.float32
        frozen = "nf4" if config.load_in_4bit else None
        plain = load_base(base, dtype=dtype, quantise=frozen, device=device, spread=spread)
        # the run's rows may be longer than those that the base was trained on
        plain.config.max_position_embeddings = shape.max_position_embeddings
        plain.kernels = kernels
        if num_new_tokens:
            if shape.vocab_size > plain.config.vocab_size:
                grow_vocabulary(plain, shape.vocab_size)
            start_rows(plain, num_real_tokens - num_new_tokens, num_new_tokens)
    plain.dropout = config.dropout
    if config.router_aux_loss_coef is not None:
        plain.config.router_aux_loss_coef = config.router_aux_loss_coef
    model: Transformer | ActorCritic = plain
    if config.lora:
        assert base is not None
        model = _with_adapters(config, plain, base, None if shard else rows)
        if num_new_tokens:
            learn_rows(plain, range(num_real_tokens - num_new_tokens, num_real_tokens))
    elif config.stage == "ppo":
        model = ActorCritic(plain, _critic(config, plain, device))
    if checkpoint is not None:
        _load_parts(config, model, checkpoint)
    if shard and put_together:
        shard(model)
    return model


def _from_nothing(
    config: TrainConfig, shape: ModelConfig, kernels: KernelChoice, device: torch.device,
    spread: Callable[[nn.Module], None] | None, num_real_tokens: int, *, drawn: bool,
) -> Transformer:  # fmt: skip
    """A new model; drawn: with weights, which a checkpoint gives otherwise."""
    with torch.device("meta"):  # no memory is touched twice, however large the model
        model = Transformer(shape, kernels)
    if spread:
        spread(model)
    model.to_empty(device=device)
    if drawn:
        zero_residual = config.optimizer == "muon" and not config.optimizer_file
        model.init_weights(config.seed, zero_residual=zero_residual, num_real_tokens=num_real_tokens)
    return model


def _with_head(
    config: TrainConfig,
    base: Path,
    task: Task | None,
    kernels: KernelChoice,
    device: torch.device,
    precision: Precision,
) -> Transformer:
    """The base with the head of a task or, without one, of a reward model."""
    dtype = precision.dtype if config.lora else torch.float32
    model: Transformer
    if task is not None:
        model = TaskModel.from_pretrained(base, task, seed=config.seed, device=device, dtype=dtype, kernels=kernels)
    else:
        model = RewardModel.from_pretrained(base, seed=config.seed, device=device, dtype=dtype, kernels=kernels)
    if config.load_in_4bit:
        quantise_layers(model)
    return model


def _with_adapters(config: TrainConfig, model: Transformer, base: Path, rows: int | None) -> Transformer | ActorCritic:
    """With the adapters that learn and, where --reward_model is one over the same base, the one that judges."""
    judge = reward_adapter(config, base)
    ppo = config.stage == "ppo"
    for name in (POLICY_ADAPTER, VALUE_ADAPTER) if ppo else ("default",):
        if name == VALUE_ADAPTER and judge:
            continue
        add_adapters(
            model, rank=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, rslora=config.rslora,
            dora=config.dora, targets=config.lora_target_modules, seed=config.seed, name=name,
            rows=None if ppo else rows,  # measured ways keep one set of active adapters at hand, and PPO's alternate
        )  # fmt: skip
    head = None
    if judge:
        head = load_adapter(model, judge, REWARD_ADAPTER)
        assert head is not None, "reward_adapter takes folders with a head alone"
        set_aside(model, REWARD_ADAPTER)
        model.register_buffer(REWARD_HEAD, head.to(model.head_weight.device), persistent=False)
        if ppo:  # the critic starts from what knows best what answers are worth
            load_adapter(model, judge, VALUE_ADAPTER)
    return ActorCritic(model, head=head) if ppo else model


def reward_adapter(config: TrainConfig, base: Path | None) -> Path | None:
    """The PEFT folder that --reward_model means, if it is one over `base`. UserError where it does not fit the run."""
    if config.reward_model is None or not config.lora or base is None:
        return None
    path = _newest(Path(config.reward_model))
    if not (path / ADAPTER_CONFIG).exists():
        return None
    described = read_adapter_config(path)
    over = described.get("base_model_name_or_path") or "an unnamed base"
    if "score" not in (described.get("modules_to_save") or ()):
        raise UserError(f"--reward_model {path} holds adapters of a language model; train one with --stage reward")
    if Path(over).resolve() != base.resolve():
        raise UserError(
            f"--reward_model {path} is an adapter over {over}, and this run is over {base}: make a model of it with "
            "utils.py merge, which then judges beside this run's model"
        )
    if (learned := learned_over(path)) and (learned == "nf4") != config.load_in_4bit:
        given = "--load_in_4bit" if learned == "nf4" else "no --load_in_4bit"
        raise UserError(f"--reward_model {path} was trained with {given}; train with the same here, or merge it first")
    return path


def _critic(config: TrainConfig, policy: Transformer, device: torch.device) -> RewardModel:
    """The reward model's copy, which knows best what answers are worth; without one, the policy's."""
    if config.reward_model is None:
        return new_critic(policy)
    folder = find_base(config.reward_model, "--reward_model")
    return RewardModel.from_pretrained(folder, seed=0, device=device, kernels=policy.kernels)


# ------------------------------------------------------------------------------------- what a run's checkpoint consists of


def checkpoint_parts(config: TrainConfig, model: nn.Module, ema: Ema | None = None) -> dict:
    """What `collect` is told of a model that is not simply one set of weights."""
    inner = unwrap(model)
    policy, name = _policy(inner)
    parts: dict = {"part": policy, "beside": {}}
    if config.lora:
        assert config.init_from is not None
        parts["adapter"] = peft_files(policy, name, str(Path(config.init_from).resolve()))
    if policy is not inner:
        parts["beside"][CRITIC_FILE] = TensorFile(_critic_tensors(inner), {"format": "pt"})
    if ema is not None:
        described = {"format": "pt", "steps": str(int(ema.steps.item()))}
        parts["beside"][EMA_FILE] = TensorFile(ema.averages, described)
    return parts


def _policy(inner: nn.Module) -> tuple[Any, str]:
    """What config.json and the weights of a checkpoint are of, and the name of its adapter, where it learns one."""
    return (inner.policy, POLICY_ADAPTER) if isinstance(inner, ActorCritic) else (inner, "default")


def _critic_tensors(model: ActorCritic) -> dict[str, Tensor]:
    if model.critic is not None:
        return {f"critic.{name}": tensor for name, tensor in model.critic.state_dict().items()}
    return {**adapter_state(model.policy, VALUE_ADAPTER), "value_head": model.value_head.detach()}


def _load_parts(config: TrainConfig, model: Transformer | ActorCritic, checkpoint: Path) -> None:
    critic = model if isinstance(model, ActorCritic) else None
    policy = model.policy if isinstance(model, ActorCritic) else model
    if config.lora:
        load_adapter(policy, checkpoint, POLICY_ADAPTER if critic else "default")
    else:
        load_model(checkpoint, policy)
    if critic is None:
        return
    try:
        found = load_file(checkpoint / CRITIC_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint / CRITIC_FILE} cannot be read ({error})") from error
    targets = _critic_tensors(critic)
    if found.keys() != targets.keys():
        raise UserError(
            f"{checkpoint / CRITIC_FILE} is the critic of another kind of run; check --lora and its settings"
        )
    for name, tensor in targets.items():
        tensor.copy_(found[name])
    store_learned(policy)


def make_optimizers(
    config: TrainConfig, model: nn.Module, checkpoint: Path | None, precision: Precision, ranks: Ranks
) -> list[Any]:
    """The optimizers of what learns, with the state that `checkpoint` holds. Where it does so, DeepSpeed shares out `model`."""
    optimizers = build_optimizers(
        model, name=config.optimizer, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        layer_lr_decay=config.layer_lr_decay, file=config.optimizer_file, **config.optimizer_settings,
        eps=1e-5 if config.stage == "ppo" else 1e-8,  # Huang et al. 2024, detail 5
        muon_dtype=torch.bfloat16 if precision.dtype == torch.bfloat16 else torch.float32,
    )  # fmt: skip
    if config.strategy == "deepspeed" and ranks.world_size > 1:
        return [start_engine(config, model, optimizers[0], ranks, precision, checkpoint)]
    if checkpoint is not None:
        load_optimizers(checkpoint, model, optimizers)
        train_on(model, optimizers)
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        store_after_steps(model, optimizers)
    return optimizers


def make_ema(
    config: TrainConfig, model: nn.Module, optimizers: list[torch.optim.Optimizer], checkpoint: Path | None
) -> Ema | None:
    """The average that --ema asks for, as `checkpoint` holds it; it follows each step of the last optimizer."""
    if config.resolved_ema is None:
        return None
    policy, name = _policy(unwrap(model))
    ema = Ema(adapter_state(policy, name) if config.lora else model_tensors(policy), config.resolved_ema)
    if checkpoint is not None:
        try:
            with safe_open(checkpoint / EMA_FILE, framework="pt") as found:
                for stored, average in ema.averages.items():
                    average.copy_(found.get_tensor(stored))
                ema.steps.fill_(int(found.metadata()["steps"]))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{checkpoint / EMA_FILE} cannot be read ({error})") from error
    optimizers[-1].register_step_post_hook(lambda optimizer, *_: ema.update(skip_flag(optimizer)))
    return ema


# ------------------------------------------------------------------------------------------------------- after training


def find_adapter(where: str | Path) -> Path:
    """The PEFT folder that is meant: `where` itself, or the newest whole checkpoint of a run that trained adapters."""
    folder = _newest(Path(where))
    if not (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"--adapter {where} holds no {ADAPTER_CONFIG}; name a folder with an adapter")
    return folder


def base_and_adapter(folder: Path, adapter: Path | None) -> tuple[Path, Path | None]:
    """The folders of a model and of the adapter on it; where `folder` itself holds an adapter, of the base that it names."""
    if adapter is not None or not (folder / ADAPTER_CONFIG).exists():
        return folder, adapter
    base = Path(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if not (base / "config.json").exists():
        raise UserError(f"{folder} holds an adapter, and its base {base} is not here; give the base and --adapter")
    return base, folder


def task_of(base: Path, adapter: Path | None) -> Task | None:
    """What a model with its adapter, or without one, is for; None of one that writes, fills masks or embeds."""
    return (saved_task(adapter) if adapter else None) or saved_task(base)


def check_writes(folder: Path, adapter: Path | None) -> None:
    """UserError for a model that reads alone, before its weights are read. Arguments as in `load_for_use`."""
    base, on_it = base_and_adapter(folder, adapter)
    if task_of(base, on_it) or not read_shape(base).causal:
        raise UserError(f"{on_it or base} reads text and does not write: use python utils.py predict")


def load_for_use(folder: Path, adapter: Path | None, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model of a folder, with an adapter on it; or, where `folder` itself holds an adapter, on the base it names.

    A base is in NF4 where the adapter learned beside that: beside other weights it would compute something else.
    """
    folder, adapter = base_and_adapter(folder, adapter)
    if adapter is None:
        return load_base(folder, dtype=dtype, device=device)
    quantise = "nf4" if learned_over(adapter) == "nf4" else None
    model = load_base(folder, dtype=dtype, quantise=quantise, device=device)
    load_adapter(model, adapter)
    return model
