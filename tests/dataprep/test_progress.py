"""Does long work show how far it is on a terminal, and nothing elsewhere?"""

import io
import re
import sys
import time

import pytest

from dataprep.progress import Progress
from ranks import Ranks
from stages.dpo import reference_logprobs
from tests.stages.example_stages import CPU, MAX_LENGTH, a_model, some_examples
from training.examples_data import ExampleData
from training.precision import choose_precision


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "unit,words",
    [
        (None, "encoding  25%  1.0 MB of 4.0 MB  0.1 MB/s  30 s left"),
        ("rows", "encoding  25%  1,000,000 of 4,000,000 rows  100,000.0 rows/s  30 s left"),
    ],
)
def test_the_line_says_how_far_how_fast_and_how_long(unit, words):
    """A quarter in ten seconds: thirty are left."""
    terminal = Terminal()
    progress = Progress(terminal)
    progress.show("encoding", 1_000_000, 4_000_000, time.monotonic() - 10, unit)
    assert terminal.getvalue() == f"\r\x1b[K{words}"
    progress.say("done")
    assert terminal.getvalue().endswith("\r\x1b[Kdone\n")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_references_pass_is_seen_on_the_first_ranks_terminal_only(stream, rank, monkeypatch):
    """The last line names all of its own sequences, and is gone afterwards."""

    class Alone(Ranks):
        def sum(self, values):
            return values

    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr("dataprep.progress._REDRAW_SECONDS", 0.0)
    reference_logprobs(
        a_model(), ExampleData(some_examples(6, size=2), 0), max_length=MAX_LENGTH, micro_batch_size=1,
        ranks=Alone(rank, 2, CPU), precision=choose_precision("none", CPU),
    )  # fmt: skip
    shown = sys.stdout.getvalue()
    if stream is io.StringIO or rank == 1:
        assert shown == ""
        return
    lines = shown.split("\r\x1b[K")
    assert [re.match(r"reference +\d+%  (\d+) of 6 sequences  [\d.,]+ sequences/s  ", line)[1] for line in lines[1:-1]] == [
        "2", "4", "6",
    ]  # fmt: skip
    assert lines[-1] == ""
