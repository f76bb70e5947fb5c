"""What was started? The description of a run that run.json and its checkpoints keep."""

import dataclasses
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from families.task_names import TASKS
from kernels.choice import KernelChoice
from ranks import Ranks
from training.config import TrainConfig
from training.plan import RunPlan
from training.precision import Precision


def describe_run(
    config: TrainConfig,
    origins: dict,
    plan: RunPlan,
    ranks: Ranks,
    precision: Precision,
    data_order: dict,
    kernels: KernelChoice,
    attention: str,
) -> dict:
    """The content of run.json."""
    return {
        "name": Path(config.save_dir).resolve().name,
        "argv": sys.argv,
        "config": dataclasses.asdict(config),
        "origins": origins,
        "git_commit": git_commit(),
        "versions": versions(),
        "device": str(ranks.device),
        "device_name": device_name(ranks.device),
        "device_memory_gb": device_memory_gb(ranks.device),
        "world_size": ranks.world_size,
        "num_params": plan.parameters.total,
        "num_params_non_embedding": plan.parameters.non_embedding,
        "tokens_per_step": plan.tokens_per_step,
        "max_steps": config.max_steps,
        "flops_per_token": plan.flops_per_token,
        "precision": str(precision.dtype).removeprefix("torch."),
        "data_fingerprint": data_order["fingerprints"],
        "kernels": {**dataclasses.asdict(kernels), "attention": attention},
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.time(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def device_memory_gb(device: torch.device) -> float | None:
    """Memory of one GPU; None for a CPU, whose memory belongs to others too."""
    return torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None


def versions() -> dict[str, str]:
    packages = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def git_commit() -> str | None:
    """The commit of this copy of groundup, or None outside a git checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def next_command(config: TrainConfig, finished: bool, in_plan: bool) -> str:
    if finished:
        prompt = config.sample_prompt.strip() or "Hello"
        if config.stage == "pretrain":
            return f"try: python utils.py generate --checkpoint {config.save_dir} --prompt {prompt!r}"
        if config.stage == "mlm":
            if config.lora:
                return "make a model of it and its base with utils.py merge"
            return f"try: python utils.py predict --checkpoint {config.save_dir} --text 'a text with a [MASK]'"
        if config.stage == "reward":
            return f"give it to --stage ppo or grpo as --reward_model {config.save_dir}"
        if config.stage in TASKS:
            return f"try: python utils.py predict --checkpoint {config.save_dir} --input FILE"
        return f"try: python utils.py chat --checkpoint {config.save_dir}"
    if in_plan:
        return "go on with the same command and --checkpoint latest"
    return f"go on with: python train.py --save_dir {config.save_dir} --checkpoint latest"
