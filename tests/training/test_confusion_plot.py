"""Does the picture show labels as rows and predictions as columns, whatever the classes are called?"""

import numpy as np
import pytest
from matplotlib.image import imread

from training.confusion_plot import plot_confusion


def dark_cell(counts, path):
    """The middle, (row, column) as fractions of the picture, of the darkest blue left of the scale."""
    plot_confusion(np.array(counts), ["a", "b", "c"], path)
    picture = imread(path)[..., :3]
    picture = picture[:, : int(picture.shape[1] * 0.75)]
    dark = np.abs(picture - np.array([0.031, 0.188, 0.42])).max(axis=2) < 0.02  # the end of the scale
    rows, columns = np.nonzero(dark)
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def test_labels_are_rows_and_predictions_columns(tmp_path):
    top, right = dark_cell([[0, 0, 9], [0, 0, 0], [0, 0, 0]], tmp_path / "a.png")
    bottom, left = dark_cell([[0, 0, 0], [0, 0, 0], [9, 0, 0]], tmp_path / "a.png")
    assert top < bottom - 0.3 and left < right - 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("size", [2, 30, 100])
def test_any_number_of_classes_of_any_name_is_drawn(tmp_path, size):
    names = ["$x", "_private", "日本", "a" * 200, *map(str, range(size))][:size]
    plot_confusion(np.eye(size, dtype=int), names, tmp_path / "a.png", title="run_$1")
    assert imread(tmp_path / "a.png").shape[2] == 4


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError):
        plot_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "no" / "a.png")
    assert not any(tmp_path.iterdir())
