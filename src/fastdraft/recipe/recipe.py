"""A recipe: one YAML file that holds every setting of a run.

Decides what sections a recipe has, how it is found (a path, or the name of a shipped one), how `key=value` overrides from
the command line enter, that a section present means that its stage runs, and what must hold between sections. A key given
twice is refused: YAML would keep the last in silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from fastdraft.errors import RecipeError
from fastdraft.recipe.base import Config, load_config, short
from fastdraft.recipe.data import PrepareConfig, SynthesizeConfig
from fastdraft.recipe.evaluation import BenchmarkConfig, EvaluateConfig, ExportConfig, ReportConfig
from fastdraft.recipe.run import RunConfig, TargetConfig, user_path
from fastdraft.recipe.training import AlignConfig, ContinuePretrainConfig, DesignConfig, PretrainConfig

SHIPPED_RECIPES = Path(__file__).parents[1] / "recipes"
LARGEST_RECIPE = 1 << 20
"""Bytes. A recipe has a few thousand: what is larger is another file."""


class Recipe(Config):
    """Everything a run depends on. A stage whose section is absent does not run."""

    run: RunConfig
    """Name, folder, seed, device."""
    target: TargetConfig
    """The model that the draft is made for."""
    design: DesignConfig | None = Field(default=None)
    """Target -> draft architecture and first weights."""
    prepare: PrepareConfig | None = Field(default=None)
    """Corpora -> tokenised, packed shards."""
    pretrain: PretrainConfig | None = Field(default=None)
    """Text shards -> a language model."""
    continue_pretrain: ContinuePretrainConfig | None = Field(default=None)
    """The same on a mixture of code and text."""
    synthesize: SynthesizeConfig | None = Field(default=None)
    """Prompts -> responses that the target writes."""
    align: AlignConfig | None = Field(default=None)
    """Fine-tuning of the draft on what the target wrote."""
    evaluate: EvaluateConfig | None = Field(default=None)
    """Draft x target x tasks x K x temperature -> counts."""
    export: ExportConfig | None = Field(default=None)
    """The draft as runtimes load it."""
    benchmark: BenchmarkConfig | None = Field(default=None)
    """The exported pair on this device's clock, beside the prediction."""
    report: ReportConfig | None = Field(default=None)
    """One page about the run."""

    @model_validator(mode="after")
    def _corpora_are_prepared(self) -> Recipe:
        """Every corpus that a section names must be one of `prepare.corpora`."""
        prepared = sorted({corpus.name for corpus in self.prepare.corpora}) if self.prepare else []
        named = [
            (f"synthesize.prompts[{number}].corpus", prompts.corpus)
            for number, prompts in enumerate(self.synthesize.prompts if self.synthesize else ())
            if prompts.kind == "corpus"
        ]
        for stage in ("pretrain", "continue_pretrain"):
            section = getattr(self, stage)
            named += (
                [(f"{stage}.mixture", name) for name in section.mixture] if section and self.prepare else []
            )
        for key, name in named:
            if name not in prepared:
                rule = f"must be one of prepare.corpora ({', '.join(prepared) or 'there are none'})"
                raise RecipeError(key, name, rule, "correct the name, or prepare that corpus")
        return self

    @model_validator(mode="after")
    def _logits_are_stored(self) -> Recipe:
        """What align is to read, synthesize must write."""
        objective = self.align.objective if self.align else None
        if objective and objective.kind == "token_kd" and objective.source == "stored" and self.synthesize:
            kind = self.synthesize.logits.kind
            if kind != "top_k":
                rule = f"needs the target's logits, but synthesize.logits is {kind}"
                raise RecipeError(
                    "align.objective.source",
                    "stored",
                    rule,
                    "set synthesize.logits: {kind: top_k}, or source: target",
                )
        return self

    @model_validator(mode="after")
    def _texts_have_an_engine(self) -> Recipe:
        """`evaluate.texts: engine` means the engine that wrote for synthesize, or one that the recipe names."""
        if self.evaluate and self.evaluate.texts.kind == "engine":
            if not self.synthesize:
                rule = "means synthesize.engine, but there is no such section"
                raise RecipeError(
                    "evaluate.texts", "engine", rule, "add `synthesize:`, or set another kind of texts"
                )
            if not self.synthesize.asks and self.synthesize.engine.kind == "auto":
                rule = "synthesize takes logs and asks no engine, so that none is settled"
                raise RecipeError(
                    "evaluate.texts",
                    "engine",
                    rule,
                    "name the engine in synthesize.engine, or set texts: target",
                )
        return self

    def sections(self) -> dict[str, Config]:
        """The stages' sections that are present, by stage name, in the order in which they run."""
        return {
            name: value
            for name in Recipe.model_fields
            if name not in ("run", "target") and (value := getattr(self, name)) is not None
        }

    def dump(self) -> str:
        """The resolved recipe as YAML: every default written out."""
        return yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True, exclude_none=True),
            sort_keys=False,
            allow_unicode=True,
            width=140,
        )


def shipped_recipes() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED_RECIPES.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe's file: the path itself, or the shipped recipe of that name (`demo`, `recipes/demo.yaml`).

    Raises:
        RecipeError: when there is neither.
    """
    path = user_path(name, "RECIPE")
    if path.is_file():
        return path
    if name and path.is_dir():
        remedy = (
            f"give {path / 'recipe.yaml'}" if (path / "recipe.yaml").is_file() else "give a .yaml file in it"
        )
        raise RecipeError(name, "is a folder", "must be a recipe file or a shipped recipe", remedy)
    shipped, stem = shipped_recipes(), path.name.removesuffix(".yaml")
    if stem in shipped and path.parent.name in ("", "recipes"):
        return shipped[stem]
    raise RecipeError(
        name or "RECIPE",
        "no such file" if name else "an empty name",
        "must be a recipe file or a shipped recipe",
        f"shipped ones: {', '.join(shipped)}",
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe, `key=value` overrides applied first.

    Raises:
        RecipeError: in one line, for unreadable YAML or any key that is unknown, missing or out of range.
    """
    path = find_recipe(name)
    value = read_yaml(path)
    if value is None:
        raise RecipeError(
            path, "empty", "must hold sections such as `run:` and `target:`", "see the shipped recipes"
        )
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else f"one value ({short(value)})"
        raise RecipeError(
            path, found, "must hold sections such as `run:` and `target:`", "see the shipped recipes"
        )
    for override in overrides:
        apply_override(value, override)
    return load_config(Recipe, value)


class _Loader(yaml.SafeLoader):
    """Safe values only (no Python objects), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: in a few words, for text that is no YAML or holds what YAML cannot read (a day that does not exist).
        yaml.YAMLError: with the place, where there is one.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of a recipe's size.

    Raises:
        RecipeError: in one line, for a file that is missing, too large, not UTF-8 or not YAML.
    """
    rule, remedy = "must be a YAML file", "correct it"
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            found = f"{path.stat().st_size / 1e6:.1f} MB"
            raise RecipeError(
                path, found, "a recipe has a few kB, 1 MB at most", "name the recipe, not a data file"
            )
        return _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, str(error.problem or error.context)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if "twice" in problem:
            rule, remedy = "each key stands once, or the last would win in silence", "delete one"
        elif "escape" in problem:
            remedy = "write Windows paths in single quotes"
        elif "'\\t'" in problem:
            remedy = "indent with spaces, not tabs"
        elif "could not determine a constructor" in problem:
            problem, remedy = (
                f"the tag {problem.rpartition(' ')[2]}",
                "tags that make objects are not read: write plain values",
            )
        raise RecipeError(path, f"{place}{problem}", rule, remedy) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            path, f"byte {error.start} is not UTF-8", "a recipe must be text in UTF-8", "save it as UTF-8"
        ) from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise RecipeError(path, " ".join(str(error).split())[:160], rule, remedy) from None


def apply_override(value: dict[str, Any], override: str) -> None:
    """Sets one dotted key (`pretrain.tokens=4M`, `prepare.corpora[0].tokens=1M`) in nested settings.

    Raises:
        RecipeError: when it is not of the form key=value or the path does not fit.
    """
    key, equals, text = override.partition("=")
    parts: list[str | int] = [int(n) if n else p for p, n in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]
    if not equals or not parts:
        raise RecipeError(override, "not an override", "must be key=value", "for example pretrain.tokens=4M")
    try:
        new = _parse_yaml(text) if text else None
    except (yaml.YAMLError, ValueError):
        raise RecipeError(key, short(text), "must be a YAML value", "quote it") from None
    place: Any = value
    try:
        for part in parts[:-1]:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[part]
        place[parts[-1]] = new
    except (IndexError, KeyError, TypeError):
        raise RecipeError(
            key, short(text), "names no place in this recipe", "check the sections and indices"
        ) from None
