"""Is an array in a file what NumPy maps, and is a file that changes under the reader an error with a sentence?"""

import os
from bisect import bisect_right

import numpy as np
import pytest

from dataprep import file_array
from dataprep.file_array import FileArray, count_up_to
from errors import UserError


def test_pieces_are_what_numpy_maps(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**40, 1000)
    (tmp_path / "a.bin").write_bytes(b"headerXY" + values.tobytes())
    ours = FileArray(tmp_path / "a.bin", "<i8", offset=8)
    mapped = np.memmap(tmp_path / "a.bin", "<i8", mode="r", offset=8)
    assert len(ours) == 1000 and ours.itemsize == 8 and list(ours) == mapped.tolist()
    for piece in (slice(None), slice(10, 20), slice(-5, None), slice(20, 10), slice(990, 2000), slice(0, 100, 7)):
        assert np.array_equal(ours[piece], mapped[piece])
    assert ours[-1] == mapped[-1]
    with pytest.raises(IndexError):
        ours[1000]
    assert np.array_equal(FileArray(tmp_path / "a.bin", "<i8", 16, 10)[:], values[1:11])


@pytest.mark.parametrize("spacing", ["even", "sorted by length", "one giant", "equal"])
@pytest.mark.parametrize("size", [1, 256, 257, 30_000])
def test_a_search_finds_what_bisection_finds(spacing, size, tmp_path):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 1000, size)
    if spacing == "sorted by length":
        lengths = np.sort(lengths**3)
    if spacing == "one giant":
        lengths[size // 3] = 10**12
    if spacing == "equal":
        lengths[:] = 0
    values = np.cumsum(lengths)
    values.astype("<i8").tofile(tmp_path / "a.bin")
    array, known = FileArray(tmp_path / "a.bin", "<i8"), values.tolist()
    places = random.integers(0, size, 200)
    for value in [-1, 0, *(values[places]).tolist(), *(values[places] + 1).tolist(), known[-1] + 5]:
        assert count_up_to(array, value) == bisect_right(known, value)


def test_a_file_that_shrinks_vanishes_or_is_replaced_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    array = FileArray(path, "<u2")
    assert array[999] == 999
    path.rename(tmp_path / "moved")
    assert array[998] == 998, "what is open stays what it is"
    file_array._opened.cache_clear()  # as after 256 others were opened
    with pytest.raises(UserError, match=r"a\.bin cannot be read any more \(No such file"):
        array[0]
    np.arange(999, dtype="<u2").tofile(path)
    with pytest.raises(UserError, match=r"a\.bin was replaced or written to: it has 1,998 bytes, and had 2,000"):
        array[0]
    array = FileArray(path, "<u2")
    assert array[998] == 998
    os.truncate(path, 100)
    with pytest.raises(UserError, match=r"a\.bin has shrunk from 1,998 to 100 bytes"):
        array[500]
    assert array[3] == 3


def test_no_more_files_are_open_than_allowed(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    if before is None:
        pytest.skip("this system does not show what is open")
    arrays = []
    for number in range(file_array.MAX_OPEN + 50):
        np.full(4, number, dtype="<i4").tofile(tmp_path / str(number))
        arrays.append(FileArray(tmp_path / str(number), "<i4"))
    for _ in range(2):
        assert [int(array[2]) for array in arrays] == list(range(len(arrays)))
    assert len(os.listdir("/proc/self/fd")) <= before + file_array.MAX_OPEN
    file_array._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before
