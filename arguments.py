"""How do the scripts read their flags? With argparse made strict: whole names only, errors of one sentence.

Lowest layer, beside errors.py. Differences from `argparse.ArgumentParser`:
  - `--learn 1` is not taken for `--learning_rate 1`; `--learning-rate` and `--learning_rate` are the same flag
  - an unknown flag is named before a missing one, with the closest flag that exists; so for a wrong choice
  - an error is one line on stderr, without the usage text, and exit code 2
  - `--help` keeps the line breaks of the description and shows each default that is worth showing
  - of a parser with very many flags `--help` shows those of a first run; `--help GROUP` and `--help all` show the others
  - a flag may have other names (`aliases`); two names of one flag with different values are an error
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
        super().__init__(**settings, allow_abbrev=False, add_help=False)
        self._first: list[argparse.Action] = []
        self.aliases: dict[str, str] = {}  # the other name of a flag: its own, both without dashes
        self._help = self.add_argument("-h", "--help", action=_Help, help="show this help and leave")

    def shorten_help(self, first: Iterable[str]) -> None:
        """Let `--help` show the flags `first` alone; after it may stand the title of a group of flags, or `all`."""
        self._first = [self._option_string_actions[flag] for flag in first]
        titles = list(self._titled_groups())
        self._help.nargs, self._help.metavar = "?", "GROUP"
        self._help.choices = ["all", *titles]
        self._help.help = f"show this help, or that of a group, and leave; groups: {', '.join(titles)}, or all"

    def format_help(self, topic: str | None = None) -> str:
        """The help text, of a group of flags where its title is given, of every flag for `all`."""
        formatter = self._get_formatter()
        if topic in self._titled_groups():
            sections = [self._titled_groups()[topic]]
        elif self._first and topic is None:
            formatter.add_usage("%(prog)s [flags]", [], [])
            formatter.add_text(self.description)
            formatter.start_section("the flags of a first run")
            formatter.add_arguments([*self._optionals._group_actions, *self._first])  # --help and what has no group
            formatter.end_section()
            sections = []
        elif self._first:
            formatter.add_usage("%(prog)s [flags]", [], [])
            formatter.add_text(self.description)
            sections = self._action_groups
        else:
            return super().format_help()
        for group in sections:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help()

    def _titled_groups(self) -> dict[str, Any]:
        """The groups of flags that the caller made, by title; argparse makes the first two itself."""
        return {str(group.title): group for group in self._action_groups[2:]}

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:  # type: ignore[override]
        words = self._as_declared(args)
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            if _FLAG.fullmatch(name) and name not in self._option_string_actions:
                self.error(f"unknown flag {name}" + (did_you_mean(name, self._visible_flags()) or "; see --help"))
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}; see --help")
        return known

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[Any, list[str]]:
        known, unknown = super().parse_known_args(self._as_declared(args), namespace)
        self._set_aliased(known)
        return known, unknown

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

    def _set_aliased(self, known: argparse.Namespace) -> None:
        """What was given under another name, under the flag's own."""
        for alias, name in self.aliases.items():
            if alias in known:
                value = vars(known).pop(alias)
                if getattr(known, name, value) != value:
                    self.error(f"--{alias} is another name of --{name}, and both are given: leave one out")
                setattr(known, name, value)

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


class _Help(argparse.Action):
    """Prints the parser's help, of one group of flags where that is named, and leaves."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, ArgumentParser)
        print(parser.format_help(values or None), end="")
        parser.exit()


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
