"""Jobs by workers: in this process, and by Ray where it is installed."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from conftest import write_recipe
from fastdraft import cli, ray_workers
from fastdraft.errors import MissingExtra
from fastdraft.recipe.recipe import load_recipe


def test_without_the_extra_a_cluster_is_refused_in_one_line_before_anything_runs(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_workers, "find_spec", lambda name: None)
    recipe = write_recipe(tmp_path, tiny_target)
    assert cli.main(["run", str(recipe), "--ray", "auto", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "fastdraft: ray is not installed; this needs the extra 'ray'; pip install 'fastdraft[ray]'"
    )
    assert not (tmp_path / "runs").exists()


def test_a_missing_extra_is_the_same_error_on_another_machine() -> None:
    found = MissingExtra("ray", "ray")
    assert str(type(found)(*found.args)) == str(found)


@pytest.mark.parametrize(
    ("arguments", "cluster"),
    [([], None), (["run.cluster.kind=ray", "run.cluster.address='10.0.0.1:6379'"], "10.0.0.1:6379")],
)
def test_a_cluster_is_no_part_of_a_recipe_that_names_none(arguments: list[str], cluster: str | None) -> None:
    found = load_recipe("starter", arguments)
    assert (found.run.cluster and found.run.cluster.address) == cluster
    assert ("cluster" in found.dump()) == bool(cluster)


@pytest.mark.parametrize("answers", [False, True])
def test_a_cluster_that_does_not_answer_is_told_in_one_line(
    tmp_path: Path,
    tiny_target: Path,
    answers: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_workers, "REACHED_SECONDS", 3.0)
    recipe, begun = write_recipe(tmp_path, tiny_target), time.monotonic()
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if answers:  # something, but no cluster
            port.listen()
        address = f"127.0.0.1:{port.getsockname()[1]}"
        assert cli.main(["run", str(recipe), "--ray", address, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastdraft: run.cluster.address: {address}: no answer within 3 s; a Ray cluster")
    assert time.monotonic() - begun < 30
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
