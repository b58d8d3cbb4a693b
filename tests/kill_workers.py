"""Kills workers, machines and the driver of runs on a Ray cluster, all with SIGKILL, and compares what they end with
with an undisturbed run of one process.

    python tests/kill_workers.py --kills 20 --seed 5 [--workers 3]

The cluster is one of this machine: a head without CPUs and three nodes, which are killed and added again. Equal are
shards byte for byte, synthetic rows in every column, evaluation counts; nothing is lost or doubled, and no worker
outlives its run. Needs the extra `ray`, and psutil."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_recipe, write_target
from fastdraft.run_folder import file_sha256
from kill_and_resume import command, differences

KINDS = ("worker", "machine", "driver")
SECONDS = 4.0  # after a worker is there, within which it is killed
LEFT = 30.0  # until the workers of a dead driver are gone
STALLED = 900.0


def written_recipe(folder: Path) -> Path:
    """What workers have a part in: prepare, synthesize, and evaluate's texts of an untrained draft."""
    recipe = write_recipe(folder, write_target(folder / "target"))
    value = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    value = {name: value[name] for name in ("run", "target", "design", "prepare", "synthesize", "evaluate")}
    value["synthesize"] |= {"tokens": "6k", "samples": 8, "logits": {"kind": "top_k", "k": 8}}
    value["synthesize"]["prompts"] = [p for p in value["synthesize"]["prompts"] if p["kind"] != "magpie"]
    recipe.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return recipe


def workers() -> list[psutil.Process]:
    """Of this script's cluster, which all are its descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RayWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def again(start: Callable[[], Any]) -> Any:
    """Ray gives its own processes 30 seconds to start, which on a busy machine may not be enough."""
    for attempt in range(5):
        try:
            return start()
        except Exception as error:
            print(f"start {attempt + 1}: {error}", flush=True)
    raise SystemExit("Ray does not start")


class Killing:
    """Runs on a cluster whose parts are killed one after the other."""

    def __init__(self, recipe: Path, kills: int, seed: int, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.recipe, self.kills, self.draw, self.count = recipe, kills, random.Random(seed), count
        self.runs, self.done = recipe.parent / "runs", Counter(dict.fromkeys(KINDS, 0))
        # Ray's workers are nice to others, and are killed when others need memory: here they stand for machines.
        os.environ |= {"RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
        head = {"num_cpus": 0, "include_dashboard": False}
        self.cluster = again(lambda: Cluster(True, head_node_args=head))
        self.nodes = [self.new_node() for _ in range(3)]

    def new_node(self) -> Any:
        return again(lambda: self.cluster.add_node(num_cpus=2))

    def compare(self) -> list[str]:
        whole, found, number = self.runs / "undisturbed", list[str](), 0
        subprocess.run(command(self.recipe, "undisturbed"), check=True)
        while self.done.total() < self.kills:
            number += 1
            name = f"disturbed-{number}"
            self.disturb(name)
            run = self.runs / name
            found += [f"{name}: {what}" for what in differences(whole, run)]
            found += [f"{name}: shards"] if shards(whole) != shards(run) else []
            found += [f"{name}: a worker outlived its run"] if self.outlived() else []
            print(f"{name}: {'differs: ' + '; '.join(found) if found else 'equal'}", flush=True)
        self.cluster.shutdown()
        print(f"{self.done.total()} kills in {number} runs: {dict(self.done)}")
        return found

    def disturb(self, name: str) -> None:
        """Kills parts of a run until it is finished or all kills are done, then lets it finish."""
        driver, kind = self.start(name), ""
        while self.done.total() < self.kills:
            if driver.poll() is not None:
                if driver.returncode == 0 or kind != "machine":
                    break
                driver, kind = self.start(name), ""  # it was at home on the machine that was killed
            if not workers():
                time.sleep(0.1)
                continue
            time.sleep(self.draw.uniform(0, SECONDS))
            if driver.poll() is not None:
                continue
            kind = min(KINDS, key=lambda kind: (self.done[kind], self.draw.random()))
            if not self.kill(kind, driver):
                continue
            self.done[kind] += 1
            stage = next((s for s in ("prepare", "synthesize") if not self.finished(name, s)), "evaluate")
            print(f"{name}: kill {self.done.total()}, {kind} in {stage}", flush=True)
            if kind == "driver":
                driver.wait()
                assert not self.outlived(), "workers outlived their driver"
                driver = self.start(name)
        if driver.wait(STALLED) and (kind != "machine" or self.start(name).wait(STALLED)):
            raise SystemExit(f"{name}: a run failed by itself")

    def kill(self, kind: str, driver: subprocess.Popen[bytes]) -> bool:
        if kind == "driver":
            driver.kill()
        elif kind == "machine":
            node = self.draw.choice(self.nodes)
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes[self.nodes.index(node)] = self.new_node()
        else:
            here = workers()
            if not here:
                return False
            self.draw.choice(here).kill()
        return True

    def start(self, name: str) -> subprocess.Popen[bytes]:
        cluster = ["--ray", self.cluster.address, f"run.cluster.workers={self.count}"]
        return subprocess.Popen([*command(self.recipe, name), *cluster])

    def finished(self, name: str, stage: str) -> bool:
        return (self.runs / name / stage / "manifest.json").exists()

    def outlived(self) -> bool:
        """Whether workers are still there some time after their driver is gone."""
        end = time.monotonic() + LEFT
        while workers() and time.monotonic() < end:
            time.sleep(0.5)
        return bool(workers())


def shards(run: Path) -> dict[str, Any]:
    return {path.name: file_sha256(path) for path in (run / "prepare").rglob("*.bin")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = written_recipe(Path(folder))
        raise SystemExit(1 if Killing(recipe, given.kills, given.seed, given.workers).compare() else 0)
