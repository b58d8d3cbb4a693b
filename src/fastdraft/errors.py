"""The errors that FastDraft raises on purpose.

Each is one line for the user: the recipe key or file, what stands there, the rule, then what to do about it. The command line
prints it and exits with `exit_code`; the Python API raises it.
"""

from __future__ import annotations

import re

# Control characters that are no white space, and those that turn the direction of writing: a damaged file must not steer the terminal.
_STEERING = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LONGEST = 600


class FastDraftError(Exception):
    """A failure that the user can understand and mend.

    Args:
        message: Names the recipe key or the file, the value found and the rule that it breaks.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(self, message: object, fix: object = "", *old: object) -> None:
        # TODO(rebuild): the four-part form goes once every call has two parts.
        self.where, self.found, self.rule, self.remedy = "", "", "", str(fix)
        if old:
            self.where, self.found, self.rule, self.remedy = str(message), str(fix), str(old[0]), str(old[1])
            message, fix = f"{message}: {fix}: {old[0]}", old[1]
        self.message, self.fix = _one_line(message), _one_line(fix)
        super().__init__(f"{self.message}; {self.fix}" if self.fix else self.message)

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str, str]]:
        return type(self), (self.message, self.fix)


class RecipeError(FastDraftError):
    """A recipe key or command-line argument is unknown, of the wrong type, out of range or not possible on this machine."""


class DataError(FastDraftError):
    """A corpus, prompt, log or task file is missing, empty or damaged."""


class TargetError(FastDraftError):
    """A model directory or hub id cannot be loaded, is not supported, or does not fit the other one."""


class OutOfMemory(FastDraftError):
    """The memory of the machine or of its accelerator does not suffice."""


class MissingExtra(FastDraftError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, command: str = "") -> None:
        self.library, self.extra, self.command = library, extra, command
        super().__init__(
            f"{library} is not installed; this needs the extra '{extra}'",
            command or f"pip install 'fastdraft[{extra}]'",
        )

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.library, self.extra, self.command)


class Interrupted(FastDraftError):
    """Stopped by a signal after everything was saved; the same command goes on from here."""

    exit_code = 130

    def __init__(self, where: object) -> None:
        self.stopped_at = where
        super().__init__(
            f"{where}: stopped by a signal; progress is saved", "run the same command again to go on"
        )

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str]]:  # type: ignore[override]
        return type(self), (str(self.stopped_at),)


def _one_line(text: object) -> str:
    shown = _STEERING.sub(
        lambda match: match[0].encode("unicode_escape").decode("ascii"), " ".join(str(text).split())
    )
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST * 3 // 4]} ... {shown[-_LONGEST // 4 :]}"
