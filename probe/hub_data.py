"""Data sets of the Hugging Face hub: their Parquet and JSON Lines files, fetched one by one.

    hf://datasets/OWNER/NAME            the tables in the repository itself
    hf://datasets/OWNER/NAME:CONFIG     one configuration, as the hub converts all to Parquet
    hf://datasets/OWNER/NAME@REVISION   a branch, a tag or a commit

Where a repository holds no tables, the hub's own conversion of it is taken, the branch
`refs/convert/parquet`, which has a folder per configuration. Files are fetched when they are read,
so that no more of a large data set comes than is used, and stay in the hub's cache ($HF_HOME).
Nothing of a data set is run: there is no `datasets` library here, and no loading script.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from bitplan.errors import DataError
from bitplan.probe.rows import has_rows

_SCHEME = "hf://"
_NAME = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>[\w./-]+)|:(?P<config>[\w.-]+))?"
)
_CONVERTED = "refs/convert/parquet"


def is_hub_name(name: str) -> bool:
    """Whether a name is meant for the hub and not for a path."""
    return name.startswith(_SCHEME)


def hub_files(name: str) -> Iterator[Path]:
    """Yield the local copies of a data set's tables, in the order of their names.

    Raises DataError for a name that is none, a data set that cannot be fetched or has no tables.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"{name} names no data set: write hf://datasets/OWNER/NAME, with :CONFIG or @REVISION"
        )
    repo, revision, config = match["repo"], match["revision"], match["config"]
    tables = [] if config else _tables(name, repo, revision)
    if not tables and revision is None:
        revision = _CONVERTED
        converted = _tables(name, repo, revision)
        tables = [table for table in converted if config in (None, table.split("/")[0])]
        if converted and not tables:
            there = ", ".join(dict.fromkeys(table.split("/")[0] for table in converted))
            raise DataError(f"{name}: no configuration {config}, there are {there}")
    if not tables:
        raise DataError(f"{name} has no Parquet or JSON Lines files")
    for table in tables:
        yield _fetch(name, repo, revision, table)


def _tables(name: str, repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import list_repo_files

    with _told(name):
        files = list_repo_files(repo, repo_type="dataset", revision=revision)
    return sorted(file for file in files if has_rows(Path(file)))


def _fetch(name: str, repo: str, revision: str | None, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _told(name):
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into a DataError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except Exception as error:
        # Its bases are OSError and the error of the HTTP client, of which there have been several.
        if not isinstance(error, (*HfHubHTTPError.__bases__, HFValidationError)):
            raise
        raise DataError(
            f"{name} could not be fetched from the hub ({type(error).__name__}): check the name, "
            "the network and your access, or give a directory that holds it"
        ) from error
