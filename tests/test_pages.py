"""Do the pages read easily: lines that fit, a command first and what it prints, links that lead somewhere?"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_longer_than_100_characters(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [f"{number}: {line}" for number, line in enumerate(lines, start=1) if len(line) > 100]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_a_page_begins_with_a_command_and_what_it_prints(page):
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# [^\n]+\n\n```sh\n(?:[^`]+)```\n\n```text\n[^`]+```\n", text), (
        "title, ```sh block, ```text block"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_lines_that_kernels_md_names_are_there():
    """`file:line` `text of it`: the list of what nothing without a GPU reaches."""
    named = re.findall(r"`([\w/]+\.py):(\d+)`\s`([^`]+)`", (ROOT / "docs/kernels.md").read_text(encoding="utf-8"))
    assert len(named) >= 10
    for path, number, text in named:
        line = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert text in line, f"docs/kernels.md: {path}:{number} is {line.strip()}"
