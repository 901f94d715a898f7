"""Run the tests of this folder, each in the library that they are about.

Every library of libraries.txt gets an environment of its own in .venv-exports, over the one that
runs this: what is there already (torch above all, pinned) is used, the rest installed.

python tests/exports/run.py [LIBRARY ...]
"""

import os
import site
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLACE = ROOT / ".venv-exports"
BASE = site.getsitepackages()[0]
# Checked without a library to install: transcribed rules, and a tool that make builds.
ALONE = ("test_vllm.py", "test_llama_cpp.py")


def environment(requirement: str) -> Path:
    """Return the Python of the requirement's environment, made where it is not there yet."""
    home = PLACE / requirement.replace("==", "-")
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "base.pth").write_text(f"import site; site.addsitedir({BASE!r})\n")
        pin = home / "torch.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pin.write_text("".join(f"{line}\n" for line in lines if line.startswith("torch==")))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", pin, requirement], check=True)
        done.touch()
    return python


def main() -> int:
    """Return how many of the test files failed."""
    lines = (HERE / "libraries.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    runs = []
    for requirement in wanted:
        name = requirement.partition("==")[0]
        if not sys.argv[1:] or name in sys.argv[1:]:
            python = environment(requirement)
            runs.append((python, [f"test_{name.replace('-', '_')}.py"]))
    if not sys.argv[1:]:
        runs.append((Path(sys.executable), list(ALONE)))
    failed = 0
    for python, files in runs:
        sys.stderr.write(f"\n{' '.join(files)}\n")
        paths = [str(HERE / file) for file in files]
        command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", *paths]
        failed += subprocess.run(command, cwd=ROOT, env=dict(os.environ)).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
