"""Kills a run with SIGKILL at random moments, reruns it, and compares the result with an undisturbed run.

    python tests/kill_and_resume.py --kills 20
    python tests/kill_and_resume.py --kills 12 --openvino

Decides pass or fail by content: final weights bit for bit equal, synthetic rows equal, evaluation counts equal. With
--openvino the target writes through OpenVINO, the pair is exported for it and its wall clock is measured: then the rows of
benchmark.json must be equal in everything but times too, none lost or doubled. The same function, with few kills and
without OpenVINO, is a test in test_pipeline.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from conftest import write_recipe, write_target

TIMES = ("second", "speedup", "quotient")
"""Parts of the names of what a clock decides in a row of benchmark.json."""
OPENVINO = {
    "export": {"formats": ["huggingface", "openvino"], "openvino": {"target": "int8"}, "num_speculative_tokens": 3},
    # One K: which of several is the best, and so is swept, is for the clock to say.
    "benchmark": {
        "weights": [{"target": "int8", "draft": "int8"}, {"target": "int8", "draft": "fp16"}],
        "prompts": 2,
        "num_speculative_tokens": [2],
        "sweep": {"prompt_tokens": [16], "max_new_tokens": [8, 16], "concurrency": [1, 2]},
        "repeats": 2,
    },
}
"""Sections of the tiny recipe with --openvino."""
COMPARED = ("design/draft", "pretrain/checkpoint", "continue_pretrain/checkpoint", "align/checkpoint", "export/huggingface")


def command(recipe: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "fastdraft", "run", str(recipe), f"run.name={name}", "--quiet"]


def written_recipe(folder: Path, openvino: bool) -> Path:
    """The tiny recipe, on transformers alone or through OpenVINO and its benchmark."""
    target = write_target(folder / "target")
    recipe = write_recipe(folder, target, **(OPENVINO if openvino else {}))
    if openvino:
        value = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        value["synthesize"]["engine"] = {"kind": "openvino"}
        recipe.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return recipe


def kill_and_resume(folder: Path, kills: int, seed: int = 0, say: bool = False, openvino: bool = False) -> list[str]:
    """Returns what differs between a run killed `kills` times and an undisturbed one; an empty list is a pass."""
    recipe = written_recipe(folder, openvino)
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
    subprocess.run(arguments, check=True, timeout=1800)
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
    """What of weights, synthetic rows, counts and measured rows is not equal."""
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
    measured = [benchmark_rows(run) for run in (one, two)]
    if measured[0] != measured[1]:
        found.append(f"benchmark rows ({len(measured[0])} and {len(measured[1])})")
    if len(set(measured[1])) != len(measured[1]):
        found.append("doubled benchmark rows")
    if list(two.rglob("converted")):
        found.append("the converted target was left behind")
    return found


def benchmark_rows(run: Path) -> list[str]:
    """The measured rows without what a clock decides, in the order written; none where nothing was measured."""
    path = run / "benchmark" / "benchmark.json"
    if not path.is_file():
        return []
    measured = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [json.dumps({k: v for k, v in row.items() if not any(part in k for part in TIMES)}, sort_keys=True) for row in measured]


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
    parser.add_argument("--openvino", action="store_true", help="synthesize, export and benchmark through OpenVINO")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), arguments.kills, arguments.seed, say=True, openvino=arguments.openvino)
    measured = ", measured rows but for their times" if arguments.openvino else ""
    print("differs: " + "; ".join(found) if found else f"equal: weights bit for bit, rows, counts{measured}")
    sys.exit(bool(found))
