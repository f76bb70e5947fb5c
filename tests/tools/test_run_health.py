"""Is each stage judged by what it learns from: a loss, the preference between two answers, or a reward?"""

import math
import time
from pathlib import Path

import numpy as np
import pytest

from tools import monitor
from tools.run_health import assess
from training.plots import plot_runs
from training.run_files import RunHistory
from training.stage_figures import figures_of, last_figures, shared_figures

ROWS = 80
LN2 = math.log(2)
PROGRESS = np.arange(1, ROWS + 1) / ROWS
COLUMNS = {  # of a sound run
    "mlm": {"loss": 2 - 0.5 * PROGRESS, "masked_accuracy": 0.5 * PROGRESS, "next_sentence_accuracy": 0.5 + 0.4 * PROGRESS,
            "next_sentence_loss": LN2 - 0.5 * PROGRESS},
    "sft": {"loss": 2 - 0.5 * PROGRESS},
    "reward": {"loss": LN2 - 0.3 * PROGRESS, "accuracy": 0.5 + 0.3 * PROGRESS, "margin": PROGRESS,
               "score/chosen": PROGRESS / 2, "score/rejected": -PROGRESS / 2},
    "dpo": {"loss": LN2 - 0.2 * PROGRESS, "rewards/accuracies": 0.5 + 0.2 * PROGRESS, "rewards/margins": PROGRESS,
            "rewards/chosen": PROGRESS, "rewards/rejected": -PROGRESS, "logps/chosen": -80 + PROGRESS,
            "logps/rejected": -90 - PROGRESS},
    "grpo": {"loss": 0 * PROGRESS, "reward": 0.2 + 0.4 * PROGRESS, "reward_std": 0.4 + 0 * PROGRESS, "entropy": 2 - PROGRESS,
             "clip_fraction": 0.02 + 0 * PROGRESS, "completion_length": 90 + 20 * PROGRESS, "finished": 0.9 + 0 * PROGRESS,
             "equal_groups": 0.4 + 0 * PROGRESS},
    "ppo": {"loss": 0.1 - 0.1 * PROGRESS, "reward": 0.2 + 0.4 * PROGRESS, "reward_std": 0.4 + 0 * PROGRESS, "kl": 3 * PROGRESS,
            "entropy": 2 - PROGRESS, "clip_fraction": 0.1 + 0 * PROGRESS, "completion_length": 90 + 20 * PROGRESS,
            "finished": 0.9 + 0 * PROGRESS, "approx_kl": 0.01 + 0 * PROGRESS, "value_loss": 0.5 - 0.3 * PROGRESS},
}  # fmt: skip
HELD_OUT = {
    "mlm": "val_loss",
    "sft": "val_loss",
    "reward": "val_loss",
    "dpo": "val_loss",
    "grpo": "val_reward",
    "ppo": "val_reward",
}


def a_run(folder: Path, stage: str, noise: float = 0.02, held_out=None, config=(), **spoilt) -> RunHistory:
    """80 log lines of a run of 100 steps. `spoilt` replaces columns, with / written as __."""
    random = np.random.default_rng(1)
    columns = {name: values + noise * random.standard_normal(ROWS) for name, values in COLUMNS[stage].items()}
    columns |= {
        name: values + 0 * PROGRESS for name, values in COLUMNS[stage].items() if name in ("reward_std", "finished")
    }
    columns |= {name.replace("__", "/"): values + 0 * PROGRESS for name, values in spoilt.items()}
    train = [
        {"step": row + 1, "lr": 1e-5, "grad_norm": 1.0, "tok_s": 100.0, "dt": 1.0, "tokens": row, "mem_gb": 1.0}
        | {name: float(values[row]) for name, values in columns.items()}
        for row in range(ROWS)
    ]  # fmt: skip
    names = (HELD_OUT[stage], "val_loss", "val_accuracy", "val_length", "val_finished")
    evals = [{"step": 20 * n, **dict.fromkeys(names, value)} for n, value in enumerate(held_out or (), start=1)]
    now = time.time()
    settings = {"stage": stage, "dpo_loss": "sigmoid", "dpo_beta": 0.1, "init_from": "base", "max_new_tokens": 128}
    run = {
        "name": stage,
        "config": {**settings, **dict(config)},
        "max_steps": 100,
        "started": now - 100,
        "num_params": 1000,
    }
    status = {"state": "training", "step": ROWS, "max_steps": 100, "time": now}
    folder.mkdir(parents=True, exist_ok=True)
    return RunHistory(folder, run, status, train, evals)


def warnings_of(run: RunHistory) -> list[str]:
    return assess(run, [], time.time()).warnings


@pytest.mark.parametrize("stage", COLUMNS)
def test_a_sound_run_of_any_stage_has_no_warnings(stage, tmp_path):
    """With noise, and at their start too: DPO hovers around ln 2, and a policy's loss around zero throughout."""
    run = a_run(tmp_path, stage)
    for rows in (1, 5, 20, 40, ROWS):
        run.train, whole = run.train[:rows], run.train
        assert warnings_of(run) == [], rows
        run.train = whole


def test_the_loss_of_reinforcement_learning_is_not_judged(tmp_path):
    """It rises, has a spike and ends above the logarithm of any vocabulary: nothing of that means anything."""
    for stage in ("grpo", "ppo"):
        loss = PROGRESS * 20 + 30 * (np.arange(ROWS) == ROWS - 5)
        assert warnings_of(a_run(tmp_path, stage, loss=loss)) == []
    assert any("rising" in words for words in warnings_of(a_run(tmp_path, "sft", loss=2 + PROGRESS)))
    (words,) = warnings_of(a_run(tmp_path, "dpo", loss=0.5 + 3 * (np.arange(ROWS) == ROWS - 5)))
    assert "spike" in words


@pytest.mark.parametrize(
    "stage,spoilt,words",
    [
        ("mlm", {"loss": 5.0, "config": {"init_from": None, "vocab_size": 100}}, ["5.000", "4.605 of a blind guess"]),
        ("dpo", {"loss": LN2 + 0.1}, ["0.793", "0.693 of a guess between chosen and rejected"]),
        ("dpo", {"loss": 26.0, "config": {"dpo_loss": "ipo"}}, ["25.000"]),
        ("dpo", {"loss": 1.2, "config": {"dpo_loss": "hinge"}}, ["1.000"]),
        ("reward", {"loss": LN2 + 0.05}, ["guess between chosen and rejected"]),
        ("dpo", {"loss": 0.3 + 0.2 * PROGRESS}, ["the loss is rising"]),
        ("reward", {"held_out": (0.5, 0.52, 0.55, 0.6)}, ["validation rose three times", "step 20"]),
        ("ppo", {"reward": 0.8 - 0.6 * PROGRESS}, ["the reward is falling", "around step"]),
        ("grpo", {"reward": 0.0, "equal_groups": 1.0}, ["all answers to a prompt were worth the same", "--group_size"]),
        ("ppo", {"reward": 1.0, "reward_std": 0.0}, ["all answers were worth the same", "reward 1"]),
        ("grpo", {"entropy": 2 * np.exp(-6 * PROGRESS)}, ["entropy has fallen from", "--kl_coefficient"]),
        ("ppo", {"clip_fraction": 0.6}, ["60% of the tokens are clipped"]),
        ("ppo", {"kl": 220.0, "completion_length": 100}, ["2.2 nats a token from its reference"]),
        ("grpo", {"kl": 1.5}, ["1.5 nats a token from its reference"]),
        ("grpo", {"finished": 0.1}, ["only 10% of the answers end", "--max_new_tokens 128"]),
        ("ppo", {"held_out": (0.6, 0.5, 0.4, 0.3)}, ["the held-out reward fell three times in a row since step 20"]),
    ],
)  # fmt: skip
def test_each_stage_has_its_own_warnings(stage, spoilt, words, tmp_path):
    found = warnings_of(a_run(tmp_path, stage, **spoilt))
    assert len(found) == 1 and all(word in found[0] for word in words), found


@pytest.mark.parametrize(
    "stage,spoilt",
    [
        ("dpo", {"loss": 3.0, "config": {"dpo_loss": "orpo"}}),  # with the answer's own loss in it
        ("dpo", {"loss": 0.01 + 0.02 * PROGRESS}),  # from 0.01 to 0.03: nothing to worry about
        ("ppo", {"kl": 90.0, "completion_length": 100}),
        ("grpo", {"grad_norm": np.where(np.arange(ROWS) == ROWS - 3, 0.5, 0.0)}),  # the first group that differed
        ("ppo", {"held_out": (0.3, 0.4, 0.5, 0.6)}),  # whose val_loss, were it one, rises
        ("sft", {"loss": 12.0 - PROGRESS, "config": {"vocab_size": 100}}),
    ],
)
def test_what_another_stage_would_be_warned_of(stage, spoilt, tmp_path):
    assert warnings_of(a_run(tmp_path, stage, **spoilt)) == []


def test_the_screen_has_the_stages_curve_and_figures(tmp_path, capsys):
    run = a_run(tmp_path, "ppo", noise=0.0, held_out=(0.3, 0.5, 0.4, 0.4))
    assert dict(last_figures(run)) == {
        "±": 0.4, "KL": 3.0, "KL of a round": 0.01, "clipped": 0.1, "entropy": 1.0, "length": 110.0, "finished": 0.9,
        "value loss": pytest.approx(0.2),
    }  # fmt: skip
    view = monitor.RunView(run, [], assess(run, [], time.time()), "o", "cyan")
    for width in (80, 140):
        console = monitor.Console(width=width, color_system=None, force_terminal=False)
        console.print(monitor.render([view], console))
        out = capsys.readouterr().out
        expected = [
            "reward, smoothed",
            "0.6000",
            "0.4000",
            "0.5000@40",
            "KL 3",
            "entropy 1",
            "length 110",
            "no warnings",
        ]
        assert not [text for text in expected if text not in out], out
        assert "bits" not in out and "loss," not in out


def test_the_picture_has_the_stages_panels(tmp_path):
    """What is drawn is read off the figure itself: the reward rises in the first panel, the loss is nowhere."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    original, Figure.savefig = (
        Figure.savefig,
        lambda self, *args, **kw: (drawn.append(self), original(self, *args, **kw)),
    )
    try:
        runs = [a_run(tmp_path, stage, held_out=(0.3, 0.5)) for stage in ("ppo", "grpo", "dpo")]
        plot_runs(runs[:1], tmp_path / "ppo.png")
        plot_runs(runs[2:], tmp_path / "dpo.png")
        plot_runs(runs, tmp_path / "mixed.png")
    finally:
        Figure.savefig = original
    ppo, dpo, mixed = ([axes.get_title() for axes in figure.axes] for figure in drawn)
    assert (
        ppo[0].startswith("reward") and any("entropy" in title for title in ppo) and not any("loss" in t for t in ppo)
    )
    smooth = drawn[0].axes[0].lines[1].get_ydata()
    assert smooth[-1] > smooth[0] + 0.3
    assert dpo[0].startswith("loss") and any("chosen answer is preferred" in title for title in dpo)
    assert mixed[0].startswith("loss") and not any("not recorded" in title for title in ppo + dpo)


def test_runs_that_share_a_screen_share_what_they_have_in_common(tmp_path):
    grpo, ppo, dpo, sft = (a_run(tmp_path, stage) for stage in ("grpo", "ppo", "dpo", "sft"))
    assert shared_figures([grpo, ppo]).curve == "reward" and shared_figures([grpo, dpo]).curve == "loss"
    assert shared_figures([dpo, sft]).held_out == "val_loss"
    assert figures_of(RunHistory(tmp_path)).curve == "loss"
    assert figures_of(RunHistory(tmp_path, {"config": {"stage": ["broken"]}})).curve == "loss"
