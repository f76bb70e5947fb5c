"""When does Python look for garbage in a run? Between steps, on all ranks after the same ones.

By itself it looks whenever enough objects were made: for some 100 ms where as many are alive as torch alone has, on each
rank in another step, and the others wait for it in the next reduction.
"""

import contextlib
import gc
from collections.abc import Iterator

COLLECT_INTERVAL = 10  # steps


@contextlib.contextmanager
def own_collection() -> Iterator[None]:
    """Inside, garbage is looked for by `collect_garbage` alone. What is alive at its first call is not looked at again."""
    automatic = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()


def collect_garbage(steps: int) -> None:
    """Look for it after the first of this start's steps, with all that compiling and building left, and at intervals."""
    if steps == 1:
        gc.collect()
        gc.freeze()
    elif steps % COLLECT_INTERVAL == 0:
        gc.collect()
