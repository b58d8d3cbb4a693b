"""A recipe: one YAML file of every setting of a run. `load_recipe` finds, overrides and validates it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, model_validator

from fastdraft.errors import RecipeError
from fastdraft.recipe.base import Config, load_config, short
from fastdraft.recipe.evaluation import BenchmarkConfig, EvaluateConfig, ExportConfig, ReportConfig
from fastdraft.recipe.prepare import PrepareConfig
from fastdraft.recipe.run import RunConfig, TargetConfig, user_path
from fastdraft.recipe.synthesize import SynthesizeConfig
from fastdraft.recipe.training import AlignConfig, ContinuePretrainConfig, DesignConfig, PretrainConfig

_SHIPPED = Path(__file__).parents[1] / "recipes"


class Recipe(Config):
    """Everything a run depends on. A stage whose section is absent does not run."""

    run: RunConfig
    """Name, folder, seed, device."""
    target: TargetConfig
    """The model that the draft is made for."""
    design: DesignConfig | None = None
    """Target -> draft architecture and first weights."""
    prepare: PrepareConfig | None = None
    """Corpora -> tokenised, packed shards."""
    pretrain: PretrainConfig | None = None
    """Text shards -> a language model."""
    continue_pretrain: ContinuePretrainConfig | None = None
    """The same on a mixture of code and text."""
    synthesize: SynthesizeConfig | None = None
    """Prompts -> responses that the target writes."""
    align: AlignConfig | None = None
    """Fine-tuning of the draft on what the target wrote."""
    evaluate: EvaluateConfig | None = None
    """Draft x target x tasks x K x temperature -> counts."""
    export: ExportConfig | None = None
    """The draft as runtimes load it."""
    benchmark: BenchmarkConfig | None = None
    """The exported pair on this device's clock, beside the prediction."""
    report: ReportConfig | None = None
    """One page about the run."""

    _folder: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path | None:
        """Where its file lies, if it was read from one; paths in it do not depend on that."""
        return self._folder

    @model_validator(mode="after")
    def _corpora_are_prepared(self) -> Recipe:
        prepared = {corpus.name for corpus in self.prepare.corpora} if self.prepare else set()
        sources = enumerate(self.synthesize.prompts if self.synthesize else ())
        named = [(f"synthesize.prompts[{n}].corpus", s.corpus) for n, s in sources if s.kind == "corpus"]
        for stage in ("pretrain", "continue_pretrain"):
            if (section := getattr(self, stage)) and self.prepare:
                named += [(f"{stage}.mixture", name) for name in section.mixture]
        for key, name in named:
            if name not in prepared:
                known = ", ".join(sorted(prepared)) or "there are none"
                rule = f"must be one of prepare.corpora ({known})"
                raise RecipeError(f"{key}: {name}: {rule}", "correct it, or prepare that corpus")
        return self

    @model_validator(mode="after")
    def _what_is_read_is_written(self) -> Recipe:
        objective, synthesize = self.align.objective if self.align else None, self.synthesize
        reads = objective and objective.kind == "token_kd" and objective.source == "stored"
        if reads and synthesize and synthesize.logits.kind != "top_k":
            message = "align.objective.source: stored: needs the target's logits, synthesize.logits is none"
            raise RecipeError(message, "set synthesize.logits: {kind: top_k}, or source: target")
        if self.evaluate and self.evaluate.texts.kind == "engine":
            if not synthesize:
                message = "evaluate.texts: engine: means synthesize.engine, but there is no such section"
                raise RecipeError(message, "add `synthesize:`, or set another kind of texts")
            if not synthesize.asks and synthesize.engine.kind == "auto":
                message = "evaluate.texts: engine: synthesize takes logs and asks no engine"
                raise RecipeError(message, "name the engine in synthesize.engine, or set texts: target")
        return self

    @model_validator(mode="after")
    def _what_is_counted_is_there(self) -> Recipe:
        counts = self.design and self.design.vocabulary.kind == "frequent"
        if counts and not (self.prepare or self.synthesize):
            message = (
                "design.vocabulary: frequent: counts the rows of prepare or synthesize; there is neither"
            )
            raise RecipeError(message, "add one of these sections, or set vocabulary: {kind: full}")
        return self

    def sections(self) -> dict[str, Config]:
        """The stages' sections that are present, by stage name; pipeline.order says when they run."""
        stages = (name for name in Recipe.model_fields if name not in ("run", "target"))
        return {name: section for name in stages if (section := getattr(self, name)) is not None}

    def dump(self) -> str:
        """The resolved recipe as YAML: every default written out."""
        value = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=140)


def shipped_recipes() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe's file: the path itself, or the shipped recipe of that name (`demo`, `recipes/demo.yaml`)."""
    path, shipped = user_path(name, "RECIPE"), shipped_recipes()
    if path.is_file():
        return path
    if name and path.is_dir():
        raise RecipeError(f"{name}: is a folder, no recipe file", f"give {path / 'recipe.yaml'}")
    stem = path.name.removesuffix(".yaml")
    if stem in shipped and path.parent.name in ("", "recipes"):
        return shipped[stem]
    raise RecipeError(f"{name or 'RECIPE'}: no such recipe file", f"shipped ones: {', '.join(shipped)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe, `key=value` overrides applied first.

    Raises:
        RecipeError: in one line, for unreadable YAML or any key that is unknown, missing or out of range.
    """
    path = find_recipe(name)
    value = read_yaml(path)
    if not isinstance(value, dict):
        rule = "must hold sections such as `run:` and `target:`"
        raise RecipeError(f"{path}: {short(value)}: {rule}", "see the shipped recipes")
    for override in overrides:
        apply_override(value, override)
    recipe = load_config(Recipe, value)
    recipe._folder = path.parent
    return recipe


class _Loader(yaml.SafeLoader):
    """Safe values only (no Python objects), and no key twice: YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                text = f"key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of a recipe's size."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("larger than 1 MB; a recipe has a few kB")
        return _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8", "save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, str(error.problem or error.context)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        fix = "write Windows paths in single quotes" if "escape" in problem else "indent with spaces"
        raise RecipeError(f"{path}: {where}{problem}: no YAML that can be read", fix) from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise RecipeError(f"{path}: {error}", "name a recipe: a YAML file") from None


def apply_override(value: dict[str, Any], override: str) -> None:
    """Sets one dotted key (`pretrain.tokens=4M`, `prepare.corpora[0].tokens=1M`) in nested settings."""
    key, equals, text = override.partition("=")
    parts: list[str | int] = [int(n) if n else p for p, n in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]
    if not equals or not parts:
        raise RecipeError(f"{override}: must be key=value", "for example pretrain.tokens=4M")
    try:
        new = _parse_yaml(text) if text else None
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"{key}: {short(text)}: must be a YAML value", "quote it") from None
    here: Any = value
    try:
        for part in parts[:-1]:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = here[part]
        here[parts[-1]] = new
    except (IndexError, KeyError, TypeError):
        raise RecipeError(f"{key}: names no place in this recipe", "check the sections and indices") from None
