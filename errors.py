"""How does a mistake that a user can fix reach the user? As one sentence on stderr and exit code 2, without a traceback.

Lowest layer: every other file may import this one.
"""

import errno
import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shell's convention

_STORAGE_ERRORS = {
    errno.ENOSPC: "there is no space left; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file may not grow further (file size limit); raise the limit and run the same command again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission is denied; change the permissions or choose another folder",
    errno.EPERM: "permission is denied; change the permissions or choose another folder",
}
# CUDA's; torch's allocator on a CPU, which has two words for it; C++'s; oneDNN's
_OUT_OF_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "std::bad_alloc", "could not create a memory object",
    "could not create a primitive",
)  # fmt: skip


class UserError(Exception):
    """A mistake the user can fix. The message is one sentence that names the file or flag and says what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: of the device, or of the machine, for which torch has no class of its own."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def explain_os_error(error: OSError) -> str | None:
    """The sentence for a storage error (no space, no permission, read-only), or None for any other OSError."""
    reason = _STORAGE_ERRORS.get(error.errno or 0)
    return f"{error.filename or 'writing'}: {reason}" if reason else None


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: its return value (None is 0), 2 after a user's mistake, 130 after Ctrl-C."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sentence = explain_os_error(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
