"""The command line of benchmarks that train arms: a run, and verify's options."""

import argparse
from pathlib import Path
from typing import Any


def asked(description: str, result: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Parse the command line; return the run, the file to write and the options that were given."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=result)
    for name in ("tokens", "seeds", "batch_size", "seq_len", "eval_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device")
    given = vars(parser.parse_args())
    run, to = given.pop("run"), given.pop("to")
    return run, to, {name: value for name, value in given.items() if value is not None}
