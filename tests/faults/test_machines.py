"""Do several machines train as one, lose a rank of the second one and go on; and does configs/slurm.sh end a job in time?

A machine is a network namespace, where root may make one, else a torchrun of its own on the loopback.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import Forked, wait_for

SIZES = "--hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 8 --learning_rate 3e-3 --warmup_steps 4"
QUIET = "--eval_interval 0 --sample_prompt= --log_interval 1 --device cpu --save_interval 10 --keep_checkpoints 0"


def losses(save_dir: Path) -> dict[int, float]:
    path = save_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {row["step"]: row["loss"] for row in rows if "lr" in row}


@pytest.fixture
def machines() -> Iterator[list[tuple[list[str], str, str]]]:
    """Of each of two: what goes before a command that runs there, its address, and its network interface."""
    names = [f"groundup{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> bool:
        try:
            return subprocess.run(["ip", *words], capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    links = [f"gu{os.getpid()}{side}"[-15:] for side in "ab"]
    joined = all(ip("netns", "add", name) for name in names)
    joined = joined and ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
    found = []
    for name, link, address in zip(names, links, ("10.77.0.1", "10.77.0.2"), strict=True):
        joined = joined and ip("link", "set", link, "netns", name) and ip("-n", name, "link", "set", link, "up")
        joined = joined and ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
        joined = joined and ip("-n", name, "link", "set", "lo", "up")
        found.append((["ip", "netns", "exec", name], address, link))
    yield found if joined else [([], "127.0.0.1", "lo")] * 2
    for name in names:
        ip("netns", "del", name)


@pytest.mark.exhaustive
def test_two_machines_learn_what_one_rank_does_and_survive_a_lost_rank(machines, root, tiny_data, tmp_path):
    words = f"--data_dir {tiny_data} {SIZES} {QUIET} --max_steps 30".split()
    assert Forked(tmp_path / "out", [*words, "--save_dir", tmp_path / "one"]).wait().code == 0
    run, head = tmp_path / "two", machines[0][1]
    started = []
    for number, (before, address, interface) in enumerate(machines):
        torchrun = [
            *before, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{29500 + os.getpid() % 1000}", "--max-restarts=2",
            f"--rdzv-conf=is_host={int(number == 0)}", f"--local-addr={address}", "train.py",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        with open(tmp_path / f"machine_{number}", "w") as out:
            started.append(
                subprocess.Popen(
                    [*torchrun, *words, "--save_dir", str(run)], cwd=root, stdout=out, stderr=out, env=environment
                )
            )
    try:
        wait_for(lambda: len(losses(run)) >= 13)
        rank = subprocess.run(["pgrep", "-P", str(started[1].pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(rank[0]), signal.SIGKILL)
        codes = [process.wait(120) for process in started]
    finally:
        for process in started:
            process.kill()
    said = (tmp_path / "machine_0").read_text() + (tmp_path / "machine_1").read_text()
    assert codes == [0, 0] and "resumed from" in said, said
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-4) and len(losses(run)) == 30


# what Slurm gives a job, for one machine
SRUN = '#!/bin/bash\nshift\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> "$ASKED"\n[ "$1" != show ] || echo localhost\n'


@pytest.mark.exhaustive
def test_the_slurm_script_saves_when_the_time_is_nearly_up_and_queues_the_job_again(root, tiny_data, tmp_path):
    # where the script is run from: the project's files, and an environment to switch on
    desk, run = tmp_path / "desk", tmp_path / "run"
    (desk / ".venv" / "bin").mkdir(parents=True)
    (desk / ".venv" / "bin" / "activate").touch()
    (desk / "train.py").symlink_to(root / "train.py")
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("torchrun", f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'),
    ):
        (desk / name).write_text(text)
        (desk / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{desk}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked"), "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "RANKS_PER_MACHINE": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = f"--data_dir {tiny_data} {SIZES} {QUIET} --save_interval 100000 --max_steps 100000 --save_dir {run}".split()
    with open(tmp_path / "out", "w") as out:
        job = subprocess.Popen(
            ["bash", root / "configs" / "slurm.sh", *words], cwd=desk, env=environment, stdout=out, stderr=out
        )
    try:
        wait_for(lambda: len(losses(run)) >= 5)
        job.send_signal(signal.SIGUSR1)
        job.wait(60)
    finally:
        job.kill()
    last = max(losses(run))
    assert [path.name for path in run.glob("checkpoint*")] == [f"checkpoint_step_{last}"], (
        tmp_path / "out"
    ).read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 7"
