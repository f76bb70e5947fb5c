"""Does every stage keep train.py's promises? The same curve however the step is divided, and the same bits after a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORDS = [
    "the",
    "of",
    "and",
    "model",
    "token",
    "loss",
    "gradient",
    "learns",
    "reads",
    "writes",
    "a",
    "small",
    "large",
    "one",
    "two",
    "three",
]
STAGES = {
    "sft": ["--stage", "sft", "--train_data", "chat.jsonl", "--neftune_alpha", "5"],
    "sft_qlora": ["--stage", "sft", "--train_data", "chat.jsonl", "--lora", "--load_in_4bit", "--lora_dropout", "0.1"],
    "reward": ["--stage", "reward", "--train_data", "pairs.jsonl"],
    "dpo": ["--stage", "dpo", "--train_data", "pairs.jsonl"],
    "dpo_lora": ["--stage", "dpo", "--train_data", "pairs.jsonl", "--lora", "--dpo_loss", "ipo"],
    "kto": ["--stage", "dpo", "--train_data", "labels.jsonl", "--lora", "--dpo_loss", "kto"],
    "grpo": ["--stage", "grpo", "--train_data", "prompts.jsonl", "--group_size", "4", "--num_minibatches", "2"],
    "ppo": ["--stage", "ppo", "--train_data", "prompts.jsonl", "--rollout_epochs", "2"],
    "ppo_lora": ["--stage", "ppo", "--train_data", "prompts.jsonl", "--lora", "--rollout_epochs", "2"],
}
SMALL = [
    "--batch_size",
    "4",
    "--max_steps",
    "8",
    "--save_interval",
    "2",
    "--keep_checkpoints",
    "0",
    "--max_length",
    "128",
]
SMALL += [
    "--learning_rate",
    "1e-3",
    "--log_interval",
    "1",
    "--eval_interval",
    "0",
    "--eval_samples",
    "4",
    "--device",
    "cpu",
]
REWARDED = ["--reward_function", "rewards_for_tests:share_of_e", "--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def workshop(root, tiny_data, tmp_path_factory) -> Path:
    """A pretrained model of 32 wide, files of examples of each kind, and a reward function."""
    folder = tmp_path_factory.mktemp("finetune")
    shape = [
        "--hidden_size",
        "32",
        "--num_layers",
        "2",
        "--num_heads",
        "2",
        "--max_length",
        "128",
        "--optimizer",
        "adamw",
    ]
    quick = ["--max_steps", "4", "--batch_size", "4", "--eval_interval", "0", "--sample_prompt", "", "--device", "cpu"]
    command = [sys.executable, "train.py", "--data_dir", tiny_data, "--save_dir", folder / "base", *shape, *quick]
    subprocess.run([str(word) for word in command], cwd=root, check=True, capture_output=True, env=environment(folder))

    def sentence(start: int, count: int) -> str:
        return " ".join(WORDS[(start * 5 + i * 3) % len(WORDS)] for i in range(count))

    rows = {
        "chat": [{"prompt": sentence(i, 4), "completion": sentence(i + 1, 2 + i % 9)} for i in range(24)],
        "pairs": [
            {"prompt": sentence(i, 4), "chosen": sentence(i + 1, 2 + i % 7), "rejected": sentence(i + 2, 3 + i % 5)}
            for i in range(24)
        ],
        "labels": [
            {"prompt": sentence(i, 4), "completion": sentence(i + 1, 2 + i % 7), "label": i % 3 > 0} for i in range(24)
        ],
        "prompts": [{"prompt": sentence(i, 3 + i % 3), "answer": str(i)} for i in range(24)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    reward = "def share_of_e(completions, **columns):\n    return [t.count('e') / (1 + len(t)) for t in completions]\n"
    (folder / "rewards_for_tests.py").write_text(reward)
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}


def words(root: Path, workshop: Path, stage: str, save_dir: Path, *flags: object, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    given = [str(workshop / word) if word.endswith(".jsonl") else word for word in STAGES[stage]]
    given += REWARDED if "prompts.jsonl" in STAGES[stage] else []
    command = [
        *launcher,
        root / "train.py",
        "--init_from",
        workshop / "base",
        "--save_dir",
        save_dir,
        *given,
        *SMALL,
        *flags,
    ]
    return [str(word) for word in command]


def run(root: Path, workshop: Path, stage: str, save_dir: Path, *flags: object, ranks: int = 1) -> None:
    command = words(root, workshop, stage, save_dir, *flags, ranks=ranks)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment(workshop), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def rows(save_dir: Path, key: str = "loss") -> dict[int, float]:
    text = (save_dir / "metrics.jsonl").read_text() if (save_dir / "metrics.jsonl").exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


@pytest.fixture(scope="module")
def whole(root, workshop):
    """The run of a stage that nothing disturbed, made once."""
    made = {}

    def get(stage: str) -> Path:
        if stage not in made:
            made[stage] = workshop / f"whole_{stage}"
            run(root, workshop, stage, made[stage])
        return made[stage]

    return get


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_never_killed_bit_for_bit(stage, root, workshop, whole, tmp_path):
    """Weights, adapters, critic and optimizer state after SIGKILL at a step between checkpoints. PPO's and GRPO's
    checkpoints lie where a round of rollouts ends."""
    save_dir = tmp_path / "killed"
    process = subprocess.Popen(
        words(root, workshop, stage, save_dir), cwd=root, env=environment(workshop), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(rows(save_dir)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(root, workshop, stage, save_dir, "--checkpoint", "latest")
    names = sorted(path.name for path in (whole(stage) / "checkpoint_step_8").glob("*.safetensors"))
    assert "optimizer.safetensors" in names and len(names) == 2 + stage.startswith("ppo")
    for name in names:
        wanted, found = (load_file(folder / "checkpoint_step_8" / name) for folder in (whole(stage), save_dir))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), name


@pytest.mark.parametrize(
    "stage", [stage for stage in STAGES if stage != "sft_qlora"]
)  # each rank draws its own dropout
def test_ranks_and_micro_batches_give_the_same_losses(stage, root, workshop, whole, tmp_path):
    """Two ranks with micro-batches of one row against one rank with the whole step at once: fp32 sums in another order.

    1e-4 on the loss after eight steps, for both policies of reinforcement learning draw the same answers then.
    """
    run(root, workshop, stage, tmp_path / "divided", "--micro_batch_size", 1, ranks=2)
    wanted, found = rows(whole(stage)), rows(tmp_path / "divided")
    assert wanted.keys() == found.keys() and len(wanted) == 8
    assert max(abs(wanted[step] - found[step]) for step in wanted) < 1e-4
    norms = rows(whole(stage), "grad_norm"), rows(tmp_path / "divided", "grad_norm")
    assert max(abs(norms[0][step] / norms[1][step] - 1) for step in norms[0]) < 1e-2


def test_dpo_starts_at_ln_2(whole):
    assert abs(rows(whole("dpo"))[1] - 0.693147) < 1e-6


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--stage", "sft"], ["--init_from"]),
        (["--stage", "sft", "--init_from", "BASE"], ["--train_data"]),
        (["--stage", "dpo", "--init_from", "BASE", "--train_data", "chat.jsonl"], ["--train_data", "preference"]),
        (["--stage", "grpo", "--init_from", "BASE", "--train_data", "prompts.jsonl"], ["--reward_function"]),
        (["--stage", "sft", "--init_from", "BASE", "--train_data", "chat.jsonl", "--load_in_4bit"], ["--lora"]),
        (["--stage", "sft", "--init_from", "BASE", "--train_data", "chat.jsonl", "--max_length", "9999"], ["--max_length 9999"]),
        (["--stage", "sft", "--init_from", "nowhere", "--train_data", "chat.jsonl"], ["--init_from nowhere"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(flags, named, root, workshop, tmp_path):
    places = {
        "BASE": workshop / "base",
        **{f"{name}.jsonl": workshop / f"{name}.jsonl" for name in ("chat", "prompts")},
    }
    command = [sys.executable, "train.py", "--save_dir", tmp_path, *(str(places.get(flag, flag)) for flag in flags)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment(workshop), timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and all(word in done.stderr for word in named), done.stderr
