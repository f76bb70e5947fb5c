"""What must be fast. And what else is called `kernels`: the package of that name, where it is installed, which transformers uses.

From the project's folder `import kernels` finds this one. What is not here is looked for in the other: its modules through
__path__, the names of its __init__.py when they are first asked for.
"""

import pkgutil
from pathlib import Path

__path__ = pkgutil.extend_path(__path__, __name__)


def __getattr__(name: str) -> object:
    for folder in __path__[1:]:
        other = Path(folder) / "__init__.py"
        if not name.startswith("__") and other.is_file() and not Path(folder).samefile(__path__[0]):
            own = dict(globals())
            exec(compile(other.read_bytes(), str(other), "exec"), globals())
            globals().update(own)  # such as this function, were it to have one too
            if name in globals():
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
