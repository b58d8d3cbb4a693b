"""Where a result comes from: versions, machine, command, time; written into every manifest.

Decides what is recorded, and that nothing secret is: no environment variables, no user name, and home folders in
command lines are written `~`.
"""

from __future__ import annotations

import os
import platform
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


def describe_run() -> dict[str, Any]:
    """Versions, machine, command and time, ready for a manifest."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(_without_home(argument) for argument in [_program(), *sys.argv[1:]]),
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


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
