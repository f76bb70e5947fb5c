#!/usr/bin/env python
"""Train a model on shards written by data_prep_tool.py, on one device or many.

  one device            python train.py --data_dir data --preset small
  all GPUs of a machine torchrun --standalone --nproc_per_node=gpu train.py --data_dir data --preset medium
  several machines      torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...
  several stages        python train.py --config plan.toml, a file with [[stages]]: see training/stage_plan.py
  continue              the same command with --checkpoint latest
  watch                 python utils.py monitor --checkpoint_dir ./checkpoints

The story, top to bottom: read the options, open the data, print the plan, build the model, loop, leave.
"""

import dataclasses
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arguments import ArgumentParser
from batches.ahead import made_ahead
from batches.micro_batch import MicroBatch
from checkpointing import save_folder
from checkpointing.tensors import set_rng_state
from errors import UserError, run_script
from generation.sampling import stream_text
from kernels.attention_backends import describe_attention
from layers import use_fp8
from ranks import Ranks, start_ranks, stop_ranks, unwrap
from sharding import ZERO, alike, gathered, norm_of_all, padded
from stages.build import Stage, StageData, build_stage, can_be_ahead, open_stage_data
from stages.classify import Classify
from stages.custom_loss import choose_loss
from stages.grpo import GRPO
from stages.ppo import PPO
from tools.run_plan import release_memory, run_plan
from training.averages import Ema, figures_of_both, with_weights_to_use
from training.config import TrainConfig, add_options, of_launcher, resolve_config
from training.description import describe_run, next_command
from training.failures import followed, give_up_if_diverged
from training.garbage import collect_garbage
from training.hooks import Hooks, load_hooks
from training.loading import build_model, make_ema, make_optimizers, read_base_shape, reward_adapter
from training.metrics import Clock, Metrics, RunLog, peak_tflops, reduce_metrics, train_row
from training.micro_batches import backward_that_fits, defers_sync, settle_size, tried
from training.numerics import choose_numerics, machine_lines
from training.parallel import (
    StopRequest,
    gradient_sync,
    grouped,
    loss_of,
    prepare_model,
    settle_gradient_buckets,
    sharding_of,
)
from training.plan import RunPlan, example_sizes, format_plan, plan_run, shape_of
from training.precision import LossScaler, Precision
from training.profile import StepProfile
from training.replicas import check_replicas
from training.resume import check_data_order, find_checkpoint
from training.saving import Saves
from training.spike_guard import GoBack, Skipped, SpikeGuard, batches_from, go_on_without, make_guard, position
from training.stage_plan import check_plan, read_as, read_plan
from training.standing import Pins, stand_on

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
        resolve_config(given)
    ranks = start_ranks(first_look.device, first_look.timeout)
    if "config" in given and ranks.is_main:
        for line in read_as(given["config"], given.get("stage")):
            print(line, flush=True)
    if stages:
        exit_code = run_plan(stages, given, first_look, ranks, run_stage)
    else:
        finished, stop = run_stage(given, ranks)
        exit_code = 0 if finished else 128 + stop.received_by_any(ranks)
    stop_ranks(ranks, exit_code)
    return exit_code


def run_stage(
    given: dict[str, Any], ranks: Ranks, from_file: Collection[str] | None = None
) -> tuple[bool, StopRequest]:
    """Train as `given` says. Returns whether --max_steps or --hooks ended it, and the signals that were received until then.

    from_file: of a stage of a plan, the options in `given` that come from its file and not from the command line.
    """
    save_dir = resolve_config(given, validate=False)[0].save_dir
    save_folder.write_probe(save_dir)
    with save_folder.lock(save_dir):
        save_folder.clean(save_dir)
        run, stop = build_run(given, ranks, from_file), StopRequest()
        start_step = run.step
        while back := followed(loop, run, stop):
            del run  # before another one needs its memory
            release_memory(ranks.device, compiled=False)
            run = build_run(given | {"checkpoint": str(back.checkpoint)}, ranks, from_file)
            go_on_without(run, back)
        finished = run.step >= run.config.max_steps or run.hooks.stop
        if run.step > start_step or run.hooks.stop:
            words = "ended by --hooks" if run.hooks.stop else "finished"
            words = words if finished else f"stopped by {stop.received_by_any(ranks).name}"
            advice = next_command(run.config, finished, in_plan=from_file is not None)
            run.log.event(run.step, "finish" if finished else "stop", f"{words} at step {run.step:,}; {advice}")
        run.log.status("finished" if finished else "stopped", run.step)
        run.log.close()
    return finished, stop


def build_run(given: dict[str, Any], ranks: Ranks, from_file: Collection[str] | None) -> "Run":
    """Everything that the loop needs, checked and announced, at step 0 or where a checkpoint left off."""
    # ---------------------------------------------------------------------------------------------------------- options
    resumed_from, saved = find_checkpoint(resolve_config(given, validate=False)[0], ranks.restarted)
    config, origins = resolve_config(given, saved.get("options"), in_plan=from_file is not None)
    origins |= dict.fromkeys(from_file or (), "config file")
    ranks = grouped(ranks, config)
    config, pins, said = stand_on(config, saved, resumed_from)
    hooks = load_hooks(config, saved.get("hooks", {}))
    base = Path(config.init_from) if config.init_from else None
    base_shape = read_base_shape(config, base) if base else None
    precision, kernels = choose_numerics(config, base_shape, ranks.device)
    torch.manual_seed(config.seed)

    # ------------------------------------------------------------------------------------------------------------- data
    context = base_shape.max_position_embeddings if base_shape else None
    data = open_stage_data(config, base, context, saved, resumed_from)
    check_data_order(saved.get("data_order", data.order), data.order, resumed_from, saved.get("samples_consumed", 0))
    if config.counts_epochs(origins):
        config = dataclasses.replace(config, max_steps=config.steps_of_epochs(data.num_samples))

    # ------------------------------------------------------------------------------------------------------------- plan
    shape = shape_of(config, base_shape, data.tokenizer, data.max_length, data.num_new_tokens)
    shard = sharding_of(config, ranks, shape)
    sizes = example_sizes(config, data.train)

    def planned(config: TrainConfig) -> RunPlan:
        return plan_run(
            config, shape, max_length=data.max_length, world_size=ranks.world_size,
            half_precision=precision.dtype != torch.float32, train_windows=data.num_samples,
            judge_over_base=reward_adapter(config, base) is not None, **sizes,
        )  # fmt: skip

    config, size, found = settle_size(config, origins, saved, planned, ranks)
    plan = planned(config)
    peak = config.peak_tflops or peak_tflops(ranks.device, precision.dtype)
    attention = describe_attention(
        kernels.attention, ranks.device, precision.dtype, head_dim=shape.head_dim,
        softcap=shape.attn_logit_softcapping is not None,
    )  # fmt: skip
    start_step = saved.get("step", 0)
    log = RunLog(config.save_dir, is_main=ranks.is_main, max_steps=config.max_steps, start_step=start_step)
    described = machine_lines(config, precision, kernels, attention, ranks, peak)
    described |= {"micro-batches": origins["micro_batch_size"]} if "found" in origins["micro_batch_size"] else {}
    for sentence in [format_plan(plan, config, shape, described), *said, *of_launcher(config, origins), *data.report]:
        log.say(sentence)

    # ------------------------------------------------------------------------------------------------ model, optimizers
    raw_model = build_model(
        config, shape, base, resumed_from, kernels=kernels, num_real_tokens=data.tokenizer.vocab_size,
        num_new_tokens=data.num_new_tokens, device=ranks.device, precision=precision,
        rows=plan.micro_batch_size * data.max_length, task=data.task.task if data.task else None, shard=shard,
    )  # fmt: skip
    if precision.fp8:
        use_fp8(raw_model)
    optimizers = make_optimizers(config, raw_model, resumed_from, precision, ranks)
    scaler = LossScaler(ranks.device, enabled=precision.dtype == torch.float16)
    if resumed_from:
        scaler.load(saved["scaler"])
        if saved["world_size"] == ranks.world_size:
            set_rng_state(saved["rng"][ranks.rank])
    model = prepare_model(
        raw_model, ranks, compile_model=config.compile_model, again=config.activation_checkpointing,
        context=config.context_parallel,
    )  # fmt: skip
    ema = make_ema(config, model, optimizers, resumed_from)
    log.start(describe_run(config, origins, plan, ranks, precision, data.order, kernels, attention))
    log.event(start_step, *(("resume", f"resumed from {resumed_from}") if resumed_from else ("start", "started")))
    stage = build_stage(config, data, model, ranks, precision, size, pins)
    if isinstance(stage, (GRPO, PPO)) and resumed_from:
        stage.load_state(saved["stage"])
    samples = saved.get("samples_consumed", 0)
    return Run(
        config, plan, peak, ranks, precision, log, stage, model, optimizers, scaler, data, pins, hooks, start_step, samples,
        tokens=saved.get("tokens_consumed", samples * data.max_length), empty_steps=saved.get("empty_steps", 0), ema=ema,
        learning_rate=saved.get("learning_rate", 0.0), saves=Saves(newest=resumed_from), skipped=saved.get("skipped", []),
        guard=make_guard(config, ranks, saved.get("spike_guard")), micro_batch_size=size, is_auto=found,
    )  # fmt: skip


def batches_of(run: "Run") -> Iterator[list[MicroBatch]]:
    """For each step from run.samples on this rank's micro-batches; once their size has changed, the new stage's."""
    ahead = can_be_ahead(run.stage)
    while True:
        stage = run.stage
        steps = batches_from(stage, run.samples, run.config.batch_size, run.skipped)
        for micro_batches in made_ahead(steps, run.ranks.device) if ahead else steps:
            yield micro_batches
            if run.stage is not stage:
                ahead = False  # memory has run out, and a thread takes some
                break


def loop(run: "Run", stop: StopRequest) -> GoBack | None:
    """Train from run.step to --max_steps, or until a rank was asked to stop; that step is finished and saved first.

    Returns where the run goes on, if --spike_guard has it go back.
    """
    config, log = run.config, run.log
    if run.step >= config.max_steps:
        words = f"nothing to do: the run is at step {run.step} of --max_steps {config.max_steps}"
        log.event(run.step, "finish", words)
        return None
    if not run.hooks.start(run):
        run.hooks.finish(run)
        return None
    batches = batches_of(run)
    first = tried(run, next(batches))
    if not defers_sync(run):
        settle_gradient_buckets(run.model, lambda: run.backward(first, total_weight=1.0))
    clock, left = Clock(), config.max_steps - run.step
    profile = StepProfile(config.profile, left=left, save_dir=config.save_dir, ranks=run.ranks, log=log)
    start_step = run.step
    for step, micro_batches in zip(
        range(start_step, config.max_steps), clock.timed(chain([first], batches)), strict=False
    ):
        run.give_up_if_unscored(step)
        log.status("compiling" if config.compile_model and step == start_step else "training", step)
        lr_factor = run.hooks.lr_factor * config.lr_factor(step)
        metrics, grad_norm, stopping = run.optimizer_step(micro_batches, lr_factor, stop.signal is not None)
        clock.steps += 1
        clock.tokens += run.step_tokens
        done, last = step + 1, step + 1 == config.max_steps
        # rollouts are drawn with the weights at the start of their phase, so only there can a run be gone on from exactly
        between_phases = done % config.steps_per_phase == 0
        extra = run.hooks.step(run, metrics, grad_norm)
        stopping = (stopping or run.hooks.stop) and between_phases
        log.live(done)

        to_log = done % config.log_interval == 0 or last or stopping
        if to_log:
            figures = reduce_metrics(metrics, run.ranks.data)  # waits for the device: the clock is right from here
            log.train(train_row(run, figures | extra, grad_norm, clock))
            clock.restart()
        if to_log or done % CHECK_INTERVAL == 0:
            goes_back = done % CHECK_INTERVAL == 0 and not (last or stopping)  # whatever --log_interval is
            if run.guard and (back := run.guard.look(run, done, goes_back)):
                profile.close()
                return back
            give_up_if_diverged(run, done)
        with clock.paused():
            run.saves.after_step(run, done)
            if last or stopping or ((run.saves.due or run.hooks.save) and between_phases):
                run.save(done)  # before evaluating: an evaluation that fails must not cost the steps before it
            if last or ((config.evaluates_after(done) or run.hooks.evaluate) and not stopping):
                run.evaluate(done, last)
            stopping |= run.hooks.stop and between_phases  # as on_evaluate may ask
            if (stopping or (run.hooks.save and between_phases)) and run.saves.step != done:
                run.save(done)
        collect_garbage(done - start_step)
        profile.step(done)
        if stopping:
            break
    profile.close()
    run.saves.end(run)
    run.hooks.finish(run)
    return None


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
    stands_on: Pins = field(default_factory=dict)
    hooks: Hooks = field(default_factory=Hooks)
    step: int = 0
    samples: int = 0  # consumed so far: the run's position in the data
    tokens: int = 0
    micro_batch: int = 0  # of the step that is under way
    step_tokens: int = 0  # of the last step, over all ranks
    empty_steps: int = 0  # of which no rank had anything to learn
    learning_rate: float = 0.0  # of the last step
    saves: Saves = field(default_factory=Saves)
    ema: Ema | None = None  # average of the weights
    guard: SpikeGuard | None = None
    skipped: Skipped = field(default_factory=list)  # samples that are passed over
    micro_batch_size: int = 1  # sequences a forward pass on one rank, now
    is_auto: bool = False  # whether that was found (training/micro_batches.py)
    bad_steps: Tensor = field(init=False)  # in a row, counted on the device

    def __post_init__(self) -> None:
        self.bad_steps = torch.zeros((), device=self.ranks.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.loss = loss_of(self.model, choose_loss(self.config, self.stage.loss))

    def backward(self, micro_batches: list[MicroBatch], total_weight: float) -> Metrics:
        """Forward and backward over this rank's micro-batches; gradients become those of Σ loss / total_weight over all ranks."""
        sums: Metrics = {}
        for index, (batch, counts) in enumerate(passes := padded(micro_batches, self.model, self.ranks)):
            self.micro_batch = index
            with gradient_sync(self.model, enabled=index == len(passes) - 1 and not defers_sync(self)):
                with self.precision.autocast(self.ranks.device):
                    loss, metrics = self.loss(self.model, batch.to(self.ranks.device))
                # gradients are averaged over ranks; the mean wanted is over tokens, so that division is undone (ranks.py)
                (loss * (self.scaler.scale * (counts * self.ranks.data.world_size / total_weight))).backward()
            for name, (value, weight) in metrics.items() if counts else ():
                sums[name] = (sums[name][0] + value, sums[name][1] + weight) if name in sums else (value, weight)
        return sums

    def optimizer_step(
        self, micro_batches: list[MicroBatch], lr_factor: float, stop_here: bool
    ) -> tuple[Metrics, Tensor | None, bool]:
        """One step on the global batch. Returns (metric sums of this rank, gradient norm, whether any rank wants to stop).

        Where no rank has anything to learn, weights and optimizer stay as they are and the norm is None: momentum and decay
        would move them by as much as a step that learns.
        """
        weight, tokens = (float(sum(getattr(b, name) for b in micro_batches)) for name in ("weight", "num_tokens"))
        total_weight, tokens, stops, *news = self.ranks.data.sum(
            [weight, tokens, float(stop_here), *self.saves.news(self)]
        )
        self.saves.hear(news)
        metrics = backward_that_fits(self, micro_batches, max(1.0, total_weight))
        grad_norm = self.update_weights(lr_factor, metrics) if total_weight else None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.empty_steps += not total_weight
        self.learning_rate = self.config.learning_rate * lr_factor
        self.step += 1
        self.samples = position(self.samples + self.config.batch_size, self.config.batch_size, self.skipped)
        self.step_tokens = int(tokens)
        self.tokens += self.step_tokens
        return metrics, grad_norm, stops > 0

    def update_weights(self, lr_factor: float, metrics: Metrics) -> Tensor:
        """One step of every optimizer with the gradients as they are; returns their norm before it is clipped."""
        if zero := vars(self.model).get(ZERO):  # DeepSpeed's engine, which clips by itself
            grad_norm, self.bad_steps = zero.update(lr_factor, self.bad_steps)
            return grad_norm
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.enabled:
            for some in alike(gradients):
                torch._foreach_mul_(some, (1.0 / self.scaler.scale).to(gradients[0].device))
        grad_norm = norm_of_all(gradients).to(self.ranks.device)
        for some in alike(self.parameters) if self.config.grad_clip else ():
            torch.nn.utils.clip_grads_with_norm_(some, self.config.grad_clip, grad_norm)
        # a step without a finite gradient is left out on the device: weights and optimizer state keep their bits
        counts = finite = torch.isfinite(grad_norm)
        if self.guard:
            overflowed = ~finite if self.scaler.enabled else None
            counts = self.guard.judge(metrics, grad_norm, overflowed, self.step, self.samples)
        for optimizer in self.optimizers:
            optimizer.found_inf = (~counts).float().to(gradients[0].device)  # type: ignore[attr-defined]  # torch's own look here
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor
            optimizer.step()
        self.scaler.update(finite)
        self.bad_steps = torch.where(finite, 0.0, self.bad_steps + 1)
        return grad_norm

    def give_up_if_unscored(self, step: int) -> None:
        """Alert after a round of answers without one that was scored; end the run after several. Every rank calls it."""
        if not isinstance(self.stage, (GRPO, PPO)):
            return
        if self.stage.unscored.alert:
            self.log.event(step, "alert", f"step {step:,}: {self.stage.unscored.alert}")
        if sentence := self.stage.unscored.sentence():
            if step not in (0, self.saves.step):
                self.save(step)  # what was learned before
                self.saves.settle(self)
            raise UserError(sentence)
        self.stage.unscored.alert = None

    @with_weights_to_use
    def save(self, step: int) -> None:
        check_replicas(self.model, self.ranks, step)
        self.saves.save(self, step)

    @with_weights_to_use
    def evaluate(self, step: int, last: bool) -> None:
        """Validation figures over all ranks, then, on the first, a sample of text and the plot of the run so far."""
        check_replicas(self.model, self.ranks, step)
        self.log.status("evaluating", step)
        start = time.perf_counter()
        figures = figures_of_both(self.ema, self.stage.evaluate, self.model, last)
        seconds, self.hooks.evaluate = time.perf_counter() - start, False
        if row := figures | self.hooks.call("on_evaluate", self, figures):
            self.log.evaluation(step, seconds, row)
        self.saves.mark_if_best(self, step, row)
        if self.config.sample_prompt:
            self.log.status("sampling", step)
            with gathered(self.model):
                self.sample(step)
        if not self.ranks.is_main:
            return
        # here, because it imports matplotlib for seconds, and a short run may draw nothing
        from training.plots import draw_run

        draw_run(self.config.save_dir)
        if last and isinstance(self.stage, Classify):
            self.stage.draw_confusion(Path(self.config.save_dir) / "confusion.png")

    def sample(self, step: int) -> None:
        if self.ranks.is_main:
            text = stream_text(
                getattr(unwrap(self.model), "policy", unwrap(self.model)), self.data.tokenizer, self.config.sample_prompt,
                max_new_tokens=self.config.sample_tokens, temperature=0.8, top_k=50, top_p=0.95, seed=self.config.seed,
            )  # fmt: skip
            self.log.sample(step, self.config.sample_prompt, "".join(text))


if __name__ == "__main__":
    run_script(main)
