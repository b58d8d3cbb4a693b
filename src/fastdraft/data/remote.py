"""Files behind addresses that fsspec opens (`s3://`, `gcs://`, `memory://`), read as this machine's are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import fsspec

from fastdraft.errors import DataError
from fastdraft.run_folder import atomic_path


def is_address(text: str) -> bool:
    """Whether a recipe's path is one for fsspec."""
    return "://" in text


@dataclass(frozen=True)
class RemoteFile:
    """As much of a Path as reading needs; the size is that of the listing."""

    address: str
    size: int

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def open(self, mode: str = "rb") -> IO[bytes]:
        with told(self.address):
            return cast(IO[bytes], io.BufferedReader(fsspec.open(self.address, mode).open(), 1 << 20))

    def stat(self) -> Any:
        return SimpleNamespace(st_size=self.size)

    def is_file(self) -> bool:
        return True

    def __str__(self) -> str:
        return self.address


DataFile = Path | RemoteFile


def listed(address: str) -> dict[str, RemoteFile]:
    """The file at an address, or all below it, by name within it; none where nothing is."""
    with told(address):
        files, root = fsspec.core.url_to_fs(address)
        found = files.find(root, detail=True)
    names = {path: path.removeprefix(root.rstrip("/")).lstrip("/") or root for path in found}
    if list(found) == [root]:
        names[root] = root.rpartition("/")[2]
    sizes = {path: int(about.get("size") or 0) for path, about in found.items()}
    return {names[path]: RemoteFile(files.unstrip_protocol(path), sizes[path]) for path in sorted(found)}


def put(path: Path, store: str) -> None:
    """Copies a file into a folder behind an address."""
    with told(store):
        files, root = fsspec.core.url_to_fs(store)
        files.makedirs(root, exist_ok=True)
        files.put_file(str(path), f"{root.rstrip('/')}/{path.name}")


def fetch(store: str, path: Path) -> None:
    """Copies it back, whole or not at all."""
    with told(f"{store}/{path.name}"), atomic_path(path) as temporary:
        files, root = fsspec.core.url_to_fs(store)
        files.get_file(f"{root.rstrip('/')}/{path.name}", str(temporary))


@contextlib.contextmanager
def told(address: str) -> Iterator[None]:
    """What is behind an address fails in ways of its own; here in one line."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{address}: {error}", "install that package") from None
    except Exception as error:  # each kind of store has errors of its own
        why = f"{type(error).__name__} ({' '.join(str(error).split())[:160]})"
        raise DataError(
            f"{address}: {why}; must be reachable", "correct the address or the rights"
        ) from error
