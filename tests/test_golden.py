"""What users rely on does not change unnoticed: help, resolved recipes, public names, the recipe reference.

A wanted change is written down with `UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py`, and shows in the
diff."""

import importlib.util
import os
from pathlib import Path

import pytest

import fastdraft
from fastdraft import cli
from fastdraft.recipe.recipe import load_recipe, shipped_recipes

GOLDEN = Path(__file__).parent / "golden"
DOCS = Path(__file__).parent.parent / "docs"


def compare(path: Path, text: str) -> None:
    """Equal to the file, or the file is written when that was asked for."""
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8", newline="\n")
    assert path.read_text(encoding="utf-8") == text, f"{path.name} differs: UPDATE_GOLDEN=1 writes it anew"


def test_the_help_is_as_written_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--help"]) == 0
    compare(GOLDEN / "help.txt", capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_resolved_recipe_is_as_written_down(name: str) -> None:
    compare(GOLDEN / f"{name}.resolved.yaml", load_recipe(name).dump())


def test_the_public_names_are_as_written_down() -> None:
    compare(GOLDEN / "public_names.txt", "\n".join(sorted(fastdraft.__all__)) + "\n")
    assert all(getattr(fastdraft, name) is not None for name in fastdraft.__all__)


def test_the_recipe_reference_in_the_docs_is_current() -> None:
    spec = importlib.util.spec_from_file_location(
        "generate_recipe_reference", DOCS / "generate_recipe_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compare(DOCS / "recipe.md", module.reference())
