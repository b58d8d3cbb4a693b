"""What a stage is given: the run's folder, the target, every section of the recipe, and the console."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fastdraft.console import Console
from fastdraft.data.chat import ChatTemplate
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.ray_workers import Place, RayWorkers, connect
from fastdraft.recipe.base import Config
from fastdraft.recipe.run import RunConfig
from fastdraft.run_folder import RunFolder, StageFolder
from fastdraft.target import Target
from fastdraft.workers import LocalWorkers, Workers

# Where each stage keeps its draft, in the order of training.
DRAFT_FOLDERS = {
    "design": "draft",
    "pretrain": "checkpoint",
    "continue_pretrain": "checkpoint",
    "align": "checkpoint",
}


@dataclass(frozen=True)
class StageContext:
    """All that a stage may know besides its own section."""

    run: RunFolder
    settings: RunConfig
    target: Target
    sections: Mapping[str, Config]
    """Every section of the recipe by stage name: a stage may read another's settings, never its code."""
    console: Console
    recipe_folder: Path | None = None
    """Where the recipe's file lies, for errors alone."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As a worker on another machine gets it: what was read here is read there."""
        told = (self.run, self.settings, self.target, dict(self.sections), self.console, self.recipe_folder)
        return StageContext, told

    @cached_property
    def chat(self) -> ChatTemplate:
        """How the target reads prompts in this run: with the recipe's arguments, on the day it was begun."""
        return ChatTemplate(self.target.tokenizer, self.target.chat_template_kwargs, self.run.date)

    @property
    def template(self) -> dict[str, Any]:
        """The template's arguments, for fingerprints of stages that make prompts; empty without any."""
        arguments = self.target.chat_template_kwargs
        return {"chat_template_kwargs": arguments} if arguments else {}

    def folder(self, stage: str) -> StageFolder:
        return self.run.folder(stage)

    def require(self, stage: str) -> StageFolder:
        """The finished folder of an earlier stage."""
        folder = self.folder(stage)
        if not folder.is_complete():
            message = f"{folder.path}: not finished: this stage needs the result of '{stage}'"
            raise FastDraftError(message, f"run `fastdraft {stage} RECIPE` first")
        return folder

    def section(self, stage: str) -> Any:
        """Another stage's settings, which must be in the recipe."""
        if stage not in self.sections:
            raise RecipeError(
                f"{stage}: missing: this stage needs that section", f"add `{stage}:` to the recipe"
            )
        return self.sections[stage]

    def has(self, stage: str) -> bool:
        return stage in self.sections

    @contextlib.contextmanager
    def workers(
        self,
        stage: str,
        make: Callable[[], Any],
        place: Place,
        count: int = 0,
        here: Callable[[], Any] | None = None,
    ) -> Iterator[Workers]:
        """Who does a stage's jobs: `make` makes one worker, on each machine of `run.cluster`, or here (where
        `here` may make use of what this process has).
        """
        workers: Workers = LocalWorkers(here or make)
        if cluster := self.settings.cluster:
            connect(cluster.address)
            stop, where = self.console.stop, self.folder(stage).path
            told = partial(stop.check, where), self.console.say
            workers = RayWorkers(make, cluster.workers or count, place, self.settings.threads, *told)
            self.console.say(f"{workers.count} workers of the Ray cluster, each with {workers.share}")
        try:
            yield workers
        finally:
            workers.close()
