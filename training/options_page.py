"""Writes docs/options.md, the page with every option of a run: python -m training.options_page (`make options`)."""

import inspect
import textwrap
from pathlib import Path

from training.option import Spec, help_of, values_of
from training.option_groups import GROUPS, specs_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
_WIDTH = 100
_HEAD = """# Every option of a run

```sh
python train.py --help
```

```text
usage: train.py [flags]
…
the flags of a first run:
  -h [GROUP], --help [GROUP]  show this help, or that of a group, and leave;
                              groups: stage, data, examples, adapters, …
…
```

This shows the flags of a first run. `--help GROUP` shows one of the groups below. `--help all`
shows all.

Each option is a flag of `train.py` and of `utils.py plan`, and a key of `--config` files. A
yes-or-no option is switched off by `--no-` before its name. An option that a run would not read is
refused.

This page is made from `training/option_groups.py` by `make options`; a test holds it current.
"""


def options_page() -> str:
    """The text of the page, in Markdown."""
    parts = [_HEAD]
    for title, group in GROUPS.items():
        about, example = inspect.cleandoc(group.__doc__ or "").split("\n\n")
        wrapped = " \\\n    ".join(textwrap.wrap(example, _WIDTH - 6, break_long_words=False, break_on_hyphens=False))
        parts.append(f"## {title}\n\n{about}\n\n```sh\n{wrapped}\n```\n")
        parts.append("\n".join(_entry(spec) for spec in specs_of(group).values()) + "\n")
    return "\n".join(parts)


def _entry(spec: Spec) -> str:
    """One option: its flag, what it takes, what it is, and in which runs."""
    flag = f"--{spec.name}" if spec.value_type is bool else f"--{spec.name} {values_of(spec)}"
    if spec.is_list:
        flag += " ..."
    sentences = [help_of(spec).replace("%%", "%")]
    if spec.bound:
        sentences.append(f"Must {spec.bound.words}")
    sentences += [f"Only for {runs.words}" for runs in spec.read_by]
    text = f"- `{flag}`: {'. '.join(sentences)}."
    return "\n".join(
        textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    )


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
