"""The files that a recipe's `path` names: one, a folder's of usual endings, or those of a pattern.

One rule for all: links are followed, what is hidden is left out, capitals do not matter. What is passed over
has a name, so that nothing is left out in silence.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.data.readers import unreadable
from fastdraft.data.remote import DataFile, is_address, listed
from fastdraft.errors import DataError
from fastdraft.recipe.run import resolve_path, user_path

HASHED_FILES, HASHED_BYTES = 64, 1 << 16
_COMPRESSED = ("", ".gz", ".xz", ".bz2", ".zst", ".zstd")
JSONL = tuple(f"{kind}{end}" for kind in (".jsonl", ".ndjson", ".json") for end in _COMPRESSED)
ROWS = (*JSONL, ".parquet")
TEXT = tuple(f"{kind}{end}" for kind in (".txt", ".md") for end in _COMPRESSED)
ALL = ("",)
# What the library datasets writes beside the rows.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
NAMED = 3


@dataclass(frozen=True)
class FoundFiles:
    """What a path names, sorted."""

    files: dict[str, DataFile]  # by the name within the folder
    passed_over: list[str]  # files of other names; of what is hidden or excluded the folder

    @property
    def told(self) -> str:
        """`9 files; passed over 2: .git, notes.docx`."""
        count = len(self.files)
        return f"{count} file{'s' * (count != 1)}{self.others}"

    @property
    def others(self) -> str:
        names, more = ", ".join(self.passed_over[:NAMED]), ", ..." * (len(self.passed_over) > NAMED)
        return f"; passed over {len(self.passed_over)}: {names}{more}" if names else ""


def find_files(text: str, endings: Sequence[str], exclude: Sequence[str] = ()) -> FoundFiles:
    """What a `path` names: a file, a folder's files that end so, or a pattern's; also behind an address."""
    base, wanted, remote = text, list[str](), is_address(text)
    if glob.has_magic(text) and (remote or not user_path(text).exists()):
        # `data/**/*.txt` -> `data` and `**/*.txt`
        parts = text.split("/")
        first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        base, wanted = "/".join(parts[:first]) or ("/" if first else "."), parts[first:]
    excluded = re.compile("|".join(map(fnmatch.translate, exclude)) or "$.")
    files, passed_over = dict[str, DataFile](), list[str]()
    walked: Iterable[tuple[str, DataFile | None]]
    if remote:
        below = listed(base)
        if [file.address for file in below.values()] == [base]:
            return FoundFiles(dict(below), [])
        hidden = {name for name in below if any(p[0] == "." or excluded.match(p) for p in name.split("/"))}
        walked = [(name, None if name in hidden else file) for name, file in below.items()]
    else:
        root = resolve_path(base)
        if root.is_file():
            return FoundFiles({root.name: root}, [])
        if not root.exists():
            raise _nothing(text, "no such file or folder")
        walked = _walk(root, "", len(wanted) if wanted and "**" not in wanted else 0, excluded, ())
    for name, path in walked:
        last = name.lower().rpartition("/")[2]
        usual = _matches(name.split("/"), wanted) if wanted else last.endswith(tuple(endings))
        if path and usual and (wanted or last not in _ABOUT or endings is ALL):
            files[name] = path
        else:
            passed_over.append(name)
    found = FoundFiles(dict(sorted(files.items())), sorted(passed_over))
    if not files:
        raise _nothing(text, f"no file of {'that' if wanted else 'a usual'} name there{found.others}")
    return found


def _walk(
    folder: Path, name: str, depth: int, excluded: re.Pattern[str], above: tuple[os.stat_result, ...]
) -> Iterator[tuple[str, Path | None]]:
    """(name, path) of every file below, no path for what is left out; `depth` 0 has no end."""
    try:
        here, entries = folder.stat(), sorted(folder.iterdir())
    except OSError as error:
        if not above:
            raise unreadable(folder, error) from None
        yield name, None
        return
    if any(os.path.samestat(here, other) for other in above):  # a link to a folder that it lies in
        return
    for entry in entries:
        inside = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith(".") or excluded.match(entry.name):
            yield inside, None
        elif not entry.is_dir():
            yield inside, entry if entry.is_file() else None
        elif depth != 1:
            yield from _walk(entry, inside, max(0, depth - 1), excluded, (*above, here))


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not name:
        return not name and not [part for part in pattern if part != "**"]
    if pattern[0] == "**":
        return any(_matches(name[start:], pattern[1:]) for start in range(len(name) + 1))
    fits = fnmatch.fnmatchcase(name[0].lower(), pattern[0].lower())
    return fits and _matches(name[1:], pattern[1:])


def _nothing(path: str, found: str) -> DataError:
    return DataError(f"{path}: {found}; a source needs at least one file", "correct the path or the pattern")


def local_folder(dataset: str) -> Path | None:
    """The folder that a data set is, if it is one on this machine."""
    path = user_path(dataset, "dataset")
    return path if path.is_dir() else None


def describe_data_set(dataset: str) -> dict[str, Any]:
    """For fingerprints: of a data set in a folder here its files; of the hub's nothing is known."""
    folder = local_folder(dataset)
    return describe_files(find_files(str(folder), ALL).files) if folder else {}


def describe_files(files: Mapping[str, DataFile]) -> dict[str, Any]:
    """Number, size and a digest of names, sizes and samples."""
    listing, total = hashlib.sha256(), 0
    for name, path in files.items():
        try:
            size = path.stat().st_size
            total += size
            listing.update(os.fsencode(f"{name}\t{size}\n"))
            if len(files) <= HASHED_FILES:
                with path.open("rb") as content:
                    listing.update(content.read(HASHED_BYTES))
                    content.seek(max(0, size - HASHED_BYTES))
                    listing.update(content.read(HASHED_BYTES))
        except OSError as error:
            raise unreadable(path, error) from None
    return {"files": len(files), "bytes": total, "listing": listing.hexdigest()[:20]}
