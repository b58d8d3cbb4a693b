"""The few types that rooms share: what a stage is given, and what an engine must be able to do.

Decides the run-wide settings (`run:` and `target:` in a recipe), the `StageContext` handed to every stage, and the
`Engine` protocol by which any runtime writes text as the target.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from fastdraft.artifacts import Artifact, RunDirectory
from fastdraft.config import Config
from fastdraft.console import Console
from fastdraft.errors import ArtifactError, DataError, RecipeError

SHIPPED, PYTHON = "shipped:", "python:"


def resolve_path(text: str, where: str = "path") -> Path:
    """A path of a recipe as a path on this machine.

    `shipped:data/x` lies inside the installed package; `python:stdlib` is the standard library's folder and
    `python:site-packages/NAME` an installed package's; everything else is relative to the working directory.

    Raises:
        DataError: when a `shipped:` or `python:` name does not exist.
    """
    if text.startswith(SHIPPED):
        path = Path(__file__).parent / "shipped" / text.removeprefix(SHIPPED)
    elif text.startswith(PYTHON):
        name = text.removeprefix(PYTHON)
        folder, _, rest = name.partition("/")
        roots = {"stdlib": sysconfig.get_path("stdlib"), "site-packages": sysconfig.get_path("purelib")}
        if folder not in roots:
            raise DataError(where, text, f"must be one of {', '.join(PYTHON + root for root in roots)}", "correct the name")
        path = Path(roots[folder]) / rest
    else:
        return Path(text).expanduser()
    if not path.exists():
        raise DataError(where, text, f"must exist for {sys.executable}", "correct the name or install what holds it")
    return path


Compile = Literal["auto"] | bool
"""Whether training compiles the draft's layers."""


class RunConfig(Config):
    """`run:` — where results go, the seed, the device."""

    name: str
    """Results go to `FOLDER/NAME`."""
    folder: str = "runs"
    """Folder of all runs, relative to the working directory."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Every random choice follows from it."""
    device: str = "auto"
    """auto, cpu, cuda, xpu, mps, or one of them with an index such as cuda:1."""
    threads: int = Field(default=0, ge=0)
    """CPU threads for torch; 0 lets torch choose. Results are bit-for-bit equal only for equal threads."""
    compile: Compile = "auto"
    """auto, true or false: whether training compiles the draft (torch.compile). auto: on CUDA devices, in runs long enough to earn it
    back; on a CPU the layers are written out instead. Where a compiler is missing, the log says so."""

    @field_validator("name")
    @classmethod
    def _makes_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("must be letters, digits, '.', '_' and '-', beginning with a letter or digit: it names a folder")
        return value

    @property
    def root(self) -> Path:
        return Path(self.folder).expanduser() / self.name


class TargetConfig(Config):
    """`target:` — the model that the draft is made for."""

    model: str = Field(min_length=1)
    """A directory, a hub id, or `shipped:targets/starter`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision in which the target runs; auto: its own on an accelerator, fp32 on a CPU."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Only if you trust its authors."""

    @field_validator("model")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a directory or a hub id")
        return value

    @property
    def location(self) -> str:
        """The directory on this machine, or the hub id."""
        return (
            str(resolve_path(self.model, "target.model"))
            if self.model.startswith((SHIPPED, PYTHON))
            else str(Path(self.model).expanduser())
        )


@dataclass(frozen=True)
class StageContext:
    """All that a stage may know besides its own section."""

    run: RunDirectory
    settings: RunConfig
    target: TargetConfig
    sections: Mapping[str, Config]
    """Every section of the recipe by stage name: a stage may read another's settings, never its code."""
    console: Console

    def artifact(self, stage: str) -> Artifact:
        return self.run.artifact(stage)

    def require(self, stage: str) -> Artifact:
        """The finished artifact of an earlier stage.

        Raises:
            ArtifactError: when that stage has not finished.
        """
        artifact = self.artifact(stage)
        if not artifact.is_complete():
            raise ArtifactError(
                artifact.path, "not finished", f"this stage needs the result of '{stage}'", f"run `fastdraft {stage} RECIPE` first"
            )
        return artifact

    def section(self, stage: str) -> Any:
        """Another stage's settings.

        Raises:
            RecipeError: when the recipe has no such section.
        """
        if stage not in self.sections:
            raise RecipeError(stage, "missing", "this stage needs that section", f"add `{stage}:` to the recipe")
        return self.sections[stage]

    def has(self, stage: str) -> bool:
        return stage in self.sections


@dataclass(frozen=True)
class Sampling:
    """The distribution from which the target writes: temperature first, then top-k, then top-p."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    """1 keeps all."""


@dataclass(frozen=True)
class Generation:
    """One answer of the target."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Without the prompt; ends with the EOS id when `finish_reason` is `stop`."""
    logprobs: list[float]
    """Natural log of the probability of each response id under the very distribution it was drawn from; 0 when greedy.
    Empty where a server does not tell it: such text can be trained on, and replayed only where no probability is asked."""
    finish_reason: Literal["stop", "length"]
    fault: str = ""
    """Why this answer is no use as a row, in one word; empty for every good one."""


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, context_length: int) -> None:
    """What every engine asks of its prompts.

    Raises:
        DataError: when a prompt is empty or leaves no room for `max_new_tokens` in the target's context.
    """
    for index, prompt in enumerate(prompts):
        if not prompt or len(prompt) + max_new_tokens > context_length:
            rule = f"prompt and max_new_tokens ({max_new_tokens}) must fit into the context of {context_length}"
            raise DataError(f"prompt {index}", f"{len(prompt)} tokens", rule, "shorten the prompt or lower max_new_tokens")


class Engine(Protocol):
    """A runtime that writes text as the target. Implementations: runtimes/."""

    name: str

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int) -> list[Generation]:
        """One answer for each prompt (token ids in, token ids out), reproducible for equal prompts, order and seed."""
        ...
