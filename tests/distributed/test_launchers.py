"""Does `accelerate launch train.py ...` do what torchrun does, and what its config's plugin says? Through Accelerate itself.

Needs requirements-distributed.txt (`make test-distributed`); skipped without it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from training.run_files import read_history

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"),
    pytest.mark.exhaustive,
]
ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node=2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0",
    "deepspeed": "accelerate.commands.launch --use_deepspeed --zero_stage 3 --gradient_clipping 0.5 --num_processes 2"
    " --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0",
    "fsdp": "accelerate.commands.launch --config_file configs/accelerate/fsdp.yaml --main_process_port 0",
}
FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture
def launch(tiny_data, tmp_path):
    def launch(launcher: str, *words: str) -> tuple[Path, str]:
        """(the run's folder, what it printed)"""
        sizes = (
            "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 6 --max_steps 4 --log_interval 1 --device cpu"
        )
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "train.py", *sizes.split(), "--data_dir"]
        done = subprocess.run(
            [*command, tiny_data, "--save_dir", folder, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return folder, done.stdout + done.stderr

    return launch


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / "checkpoint_step_4" / name).read_bytes() for name in FILES]


def test_a_launch_without_a_plugin_is_torchruns_bit_for_bit(launch):
    (expected, _), (found, _) = launch("torchrun"), launch("accelerate")
    assert bytes_of(found) == bytes_of(expected)
    losses = [[row["loss"] for row in read_history(folder).train] for folder in (found, expected)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_fsdp_plugin_shares_out_the_weights_also_on_cpus(launch):
    expected, _ = launch("torchrun", "--strategy", "fsdp", "--no-reshard_after_forward")
    found, said = launch("fsdp")
    assert bytes_of(found) == bytes_of(expected)
    assert "accelerate launch: as with --strategy fsdp --no-reshard_after_forward" in said
    assert "fsdp: each rank has 1/2 of the weights; a block's are kept" in said


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_deepspeed_plugin_is_deepspeed_by_torchrun(launch):
    settings = '{"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}'
    expected, _ = launch("torchrun", "--optimizer", "adamw", "--deepspeed", settings)
    found, said = launch("deepspeed", "--optimizer", "adamw")
    assert bytes_of(found) == bytes_of(expected)
    assert "deepspeed, ZeRO 3: each rank has 1/2 of the optimizer state, gradients, weights" in said
    assert "--deepspeed: as with --strategy deepspeed --grad_clip 0.5" in said or "--grad_clip 0.5" in said


def test_a_command_against_the_config_is_refused_with_both_names(launch):
    folder, said = launch("fsdp", "--strategy", "ddp")
    assert "(ACCELERATE_USE_FSDP) asks for --strategy fsdp, and the command for --strategy ddp" in said
    assert not list(folder.glob("checkpoint_step_*"))
