"""Each benchmark's dry run, on a machine that has torch and transformers only: its file holds what is promised."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
BARE = """
import builtins, runpy, sys
for name in ("pydantic", "pyarrow", "zstandard", "jinja2", "matplotlib", "openvino", "datasets", "accelerate"):
    sys.modules[name] = None  # as if not installed
allowed = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "safetensors", "tokenizers", "triton", "fastdraft"}
allowed |= {"machine", "pair", "stepping"}
known = builtins.__import__

def bare(name, globals=None, locals=None, fromlist=(), level=0):
    # What transformers itself needs is there (yaml, filelock, httpx), but not for us to lean on.
    file = ((globals or {}).get("__file__") or "").replace(chr(92), "/")
    ours = "/benchmarks/" in file or "/src/fastdraft/" in file
    if ours and level == 0 and name.partition(".")[0] not in allowed:
        raise ImportError(f"a bare machine has no {name}, which {file} imports")
    return known(name, globals, locals, fromlist, level)

builtins.__import__ = bare
run_name, sys.argv = sys.argv[1], sys.argv[2:]
for path in sys.argv if run_name != "__main__" else sys.argv[:1]:
    runpy.run_path(path, run_name=run_name)
"""
FORM = {"schema", "benchmark", "date", "command", "dry_run", "machine", "settings", "complete", "results"}
PROMISED = {
    "loss_functions": {
        "vocabulary",
        "contender",
        "peak_bytes",
        "seconds",
        "times_faster_than_plain",
        "gradient_difference",
    },
    "decoder_against_assisted": {
        "contender",
        "temperature",
        "rounds",
        "tokens_per_second",
        "times_faster_than",
        "prompts",
    },
    "replay_against_exact": {
        "temperature",
        "block_efficiency_exact",
        "block_efficiency_replay",
        "replay_seconds",
        "times_faster",
    },
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def dry_run(name: str, folder: Path) -> dict[str, Any]:
    output = folder / f"{name}.json"
    command = [
        sys.executable,
        "-c",
        BARE,
        "__main__",
        str(FOLDER / f"{name}.py"),
        "--dry-run",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_dry_run_on_a_bare_machine_writes_what_is_promised(name: str, tmp_path: Path) -> None:
    found = dry_run(name, tmp_path)
    assert set(found) >= FORM
    assert (found["schema"], found["benchmark"], found["dry_run"], found["complete"]) == (1, name, True, True)
    assert found["results"]
    assert all(set(result) >= PROMISED[name] for result in found["results"])
    assert found["command"].startswith(f"python benchmarks/{name}.py --dry-run")
    assert str(tmp_path) not in json.dumps(found)


def test_the_slow_scripts_of_a_bare_machine_lean_on_torch_and_transformers_alone(tmp_path: Path) -> None:
    """Those whose dry run takes too long for this file: what they import, and what is imported when a step is taken."""
    step = tmp_path / "benchmarks" / "step.py"
    step.parent.mkdir()
    step.write_text(
        "import torch\n"
        "from stepping.contenders import Setting, our_step\n"
        "from stepping.shapes import SHAPES\n"
        "for name in ('ours', 'ours_modules'):\n"
        "    _, step, batches = our_step(Setting(name, SHAPES['tiny'], torch.device('cpu'), 64, 1))\n"
        "    step.gradients(batches)\n"
        "    step.update(1.0)\n"
        "import yaml\n",
        encoding="utf-8",
    )
    scripts = [str(FOLDER / f"{name}.py") for name in ("on_a_gpu", "step_memory", "train_step")]
    command = [sys.executable, "-c", BARE, "imported", *scripts, str(step)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: a bare machine has no yaml"), done.stderr[
        -2000:
    ]  # and nothing before it


def test_losses_are_followed_step_by_step_and_stand_as_far_as_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    follow = importlib.import_module("stepping.follow")
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(follow, "EVERY", 2)
    follow.follow(
        "tiny", torch.device("cpu"), 3, 64, lambda found: kept.append(json.loads(json.dumps(found)))
    )
    assert [(found["steps"], found["steps_wanted"]) for found in kept] == [(2, 3), (3, 3)]
    assert {len(losses) for losses in kept[0]["losses"].values()} == {2}
    assert kept[-1]["within_noise"]
    assert kept[-1]["bf16_noise"]["mean"] > 0


def test_a_device_that_is_further_from_the_cpu_than_twice_the_noise_does_not_follow_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    compare = importlib.import_module("stepping.follow").compare
    losses = {"cpu_fp32": [2.0, 1.0], "cpu_bf16": [2.01, 0.99], "device_bf16": [1.985, 1.015]}
    assert compare(losses)["within_noise"]
    assert not compare({**losses, "device_bf16": [2.0, 1.05]})["within_noise"]


def test_a_figure_that_becomes_better_known_takes_the_place_of_the_first(tmp_path: Path) -> None:
    report = load("machine").Report(tmp_path / "r.json", "x", "cpu", {})
    for value in (1, 2):
        for shape in ("a", "b"):
            report.put({"kind": "summary", "shape": shape, "value": value}, "kind", "shape")
    assert [(one["shape"], one["value"]) for one in report.results] == [("a", 2), ("b", 2)]


def test_committed_results_say_when_and_where_and_tell_no_folder() -> None:
    paths = sorted((FOLDER / "results").glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]), path.name
        assert found["machine"], path.name
        assert found["command"].startswith("python benchmarks/"), path.name
        assert not found.get("dry_run"), path.name
        assert not re.search(r'[" =](/|[A-Z]:\\\\)\w', text), path.name


def test_every_script_stands_in_the_list() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in FOLDER.glob("*.py") if f"{path.name}" not in text]
    assert not missing


def test_a_result_file_stands_after_every_figure(tmp_path: Path) -> None:
    machine = load("machine")
    report = machine.Report(
        tmp_path / "r.json", "x", "cpu", {"draft": str(tmp_path / "deep" / "draft"), "dry_run": True}
    )
    for count in range(3):
        found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        assert len(found["results"]) == count
        assert not found["complete"]
        report.add({"figure": count})
    report.finish(verdict="well")
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found["complete"]
    assert found["verdict"] == "well"
    assert found["settings"] == {"draft": "draft"}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_contenders_take_turns_and_ratios_are_of_one_turn() -> None:
    machine = load("machine")
    order: list[str] = []
    seconds = machine.take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    # A machine twice as slow in the second turn slows both: the ratio is the same.
    assert machine.ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_a_command_line_loses_what_lies_outside_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = load("machine")
    argv = [
        str(FOLDER / "x.py"),
        "--draft",
        str(tmp_path / "secret" / "draft"),
        f"--out={ROOT / 'runs' / 'a'}",
        "--k",
        "3",
        "-7",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert machine.command() == "python benchmarks/x.py --draft draft --out=runs/a --k 3 -7"


def test_peak_memory_counts_what_stands_at_once() -> None:
    import torch

    losses = load("loss_functions")
    size = 4 * 1_000_000

    def work() -> None:
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert losses.peak_bytes(work, torch.device("cpu")) == pytest.approx(2 * size, rel=0.01)


def test_the_gpu_script_says_that_there_is_no_gpu() -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "on_a_gpu.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sees no accelerator" in done.stderr


def test_the_gpu_script_asks_only_for_options_that_its_scripts_have() -> None:
    for job in load("on_a_gpu").JOBS:
        text = job.path.read_text(encoding="utf-8") + (FOLDER / "machine.py").read_text(encoding="utf-8")
        text += (FOLDER / "pair.py").read_text(encoding="utf-8")
        unknown = [option for option in job.options if option.startswith("--") and f'"{option}"' not in text]
        assert not unknown, job.name


def test_one_command_runs_the_scripts_and_gathers_their_files(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(FOLDER / "on_a_gpu.py"),
        "--dry-run",
        "--only",
        "loss_functions",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    gathered = json.loads((tmp_path / "on_a_gpu_dry_run.json").read_text(encoding="utf-8"))
    assert [(result["name"], result["exit"], result["file"]) for result in gathered["results"]] == [
        ("loss_functions", 0, "loss_functions_dry_run.json")
    ]
    assert json.loads((tmp_path / "loss_functions_dry_run.json").read_text(encoding="utf-8"))["complete"]


def test_the_profile_of_a_step_names_its_operators_and_their_shares(tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    command = [
        sys.executable,
        str(FOLDER / "train_step.py"),
        "--dry-run",
        "--operators",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (profile,) = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert any("mm" in row["operator"] for row in profile["operators"])
    assert 0.9 < sum(row["share"] for row in profile["operators"]) < 1.01
