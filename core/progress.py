"""Progress on stderr: a bar on a terminal after two seconds, plain lines elsewhere.

Nothing here touches stdout, which carries results alone.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
DELAY_S = 2.0
LINE_EVERY_S = 10.0


_silent = False


def silence() -> None:
    """Show nothing from here on: for processes whose parent shows how far along they are."""
    global _silent
    _silent = True


def is_silent() -> bool:
    """Whether another process speaks for this one."""
    return _silent


def say(text: str) -> None:
    """Tell of something that the user should know, on a line of stderr, silent or not."""
    print(text, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, *, total: int | None = None) -> Iterator[T]:
    """Yield the items while showing how far along they are, once that takes over two seconds."""
    if _silent:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, total=total, delay=DELAY_S, leave=False, file=sys.stderr)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - start > DELAY_S and now - last > LINE_EVERY_S:
            last = now
            left = (
                f", about {(now - start) * (total / done - 1):.0f} s left" if total and done else ""
            )
            print(f"{label}: {done} of {total or '?'}, {now - start:.0f} s{left}", file=sys.stderr)
        yield item
