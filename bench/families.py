"""What does a training step of GPT-2, BERT and Qwen 2.5 with LoRA cost, beside nanoGPT, transformers and peft?

    python bench/families.py --nanogpt DIR                  DIR holds nanoGPT's model.py; without it, that way is left out
    python bench/families.py --case bert --compile_model    one case; torch.compile for every way

    gpt2    12M, rows of 256 tokens                         nanoGPT, transformers
    bert    11M, masked words in texts of up to 128 tokens  transformers, padded; ours packs them
    lora    Qwen 2.5's parts, 7M, rank 16                   transformers with peft, padded; ours packs

Each way starts from the same folder, written by transformers, and the same examples. Before the clock starts, loss and every
gradient of the others are compared with ours; a way that is further off than rounding fails. A step is forward, backward,
clipping to norm 1 and AdamW, as each library does it. Ours is train.py's own (train.Run with the stage's loss). nanoGPT takes
what its configure_optimizers makes, which is fused on a GPU only; so it is measured with the fused one, too. transformers and
peft take the fused one, as their Trainer does. No dropout; nobody recomputes activations.

Ways take turns in one process, a step each, so that whatever else the machine does befalls all of them. A ratio is the
median over the rounds of another way's time over ours in the same round, and stands beside its quartiles. On a GPU steps
are under bf16 autocast. Rows go to bench/results/DEVICE/families.json.
"""

import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import ArgumentParser  # noqa: E402
from batches.masking import MASKED, Masking, mask_tokens  # noqa: E402
from batches.micro_batch import IGNORE_INDEX, MicroBatch  # noqa: E402
from batches.packing import Sequence, pack  # noqa: E402
from bench import finetune  # noqa: E402
from bench.finetune_data import made_up, padded  # noqa: E402
from bench.measure import device_slug, environment, first_line, read_results, synchronize, write_results  # noqa: E402
from bench.step import bare_run  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from families.weights import stored_views  # noqa: E402
from kernels.choice import choose_kernels  # noqa: E402
from model import load_pretrained  # noqa: E402
from ranks import Ranks  # noqa: E402
from stages.mlm import MLM  # noqa: E402
from stages.pretrain import Pretrain  # noqa: E402
from stages.sft import SFT  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.examples_data import pack_examples  # noqa: E402
from training.optimizers import build_optimizers  # noqa: E402
from training.parallel import prepare_model  # noqa: E402
from training.precision import LossScaler, Precision, choose_precision  # noqa: E402

LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-4, 0.1, (0.9, 0.95)
CLIP = 1.0
UNTIMED = 2  # the first rounds
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of losses and gradients, relative
MASK_ID, NUM_SPECIAL = 4, 5  # BERT's ids below are [PAD], [UNK], [CLS], [SEP], [MASK]
CLS_ID, SEP_ID = 2, 3


@dataclass(frozen=True)
class Shape:
    """vocabulary, hidden, layers, heads of a model; examples of a step, and the tokens of a row."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    examples: int
    length: int


SHAPES = {
    "gpt2": Shape(32000, 256, 4, 4, 8, 256),
    "bert": Shape(30522, 256, 4, 4, 32, 128),  # BERT-mini (Turc et al. 2019)
    "lora": Shape(8192, 256, 6, 4, 16, 512),
}


@dataclass(frozen=True)
class Machine:
    """What every way of a case runs on."""

    device: torch.device
    precision: Precision
    compiled: bool


@dataclass(frozen=True)
class Way:
    """One library's training of the same model on the same examples.

    backward: forward and backward of a whole step; returns the mean loss, a scalar. step: the same, clipping and the
    optimizer. gradients: after `backward`, {name: gradient}, by the names and in the layout of transformers' parameters.
    """

    model: nn.Module
    backward: Callable[[], Tensor]
    step: Callable[[], Any]
    gradients: Callable[[], dict[str, Tensor]]


# ------------------------------------------------------------------------------------------------------------ the sides


def own_way(model: nn.Module, stage: Any, batches: list[MicroBatch], weight_decay: float, machine: Machine) -> Way:
    """train.py's step of a stage on a finished model."""
    batches = [batch.to(machine.device) for batch in batches]
    optimizers = build_optimizers(
        model, name="adamw", learning_rate=LEARNING_RATE, weight_decay=weight_decay, beta1=BETAS[0], beta2=BETAS[1]
    )
    options = TrainConfig(batch_size=len(batches[0].input_ids), grad_clip=CLIP)
    scaler = LossScaler(machine.device, enabled=False)
    run = bare_run(options, Ranks(0, 1, machine.device), machine.precision, stage, model, optimizers, scaler)
    weight = sum(batch.weight for batch in batches)

    def gradients() -> dict[str, Tensor]:
        family: str = model.config.family  # type: ignore[assignment, union-attr]
        found: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found |= {name: parameter.grad} if ".lora_" in name else stored_views(family, name, parameter.grad)
        return found

    return Way(
        model,
        backward=lambda: run.backward(batches, weight)["loss"][0] / weight,
        step=lambda: run.optimizer_step(batches, 1.0, False),
        gradients=gradients,
    )


def peer_way(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[Callable[[], Tensor]], machine: Machine,
    transposed: tuple[str, ...] = (),
) -> Way:  # fmt: skip
    """The usual loop. losses: of each micro-batch, which add up to the step's mean. transposed: endings of the names of
    parameters that transformers has the other way round."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if machine.compiled:
        model.compile()

    def backward() -> Tensor:
        total = torch.zeros((), device=machine.device)
        for loss_of in losses:
            with machine.precision.autocast(machine.device):
                loss = loss_of()
            loss.backward()
            total += loss.detach()
        return total

    def step() -> None:
        backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def gradients() -> dict[str, Tensor]:
        return {
            name: parameter.grad.t() if name.endswith(transposed) else parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    return Way(model, backward, step, gradients)


def fused_adamw(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """As transformers' Trainer makes it: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def own_model(folder: Path, machine: Machine) -> nn.Module:
    model = load_pretrained(folder, device=machine.device)
    model.kernels = choose_kernels(["auto"], machine.device, machine.compiled)
    return prepare_model(model, Ranks(0, 1, machine.device), compile_model=machine.compiled)


def transformers_model(kind: str, settings: Any, machine: Machine) -> Any:
    """A model of that class with random weights, the same ones each time; biases too, which it would leave zero."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(machine.device).train()


# ---------------------------------------------------------------------------------------------------------------- GPT-2


def gpt2(shape: Shape, folder: Path, nanogpt: ModuleType | None, machine: Machine) -> dict[str, Way]:
    import transformers

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (shape.examples, shape.length + 1), generator=generator)
    input_ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    settings = transformers.GPT2Config(
        vocab_size=shape.vocabulary, n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
        n_positions=shape.length, activation_function="gelu",  # nanoGPT's
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers_model("GPT2LMHeadModel", settings, machine)
    theirs.save_pretrained(folder)
    positions = torch.arange(shape.length).expand(shape.examples, -1)
    batch = MicroBatch(input_ids, targets, positions, None, targets.numel(), targets.numel())
    no_data: Any = None
    stage = Pretrain(no_data, no_data, no_data, no_data, machine.precision, 0, 0, 0, z_loss=0.0)
    ways = {"ours": own_way(own_model(folder, machine), stage, [batch], WEIGHT_DECAY, machine)}
    x, y = input_ids.to(machine.device), targets.to(machine.device)
    if nanogpt:
        for way in ("nanoGPT", "nanoGPT, fused AdamW"):
            ways[way] = nanogpt_way(nanogpt, shape, theirs, x, y, machine, fused=way.endswith("fused AdamW"))
    loss: Callable[[], Tensor] = lambda: theirs(input_ids=x, labels=y, shift_labels=y).loss  # noqa: E731
    ways["transformers"] = peer_way(theirs, fused_adamw(theirs, WEIGHT_DECAY), [loss], machine)
    return ways


def nanogpt_way(
    nanogpt: ModuleType, shape: Shape, source: nn.Module, x: Tensor, y: Tensor, machine: Machine, *, fused: bool
) -> Way:
    """nanoGPT's GPT with the weights of transformers' model `source`, copied as its own from_pretrained does."""
    sizes = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.hidden}
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it is
        model = nanogpt.GPT(nanogpt.GPTConfig(block_size=shape.length, vocab_size=shape.vocabulary, **sizes))
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, machine.device.type)
    weights = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = "transformer.wte.weight" if name == "lm_head.weight" else name
            parameter.copy_(weights[name].t() if name.endswith(transposed) else weights[name])
    model.to(machine.device).train()
    if fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    return peer_way(model, optimizer, [lambda: model(x, y)[1]], machine, transposed)


def read_nanogpt(folder: Path) -> ModuleType:
    """nanoGPT's model.py as a module. UserError where it is not there."""
    path = folder / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise UserError(f"--nanogpt {folder}: there is no model.py; give a checkout of nanoGPT") from error
    return module


# ----------------------------------------------------------------------------------------------------------------- BERT


def bert(shape: Shape, folder: Path, nanogpt: ModuleType | None, machine: Machine) -> dict[str, Way]:
    import transformers

    settings = transformers.BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.hidden, max_position_embeddings=shape.length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = transformers_model("BertForMaskedLM", settings, machine)
    theirs.save_pretrained(folder)
    texts = texts_of(shape)
    input_ids, labels, seen = (tensor.to(machine.device) for tensor in masked_rows(texts, shape.vocabulary))
    packed = packed_rows(texts, input_ids.cpu(), labels.cpu(), shape.length)
    no_data: Any = None
    stage = MLM(no_data, no_data, no_data, 0, no_data, machine.precision, 0, 0, 0, z_loss=0.0)
    ways = {"ours": own_way(own_model(folder, machine), stage, [packed], WEIGHT_DECAY, machine)}
    loss: Callable[[], Tensor] = lambda: theirs(input_ids=input_ids, attention_mask=seen, labels=labels).loss  # noqa: E731
    ways["transformers"] = peer_way(theirs, fused_adamw(theirs, WEIGHT_DECAY), [loss], machine)
    return ways


def texts_of(shape: Shape) -> list[np.ndarray]:
    """[CLS] … [SEP] of log-normal lengths whose mean is about 60 of 128 tokens; few are as long as a row."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(shape.length * 0.4), 0.6, shape.examples).astype(int), 4, shape.length)
    texts = [rng.integers(NUM_SPECIAL, shape.vocabulary, length) for length in lengths]
    for text in texts:
        text[0], text[-1] = CLS_ID, SEP_ID
    return texts


def masked_rows(texts: list[np.ndarray], vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, labels, attention_mask), (texts, longest) int64 each: a row a text, as transformers' collator pads them."""
    rows = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    special = torch.arange(vocabulary) < NUM_SPECIAL
    masking = Masking(0.15, MASK_ID, ordinary=torch.arange(NUM_SPECIAL, vocabulary), special=special)
    tokens = torch.from_numpy(rows)
    input_ids, labels = mask_tokens(tokens, torch.arange(len(texts)), masking)
    return input_ids, labels, (tokens != 0).long()


def packed_rows(texts: list[np.ndarray], input_ids: Tensor, labels: Tensor, length: int) -> MicroBatch:
    """The masked texts, one behind the other in rows of `length`, as MLM's micro-batch."""
    sequences = [Sequence(text, np.zeros(len(text), bool)) for text in texts]
    groups = [[sequence] for sequence in sequences]
    [batch] = pack(groups, max_length=length, micro_batch_size=len(texts), fixed_width=True)
    assert batch.sequence_ids is not None
    places = (
        batch.sequence_ids.clamp_max(len(texts) - 1),
        batch.positions,
    )  # (B, T) twice: of each token in the rows above
    filler = batch.sequence_ids == len(texts)
    targets = labels[places].masked_fill(filler, IGNORE_INDEX)
    masked = torch.nonzero(targets.flatten() != IGNORE_INDEX).flatten()
    return MicroBatch(
        input_ids[places].masked_fill(filler, 0), targets, batch.positions, batch.cu_seqlens, len(masked),
        batch.num_tokens, columns={MASKED: masked},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- Qwen 2, LoRA


def lora(shape: Shape, folder: Path, nanogpt: ModuleType | None, machine: Machine) -> dict[str, Way]:
    import transformers

    settings = transformers.Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads // 2, intermediate_size=11 * shape.hidden // 4,
        max_position_embeddings=shape.length, tie_word_embeddings=True, use_sliding_window=False,
    )  # fmt: skip
    transformers_model("Qwen2ForCausalLM", settings, machine).save_pretrained(folder)
    ours = finetune.own_model("lora", folder, machine.device, machine.precision, machine.compiled)
    theirs = finetune.peer_model("lora", folder, machine.device, machine.precision)
    draw_adapters(ours)
    draw_adapters(theirs)
    examples = made_up(shape.examples, shape.length, shape.vocabulary)
    nothing: Any = None
    packed = pack_examples([[example] for example in examples], shape.length, shape.examples // 4)
    rows = [batch.to(machine.device) for batch in padded(examples, shape.examples // 4)]
    weight = sum(batch.weight for batch in rows)
    losses: list[Callable[[], Tensor]] = [partial(peft_loss, theirs, batch, weight) for batch in rows]
    return {
        "ours": own_way(ours, SFT(nothing), packed, 0.0, machine),
        "peft": peer_way(theirs, fused_adamw(theirs, 0.0), losses, machine),
    }


def peft_loss(model: nn.Module, batch: MicroBatch, weight: int) -> Tensor:
    """Its share of the step's mean loss, which is over `weight` targets."""
    return finetune.PeerStage(packed=False).loss(model, batch)[0] / weight


def plain_name(name: str) -> str:
    """An adapter's parameter as both libraries could call it: model.layers.0.self_attn.q_proj.lora_A."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """The same values for the same adapter; B is not zero, or A would have no gradient."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(plain_name(name).encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


CASES: dict[str, Callable[[Shape, Path, ModuleType | None, Machine], dict[str, Way]]] = {
    "gpt2": gpt2, "bert": bert, "lora": lora,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- comparing, measuring


def difference(ours: Way, theirs: Way) -> float:
    """The largest relative difference of their losses and of any parameter's gradients. Leaves no gradient behind.

    ValueError where the two do not train the same parameters.
    """
    losses, gradients = [], []
    for way in (ours, theirs):
        losses.append(way.backward().double())
        gradients.append({plain_name(name): gradient.double() for name, gradient in way.gradients().items()})
        way.model.zero_grad(set_to_none=True)
    own, other = gradients
    if own.keys() != other.keys():
        raise ValueError(f"not the same parameters: {sorted(own.keys() ^ other.keys())[:4]}")
    # a gradient that should vanish, such as that of keys' biases, is measured by the largest, not by itself
    largest = max(gradient.norm() for gradient in other.values())
    differences = [
        (own[name] - other[name]).norm() / max(other[name].norm(), 1e-3 * largest) for name in other
    ]  # fmt: skip
    return max(float(value) for value in [*differences, (losses[0] - losses[1]).abs() / losses[1]])


def take_turns(ways: dict[str, Way], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of a step, of each way, in each round after the first ones; another way is first in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(UNTIMED + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            start = time.perf_counter()
            ways[name].step()
            synchronize(device)
            if number >= UNTIMED:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def rows_of(times: dict[str, list[float]], differences: dict[str, float]) -> dict[str, dict]:
    """{way: {step_ms, ratio, quartiles, difference}}; a ratio above one says how many times faster ours is."""
    rows: dict[str, dict] = {}
    for name, measured in times.items():
        rows[name] = {"step_ms": statistics.median(measured)}
        if name != "ours":
            ratios = [theirs / own for theirs, own in zip(measured, times["ours"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows[name] |= {"ratio": middle, "quartiles": [low, high], "difference": differences[name]}
    return rows


def measure(case: str, shape: Shape, nanogpt: ModuleType | None, machine: Machine, rounds: int) -> dict[str, dict]:
    """The rows of a case. UserError where another way computes something else."""
    with tempfile.TemporaryDirectory() as folder:
        ways = CASES[case](shape, Path(folder), nanogpt, machine)
    differences = {name: difference(ways["ours"], way) for name, way in ways.items() if name != "ours"}
    for name, value in differences.items():
        if not value < BOUNDS[machine.precision.dtype]:
            raise UserError(f"{case}: {name} is not what ours computes: loss or gradients differ by {value:.1e}")
    return rows_of(take_turns(ways, rounds, machine.device), differences)


def describe(name: str, row: dict) -> str:
    words = f"{name}: {row['step_ms']:,.0f} ms a step"
    if "ratio" in row:
        low, high = row["quartiles"]
        words += f", {row['ratio']:.2f} times ours (quartiles {low:.2f} to {high:.2f}); "
        words += f"loss and gradients within {row['difference']:.0e}"
    return words


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="bench/families.py", description=__doc__)
    add = parser.add_argument
    add("--case", nargs="+", choices=tuple(CASES), default=list(CASES), help=", ".join(CASES))
    add("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, whose model.py is imported")
    add("--rounds", type=int, default=11, help=f"steps of each way that are timed, after {UNTIMED} that are not")
    add("--compile_model", action="store_true", help="torch.compile for every way")
    add("--out", type=Path, help="folder of families.json (default: bench/results/DEVICE)")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        raise UserError(f"--rounds {args.rounds}: at least 2, so that there are quartiles")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, choose_precision("auto", device), args.compile_model)
    nanogpt = read_nanogpt(args.nanogpt) if args.nanogpt else None
    path = (args.out or ROOT / "bench" / "results" / device_slug(device)) / "families.json"
    results = read_results(path)
    results["environment"] = environment(device)
    for case in args.case:
        try:
            rows = measure(case, SHAPES[case], nanogpt, machine, args.rounds)
        except ImportError as error:
            print(f"{case}: left out: {first_line(error)}")
            continue
        results.setdefault(case, {})["compiled" if args.compile_model else "eager"] = rows
        write_results(path, results)
        for name, row in rows.items():
            print(f"{case}, {describe(name, row)}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
