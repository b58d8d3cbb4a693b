"""Kills a run with SIGKILL at random moments, reruns it, and compares the result with an undisturbed run.

    python tests/kill_and_resume.py --kills 20 --seed 5 [--openvino | --http] [--logits]

Every other kill falls into the stage that was killed least often so far, the others anywhere. Equal are
weights and stored logits byte for byte, synthetic rows in every column, evaluation counts; of the benchmark
texts, counts and rows but for what a clock says. With --http the target writes through a server of its own
process, which is killed and started again every few kills."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_recipe, write_target
from fastdraft.errors import MissingExtra
from fastdraft.runtimes.openvino import require_openvino
from fastdraft.stages import SUMMARIES

TIMES = ("second", "speedup", "quotient")  # in the names of what a clock decides in benchmark.json
# The smallest benchmark: one pair, one K (which of several is the best is for the clock to say).
BENCHMARK: dict[str, Any] = {
    "precision": "exact",  # where greedy texts cannot differ
    "weights": [{"target": "fp32", "draft": "fp32"}],
    "prompts": 2,
    "num_speculative_tokens": [2],
    "sweep": {"prompt_tokens": [], "max_new_tokens": [8], "concurrency": []},
    "repeats": 2,
}
OPENVINO: dict[str, Any] = {
    "export": {"formats": ["huggingface", "openvino"], "openvino": {"target": "int8"}},
    "benchmark": {
        **BENCHMARK,
        "precision": "fast",
        "weights": [{"target": "int8", "draft": "int8"}, {"target": "int8", "draft": "fp16"}],
        "sweep": {"prompt_tokens": [16], "max_new_tokens": [8, 16], "concurrency": [1, 2]},
    },
}
TRAINED = ("pretrain/checkpoint", "continue_pretrain/checkpoint", "align/checkpoint")
COMPARED = ("design/draft", *TRAINED, "export/huggingface")
SERVER_KILLED_EVERY = 2  # kills of a run
STALLED = 1800.0  # seconds without a change of its files after which a run is taken for hung


@dataclass(frozen=True)
class Kind:
    """What is in the recipe beyond the tiny one's."""

    openvino: bool = False
    benchmark: bool = False  # always with `openvino`
    http: bool = False
    logits: bool = False
    short: bool = False  # only what writes and what learns from it: design, synthesize, align


class Server:
    """A server of the target in a process of its own, which outlives every run."""

    def __init__(self, target: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.target, self.url = target, f"http://127.0.0.1:{self.port}/v1"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        program = [sys.executable, str(Path(__file__).with_name("serving.py")), str(self.target)]
        return subprocess.Popen([*program, "--port", str(self.port)], stdout=subprocess.DEVNULL)

    def restart(self) -> None:
        """As after a crash: whoever asks gets no answer until it is up again."""
        self.stop()
        self.process = self._start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
                return
            time.sleep(0.1)
        raise SystemExit("the server did not start")


def command(recipe: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "fastdraft", "run", str(recipe), f"run.name={name}", "--quiet"]


def written_recipe(folder: Path, kind: Kind, server: str = "") -> Path:
    """The tiny recipe, on transformers alone, through OpenVINO and its benchmark, or through a server."""
    recipe = write_recipe(folder, folder / "target", **(OPENVINO if kind.openvino else {}))
    value = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if kind.benchmark and not kind.openvino:
        value["benchmark"] = BENCHMARK
    if kind.openvino:
        value["synthesize"]["engine"] = {"kind": "openvino"}
    if kind.http:
        _through_server(value, folder, server)
    if kind.short:  # after the server's sections, which reach into evaluate
        value = {name: value[name] for name in ("run", "target", "design", "synthesize", "align")}
        value["synthesize"]["prompts"] = [p for p in value["synthesize"]["prompts"] if p["kind"] == "jsonl"]
        value["align"] |= {"tokens": "2k", "pretraining_share": 0}
    if kind.logits:
        value["synthesize"]["logits"] = {"kind": "top_k", "k": 16}
        value["align"]["objective"] = {"kind": "token_kd", "loss": "forward_kl", "source": "stored"}
    recipe.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return recipe


def _through_server(recipe: dict[str, Any], folder: Path, url: str) -> None:
    """Lets a server write training text and evaluation text, and adds conversations to both."""
    talks, own = folder / "talks.jsonl", folder / "own-talks.jsonl"
    talks.write_text(
        "".join(_talk(f"talk{i}", "What is", "And what", "Why") for i in range(16)), encoding="utf-8"
    )
    own.write_text("".join(_talk(f"own{i}", "Who is", "Where is") for i in range(4)), encoding="utf-8")
    engine = {"kind": "openai", "servers": [url], "logprobs": "processed", "retries": 100}
    source = {"kind": "jsonl", "name": "talks", "path": str(talks), "field": "messages", "share": 1}
    # One answer at a time, so that each has a text of its own: fewer of them, in smaller units.
    fewer = {"tokens": "1500", "batch_rows": 8}
    recipe["synthesize"] |= {"engine": engine, "prompts": [*recipe["synthesize"]["prompts"], source], **fewer}
    task = {"kind": "file", "name": "talks", "path": str(own), "chat": True, "max_new_tokens": 12}
    recipe["evaluate"] |= {"texts": "engine", "tasks": [*recipe["evaluate"]["tasks"], task]}


def _talk(name: str, *users: str) -> str:
    messages = []
    for words in users:
        messages.append({"role": "user", "content": f"{words} {name}?"})
        messages.append({"role": "assistant", "content": "Logged."})
    return json.dumps({"id": name, "messages": messages}) + "\n"


def kill_and_resume(
    folder: Path, kills: int, seed: int = 0, say: bool = False, kind: Kind = Kind()
) -> list[str]:
    """What differs between a run killed `kills` times, at moments of this seed, and an undisturbed one."""
    target = write_target(folder / "target")
    server = Server(target) if kind.http else None
    try:
        if server:
            server.wait()
        recipe = written_recipe(folder, kind, server.url if server else "")
        return Killing(recipe, folder / "runs", kills, random.Random(seed), server, say).compare()
    finally:
        if server:
            server.stop()


@dataclass
class Killing:
    """Runs of one recipe that are killed, and an undisturbed one beside them."""

    recipe: Path
    runs: Path
    kills: int
    random_part: random.Random
    server: Server | None
    say: bool
    done: Counter[str] = field(default_factory=Counter)  # kills by the stage that was at work
    server_kills: int = 0

    def compare(self) -> list[str]:
        whole, recipe = self.runs / "undisturbed", yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        stages = [name for name in SUMMARIES if name in recipe]
        seen = _watch(subprocess.Popen(command(self.recipe, "undisturbed")), whole, stages)
        self._say(f"undisturbed run: {seen.total()} changes of its files seen; {_by_stage(seen)}")
        found, number = list[str](), 0
        self.done = Counter(dict.fromkeys(stages, 0))
        while self.done.total() < self.kills:
            number += 1
            name = f"disturbed-{number}"
            self._disturb(name, seen)
            found += [f"{name}: {what}" for what in differences(whole, self.runs / name)]
            self._say(f"{name}: {'differs: ' + '; '.join(found) if found else 'equal'}")
        kills = f"{self.done.total()} kills in {number} runs: {_by_stage(self.done)}"
        self._say(f"{kills}; {self.server_kills} kills of the server")
        return found

    def _disturb(self, name: str, seen: Counter[str]) -> None:
        """Kills one run again and again until it is finished or all kills are done, then lets it finish."""
        arguments, run, stages = command(self.recipe, name), self.runs / name, list(seen)
        while (done := self.done.total()) < self.kills:
            least = min(stages[stages.index(_stage(run, stages)) :], key=lambda stage: self.done[stage])
            # With enough kills every stage has one, the shortest too.
            missed = not self.done[least] and self.kills >= 2 * len(stages)
            within = least if done % 2 or missed else ""
            # A quarter of a run at most, so that many kills reach the last stages too.
            most = seen[within] if within else max(2, 2 * seen.total() // (self.kills + 1), seen.total() // 4)
            process = subprocess.Popen(arguments)
            server_dies = self._server_dies() if self.server and done % SERVER_KILLED_EVERY == 0 else None
            _watch(process, run, stages, kill_at=self.random_part.randint(1, most), within=within)
            if server_dies:
                server_dies.join()
            if process.returncode == 0:
                return
            self.done[_stage(run, stages)] += 1
            self._say(f"{name}: kill {done + 1} in {_stage(run, stages)}")
        _watch(subprocess.Popen(arguments), run, stages)

    def _server_dies(self) -> threading.Thread:
        """Kills the server after a while that falls now into the start of a run, now into its questions."""
        assert self.server is not None
        self.server_kills += 1
        timer = threading.Timer(self.random_part.uniform(0, 6), self.server.restart)
        timer.start()
        return timer

    def _say(self, text: str) -> None:
        if self.say:
            print(text, flush=True)


def _stage(run: Path, stages: list[str]) -> str:
    """The first that is not finished; the last where all are."""
    return next((name for name in stages if not (run / name / "manifest.json").exists()), stages[-1])


def _by_stage(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _watch(
    process: subprocess.Popen[bytes], run: Path, stages: list[str], kill_at: int = 0, within: str = ""
) -> Counter[str]:
    """Changes of a run's files by stage until the process ends, or is killed at one of them.

    Moments are counted in changes, not seconds: on a busy machine seconds would all be spent on imports.
    """
    changes, before, changed = Counter(dict.fromkeys(stages, 0)), _listing(run), time.monotonic()
    while process.poll() is None:
        time.sleep(0.003)
        now = _listing(run)
        if now != before:
            before, changed = now, time.monotonic()
            changes[_stage(run, stages)] += 1
        if time.monotonic() - changed > STALLED:
            process.kill()
            process.wait()
            raise SystemExit(f"{run.name}: no file has changed for {STALLED:.0f} s, in {_stage(run, stages)}")
        # A stage passed by meanwhile counts too: what was asked for had fewer changes left than once thought.
        lived = sum(changes[name] for name in stages[stages.index(within) if within else 0 :])
        if kill_at and lived >= kill_at:
            process.kill()
            process.wait()
            return changes
    if process.returncode != 0:
        raise SystemExit(f"{run.name}: a run failed by itself")
    return changes


def _listing(run: Path) -> list[tuple[str, int, int]]:
    """Every file with its size and time; files that vanish meanwhile are left out."""
    found = []
    for folder, _, names in os.walk(run):
        for name in names:
            with contextlib.suppress(OSError):
                facts = os.stat(os.path.join(folder, name))
                found.append((f"{folder}/{name}", facts.st_size, facts.st_mtime_ns))
    return sorted(found)


def differences(one: Path, two: Path) -> list[str]:
    """What of weights, synthetic rows, counts and measured rows is not equal."""
    found, readers = [], (weights, rows, stored_logits, evaluation_rows, benchmark_rows, benchmark_units)
    for read in readers:
        values = read(one), read(two)
        if values[0] != values[1]:
            found.append(f"{read.__name__} ({len(values[0])} and {len(values[1])})")
    for what, keys in {
        "synthetic": [r["row_id"] for r in rows(two)],
        "benchmark": benchmark_rows(two),
    }.items():
        if len(set(keys)) != len(keys):
            found.append(f"doubled {what} rows")
    left = [path.name for path in (*two.rglob("*.tmp"), *two.rglob("converted"))]
    return [*found, f"left behind: {left[:3]}"] if left else found


def weights(run: Path) -> dict[str, bytes]:
    files = {name: run / name / "model.safetensors" for name in COMPARED if (run / name).exists()}
    return {name: path.read_bytes() for name, path in files.items()}


def read_file(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(run: Path) -> list[dict[str, Any]]:
    """The synthetic rows in the order written, with all their columns."""
    paths = sorted((run / "synthesize" / "units").glob("*.parquet"))
    return [row for path in paths for row in parquet.read_table(path).to_pylist()]


def stored_logits(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("synthesize/units/*.logits.*")}


def evaluation_rows(run: Path) -> list[dict[str, Any]]:
    """Without what a clock decides; none where nothing was evaluated."""
    path = run / "evaluate" / "results.json"
    found = read_file(path)["rows"] if path.is_file() else []
    return [
        {k: v for k, v in row.items() if "latency" not in k and k != "predicted_speedup"} for row in found
    ]


def benchmark_rows(run: Path) -> list[str]:
    """The measured rows without what a clock decides, in the order written; none where nothing was
    measured.
    """
    path = run / "benchmark" / "benchmark.json"
    found = read_file(path)["rows"] if path.is_file() else []
    return [json.dumps(without_times(row), sort_keys=True) for row in found]


def benchmark_units(run: Path) -> dict[str, Any]:
    """Name -> texts and counts of each finished unit, and how many tokens were timed; without times and
    memory.
    """
    paths = sorted((run / "benchmark" / "units").glob("*.json"))
    measures = ("latency-", "breakdown-", "memory-")
    return {p.name: "" if p.name.startswith(measures) else without_times(read_file(p)) for p in paths}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not any(part in name for part in TIMES)}
        return {name: without_times(item) for name, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def _can_benchmark() -> bool:
    try:
        require_openvino()
    except MissingExtra:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--openvino", action="store_true", help="write, export and benchmark through OpenVINO"
    )
    parser.add_argument("--http", action="store_true", help="write through a server, which is killed too")
    parser.add_argument("--no-benchmark", action="store_true", help="as where OpenVINO is not installed")
    parser.add_argument("--logits", action="store_true", help="keep the target's logits, distil from them")
    arguments = parser.parse_args()
    if arguments.openvino and arguments.http:
        parser.error("one engine writes: --openvino or --http")
    with tempfile.TemporaryDirectory() as folder:
        measured = not arguments.no_benchmark and _can_benchmark()
        kind = Kind(arguments.openvino, measured, arguments.http, arguments.logits)
        found = kill_and_resume(Path(folder), arguments.kills, arguments.seed, say=True, kind=kind)
    equal = "equal: weights, rows, logits, counts; the benchmark but for its times"
    print("differs: " + "; ".join(found) if found else equal)
    sys.exit(bool(found))
