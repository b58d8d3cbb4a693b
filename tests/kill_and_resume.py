"""Kills a run with SIGKILL at random moments, reruns it, and compares the result with an undisturbed run.

    python tests/kill_and_resume.py --kills 20

Decides pass or fail by content: final weights bit for bit equal, synthetic rows equal, evaluation counts equal. The
same function, with few kills, is a test in test_pipeline.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_recipe, write_target

COMPARED = ("design/draft", "pretrain/checkpoint", "continue_pretrain/checkpoint", "align/checkpoint", "export/huggingface")


def command(recipe: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "fastdraft", "run", str(recipe), f"run.name={name}", "--quiet"]


def kill_and_resume(folder: Path, kills: int, seed: int = 0, say: bool = False) -> list[str]:
    """Returns what differs between a run killed `kills` times and an undisturbed one; an empty list is a pass."""
    recipe = write_recipe(folder, write_target(folder / "target"))
    total = _changes_until_end(subprocess.Popen(command(recipe, "undisturbed")), folder / "runs" / "undisturbed")
    if say:
        print(f"undisturbed run: {total} changes of its files seen")
    random_part = random.Random(seed)
    # A quarter of a run at most, so that many kills reach the last stages too; a run that ends early is followed by another.
    lives = iter(lambda: random_part.randint(1, max(2, 2 * total // (kills + 1), total // 4)), None)
    found: list[str] = []
    done = number = 0
    while done < kills:
        number += 1
        name = f"disturbed-{number}"
        done += _disturb(command(recipe, name), kills - done, lives, folder / "runs" / name, say)
        found += differences(folder / "runs" / "undisturbed", folder / "runs" / name)
    return found


def _disturb(arguments: list[str], kills: int, lives: Iterator[int], run: Path, say: bool) -> int:
    """Kills one run again and again until it is finished or `kills` are done, then lets it finish; returns the kills."""
    done = 0
    while done < kills:
        process, life = subprocess.Popen(arguments), next(lives)
        _changes_until_end(process, run, kill_at=life)
        if process.returncode == 0:
            break
        done += 1
        if say:
            stages = [p.name for p in run.iterdir() if (p / "manifest.json").exists()] if run.exists() else []
            print(f"{run.name}: killed at change {life}; {len(stages)} stages finished", flush=True)
    subprocess.run(arguments, check=True, timeout=600)
    return done


def _changes_until_end(process: subprocess.Popen[bytes], run: Path, kill_at: int = 0) -> int:
    """Watches a run's folder until the process ends, and kills it at a change of the files if asked to.

    Moments are counted in changes, not seconds: on a busy machine seconds would all be spent on imports.
    """
    changes, before = 0, _listing(run)
    while process.poll() is None:
        time.sleep(0.003)
        now = _listing(run)
        changes, before = changes + (now != before), now
        if kill_at and changes >= kill_at:
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
    """What of weights, synthetic rows and counts is not equal."""
    import json

    found = [
        f"{name}/model.safetensors"
        for name in COMPARED
        if (one / name / "model.safetensors").read_bytes() != (two / name / "model.safetensors").read_bytes()
    ]
    rows_one, rows_two = rows(one), rows(two)
    if rows_one != rows_two:
        found.append(f"synthetic rows ({len(rows_one)} and {len(rows_two)})")
    if len(set(rows_two)) != len(rows_two):
        found.append("doubled synthetic rows")
    results = [json.loads((run / "evaluate" / "results.json").read_text())["rows"] for run in (one, two)]
    counts = [[{k: v for k, v in row.items() if "latency" not in k and k != "predicted_speedup"} for row in result] for result in results]
    if counts[0] != counts[1]:
        found.append("evaluation counts")
    return found


def rows(run: Path) -> list[str]:
    """Ids of the synthetic rows in the order written."""
    from pyarrow import parquet

    return [
        row for path in sorted((run / "synthesize" / "units").glob("*.parquet")) for row in parquet.read_table(path)["row_id"].to_pylist()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), arguments.kills, arguments.seed, say=True)
    print("differs: " + "; ".join(found) if found else "equal: weights bit for bit, rows, counts")
    sys.exit(bool(found))
