"""May the mixture change at a step, exactly resumable? --data_stages, and folders that join a run that goes on."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Forked

OPTIONS = (
    "--hidden_size 32 --num_layers 1 --num_heads 2 --batch_size 8 --warmup_steps 2 --schedule constant --eval_interval 0 "
    "--log_interval 1 --device cpu --save_interval 6 --keep_checkpoints 0"
)
FLAGS = [*OPTIONS.split(), "--sample_prompt", ""]
EXISTING = [
    "--tokenizer_type",
    "existing",
    "--max_length",
    "32",
    "--stride",
    "0",
    "--num_workers",
    "1",
    "--tokenizer_dir",
]


@pytest.fixture(scope="module")
def other_data(root, tiny_data, tmp_path_factory) -> Path:
    """Other text in the tokens of `tiny_data`."""
    folder = tmp_path_factory.mktemp("other")
    lines = [json.dumps({"text": f"gradient {number} writes the loss " * (number % 5 + 2)}) for number in range(90)]
    (folder / "text").mkdir()
    (folder / "text/documents.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "data_prep_tool.py", "--input_dir", folder / "text", "--output_dir", folder / "data"]
    command += [*EXISTING, tiny_data]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return folder / "data"


@pytest.fixture
def train(tmp_path):
    def run(save_dir: Path, *flags: object, fails: bool = False):
        ended = Forked(tmp_path / "streams", ["--save_dir", save_dir, *flags]).wait(240)
        assert bool(ended.code) == fails, ended.out + ended.err
        return ended

    return run


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def losses(save_dir: Path) -> list[float]:
    rows = map(json.loads, (save_dir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_folder_joins_at_a_step_and_killed_equals_never_killed(train, tmp_path, tiny_data, other_data):
    both = ["--data_dir", tiny_data, other_data, "--data_weights", "1", "0", "--data_stages", "6:0,1", "9:1,1"]
    said = train(tmp_path / "whole", *FLAGS, *both, "--max_steps", 12).out
    assert f"from step 6 on 100 % {other_data}; from step 9 on 50 % {tiny_data}, 50 % {other_data}" in " ".join(
        said.split()
    )
    # the first six steps know nothing of what comes; a run on one folder goes on with two
    train(tmp_path / "joined", *FLAGS, "--data_dir", tiny_data, "--max_steps", 6)
    assert losses(tmp_path / "joined") == losses(tmp_path / "whole")[:6]
    train(tmp_path / "joined", *both, "--checkpoint", "latest", "--max_steps", 12)
    assert digest(tmp_path / "joined/checkpoint_step_12") == digest(tmp_path / "whole/checkpoint_step_12")
    # what has not begun may be said anew, and what a step is follows the batch size
    train(tmp_path / "joined", *FLAGS, "--checkpoint", "latest", "--max_steps", 13, "--batch_size", 4)
    state = json.loads((tmp_path / "joined/checkpoint_step_13/trainer_state.json").read_text())
    assert state["data_order"]["data_stages"] == [[48, [0.0, 1.0]], [72, [1.0, 1.0]]]


def test_from_a_step_on_only_the_other_folder_is_read(train, tmp_path, tiny_data, other_data):
    """Its own first samples: the stage begins them anew, as a run on it alone would, but for the order."""
    stages = ["--data_weights", "1", "0", "--data_stages", "1:0,1"]
    train(tmp_path / "run", *FLAGS, "--data_dir", tiny_data, other_data, *stages, "--max_steps", 6)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    epochs = [json.loads(line)["epoch"] for line in text.splitlines() if "epoch" in line]
    assert len(set(epochs)) == 1  # of the first folder, which is not read any more


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_stages", "6:1,1", "--checkpoint", "latest"], "before step 8"),
        (["--data_stages", "7:0,1", "--checkpoint", "latest"], "before step 8"),
        (["--data_weights", "1", "1", "--checkpoint", "latest"], "--data_weights: [1.0, 1.0] instead of"),
        (["--data_stages", "6:1"], "1 weights for 2 folders"),
        (["--data_stages", "6:1,-1"], "weights are not negative"),
        (["--data_stages", "6:1,1", "6:0,1"], "ascending"),
        (["--data_stages", "six"], "write STEP:WEIGHTS"),
        (["--data_weights", "0", "0"], "all 0"),
        (["--data_stages", "6:2,0"], "weight 0 throughout"),
    ],
)
def test_what_cannot_be_is_one_sentence(begun, train, tmp_path, tiny_data, other_data, flags, words):
    save_dir = begun if "--checkpoint" in flags else tmp_path / "new"
    weights = [] if "--data_weights" in flags else ["--data_weights", "1", "0"]
    given = ["--data_dir", tiny_data, other_data, *weights, *flags, "--max_steps", 12]
    ended = train(save_dir, *FLAGS, *given, fails=True)
    assert words in " ".join(ended.err.split()) and "Traceback" not in ended.err


@pytest.fixture(scope="module")
def begun(tiny_data, other_data, tmp_path_factory) -> Path:
    """A run whose mixture changed at step 6, at step 8."""
    folder = tmp_path_factory.mktemp("begun")
    given = [
        "--data_dir",
        tiny_data,
        other_data,
        "--data_weights",
        "1",
        "0",
        "--data_stages",
        "6:0,1",
        "--max_steps",
        8,
    ]
    ended = Forked(folder / "streams", ["--save_dir", folder / "run", *FLAGS, *given]).wait(240)
    assert ended.code == 0, ended.err
    return folder / "run"
