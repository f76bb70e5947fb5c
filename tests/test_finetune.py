"""Does the program keep its promises in every stage? The same bits after a crash, and the same curve on two ranks.

That a single step does not depend on how it is divided is tested in stages/test_every_stage.py, for every loss.
"""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Forked, start_ranks, wait_for
from tests.tiers import grid

WORDS = "the of and model token loss gradient learns reads writes a small large one two three"
REWARDED = f"--train_data prompts.jsonl --reward_function {__name__}:share_of_e --max_new_tokens 8 --eval_samples 4"
STAGES = {
    "pretrain": "--data_dir TEXT --optimizer adamw",
    "sft": "--stage sft --train_data chat.jsonl --neftune_alpha 5",
    "sft_qlora": "--stage sft --train_data chat.jsonl --lora --load_in_4bit --lora_dropout 0.1",
    "reward": "--stage reward --train_data pairs.jsonl",
    "dpo": "--stage dpo --train_data pairs.jsonl",
    "dpo_lora": "--stage dpo --train_data pairs.jsonl --lora --dpo_loss ipo",
    "kto": "--stage dpo --train_data labels.jsonl --lora --dpo_loss kto",
    "grpo": f"--stage grpo {REWARDED} --group_size 4 --num_minibatches 2",
    "ppo": f"--stage ppo {REWARDED} --rollout_epochs 2",
    "ppo_lora": f"--stage ppo {REWARDED} --lora --rollout_epochs 2",
}
STEPS = 14
SMALL = f"--init_from base --batch_size 4 --max_steps {STEPS} --save_interval 5 --keep_checkpoints 0 --max_length 128 \
    --learning_rate 1e-3 --log_interval 1 --eval_interval 0 --device cpu"
BASE = "--data_dir TEXT --hidden_size 32 --num_layers 2 --num_heads 2 --max_length 128 --optimizer adamw --max_steps 4 \
    --batch_size 4 --eval_interval 0 --save_dir base --device cpu"


def share_of_e(completions, **columns) -> list[float]:
    return [text.count("e") / (1 + len(text)) for text in completions]


@pytest.fixture(scope="module")
def workshop(tiny_data, tmp_path_factory) -> Path:
    """A pretrained model of 32 wide, and files of examples of each kind."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "TEXT").symlink_to(tiny_data)
    (folder / "base").mkdir()
    ended = Forked(folder / "streams", [*in_workshop(folder, f"{BASE} --sample_prompt").split(), ""]).wait()
    assert ended.code == 0, ended.err

    def sentence(start: int, count: int) -> str:
        words = WORDS.split()
        return " ".join(words[(start * 5 + i * 3) % len(words)] for i in range(count))

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
    return folder


def in_workshop(folder: Path, words: str) -> str:
    """A command line in which names of files of the workshop became their paths."""
    return " ".join(str(folder / word) if (folder / word).exists() else word for word in words.split())


@pytest.fixture(scope="module")
def words(workshop):
    """The command line of a stage, as words."""
    return lambda stage, save_dir: [*in_workshop(workshop, f"{STAGES[stage]} {SMALL}").split(), "--save_dir", save_dir]


def rows(save_dir: Path, key: str = "loss") -> dict[int, float]:
    text = (save_dir / "metrics.jsonl").read_text() if (save_dir / "metrics.jsonl").exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


@pytest.fixture(scope="module")
def whole(workshop, words):
    """The run of a stage that nothing disturbed, made once."""
    made = {}

    def get(stage: str) -> Path:
        if stage not in made:
            made[stage] = workshop / f"whole_{stage}"
            ended = Forked(workshop / "streams", words(stage, made[stage])).wait()
            assert ended.code == 0, ended.out + ended.err
        return made[stage]

    return get


def kill_between_checkpoints(given: list, save_dir: Path, streams: Path) -> None:
    """Start a run and kill it after some step, on purpose another one each time; begin anew should it be over by then."""
    for _ in range(5):
        process = Forked(streams, given)
        moment = random.Random().randint(7, 9)
        wait_for(lambda moment=moment: len(rows(save_dir)) >= moment and any(save_dir.glob("checkpoint_*")))
        process.send(signal.SIGKILL)
        process.wait()
        if not (save_dir / f"checkpoint_step_{STEPS}").exists():
            return
        shutil.rmtree(save_dir)
    pytest.fail("the run was over before it could be killed, five times")


@pytest.mark.parametrize("stage", grid(STAGES, quick=["sft_qlora", "kto", "grpo", "ppo_lora"]))
def test_killed_and_resumed_equals_never_killed_bit_for_bit(stage, words, whole, tmp_path):
    """Weights, adapters, critic and optimizer state after SIGKILL. Checkpoints are due every five steps; PPO's and GRPO's are
    written where a round of rollouts, of two steps, ends. A thread writes those of the run that is killed."""
    save_dir, last = tmp_path / "killed", f"checkpoint_step_{STEPS}"
    given = [*words(stage, save_dir), "--async_checkpoint"]
    kill_between_checkpoints(given, save_dir, tmp_path / "streams")
    ended = Forked(tmp_path / "streams", [*given, "--checkpoint", "latest"]).wait()
    assert ended.code == 0 and "resumed from" in ended.out, ended.out + ended.err
    names = sorted(path.name for path in (whole(stage) / last).glob("*.safetensors"))
    assert "optimizer.safetensors" in names and len(names) == 2 + stage.startswith("ppo")
    for name in names:
        wanted, found = (load_file(folder / last / name) for folder in (whole(stage), save_dir))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), name
        if "--lora" in STAGES[stage]:  # nothing that is frozen is written
            assert all(".lora_" in key or "value_head" in key for key in found), name


@pytest.mark.parametrize("stage", grid(["sft", "grpo", "ppo_lora"], quick=["grpo", "ppo_lora"]))
def test_two_ranks_with_micro_batches_give_the_same_losses(stage, words, whole, tmp_path):
    """Two ranks with micro-batches of one row against one rank with the whole step at once: fp32 sums in another order.

    1e-4 on the loss after fourteen steps, for both policies of reinforcement learning draw the same answers then.
    """
    save_dir = tmp_path / "divided"
    ended = [rank.wait() for rank in start_ranks(tmp_path, *words(stage, save_dir), "--micro_batch_size", 1)]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    wanted, found = rows(whole(stage)), rows(save_dir)
    assert wanted.keys() == found.keys() and len(wanted) == STEPS
    assert max(abs(wanted[step] - found[step]) for step in wanted) < 1e-4
    norms = rows(whole(stage), "grad_norm"), rows(save_dir, "grad_norm")
    assert max(abs(norms[0][step] / norms[1][step] - 1) for step in norms[0]) < 1e-2


RANDOM = {
    "sft": "--stage sft --train_data chat.jsonl --lora --lora_dropout 0.3 --neftune_alpha 5 --sample_prompt the",
    "reward": "--stage reward --train_data pairs.jsonl --lora --lora_dropout 0.3",
    "grpo": f"--stage grpo {REWARDED} --group_size 4 --eval_interval 3",
}


@pytest.mark.parametrize(
    ("world_size", "stage"), grid([(size, stage) for size in (2, 3) for stage in RANDOM], quick=[(2, "sft")])
)
def test_what_is_drawn_at_random_is_drawn_again_on_ranks_that_were_killed(stage, world_size, workshop, tmp_path):
    """Bit for bit, for every option that draws random numbers; what draws them is dropped from no step of one rank either,
    which is tested above."""
    flags = (
        in_workshop(workshop, f"{RANDOM[stage]} {SMALL}")
        .replace("--learning_rate 1e-3", "--learning_rate 1e-2")
        .split()
    )

    def run(save_dir: Path, *more: object) -> list[Forked]:
        streams = tmp_path / f"streams_{save_dir.name}{'_again' * ('latest' in more)}"
        streams.mkdir()
        return start_ranks(streams, *flags, "--save_dir", save_dir, *more, world_size=world_size)

    for rank in run(tmp_path / "whole", "--max_steps", 8):
        assert (ended := rank.wait()).code == 0, ended.err
    ranks = run(tmp_path / "killed", "--max_steps", 8)
    wait_for(lambda: len(rows(tmp_path / "killed")) >= 6 or (tmp_path / "killed" / "checkpoint_step_8").exists())
    for rank in ranks:
        rank.send(signal.SIGKILL)
    for rank in ranks:
        rank.wait()
    shutil.rmtree(tmp_path / "killed" / "checkpoint_step_8", ignore_errors=True)
    for rank in run(tmp_path / "killed", "--max_steps", 8, "--checkpoint", "latest"):
        assert (ended := rank.wait()).code == 0, ended.err
    names = [path.name for path in (tmp_path / "whole" / "checkpoint_step_8").glob("*.safetensors")]
    for name in names:
        wanted, found = (load_file(tmp_path / folder / "checkpoint_step_8" / name) for folder in ("whole", "killed"))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), name


def judges_from_step_on(completions, **columns) -> list[float | None]:
    """Of the first two rounds everything is scored, of the later ones nothing."""
    judges_from_step_on.calls = getattr(judges_from_step_on, "calls", 0) + 1
    scored = judges_from_step_on.calls <= 2
    return [len(text) if scored else (None, float("nan"))[i % 2] for i, text in enumerate(completions)]


def judges_nothing(completions, **columns) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_run_in_which_nothing_is_scored_ends_and_keeps_what_was_learned(stage, words, workshop, tmp_path):
    given = [str(word).replace("share_of_e", "judges_from_step_on") for word in words(stage, tmp_path / "run")]
    ended = Forked(tmp_path / "streams", [*given, "--eval_fraction", 0]).wait()
    assert ended.code == 2 and ended.err.count("\n") == 1 and "Traceback" not in ended.err, ended.err
    assert "judges_from_step_on returned None for the answer" in ended.err and "3 rounds" in ended.err
    assert ended.out.count("no answer of this round was scored") == 3 and "grad_norm n/a" in ended.out
    assert "reward n/a" in ended.out and "empty steps so far" in ended.out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    empty = [row for row in lines if row.get("unscored") == 1.0]
    assert empty and all(row["loss"] is None and row["grad_norm"] is None and row["reward"] is None for row in empty)
    assert sum(row.get("event") == "alert" for row in lines) == 3
    assert any((tmp_path / "run").glob("checkpoint_step_*"))


def test_rounds_without_a_score_are_counted_over_a_resume(words, workshop, tmp_path):
    given = [str(word).replace("share_of_e", "judges_nothing") for word in words("grpo", tmp_path / "run")]
    given = [*given, "--eval_fraction", "0", "--save_interval", "2"]
    first = Forked(tmp_path / "streams", [*given, "--max_steps", "4"]).wait()  # two rounds of two steps
    assert first.code == 0, first.err
    again = Forked(tmp_path / "streams", [*given, "--checkpoint", "latest"]).wait()
    assert again.code == 2 and again.out.count("no answer of this round was scored") == 1, again.out


def test_dpo_starts_at_ln_2(whole):
    assert abs(rows(whole("dpo"))[1] - 0.693147) < 1e-6


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--stage sft", "--init_from"),
        ("--stage sft --init_from base", "--train_data"),
        ("--stage dpo --init_from base --train_data chat.jsonl", "--train_data holds chat preference"),
        ("--stage grpo --init_from base --train_data prompts.jsonl", "--reward_function"),
        ("--stage sft --init_from base --train_data chat.jsonl --load_in_4bit", "--lora"),
        ("--stage sft --init_from base --train_data chat.jsonl --max_length 9999", "--max_length 9999"),
        ("--stage sft --init_from nowhere --train_data chat.jsonl", "--init_from nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(given, named, workshop, tmp_path):
    given = in_workshop(workshop, given).split()
    ended = Forked(tmp_path / "streams", [*given, "--save_dir", tmp_path / "run", "--device", "cpu"]).wait()
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert all(word in ended.err for word in named.split()), ended.err
