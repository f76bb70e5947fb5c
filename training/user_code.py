"""What is in a file of the user's own code, and in which line of it did something fail?

A file is first read without being run, so that a mistake in its syntax or in a function's name is found before any data is
read. It is run from the text that was read, so what a checkpoint pins is what was run.
"""

import ast
import hashlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import did_you_mean
from errors import UserError

HOOKS = ("on_start", "on_step", "on_evaluate", "on_checkpoint", "on_finish")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class UserCode:
    """A file named by `flag`: its text, and the functions that are written at its top level."""

    flag: str
    path: Path
    text: bytes
    functions: dict[str, Function]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()

    def line(self, number: int) -> str:
        """The beginning of a sentence about that line."""
        return f"{self.flag} {self.path}, line {number}"

    def refuse_unfit(self, name: str, parameters: int) -> None:
        """UserError where `name` is async, or cannot be called with so many arguments."""
        function = self.functions[name]
        if isinstance(function, ast.AsyncFunctionDef):
            raise UserError(f"{self.line(function.lineno)}: {name} is async; write it with def alone")
        given = function.args
        places = len(given.posonlyargs) + len(given.args)
        needed = places - len(given.defaults)
        if function.decorator_list:  # which may change what it takes
            return
        if needed > parameters or (places < parameters and not given.vararg) or None in given.kw_defaults:
            words = "one argument" if parameters == 1 else f"{parameters} arguments"
            raise UserError(f"{self.line(function.lineno)}: {name} is called with {words}, and does not take so many")

    def run(self) -> dict[str, Any]:
        """The names that the file defines, once it is run; it may import what lies beside it. UserError where it fails."""
        module = types.ModuleType(f"user_code {self.path.resolve()}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # where dataclasses look for it
        if (folder := str(self.path.resolve().parent)) not in sys.path:
            sys.path.append(folder)  # last, so that nothing of the project is hidden by a file there
        try:
            exec(compile(self.text, str(self.path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise UserError(self.failure(error)) from error
        return vars(module)

    def failure(self, error: BaseException, function: str = "", when: str = "") -> str:
        """A sentence without its full stop: the last line of this file that `error` came through, and what it says."""
        trace = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == str(self.path)]
        lines = lines or [self.functions[function].lineno if function else 1]
        words = " ".join(str(error).split())
        said = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return f"{self.line(lines[-1] or 1)}{f', {function}' if function else ''}{when}: {said}"


def read_user_code(flag: str, path: str) -> UserCode:
    """The file that `flag` names, not yet run. UserError, naming the line, where it is missing or is not Python."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); name a Python file") from error
    try:
        tree = ast.parse(text, path)
    except SyntaxError as error:
        raise UserError(f"{flag} {path}, line {error.lineno}: {error.msg}; correct the file") from error
    except ValueError as error:  # a null byte
        raise UserError(f"{flag} {path} is not Python ({error})") from error
    functions = {node.name: node for node in tree.body if isinstance(node, Function)}
    return UserCode(flag, Path(path), text, functions)


def read_hooks(path: str) -> UserCode:
    """A file of --hooks. UserError where it has none of the functions, or one that no run calls."""
    code = read_user_code("--hooks", path)
    for name, function in code.functions.items():
        if name not in HOOKS and name.startswith("on_"):
            raise UserError(
                f"{code.line(function.lineno)}: no run calls {name}, only {', '.join(HOOKS)}{did_you_mean(name, HOOKS)}"
            )
        if name in HOOKS:
            code.refuse_unfit(name, 1)
    if not set(HOOKS) & set(code.functions):
        raise UserError(
            f"--hooks {path} defines none of {', '.join(HOOKS)}; write at least one, as def on_step(state):"
        )
    return code


def read_loss(spec: str) -> tuple[UserCode, str]:
    """The file of --loss_file FILE:FUNCTION and the function's name. UserError where the file has no such function."""
    return _read_function("--loss_file", spec, "my_loss.py:loss", 3)


def read_optimizer(spec: str) -> tuple[UserCode, str]:
    """The file of --optimizer_file FILE:FUNCTION and the function's name. UserError where the file has no such function."""
    return _read_function("--optimizer_file", spec, "my_optimizer.py:build", 2)


def _read_function(flag: str, spec: str, example: str, parameters: int) -> tuple[UserCode, str]:
    path, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise UserError(f"{flag} {spec}: write FILE:FUNCTION, as in {example}")
    code = read_user_code(flag, path)
    if name not in code.functions:
        raise UserError(f"{flag} {spec}: {path} defines no {name}{did_you_mean(name, code.functions)}")
    code.refuse_unfit(name, parameters)
    return code, name


def hooks_of(code: UserCode) -> dict[str, Callable]:
    """Run a file of --hooks; its functions by name. UserError for a hook that is not written there."""
    found = {name: value for name, value in code.run().items() if name in HOOKS}
    for name, value in found.items():
        if name not in code.functions:
            raise UserError(
                f"--hooks {code.path}: {name} is made or imported there; write it at the top level as def {name}(state):"
            )
        if inspect.isgeneratorfunction(value):
            raise UserError(f"{code.line(code.functions[name].lineno)}: {name} yields, and would never be run")
    return found
