#!/usr/bin/env python
"""Train a model on shards written by data_prep_tool.py, on one device or many.

  one device            python train.py --data_dir data --preset small
  all GPUs of a machine torchrun --standalone --nproc_per_node=gpu train.py --data_dir data --preset medium
  several machines      torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...
  continue              the same command with --checkpoint latest
  watch                 python utils.py monitor --checkpoint_dir ./checkpoints

The story, top to bottom: read the options, open the data, build the model, print the plan, loop, leave.
"""

import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from arguments import ArgumentParser
from dataprep.shards import Metadata, load_metadata, open_split
from dataprep.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer
from errors import UserError, run_script
from kernels.attention import activate, choose_attention, describe_attention
from kernels.choice import KernelChoice, choose_kernels, describe_kernels
from model import ModelConfig, Transformer
from stages.pretrain import Pretrain
from training import checkpoints
from training.batches import MicroBatch, Windows, open_training_data
from training.config import TrainConfig, add_options, resolve_config
from training.description import describe_run, device_name, git_commit, versions
from training.generation import stream_text
from training.metrics import Clock, RunLog, TrainRow, memory_gb, peak_tflops
from training.optimizers import build_optimizers
from training.parallel import (
    Ranks,
    StopRequest,
    gradient_sync,
    prepare_model,
    settle_gradient_buckets,
    start_ranks,
    stop_ranks,
    unwrap,
)  # fmt: skip
from training.plan import RunPlan, format_plan, model_shape, plan_run
from training.precision import LossScaler, Precision, choose_precision
from training.run_files import read_history
from training.schedule import learning_rate_factor

MAX_BAD_STEPS = 10  # steps in a row without a finite gradient before the run gives up
MAX_FAILED_SAVES = 3
CHECK_INTERVAL = 10  # steps between looks at the device-side count of bad steps, where no log line looks anyway


def main(argv: list[str] | None = None) -> int:
    # ------------------------------------------------------------------------------------------------ options and ranks
    parser = ArgumentParser(description=__doc__)
    add_options(parser)
    given = vars(parser.parse_args(argv))
    first_look, _ = resolve_config(given, validate=False)
    if first_look.checkpoint is None:  # else the checkpoint may still give what is missing
        first_look.validate()
    ranks = start_ranks(first_look.device)
    checkpoints.write_probe(first_look.save_dir)
    lock = checkpoints.lock(first_look.save_dir)
    checkpoints.clean(first_look.save_dir)
    resumed_from, saved = find_checkpoint(first_look)
    config, origins = resolve_config(given, saved.get("options"))
    if config.batch_size < ranks.world_size:
        raise UserError(f"--batch_size {config.batch_size} is smaller than the number of ranks, {ranks.world_size}")
    precision = choose_precision(config.mixed_precision, ranks.device)
    attention = choose_attention(
        config.attention, ranks.device, precision.dtype, head_dim=config.hidden_size // config.num_heads
    )
    activate(attention)
    kernels = choose_kernels(config.kernels, ranks.device, config.compile_model, attention)
    torch.manual_seed(config.seed)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays fp32 under autocast may use TF32

    # ------------------------------------------------------------------------------------------------------------- data
    metadata = [load_metadata(folder) for folder in config.data_dir]
    tokenizer = load_tokenizer(config.data_dir[0])
    vocab_size = check_vocabulary(config, metadata, tokenizer)
    max_length = config.max_length or metadata[0].max_length
    if len(tokenizer.encode(config.sample_prompt)) >= max_length:
        raise UserError(f"--sample_prompt leaves no room in rows of --max_length {max_length} tokens; shorten it")
    stride = config.stride if config.stride is not None else (0 if config.max_length else metadata[0].stride)
    data = open_training_data(
        [open_split(folder, "train") for folder in config.data_dir], config.data_weights,
        max_length=max_length, stride=stride, document_mask=config.document_mask, seed=config.seed,
    )  # fmt: skip
    validation = Windows(open_split(config.data_dir[0], "val"), max_length, 0, config.document_mask)
    # what decides which tokens sample number t is; a resumed run must have the same
    data_order = {
        "fingerprints": [m.fingerprint for m in metadata], "weights": data.weights, "max_length": max_length,
        "stride": stride, "document_mask": config.document_mask, "seed": config.seed,
    }  # fmt: skip
    check_data_order(saved.get("data_order", data_order), data_order, resumed_from)

    # ------------------------------------------------------------------------------------------------ model, optimizers
    model_config = model_shape(config, vocab_size, max_length, tokenizer.eos_token_id)
    raw_model, optimizers = build_model(
        config, model_config, kernels, vocab_size, ranks.device, precision, resumed_from
    )
    scaler = LossScaler(ranks.device, enabled=precision.dtype == torch.float16)
    if resumed_from:
        scaler.load(saved["scaler"])
        if saved["world_size"] == ranks.world_size:
            checkpoints.set_rng_state(saved["rng"][ranks.rank])
    model = prepare_model(raw_model, ranks, compile_model=config.compile_model)

    # ------------------------------------------------------------------------------------------------------------- plan
    plan = plan_run(
        config, model_config, max_length=max_length, world_size=ranks.world_size,
        half_precision=precision.dtype != torch.float32, train_windows=sum(map(len, data.sources)),
    )  # fmt: skip
    peak = config.peak_tflops or peak_tflops(ranks.device, precision.dtype)
    described_attention = describe_attention(attention, ranks.device, precision.dtype, head_dim=model_config.head_dim)
    start_step = saved.get("step", 0)
    log = RunLog(config.save_dir, is_main=ranks.is_main, max_steps=config.max_steps, start_step=start_step)
    log.say(
        format_plan(plan, config, model_config, {
            "precision": precision.reason,
            "kernels": describe_kernels(kernels, ranks.device, config.compile_model),
            "attention": described_attention,
            "device": f"{device_name(ranks.device)} x {ranks.world_size}",
            "peak TFLOP/s": f"{peak:g}" if peak else "unknown device, so mfu is n/a; pass --peak_tflops",
        })
    )  # fmt: skip
    table = {**dataclasses.asdict(kernels), "attention": described_attention}
    log.start(describe_run(config, origins, plan, ranks, precision, data_order, table))
    log.event(start_step, *(("resume", f"resumed from {resumed_from}") if resumed_from else ("start", "started")))
    stage = Pretrain(
        data=data, validation=validation, token_bytes=tokenizer.token_byte_lengths(), ranks=ranks, precision=precision,
        batch_size=config.batch_size, micro_batch_size=plan.micro_batch_size, eval_tokens=config.eval_tokens,
        z_loss=config.z_loss,
    )  # fmt: skip
    run = Run(config, plan, peak, ranks, precision, log, stage, model, optimizers, scaler, tokenizer, data_order)
    run.step, run.samples = start_step, saved.get("samples_consumed", 0)

    # ------------------------------------------------------------------------------------------------------------ train
    stop = StopRequest()
    try:
        loop(run, stop)
    except torch.OutOfMemoryError as error:
        log.status("failed", run.step, "out of memory")
        raise UserError(
            f"{ranks.device} ran out of memory at step {run.step} with micro-batches of {plan.micro_batch_size}; lower "
            "--micro_batch_size (the batch, and so the result, stays the same) and go on with --checkpoint latest"
        ) from error
    except BaseException as error:
        log.status("failed", run.step, str(error))
        raise

    # ------------------------------------------------------------------------------------------------------------ leave
    finished = run.step >= config.max_steps
    if run.step > start_step:
        event, words = ("finish", "finished") if finished else ("stop", f"stopped by {stop.signal.name}")
        log.event(run.step, event, f"{words} at step {run.step:,}; {next_command(config, finished)}")
    log.status("finished" if finished else "stopped", run.step)
    log.close()
    lock.close()
    exit_code = 0 if finished else 128 + stop.signal
    stop_ranks(ranks, exit_code)
    return exit_code


def build_model(
    config: TrainConfig, shape: ModelConfig, kernels: KernelChoice, vocab_size: int, device: torch.device,
    precision: Precision, checkpoint: Path | None,
) -> tuple[Transformer, list[torch.optim.Optimizer]]:  # fmt: skip
    """The model and its optimizers, drawn from the seed or loaded from `checkpoint`."""
    with torch.device("meta"):  # no memory is touched twice, however large the model
        model = Transformer(shape, kernels)
    model.to_empty(device=device)
    if checkpoint:
        checkpoints.load_model(checkpoint, model)
    else:
        model.init_weights(config.seed, zero_residual=config.optimizer == "muon", num_real_tokens=vocab_size)
    optimizers = build_optimizers(
        model, name=config.optimizer, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        beta1=config.beta1, beta2=config.beta2,
        muon_dtype=torch.bfloat16 if precision.dtype == torch.bfloat16 else torch.float32,
    )  # fmt: skip
    if checkpoint:
        checkpoints.load_optimizers(checkpoint, model, optimizers)
    return model, optimizers


def loop(run: "Run", stop: StopRequest) -> None:
    """Train from run.step to --max_steps, or until a rank was asked to stop; that step is finished and saved first."""
    config, log = run.config, run.log
    if run.step >= config.max_steps:
        return log.event(
            run.step, "finish", f"nothing to do: the run is at step {run.step} of --max_steps {config.max_steps}"
        )
    batches = run.stage.batches(run.samples)
    first = next(batches)
    settle_gradient_buckets(run.model, lambda: run.backward(first, total_weight=1.0))
    clock = Clock()
    start_step = run.step
    for step, micro_batches in zip(
        range(start_step, config.max_steps), clock.timed(chain([first], batches)), strict=False
    ):
        log.status("compiling" if config.compile_model and step == start_step else "training", step)
        lr_factor = learning_rate_factor(
            step, max_steps=config.max_steps, warmup_steps=config.resolved_warmup_steps, schedule=config.schedule,
            decay_fraction=config.decay_fraction, min_factor=config.min_lr_fraction,
        )  # fmt: skip
        metrics, grad_norm, stopping = run.optimizer_step(micro_batches, lr_factor, stop.signal is not None)
        clock.steps += 1
        done, last = step + 1, step + 1 == config.max_steps
        log.live(done)

        to_log = done % config.log_interval == 0 or last or stopping
        if to_log:
            figures = reduce_metrics(metrics, run.ranks)  # waits for the device: the clock is right from here
            log.train(train_row(run, figures["loss"], lr_factor, grad_norm, clock))
            clock.restart()
        if to_log or done % CHECK_INTERVAL == 0:
            run.give_up_if_diverged(done)
        with clock.paused():
            if last or stopping or done % config.resolved_save_interval == 0:
                run.save(done)  # before evaluating: an evaluation that fails must not cost the steps before it
            if last or (config.eval_interval and done % config.eval_interval == 0 and not stopping):
                run.evaluate(done, last)
        if stopping:
            break


@dataclass
class Run:
    """What the loop works on, and the three things it does with it: a step, a checkpoint, an evaluation."""

    config: TrainConfig
    plan: RunPlan
    peak_tflops: float | None  # of one device, None where it is not known
    ranks: Ranks
    precision: Precision
    log: RunLog
    stage: Pretrain
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: LossScaler
    tokenizer: Tokenizer
    data_order: dict
    step: int = 0
    samples: int = 0  # consumed so far: the run's position in the data
    failed_saves: int = 0
    best_loss: float | None = None
    bad_steps: Tensor = field(init=False)  # in a row, counted on the device

    def __post_init__(self) -> None:
        self.bad_steps = torch.zeros((), device=self.ranks.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def backward(self, micro_batches: list[MicroBatch], total_weight: float) -> dict[str, tuple[Tensor, float]]:
        """Forward and backward over this rank's micro-batches; gradients become those of Σ loss / total_weight over all ranks."""
        sums: dict[str, tuple[Tensor, float]] = {}
        for index, batch in enumerate(micro_batches):
            with gradient_sync(self.model, enabled=index == len(micro_batches) - 1):
                with self.precision.autocast(self.ranks.device):
                    loss, metrics = self.stage.loss(self.model, batch.to(self.ranks.device))
                # DDP averages over ranks; the mean wanted is over tokens, so its division is undone
                (loss * (self.scaler.scale * (self.ranks.world_size / total_weight))).backward()
            for name, (value, weight) in metrics.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + value, before[1] + weight)
        return sums

    def optimizer_step(
        self, micro_batches: list[MicroBatch], lr_factor: float, stop_here: bool
    ) -> tuple[dict[str, tuple[Tensor, float]], Tensor, bool]:
        """One step on the global batch. Returns (metric sums of this rank, gradient norm, whether any rank wants to stop)."""
        weight = float(sum(batch.weight for batch in micro_batches))
        total_weight, stops = self.ranks.sum([weight, float(stop_here)])
        metrics = self.backward(micro_batches, max(1.0, total_weight))

        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.enabled:
            torch._foreach_mul_(gradients, 1.0 / self.scaler.scale)
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, grad_norm)
        # a step without a finite gradient is left out on the device: weights and optimizer state keep their bits
        finite = torch.isfinite(grad_norm)
        for optimizer in self.optimizers:
            optimizer.found_inf = (~finite).float()
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update(finite)
        self.bad_steps = torch.where(finite, 0.0, self.bad_steps + 1)
        self.step += 1
        self.samples += self.config.batch_size
        return metrics, grad_norm, stops > 0

    def give_up_if_diverged(self, step: int) -> None:
        bad = int(self.bad_steps.item())
        if bad and not self.scaler.enabled:
            self.log.event(
                step,
                "nan",
                f"step {step:,}: the gradient is not finite ({bad} steps in a row); the update was left out",
            )
        if bad >= MAX_BAD_STEPS * (4 if self.scaler.enabled else 1):  # the scaler needs some steps to find its scale
            self.log.status("failed", step, f"no finite gradient for {bad} steps")
            raise UserError(
                f"the loss or its gradient has not been finite for {bad} steps in a row, up to step {step}; the weights are "
                f"those from before, and the checkpoints in {self.config.save_dir} are whole: go on from one with "
                "--checkpoint latest and a lower --learning_rate, or look at the data of these steps"
            )

    def save(self, step: int) -> None:
        self.log.status("saving", step)
        state = {
            "options": dataclasses.asdict(self.config),
            "samples_consumed": self.samples,
            "data_order": self.data_order,
            "scaler": self.scaler.state(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        folder = Path(self.config.data_dir[0])
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
        result = checkpoints.save(
            self.config.save_dir, step, model=self.model, optimizers=self.optimizers, state=state, files=files,
            keep_checkpoints=self.config.keep_checkpoints,
        )  # fmt: skip
        if result.ok:
            self.failed_saves = 0
            self.log.event(step, "save", f"saved {result.path}" + (f" ({result.message})" if result.message else ""))
            return
        self.failed_saves += 1
        self.log.event(
            step, "alert", f"step {step:,} could not be saved: {result.message}; earlier checkpoints are untouched"
        )
        if self.failed_saves >= MAX_FAILED_SAVES or step == self.config.max_steps:
            self.log.status("failed", step, result.message)
            raise UserError(f"step {step} could not be saved to {self.config.save_dir}: {result.message}")

    def evaluate(self, step: int, last: bool) -> None:
        """Validation figures over all ranks, then, on the first, a sample of text and the plot of the run so far."""
        if self.stage.validation.split.num_tokens > 1:
            self.log.status("evaluating", step)
            start = time.perf_counter()
            figures = self.stage.evaluate(self.model, everything=last)
            self.log.evaluation(step, time.perf_counter() - start, figures)
            self.mark_if_best(step, figures["val_loss"])
        if not self.ranks.is_main:
            return
        if self.config.sample_prompt:
            self.log.status("sampling", step)
            text = stream_text(
                unwrap(self.model), self.tokenizer, self.config.sample_prompt,
                max_new_tokens=self.config.sample_tokens, temperature=0.8, top_k=50, top_p=0.95, seed=self.config.seed,
            )  # fmt: skip
            self.log.sample(step, self.config.sample_prompt, "".join(text))
        from training.plots import (
            plot_runs,  # here: matplotlib takes seconds to import, and a short run may draw nothing
        )

        plot_runs([read_history(self.config.save_dir)], Path(self.config.save_dir) / "curves.png")

    def mark_if_best(self, step: int, loss: float) -> None:
        """Point `best` at this step's checkpoint if no evaluation of this run was lower. Every rank calls it."""
        is_best = False
        if self.ranks.is_main:
            if self.best_loss is None:  # of an earlier part of this run; the row of this step is already among them
                earlier = [row["val_loss"] for row in read_history(self.config.save_dir).evals if row["step"] != step]
                self.best_loss = min((value for value in earlier if value is not None), default=math.inf)
            checkpoint = Path(self.config.save_dir) / f"checkpoint_step_{step}"
            is_best = loss < self.best_loss and checkpoint.is_dir()
        if self.ranks.sum([float(is_best)])[0]:
            self.best_loss = loss
            checkpoints.mark_best(self.config.save_dir, Path(self.config.save_dir) / f"checkpoint_step_{step}")


def find_checkpoint(config: TrainConfig) -> tuple[Path | None, dict]:
    """(the checkpoint to resume from or None, its saved state). A worker that torchrun restarted resumes by itself."""
    which = config.checkpoint
    if which is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        which = "latest"
    if which is None:
        if existing := checkpoints.list_checkpoints(config.save_dir):
            raise UserError(
                f"--save_dir {config.save_dir} already holds a run at step {existing[-1][0]}: continue it with "
                "--checkpoint latest, or choose another --save_dir"
            )
        return None, {}
    found = checkpoints.resolve(which, config.save_dir)
    for path, reason in found.skipped:
        print(f"warning: skipped {path}: {reason}", file=sys.stderr)
    if found.path is None:
        if found.skipped:
            raise UserError(f"no checkpoint in {config.save_dir} is whole; to start anew choose another --save_dir")
        print(f"no checkpoint in {config.save_dir} yet: starting at step 0", file=sys.stderr)
        return None, {}
    state = checkpoints.load_state(found.path)
    newer = [path for step, path in checkpoints.list_checkpoints(config.save_dir) if step > state["step"]]
    if set(newer) - {path for path, _ in found.skipped}:
        raise UserError(
            f"--save_dir {config.save_dir} holds {newer[-1].name}, which is newer than {found.path}: to go on from an "
            "earlier step choose another --save_dir"
        )
    return found.path, state


def check_vocabulary(config: TrainConfig, metadata: list[Metadata], tokenizer: Tokenizer) -> int:
    """The number of token ids. UserError where the flag, the tokenizer and the shards do not agree."""
    for folder, data in zip(config.data_dir, metadata, strict=True):
        if data.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"the shards in {folder} were made with the tokenizer {data.tokenizer.sha256[:12]}, and "
                f"{config.data_dir[0]}/tokenizer.json is {tokenizer.sha256[:12]}; prepare the data with one tokenizer"
            )
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"--vocab_size {config.vocab_size} is not the tokenizer's in {config.data_dir[0]}, which has "
            f"{tokenizer.vocab_size}; leave --vocab_size out to use the tokenizer's"
        )
    return tokenizer.vocab_size


def check_data_order(saved: dict, now: dict, checkpoint: Path | None) -> None:
    """UserError when a resumed run would see other samples than the run it continues."""
    flags = {"fingerprints": "--data_dir", "weights": "--data_weights"}
    for name, value in now.items():
        if saved.get(name) != value:
            raise UserError(
                f"{checkpoint} was trained with {flags.get(name, '--' + name)} {saved.get(name)}, this run has {value}; "
                "give the same data and options, or start a new run in another --save_dir"
            )


def reduce_metrics(metrics: dict[str, tuple[Tensor, float]], ranks: Ranks) -> dict[str, float]:
    """{metric: mean over all ranks} from each rank's (sum, weight)."""
    flat = [float(part) for name in sorted(metrics) for part in metrics[name]]
    total = ranks.sum(flat)
    return {name: total[2 * i] / max(1.0, total[2 * i + 1]) for i, name in enumerate(sorted(metrics))}


def train_row(run: Run, loss: float, lr_factor: float, grad_norm: Tensor, clock: Clock) -> TrainRow:
    plan, seconds = run.plan, clock.seconds_per_step()
    rate = plan.tokens_per_step / seconds
    used, reserved = memory_gb(run.ranks.device)
    useful = rate / plan.world_size * plan.flops_per_token  # FLOP/s of one device
    return TrainRow(
        step=run.step,
        loss=loss,
        lr=run.config.learning_rate * lr_factor,
        grad_norm=grad_norm.item(),
        tok_s=rate,
        tok_s_gpu=rate / plan.world_size,
        mfu=useful / (run.peak_tflops * 1e12) if run.peak_tflops else None,
        dt=seconds,
        data_wait=clock.data_wait(),
        tokens=run.samples * (plan.tokens_per_step // run.config.batch_size),
        epoch=run.stage.data.epoch(run.samples),
        scaler=run.scaler.scale.item() if run.scaler.enabled else None,
        mem_gb=used,
        mem_reserved_gb=reserved,
    )


def next_command(config: TrainConfig, finished: bool) -> str:
    if finished:
        prompt = config.sample_prompt.strip() or "Hello"
        return f"try: python utils.py generate --checkpoint {config.save_dir} --prompt {prompt!r}"
    return f"go on with: python train.py --save_dir {config.save_dir} --checkpoint latest"


if __name__ == "__main__":
    run_script(main)
