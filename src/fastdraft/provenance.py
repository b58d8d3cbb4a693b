"""Where a result comes from: versions, machine, command and time, written into every manifest; nothing secret
among them.
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
    *("fastdraft", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "datasets"),
    *("openvino", "openvino-genai", "nncf", "optimum-intel"),
)
_LOGIN = re.compile(r"//[^/@\s]+@")  # user:password@ in an address
_NAMES = r"api[_-]?key|access[_-]?token|auth[_-]?token|hf[_-]?token|token|password|secret"
_KEYS = re.compile(rf"((?:^|[?&.{{,\s])(?:{_NAMES})['\"]?\s*[=:]\s*)[^&\s,}}]+", re.IGNORECASE)


def describe_run() -> dict[str, Any]:
    """Versions, machine, command and time, ready for a manifest. The home folder of a path in the command is
    written `~`.
    """
    program = Path(sys.argv[0]).name
    words = ["fastdraft" if program == "__main__.py" else program, *sys.argv[1:]]
    home = os.path.expanduser("~")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            without_secrets(word).replace(home, "~" if len(home) > 1 else home) for word in words
        ),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def without_secrets(text: str) -> str:
    """A command line's argument or an address with its passwords and keys blotted out."""
    return _KEYS.sub(r"\1***", _LOGIN.sub("//***@", text))
