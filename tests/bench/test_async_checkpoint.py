"""Does bench/async_checkpoint.py compare two ways of writing the same bytes, and leave nothing?"""

import re
import sys

from bench import async_checkpoint


def test_it_prints_what_the_loop_waits_for_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    sizes = "--hidden_size 64 --num_layers 1 --vocab_size 256 --saves 3"
    monkeypatch.setattr(sys, "argv", ["async_checkpoint.py", *sizes.split(), "--folder", str(tmp_path)])
    async_checkpoint.main()
    printed = capsys.readouterr().out
    waits = [float(seconds) for seconds in re.findall(r"([\d.]+) s   ", printed)]
    assert len(waits) == 3 and waits[0] > 0 and "of it" in printed
    assert list(tmp_path.iterdir()) == []
