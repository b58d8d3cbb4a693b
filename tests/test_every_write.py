"""A kill at any write: the run's folder is copied just before each file appears, and every copy is run to its end.

A copy is just what SIGKILL would have left there, half-written temporary files of the dead process included. Nothing is
random: all moments of every stage are tried, and each must end in the very files of the undisturbed run.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft import pipeline
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.training.metrics import Metrics, read_metrics

MEASURED = ("seconds", "provenance", "tokens_per_second", "generated_tokens_per_second")
"""Manifest fields that tell of the machine, not of the result."""
DEAD_PROCESS = 4_194_305


def recipe_in(path: Path, name: str) -> Recipe:
    return load_recipe(str(path), [f"run.name={name}"])


def copy_without(source: Path, folder: Path, stage: str) -> None:
    """The run as it was before `stage` began."""
    later = pipeline.downstream([stage])
    shutil.copytree(
        source, folder, ignore=lambda place, names: [n for n in names if Path(place) == source and n in later]
    )


def result(folder: Path) -> dict[str, Any]:
    """Everything in a stage's folder that does not tell of time: file name -> content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (
            path.is_dir()
            or path.name.endswith(".tmp")
            or ".tmp/" in name
            or name in ("latency.json", "README.md")
        ):
            continue
        if path.name == "metrics.jsonl":
            found[name] = [
                {key: value for key, value in record.items() if key not in MEASURED}
                for record in read_metrics(folder)
            ]
        elif path.name in ("manifest.json", "results.json"):
            found[name] = without_measures(json.loads(path.read_text(encoding="utf-8")))
        else:
            found[name] = path.read_bytes()
    return found


def without_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: without_measures(v)
            for k, v in value.items()
            if k not in MEASURED and "latency" not in k and k != "predicted_speedup"
        }
    return [without_measures(item) for item in value] if isinstance(value, list) else value


def copy_at_every_write(monkeypatch: pytest.MonkeyPatch, run: Path, copies: Path) -> None:
    """Copies the run before each rename into it and before each line of metrics."""

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            shutil.copytree(run, copies / f"kill-{len(list(copies.iterdir())):03}")
            return real(*arguments, **named)

        return call

    copies.mkdir()
    monkeypatch.setattr(os, "getpid", lambda: DEAD_PROCESS)
    monkeypatch.setattr(os, "replace", before(os.replace))
    monkeypatch.setattr(Metrics, "write", before(Metrics.write))


@pytest.mark.parametrize(
    "stage", ["design", "prepare", "pretrain", "synthesize", "align", "evaluate", "export"]
)
def test_a_stage_killed_at_any_write_ends_in_the_same_files(
    short_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    runs, copies = short_run.parent / "runs", tmp_path / "copies"
    wanted, name = result(runs / "tiny" / stage), f"watched-{stage}"
    copy_without(runs / "tiny", runs / name, stage)
    with monkeypatch.context() as patch:
        copy_at_every_write(patch, runs / name, copies)
        pipeline.run(recipe_in(short_run, name), only=[stage])
    assert result(runs / name / stage) == wanted
    killed = sorted(copies.iterdir())
    assert len(killed) >= 3
    for number, copy in enumerate(killed):
        again = runs / f"{name}-{number}"
        shutil.move(copy, again)
        pipeline.run(recipe_in(short_run, again.name), only=[stage])
        assert differing(result(again / stage), wanted) == [], f"killed before write {number}"
        shutil.rmtree(again)


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
