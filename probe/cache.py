"""Where bitplan keeps what is costly to make and may be deleted at any time.

$BITPLAN_CACHE, else $XDG_CACHE_HOME/bitplan, else ~/.cache/bitplan.
"""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the directory, which need not exist."""
    if chosen := os.environ.get("BITPLAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitplan"
