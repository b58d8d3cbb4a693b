"""How much memory a target takes, alone and with a draft: each in a process of its own, so that nothing else counts.

Decides that memory is the peak of what is resident while one real prompt is answered, above what the process held before
anything was loaded. The operating system's own peak counter is read where it has one (it misses nothing); a thread that
looks every few milliseconds stands beside it. Weights that are mapped from their file count where they were touched.

    python -m fastdraft.runtimes.wall_clock_memory < JSON    one line of JSON; what `measure_memory` starts
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

LOOK_SECONDS = 0.003
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class MemoryRun:
    """What one process loads and answers."""

    target: str
    """Exported."""
    draft: str
    """Exported; "" runs the target alone."""
    prompt_ids: list[int]
    max_new_tokens: int
    num_speculative_tokens: int
    device: str = "CPU"
    draft_device: str = ""
    precision: str = "fast"
    threads: int = 0
    eos_ids: list[int] = field(default_factory=list)

    def with_draft(self, draft: Path) -> MemoryRun:
        """The same prompt, answered by the target with a draft."""
        return replace(self, draft=str(draft))


def measure_memory(run: MemoryRun) -> int | None:
    """Peak bytes of a fresh process above what it held before loading; None when the process fails."""
    command = [sys.executable, "-m", "fastdraft.runtimes.wall_clock_memory"]
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(asdict(run)),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
            encoding="utf-8",
        )
        return (
            int(json.loads(ended.stdout.strip().splitlines()[-1])["bytes"]) if ended.returncode == 0 else None
        )
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, IndexError):
        return None


class PeakWatch:
    """The most memory that this process held since it was made."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._counter = _peak_counter()
        self.begin = self.seen = int(self._process.memory_info().rss)

    def look(self) -> None:
        self.seen = max(self.seen, int(self._process.memory_info().rss))

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Looks every few milliseconds inside the block."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK_SECONDS):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.look()

    @property
    def grown(self) -> int:
        """Bytes of the peak above the beginning."""
        counter = _peak_counter()
        # The counter covers the process's whole life: it tells only if it has risen since.
        peak = (
            max(self.seen, counter) if counter is not None and counter > (self._counter or 0) else self.seen
        )
        return peak - self.begin


def _peak_counter() -> int | None:
    """The operating system's own peak of resident memory in bytes, where it can be asked for."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else int(peak)


def _answer(run: MemoryRun) -> int:
    """Loads what `run` names, answers its prompt and returns the bytes that this took."""
    # Not OpenVINOPair: it reads both tokenizers to compare them, and what they take would count.
    from fastdraft.functional.generation import Sampling
    from fastdraft.runtimes.openvino import Precision, generation_config
    from fastdraft.runtimes.openvino_passes import open_pipeline

    precision: Precision = "exact" if run.precision == "exact" else "fast"
    config = generation_config(Sampling(0.0), run.max_new_tokens, run.eos_ids, 0)
    if run.draft:
        config.num_assistant_tokens, config.assistant_confidence_threshold = run.num_speculative_tokens, 0.0
    draft = Path(run.draft) if run.draft else None
    watch = PeakWatch()
    with watch.looking():
        pipeline = open_pipeline(
            Path(run.target),
            draft,
            device=run.device,
            draft_device=run.draft_device,
            precision=precision,
            threads=run.threads,
            rows=1,
            one_by_one=False,
        )
        pipeline.write([run.prompt_ids], [config], None)
    return watch.grown


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a `MemoryRun` from stdin and prints its bytes."""
    print(json.dumps({"bytes": _answer(MemoryRun(**json.loads(sys.stdin.read())))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
