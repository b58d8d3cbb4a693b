"""The few types that rooms share: what a stage is given, and what an engine must be able to do.

Decides the run-wide settings (`run:` and `target:` in a recipe) and the `StageContext` handed to every stage; what a text and an
engine are stands in generation.py and is handed on from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdraft.console import Console
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.base import Config
from fastdraft.recipe.run import RunConfig
from fastdraft.run_folder import RunFolder, StageFolder
from fastdraft.target import Target

DRAFT_FOLDERS = {
    "design": "draft",
    "pretrain": "checkpoint",
    "continue_pretrain": "checkpoint",
    "align": "checkpoint",
}
"""Where each stage keeps its draft, in the order of training."""


@dataclass(frozen=True)
class StageContext:
    """All that a stage may know besides its own section."""

    run: RunFolder
    settings: RunConfig
    target: Target
    sections: Mapping[str, Config]
    """Every section of the recipe by stage name: a stage may read another's settings, never its code."""
    console: Console

    def folder(self, stage: str) -> StageFolder:
        return self.run.folder(stage)

    def require(self, stage: str) -> StageFolder:
        """The finished artifact of an earlier stage.

        Raises:
            FastDraftError: when that stage has not finished.
        """
        artifact = self.folder(stage)
        if not artifact.is_complete():
            raise FastDraftError(
                artifact.path,
                "not finished",
                f"this stage needs the result of '{stage}'",
                f"run `fastdraft {stage} RECIPE` first",
            )
        return artifact

    def section(self, stage: str) -> Any:
        """Another stage's settings.

        Raises:
            RecipeError: when the recipe has no such section.
        """
        if stage not in self.sections:
            raise RecipeError(
                stage, "missing", "this stage needs that section", f"add `{stage}:` to the recipe"
            )
        return self.sections[stage]

    def has(self, stage: str) -> bool:
        return stage in self.sections
