#!/usr/bin/env python
"""Train a model on shards written by data_prep_tool.py, on one device or many.

  one device            python train.py --data_dir data --preset small
  all GPUs of a machine torchrun --standalone --nproc_per_node=gpu train.py --data_dir data --preset medium
  several machines      torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...
  several stages        python train.py --config plan.toml, a file with [[stages]]: see training/stage_plan.py
  continue              the same command with --checkpoint latest
  watch                 python utils.py monitor --checkpoint_dir ./checkpoints

The story, top to bottom: read the options, open the data, build the model, print the plan, loop, leave.
"""

import argparse
import dataclasses
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arguments import ArgumentParser
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError, run_script
from kernels.attention import activate, choose_attention, describe_attention
from kernels.choice import choose_kernels, describe_kernels
from stages.build import Stage, StageData, build_stage, open_stage_data
from stages.ppo import PPO
from tools import merge
from training import checkpoints
from training.batches import MicroBatch
from training.config import TrainConfig, add_options, resolve_config
from training.description import describe_run, device_name, git_commit, versions
from training.generation import stream_text
from training.loading import build_model, checkpoint_parts, find_base, make_optimizers, read_shape
from training.metrics import Clock, RunLog, TrainRow, memory_gb, peak_tflops
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
from training.save_folder import from_rank_0, read_json
from training.schedule import learning_rate_factor
from training.stage_plan import PlannedStage, check_plan, finished_checkpoint, read_plan

MAX_BAD_STEPS = 10  # steps in a row without a finite gradient before the run gives up
MAX_FAILED_SAVES = 3
CHECK_INTERVAL = 10  # steps between looks at the device-side count of bad steps, where no log line looks anyway


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add_options(parser)
    given = vars(parser.parse_args(argv))
    stages = read_plan(given["config"]) if "config" in given else []
    first_look, _ = resolve_config(stages[0].given(given) if stages else given, validate=False)
    if stages:
        check_plan(stages, given)
    elif first_look.checkpoint is None:  # else the checkpoint may still give what is missing
        first_look.validate()
    ranks = start_ranks(first_look.device)
    if stages:
        exit_code = run_plan(stages, given, first_look, ranks)
    else:
        finished, stop = run_stage(given, ranks)
        exit_code = 0 if finished else 128 + agreed_signal(stop, ranks)
    stop_ranks(ranks, exit_code)
    return exit_code


def run_stage(
    given: dict[str, Any], ranks: Ranks, from_file: Collection[str] | None = None
) -> tuple[bool, StopRequest]:
    """Train as `given` says. Returns whether --max_steps is reached, and the signals that were received until then.

    from_file: of a stage of a plan, the options in `given` that come from its file and not from the command line.
    """
    # ---------------------------------------------------------------------------------------------------------- options
    first_look, _ = resolve_config(given, validate=False)
    checkpoints.write_probe(first_look.save_dir)
    lock = checkpoints.lock(first_look.save_dir)
    checkpoints.clean(first_look.save_dir)
    resumed_from, saved = find_checkpoint(first_look)
    config, origins = resolve_config(given, saved.get("options"))
    origins |= dict.fromkeys(from_file or (), "config file")
    if config.batch_size < ranks.world_size:
        raise UserError(f"--batch_size {config.batch_size} is smaller than the number of ranks, {ranks.world_size}")
    precision = choose_precision(config.mixed_precision, ranks.device)
    base = find_base(config.init_from) if config.init_from else None
    base_shape = read_shape(base) if base else None
    head_dim = base_shape.head_dim if base_shape else config.hidden_size // config.num_heads
    attention = choose_attention(config.attention, ranks.device, precision.dtype, head_dim=head_dim)
    activate(attention)
    kernels = choose_kernels(config.kernels, ranks.device, config.compile_model, attention)
    torch.manual_seed(config.seed)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays fp32 under autocast may use TF32

    # ------------------------------------------------------------------------------------------------------------- data
    data = open_stage_data(config, base, base_shape and base_shape.max_position_embeddings)
    check_data_order(saved.get("data_order", data.order), data.order, resumed_from)
    if config.stage != "pretrain" and origins["max_steps"] == "default":
        epochs = config.num_epochs or (3.0 if config.stage == "sft" else 1.0)
        phases = math.ceil(epochs * data.num_samples / (config.batch_size * config.num_minibatches))
        config = dataclasses.replace(config, max_steps=phases * config.steps_per_phase)

    # ------------------------------------------------------------------------------------------------ model, optimizers
    tokenizer = data.tokenizer
    shape = base_shape or model_shape(config, tokenizer.vocab_size, data.max_length, tokenizer.eos_token_id)
    raw_model = build_model(
        config, shape, base, resumed_from, kernels=kernels, num_real_tokens=tokenizer.vocab_size, device=ranks.device,
        precision=precision,
    )  # fmt: skip
    optimizers = make_optimizers(config, raw_model, resumed_from, precision)
    scaler = LossScaler(ranks.device, enabled=precision.dtype == torch.float16)
    if resumed_from:
        scaler.load(saved["scaler"])
        if saved["world_size"] == ranks.world_size:
            checkpoints.set_rng_state(saved["rng"][ranks.rank])
    model = prepare_model(raw_model, ranks, compile_model=config.compile_model)

    # ------------------------------------------------------------------------------------------------------------- plan
    plan = plan_run(
        config, shape, max_length=data.max_length, world_size=ranks.world_size,
        half_precision=precision.dtype != torch.float32, train_windows=data.num_samples,
    )  # fmt: skip
    peak = config.peak_tflops or peak_tflops(ranks.device, precision.dtype)
    described_attention = describe_attention(attention, ranks.device, precision.dtype, head_dim=shape.head_dim)
    start_step = saved.get("step", 0)
    log = RunLog(config.save_dir, is_main=ranks.is_main, max_steps=config.max_steps, start_step=start_step)
    log.say(
        format_plan(plan, config, shape, {
            "precision": precision.reason,
            "kernels": describe_kernels(kernels, ranks.device, config.compile_model),
            "attention": described_attention,
            "device": f"{device_name(ranks.device)} x {ranks.world_size}",
            "peak TFLOP/s": f"{peak:g}" if peak else "unknown device, so mfu is n/a; pass --peak_tflops",
        })
    )  # fmt: skip
    for sentence in data.report:
        log.say(sentence)
    table = {**dataclasses.asdict(kernels), "attention": described_attention}
    log.start(describe_run(config, origins, plan, ranks, precision, data.order, table))
    log.event(start_step, *(("resume", f"resumed from {resumed_from}") if resumed_from else ("start", "started")))
    stage = build_stage(config, data, model, ranks, precision, plan.micro_batch_size)
    run = Run(config, plan, peak, ranks, precision, log, stage, model, optimizers, scaler, data)
    run.step, run.samples = start_step, saved.get("samples_consumed", 0)
    if isinstance(stage, PPO) and resumed_from:
        stage.load_state(saved["stage"])
    run.tokens = saved.get("tokens_consumed", run.samples * data.max_length)

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
        received = agreed_signal(stop, ranks)
        event, words = ("finish", "finished") if finished else ("stop", f"stopped by {received.name}")
        advice = next_command(config, finished, in_plan=from_file is not None)
        log.event(run.step, event, f"{words} at step {run.step:,}; {advice}")
    log.status("finished" if finished else "stopped", run.step)
    log.close()
    lock.close()
    return finished, stop


def run_plan(stages: list[PlannedStage], flags: dict[str, Any], shared: TrainConfig, ranks: Ranks) -> int:
    """Run the stages one after another, each in its folder below --save_dir and from what came before; the exit code.

    With --checkpoint latest the finished ones are left as they are. A signal stops the plan: the next stage is not begun.
    """
    root = Path(shared.save_dir)
    resuming = shared.checkpoint == "latest" or was_restarted()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    before: dict[str, Any] | None = None  # what the last stage that gave a language model was given
    checkpoints.write_probe(root)
    with checkpoints.lock(root):
        for stage in stages:
            given = stage.given(flags) | {"save_dir": str(root / stage.folder)}
            follows = before is not None and "init_from" not in given
            if follows:
                given["init_from"] = str(language_model_of(before))
            done = finished_checkpoint(given, follows) if resuming else None
            if ranks.is_main:
                print(f"{stage.title}: " + (f"finished already, {done}" if done else given["save_dir"]), flush=True)
            if done is None:
                finished, stop = run_stage(given, ranks, from_file=given.keys() - flags.keys())
                for number, handler in handlers.items():
                    signal.signal(number, handler)  # while the next stage is set up, a signal ends the process
                received = agreed_signal(stop, ranks)
                if received and not (finished and stage is stages[-1]):
                    return 128 + received
                release_memory(ranks.device, compiled=given.get("compile_model", False))
            if stage.gives_language_model:
                before = given
    return 0


def release_memory(device: torch.device, compiled: bool) -> None:
    """Give back what a finished stage leaves behind: models in cycles of references, and code compiled for them."""
    gc.collect()
    if compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def language_model_of(given: dict[str, Any]) -> Path:
    """What a finished stage leaves: its newest checkpoint, or, of adapters, what they make of their base, in merged/.

    Every rank calls it; rank 0 merges. Raises UserError.
    """
    save_dir = Path(given["save_dir"])
    checkpoint = checkpoints.resolve(save_dir, save_dir).path
    if not (checkpoint / checkpoints.ADAPTER_CONFIG).exists():
        return checkpoint
    base, merged = find_base(given["init_from"]), save_dir / "merged"
    checkpoints.clean(save_dir)  # of a merge that was cut short

    def make() -> None:
        if not merged.exists():
            merge.main(argparse.Namespace(base=base, adapter=checkpoint, output=merged, dtype=None, merge_into="auto"))
        elif (made_of := Path(read_json(merged / merge.RECORD)["adapter"]["folder"]).name) != checkpoint.name:
            raise UserError(
                f"{merged} was made of {made_of}, and {save_dir} has gone on to {checkpoint.name}: remove {merged} and the "
                "folders of the stages that started from it, or run the plan in another --save_dir"
            )

    from_rank_0(make)
    return merged


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
    start_step, save_due = run.step, False
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
        clock.tokens += run.step_tokens
        done, last = step + 1, step + 1 == config.max_steps
        # rollouts are drawn with the weights at the start of their phase, so only there can a run be gone on from exactly
        save_due |= done % config.resolved_save_interval == 0
        between_phases = done % config.steps_per_phase == 0
        stopping &= between_phases
        log.live(done)

        to_log = done % config.log_interval == 0 or last or stopping
        if to_log:
            figures = reduce_metrics(metrics, run.ranks)  # waits for the device: the clock is right from here
            log.train(train_row(run, figures, lr_factor, grad_norm, clock))
            clock.restart()
        if to_log or done % CHECK_INTERVAL == 0:
            run.give_up_if_diverged(done)
        with clock.paused():
            if last or stopping or (save_due and between_phases):
                run.save(done)  # before evaluating: an evaluation that fails must not cost the steps before it
                save_due = False
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
    stage: Stage
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: LossScaler
    data: StageData
    step: int = 0
    samples: int = 0  # consumed so far: the run's position in the data
    tokens: int = 0
    step_tokens: int = 0  # of the last step, over all ranks
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
        weight, tokens = (float(sum(getattr(b, name) for b in micro_batches)) for name in ("weight", "num_tokens"))
        total_weight, tokens, stops = self.ranks.sum([weight, tokens, float(stop_here)])
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
        self.step_tokens = int(tokens)
        self.tokens += self.step_tokens
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
            "tokens_consumed": self.tokens,
            "data_order": self.data.order,
            "scaler": self.scaler.state(),
            "stage": self.stage.state() if isinstance(self.stage, PPO) else {},
            "versions": versions(),
            "git_commit": git_commit(),
        }
        folder = self.data.tokenizer_folder
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
        files |= self.data.files
        result = checkpoints.save(
            self.config.save_dir, step, model=self.model, optimizers=self.optimizers, state=state, files=files,
            keep_checkpoints=self.config.keep_checkpoints,
            **checkpoint_parts(self.config, self.model, self.data.tokenizer_folder if self.config.lora else None),
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
        self.log.status("evaluating", step)
        start = time.perf_counter()
        if figures := self.stage.evaluate(self.model, everything=last):
            self.log.evaluation(step, time.perf_counter() - start, figures)
            self.mark_if_best(step, figures["val_loss"])
        if not self.ranks.is_main:
            return
        if self.config.sample_prompt:
            self.log.status("sampling", step)
            inner = unwrap(self.model)
            text = stream_text(
                getattr(inner, "policy", inner), self.data.tokenizer, self.config.sample_prompt,
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
    if which is None and was_restarted():
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


def was_restarted() -> bool:
    """Whether torchrun has started this worker again after a crash."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def agreed_signal(stop: StopRequest, ranks: Ranks) -> signal.Signals | None:
    """The signal that a rank was sent, the same one on all of them; None without one. Every rank calls it."""
    received = ranks.sum([float(stop.signal or 0) * (rank == ranks.rank) for rank in range(ranks.world_size)])
    return signal.Signals(int(max(received))) if any(received) else None


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
    sums = {name: (total[2 * i], total[2 * i + 1]) for i, name in enumerate(sorted(metrics))}
    # a figure that no example of the step has, such as that of rejected answers, is left out; the loss is always there
    return {name: value / max(1.0, weight) for name, (value, weight) in sums.items() if weight or name == "loss"}


def train_row(run: Run, figures: dict[str, float], lr_factor: float, grad_norm: Tensor, clock: Clock) -> TrainRow:
    plan, seconds = run.plan, clock.seconds_per_step()
    rate = clock.tokens / max(1, clock.steps) / seconds
    used, reserved = memory_gb(run.ranks.device)
    useful = rate / plan.world_size * plan.flops_per_token  # FLOP/s of one device
    return TrainRow(
        step=run.step,
        loss=figures["loss"],
        lr=run.config.learning_rate * lr_factor,
        grad_norm=grad_norm.item(),
        tok_s=rate,
        tok_s_gpu=rate / plan.world_size,
        mfu=useful / (run.peak_tflops * 1e12) if run.peak_tflops else None,
        dt=seconds,
        data_wait=clock.data_wait(),
        tokens=run.tokens,
        epoch=run.stage.epoch(run.samples),
        figures={name: value for name, value in figures.items() if name != "loss"},
        scaler=run.scaler.scale.item() if run.scaler.enabled else None,
        mem_gb=used,
        mem_reserved_gb=reserved,
    )


def next_command(config: TrainConfig, finished: bool, in_plan: bool) -> str:
    if finished:
        prompt = config.sample_prompt.strip() or "Hello"
        if config.stage == "pretrain":
            return f"try: python utils.py generate --checkpoint {config.save_dir} --prompt {prompt!r}"
        if config.stage == "reward":
            return f"give it to --stage ppo or grpo as --reward_model {config.save_dir}"
        return f"try: python utils.py chat --checkpoint {config.save_dir}"
    if in_plan:
        return "go on with the same command and --checkpoint latest"
    return f"go on with: python train.py --save_dir {config.save_dir} --checkpoint latest"


if __name__ == "__main__":
    run_script(main)
