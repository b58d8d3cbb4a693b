"""The pages of docs/ and the README against the repository: links, commands, files."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

from fastdraft.cli import app
from fastdraft.recipe.base import models as _models
from fastdraft.recipe.recipe import Recipe, load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)", re.MULTILINE)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(
    r"`((?:fastdraft |pytest |python3? -m pytest|(?:python3? )?(?:benchmarks/|tests/)?\w+\.py )[^`]*)`"
)
COMMAND = re.compile(r"(?:\.venv/bin/)?(?:fastdraft|pytest|python3? (?:-m pytest|benchmarks/|tests/|docs/))")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def blocks(text: str) -> Iterator[str]:
    """Fenced code, and code by indentation."""
    yield from FENCE.findall(text)
    yield from re.findall(r"(?:^ {4}.*\n)+", FENCE.sub("", text), re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of ours on a page, in words."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(text):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        while lines:
            line = lines.pop(0).strip()
            if not COMMAND.match(line):
                continue
            while True:
                try:
                    words = shlex.split(line, comments=True)
                    break
                except ValueError:  # a quotation goes on in the next line
                    line += lines.pop(0)
            yield words[: words.index("&&")] if "&&" in words else words
    for line in INLINE.findall(text):
        yield shlex.split(" ".join(line.split()))


def flags_of(script: Path) -> set[str]:
    """The options that a script takes, those of the modules beside it that it imports too."""
    text = script.read_text(encoding="utf-8")
    names = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)
    beside = [
        path
        for name in names
        if (path := (script.parent / name.replace(".", "/")).with_suffix(".py")).is_file()
    ]
    return set(re.findall(r'"(--[a-z][a-z-]*)"', text)).union(*map(flags_of, beside))


def refuse(words: list[str]) -> str:
    """Why a command of the pages cannot be given; empty for one that can."""
    if words[0].endswith("fastdraft"):
        return refuse_verb(words[1:])
    scripts = [word for word in words if word.endswith(".py")]
    files = [
        file
        for word in scripts
        if (file := next(filter(Path.is_file, (ROOT / word, ROOT / "benchmarks" / word)), None))
    ]
    if len(files) < len(scripts) or not files or "pytest" in words[:3]:
        return "no such script" if len(files) < len(scripts) else ""
    known = flags_of(files[0])
    return ", ".join(word for word in words if word.startswith("--") and word.partition("=")[0] not in known)


def refuse_verb(arguments: list[str]) -> str:
    """As `refuse`, of the command line; overrides are those of the recipe named, or of the starter."""
    if arguments[0].startswith("-"):
        return ""
    verb = typer.main.get_command(app).commands.get(arguments[0])
    if verb is None or len(arguments) == 1:  # a verb by its name alone
        return "" if verb else "no such verb"
    try:
        found = verb.make_context(arguments[0], arguments[1:]).params
    except typer.Exit:  # --help
        return ""
    except typer.TyperException as error:
        return f"arguments that the parser refuses: {error}"
    overrides = [word for word in found.get("overrides") or () if not word.startswith("run.name=")]
    if overrides:
        name = Path(found["recipe"]).stem
        load_recipe(name if name in shipped_recipes() else "starter", overrides)
    return ""


def is_key(dotted: str) -> bool:
    """Whether a recipe can have this key; of sections told apart by `kind`, any may have it."""
    models: list[type[BaseModel]] = [Recipe]
    for part in dotted.split("."):
        fields = [field for model in models for name, field in model.model_fields.items() if part == name]
        if not fields:
            return False
        models = [model for field in fields for model in _models(field.annotation)]
    return True


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent.name != "benchmarks" else "benchmarks"
)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = (page.parent / path) if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent.name != "benchmarks" else "benchmarks"
)
def test_every_command_of_a_page_can_be_given(page: Path) -> None:
    for words in commands(page):
        assert not (why := refuse(words)), f"{page.name}: {' '.join(words)}: {why}"


def test_every_key_of_a_recipe_that_a_page_names_exists() -> None:
    sections = "|".join(Recipe.model_fields)
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            for key in re.findall(rf"(?<![\w/.])((?:{sections})(?:\.[a-z_]+)+)(?![\w(/.])", code):
                assert key.endswith((".py", ".md", ".yaml", ".html", ".json")) or is_key(key), (
                    f"{page.name}: {key}"
                )


def test_every_file_of_figures_that_a_page_names_is_there() -> None:
    for page in PAGES:
        for name in re.findall(r"\b\w+_(?:cpu|gpu|cuda)\.json\b", page.read_text(encoding="utf-8")):
            assert (ROOT / "benchmarks/results" / name).is_file(), f"{page.name}: {name}"


def test_the_pages_do_give_commands() -> None:
    found = [words for page in PAGES for words in commands(page)]
    assert sum(words[0].endswith("fastdraft") for words in found) > 20
    assert sum(words[0].startswith("python") for words in found) > 10
    assert refuse(["fastdraft", "run", "demo", "--no-such-option"])
    assert refuse(["python", "benchmarks/train_step.py", "--no-such-option"])
    assert refuse(["fastdraft", "nothing"])
    assert is_key("synthesize.engine.servers")
    assert not is_key("synthesize.engine.no_such_key")


def test_the_examples_can_be_read_by_those_they_are_for() -> None:
    folder = ROOT / "examples"
    script, task = (
        folder / "many_machines.sbatch",
        yaml.safe_load((folder / "many_machines.sky.yaml").read_text()),
    )
    assert set(task) <= {"name", "num_nodes", "resources", "envs", "file_mounts", "workdir", "setup", "run"}
    for text in (script.read_text(encoding="utf-8"), task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        lines = re.sub(r"\\\n\s*", "", text).replace('"$recipe"', "starter").replace('"$RECIPE"', "starter")
        for words in re.findall(r"^\s*(?:on_head |srun --overlap )?(fastdraft .*)", lines, re.MULTILINE):
            assert not (why := refuse(shlex.split(words))), f"{words}: {why}"
