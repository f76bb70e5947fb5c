"""Does a chat template that never ends, or fills the memory, end in a sentence within seconds? Each in a process of its own."""

import subprocess
import sys
import threading
import time

import pytest

from finetune_data.chat_template import ChatTemplate, EndlessTemplateError
from finetune_data.examples import Message
from limits import CallTimeout, call_within

TALK = [Message("user", "Hi"), Message("assistant", "Hello")]
ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'much text' }}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "adding": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "times": "{{ 'x' * 10**11 }}", "list": "{{ [1] * 10**11 }}", "format": "{{ '%99999999999d' % 1 }}",
    "filter": "{{ 'x'|center(10**11) }}", "method": "{{ 'x'.ljust(10**11) }}", "power": "{{ 9**(9**9) }}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "long": "{{ 'x' * (1 << 28) }}",
}  # fmt: skip
PROGRAM = """
import sys
from finetune_data.chat_template import ChatTemplate
from finetune_data.examples import Message
from errors import run_script
run_script(lambda: ChatTemplate("own.jinja", sys.argv[1]).render([Message("user", "Hi")]) and 0)
"""


@pytest.mark.parametrize("name", ENDLESS)
def test_it_ends_in_a_sentence_that_names_the_template(name, root):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ENDLESS[name]],
        cwd=root, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr[-500:]
    assert "own.jinja" in done.stderr and time.monotonic() - start < 30


def test_it_works_in_a_thread_and_leaves_the_process_as_it_was():
    import resource

    before, found = resource.getrlimit(resource.RLIMIT_AS), []

    def render() -> None:
        try:
            ChatTemplate("own.jinja", ENDLESS["times"]).render(TALK)
        except EndlessTemplateError as error:
            found.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(30)
    assert found and resource.getrlimit(resource.RLIMIT_AS) == before
    assert "Hello" in ChatTemplate("chatml", "{{ messages[1].content }}").render(TALK)


def test_a_call_that_ends_as_its_time_does_ends_one_way_or_the_other():
    """The watching thread's exception may come between any two bytecodes: it neither escapes nor leaves a lock locked."""
    ended = {"done": 0, "stopped": 0}

    def call_for(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def try_often() -> None:
        for number in range(500):
            try:
                call_within(0.001, lambda number=number: call_for(0.0007 + number % 7 * 0.0001))
                ended["done"] += 1
            except CallTimeout:
                ended["stopped"] += 1

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often, so that it comes at many places
    try:
        thread = threading.Thread(target=try_often, daemon=True)
        thread.start()
        thread.join(60)
    finally:
        sys.setswitchinterval(usual)
    assert sum(ended.values()) == 500, ended
    assert ended["stopped"] > 0, "no call was stopped: the test tries nothing"
