"""What does a run compute in and on: the precision, the kernels, and attention's back end among them?"""

import torch

from kernels.attention_backends import activate, choose_attention
from kernels.choice import KernelChoice, choose_kernels, describe_kernels
from model_config import ModelConfig
from ranks import Ranks
from training.config import TrainConfig
from training.description import device_name
from training.parallel import describe_strategy
from training.precision import Precision, choose_precision


def choose_numerics(
    config: TrainConfig, base_shape: ModelConfig | None, device: torch.device
) -> tuple[Precision, KernelChoice]:
    """What the run computes in and on: precision, kernels and the attention among them, which is switched on."""
    precision = choose_precision(config.mixed_precision, device)
    head_dim = base_shape.head_dim if base_shape else config.hidden_size // config.num_heads
    softcap = base_shape is not None and base_shape.attn_logit_softcapping is not None
    attention = choose_attention(config.attention, device, precision.dtype, head_dim=head_dim, softcap=softcap)
    activate(attention)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays fp32 under autocast may use TF32
    return precision, choose_kernels(config.kernels, device, config.compile_model, attention)


def machine_lines(
    config: TrainConfig, precision: Precision, kernels: KernelChoice, attention: str, ranks: Ranks, peak: float | None
) -> dict[str, str]:
    """The lines of the plan that say what the run computes in and on, and why."""
    return {
        "precision": precision.reason,
        "kernels": describe_kernels(kernels, ranks.device, config.compile_model),
        "attention": _of_shared_rows(kernels.attention) if config.context_parallel > 1 else attention,
        "device": f"{device_name(ranks.device)} x {ranks.world_size}",
        **({"strategy": describe_strategy(config, ranks)} if ranks.world_size > 1 or config.strategy != "ddp" else {}),
        "peak TFLOP/s": f"{peak:g}" if peak else "unknown device, so mfu is n/a; pass --peak_tflops",
    }


def _of_shared_rows(backend: str) -> str:
    if backend == "flex":
        return f"FlexAttention of torch {torch.__version__}, a rank's tokens by those of the whole row"
    return (
        "SDPA under a mask of a rank's tokens by those of the whole row, or plain PyTorch where scores have a softcap"
    )
