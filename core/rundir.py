"""The run directory: what the stages pass to each other, written so that a kill loses nothing.

`run.json` is the manifest: schema version, model and data with their hashes, versions, and one
entry per stage with the options it ran under and the files it wrote. Every table carries the same
provenance in its Parquet metadata; timestamps stay in the manifest, so that equal runs write equal
tables. Files are written beside their place, synced and renamed; one process writes at a time.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Self

from bitplan.errors import RunError

SCHEMA_VERSION = 1
MANIFEST = "run.json"
LOCK = ".lock"
PARTIAL = ".partial"


def content_hash(value: Any) -> str:
    """Return 16 hex digits that identify a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, renamed.

    Raises RunError where the disk is full or the place cannot be written; the old file stays.
    """
    write_all({path: write})


def write_all(files: Mapping[Path, Callable[[IO[bytes]], object]]) -> None:
    """Write files together: none is renamed into place before all are whole and synced.

    Raises RunError where the disk is full or a place cannot be written; the old files stay.
    """
    # No known suffix and a leading dot: a reader's glob never matches a temporary file.
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = Path()
    try:
        for path, temporary in staged.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                files[path](file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            os.replace(temporary, path)
        for parent in {path.parent for path in staged}:
            sync_directory(parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory last."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def provenance_of(table: Path) -> dict[str, Any]:
    """Return the provenance in a table's Parquet metadata, {} where it has none.

    Raises RunError where the file cannot be read.
    """
    import polars as pl

    try:
        found = json.loads(pl.read_parquet_metadata(table).get("bitplan", "{}"))
    except (pl.exceptions.PolarsError, OSError, json.JSONDecodeError) as error:
        raise RunError(f"{table} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused, not written."""
    content = _json_bytes(value)
    write_atomic(path, lambda file: file.write(content))


def read_json(path: Path) -> Any:
    """Read a JSON file; raise RunError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


@functools.cache
def versions() -> Mapping[str, str]:
    """Return the versions results depend on: Python and the libraries that compute them."""
    names = (
        "bitplan",
        "torch",
        "transformers",
        "nnsight",
        "numpy",
        "scipy",
        "polars",
        "accelerate",
    )
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def hardware() -> str:
    """Return the processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return f"{name}, {len(usable)} cores"


class RunDir:
    """A run directory: its manifest, its tables and its lock.

    Open with `RunDir.open` (must exist) or `RunDir.create`; both refuse another schema version.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an existing run directory; raise RunError for anything else."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise RunError(
                f"{path} is no run directory: it has no {MANIFEST}; "
                f"make one with `bitplan profile MODEL -o {path}`"
            )
        manifest = read_json(path / MANIFEST)
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        if found != SCHEMA_VERSION:
            raise RunError(
                f"{path} has schema version {found!r}, this bitplan reads {SCHEMA_VERSION}: "
                "profile into a new directory, or use the bitplan that wrote it"
            )
        return cls(path, manifest)

    @classmethod
    def create(cls, path: str | Path) -> Self:
        """Open a run directory, or begin one in a new or empty directory."""
        path = Path(path)
        if (path / MANIFEST).exists():
            return cls.open(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file: name a directory for the run")
        if path.is_dir() and any(e.name not in (LOCK, PARTIAL) for e in path.iterdir()):
            raise RunError(f"{path} is not empty and no run directory: name a new directory")
        return cls(path, {"schema": SCHEMA_VERSION, "stages": {}})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to write; raise RunError at once where another process has it.

        The manifest is read again under the lock. The kernel drops the lock of a killed process.
        """
        existed = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / LOCK, "a+")  # noqa: SIM115 (held until the end of the block)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror or error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            raise RunError(
                f"{self.path} is in use by another bitplan: wait for it, or use another directory"
            ) from error
        try:
            if (self.path / MANIFEST).exists():
                self.manifest = type(self).open(self.path).manifest
            yield
        finally:
            handle.close()
            if not (self.path / MANIFEST).exists():
                # A stage that failed before it wrote anything leaves no trace of itself.
                with contextlib.suppress(OSError):
                    if {entry.name for entry in self.path.iterdir()} == {LOCK}:
                        (self.path / LOCK).unlink()
                        if not existed:
                            self.path.rmdir()

    def provenance(self) -> dict[str, Any]:
        """Return what identifies this run's results: schema, model, data, versions."""
        keys = ("schema", "model", "data", "seed")
        return {key: self.manifest[key] for key in keys if key in self.manifest} | {
            "versions": dict(versions())
        }

    def _table_bytes(self, frame: Any) -> bytes:
        """Encode a polars frame as Parquet with the run's provenance in its metadata.

        In memory, so that a full disk is an OSError of our own write.
        """
        buffer = io.BytesIO()
        note = {"bitplan": json.dumps(self.provenance(), sort_keys=True)}
        frame.write_parquet(buffer, compression="zstd", metadata=note)
        return buffer.getvalue()

    def write_table(self, name: str, frame: Any) -> Path:
        """Write a polars frame as Parquet with the run's provenance in its metadata."""
        content = self._table_bytes(frame)
        write_atomic(self.path / name, lambda file: file.write(content))
        return self.path / name

    def commit(
        self,
        stage: str,
        options: Mapping[str, Any],
        tables: Mapping[str, Any],
        documents: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Write a stage's tables and JSON documents together, then record it as done.

        Facts such as `model=` and `data=` become keys of the manifest and provenance of the tables.
        """
        self.manifest = {**self.manifest, **facts}
        contents = {name: self._table_bytes(frame) for name, frame in tables.items()}
        contents |= {name: _json_bytes(value) for name, value in (documents or {}).items()}
        write_all(
            {
                self.path / name: lambda file, content=content: file.write(content)  # type: ignore[misc]
                for name, content in contents.items()
            }
        )
        self.finish(stage, options, list(contents), **facts)

    def read_table(self, name: str) -> Any:
        """Read a table of this run as a polars frame; raise RunError where it is missing."""
        import polars as pl

        path = self.path / name
        if not path.is_file():
            raise RunError(f"{self.path} has no {name}: {_made_by(name, self.path)}")
        try:
            return pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write one of the run's JSON files."""
        path = self.path / name
        write_json(path, value)
        return path

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON files; raise RunError that names the command to make it."""
        path = self.path / name
        if not path.is_file():
            raise RunError(f"{self.path} has no {name}: {_made_by(name, self.path)}")
        return read_json(path)

    def is_done(self, stage: str, options: Mapping[str, Any]) -> bool:
        """Whether the stage ended under exactly these options and its files are as it left them."""
        entry = self.manifest.get("stages", {}).get(stage)
        return (
            entry is not None
            and entry["options_hash"] == content_hash(options)
            and all(
                (self.path / name).is_file() and file_hash(self.path / name) == digest
                for name, digest in entry["hashes"].items()
            )
        )

    def finish(
        self, stage: str, options: Mapping[str, Any], files: list[str], **facts: Any
    ) -> None:
        """Record in the manifest that a stage is done: options, files and top-level facts.

        Facts such as `model=` and `data=` become keys of the manifest itself.
        """
        entry = {
            "options": dict(options),
            "options_hash": content_hash(options),
            "files": files,
            "hashes": {name: file_hash(self.path / name) for name in files},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.manifest = {
            **self.manifest,
            **facts,
            "hardware": hardware(),
            "versions": dict(versions()),
        }
        self.manifest["stages"] = {**self.manifest.get("stages", {}), stage: entry}
        write_json(self.path / MANIFEST, self.manifest)


_MAKERS = {
    "profile.parquet": "bitplan profile MODEL -o {run}",
    "errors.parquet": "bitplan profile MODEL -o {run}",
    "outliers.parquet": "bitplan profile MODEL -o {run} (without --weights-only)",
    "sensitivity.parquet": "bitplan profile MODEL -o {run} (without --no-sensitivity)",
    "plan.json": "bitplan plan {run}",
    "frontier.parquet": "bitplan plan {run}",
    "verdict.json": "bitplan verify {run}",
}


def _made_by(name: str, run: Path) -> str:
    return f"run `{_MAKERS[name].format(run=run)}` first" if name in _MAKERS else "is it whole?"
