"""What is an option of a run? One dataclass field that is a flag, a key of a `--config` file and a setting saved with the run.

The field holds everything that is to be known of the option: its default, its help, the values it takes and which runs
read it. Parsers, the checks of a config and docs/options.md are made from these, so a new option is one line in
training/option_groups.py.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from arguments import did_you_mean
from errors import UserError


@dataclass(frozen=True)
class Bound:
    """The numbers that an option takes; `words` go on from "--name must"."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Bound("be positive", lambda value: value > 0)
NOT_NEGATIVE = Bound("not be negative", lambda value: value >= 0)
A_SHARE = Bound("lie between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Bound("lie in [0, 1)", lambda value: 0 <= value < 1)
ABOVE_ZERO_TO_ONE = Bound("lie above 0 and be at most 1", lambda value: 0 < value <= 1)
WITHIN = Bound("lie between 0 and 1, and be neither", lambda value: 0 < value < 1)
BELOW_HALF = Bound("lie in [0, 0.5)", lambda value: 0 <= value < 0.5)


@dataclass(frozen=True)
class Runs:
    """The runs that read an option; `words` go on from "--name is for", `hold` sees the whole config of a run."""

    words: str
    hold: Callable[[Any], bool]


def runs_of(*stages: str) -> Runs:
    """The runs of these stages."""
    return Runs(f"--stage {' and '.join(stages)}", lambda config: config.stage in stages)


class Size(int):
    """A number of things, or AUTO, which is to be found."""

    def __new__(cls, value: Any) -> "Size":
        return AUTO if value == "auto" else super().__new__(cls, value)

    def __getnewargs__(self) -> tuple:  # a copy of AUTO is AUTO
        return ("auto" if self is AUTO else int(self),)


AUTO: Size = int.__new__(Size, 0)
POSITIVE_OR_AUTO = Bound("be positive, or auto", lambda value: value > 0 or value is AUTO)


class Spec(typing.NamedTuple):
    """What an option's field says of it. is_list: several values may follow the flag; bound and choices are each one's."""

    name: str
    help: str
    default: Any
    value_type: type
    is_list: bool
    choices: tuple[str, ...] | None
    bound: Bound | None
    read_by: tuple[Runs, ...]
    value_if_bare: Any
    aliases: tuple[str, ...]


def option(
    help: str,
    default: Any,
    *,
    choices: tuple[str, ...] | None = None,
    bound: Bound | None = None,
    read_by: Runs | tuple[Runs, ...] = (),
    value_if_bare: Any = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """The dataclass field of an option.

    read_by: the runs that read it, all of these at once; every run where none is named. value_if_bare: what the flag
    means without a value, where it may stand alone. aliases: what other scripts call it; they are flags and keys too.
    """
    readers = (read_by,) if isinstance(read_by, Runs) else read_by
    metadata = {
        "help": help, "choices": choices, "bound": bound, "read_by": readers, "value_if_bare": value_if_bare,
        "aliases": aliases,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def specs_of(options: type) -> dict[str, Spec]:
    """The options of a dataclass made of `option` fields, by name, in their order."""
    specs = {}
    for found in dataclasses.fields(options):
        value_type, is_list = _value_type(found.type)
        default = found.default_factory() if callable(found.default_factory) else found.default
        specs[found.name] = Spec(
            found.name, default=default, value_type=value_type, is_list=is_list, **found.metadata
        )  # fmt: skip
    return specs


def _value_type(annotation: Any) -> tuple[type, bool]:
    """(the type of one value, whether the option takes several)."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def check_bounds(config: Any, specs: Iterable[Spec]) -> None:
    """UserError for the first value of `config` that lies outside its option's bound."""
    for spec in specs:
        value = getattr(config, spec.name)
        for number in value if spec.is_list else [value]:
            if spec.bound and number is not None and not spec.bound.holds(number):
                raise UserError(f"--{spec.name} must {spec.bound.words}, and is {number}")


def add_flags(group: Any, specs: Iterable[Spec]) -> None:
    """Give an argparse group every option as a flag. One that is not given is absent from the result: its origin is known."""
    for spec in specs:
        settings: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "help": help_of(spec)}
        if spec.value_type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": spec.value_type, "choices": spec.choices, "metavar": values_of(spec)}
            if spec.value_if_bare is not None:
                settings |= {"nargs": "?", "const": spec.value_if_bare}
            if spec.is_list:
                settings["nargs"] = "+"
        group.add_argument(f"--{spec.name}", **settings)
        for alias in spec.aliases:  # the help of the option names it
            group.add_argument(f"--{alias}", **settings | {"dest": alias, "help": argparse.SUPPRESS})


def values_of(spec: Spec) -> str:
    """What stands for an option's value in a help text: its choices, or its type in capitals."""
    return "|".join(spec.choices) if spec.choices else spec.value_type.__name__.upper()


def help_of(spec: Spec) -> str:
    """An option's help for argparse, with its default where there is one that the text does not explain."""
    also = "".join(f"; also --{alias}" for alias in spec.aliases)
    text = spec.help.replace("%", "%%") + also
    if spec.default is False or spec.default in (None, "", []) or "(default" in text:
        return text
    shown = " ".join(spec.default) if spec.is_list else spec.default
    return f"{text} (default: {shown})"


def coerce_option(spec: Spec, value: Any, path: str) -> Any:
    """A value of a config file as the type of its option. UserError, naming `path`, for another.

    YAML 1.1 reads 3e-4 as a string, which is why this exists.
    """
    if value is None and spec.default is None:
        return None
    if spec.is_list:
        items = value if isinstance(value, list) else [value]
        return [_coerce_one(spec, item, path) for item in items]
    return _coerce_one(spec, value, path)


def _coerce_one(spec: Spec, value: Any, path: str) -> Any:
    name, value_type = spec.name, spec.value_type
    wrong = UserError(f"--config {path}: {name} must be of type {value_type.__name__}, and is {value!r}")
    if value_type is bool or isinstance(value, bool):
        if value_type is bool and isinstance(value, bool):
            return value
        raise wrong
    try:
        result = value_type(value)
    except (TypeError, ValueError) as error:
        raise wrong from error
    if issubclass(value_type, int) and value != "auto" and float(value) != result:  # 1.5 layers
        raise wrong
    if spec.choices and result not in spec.choices:
        choices, close = ", ".join(spec.choices), did_you_mean(str(result), spec.choices)
        raise UserError(f"--config {path}: {name} is {result!r}, not one of {choices}{close}")
    return result
