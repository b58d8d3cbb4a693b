"""What libraries say and raise while a model is loaded, turned into at most one line for the user.

Decides which messages are held back, what each known failure means (found, rule, remedy), and when another place than the model's files
is at fault.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from fastdraft.errors import FastDraftError, TargetError
from fastdraft.machine import disk_error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back the libraries' notices and bars while loading; what matters is checked and raised."""
    from transformers.utils import logging as notices

    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity(logging.ERROR)
    notices.disable_progress_bar()
    try:
        yield
    finally:
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()


@contextlib.contextmanager
def one_line(location: str) -> Iterator[None]:
    """Turns whatever a library raises while loading into one TargetError; into a FastDraftError where another place is at fault, such as a
    cache that cannot be written.
    """
    try:
        yield
    except (TargetError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # transformers, the hub and safetensors raise dozens of kinds
        raise _elsewhere(location, error) or explain(location, error) from error


def _elsewhere(location: str, error: Exception) -> FastDraftError | None:
    """The line for a failed call of the operating system about a file that is not the model's."""
    if (
        isinstance(error, OSError)
        and isinstance(error.filename, str)
        and not error.filename.startswith(location)
    ):
        return disk_error(error, location)
    return None


_NOT_ALLOWED = (
    "closed to you",
    "the hub must let you read it",
    "accept its licence there and log in with `hf auth login`",
)
_UNREACHABLE = ("the hub cannot be reached", "the model is not on this machine", "go online or name a folder")
_EXPLANATIONS: list[tuple[str, tuple[str, str, str]]] = [
    (
        r"trust_remote_code|custom code|execute the",
        (
            "needs Python code of its own",
            "such code runs only when asked for",
            "set target.trust_remote_code=true",
        ),
    ),
    (r"gated|401|403|access to model", _NOT_ALLOWED),
    (
        r"is not a valid model identifier|404|not a local folder",
        ("neither a folder here nor a model on the hub", "must be one of them", "correct the name"),
    ),
    (r"connect|offline|resolve|timed out|Max retries|cannot find the requested files", _UNREACHABLE),
    (
        r"safetensors|HeaderTooLarge|InvalidHeader|MetadataIncomplete|deserializ",
        ("damaged or missing weights", "needs whole safetensors files", "fetch the model again"),
    ),
    (
        r"mismatched_sizes|size mismatch",
        (
            "weights of other shapes than config.json says",
            "both must come from one model",
            "fetch the model again",
        ),
    ),
    (
        r"out of memory|allocate",
        (
            "does not fit into memory",
            "the whole model must fit",
            "use a smaller target.dtype or another device",
        ),
    ),
]
"""What a library's message means for the user: found, rule, remedy."""


def explain(location: str, error: Exception) -> TargetError:
    """The line for whatever a library raised while it loaded `location`."""
    text = f"{type(error).__name__}: {error}"
    for pattern, explanation in _EXPLANATIONS:
        if re.search(pattern, text, re.IGNORECASE):
            return TargetError(location, *explanation)
    short = " ".join(text.split())[:160]
    return TargetError(
        location,
        short,
        "the model must load in transformers",
        "check its files, or try another version of transformers",
    )
