"""Every error that FastDraft raises on purpose, and nothing else.

Decides how a failure reads: one line that names where (a recipe key or a file), what was found there, the rule that it
breaks and the remedy. The command line prints that line and exits with `exit_code`; the Python API raises it. What was found may be
anything: it is cut where it is long, and what would steer a terminal or turn the writing round is written as its escape.

    FastDraftError
    |-- RecipeError        a recipe key is unknown, of the wrong type or out of range
    |-- DataError          a corpus, prompt or task file is missing, empty or damaged
    |-- TargetError        a model directory or hub id cannot be loaded or is not supported
    |-- VocabularyError    two vocabularies that must match do not
    |-- ArtifactError      a run directory's content is damaged, locked or belongs to another recipe
    |-- DiskError          no room, or no right to write
    |-- TrainingError      the numbers went wrong: NaN loss, no trained tokens
    |-- DeviceError        the asked device is not there
    |-- NoMemoryError      the memory of the machine or of its accelerator does not suffice
    |-- WorkerError        one of several training processes is lost or cannot be reached
    |-- MissingExtraError  an optional library is not installed
    `-- Interrupted        stopped by a signal after everything was saved (exit code 130)
"""

from __future__ import annotations

import re

_LONGEST = 400
_STEERING = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters that are no white space, and those that turn the direction of writing."""


def _shown(text: object) -> str:
    """In one line without anything that steers a terminal."""
    return _STEERING.sub(
        lambda match: match[0].encode("unicode_escape").decode("ascii"), " ".join(str(text).split())
    )


def _cut(text: object) -> str:
    """As shown, the middle of a long text left out."""
    shown = _shown(text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST * 3 // 4]} ... {shown[-_LONGEST // 4 :]}"


class FastDraftError(Exception):
    """A failure that the user can understand and mend.

    Args:
        where: The recipe key (`design.draft.parameters`) or the file that is wrong.
        found: What stands there, short.
        rule: What should be true.
        remedy: What to do about it.
    """

    exit_code = 2

    def __init__(self, where: object, found: object, rule: str, remedy: str) -> None:
        self.where, self.found, self.rule, self.remedy = str(where), str(found), rule, remedy
        super().__init__(f"{_shown(where)}: {_cut(found)}: {_cut(rule)}; {_shown(remedy)}")

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.found, self.rule, self.remedy)


class RecipeError(FastDraftError):
    """A recipe key is unknown, of the wrong type or out of range."""


class DataError(FastDraftError):
    """A corpus, prompt or task file is missing, empty or damaged."""


class TargetError(FastDraftError):
    """A model directory or hub id cannot be loaded or is not supported."""


class VocabularyError(FastDraftError):
    """Two vocabularies that must match do not."""


class ArtifactError(FastDraftError):
    """A run directory's content is damaged, locked or belongs to another recipe."""


class DiskError(FastDraftError):
    """No room on the disk, or no right to write there."""


class TrainingError(FastDraftError):
    """The numbers went wrong: a NaN loss, no trained tokens."""


class DeviceError(FastDraftError):
    """The asked device is not there."""


class NoMemoryError(FastDraftError):
    """The memory of the machine or of its accelerator does not suffice."""


class WorkerError(FastDraftError):
    """One of several training processes is lost or cannot be reached."""


class MissingExtraError(FastDraftError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, command: str = "") -> None:
        self.library, self.extra, self.command = library, extra, command
        rule, remedy = f"this needs the extra '{extra}'", f"pip install 'fastdraft[{extra}]'"
        super().__init__(library, "not installed", rule, command or remedy)

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.library, self.extra, self.command)


class Interrupted(FastDraftError):
    """Stopped by a signal after everything was saved; the same command goes on from here."""

    exit_code = 130

    def __init__(self, where: object) -> None:
        super().__init__(
            where, "stopped by a signal", "progress is saved", "run the same command again to go on"
        )

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str]]:  # type: ignore[override]
        return type(self), (self.where,)
