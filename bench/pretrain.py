"""How fast does a small model pretrain, and in how much memory, beside nanoGPT, transformers' Trainer and litgpt?

    python bench/pretrain.py --nanogpt DIR            DIR holds nanoGPT's model.py; a library that is not there is left out
    python bench/pretrain.py --precision bf16 --mode compile

    gpt2     8.4M, vocabulary 8,192     nanoGPT, nanoGPT with fused AdamW
    llama    8.3M, vocabulary 8,192     transformers' Trainer, litgpt

Both have rows of 256 tokens, 8 a step. All ways of a case start from the same weights and see the same tokens, and before the
clock starts, loss and every gradient are compared with ours, as in bench/families.py, whose turns this takes: a step each, in
one process, so that whatever else the machine does befalls all of them. A step is forward, backward, clipping to norm 1 and
AdamW, ours as train.py takes it, the Trainer's as its own loop does, in a thread that waits for its turn.

Memory is measured in a process for each way: the most that it had while training over what it had before there was a model,
of a GPU what torch allocated. Rows go to bench/results/DEVICE/pretrain.json.
"""

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import ArgumentParser  # noqa: E402
from batches.micro_batch import MicroBatch  # noqa: E402
from bench.families import (  # noqa: E402
    BETAS,
    BOUNDS,
    CLIP,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Machine,
    Shape,
    Way,
    describe,
    difference,
    fused_adamw,
    gpt2,
    own_model,
    own_way,
    peer_way,
    read_nanogpt,
    rows_of,
    take_turns,
    transformers_model,
)
from bench.measure import device_slug, environment, read_results, synchronize, write_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from stages.pretrain import Pretrain  # noqa: E402
from training.precision import choose_precision  # noqa: E402

SHAPES = {"gpt2": Shape(8192, 256, 8, 4, 8, 256), "llama": Shape(8192, 256, 5, 4, 8, 256)}
MLP = 704  # of llama
WAYS = {"gpt2": ("ours", "nanoGPT", "nanoGPT, fused AdamW"), "llama": ("ours", "transformers' Trainer", "litgpt")}
PRECISIONS, MODES = ("fp32", "bf16"), ("eager", "compile")
MEMORY_STEPS = 4
ENDLESS = 10**6  # steps of the Trainer, which is asked for one at a time


def build(case: str, nanogpt: ModuleType | None, machine: Machine, folder: Path, only: str | None) -> dict[str, Way]:
    """The ways of a case that are here; `only` that one and ours, from which its weights come."""
    if case == "llama":
        return llama(SHAPES[case], folder, machine, only)
    ways = gpt2(SHAPES[case], folder, nanogpt, machine)
    return {name: way for name, way in ways.items() if name in WAYS[case] and only in (None, name)}


def llama(shape: Shape, folder: Path, machine: Machine, only: str | None) -> dict[str, Way]:
    import transformers

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (shape.examples, shape.length + 1), generator=generator)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    settings = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=MLP,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.length,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    theirs = transformers_model("LlamaForCausalLM", settings, machine)
    theirs.save_pretrained(folder)
    ways = {}
    if only in (None, "ours"):
        positions = torch.arange(shape.length).expand(shape.examples, -1)
        batch = MicroBatch(x, y, positions, None, y.numel(), y.numel())
        no_data: Any = None
        stage = Pretrain(no_data, no_data, no_data, no_data, machine.precision, 0, 0, 0, z_loss=0.0)
        ways["ours"] = own_way(own_model(folder, machine), stage, [batch], WEIGHT_DECAY, machine)
    if only in (None, "litgpt"):
        with contextlib.suppress(ImportError):
            ways["litgpt"] = litgpt_way(shape, theirs, x.to(machine.device), y.to(machine.device), machine)
    if only in (None, "transformers' Trainer"):
        ways["transformers' Trainer"] = trainer_way(theirs, x, y, machine)
    return ways


# ---------------------------------------------------------------------------------------------------------------- peers


def trainer_way(model: Any, x: Tensor, y: Tensor, machine: Machine) -> Way:
    """transformers' Trainer on the same batch for ever. Its loop runs in a thread, a step at a time."""
    import transformers

    folder = tempfile.mkdtemp()
    arguments = transformers.TrainingArguments(
        folder, max_steps=ENDLESS, per_device_train_batch_size=len(x), learning_rate=LEARNING_RATE, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP, lr_scheduler_type="constant",
        optim="adamw_torch_fused", bf16=machine.precision.dtype == torch.bfloat16, use_cpu=machine.device.type == "cpu",
        torch_compile=machine.compiled, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False,  # which shift_labels is to it
    )  # fmt: skip
    asked, answered = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            asked.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            answered.release()
            asked.acquire()

    rows = [{"input_ids": row, "labels": target, "shift_labels": target} for row, target in zip(x, y, strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=_Endless(rows), callbacks=[Turns()])
    thread = threading.Thread(target=trainer.train, daemon=True)

    def step() -> None:
        if not thread.is_alive():
            thread.start()
        asked.release()
        while not answered.acquire(timeout=1.0):
            if not thread.is_alive():
                raise RuntimeError("transformers' Trainer ended before it was asked to")

    x, y = x.to(machine.device), y.to(machine.device)

    def backward() -> Tensor:
        with machine.precision.autocast(machine.device):
            loss = model(input_ids=x, labels=y, shift_labels=y).loss
        loss.backward()
        return loss.detach()

    def gradients() -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    return Way(model, backward, step, gradients)


class _Endless(torch.utils.data.IterableDataset):
    """The same rows in the same order, as a dataset with an index would be shuffled."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return itertools.cycle(self.rows)


# litgpt's names of what transformers has in a block; its qkv is all queries, then all keys, then all values
_OF_BLOCK = {
    "norm_1.weight": "input_layernorm.weight", "norm_2.weight": "post_attention_layernorm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight", "mlp.fc_1.weight": "mlp.gate_proj.weight",
    "mlp.fc_2.weight": "mlp.up_proj.weight", "mlp.proj.weight": "mlp.down_proj.weight",
}  # fmt: skip
_OF_MODEL = {
    "lm_head.weight": "lm_head.weight", "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
}  # fmt: skip


def litgpt_views(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """{transformers' name: its part of a tensor of litgpt's Llama}."""
    if name in _OF_MODEL:
        return {_OF_MODEL[name]: tensor}
    layer, rest = name.removeprefix("transformer.h.").split(".", 1)
    if rest in _OF_BLOCK:
        return {f"model.layers.{layer}.{_OF_BLOCK[rest]}": tensor}
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {f"model.layers.{layer}.self_attn.{one}_proj.weight": part for one, part in parts}


def litgpt_way(shape: Shape, source: nn.Module, x: Tensor, y: Tensor, machine: Machine) -> Way:
    """litgpt's GPT in Llama's shape with the weights of `source`, and its loss. ImportError where it is not installed."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model = GPT(
        Config(
            name="bench", block_size=shape.length, padded_vocab_size=shape.vocabulary, n_layer=shape.layers,
            n_head=shape.heads, n_embd=shape.hidden, n_query_groups=shape.heads, rotary_percentage=1.0,
            parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-6, mlp_class_name="LLaMAMLP",
            intermediate_size=MLP, rope_base=10000,
        )
    ).to(machine.device)  # fmt: skip
    weights = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for theirs, part in litgpt_views(name, parameter).items():
                part.copy_(weights[theirs])
    way = peer_way(
        model, fused_adamw(model, WEIGHT_DECAY), [lambda: chunked_cross_entropy(model(x), y, chunk_size=0)], machine
    )

    def gradients() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, gradient in way.gradients().items():
            found |= litgpt_views(name, gradient)
        return found

    return Way(model, way.backward, way.step, gradients)


# ------------------------------------------------------------------------------------------------------------ measuring


def machine_of(precision: str, mode: str) -> Machine:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return Machine(device, choose_precision("none" if precision == "fp32" else "bf16", device), mode == "compile")


def time_ways(case: str, precision: str, mode: str, nanogpt: ModuleType | None, rounds: int) -> dict[str, dict]:
    """{way: {step_ms, tokens_s, ratio, …}}. UserError where another way computes something else."""
    machine, shape = machine_of(precision, mode), SHAPES[case]
    with tempfile.TemporaryDirectory() as folder:
        ways = build(case, nanogpt, machine, Path(folder), None)
    differences = {name: difference(ways["ours"], way) for name, way in ways.items() if name != "ours"}
    for name, value in differences.items():
        if not value < BOUNDS[machine.precision.dtype]:
            raise UserError(f"{case}: {name} is not what ours computes: loss or gradients differ by {value:.1e}")
    rows = rows_of(take_turns(ways, rounds, machine.device), differences)
    return {
        name: row | {"tokens_s": shape.examples * shape.length / row["step_ms"] * 1000} for name, row in rows.items()
    }


def peak_memory(case: str, way: str, precision: str, mode: str, nanogpt: ModuleType | None) -> float:
    """MiB that a way has at most while training, in this process."""
    machine = machine_of(precision, mode)
    build(case, nanogpt, machine, Path(tempfile.mkdtemp()), "ours")  # imports, and what libraries keep for themselves
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        trained = build(case, nanogpt, machine, Path(folder), way)[way]
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(MEMORY_STEPS):
        trained.step()
    synchronize(machine.device)
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def resident() -> float:
    """MiB of this process in memory now, of Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_own_process(arguments: list[str]) -> Any:
    """What this script prints when it measures one thing. UserError with its last line where it fails."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            " ".join(arguments) + ": " + (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="bench/pretrain.py", description=__doc__)
    add = parser.add_argument
    add("--case", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help=", ".join(SHAPES))
    add("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the matrix products")
    add("--mode", nargs="+", choices=MODES, default=list(MODES), help="compile: torch.compile on every side")
    add("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, whose model.py is imported")
    add("--rounds", type=int, default=11, help="steps of each way that are timed")
    add("--out", type=Path, help="folder of pretrain.json (default: bench/results/DEVICE)")
    add("--memory_of", metavar="WAY", help="measure the memory of this way alone, in this process")
    add("--times_only", action="store_true", help="take the times alone, in this process")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        raise UserError(f"--rounds {args.rounds}: at least 2, so that there are quartiles")
    nanogpt = read_nanogpt(args.nanogpt) if args.nanogpt else None
    if args.memory_of or args.times_only:
        one = args.case[0], args.precision[0], args.mode[0]
        measured: Any
        if args.memory_of:
            measured = peak_memory(one[0], args.memory_of, *one[1:], nanogpt)
        else:
            measured = time_ways(*one, nanogpt, args.rounds)
        print(json.dumps(measured), flush=True)
        os._exit(0)  # the Trainer's thread waits for its turn
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    path = (args.out or ROOT / "bench" / "results" / device_slug(device)) / "pretrain.json"
    results = read_results(path)
    results["environment"] = environment(device)
    for case in args.case:
        for precision in args.precision:
            for mode in args.mode:
                given = ["--case", case, "--precision", precision, "--mode", mode, "--rounds", str(args.rounds)]
                given += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
                rows = in_own_process([*given, "--times_only"])
                for name, row in rows.items():
                    row["peak_mib"] = in_own_process([*given, "--memory_of", name])
                    words = f"{describe(name, row)}; {row['tokens_s']:,.0f} tok/s, {row['peak_mib']:,.0f} MiB"
                    print(f"{case} {precision} {mode}, {words}", flush=True)
                results.setdefault(case, {}).setdefault(precision, {})[mode] = rows
                write_results(path, results)
    return 0


if __name__ == "__main__":
    run_script(main)
