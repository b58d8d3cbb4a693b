"""`run:` and `target:`: where results go, seed, device, the target; and paths as recipes write them."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fastdraft.errors import DataError, RecipeError
from fastdraft.recipe.base import Config, FolderName, short

SHIPPED, PYTHON, PACKAGE = "shipped:", "python:", "package:"
Precision = Literal["auto", "bf16", "fp32"]
Compile = Literal["auto"] | bool


def user_path(text: str, where: str = "path") -> Path:
    """A path as a user writes it, `~` meant as the home folder."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (RuntimeError, ValueError, OSError) as error:  # no such user, a NUL byte, too long a name
        found = f"{short(text)} ({getattr(error, 'strerror', None) or error})"
        raise RecipeError(f"{where}: {found}: no path that this machine can have", "correct it") from None
    return path


def resolve_path(text: str, where: str = "path") -> Path:
    """A path of a recipe as a path on this machine, relative to the working directory.

    `shipped:data/x` lies inside this package; `python:stdlib` is the standard library's folder and
    `python:site-packages/NAME` an installed package's; `package:MODULE/FILE` is a file that a Python package
    brings, wherever it is installed.
    """
    if text.startswith(PACKAGE):
        return _package_file(text, where)
    folder, _, rest = text.removeprefix(PYTHON).partition("/")
    roots = {"stdlib": sysconfig.get_path("stdlib"), "site-packages": sysconfig.get_path("purelib")}
    if text.startswith(SHIPPED):
        path = Path(__file__).parents[1] / "shipped" / text.removeprefix(SHIPPED)
    elif text.startswith(PYTHON) and folder in roots:
        path = Path(roots[folder]) / rest
    elif text.startswith(PYTHON):
        raise DataError(
            f"{where}: {text}: must begin with python:stdlib or python:site-packages", "correct it"
        )
    else:
        return user_path(text, where)
    if not path.exists():
        rule = f"must exist for {sys.executable}"
        raise DataError(f"{where}: {text}: {rule}", "correct the name or install what holds it")
    return path


def _package_file(text: str, where: str) -> Path:
    """`package:MODULE/FILE` as a path. The module is only looked up: none of its code runs."""
    module, _, name = text.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier() or module.startswith("_") or not name:
        rule = "must be package:MODULE/FILE, a file that a Python package brings"
        raise DataError(f"{where}: {text}: {rule}", "correct the name")
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = next((path for folder in folders if (path := Path(folder) / name).exists()), None)
    if found is None:
        # A distribution is usually called as its module, with hyphens.
        pip = f"pip install --no-deps {module.replace('_', '-')}"
        lacks = (
            f"no {name} in {folders[0]}" if folders else f"no Python package {module} for {sys.executable}"
        )
        raise DataError(f"{where}: {text}: {lacks}", f"`{pip}`, or the package that brings it")
    return found


class ClusterConfig(Config):
    """Many machines that Ray has made one cluster of: prepare, synthesize and evaluate's texts use them."""

    kind: Literal["ray"] = "ray"
    address: str = Field(default="auto", min_length=1)
    """HOST:PORT of its head; local: a new one of this machine alone; auto: the one it is in, else local."""
    workers: int = Field(default=0, ge=0, le=100_000)
    """How many work at a time; 0: one for each GPU, or for as many CPUs as each takes."""


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
    """CPU threads; 0 takes all cores. Results are bit-for-bit equal only for equal threads."""
    precision: Precision = "auto"
    """Of training: bf16 autocast over fp32 weights, or fp32; auto: bf16 where the device has it."""
    compile: Compile = "auto"
    """Whether training compiles the draft (torch.compile); auto: on CUDA, in runs long enough for it."""
    tensorboard: bool = False
    """Whether training writes TensorBoard files too (needs the extra `tensorboard`)."""
    cluster: ClusterConfig | None = None
    """Machines for prepare, synthesize and evaluate's texts (needs the extra `ray`); unset: this one."""

    @property
    def root(self) -> Path:
        return user_path(self.folder, "run.folder") / self.name


# What the renderer itself takes by these names.
_TAKEN = {"conversation", "conversations", "messages", "tokenize", "add_generation_prompt", "return_dict"}
_TAKEN |= {"continue_final_message", "return_assistant_tokens_mask", "return_tensors", "tokenizer_kwargs"}


def _free(arguments: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_TAKEN & set(arguments)):
        raise ValueError(f"'{taken[0]}' is set by FastDraft itself; name variables that the template reads")
    return arguments


class TargetConfig(Config):
    """`target:` — the model that the draft is made for."""

    model: str = Field(min_length=1, pattern=r"\S")
    """A directory, a hub id, a GGUF file (OWNER/REPO:FILE.gguf of the hub, package:MODULE/FILE.gguf of an
    installed Python package), or `shipped:targets/starter`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision in which the target runs; auto: its own on an accelerator, fp32 on a CPU."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_free)] = {}
    """Variables of the chat template, such as `enable_thinking: false`; servers that render get them too."""

    @property
    def location(self) -> str:
        """The directory on this machine, or the hub id."""
        # as_posix: a hub id keeps its slash on Windows
        return resolve_path(self.model, "target.model").as_posix()
