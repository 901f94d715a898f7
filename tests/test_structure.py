"""The rules a reader relies on: imports run one way, heavy ones only where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each folder may import; the CLI and the demo reach every stage, inside their functions.
ALLOWED = {
    "core": {"core"},
    "probe": {"core", "probe"},
    "planner": {"core", "probe", "planner"},
    "qat": {"core", "probe", "planner", "qat"},
    "reports": {"core", "reports"},
}
TORCH = ("torch", "transformers", "nnsight", "accelerate")
MODULES = [path for folder in ALLOWED for path in sorted((ROOT / folder).glob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield node.module or ""


def folder_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "bitplan":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "core"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_run_one_way(path: Path) -> None:
    if path.parent == ROOT / "core" and path.name in ("cli.py", "cli_law.py", "demo.py"):
        tree = ast.parse(path.read_text())
        body = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        names = set(imports(body))
    else:
        names = set(imports(ast.parse(path.read_text())))
    reached = {folder for name in names if (folder := folder_of(name))}
    assert reached <= ALLOWED[path.parent.name]
    # `bitplan.probe` pulls torch in; the planner reads its files, not its code.
    if path.parent.name in ("planner", "reports") or path.parent.name == "core":
        heavy = {name for name in names if name.split(".")[0] in TORCH}
        assert path.name == "quantize.py" or not heavy


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) > 15


@pytest.mark.parametrize(
    "module",
    [
        "bitplan.cli",
        "bitplan.planner.stage",
        "bitplan.planner.export",
        "bitplan.reports.report",
        "bitplan.probe",
    ],
)
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {TORCH!r} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_package_lists_every_folder_and_module() -> None:
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(config["package-dir"].values()) == set(ALLOWED)
    assert set(config["packages"]) == set(config["package-dir"])
    nested = [p for folder in ALLOWED for p in (ROOT / folder).glob("*/__init__.py")]
    assert nested == [], "a nested package must be listed in pyproject.toml"


def test_the_package_carries_every_file_that_is_not_code() -> None:
    import fnmatch
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in config["package-dir"].items():
        patterns = config["package-data"].get(package, [])
        inside = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".py"]
        names = [str(p.relative_to(ROOT / folder)) for p in inside if "__pycache__" not in p.parts]
        assert [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)] == []
