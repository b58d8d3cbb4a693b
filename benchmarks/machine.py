"""What every benchmark here shares: the machine in words, the JSON that each writes, and timing in turns.

Decides the form of a result file (`SCHEMA`), that it is written whole after every figure, so that a benchmark cut off leaves
what it has; that neither host names nor folders get into it; that contenders take turns in another order each time and ratios
are formed within a turn, so that a busy machine slows all alike. Needs the standard library and torch, nothing else.

    {"schema": 1, "benchmark": NAME, "date": "2026-11-23", "command": "python benchmarks/NAME.py ...", "dry_run": false,
     "machine": {...}, "settings": {...}, "complete": true, "results": [{...}, ...]}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "openvino",
    "openvino-genai",
    "nncf",
    "optimum-intel",
)


def add_arguments(parser: argparse.ArgumentParser, name: str, *, device: bool = True) -> None:
    """The options that all benchmarks have: --device, --threads, --output, --dry-run."""
    if device:
        parser.add_argument(
            "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
        )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of torch; 0 leaves its own choice"
    )
    parser.add_argument(
        "--output",
        "--json",
        type=Path,
        default=Path(f"{name}.json"),
        help=f"result file (default {name}.json)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny shapes on the CPU, seconds: does it run at all? its figures mean nothing",
    )


def describe_machine(device: torch.device | str) -> dict[str, Any]:
    """The device, the CPU, memory, system and library versions; no host name, no user, no folder."""
    device = torch.device(device)
    machine: dict[str, Any] = {"device_type": device.type, "device": cpu_name()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    versions = {name: version for name in LIBRARIES if (version := _version(name))}
    return machine | {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": versions,
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """This command line as it would be typed in the checkout; of a path elsewhere only the last part."""
    return " ".join(["python", *(_relative(argument) for argument in sys.argv)])


def _relative(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if path.is_absolute() or value.startswith(("~", "..")):
        whole = Path(os.path.abspath(path.expanduser()))  # a link inside the checkout keeps its own name
        value = whole.relative_to(ROOT).as_posix() if whole.is_relative_to(ROOT) else path.name
    return option + equals + value


class Report:
    """A benchmark's result file: `add` a figure and it stands on the disk.

    Args:
        path: Written at once, and again after every figure.
        name: The benchmark's, that of its script.
        device: What it ran on.
        settings: The parsed options; paths and bookkeeping are left out.
        dry_run: Tiny shapes: the figures mean nothing.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        device: torch.device | str,
        settings: Mapping[str, Any] | argparse.Namespace,
        *,
        dry_run: bool = False,
    ) -> None:
        given = vars(settings) if isinstance(settings, argparse.Namespace) else dict(settings)
        shown = {
            key: _relative(value.as_posix()) if isinstance(value, Path) else value
            for key, value in given.items()
        }
        shown = {key: _relative(value) if isinstance(value, str) else value for key, value in shown.items()}
        self.path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": name,
            "date": datetime.now(UTC).date().isoformat(),
            "command": command(),
            "dry_run": dry_run or bool(given.get("dry_run")),
            "machine": describe_machine(device),
            "settings": {
                key: value for key, value in shown.items() if key not in ("output", "json", "dry_run")
            },
            "complete": False,
            "results": [],
        }
        self.write()

    @property
    def results(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.content["results"]
        return found

    def add(self, *results: Mapping[str, Any]) -> None:
        """Figures of one or several settings, on the disk when this returns."""
        self.results.extend(dict(result) for result in results)
        self.write()

    def put(self, result: Mapping[str, Any], *keys: str) -> None:
        """As `add`, in the place of an earlier result that has the same values at `keys`: a figure that becomes better known."""
        self.results[:] = [one for one in self.results if any(one.get(key) != result[key] for key in keys)]
        self.add(result)

    def finish(self, **figures: Any) -> None:
        """Marks the file complete; `figures` are put beside the results (a summary, a verdict)."""
        self.content |= figures
        self.content["complete"] = True
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def synchronize(device: torch.device | str) -> None:
    """Waits until an accelerator has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    turns: int,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contender in every turn, by `clock`; who begins changes from turn to turn. Warm up before."""
    names, seconds = list(contenders), {name: [0.0] * turns for name in contenders}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            start = clock()
            contenders[name]()
            synchronize(device)
            seconds[name][turn] = clock() - start
    return seconds


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and range, rounded to significant digits."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in found.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """How many times faster the second is: median and range of the ratios within the turns."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)], 3)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under columns, the first left, the others right."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(
        line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a device or a process without memory, which ends a setting and not the benchmark."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in str(error)
        or "can't allocate memory" in str(error)
    )
