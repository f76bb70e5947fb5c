"""Would the tests notice a wrong kernel? Loads a kernel file with one deliberate fault."""

import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

_number = count()


def load_mutant(source: Path, replacements: dict[str, str], folder: Path) -> ModuleType:
    """The module `source` with each text replaced everywhere it stands, under operator names of its own."""
    text = source.read_text(encoding="utf-8")
    for old, new in replacements.items():
        assert old in text, f"{source.name} has no {old!r} to break"
        text = text.replace(old, new)
    name = f"mutant{next(_number)}"
    text = text.replace('"groundup::', f'"{name}::')
    path = folder / f"{name}.py"  # Triton reads a kernel's source from its file
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
