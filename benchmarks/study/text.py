"""Unpack the study's text: documents of the embedded checkpoint's corpus, a file each.

    python benchmarks/study/text.py ARCHIVE DIRECTORY [--mb 160]

ARCHIVE is the corpus.txt.xz that `python benchmarks/embedded/corpus.py pack` writes. Its documents
are in a random order, so the first of them are a sample of all.
"""

import argparse
import lzma
from pathlib import Path

SEPARATOR = b"\0"


def main() -> None:
    """Write the first documents, until they are as many megabytes as asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mb", type=float, default=160)
    asked = parser.parse_args()
    asked.directory.mkdir(parents=True, exist_ok=True)
    with lzma.open(asked.archive) as file:
        text = file.read(int(asked.mb * 1e6))
    documents = text.split(SEPARATOR)[:-1]  # the last one is cut off
    for number, document in enumerate(documents):
        (asked.directory / f"{number:05}.txt").write_bytes(document)
    print(f"{len(documents)} documents, {sum(map(len, documents)):,} bytes")


if __name__ == "__main__":
    main()
