"""Where a result comes from: versions, machine, command, time; written into every manifest.

Decides what is recorded, and that nothing secret is: no environment variables, no user name, no passwords or keys of a
command line, whose home folders are written `~`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "fastdraft",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "openvino",
    "openvino-genai",
    "nncf",
    "optimum-intel",
)

_LOGIN = re.compile(r"//[^/@\s]+@")
"""`user:password@` in an address."""
_NAMES = r"api[_-]?key|access[_-]?token|auth[_-]?token|hf[_-]?token|token|password|secret"
_KEYS = re.compile(rf"((?:^|[?&.{{,\s])(?:{_NAMES})['\"]?\s*[=:]\s*)[^&\s,}}]+", re.IGNORECASE)
"""`api_key=...` and its like, in an address or as a recipe key."""


def describe_run() -> dict[str, Any]:
    """Versions, machine, command and time, ready for a manifest."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            _without_home(without_secrets(argument)) for argument in [_program(), *sys.argv[1:]]
        ),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "fastdraft" if name == "__main__.py" else name


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def without_secrets(text: str) -> str:
    """A command line's argument or an address with its passwords and keys blotted out."""
    return _KEYS.sub(r"\1***", _LOGIN.sub("//***@", text))


def _without_home(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # a container's user may have none
        return text
    return text.replace(home, "~") if len(home) > 1 else text
