"""What does one whole training step cost: forward, loss, backward, clipping, optimizer?

    python bench/step.py                            pretraining at 124M and 1B, LoRA and QLoRA at 8B (tiny on a CPU)
    python bench/step.py --task qlora --layers 8    8B cut to 8 layers, and its 32 estimated from 8 and 4

Every way takes the step of train.py's own loop (train.Run) on the same random tokens from the same random weights, in a
process of its own, so that each peak of memory is that way's alone. Pretraining: fp32 weights under bf16 autocast,
AdamW. Fine-tuning: frozen bf16 weights (NF4 for qlora), adapters of rank 16 on every linear layer of the blocks, half of
the tokens learned. Nobody recomputes activations. Ours: "eager" is PyTorch's kernels alone, "compile" torch.compile of
that, "ours" Triton's kernels without it, "ours + compile" what train.py chooses with --compile_model, also in fp8 where
the GPU has it; LoRA takes the path that was measured as the fastest (kernels/lora_measured.json), or, whatever was measured,
the augmented one, joint with the norms. Beside them transformers' LlamaForCausalLM, with Liger-Kernel, peft, bitsandbytes or
Unsloth where they can be imported.

Rows go to bench/results/DEVICE/step.json; `loss` is the one of the third step, which all ways of a task should share. A
later call measures what is missing there, everything with --again.
"""

import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters.lora import LoraLinear, add_adapters, join_projections, store_after_steps  # noqa: E402
from arguments import ArgumentParser  # noqa: E402
from batches.micro_batch import IGNORE_INDEX, MicroBatch  # noqa: E402
from bench import report  # noqa: E402
from bench.measure import device_slug, environment, first_line, read_results, synchronize, write_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from kernels.choice import choose_kernels  # noqa: E402
from kernels.fp8 import why_not_fp8  # noqa: E402
from kernels.jit import why_not_triton  # noqa: E402
from layers import use_fp8  # noqa: E402
from model import Transformer, flops_per_token  # noqa: E402
from model_config import ModelConfig  # noqa: E402
from ranks import Ranks  # noqa: E402
from stages.pretrain import Pretrain  # noqa: E402
from train import Run  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.metrics import Metrics, peak_tflops  # noqa: E402
from training.optimizers import build_optimizers  # noqa: E402
from training.parallel import prepare_model  # noqa: E402
from training.precision import LossScaler, Precision, choose_precision  # noqa: E402

WARM_UP, SECONDS = 3, 3.0  # steps before the clock starts; timed steps go on for about that long
RANK, ALPHA = 16, 32.0
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A model and the tokens of one step."""

    model: ModelConfig
    rows: int
    length: int


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> ModelConfig:
    return ModelConfig(vocabulary, hidden, mlp, layers, heads, kv_heads, max_position_embeddings=8192)


SHAPES = {
    "tiny": Shape(llama(64, 96, 2, 4, 2, 211), 2, 32),
    "124m": Shape(llama(768, 2048, 12, 12, 12, 32000), 32, 1024),
    "1b": Shape(llama(2048, 8192, 16, 32, 8, 128256), 2, 4096),
    "8b": Shape(llama(4096, 14336, 32, 32, 8, 128256), 1, 4096),
}
SIZES = {"pretrain": ("124m", "1b"), "lora": ("8b",), "qlora": ("8b",)}
OWN = ("eager", "compile", "ours", "ours + compile")
AUGMENTED, FP8 = "ours augmented", "ours + compile + fp8"
WAYS = {
    "pretrain": (*OWN, FP8, "transformers", "transformers + liger"),
    "lora": (*OWN, AUGMENTED, "peft", "unsloth"),
    "qlora": (*OWN, "peft + bitsandbytes", "unsloth"),
}


class Skipped(Exception):
    """Why a way cannot run here."""


class OutOfTime(Exception):
    """--minutes are over; what was under way is measured by the next call."""


# ------------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def draw(model: nn.Module, device: torch.device) -> None:
    """The same weights for the same names in every library: normal, std 0.02; norms are one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        parameter.copy_(torch.randn(parameter.shape, device=device, generator=generator).mul_(0.02))


def own_model(task: str, config: ModelConfig, way: str, device: torch.device, tokens: int) -> nn.Module:
    compiled = "compile" in way
    if way == FP8 and (reason := why_not_fp8(device)):
        raise Skipped(reason)
    request = "torch" if way in ("eager", "compile") else "auto" if compiled else "triton"
    if way.startswith("ours") and (reason := why_not_triton(device)):
        raise Skipped(reason)
    with torch.device("meta"):
        model = Transformer(config, choose_kernels([request], device, compiled))
    if task != "pretrain" and device.type == "cuda":
        model.bfloat16()
    model.to_empty(device=device)
    draw(model, device)
    if task != "pretrain":
        rows = tokens if way.startswith("ours") else None
        add_adapters(model, rank=RANK, alpha=ALPHA, quantise="nf4" if task == "qlora" else None, rows=rows)
    if way == FP8:
        use_fp8(model)
    if way == AUGMENTED:
        join_projections(model, model.kernels.lora)
        for block in model.model.layers:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layer = block.get_submodule(name)
                assert isinstance(layer, LoraLinear)
                layer.take_path("augmented")
    return prepare_model(model, Ranks(0, 1, device), compile_model=compiled)


def peer_model(task: str, config: ModelConfig, way: str, device: torch.device) -> nn.Module:
    """transformers' Llama with the same weights, and what `way` adds to it."""
    try:
        import transformers

        if "liger" in way:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        if "bitsandbytes" in way:
            import bitsandbytes  # noqa: F401
        if way == "unsloth":
            return unsloth_model(task, config, device)
        if "peft" in way:
            import peft  # noqa: F401
    except ImportError as error:
        raise Skipped(first_line(error)) from error
    from bench.peers import linear_4bit, with_peft

    settings = transformers.LlamaConfig.from_dict(config.to_hf() | {"use_cache": False})
    settings._attn_implementation = "sdpa"
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if task != "pretrain" and device.type == "cuda" else torch.float32)
    model: Any
    with torch.device(device):
        model = transformers.LlamaForCausalLM(settings)
    torch.set_default_dtype(usual)
    draw(model, device)
    if "bitsandbytes" in way:
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, layer in list(parent.named_children()):
                    if name in LINEAR_LAYERS:
                        setattr(parent, name, linear_4bit(layer.weight))
    if "peft" in way:
        model = with_peft(model, LINEAR_LAYERS, RANK, ALPHA, fp32_adapters=True)
    return model.train()


def unsloth_model(task: str, config: ModelConfig, device: torch.device) -> nn.Module:
    """Unsloth loads from a folder: one with random weights and a tokenizer of as many words."""
    import transformers
    import unsloth
    from tokenizers import Tokenizer, models

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.LlamaConfig.from_dict(config.to_hf(torch.bfloat16))
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = transformers.LlamaForCausalLM(settings)
        torch.set_default_dtype(torch.float32)
        draw(model, device)
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({str(number): number for number in range(config.vocab_size)}, "0"))
        names = {"unk_token": "0", "eos_token": "1", "pad_token": "2"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
        del model
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder, max_seq_length=config.max_position_embeddings, dtype=torch.bfloat16, load_in_4bit=task == "qlora"
        )
    return unsloth.FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=LINEAR_LAYERS, use_gradient_checkpointing=False
    )


class PeerStage:
    """The loss of a transformers model, summed as the loop wants it; the model computes the mean itself."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        # its loss moves the labels by one token
        labels = torch.cat([torch.full_like(batch.targets[:, :1], IGNORE_INDEX), batch.targets[:, :-1]], 1)
        total = model(input_ids=batch.input_ids, labels=labels).loss * batch.weight
        return total, {"loss": (total.detach(), batch.weight)}


# ------------------------------------------------------------------------------------------------------------ one way


def random_batch(shape: Shape, learned_from: int) -> MicroBatch:
    """Rows that are one document each; targets before `learned_from` and the last one are left out."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.model.vocab_size, (shape.rows, shape.length), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = targets[:, :learned_from] = IGNORE_INDEX
    positions = torch.arange(shape.length).expand(shape.rows, -1)
    return MicroBatch(tokens, targets, positions, None, int((targets != IGNORE_INDEX).sum()), tokens.numel())


def measure(task: str, size: str, way: str, layers: int | None) -> dict:
    """The row of one way, in this process."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # as train.py
    shape = SHAPES[size]
    config = ModelConfig(**asdict(shape.model) | {"num_hidden_layers": layers or shape.model.num_hidden_layers})
    own = way in (*OWN, AUGMENTED, FP8)
    try:
        if own:
            model = own_model(task, config, way, device, shape.rows * shape.length)
        else:
            model = peer_model(task, config, way, device)
    except Skipped as reason:
        return {"skipped": str(reason)}
    precision = choose_precision("auto", device)
    ranks = Ranks(0, 1, device)
    stage: Any = PeerStage()
    if own:
        no_data: Any = None
        stage = Pretrain(no_data, no_data, no_data, ranks, precision, shape.rows, shape.rows, 0, z_loss=0.0)
    optimizers = build_optimizers(model, name="adamw", learning_rate=1e-4, weight_decay=0.1)
    store_after_steps(model, optimizers)
    batch = random_batch(shape, 0 if task == "pretrain" else shape.length // 2).to(device)
    options = TrainConfig(batch_size=shape.rows)
    scaler = LossScaler(device, enabled=False)
    run = bare_run(options, ranks, precision, stage, model, optimizers, scaler)
    row = time_steps(lambda: run.optimizer_step([batch], 1.0, False)[0]["loss"], device)
    row["loss"] /= batch.weight
    row["tokens_s"] = shape.rows * shape.length / row["step_ms"] * 1000
    peak = peak_tflops(device, precision.dtype)
    if task == "pretrain":  # with frozen weights a token costs other FLOPs, and the convention has no name for it
        flops = flops_per_token(config, shape.length)
        row["mfu"] = flops * row["tokens_s"] / peak / 1e12 if peak else None
    return row


def bare_run(
    options: TrainConfig, ranks: Ranks, precision: Precision, stage: Any, model: nn.Module,
    optimizers: list[torch.optim.Optimizer], scaler: LossScaler,
) -> Run:  # fmt: skip
    """A run of train.py for `optimizer_step` alone: without data, plan and log."""
    nothing: Any = None
    return Run(options, nothing, None, ranks, precision, nothing, stage, model, optimizers, scaler, nothing)


def time_steps(step: Callable[[], tuple[Tensor, Any]], device: torch.device) -> dict:
    """{step_ms, first_step_s, peak_gib, loss}; the last is the sum that `step` returns in the last step of the warm-up."""
    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start
    for _ in range(WARM_UP - 1):
        start = time.perf_counter()
        loss = step()[0].item()
        once = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = SECONDS if device.type == "cuda" else SECONDS / 30
    steps = min(max(int(seconds / once), 2), 50)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    row = {"step_ms": 1000 * (time.perf_counter() - start) / steps, "first_step_s": first, "loss": loss}
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return row | {"peak_gib": peak}


# ----------------------------------------------------------------------------------------------------------- all ways


def in_own_process(task: str, size: str, way: str, layers: int | None, until: float) -> dict:
    command = [sys.executable, __file__, "--one", task, size, way]
    command += ["--layers", str(layers)] if layers else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(1.0, until - time.monotonic())
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfTime from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def with_all_layers(task: str, size: str, way: str, layers: int | None, until: float) -> dict:
    """The row of the whole model; with fewer layers, a line through two measurements, extended, and a remark that says so."""
    whole = SHAPES[size].model.num_hidden_layers
    if not layers or layers >= whole:
        return in_own_process(task, size, way, None, until)
    more, fewer = (in_own_process(task, size, way, number, until) for number in (layers, layers // 2))
    if "step_ms" not in more or "step_ms" not in fewer:
        return more if "step_ms" not in more else fewer
    row = extended(more, fewer, layers, whole)
    return row | {"tokens_s": SHAPES[size].rows * SHAPES[size].length / row["step_ms"] * 1000}


def extended(more: dict, fewer: dict, layers: int, whole: int) -> dict:
    """The row of `whole` layers on the line through those of `layers` and half as many; it says so and keeps both."""
    row = more | {"remark": f"estimated: {layers} and {layers // 2} of {whole} layers measured, a line through both"}
    for name in ("step_ms", "peak_gib"):
        if more[name] is not None:
            row[name] = more[name] + (more[name] - fewer[name]) / (layers - layers // 2) * (whole - layers)
    return row | {"measured": {str(layers): more["step_ms"], str(layers // 2): fewer["step_ms"]}}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="bench/step.py", description=__doc__)
    parser.add_argument("--task", nargs="+", choices=tuple(WAYS), default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--size", nargs="+", choices=tuple(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--ways", nargs="+", help="these alone, such as eager ours peft")
    parser.add_argument("--layers", type=int, help="of the 8B shape: this many and half of it are measured")
    parser.add_argument("--again", action="store_true", help="measure anew what the results have already")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start nothing later than this; the next call goes on"
    )
    parser.add_argument("--commit", help="the commit that is measured, where there is no git checkout to ask")
    parser.add_argument("--out", type=Path, help="folder of step.json (default: bench/results/DEVICE)")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "SIZE", "WAY"), help="measure in this process, print JSON")
    args = parser.parse_args(argv)
    if args.one:
        task, size, way = args.one
        print(json.dumps(measure(task, size, way, args.layers)))
        return 0
    if args.layers is not None and args.layers < 2:
        raise UserError(f"--layers {args.layers}: at least 2, because half of them are measured too")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    path = (args.out or ROOT / "bench" / "results" / device_slug(device)) / "step.json"
    results = read_results(path)
    results["environment"] = environment(device) | ({"git_commit": args.commit} if args.commit else {})
    until = time.monotonic() + 60 * args.minutes
    for task in args.task:
        for size in args.size or (SIZES[task] if device.type == "cuda" else ("tiny",)):
            rows = results.setdefault(task, {}).setdefault(size, {})
            for way in WAYS[task]:
                if (args.ways and way not in args.ways) or (way in rows and not args.again):
                    continue
                try:
                    if time.monotonic() > until:
                        raise OutOfTime
                    rows[way] = with_all_layers(task, size, way, args.layers if size == "8b" else None, until)
                except OutOfTime:
                    print("out of time; the same command goes on from here")
                    return 0
                write_results(path, results, digits=6)  # losses are compared between ways
                cells = ", ".join(cell for cell in report.step_cells(rows[way]) if cell)
                print(f"{task} {size} {way}: {cells}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
