"""How do the scripts read their flags? With argparse made strict: whole names only, errors of one sentence.

Lowest layer, beside errors.py. Differences from `argparse.ArgumentParser`:
  - `--learn 1` is not taken for `--learning_rate 1`; `--learning-rate` and `--learning_rate` are the same flag
  - an unknown flag is named before a missing one, with the closest flag that exists; so for a wrong choice
  - an error is one line on stderr, without the usage text, and exit code 2
  - `--help` keeps the line breaks of the description and shows each default that is worth showing
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from errors import EXIT_USER_ERROR

_FLAG = re.compile(r"--[A-Za-z][\w-]*")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text `; did you mean X?` for the known word closest to `word`, or an empty string when none is close."""
    by_folded_name = {name.replace("-", "_").lower(): name for name in known}
    matches = difflib.get_close_matches(word.replace("-", "_").lower(), by_folded_name, n=1, cutoff=0.6)
    return f"; did you mean {by_folded_name[matches[0]]}?" if matches else ""


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with the differences that the file's docstring lists; same constructor arguments."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        words = self._as_declared(args)
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            if _FLAG.fullmatch(name) and name not in self._option_string_actions:
                self.error(f"unknown flag {name}" + (did_you_mean(name, self._visible_flags()) or "; see --help"))
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}; see --help")
        return known

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[Any, list[str]]:
        return super().parse_known_args(self._as_declared(args), namespace)

    def error(self, message: str) -> NoReturn:
        sentence = message.removeprefix("argument ").replace("\n", " ")
        self.exit(EXIT_USER_ERROR, f"error: {sentence}\n")

    def _as_declared(self, args: Sequence[str] | None) -> list[str]:
        """The words of the command line, each flag spelled with the dashes or underscores of its declaration."""
        declared = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if _FLAG.fullmatch(name):
                words[index] = declared.get(name.replace("-", "_"), name) + equals + value
        return words

    def _visible_flags(self) -> list[str]:
        return [
            flag
            for flag, action in self._option_string_actions.items()
            if flag.startswith("--") and action.help != argparse.SUPPRESS
        ]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{str(value)!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
            )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and adds `(default: X)` unless there is none, or the help says it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [], ())
        if silent or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"
