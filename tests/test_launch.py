"""`--nproc-per-node`: real workers under torch's launcher, one of them killed, one run stopped; and wrong arguments."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.cli import build_parser, main
from fastdraft.commands.launch import Machines, run
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, Interrupted, RecipeError
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.run_folder import StageFolder
from fastdraft.training.metrics import read_metrics

TWO = Machines(nproc_per_node=2)
TRAINING = {
    "batch_tokens": 256,
    "precision": "fp32",
    "optimizer": {"kind": "adamw", "learning_rate": 0.003},
    "checkpoint_every": 5,
}


@pytest.fixture(scope="module")
def recipe(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Pretrain and align, done by this process; all before them lies in `two` as well."""
    folder = tmp_path_factory.mktemp("launch")
    left_out = dict.fromkeys(("continue_pretrain", "evaluate", "export", "report"))
    path = write_recipe(
        folder,
        tiny_target,
        pretrain={"tokens": 256 * 50, "mixture": {"text": 1}, **TRAINING},
        align={"tokens": "40k", **TRAINING},
        **left_out,
    )
    recipe = load_recipe(str(path))
    pipeline.run(recipe, only=["design", "prepare", "synthesize"])
    shutil.copytree(recipe.run.root, recipe.run.root.with_name("two"))
    pipeline.run(recipe, only=["pretrain", "align"])
    return recipe


@pytest.fixture
def two(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": "two"})})


def meanwhile(when: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    def work() -> None:
        end = time.monotonic() + 200
        while not when() and time.monotonic() < end:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def kill_a_worker() -> None:
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if "fastdraft.commands.worker" in child.cmdline()
    ]
    next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder) if "loss" in record]


def worst_difference(recipe: Recipe, two: Recipe, stage: str) -> float:
    alone, together = (steps(which.run.root / stage) for which in (recipe, two))
    assert [r["step"] for r in alone] == [r["step"] for r in together] == list(range(1, len(alone) + 1))
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(alone, together, strict=True))


def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_it_had_lived(
    recipe: Recipe, two: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = two.run.root / "pretrain"
    killer = meanwhile(lambda: len(steps(folder)) >= 10, kill_a_worker)
    run(two, Console(quiet=True), TWO, only=["pretrain"], redo=[])
    killer.join()
    assert "a process was lost; all go on from the last checkpoint (restart 1 of 3)" in capfd.readouterr().err
    assert worst_difference(recipe, two, "pretrain") < 1e-5
    manifest = StageFolder(folder).manifest()
    assert (manifest["processes"], manifest["steps"]) == (2, 50)
    assert not (folder / "steps").exists()


def test_a_stop_saves_in_all_processes_and_one_process_goes_on_from_there(
    recipe: Recipe, two: Recipe
) -> None:
    folder, console = two.run.root / "align", Console(quiet=True)
    shutil.rmtree(two.run.root / "pretrain", ignore_errors=True)
    shutil.copytree(
        recipe.run.root / "pretrain", two.run.root / "pretrain"
    )  # both begin with the very same weights
    meanwhile(lambda: len(steps(folder)) >= 3, lambda: setattr(console.stop, "requested", True))
    with pytest.raises(Interrupted):
        run(two, console, TWO, only=["align"], redo=[])
    done = len(steps(folder))
    assert max(int(path.name.removeprefix("step-")) for path in folder.glob("steps/step-*")) == done
    assert 3 <= done < len(steps(recipe.run.root / "align"))
    pipeline.run(two, only=["align"])
    assert worst_difference(recipe, two, "align") < 1e-5


def test_arguments_that_contradict_each_other_are_refused(two: Recipe) -> None:
    with pytest.raises(FastDraftError, match="--node-rank: 2: must be 0 to 1"):
        Machines(8, 2, node_rank=2).check()
    with pytest.raises(FastDraftError, match="--master-addr: missing"):
        Machines(8, 2, node_rank=1).check()
    Machines(8, 2, node_rank=1, master_addr="first").check()
    Machines(8, 2, node_rank=1, master_addr="127.0.0.1").check()  # two "machines" on one host


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("fastdraft.modeling.pick_device", torch.device)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    TWO.check_devices("cuda")
    TWO.check_devices("cpu")
    with pytest.raises(RecipeError, match=r"4 cuda device.*--nproc-per-node 8 needs as many"):
        Machines(nproc_per_node=8).check_devices("cuda")
    with pytest.raises(RecipeError, match=r"set run.device=cuda"):
        TWO.check_devices("cuda:1")


def test_the_help_teaches_two_machines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", "--help"])
    text = capsys.readouterr().out
    assert "--nproc-per-node 8 --nnodes 2 --master-addr HOST \\\n" in text
    assert "      --node-rank 1\n" in text


def test_stages_that_work_in_one_process_take_no_machines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["synthesize", "demo", "--nproc-per-node", "2"])
    assert "--nproc-per-node" in capsys.readouterr().err
