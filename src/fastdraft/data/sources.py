"""Where documents come from: JSONL, Parquet, text files, source code, hub data sets.

Decides each source's recipe keys, that files are visited in an order drawn from the seed and the file's relative name
(the same on every system), and what of a source enters fingerprints (names, sizes and samples, never times).
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.data.place import Place
from fastdraft.data.readers import jsonl_texts, parquet_texts, read_text
from fastdraft.errors import DataError
from fastdraft.recipe.prepare import FileSource, HubSource, SourceConfig
from fastdraft.recipe.run import PYTHON, SHIPPED, resolve_path, user_path

HASHED_FILES, HASHED_BYTES = 64, 1 << 16
JSONL = ["*.jsonl", "*.jsonl.gz", "*.jsonl.xz", "*.jsonl.zst"]
_PATTERNS = {"jsonl": JSONL, "parquet": ["*.parquet"], "text": ["*.txt", "*.md"], "source_code": ["*.py"]}


@dataclass(frozen=True)
class FoundFile:
    """A file of a source: where it lies and its name within the source."""

    path: Path
    name: str


def source_files(source: FileSource) -> list[FoundFile]:
    """The files of a source, sorted by name."""
    found = find_files(source.path, _PATTERNS[source.kind])
    if source.kind != "source_code":
        return found

    def is_excluded(name: str) -> bool:
        return any(
            fnmatch.fnmatchcase(part, pattern) for part in name.split("/") for pattern in source.exclude
        )

    return [file for file in found if not is_excluded(file.name)] or _nothing(
        source.path, "no file is left after `exclude`"
    )


def describe(source: SourceConfig) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    own = source.model_dump(exclude={"license"})
    return own if source.kind == "hub" else {**own, **describe_files(source_files(source))}


def documents(
    source: SourceConfig,
    seed: int,
    skipped: Callable[[str], None] = lambda reason: None,
    place: Place | None = None,
) -> Iterator[str]:
    """Whole documents, files in seeded order; begins behind `place` and moves it; `skipped` is told of a file passed over."""
    place = place or Place()
    if source.kind == "hub":
        yield from _hub_documents(source, seed, place)
        return

    def rank(file: FoundFile) -> tuple[bytes, str]:
        return hashlib.blake2b(_name_bytes(f"{seed}/{file.name}"), digest_size=16).digest(), file.name

    paths = [file.path for file in sorted(source_files(source), key=rank)]
    for number in range(place.file, len(paths)):
        for row, text in _texts(source, paths[number], place.row if number == place.file else 0, skipped):
            place.file, place.row = number, row
            yield text


def _texts(
    source: FileSource, path: Path, after: int, skipped: Callable[[str], None]
) -> Iterator[tuple[int, str]]:
    """(line or row, text) of one file's documents behind line or row `after`."""
    if source.kind == "jsonl":
        yield from jsonl_texts(path, source.field, after)
    elif source.kind == "parquet":
        yield from parquet_texts(path, source.field, after)
    elif not after:
        try:
            text = read_text(path)
        except DataError:
            if source.kind == "text" or not path.is_file():
                raise
            skipped("unreadable or not UTF-8")
        else:
            yield 1, text


def _hub_documents(source: HubSource, seed: int, place: Place) -> Iterator[str]:
    from fastdraft.data.hub import rows_from

    for where, value in rows_from(source, seed, place):
        if not isinstance(value, str | None):
            message = f"{where}: a {type(value).__name__}: '{source.field}' must hold text"
            raise DataError(message, "set `field` to the column that holds the text")
        yield value or ""


def find_files(text: str, patterns: list[str], where: str = "path") -> list[FoundFile]:
    """The files that a recipe's `path` names, sorted by name: a file itself, a folder's files matching `patterns`, or a glob.

    Raises:
        DataError: when nothing is there.
    """
    base, pattern = _split_glob(text)
    root = resolve_path(base, where)
    if pattern:
        paths = {
            Path(found) for found in glob.glob(str(Path(glob.escape(str(root))) / pattern), recursive=True)
        }
    elif root.is_dir():
        paths = {found for wanted in patterns for found in root.rglob(wanted)}
    else:
        return [FoundFile(root, root.name)] if root.is_file() else _nothing(text, "no such file or folder")
    files = [FoundFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: file.name) or _nothing(
        text, "no file there" if root.exists() else "no such folder"
    )


def _split_glob(text: str) -> tuple[str, str]:
    """`data/**/*.txt` -> (`data`, `**/*.txt`); a path without wildcards has an empty pattern."""
    if not glob.has_magic(text) or user_path(text).exists():
        return text, ""
    prefix = next((p for p in (SHIPPED, PYTHON) if text.startswith(p)), "")
    parts = text.removeprefix(prefix).replace("\\", "/").split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = "/".join(parts[:first]) or ("/" if first else "" if prefix else ".")
    return prefix + base, "/".join(parts[first:])


def describe_files(files: list[FoundFile]) -> dict[str, Any]:
    listing, total = hashlib.sha256(), 0
    for file in files:
        try:
            size = file.path.stat().st_size
            total += size
            listing.update(_name_bytes(f"{file.name}\t{size}\n"))
            if len(files) <= HASHED_FILES:
                with open(file.path, "rb") as content:
                    listing.update(content.read(HASHED_BYTES))
                    content.seek(max(0, size - HASHED_BYTES))
                    listing.update(content.read(HASHED_BYTES))
        except OSError as error:
            found, rule = error.strerror or "unreadable", "the file must exist and be readable"
            raise DataError(file.path, found, rule, "correct the path or its rights") from None
    return {"files": len(files), "bytes": total, "listing": listing.hexdigest()[:20]}


def _nothing(path: str, found: str) -> list[FoundFile]:
    raise DataError(path, found, "a source needs at least one file", "correct the path or the patterns")


def _name_bytes(text: str) -> bytes:
    """A file's name as its system spells it, which need not be UTF-8."""
    return os.fsencode(text) if os.name == "posix" else text.encode("utf-8", "surrogatepass")
