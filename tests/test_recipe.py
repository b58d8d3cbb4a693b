"""Recipes: shipped ones load, overrides are validated, cross-checks speak in one line, torch stays out."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastdraft.errors import RecipeError
from fastdraft.recipe.base import Config, models
from fastdraft.recipe.recipe import Recipe, apply_override, find_recipe, load_recipe, shipped_recipes

MINIMAL = {"run": {"name": "t"}, "target": {"model": "somewhere"}}


def write(path: Path, value: object) -> str:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return str(path)


def test_a_shipped_recipe_is_found_by_name_and_as_if_in_a_folder() -> None:
    assert find_recipe("demo") == find_recipe("recipes/demo.yaml") == shipped_recipes()["demo"]


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml.*shipped ones: .*demo"):
        find_recipe("nowhere.yaml")


def test_a_section_present_means_that_its_stage_runs(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", {**MINIMAL, "report": {}}))
    assert list(recipe.sections()) == ["report"]


def test_overrides_reach_nested_keys_and_list_items() -> None:
    recipe = load_recipe("starter", ["pretrain.tokens=3M", "prepare.corpora[0].tokens=1M", "run.seed=7"])
    assert recipe.pretrain is not None
    assert recipe.prepare is not None
    assert (recipe.pretrain.tokens, recipe.prepare.corpora[0].tokens, recipe.run.seed) == (
        3 * 10**6,
        10**6,
        7,
    )


def test_the_resolved_recipe_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    (tmp_path / "resolved.yaml").write_text(recipe.dump(), encoding="utf-8")
    assert load_recipe(str(tmp_path / "resolved.yaml")).model_dump() == recipe.model_dump()


def test_an_override_may_open_a_section() -> None:
    value = {"run": {"name": "x"}}
    apply_override(value, "export.formats=[openvino]")  # type: ignore[arg-type]
    assert value["export"] == {"formats": ["openvino"]}


def test_no_section_has_more_than_fourteen_keys_and_every_key_is_documented() -> None:
    seen: set[type[Config]] = set()
    todo: list[type[Config]] = [Recipe]
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        assert len(cls.model_fields) <= 14, cls
        for name, field in cls.model_fields.items():
            assert field.description or name == "kind", f"{cls.__name__}.{name} has no docstring"
            todo.extend(model for model in models(field.annotation) if issubclass(model, Config))


@pytest.mark.parametrize("module", ["fastdraft", "fastdraft.cli", "fastdraft.recipe.recipe"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_in_the_place_of_a_recipe_points_to_the_recipe_inside(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("run: {name: x}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"give .*recipe\.yaml"):
        load_recipe(str(tmp_path))
