"""How do the stages of a --config file follow one another, and what does each hand to the next?

Each stage is a run of its own, with its own folder below --save_dir. A stage that trained adapters is merged with its
base before the next one starts from it.
"""

import argparse
import gc
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters.peft_files import read_adapter_config
from checkpointing import save_folder
from checkpointing.load import resolve_checkpoint
from checkpointing.save_folder import ADAPTER_CONFIG, from_rank_0, list_checkpoints, read_json
from errors import UserError
from ranks import Ranks
from tools import merge
from training.config import TrainConfig
from training.parallel import StopRequest
from training.stage_plan import PlannedStage, finished_checkpoint

# (options, ranks, names of those that come from the file) -> (whether --max_steps is reached, signals received until then)
RunStage = Callable[[dict[str, Any], Ranks, set[str]], tuple[bool, StopRequest]]


def run_plan(
    stages: list[PlannedStage], flags: dict[str, Any], shared: TrainConfig, ranks: Ranks, run_stage: RunStage
) -> int:
    """Run the stages one after another, each in its folder below --save_dir and from what came before; the exit code.

    With --checkpoint latest the finished ones are left as they are. A signal stops the plan: the next stage is not begun.
    """
    resuming = shared.checkpoint == "latest" or ranks.restarted
    root = Path(shared.save_dir)
    if stages[0].timestamped and "save_dir" not in flags:
        root = from_rank_0(lambda: folder_of_start(root, resuming))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    before: dict[str, Any] | None = None  # what the last stage that gave a language model was given
    save_folder.write_probe(root)
    with save_folder.lock(root):
        for stage in stages:
            given = stage.given(flags) | {"save_dir": str(root / stage.folder)}
            follows = False
            if before is not None and "init_from" not in given:
                given["init_from"], follows = str(language_model_of(before)), True
            done = finished_checkpoint(given, follows) if resuming else None
            if list_checkpoints(root / stage.folder):  # a run that goes on keeps its batch
                given = {name: value for name, value in given.items() if name not in stage.derived or name in flags}
            if ranks.is_main:
                print(f"{stage.title}: " + (f"finished already, {done}" if done else given["save_dir"]), flush=True)
            if done is None:
                finished, stop = run_stage(given, ranks, given.keys() - flags.keys())
                for number, handler in handlers.items():
                    signal.signal(number, handler)  # while the next stage is set up, a signal ends the process
                received = stop.agreed(ranks)
                if received and not (finished and stage is stages[-1]):
                    return 128 + received
                release_memory(ranks.device, compiled=given.get("compile_model", False))
            if stage.gives_language_model:
                before = given
    return 0


def folder_of_start(task: Path, resuming: bool) -> Path:
    """Where this start of a plan goes: TASK/TIME, or where it goes on the newest of those that are there."""
    earlier = sorted(path for path in task.glob("*") if path.is_dir()) if resuming else []
    return earlier[-1] if earlier else task / time.strftime("%Y%m%d_%H%M%S")


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
    checkpoint = resolve_checkpoint(save_dir, save_dir).folder
    if not (checkpoint / ADAPTER_CONFIG).exists():
        return checkpoint
    # the base that it was trained over: the newest checkpoint of --init_from may be another by now
    base, merged = Path(read_adapter_config(checkpoint)["base_model_name_or_path"]), save_dir / "merged"
    save_folder.clean(save_dir)  # of a merge that was cut short

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
