"""Which stages does a --config file with `stages` hold, and with which options does each of them run?

Options above the stages are shared; a stage adds its own, which win, and may have a `name`:

    save_dir = "checkpoints/mine"

    [[stages]]
    stage = "pretrain"
    data_dir = "data/mine"

    [[stages]]
    stage = "sft"
    name = "answers"
    train_data = "answers.jsonl"

Stage 2 runs in checkpoints/mine/2_answers and starts from the newest checkpoint in checkpoints/mine/1_pretrain. After a
reward stage, whose result scores texts and writes none, the next stage starts from what that stage started from. A stage
with an `init_from` of its own starts there. The command line wins over the file in every stage, except that its
--init_from, like one above the stages, is where the first stage starts.
"""

import os
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from arguments import did_you_mean
from checkpointing.load import load_state, resolve_checkpoint
from errors import UserError
from families.task_names import TASKS
from training.config import is_read, refuse_unread, resolve_config, without_alternatives
from training.config_file import read_config_content, translated
from training.foreign_config import NAMES, is_foreign, translate_plan
from training.option import coerce_option
from training.option_groups import PRESETS, SPECS

_OF_THE_RUN = ("save_dir", "checkpoint", "device")  # options that all stages have in common
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PlannedStage:
    """title: "stage 2 of 3 (answers)"; folder: "2_answers", below --save_dir; options: what the file sets for it.

    own: the options among them that its own table sets, and not the lines above the stages. derived: those that follow from
    the number of ranks. timestamped: --save_dir is where each start of the plan has a folder of its own.
    """

    title: str
    folder: str
    options: dict[str, Any]
    own: frozenset[str]
    is_first: bool = True
    derived: frozenset[str] = frozenset()
    timestamped: bool = False

    @property
    def gives_language_model(self) -> bool:
        return self.options.get("stage") not in ("reward", *TASKS)

    def given(self, flags: dict[str, Any]) -> dict[str, Any]:
        """All that this stage is given, as resolve_config takes it: the file's options and, over them, the flags."""
        sizes = PRESETS.get(flags.get("preset", ""), {})  # a preset of the command line beats the file's sizes
        options = without_alternatives(self.options, flags)
        options = {name: value for name, value in options.items() if name not in sizes}
        left_out = ("config",) if self.is_first else ("config", "init_from")
        return options | {name: value for name, value in flags.items() if name not in left_out}


def read_plan(path: str) -> list[PlannedStage]:
    """The stages of a .toml, .yaml, .yml or .json file; [] for one that has no `stages`. Raises UserError."""
    content = read_config_content(path)
    if "stages" not in content:
        return []
    content, _, derived = in_our_words(content, path)
    tables, task_folder = content.pop("stages"), content.pop("task_folder", None)
    shared = _checked(content, path)
    timestamped = task_folder is not None and "save_dir" not in shared
    if timestamped:
        shared["save_dir"] = task_folder
    stages = []
    for number, table in enumerate(tables, start=1):
        folder = table.pop("folder", None)
        name = str(table.pop("name", table.get("stage", shared.get("stage", "pretrain"))))
        where = f"{path}, stage {number} ({name})"
        if not _FOLDER_NAME.fullmatch(name):
            raise UserError(f"--config {where}: its name becomes a folder; write it with letters, digits, _ and -")
        options = _checked(table, where)
        if misplaced := [option for option in _OF_THE_RUN if option in options]:
            raise UserError(f"--config {where} sets {misplaced[0]}, which all stages share: set it above them")
        title = f"stage {number} of {len(tables)} ({name})"
        stages.append(
            PlannedStage(
                title,
                folder or f"{number}_{name}",
                without_alternatives(shared, options) | options,
                frozenset(options),
                number == 1,
                frozenset(derived[number - 1]),
                timestamped,
            )
        )
        shared.pop("init_from", None)
    if twice := [
        one.folder for one, other in pairwise(sorted(stages, key=lambda s: s.folder)) if one.folder == other.folder
    ]:
        raise UserError(
            f"--config {path}: two stages would be in the folder {twice[0]}: give each a stage_name of its own"
        )
    return stages


def in_our_words(content: dict[str, Any], path: str) -> tuple[dict[str, Any], list[str], list[set[str]]]:
    """A file with stages as `translate_plan` gives it, or as it is where all its names are ours. Raises UserError."""
    tables = content["stages"]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"--config {path}: stages must be a list of tables, each with a stage and its options")
    if not is_foreign(content, SPECS):
        return content, [], [set() for _ in tables]
    return translate_plan(content, path, world_size=int(os.environ.get("WORLD_SIZE", 1)))


def read_as(path: str, stage: str | None) -> list[str]:
    """Sentences that say what the names of another tool's file were read as; none for a file with our names alone."""
    content = read_config_content(path)
    if "stages" in content:
        return in_our_words(content, path)[1]
    return [f"--config {path}: {line}" for line in translated(path, stage).lines]


def check_plan(stages: list[PlannedStage], flags: dict[str, Any]) -> None:
    """UserError, naming the stage, for what would stop one of them: found now, and not when its turn comes."""
    if "stage" in flags:
        raise UserError("--stage cannot be given with a --config file that has stages: each says which it is")
    configs = []
    for stage in stages:
        config, _ = resolve_config(stage.given(flags), validate=False)
        if config.checkpoint not in (None, "latest"):
            raise UserError(
                f"--checkpoint {config.checkpoint}: a file with stages is continued with --checkpoint latest"
            )
        if not stage.is_first and config.init_from is None:
            config = replace(config, init_from="the stage before")
        try:
            config.validate()
            refuse_unread(config, stage.own)
        except UserError as error:
            raise UserError(f"{stage.title}: {error}") from error
        configs.append(config)
        for option in ("data_dir", "train_file", "val_file", "train_data", "eval_data"):
            if missing := [path for path in getattr(config, option) if not Path(path).exists()]:
                raise UserError(f"{stage.title}: --{option} {missing[0]} does not exist")
    for name in {*flags}.union(*(stage.options.keys() - stage.own for stage in stages)):
        if not any(is_read(config, name) for config in configs):
            raise UserError(f"--{name} is given to all stages, and none of them reads it: leave it out")


def finished_checkpoint(given: dict[str, Any], follows: bool) -> Path | None:
    """The last checkpoint of a stage that is at its --max_steps, or that --hooks ended; None if neither. Raises UserError.

    follows: whether it starts from the stage before, which must then still end in what it was started from.
    """
    path = resolve_checkpoint("latest", given["save_dir"]).path
    if path is None:
        return None
    state = load_state(path)
    options = state["options"]
    if follows and Path(options["init_from"]).parts[-2:] != Path(given["init_from"]).parts[-2:]:
        raise UserError(
            f"{path} was trained from {options['init_from']}, but the stage before ends in {given['init_from']} now: remove "
            f"{given['save_dir']} to train it anew, or run the plan in another --save_dir"
        )
    ended = state["step"] >= given.get("max_steps", options["max_steps"]) or state.get("hooks", {}).get("stop", False)
    return path if ended else None


def _checked(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The options under their names and of their types. UserError, naming the place, for one that is none or is wrong."""
    checked = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in SPECS:
            known = did_you_mean(name, [*SPECS, *NAMES])
            raise UserError(f"--config {where} sets {key!r}, which is not an option{known}")
        checked[name] = coerce_option(SPECS[name], value, where)
    return checked
