"""Do the files of docs/extending.md do what the page says, exactly as they are printed there?"""

import contextlib
import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from arguments import ArgumentParser
from batches.micro_batch import IGNORE_INDEX
from ranks import Ranks
from stages.custom_loss import choose_loss
from stages.sft import SFT
from tests.forked import Forked
from tests.stages.example_stages import a_feed, a_model, some_examples
from training.config import TrainConfig, add_options, resolve_config
from training.hooks import load_hooks
from training.saving import Saves

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
FILES |= dict(re.findall(r"^cat > (\w+\.py) <<'END'\n(.*?)^END\n", PAGE, re.MULTILINE | re.DOTALL))
SMALL = (
    "--hidden_size 32 --num_layers 1 --num_heads 2 --batch_size 4 --warmup_steps 0 --schedule wsd --decay_fraction 0 "
    "--sample_prompt= --log_interval 10 --device cpu"
)


@pytest.fixture
def page(tmp_path) -> Path:
    """A folder with every file of the page."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def rows(run: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in lines if key in row}


def test_every_file_of_the_page_is_tried_here():
    assert set(FILES) == {"watch.py", "early_stopping.py", "weight_norm.py", "drops.py", "smoothed.py"}
    assert PAGE.count("```python") == 4


def test_the_commands_of_the_page_are_understood(page, root, monkeypatch):
    monkeypatch.chdir(page)
    Path("configs").symlink_to(root / "configs")
    commands = re.findall(r"^python train\.py ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    parser = ArgumentParser()
    add_options(parser)
    for command in commands:
        resolve_config(vars(parser.parse_args(shlex.split(command.replace("\\\n", " ")))))


def test_the_hooks_of_the_page_in_one_run(page, tiny_data):
    """All files at once, at a rate that changes nothing, so no evaluation is better than the first, and the third of those
    after it is the last."""
    hooks = "weight_norm.py drops.py early_stopping.py watch.py"
    with contextlib.chdir(page):
        words = (
            f"{SMALL} --data_dir {tiny_data} --max_steps 200 --eval_interval 20 --learning_rate 1e-30 --save_dir run"
        )
        ended = Forked(page / "streams", [*words.split(), "--hooks", *hooks.split()]).wait()
    assert ended.code == 0 and "ended by --hooks at step 80" in ended.out, ended.err
    lr, val_loss, norms = (rows(page / "run", key) for key in ("lr", "val_loss", "weight_norm"))
    assert sorted(val_loss) == [20, 40, 60, 80] and sorted(norms) == sorted(lr) == list(range(10, 90, 10))
    assert {step: value / 1e-30 for step, value in lr.items()} == pytest.approx(
        {10: 1, 20: 1, 30: 1, 40: 1, 50: 0.3, 60: 0.3, 70: 0.1, 80: 0.1}
    )
    weights = load_file(page / "run/checkpoint_step_80/model.safetensors").values()
    assert norms[80] == pytest.approx(sum(w.double().square().sum().item() for w in weights) ** 0.5, rel=1e-6)


def test_the_first_file_stops_where_the_page_says(page):
    hooks = load_hooks(TrainConfig(hooks=[str(page / "watch.py")]), {})
    run = SimpleNamespace(
        config=TrainConfig(), model=a_model(), ranks=Ranks(0, 1, torch.device("cpu")), step=3, tokens=30, learning_rate=0.1,
        saves=Saves(),
    )  # fmt: skip
    for bits, stop in ((2.6, False), (2.4, True)):
        row = hooks.call("on_evaluate", run, {"val_loss": 2.0, "val_bpb": bits})
        assert row == {"val_per_token": pytest.approx(math.exp(2.0))} and hooks.stop == stop


def test_the_loss_of_the_page_is_its_closed_form(page):
    """0.9 times the cross-entropy and 0.1 times the mean of -log p over the vocabulary, summed over the targets; to 1e-6."""
    stage, model = SFT(a_feed(some_examples(6, 1))), a_model()
    batch = next(stage.batches(0))[0]
    config = TrainConfig(stage="sft", loss_file=f"{page / 'smoothed.py'}:loss")
    total, _ = choose_loss(config, stage.loss)(model, batch)
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, max_seqlen=batch.input_ids.shape[1])
    targets = batch.targets.flatten()
    learned = targets != IGNORE_INDEX
    logprobs = model.logits(hidden).flatten(0, 1)[learned].double().log_softmax(-1)
    wanted = -0.9 * logprobs.gather(-1, targets[learned, None]).sum() - 0.1 * logprobs.mean(-1).sum()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
