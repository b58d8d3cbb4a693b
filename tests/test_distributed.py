"""Many processes against one: the same losses, the same data, the same end, whatever happens to one of
them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import two_processes
from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.errors import RecipeError
from fastdraft.recipe.recipe import load_recipe
from fastdraft.training.distributed import World, join, own_device
from fastdraft.training.metrics import read_metrics

HERE = Path(__file__).parent
SAME = 1e-5


def torchrun(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Everything in tests/two_processes.py, done once under torchrun."""
    folder = tmp_path_factory.mktemp("together")
    torchrun(str(HERE / "two_processes.py"), str(folder))
    return folder, [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in this one process."""
    folder = tmp_path_factory.mktemp("alone")
    two_processes.packed_run(folder / "packed", World()).run()
    two_processes.trainer(folder / "aligned", World(), two_processes.aligned(World())).run()
    return folder


def worst_difference(first: Path, second: Path) -> float:
    """The largest difference of loss or gradient norm at any step; both records must have each step once."""
    records = [[record for record in read_metrics(folder) if "loss" in record] for folder in (first, second)]
    steps = list(range(1, two_processes.STEPS + 1))
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]] == steps
    assert [r["tokens"] for r in records[0]] == [r["tokens"] for r in records[1]]
    assert records[0][0]["loss"] - records[0][-1]["loss"] > 0.01  # the weights did move
    pairs = [(a[key], b[key]) for a, b in zip(*records, strict=True) for key in ("loss", "grad_norm")]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("name", ["packed", "aligned"])
def test_two_processes_train_as_one_does_to_1e_5_over_50_steps(together: Any, alone: Path, name: str) -> None:
    assert worst_difference(alone / name, together[0] / name) < SAME


def test_two_then_one_then_two_processes_see_the_same_data_in_the_same_order(
    together: Any, alone: Path
) -> None:
    folder, seen = together
    first, second = (process["stops"] for process in seen)
    assert first[0].startswith("Interrupted")
    assert first[2].startswith("Interrupted")
    assert first[:2] == second[:2] == [first[0], "15"]  # both stopped, at one step
    assert (first[3], first[4], second[2]) == ("30", "50", "50")
    assert worst_difference(alone / "packed", folder / "stops") < SAME


def test_only_the_first_process_validates_and_all_know_the_best_step(together: Any, alone: Path) -> None:
    folder, seen = together
    validations = [record for record in read_metrics(folder / "packed") if "process" in record]
    assert [record["process"] for record in validations] == [0] * 5
    assert seen[0]["best"] == seen[1]["best"] > 0


def test_the_checkpoint_of_two_processes_holds_the_weights_of_one(together: Any, alone: Path) -> None:
    path = "packed/steps/step-000000050/model.safetensors"
    first, second = load_file(alone / path), load_file(together[0] / path)
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < SAME


def test_a_bad_number_in_one_process_leaves_the_step_out_in_all(together: Any) -> None:
    folder, seen = together
    assert [process["skipped"] for process in seen] == [1, 1]
    assert len([record for record in read_metrics(folder / "bad") if record.get("skipped")]) == 1


def test_what_one_process_cannot_read_or_write_is_the_error_of_all(together: Any) -> None:
    _, seen = together
    assert {process["unread"] for process in seen} == {"DataError: shard 7: damaged"}
    assert {process["written"] for process in seen} == {"FastDraftError: x: no space left; free some"}
    assert seen[0]["told"] == seen[1]["told"] == {"score": 1.5, "none": None}


def test_a_run_goes_through_its_stages_under_torchrun_and_trains_as_one_process_does(
    tmp_path: Path, tiny_target: Path
) -> None:
    training = {"tokens": 512 * 10, "batch_tokens": 512, "optimizer": {"learning_rate": 0.003}}
    left_out = ("synthesize", "align", "evaluate", "export", "report")
    path = write_recipe(
        tmp_path,
        tiny_target,
        pretrain={**training, "mixture": {"text": 1}},
        continue_pretrain={**training, "mixture": {"code": 1, "text": 1}},
        **dict.fromkeys(left_out),
    )
    torchrun("-m", "fastdraft", "run", str(path), "run.name=two")
    run = pipeline.run(load_recipe(str(path)))
    for stage in ("pretrain", "continue_pretrain"):
        one, two = run.folder(stage).path, run.root.with_name("two") / stage
        assert json.loads((two / "manifest.json").read_text())["processes"] == 2
        losses = [
            [record["loss"] for record in read_metrics(folder) if "loss" in record] for folder in (one, two)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=SAME)
        assert len(losses[0]) == 10


def test_without_torchrun_nothing_is_joined() -> None:
    with join(torch.device("cpu"), "pretrain") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.gather(3) == [3]
        assert world.on_main(lambda: 7) == 7


def test_each_process_takes_an_accelerator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: None)
    assert own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert own_device(torch.device("cuda")) == torch.device("cuda:3")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"set run\.device=cuda"):
        own_device(torch.device("cuda:1"))
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(RecipeError, match="there are 4"):
        own_device(torch.device("cuda"))
