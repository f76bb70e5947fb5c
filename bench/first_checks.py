"""What must work on a GPU before anything else is worth measuring? The list of gpu_first.py, worst failure first.

    data, base            made-up text through data_prep_tool.py; a small model of it, trained on the CPU
    STAGE bf16            every --stage for a few steps: all weights, LoRA, LoRA over 4 bits
    STAGE bf16 compiled   the losses must follow those without the compiler
    resume, generate, …   the scripts as users start them
    attention, kernel     each back end and each kernel against float64, forward and backward
    STAGE fp16            with the loss scaler
    speed                 one step at 124M and at 1B beside transformers: tokens/s and MFU
    STAGE … compiled      with adapters, and in fp16

Bounds stand beside what they bound. An error is ‖found − truth‖ / ‖truth‖, the truth in float64.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch._dynamo  # forked checks would spend seconds on it, as on the plots
from safetensors.torch import load_file
from torch import Tensor

import train
import training.plots
import utils  # noqa: F401
from bench import kernels, step
from bench.cases import Draw, Operation, Prepared, Way
from bench.gpu_first import ROOT, Check, Figures, Place, Skipped
from bench.measure import environment, relative_error
from bench.operations import operations
from errors import UserError
from kernels.attention import attention
from kernels.attention_backends import ATTENTION_BACKENDS, HALF, activate, why_not
from kernels.attention_masks import document_ids, document_mask
from kernels.choice import choose_kernels, describe_kernels
from kernels.jit import why_not_triton
from training.option_groups import STAGES
from training.precision import choose_precision

STEPS = {"bf16": 3, "fp16": 8}  # the loss scaler may leave the first ones out, until its scale is found
COMPARED = 3
MODES = {"": "", " LoRA": "--lora", " QLoRA": "--lora --load_in_4bit"}
DRAWS_ANSWERS = ("grpo", "ppo")  # other rounding draws other answers, so their losses are not comparable
FOLLOWS = 0.02  # compiled and eager losses, relative: sums in another order, in bf16 (2^-8), over three steps
RESUMED = 5e-3  # of a loss after a resume, relative: FlashAttention's backward adds its dq in any order
SAME_STEP = 0.02  # ours and transformers' loss after two steps under bf16 autocast, relative
# tests/kernels/accuracy.py: sums of 16 thousand terms in fp32, two roundings of a result in bf16
KERNEL_BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
WORSE_THAN_PLAIN = 1.25  # or that many times PyTorch's own error in the same dtype
# tests/kernels/test_attention.py: two roundings of the output, as many again in the gradients
ATTENTION_BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
COMPILED_IN_A_DRY_RUN = "pretrain bf16 compiled"
GPU_SIZES = ("124m", "2048x4096x4096", "16x4096x4096", "8x32x2048x64")  # of bench/cases.py, the first that there is


def require(condition: bool, sentence: str) -> None:
    """AssertionError with a sentence; a plain assert is left out by python -O."""
    if not condition:
        raise AssertionError(sentence)


def all_checks() -> list[Check]:
    """The list, in the order of what would hurt users most; most of what takes the compiler's minutes comes last."""
    stages = partial(stage_checks, compiled=False)
    compiled = partial(stage_checks, compiled=True)
    needs = ("data", "base")
    checks = [Check("data", make_data, feeds=True), Check("base", make_base, needs=("data",), feeds=True)]
    for mode in MODES:
        checks += stages("bf16", mode)
    checks += compiled("bf16", "")
    for stage, mode in (("pretrain", ""), ("sft", " QLoRA")):
        checks.append(Check(f"resume {stage}{mode}", partial(resume, stage=stage, mode=mode), 120, needs=needs))
    checks.append(Check("generate", generate, 90, needs=needs))
    checks.append(Check("chat", chat, 90, needs=needs))
    checks.append(Check("chat QLoRA", partial(chat, adapters=True), 120, needs=needs))
    checks += [Check(f"attention {name}", partial(back_end, name=name), 120) for name in ATTENTION_BACKENDS[1:]]
    checks += [Check(f"kernel {name}", partial(kernel, name=name), 120) for name in operations()]
    for mode in MODES:
        checks += stages("fp16", mode)
    for size in step.SIZES["pretrain"]:
        for way in ("ours", "transformers"):
            checks.append(Check(f"speed {size} {way}", partial(speed, size=size, way=way), 120, alone=True))
    for mode in (" LoRA", " QLoRA"):
        checks += compiled("bf16", mode)
    for mode in MODES:
        checks += compiled("fp16", mode)
    return checks


def stage_checks(precision: str, mode: str, compiled: bool) -> list[Check]:
    return [
        Check(
            stage_name(stage, mode, precision, compiled),
            partial(run_stage, stage=stage, mode=mode, precision=precision, compiled=compiled),
            150 if compiled else 60,
            needs=("data", "base"),
        )
        for stage in STAGES
    ]


def stage_name(stage: str, mode: str, precision: str, compiled: bool) -> str:
    return f"{stage}{mode} {precision}{' compiled' if compiled else ''}"


def interpret_ranges() -> None:
    """Let Triton's interpreter (3.6) loop over range(tensor) where NumPy (2.4) refuses int() of a one-element array."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, *arguments: object) -> object:
        result = patch_tensor(tensor, *arguments)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patched


def machine(place: Place) -> Figures:
    """The device, its versions, what was chosen for it. Skipped without a GPU."""
    if not place.tiny and not torch.cuda.is_available():
        raise Skipped("torch sees no CUDA device")
    device = torch.device(place.device)
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # CUDA starts in a forked process
    require(bool((product == 64).all()), "a product of ones is wrong on this device")
    found = environment(device)
    found["kernels"] = describe_kernels(choose_kernels(["auto"], device, compiled=False), device, compiled=False)
    return found


# ------------------------------------------------------------------------------------------------------- data and base


def make_data(place: Place) -> Figures:
    """Text and examples of made-up words, so that nothing is downloaded; shards by data_prep_tool.py."""
    random = Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(random.choices(syllables, k=random.randint(1, 3))) for _ in range(300)]

    def sentence(count: int) -> str:
        return " ".join(random.choices(words, k=count))

    text = place.work / "text"
    text.mkdir()
    documents = [{"text": "\n".join(sentence(9) for _ in range(random.randint(1, 8)))} for _ in range(400)]
    write_lines(text / "documents.jsonl", documents)
    examples: dict[str, list[dict]] = {"sft": [], "pairs": [], "prompts": [], "texts": [], "words": [], "questions": []}
    for number in range(24):
        prompt = sentence(3 + number % 3)
        examples["sft"].append({"prompt": prompt, "completion": sentence(2 + number % 9)})
        pair = {"chosen": sentence(2 + number % 7), "rejected": sentence(3 + number % 5)}
        examples["pairs"].append({"prompt": prompt, **pair})
        examples["prompts"].append({"prompt": prompt, "answer": str(number)})
        context = sentence(9).split()
        examples["texts"].append({"text": prompt, "label": "even" if number % 2 else "odd"})
        examples["words"].append({"tokens": context, "tags": ["O", "B-X"] * 4 + ["O"]})
        found = {"text": [context[0]], "answer_start": [0]}
        examples["questions"].append({"question": prompt, "context": " ".join(context), "answers": found})
    for name, rows in examples.items():
        write_lines(place.work / f"{name}.jsonl", rows)
    length = 64 if place.tiny else 256
    script(
        "data_prep_tool.py --vocab_size 512 --stride 0 --val_fraction 0.1 --num_workers 1",
        "--max_length", length, "--input_dir", text, "--output_dir", place.work / "data",
    )  # fmt: skip
    script(
        "data_prep_tool.py --tokenizer_type wordpiece --vocab_size 512 --stride 0 --val_fraction 0.1 --num_workers 1",
        "--max_length", length, "--input_dir", text, "--output_dir", place.work / "masked",
    )  # fmt: skip
    return {"documents": len(documents)}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_base(place: Place) -> Figures:
    """The model that every stage starts from. On the CPU: no fault of the GPU must take the other checks with it."""
    shape = "--hidden_size 64 --num_heads 2" if place.tiny else "--hidden_size 256 --num_heads 4"
    given = f"--num_layers 2 --num_kv_heads {1 if place.tiny else 2} {shape} --optimizer adamw --device cpu"
    losses = train_run(place, place.work / "base", f"--data_dir {place.work / 'data'} {given}")["loss"]
    return {"loss": losses}


def train_run(place: Place, save_dir: Path, given: str, steps: int = 3) -> Figures:
    """train.py in this process; {loss, grad_norm} of each step, the loss checked."""
    usual = "--batch_size 4 --learning_rate 1e-3 --warmup_steps 0 --log_interval 1 --eval_interval 0"
    words = f"{usual} --max_steps {steps} --save_dir {save_dir} {given}".split()
    if save_dir.name != "base":  # curves are drawn once: that takes half the time of a run of three steps
        training.plots.plot_runs = lambda runs, path: None
    require(train.main([*words, "--sample_prompt", ""]) == 0, "train.py did not finish")
    return figures_of(save_dir, steps)


def figures_of(save_dir: Path, steps: int) -> Figures:
    lines = (save_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row and "grad_norm" in row]
    losses = [row["loss"] for row in rows]
    require([row["step"] for row in rows] == list(range(1, steps + 1)), f"steps logged: {[r['step'] for r in rows]}")
    require(all(loss is not None and math.isfinite(loss) for loss in losses), f"losses: {losses}")
    return {"loss": losses, "grad_norm": [row["grad_norm"] for row in rows]}


def script(given: str, *more: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A script of the project in an interpreter of its own, as users start it; its output goes into the log too."""
    command = [sys.executable, *given.split(), *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, errors="replace", check=False)
    print(f"$ {' '.join(command)}\n{done.stdout}\n{done.stderr}", flush=True)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    require(done.returncode == 0, f"{command[1]} ended with exit code {done.returncode}: {last[0]}")
    return done


# --------------------------------------------------------------------------------------------------------------- stages


def flags(place: Place, stage: str, mode: str, precision: str) -> str:
    """The command line of a stage. Skipped where the device has no such precision."""
    try:
        choose_precision(precision, torch.device(place.device))
    except UserError as error:
        raise Skipped(str(error)) from error
    answers = f"--train_data {place.work}/prompts.jsonl --reward_function bench.first_checks:share_of_a"
    answers += " --max_new_tokens 8 --eval_samples 2"
    given = {
        "pretrain": f"--data_dir {place.work}/data",
        "mlm": f"--data_dir {place.work}/masked --model modernbert",
        "classify": f"--train_data {place.work}/texts.jsonl",
        "tag": f"--train_data {place.work}/words.jsonl",
        "answer": f"--train_data {place.work}/questions.jsonl --doc_stride 16",
        "sft": f"--train_data {place.work}/sft.jsonl",
        "reward": f"--train_data {place.work}/pairs.jsonl",
        "dpo": f"--train_data {place.work}/pairs.jsonl",
        "grpo": f"{answers} --group_size 4",
        "ppo": f"{answers} --rollout_epochs 1",
    }[stage]
    if stage == "mlm" and mode:
        raise Skipped("no encoder is made here to put adapters on")
    from_base = "" if (stage, mode) in (("pretrain", ""), ("mlm", "")) else f"--init_from {place.work}/base"
    if not from_base:  # from nothing, with the shape of the base: Muon too is first tried here
        size = (64, 2) if place.tiny else (256, 4)
        from_base = "--num_layers 2 --hidden_size {} --num_heads {}".format(*size)
        from_base += f" --num_kv_heads {size[1] // 2}" if stage == "pretrain" else ""
    return f"--stage {stage} {from_base} {given} {MODES[mode]} --mixed_precision {precision} --device {place.device}"


def share_of_a(completions: list[str], **columns: object) -> list[float]:
    """A reward that answers of an untrained model already differ in."""
    return [text.count("a") / (1 + len(text)) for text in completions]


def run_stage(place: Place, stage: str, mode: str, precision: str, compiled: bool) -> Figures:
    """A few steps with finite losses; compiled, with the losses of the eager run."""
    name = stage_name(stage, mode, precision, compiled)
    if place.tiny and compiled and name != COMPILED_IN_A_DRY_RUN:
        raise Skipped("a dry run compiles one")
    folder = place.work / name.replace(" ", "_")
    given = flags(place, stage, mode, precision) + (" --compile_model" if compiled else "")
    found = train_run(place, folder, given, STEPS[precision])
    learned = [norm is not None and math.isfinite(norm) for norm in found["grad_norm"]]
    wanted = any(learned) if precision == "fp16" else all(learned)
    require(wanted, f"gradient norms: {found['grad_norm']}")
    require((folder / f"checkpoint_step_{STEPS[precision]}").is_dir(), "no checkpoint was saved")
    figures: Figures = {"loss": found["loss"][:COMPARED]}
    if precision == "fp16":
        figures["steps left out"] = learned.count(False)
    if compiled and stage not in DRAWS_ANSWERS:
        figures |= follows(figures["loss"], place.rows.get(stage_name(stage, mode, precision, False), {}))
    return figures


def follows(losses: list[float], eager: dict) -> Figures:
    """How far compiled losses are from those of the eager run, which must be within FOLLOWS."""
    if "figures" not in eager:
        return {"beside eager": "not compared, which did not pass"}
    apart = largest_gap(losses, eager["figures"]["loss"])
    require(apart <= FOLLOWS, f"losses {losses} compiled, {eager['figures']['loss']} eager: more than {FOLLOWS} apart")
    return {"beside eager": apart}


def largest_gap(found: list[float], wanted: list[float]) -> float:
    """Relative to losses above 1, absolute below."""
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True))


def resume(place: Place, stage: str, mode: str) -> Figures:
    """Two steps and two more in another process, as four in one: the optimizer's state first shows in the fourth's loss."""
    whole, parted = (place.work / f"{name}_{stage}{mode.strip()}" for name in ("whole", "parted"))
    given = flags(place, stage, mode, "bf16") + " --save_interval 2 --keep_checkpoints 0"
    wanted = train_run(place, whole, given, steps=4)["loss"]
    shutil.copytree(whole / "checkpoint_step_2", parted / "checkpoint_step_2")
    usual = "--batch_size 4 --learning_rate 1e-3 --warmup_steps 0 --log_interval 1 --eval_interval 0 --max_steps 4"
    said = script(
        f"train.py {usual} {given}", "--save_dir", parted, "--checkpoint", "latest", "--sample_prompt", ""
    )  # fmt: skip
    require("resumed from" in said.stdout, "the run did not resume")
    lines = (parted / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row["loss"] for row in map(json.loads, lines) if "grad_norm" in row]
    require(len(found) == 2, f"{len(found)} steps after the resume, not 2")
    apart = largest_gap(found, wanted[2:])
    require(apart <= RESUMED, f"losses {found} resumed, {wanted[2:]} in one run: more than {RESUMED} apart")
    names = [path.name for path in (whole / "checkpoint_step_4").glob("*.safetensors")]
    return {"beside one run": apart, "same bits": all(same_bits(whole, parted, name) for name in names)}


def same_bits(whole: Path, parted: Path, name: str) -> bool:
    first, second = (load_file(folder / "checkpoint_step_4" / name) for folder in (whole, parted))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ------------------------------------------------------------------------------------------------------- what users ask


def generate(place: Place) -> Figures:
    said = script(
        "utils.py generate --max_new_tokens 16 --num_samples 2 --prompt ba",
        "--checkpoint", place.work / "base", "--device", place.device,
    )  # fmt: skip
    counts = [int(count) for count in re.findall(r"^(\d+) tokens, ", said.stderr, re.MULTILINE)]
    require(len(counts) == 2 and min(counts) > 0, f"tokens of two samples: {counts}")
    return {"tokens": counts}


def chat(place: Place, adapters: bool = False) -> Figures:
    """Two turns. With adapters: those of a QLoRA run, which answer over the 4-bit model."""
    given = ["--checkpoint", place.work / "base", "--device", place.device]
    if adapters:
        train_run(place, place.work / "answers", flags(place, "sft", " QLoRA", "bf16"))
        given += ["--adapter", place.work / "answers"]
    said = script("utils.py chat --max_new_tokens 8 --temperature 0.8", *given, stdin="ba\nko\n")
    require(bool(said.stdout.strip()), "two turns without an answer")
    return {"characters": len(said.stdout)}


# --------------------------------------------------------------------------------------------- attention, kernels, speed


def back_end(place: Place, name: str) -> Figures:
    """Packed documents, with and without a window, and rows of one document each, against the definition in float64."""
    device = torch.device(place.device)
    if reason := why_not(name, device, torch.bfloat16, 64):
        raise Skipped(reason)
    activate(name)
    length = 32 if place.tiny else 256
    packed = [0, 5, length // 2, length, length + 7, length + length // 3, 2 * length]
    figures: Figures = {}
    for dtype in HALF:
        errors = [
            attention_error(name, dtype, torch.tensor(starts, dtype=torch.int32, device=device), length, window)
            for starts, window in ((packed, None), (packed, 9), ([0, length, 2 * length], None))
        ]
        out, gradient = (max(error[number] for error in errors) for number in (0, 1))
        short = str(dtype).removeprefix("torch.")
        figures |= {f"{short} error": out, "of gradients": gradient}
        bound = ATTENTION_BOUNDS[dtype]
        require(out <= bound and gradient <= 2 * bound, f"{short}: errors {out:.2e}, {gradient:.2e}; bound {bound:.2e}")
    return figures


def attention_error(
    name: str, dtype: torch.dtype, starts: Tensor, length: int, window: int | None
) -> tuple[float, float]:
    """(error of the output, largest of the three gradients) of two rows, eight heads that share two key heads."""
    draw = Draw(starts.device, dtype, seed=1)
    inputs = [draw.normal(2, length, heads, 64).requires_grad_() for heads in (8, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = attention(*inputs, mask=document_mask(starts, 2, length, dtype=dtype, window=window, backend=name))
    q, k, v = exact
    truth = defined_attention(q, k, v, visible_keys(starts, length, window))
    upstream = draw.normal(*found.shape)
    gradients = torch.autograd.grad(found, inputs, upstream)
    wanted = torch.autograd.grad(truth, exact, upstream.double())
    return relative_error(found, truth), max(map(relative_error, gradients, wanted))


def visible_keys(starts: Tensor, length: int, window: int | None) -> Tensor:
    """(B, 1, T, T): the past of the own document, `window` keys of it at most."""
    document = document_ids(starts, 2, length)
    place = torch.arange(length, device=starts.device)
    back = place[:, None] - place
    near = (back >= 0) & (back < (window or length))
    return (document[:, None, :, None] == document[:, None, None, :]) & near


def defined_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v with all scores in memory; q (B, T, H, D), k and v with fewer heads."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def kernel(place: Place, name: str) -> Figures:
    """Every way of ours of one operation of bench/operations.py, at a real size, against float64."""
    device = torch.device(place.device)
    if place.tiny:
        interpret_ranges()
    if name != "attention" and (reason := why_not_triton(device)):
        raise Skipped(reason)
    dtype = torch.float32 if place.tiny else torch.bfloat16
    operation = operations()[name]
    size = "tiny" if place.tiny else next(size for size in GPU_SIZES if size in operation.sizes)
    figures: Figures = {"size": size}
    for way, call in operation.ways.items():
        if way.startswith("ours") or way == "chosen":
            errors = errors_of(operation, size, call, device, dtype)
            figures[way] = max(errors.values())
            bound = KERNEL_BOUNDS[dtype]
            if figures[way] > bound:  # only then: PyTorch's own may take gigabytes at this size
                plain = errors_of(operation, size, operation.reference, device, dtype)
                worse = {key: e for key, e in errors.items() if e > max(bound, WORSE_THAN_PLAIN * plain[key])}
                require(not worse, f"{way}: errors {worse}, bound {bound:.1e}; PyTorch's own {plain}")
    return figures


def errors_of(
    operation: Operation, size: str, way: Way | Prepared, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Of each output and gradient; inf for one that is missing or not finite."""
    draw = Draw(device, dtype, seed=0)
    prepared = way if isinstance(way, Prepared) else Prepared(lambda inputs: inputs, way)
    found = kernels.errors_of(operation, prepared, operation.inputs(operation.sizes[size], draw), draw)
    return {name: error if isinstance(error, float) else math.inf for name, error in found.items()}


def speed(place: Place, size: str, way: str) -> Figures:
    """A training step of bench/step.py; transformers' beside ours, which must be the same step."""
    if place.tiny:
        interpret_ranges()
    row = step.measure("pretrain", "tiny" if place.tiny else size, way, None)
    if "skipped" in row:
        raise Skipped(row["skipped"])
    require(math.isfinite(row["loss"]), f"the loss is {row['loss']}")
    figures = {"tokens/s": row["tokens_s"], "MFU": row["mfu"], "ms": row["step_ms"], "GiB": row["peak_gib"]}
    figures["loss"] = row["loss"]
    ours = place.rows.get(f"speed {size} ours", {}).get("figures")
    if way != "ours" and ours:
        figures["ours over it"] = ours["tokens/s"] / row["tokens_s"]
        apart = largest_gap([ours["loss"]], [row["loss"]])
        require(apart <= SAME_STEP, f"the loss is {ours['loss']} with ours and {row['loss']} with {way}")
    return figures
