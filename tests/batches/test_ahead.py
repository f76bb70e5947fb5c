"""Are batches that a thread makes ahead the same ones, and does the thread end with who uses it?"""

import itertools
import threading
import time

import pytest
import torch

from batches.ahead import made_ahead
from batches.micro_batch import MicroBatch

CPU = torch.device("cpu")


def step(number: int) -> list[MicroBatch]:
    row = torch.full((1, 4), number)
    return [MicroBatch(row, row, row, None, weight=4, num_tokens=4)]


def numbers(steps) -> list[int]:
    return [int(batch.input_ids[0, 0]) for batches in steps for batch in batches]


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_same_steps_in_the_same_order():
    assert numbers(made_ahead(map(step, range(50)), CPU)) == list(range(50))


def test_no_more_are_made_than_asked_for_and_closing_ends_the_thread():
    made = []

    def endless():
        for number in itertools.count():
            made.append(number)
            yield step(number)

    steps, before = made_ahead(endless(), CPU, depth=3), threading.active_count()
    assert numbers([next(steps)]) == [0]
    until(lambda: len(made) == 4)  # one in use, three ahead
    time.sleep(0.05)
    assert len(made) == 4 and threading.active_count() == before + 1
    steps.close()
    until(lambda: threading.active_count() == before)


def test_what_fails_is_raised_where_it_is_used():
    def damaged():
        yield step(0)
        raise ValueError("shard 3 is damaged")

    steps = made_ahead(damaged(), CPU)
    assert numbers([next(steps)]) == [0]
    with pytest.raises(ValueError, match="shard 3 is damaged"):
        next(steps)
