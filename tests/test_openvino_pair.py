"""The rules by which OpenVINO takes a draft for a target: each refused before loading, with both values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import write_target
from fastdraft import cli
from fastdraft.commands import check
from fastdraft.console import Console
from fastdraft.errors import MissingExtra, TargetError
from fastdraft.recipe.recipe import load_recipe
from fastdraft.runtimes import engines
from fastdraft.runtimes.openvino_pair import SENTENCE, check_pair


@pytest.fixture
def draft(tiny_draft: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil; without weights, for the rules need none."""
    folder = tmp_path / "draft"
    shutil.copytree(tiny_draft, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


def test_a_pair_that_fits_is_taken_without_its_weights(tiny_target: Path, draft: Path) -> None:
    check_pair(tiny_target, draft)


def test_another_vocabulary_size_is_refused(tiny_target: Path, draft: Path) -> None:
    change(draft / "config.json", vocab_size=384)
    with pytest.raises(TargetError, match=r"draft 384, target 320.*vocab_size"):
        check_pair(tiny_target, draft)


def test_a_shorter_context_of_the_draft_is_refused_and_a_longer_one_taken(
    tiny_target: Path, draft: Path
) -> None:
    change(draft / "config.json", max_position_embeddings=512)
    check_pair(tiny_target, draft)
    change(draft / "config.json", max_position_embeddings=128)
    with pytest.raises(TargetError, match=r"draft 128, target 256.*context"):
        check_pair(tiny_target, draft)


@pytest.mark.parametrize(
    ("token", "values"),
    [
        ("bos_token", "draft 1, target 0"),
        ("eos_token", "draft 1, target 3"),
        ("pad_token", "draft 1, target 0"),
    ],
)
def test_another_special_id_is_refused(tiny_target: Path, draft: Path, token: str, values: str) -> None:
    change(draft / "tokenizer_config.json", **{token: "<|user|>"})
    with pytest.raises(TargetError, match=f"{values}.*{token}_id"):
        check_pair(tiny_target, draft)


def test_a_tokenizer_that_splits_otherwise_is_refused(tiny_target: Path, draft: Path) -> None:
    state = json.loads((draft / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["merges"] = []
    (draft / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(TargetError, match="must encode 'Could you"):
        check_pair(tiny_target, draft)
    assert SENTENCE.startswith("Could you")


def test_the_command_line_refuses_a_target_that_is_no_export(
    tmp_path: Path, tiny_draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_target(tmp_path / "target")
    capsys.readouterr()
    assert (
        cli.main(["export", str(tiny_draft), "--format", "openvino", "--target", str(tmp_path / "target")])
        == 2
    )
    error = capsys.readouterr().err
    assert "openvino" in error
    assert len(error.strip().splitlines()) == 1


def test_check_says_which_library_is_missing_before_anything_runs(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(tiny_recipe), ["synthesize.engine={kind: openvino}"])
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "nncf" else True)
    with pytest.raises(MissingExtra, match=r"nncf: not installed.*fastdraft\[openvino\]"):
        check.run(recipe, Console(quiet=True))
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "optimum.intel" else True)
    with pytest.raises(MissingExtra, match="--no-deps optimum-intel"):
        check.run(recipe, Console(quiet=True))


def test_an_error_about_a_missing_library_survives_a_pickle() -> None:
    error = MissingExtra("optimum-intel", "openvino", "pip install it")
    kind, arguments = error.__reduce__()
    assert str(kind(*arguments)) == str(error)
