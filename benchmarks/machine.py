"""What every benchmark here shares: options, the machine in words, the result file, timing in turns.

Needs the standard library and torch, nothing else. The file is written whole after every figure; no host name
or folder gets into it:

    {"schema": 1, "benchmark": NAME, "date": "2026-11-23", "command": "python benchmarks/NAME.py ...",
     "dry_run": false, "machine": {...}, "settings": {...}, "complete": true, "results": [{...}, ...]}
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "triton", "transformers", "tokenizers", "numpy", "openvino", "openvino-genai", "nncf")


def options(about: str | None, name: str, *, device: bool = True) -> argparse.ArgumentParser:
    """A parser with what all benchmarks have: --device, --threads, --output, --dry-run."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    add = parser.add_argument
    if device:
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=int, default=0, help="CPU threads of torch; 0 leaves its own choice")
    add("--output", "--json", type=Path, default=Path(f"{name}.json"), help=f"default {name}.json")
    add("--dry-run", action="store_true", help="tiny, on the CPU: does it run? its figures mean nothing")
    return parser


def describe_machine(device: torch.device | str) -> dict[str, Any]:
    """The device, the CPU, memory, system and library versions; no host name, no user, no folder."""
    device, info = torch.device(device), Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8") if info.exists() else "")
    cpu = named[1] if named else platform.processor() or platform.machine()
    machine: dict[str, Any] = {"device_type": device.type, "device": cpu}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"device": properties.name, "device_memory_gib": round(properties.total_memory / 2**30, 1)}
        machine |= {"devices": torch.cuda.device_count(), "cuda": torch.version.cuda}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine |= {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "memory_gib": None}
    if hasattr(os, "sysconf"):
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    machine["libraries"] = {name: installed[name] for name in LIBRARIES if name in installed}
    system = f"{platform.system()} {platform.machine()}"
    return machine | {"system": system, "python": platform.python_version()}


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
    """A benchmark's result file: `add` a figure and it stands on the disk."""

    def __init__(self, path: Path, name: str, device: torch.device | str, given: argparse.Namespace) -> None:
        shown = {
            key: _relative(str(value)) if isinstance(value, Path | str) else value
            for key, value in vars(given).items()
            if key not in ("output", "dry_run")
        }
        self.path, self.results = path, []
        self.content: dict[str, Any] = {
            "schema": 1,
            "benchmark": name,
            "date": datetime.now(UTC).date().isoformat(),
            "command": command(),
            "dry_run": given.dry_run,
            "machine": describe_machine(device),
            "settings": shown,
            "complete": False,
            "results": self.results,
        }
        self.write()

    def add(self, *results: Mapping[str, Any]) -> None:
        """Figures of one or several settings, on the disk when this returns."""
        self.results.extend(dict(result) for result in results)
        self.write()

    def put(self, result: Mapping[str, Any], *keys: str) -> None:
        """As `add`, in the place of an earlier result with the same values at `keys`."""
        self.results[:] = [one for one in self.results if any(one.get(key) != result[key] for key in keys)]
        self.add(result)

    def finish(self, **figures: Any) -> None:
        """Marks the file complete; `figures` are put beside the results."""
        self.content |= {**figures, "complete": True}
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


def turns_of(names: Sequence[str], turns: int) -> list[list[str]]:
    """Who comes after whom in each turn: another begins every time."""
    firsts = [turn % max(1, len(names)) for turn in range(turns)]
    return [[*names[first:], *names[:first]] for first in firsts]


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], turns: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every contender in every turn. Warm up before."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for names in turns_of(list(contenders), turns):
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            contenders[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and range, rounded to significant digits."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in found.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """How many times faster the second is: median and range of the ratios within the turns."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)], 3)


def tell(found: Mapping[str, float], form: str = ".2f") -> str:
    """A spread in words: median (low to high)."""
    return f"{found['median']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under columns, the first left, the others right."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(cells, padded, strict=True)
    )
