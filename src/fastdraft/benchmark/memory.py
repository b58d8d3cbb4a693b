"""How much memory a target takes, alone and with a draft: each in a process of its own, so that nothing else counts.

Memory is the peak of what is resident while one real prompt is answered, above what the process held before anything was loaded. Weights
that are mapped from their file count where they were touched.

    python -m fastdraft.benchmark.memory < JSON    one line of JSON; what `measure_memory` starts
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdraft.functional.generation import Sampling
from fastdraft.runtimes.runtime import Runtime

_LOOK_SECONDS = 0.003
_TIMEOUT_SECONDS = 1800


def measure_memory(
    runtime: Runtime,
    target: Path,
    draft: Path,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    num_speculative_tokens: int,
) -> int | None:
    """Peak bytes of a fresh process, which makes the same runtime, above what it held before loading; K 0 is the target alone.

    None when the process fails.
    """
    kind = type(runtime)
    asked = {
        "runtime": [kind.__module__, kind.__name__, asdict(runtime)],  # type: ignore[call-overload]
        "pair": [str(target), str(draft)],
        "answer": [list(prompt_ids), max_new_tokens, num_speculative_tokens],
    }
    command = [sys.executable, "-m", "fastdraft.benchmark.memory"]
    options: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "encoding": "utf-8",
        "timeout": _TIMEOUT_SECONDS,
    }
    try:
        ended = subprocess.run(command, input=json.dumps(asked), check=True, **options)
        return int(json.loads(ended.stdout.strip().splitlines()[-1])["bytes"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError):
        return None


class PeakWatch:
    """The most memory that this process held since it was made."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._counter = _peak_counter()
        self.begin = self.seen = int(self._process.memory_info().rss)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Looks every few milliseconds inside the block: beside the system's own peak counter, which misses nothing where there is one."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_LOOK_SECONDS):
                self._look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._look()

    def _look(self) -> None:
        self.seen = max(self.seen, int(self._process.memory_info().rss))

    @property
    def grown(self) -> int:
        """Bytes of the peak above the beginning."""
        counter = _peak_counter()
        # The counter covers the process's whole life: it tells only if it has risen since.
        risen = counter is not None and counter > (self._counter or 0)
        return max(self.seen, counter if risen else 0) - self.begin


def _peak_counter() -> int | None:
    """The operating system's own peak of resident memory in bytes, where it can be asked for."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else int(peak)


def main() -> None:
    """Reads what `measure_memory` asks from stdin and prints the bytes."""
    asked = json.loads(sys.stdin.read())
    module, name, settings = asked["runtime"]
    runtime: Runtime = getattr(importlib.import_module(module), name)(**settings)
    pair = runtime.open(*map(Path, asked["pair"]))
    prompt_ids, max_new_tokens, k = asked["answer"]
    watch = PeakWatch()
    with watch.looking():  # models are loaded with the first answer
        if k:
            pair.write_with_draft([prompt_ids], Sampling(0.0), max_new_tokens, 0, k)
        else:
            pair.write([prompt_ids], Sampling(0.0), max_new_tokens, 0)
    print(json.dumps({"bytes": watch.grown}))


if __name__ == "__main__":
    main()
