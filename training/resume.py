"""Where does a run go on? From step 0, or from a checkpoint that fits the command and the data it is given."""

import sys
from pathlib import Path

from checkpointing.load import load_state, resolve_checkpoint
from checkpointing.save_folder import list_checkpoints
from errors import UserError
from training.config import TrainConfig
from training.mixture import check_mixture


def find_checkpoint(config: TrainConfig, restarted: bool) -> tuple[Path | None, dict]:
    """(the checkpoint to resume from or None, its saved state). Ranks that torchrun has restarted resume by themselves."""
    which = config.checkpoint
    if restarted and (which is None or list_checkpoints(config.save_dir)):
        which = "latest"  # whatever the first start went on from, this one goes on from what was saved since
    if which is None:
        if existing := list_checkpoints(config.save_dir):
            raise UserError(
                f"--save_dir {config.save_dir} already holds a run at step {existing[-1][0]}: continue it with "
                "--checkpoint latest, or choose another --save_dir"
            )
        return None, {}
    found = resolve_checkpoint(which, config.save_dir, to_go_on=True)
    for path, reason in found.skipped:
        print(f"warning: skipped {path}: {reason}", file=sys.stderr)
    if found.path is None:
        if found.skipped:
            raise UserError(
                f"no checkpoint in {config.save_dir} is whole, with its optimizer state; to start anew choose another "
                "--save_dir, and --init_from what is left"
            )
        print(f"no checkpoint in {config.save_dir} yet: starting at step 0", file=sys.stderr)
        return None, {}
    state = load_state(found.path)
    newer = [path for step, path in list_checkpoints(config.save_dir) if step > state["step"]]
    if set(newer) - {path for path, _ in found.skipped}:
        raise UserError(
            f"--save_dir {config.save_dir} holds {newer[-1].name}, which is newer than {found.path}: to go on from an "
            "earlier step choose another --save_dir"
        )
    return found.path, state


# the flag that decides each part of a run's data order, where it is not the part's own name
_FLAGS = {
    "fingerprints": "--data_dir, --train_data or --tokenizer", "weights": "--data_weights", "held_out": "--eval_data",
    "template": "--chat_template, or the model's own",
}  # fmt: skip


def check_data_order(saved: dict, now: dict, checkpoint: Path | None, samples: int = 0) -> None:
    """UserError when a resumed run would have seen other samples than the run it continues, which has consumed `samples`.

    What a checkpoint of an older version does not know is not checked.
    """
    saved = check_mixture(saved, now, samples)
    for name, value in now.items():
        if name in saved and saved[name] != value:
            flag = _FLAGS.get(name, f"--{name}")
            hashed = ("fingerprints", "held_out", "template", "train_file", "val_file")
            words = "other content than" if name in hashed else f"{value} instead of"
            raise UserError(
                f"{flag}: {words} {saved[name]}, with which {checkpoint} was trained; give the same data and options, or "
                "start a new run in another --save_dir"
            )
