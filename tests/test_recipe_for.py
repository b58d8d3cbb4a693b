"""`recipes --for`: what the recipe holds, and how the hours are divided; speeds are given, not measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdraft import cli
from fastdraft.commands import recipe_for
from fastdraft.commands.expected import expected
from fastdraft.commands.recipe_for import Asked, Speeds, sections
from fastdraft.console import Console
from fastdraft.errors import RecipeError, TargetError
from fastdraft.recipe.base import load_config
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.recipe.training import PrunedDraft
from fastdraft.stages import design
from fastdraft.target import Target

SPEEDS = Speeds(writing=100.0, training=300.0, draft_share=0.05)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_for, "measure_speeds", lambda *arguments: SPEEDS)
    return tmp_path


def test_the_hours_are_divided_between_writing_and_training() -> None:
    assert SPEEDS.budgets(1.0) == (180_000, 540_000)


def test_training_stops_at_six_passes_over_what_was_written() -> None:
    assert Speeds(10.0, 3000.0, 0.05).budgets(1.0) == (18_000, 110_000)


def test_the_recipe_that_is_written_loads_and_begins_from_layers_of_the_writer(
    here: Path, tiny_target: Path, near_draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_for.run(Asked(str(tiny_target), 2.0, "mine", writer=str(near_draft)), Console())
    recipe = load_recipe(str(path))
    assert recipe.design
    assert isinstance(recipe.design.draft, PrunedDraft)
    assert recipe.design.draft.model == str(near_draft)
    assert recipe.synthesize
    assert (recipe.run.name, recipe.synthesize.tokens, recipe.synthesize.writer) == (
        "mine",
        360_000,
        str(near_draft),
    )
    assert "100 tokens/s written, 300 trained" in path.read_text().replace("\n# ", " ")
    assert "fastdraft run mine.yaml" in capsys.readouterr().err.replace("\n", " ")


def test_an_earlier_draft_is_re_aligned(here: Path, tiny_target: Path, tiny_draft: Path) -> None:
    value = sections(Asked(str(tiny_target), 0.5, start=str(tiny_draft)), "again")
    assert value["design"] == {"draft": {"kind": "from", "path": str(tiny_draft)}}


def test_a_re_aligned_draft_is_evaluated_as_it_began_and_as_it_became(
    here: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    (here / "held_out.jsonl").write_text('{"prompt": "x"}\n')
    (here / "mine.jsonl").write_text('{"prompt": "y"}\n')
    own = {"data": "mine.jsonl", "tasks": "held_out.jsonl, chat"}
    asked = Asked(str(tiny_target), 0.25, start=str(tiny_draft), **own)  # type: ignore[arg-type]
    value = sections(asked, "again")
    assert value["evaluate"]["checkpoints"] == ["design", "align"]
    file = {"kind": "file", "path": "held_out.jsonl", "chat": True, "prompts": 32}
    assert value["evaluate"]["tasks"] == [file, {"kind": "instructions", "prompts": 32}]
    assert [source["name"] for source in value["synthesize"]["prompts"]] == ["own", "instructions"]
    load_config(Recipe, value)


@pytest.mark.parametrize(
    ("tasks", "evaluated", "asked"),
    [
        ("code", ["code"], ["code"]),
        ("chat, summary", ["instructions", "summarization"], ["instructions"]),
        ("text,code", ["text", "code"], ["text", "code"]),
    ],
)
def test_tasks_choose_what_is_evaluated_and_what_the_target_is_asked(
    tiny_target: Path, tasks: str, evaluated: list[str], asked: list[str]
) -> None:
    value = sections(Asked(str(tiny_target), 1.0, tasks=tasks), "mine")
    assert [task["kind"] for task in value["evaluate"]["tasks"]] == evaluated
    assert [source["name"] for source in value["synthesize"]["prompts"]] == asked


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("poetry", "--tasks: poetry; must be one of code, chat, text, summary, or a JSONL file"),
        (" , ", "--tasks: ' , '; names no task"),
        ("mine.jsonl", "--tasks: 'mine.jsonl'; no prompts for the text to align on"),
    ],
)
def test_tasks_that_cannot_be_are_refused(here: Path, tiny_target: Path, tasks: str, message: str) -> None:
    (here / "mine.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(RecipeError, match=message):
        sections(Asked(str(tiny_target), 1.0, tasks=tasks), "mine")


def test_minutes_are_hours_said_otherwise(
    here: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes", "--for", str(tiny_target), "--name", "mine", "--minutes", "15"]) == 0
    recipe = load_recipe("mine.yaml")
    assert recipe.synthesize
    assert recipe.synthesize.tokens == SPEEDS.budgets(0.25)[0]
    assert cli.main(["recipes", "--for", "x", "--minutes", "15", "--hours", "1"]) == 2
    assert "--hours 1 and --minutes 15: one of the two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "range_"),
    [
        ([], (2.37, 3.05)),
        (["align.tokens=1200k"], (2.37, 3.05)),
        (["align.tokens=1100k"], None),
        (["pretrain.tokens=100M"], None),
        (["synthesize.tokens=100k"], None),
        (["design.draft={kind: from, path: x}"], None),
    ],
)
def test_acceptance_is_promised_only_within_four_times_of_an_experiment(
    overrides: list[str], range_: tuple[float, float] | None
) -> None:
    recipe, toy = load_recipe("starter", overrides), load_recipe("starter")
    assert toy.design
    found = expected(recipe, design.plan(toy.design, Target(recipe.target)))
    assert (found.low, found.high) == (range_ or (None, None))
    told = "2.4 to 3.0 tokens per target pass" if range_ else "no experiment is near"
    assert told in str(found)
    assert ("recipe starter (docs/results.md)" in str(found)) is bool(range_)


def test_own_prompts_come_first_and_must_be_there(here: Path, tiny_target: Path) -> None:
    (here / "mine.jsonl").write_text('{"prompt": "x"}\n')
    first = sections(Asked(str(tiny_target), 0.5, data="mine.jsonl"), "own")["synthesize"]["prompts"][0]
    assert first["path"] == "mine.jsonl"
    with pytest.raises(RecipeError, match="--data none: is not there"):
        sections(Asked(str(tiny_target), 0.5, data="none"), "own")


def test_a_recipe_that_is_there_is_not_written_over(here: Path, tiny_target: Path) -> None:
    (here / "mine.yaml").write_text("run: {}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: is there already"):
        recipe_for.run(Asked(str(tiny_target), 1.0, "mine"), Console(quiet=True))
    assert (here / "mine.yaml").read_text() == "run: {}\n"


def test_a_writer_of_another_vocabulary_is_refused_before_anything_is_measured(
    here: Path, tiny_target: Path
) -> None:
    with pytest.raises(TargetError, match=r"synthesize\.writer: draft 8192, target 320"):
        recipe_for.run(
            Asked(str(tiny_target), 1.0, "mine", writer="shipped:targets/starter"), Console(quiet=True)
        )
    assert not (here / "mine.yaml").exists()


def test_a_training_step_of_the_draft_s_shape_has_a_speed(tiny_target: Path) -> None:
    plan = design.plan(design.DesignConfig(draft={"kind": "pruned", "layers": 2}), Target.at(tiny_target))  # type: ignore[arg-type]
    assert recipe_for.training_speed(plan, recipe_for.AlignConfig()) > 0
