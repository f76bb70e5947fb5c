"""Does the picture of a run show what it should, and does it replace the old one in one step?"""

import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from training.plots import plot_runs
from training.run_files import RunHistory

BLUE, ORANGE = to_rgb("#1f77b4"), to_rgb("#ff7f0e")


def make_run(folder, name="run", offset=0.0, steps=200, **run):
    noise = np.random.default_rng(0).normal(0, 0.02, steps)
    train = [
        {
            "step": step, "loss": 3 + offset + 5 * np.exp(-step / 10) + noise[step - 1], "lr": 1e-3, "grad_norm": 1.0,
            "tok_s": 100.0, "mem_gb": 2.0,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    evals = [{"step": step, "val_loss": 3.1 + offset, "val_bpb": 1.0 + offset} for step in range(20, steps, 20)]
    return RunHistory(folder, {"name": name, **run}, {"step": steps}, train, evals)


def loss_panel(path):
    """Top left sixth of the picture as (rows, columns, 3) in 0 to 1."""
    picture = imread(path)[..., :3]
    return picture[: picture.shape[0] // 2, : picture.shape[1] // 3]


def rows_of(panel, colour):
    """Heights, in pixels from the top, at which `colour` is drawn in the right half of the panel, axes left out."""
    near = np.abs(panel - np.array(colour)).max(axis=2) < 0.02
    near[: panel.shape[0] // 4] = False  # the legend
    return np.nonzero(near[:, panel.shape[1] // 2 :])[0]


def test_two_runs_are_overlaid_the_lower_loss_below(tmp_path):
    plot_runs([make_run(tmp_path, "low"), make_run(tmp_path, "high", offset=0.3)], tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    panel = loss_panel(tmp_path / "two.png")
    low, high = rows_of(panel, BLUE), rows_of(panel, ORANGE)
    assert len(low) > 50 and len(high) > 50
    assert np.median(low) > np.median(high) + 50  # pixels grow downwards


def test_the_warm_up_cliff_does_not_flatten_the_curve(tmp_path):
    """Loss falls from 8 to 3 in 30 steps and then by 0.2: with the full range the rest would span 4 % of the panel."""
    run = make_run(tmp_path)
    for row in run.train:
        row["loss"] -= 0.2 * row["step"] / 200
    plot_runs([run], tmp_path / "one.png")
    rows = rows_of(loss_panel(tmp_path / "one.png"), BLUE)
    assert np.ptp(rows) > 60


@pytest.mark.parametrize("name", ["$\\bad{math$", "_hidden", "日本 \u0000", "a" * 300])
def test_any_name_can_be_drawn(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_runs([make_run(tmp_path, name, git_commit="0123456789abcdef", num_params=10**6)], tmp_path / "one.png")
        plot_runs([make_run(tmp_path, name), make_run(tmp_path, name, offset=0.2)], tmp_path / "two.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000 and (tmp_path / "two.png").stat().st_size > 10_000


def test_runs_with_little_or_nothing_to_show_are_drawn(tmp_path):
    empty = RunHistory(tmp_path)
    all_null = RunHistory(
        tmp_path, {}, {}, [{"step": 1, "loss": None, "grad_norm": None}], [{"step": 1, "val_loss": None}]
    )
    events = [{"step": 1, "event": "resume"}, {"step": 1, "event": "alert"}, {"step": 1, "event": []}]
    one_row = RunHistory(tmp_path, {}, {}, [{"step": 1, "loss": 2.0}], [], [], events)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runs in ([empty], [all_null], [one_row], [empty, all_null, one_row]):
            plot_runs(runs, tmp_path / "few.png")
            assert imread(tmp_path / "few.png").shape[:2] == (800, 1500)


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError):
        plot_runs([make_run(tmp_path)], tmp_path / "taken.png")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]
    with pytest.raises(OSError):
        plot_runs([make_run(tmp_path)], tmp_path / "missing" / "curves.png")
