"""How far the preparation of corpora has come, and which documents it has seen: one small database.

Decides that progress and the digests of seen documents are committed together, so that after a kill the next process
neither loses a document nor takes one for a duplicate of itself, and that the digests lie on disk, not in memory.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdraft.errors import FastDraftError

CACHE_KIB, MOST_VARIABLES = 32_768, 900
"""Memory for the database's pages; digests asked for at once (SQLite takes 999 in every version)."""


class Journal:
    """A database beside the shards; `commit` makes everything since the last commit permanent at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
            )
            self._database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            self._database.execute("BEGIN IMMEDIATE")

    def read(self, name: str) -> dict[str, Any] | None:
        """The last committed (or since written) state of a corpus."""
        with self._errors():
            row = self._database.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
            return _state(row[0]) if row else None

    def states(self) -> list[dict[str, Any]]:
        """The states of all corpora begun so far."""
        with self._errors():
            return [_state(row[0]) for row in self._database.execute("SELECT value FROM state")]

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of the digests that were added before."""
        found: set[bytes] = set()
        with self._errors():
            for start in range(0, len(digests), MOST_VARIABLES):
                part = digests[start : start + MOST_VARIABLES]
                marks = ",".join("?" * len(part))
                found.update(
                    row[0]
                    for row in self._database.execute(
                        f"SELECT digest FROM seen WHERE digest IN ({marks})", part
                    )
                )
        return found

    def add(self, digests: Iterable[bytes]) -> None:
        """Remembers documents that were taken."""
        with self._errors():
            self._database.executemany(
                "INSERT OR IGNORE INTO seen VALUES (?)", [(digest,) for digest in sorted(digests)]
            )

    def commit(self, name: str, state: dict[str, Any], forget: bool = False) -> None:
        """Makes `state` and all digests permanent; `forget` empties the digests for the next corpus."""
        with self._errors():
            self._database.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, json.dumps(state)))
            if forget:
                self._database.execute("DELETE FROM seen")
            self._database.execute("COMMIT")
            self._database.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Lets go of the file; what was not committed is forgotten."""
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("ROLLBACK")
        self._database.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise FastDraftError(
                self._path,
                str(error),
                "the journal must be writable",
                "free some space and run the same command again",
            ) from error
        except (sqlite3.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FastDraftError(
                self._path,
                f"damaged ({error})",
                "unfinished work must be whole to go on from it",
                "redo it with --redo prepare",
            ) from error


def _state(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a state that is a {type(value).__name__}")
    return value
