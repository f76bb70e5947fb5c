"""What do LoRA and QLoRA fine-tuning cost here, and with transformers and peft, on the same model and the same examples?

    python bench/finetune.py                                      a small random Llama and made-up examples
    python bench/finetune.py --model DIR --data answers.jsonl     a Hugging Face folder and examples of your own

Every way takes the step of train.py's own loop (train.Run) with the same optimizer, in a process of its own. They share
the folder, the examples of each step, the adapters' first values, the precision, and one loss a step: the sum over all
targets over their number. Frozen weights are fp32 on a CPU and bf16 on a GPU, or NF4 with double quantisation (qlora);
adapters are fp32, of rank 16, on every linear layer of the blocks. Nobody recomputes activations.

    ours           the examples of a step packed into rows of --max_length, attention within each; "ours + compile" with
                   torch.compile (left out on a CPU, where the compiler takes longer than the steps, unless asked for)
    peft           the same examples --micro_batch_size at a time, padded to the longest of them: transformers' default
    peft packed    the tokens of our rows, one behind the other, from whose positions transformers makes the mask

tokens/s are of the examples' own tokens, without padding, over all steps but the first two. Memory is the largest: on a
GPU what tensors take, on a CPU the whole process (VmHWM), libraries included; while the model is loaded, and in the steps.
What is held before the steps is given too, because the libraries of the two sides differ in size. Beside the time of a step
stands the processor's (all threads'), which on a CPU that others use as well is the one to compare.
`loss` is that of the last step, which all ways of a task should share. Rows go to bench/results/DEVICE/finetune.json; a
later call measures what is missing there, everything with --again.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters.base_models import load_base  # noqa: E402
from adapters.lora import add_adapters, store_after_steps  # noqa: E402
from adapters.peft_files import adapter_state  # noqa: E402
from arguments import ArgumentParser  # noqa: E402
from batches.micro_batch import IGNORE_INDEX, MicroBatch  # noqa: E402
from bench.finetune_data import Settings, in_one_row, in_order, padded, sequences_of, write_random_model  # noqa: E402
from bench.measure import device_slug, environment, first_line, read_results, synchronize, write_results  # noqa: E402
from bench.step import ALPHA, LINEAR_LAYERS, RANK, Skipped, bare_run  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from kernels.attention_backends import activate, choose_attention  # noqa: E402
from kernels.choice import choose_kernels  # noqa: E402
from ranks import Ranks  # noqa: E402
from stages.sft import SFT  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.examples_data import ExampleFeed  # noqa: E402
from training.loading import read_shape  # noqa: E402
from training.metrics import Metrics  # noqa: E402
from training.optimizers import build_optimizers  # noqa: E402
from training.parallel import prepare_model  # noqa: E402
from training.precision import LossScaler, Precision, choose_precision  # noqa: E402

TASKS = ("lora", "qlora")
OWN = ("ours", "ours + compile")
WAYS = (*OWN, "peft", "peft packed")
UNTIMED = 2  # the first steps
LEARNING_RATE = 2e-4


# ------------------------------------------------------------------------------------------------------------ the ways


@torch.no_grad()
def draw_adapters(adapters: Mapping[str, Tensor]) -> None:
    """The same A for the same layer in every library, and B zero; the names are PEFT's."""
    for name, tensor in adapters.items():
        if name.endswith("lora_B.weight"):
            tensor.zero_()
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor.copy_(torch.empty(tensor.shape).uniform_(-1, 1, generator=generator) / tensor.shape[1] ** 0.5)


def own_model(task: str, folder: Path, device: torch.device, precision: Precision, compiled: bool) -> nn.Module:
    """As train.py builds it with --lora, and --load_in_4bit for qlora."""
    shape = read_shape(folder)
    attention = choose_attention("auto", device, precision.dtype, head_dim=shape.head_dim)
    activate(attention)
    kernels = choose_kernels(["auto"], device, compiled, attention)
    quantise = "nf4" if task == "qlora" else None
    model = load_base(folder, dtype=precision.dtype, quantise=quantise, device=device)
    model.kernels = kernels
    add_adapters(model, rank=RANK, alpha=ALPHA)
    draw_adapters(adapter_state(model))
    return prepare_model(model, Ranks(0, 1, device), compile_model=compiled)


def peer_model(task: str, folder: Path, device: torch.device, precision: Precision) -> nn.Module:
    """transformers' model of the folder, in 4 bits by bitsandbytes for qlora, with peft's adapters on it."""
    try:
        import peft
        import transformers

        if task == "qlora":
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise Skipped(first_line(error)) from error
    settings = {"dtype": precision.dtype, "attn_implementation": "sdpa", "device_map": {"": device}}
    if task == "qlora":
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision.dtype,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **settings)
    model.config.use_cache = False
    adapters = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, adapters)  # adapters in fp32, whatever the frozen weights are in
    named = {name.replace(".default", ""): tensor for name, tensor in adapted.named_parameters() if ".lora_" in name}
    draw_adapters(named)
    return adapted.train()


class PeerStage:
    """The loss of a transformers model, summed as the loop wants it."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        # transformers moves the labels by one token itself; a mean over one item is a sum
        labels = torch.cat([torch.full_like(batch.targets[:, :1], IGNORE_INDEX), batch.targets[:, :-1]], 1)
        if self.packed:
            layout = {"position_ids": batch.positions}
        else:
            assert batch.sequence_ids is not None
            layout = {"attention_mask": (batch.sequence_ids < len(batch.sequence_ids)).long()}
        total = model(input_ids=batch.input_ids, labels=labels, num_items_in_batch=1, **layout).loss
        return total, {"loss": (total.detach(), batch.weight)}


# ------------------------------------------------------------------------------------------------------------- one way


def measure(task: str, way: str, settings: Settings, folder: Path) -> dict:
    """The row of one way, in this process. folder: of the model."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # as train.py
    torch.manual_seed(0)
    precision = choose_precision(settings.mixed_precision, device)
    ranks = Ranks(0, 1, device)
    data = in_order(sequences_of(settings, folder, read_shape(folder).vocab_size))
    feed = ExampleFeed(
        data, None, ranks, precision, settings.batch_size, settings.micro_batch_size, settings.max_length, eval_tokens=0
    )
    reset_peak(device)
    try:
        if way in OWN:
            model = own_model(task, folder, device, precision, way.endswith("compile"))
        else:
            model = peer_model(task, folder, device, precision)
    except Skipped as reason:
        return {"skipped": str(reason)}
    optimizers = build_optimizers(model, name="adamw", learning_rate=LEARNING_RATE, weight_decay=0.0)
    store_after_steps(model, optimizers)
    stage: Any = SFT(feed) if way in OWN else PeerStage(packed=way.endswith("packed"))

    def batches(step: int) -> list[MicroBatch]:
        groups = feed.groups(step * settings.batch_size)
        if way == "peft":
            return padded([sequence for (sequence,) in groups], settings.micro_batch_size)
        packed = feed.pack(groups)
        return packed if way in OWN else [in_one_row(batch) for batch in packed]

    options = TrainConfig(batch_size=settings.batch_size)
    scaler = LossScaler(device, enabled=precision.dtype == torch.float16)
    run = bare_run(options, ranks, precision, stage, model, optimizers, scaler)
    loading = peak_gib(device)
    gc.collect()
    reset_peak(device)
    loaded = peak_gib(device)
    row = time_steps(lambda micro_batches: run.optimizer_step(micro_batches, 1.0, False)[0]["loss"], batches, settings)
    return row | {"loading_peak_gib": loading, "loaded_gib": loaded, "peak_gib": peak_gib(device)}


def time_steps(
    step: Callable[[list[MicroBatch]], tuple[Tensor, Any]],
    batches: Callable[[int], list[MicroBatch]],
    settings: Settings,
) -> dict:
    """{tokens_s, step_ms, processor_ms, first_step_s, tokens, padding, first_loss, loss}.

    step: micro-batches -> (summed loss, targets).
    """
    laid_out = [batches(number) for number in range(settings.steps)]
    losses, seconds, processor_seconds = [], [], []
    for micro_batches in laid_out:
        start, processor_start = time.perf_counter(), time.process_time()
        total, weight = step(micro_batches)
        losses.append(float(total) / weight)  # waits for the device
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    tokens, places = (
        [sum(count(batch) for batch in micro_batches) for micro_batches in laid_out]
        for count in (lambda batch: batch.num_tokens, lambda batch: batch.input_ids.numel())
    )
    timed = sum(seconds[UNTIMED:])
    return {
        "tokens_s": sum(tokens[UNTIMED:]) / timed,
        "step_ms": 1000 * timed / (settings.steps - UNTIMED),
        "processor_ms": 1000 * sum(processor_seconds[UNTIMED:]) / (settings.steps - UNTIMED),
        "first_step_s": seconds[0],
        "tokens": sum(tokens),
        "padding": 1 - sum(tokens) / sum(places),
        "first_loss": losses[0],
        "loss": losses[-1],
    }


def reset_peak(device: torch.device) -> None:
    """From here on `peak_gib` starts anew, where that is possible: not on a CPU outside of Linux."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float | None:
    """The most memory since `reset_peak`: of tensors on a GPU, of the whole process on a CPU; None outside of Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


# ------------------------------------------------------------------------------------------------------------ all ways


def in_own_process(task: str, way: str, settings: Settings, folder: Path) -> dict:
    command = [sys.executable, __file__, "--one", task, way, str(folder), json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe(row: dict) -> str:
    if reason := row.get("failed") or row.get("skipped"):
        return f"{'failed' if 'failed' in row else 'left out'}: {reason}"
    names = {"peak_gib": "in the steps", "loaded_gib": "before them", "loading_peak_gib": "while loading"}
    memory = ", ".join(f"{row[name]:.2f} GiB {words}" for name, words in names.items() if row.get(name) is not None)
    return (
        f"{row['tokens_s']:,.0f} tokens/s, {row['step_ms']:,.0f} ms a step ({row['processor_ms']:,.0f} of the processor), "
        f"{memory or 'memory unknown'}, {row['padding']:.0%} padding, loss {row['first_loss']:.5f} -> {row['loss']:.5f}"
    )


def ratios(rows: dict[str, dict]) -> list[str]:
    """A sentence for each pair of one of ours and a peer that were both measured."""
    measured = {way: row for way, row in rows.items() if "tokens_s" in row}
    sentences = []
    for own in (way for way in WAYS if way in OWN and way in measured):
        for peer in (way for way in WAYS if way not in OWN and way in measured):
            ours, theirs = measured[own], measured[peer]
            sentence = f"{own} / {peer}: {ours['tokens_s'] / theirs['tokens_s']:.2f} times the tokens/s"
            sentence += f", {ours['processor_ms'] / theirs['processor_ms']:.2f} times the processor's time"
            if ours.get("peak_gib") and theirs.get("peak_gib"):
                sentence += f", {ours['peak_gib'] / theirs['peak_gib']:.2f} times the memory of the steps"
            sentences.append(f"{sentence}, last loss {ours['loss'] - theirs['loss']:+.1e}")
    return sentences


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="bench/finetune.py", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a Hugging Face folder of a Llama or Qwen3 (default: a random one of 7M)")
    add("--data", metavar="FILE", help="examples of chats, in the model's template (default: made up)")
    add("--task", nargs="+", choices=TASKS, default=list(TASKS), help=", ".join(TASKS))
    add("--ways", nargs="+", choices=WAYS, help=", ".join(WAYS))
    add("--steps", type=int, default=10, help="optimizer steps; the clock starts after two")
    add("--batch_size", type=int, default=16, help="examples a step")
    add("--micro_batch_size", type=int, default=4, help="rows of a forward pass")
    add("--max_length", type=int, default=512, help="tokens of a row; longer examples are cut")
    add("--mixed_precision", choices=("auto", "bf16", "fp16", "none"), default="auto", help="as in train.py")
    add("--again", action="store_true", help="measure anew what the results have already")
    add("--out", type=Path, help="folder of finetune.json (default: bench/results/DEVICE)")
    add("--one", nargs=4, metavar=("TASK", "WAY", "DIR", "SETTINGS"), help="measure in this process, print JSON")
    args = parser.parse_args(argv)
    if args.one:
        task, way, folder, settings = args.one
        print(json.dumps(measure(task, way, Settings(**json.loads(settings)), Path(folder))))
        return 0
    if args.steps <= UNTIMED:
        raise UserError(f"--steps {args.steps}: more than {UNTIMED}, because the first {UNTIMED} are not timed")
    if args.data and not args.model:
        raise UserError("--data needs --model, whose tokenizer makes tokens of it")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    ways = args.ways or [way for way in WAYS if device.type == "cuda" or way != "ours + compile"]
    path = (args.out or ROOT / "bench" / "results" / device_slug(device)) / "finetune.json"
    results = read_results(path)
    results["environment"] = environment(device)
    print(f"{settings.name}; {results['environment']['processor']}, {device_slug(device)}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(settings.model or made)
        if settings.model is None:
            write_random_model(folder)
        for task in args.task:
            rows = results.setdefault("runs", {}).setdefault(settings.name, {}).setdefault(task, {})
            for way in ways:
                if "tokens_s" not in rows.get(way, {}) or args.again:
                    rows[way] = in_own_process(task, way, settings, folder)
                    write_results(path, results, digits=6)  # losses are compared between ways
                print(f"{task} {way}: {describe(rows[way])}", flush=True)
            print("".join(f"{task} {sentence}\n" for sentence in ratios(rows)), end="", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
