"""`run:` and `target:`: where results go, the seed, the device, and the model that the draft is made for."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from fastdraft.errors import DataError, RecipeError
from fastdraft.recipe.base import Config, FolderName, short

SHIPPED, PYTHON = "shipped:", "python:"


def user_path(text: str, where: str = "path") -> Path:
    """A path as a user writes it, `~` meant as the home folder.

    Raises:
        RecipeError: when the system can have no such path: an unknown user behind `~`, a NUL byte, a name that is too long.
    """
    try:
        if "\0" in text:
            raise ValueError("a NUL byte")
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, PermissionError):
            return path
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(
            where,
            f"{short(text)} ({found})",
            "must be a path that this machine can have",
            "write the whole path",
        ) from None
    return path


def resolve_path(text: str, where: str = "path") -> Path:
    """A path of a recipe as a path on this machine.

    `shipped:data/x` lies inside the installed package; `python:stdlib` is the standard library's folder and
    `python:site-packages/NAME` an installed package's; everything else is relative to the working directory.

    Raises:
        DataError: when a `shipped:` or `python:` name does not exist.
    """
    if text.startswith(SHIPPED):
        path = Path(__file__).parents[1] / "shipped" / text.removeprefix(SHIPPED)
    elif text.startswith(PYTHON):
        name = text.removeprefix(PYTHON)
        folder, _, rest = name.partition("/")
        roots = {"stdlib": sysconfig.get_path("stdlib"), "site-packages": sysconfig.get_path("purelib")}
        if folder not in roots:
            raise DataError(
                where,
                text,
                f"must be one of {', '.join(PYTHON + root for root in roots)}",
                "correct the name",
            )
        path = Path(roots[folder]) / rest
    else:
        return user_path(text, where)
    if not path.exists():
        raise DataError(
            where, text, f"must exist for {sys.executable}", "correct the name or install what holds it"
        )
    return path


Compile = Literal["auto"] | bool
"""Whether training compiles the draft's layers."""


CrossEntropyPath = Literal["auto", "chunked", "liger"]
"""What computes cross-entropy over the vocabulary in training."""


class RunConfig(Config):
    """`run:` — where results go, the seed, the device."""

    name: FolderName
    """Results go to `FOLDER/NAME`."""
    folder: str = Field(default="runs", min_length=1)
    """Folder of all runs, relative to the working directory."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Every random choice follows from it."""
    device: str = "auto"
    """auto, cpu, cuda, xpu, mps, or one of them with an index such as cuda:1."""
    threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads for torch; 0 lets torch choose. Results are bit-for-bit equal only for equal threads."""
    compile: Compile = "auto"
    """auto, true or false: whether training compiles the draft (torch.compile). auto: on CUDA devices, in runs long enough to earn it
    back; on a CPU the layers are written out instead. Where a compiler is missing, the log says so."""

    cross_entropy: CrossEntropyPath = "auto"
    """auto, chunked or liger: what computes cross-entropy over the vocabulary in training; the numbers are the same. auto is chunked, ours;
    liger takes Liger's Triton kernels (CUDA only, needs the extra 'liger'). Losses of token_kd are always ours."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes (`--nproc-per-node`) train: ddp, the whole draft in each; fsdp2, a part of each weight and of the optimiser's
    state in each, for drafts that do not fit otherwise (AdamW only)."""

    @property
    def root(self) -> Path:
        return user_path(self.folder, "run.folder") / self.name


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
            else str(user_path(self.model, "target.model"))
        )
