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
from typing import Annotated, Any, Literal

from pydantic import Field

from fastdraft.data.place import Place
from fastdraft.data.readers import jsonl_texts, parquet_texts, read_text
from fastdraft.errors import DataError
from fastdraft.recipe.base import Config, Count, FolderName
from fastdraft.recipe.run import PYTHON, SHIPPED, resolve_path, user_path

HASHED_FILES, HASHED_BYTES = 64, 1 << 16
NOT_CODE = [
    "test",
    "tests",
    "test_*.py",
    "*_test.py",
    "idle_test",
    "site-packages",
    "dist-packages",
    "node_modules",
    "__pycache__",
    ".*",
]


@dataclass(frozen=True)
class FoundFile:
    """A file of a source: where it lies and its name within the source."""

    path: Path
    name: str


class _Source(Config):
    name: FolderName
    """The corpus; entries of one name make one corpus, each with its own budget."""
    tokens: Count | None = Field(default=None, ge=1)
    """Stop after this many tokens of this entry, validation included; unset takes all."""
    license: str = ""
    """Noted in the manifest and the model card; not read otherwise."""

    def documents(
        self, seed: int, skipped: Callable[[str], None] = lambda reason: None, place: Place | None = None
    ) -> Iterator[str]:
        """Whole documents, files in seeded order; calls `skipped` for a file passed over.

        Begins behind `place` and moves it with every document.

        Raises:
            DataError: when the source is missing, empty or damaged.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The settings and what they point at now, for fingerprints.

        Raises:
            DataError: when the source is missing or empty.
        """
        raise NotImplementedError


class _FileSource(_Source):
    path: str = Field(min_length=1)
    """A file, a folder or a pattern such as `books/**/*.txt`; `shipped:` and `python:` names too."""

    def files(self) -> list[FoundFile]:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {**self.model_dump(exclude={"license"}), **_describe_files(self.files())}

    def documents(
        self, seed: int, skipped: Callable[[str], None] = lambda reason: None, place: Place | None = None
    ) -> Iterator[str]:
        place = place or Place()
        paths = self._shuffled(seed)
        for number in range(place.file, len(paths)):
            for row, text in self._texts(paths[number], place.row if number == place.file else 0, skipped):
                place.file, place.row = number, row
                yield text

    def _texts(self, path: Path, after: int, skipped: Callable[[str], None]) -> Iterator[tuple[int, str]]:
        """(line or row, text) of one file's documents behind line or row `after`."""
        raise NotImplementedError

    def _shuffled(self, seed: int) -> list[Path]:
        def rank(file: FoundFile) -> tuple[bytes, str]:
            return hashlib.blake2b(_name_bytes(f"{seed}/{file.name}"), digest_size=16).digest(), file.name

        return [file.path for file in sorted(self.files(), key=rank)]


class JsonlSource(_FileSource):
    """JSON objects, one a line; plain, .gz, .xz or .zst."""

    kind: Literal["jsonl"] = "jsonl"
    """JSONL."""
    field: str = "text"
    """The key that holds the text."""

    def files(self) -> list[FoundFile]:
        return find_files(self.path, ["*.jsonl", "*.jsonl.gz", "*.jsonl.xz", "*.jsonl.zst"])

    def _texts(self, path: Path, after: int, skipped: Callable[[str], None]) -> Iterator[tuple[int, str]]:
        return jsonl_texts(path, self.field, after)


class ParquetSource(_FileSource):
    """Parquet files."""

    kind: Literal["parquet"] = "parquet"
    """Parquet."""
    field: str = "text"
    """The column that holds the text."""

    def files(self) -> list[FoundFile]:
        return find_files(self.path, ["*.parquet"])

    def _texts(self, path: Path, after: int, skipped: Callable[[str], None]) -> Iterator[tuple[int, str]]:
        return parquet_texts(path, self.field, after)


class TextSource(_FileSource):
    """Text files in UTF-8, each one document."""

    kind: Literal["text"] = "text"
    """Text files."""

    def files(self) -> list[FoundFile]:
        return find_files(self.path, ["*.txt", "*.md"])

    def _texts(self, path: Path, after: int, skipped: Callable[[str], None]) -> Iterator[tuple[int, str]]:
        if not after:
            yield 1, read_text(path)


class SourceCodeSource(_FileSource):
    """A folder of source code, each file one document; files that are not UTF-8 are passed over and counted."""

    kind: Literal["source_code"] = "source_code"
    """Source code."""
    patterns: list[str] = Field(default=["*.py"], min_length=1)
    """File names to take."""
    exclude: list[str] = NOT_CODE
    """File or folder names to leave out, anywhere below `path`; tests and installed packages by default."""

    def files(self) -> list[FoundFile]:
        return [
            file for file in find_files(self.path, self.patterns) if not self._is_excluded(file.name)
        ] or _nothing(self.path, "no file is left after `exclude`")

    def _is_excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(part, pattern) for part in name.split("/") for pattern in self.exclude)

    def _texts(self, path: Path, after: int, skipped: Callable[[str], None]) -> Iterator[tuple[int, str]]:
        if after:
            return
        try:
            text = read_text(path)
        except DataError:
            if not path.is_file():
                raise  # it was there when the run began: less text than the user thinks
            skipped("unreadable or not UTF-8")
        else:
            yield 1, text


class HubSource(_Source):
    """A data set of the Hugging Face hub, streamed; needs the extra `datasets`."""

    kind: Literal["hub"] = "hub"
    """Hub data set."""
    dataset: str = Field(min_length=1)
    """Hub id."""
    subset: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split."""
    revision: str | None = None
    """Commit to pin, so that a resumed run reads the same rows."""
    field: str = "text"
    """The column that holds the text."""

    def describe(self) -> dict[str, Any]:
        return self.model_dump(exclude={"license"})

    def documents(
        self, seed: int, skipped: Callable[[str], None] = lambda reason: None, place: Place | None = None
    ) -> Iterator[str]:
        from fastdraft.data.hub import rows_from

        for where, value in rows_from(self, seed, place or Place()):
            if not isinstance(value, str | None):
                rule, remedy = (
                    f"'{self.field}' must hold text",
                    "set `field` to the column that holds the text",
                )
                raise DataError(where, f"a {type(value).__name__}", rule, remedy)
            yield value or ""

    def values(self) -> Iterator[tuple[str, Any]]:
        """(data set and row, whatever stands in the column `field`) of each row, as the data set orders them.

        Raises:
            MissingExtra: without the library. DataError: when the data set cannot be reached or has no such column.
        """
        from fastdraft.data.hub import rows_in_order

        return rows_in_order(self)


SourceConfig = Annotated[
    JsonlSource | ParquetSource | TextSource | SourceCodeSource | HubSource, Field(discriminator="kind")
]
"""One entry of `prepare.corpora`, told apart by `kind`."""


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


def _describe_files(files: list[FoundFile]) -> dict[str, Any]:
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
