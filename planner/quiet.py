"""Keep native code from writing to stdout, which carries results alone.

HiGHS, as scipy 1.17 carries it, prints a line of its own debugging from C++ whenever a solution
does not survive its undoing of presolve, whatever its log settings.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what native code prints to file descriptor 1 nowhere; Python's own buffer is kept."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else None
    try:
        kept = os.dup(1)
    except OSError:  # stdout is closed: nothing to keep clean
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            if flush:
                flush(None)
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        if flush:
            flush(None)  # into nowhere, before the descriptor is put back
        os.dup2(kept, 1)
        os.close(kept)
