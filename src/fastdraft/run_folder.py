"""A run's folder: one folder per stage, each complete when its `manifest.json` stands.

folder = RunFolder(Path("runs/demo")).folder("evaluate")
folder.begin(fingerprint); found = folder.keep("latency.json", measure); folder.complete(prompts=100)
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from fastdraft.errors import FastDraftError

MANIFEST, FINGERPRINT, BEGUN, SCHEMA = "manifest.json", "fingerprint.json", "begun.json", 1
# Of what stages keep in their folders; work of another release is refused.
_LAYOUT = 2
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
CONVERTED = "converted"  # of the run: what several stages read; of a stage: what it alone reads
_SCRATCH = ("steps", ".journal", CONVERTED)  # of no use once a stage is complete

T = TypeVar("T")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, which takes the place of `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    _remove(temporary)
    try:
        yield temporary
        for file in filter(Path.is_file, (temporary, *temporary.rglob("*"))):
            # To the disk: after a power cut it must not be empty. Some libraries write read-only files.
            with contextlib.suppress(PermissionError), open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # what the user knows
        raise
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same with an empty temporary folder."""
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or it was a folder
        path.unlink()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes the whole file under a temporary name, forces it to disk, then renames it over `path`."""
    if isinstance(content, str):  # half a surrogate pair becomes its escape, which JSON reads back as it was
        content = content.encode(errors="backslashreplace")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Pretty JSON, keys in the order given, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file that this program wrote."""
    with _readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """The one message about files that this program wrote itself and cannot read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, EOFError, OSError) as error:
        message = f"{path}: unreadable ({error})"
        raise FastDraftError(message, "delete it and run the same command again") from error


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """A short stable digest of a JSON-able value (20 hex digits of sha256 over its sorted JSON)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, so that two fingerprints can be compared key by key."""
    if not value or not isinstance(value, (dict, list)):
        return {name.lstrip("."): value}
    parts = value.items() if isinstance(value, dict) else ((i, item) for i, item in enumerate(value))
    form = ".{}" if isinstance(value, dict) else "[{}]"
    return {k: v for key, item in parts for k, v in flatten(item, name + form.format(key)).items()}


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder: its fingerprint is written first, its manifest last."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def is_complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        """What the stage wrote about its result; at least `schema`, `stage` and `fingerprint`."""
        value: dict[str, Any] = read_json(self.path / MANIFEST)
        return value

    def stored_fingerprint(self) -> dict[str, Any]:
        """What the work in this folder was begun under."""
        value: dict[str, Any] = read_json(self.path / FINGERPRINT)
        return value

    def digest(self) -> str:
        """Stands for this folder's result in the fingerprints of the stages after it."""
        return digest(self.stored_fingerprint())

    def differences(self, fingerprint: Mapping[str, Any]) -> list[str]:
        """The keys, with both values, in which existing work differs from `fingerprint`."""
        if not self.has(FINGERPRINT):
            return []
        old = flatten(self.stored_fingerprint())
        new = flatten(json.loads(json.dumps({**fingerprint, "layout": _LAYOUT}, default=str)))
        if old.get("layout") != _LAYOUT:
            return ["made by another release of fastdraft"]
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        return [f"{key} ({old.get(key, 'unset')} -> {new.get(key, 'unset')})" for key in changed]

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Claims the folder for these settings; work begun under others is refused."""
        changed = self.differences(fingerprint)
        if changed:
            message = f"{self.path}: {'; '.join(changed[:4])}: this work was done with other settings"
            raise FastDraftError(message, f"use another run.name, or redo it with --redo {self.name}")
        if not self.has(FINGERPRINT):
            write_json(self.path / FINGERPRINT, {**fingerprint, "layout": _LAYOUT})

    def has(self, name: str) -> bool:
        """Whether `keep` has a result of that name."""
        return (self.path / name).exists()

    def keep(
        self,
        name: str,
        make: Callable[[], T],
        *,
        read: Callable[[Path], T] = read_json,
        write: Callable[[Path, T], object] = write_json,
    ) -> T:
        """What `name` holds; made and written, all of it or nothing, where it is not there yet.

        The result is always what `read` gives, so that a resumed run sees the very same.
        """
        path = self.path / name
        if not path.exists():
            value = make()  # first: it may take hours
            with atomic_path(path) as temporary:
                write(temporary, value)
        with _readable(path):
            return read(path)

    def complete(self, **fields: Any) -> None:
        """Writes the manifest: from here on the stage counts as finished."""
        facts = {"schema": SCHEMA, "stage": self.name, "fingerprint": self.digest()}
        write_json(self.path / MANIFEST, facts | fields)

    def remove_scratch(self) -> None:
        """Removes what only an unfinished stage needs; a kill right after the manifest may have left it."""
        for name in _SCRATCH:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self) -> None:
        """Removes the stage's work: gone at once, then file by file, so that no kill leaves a part of it."""
        aside = _beside(self.path)
        _remove(aside)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
        _remove(aside)


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME`: one folder for each stage."""

    root: Path

    def folder(self, name: str) -> StageFolder:
        return StageFolder(self.root / name)

    @property
    def date(self) -> datetime.date:
        """The day on which the run was begun, which templates write into prompts; today before it is."""
        path = self.root / BEGUN
        return datetime.date.fromisoformat(read_json(path)) if path.is_file() else datetime.date.today()

    def keep_date(self) -> None:
        """Writes today's date where there is none yet."""
        StageFolder(self.root).keep(BEGUN, datetime.date.today().isoformat)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; the operating system lets go when the process dies.

        What killed processes left half-written is removed: nobody else writes here while the lock is held.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.root / ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            message = f"{self.root}: in use by another process; one at a time may write a run"
            raise FastDraftError(message, "wait for it, or use another run.name") from None
        try:
            for path in [path for path in self.root.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]:
                _remove(path)
            yield
        finally:
            lock.release()
