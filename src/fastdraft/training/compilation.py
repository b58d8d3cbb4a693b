"""Whether the decoder is compiled (torch.compile), and why.

Decides `run.compile: auto`: on a CUDA device when the run is long enough to earn the compilation back and Triton is there; on a
CPU never, because there the layers are written out (training/written_out.py), which needs no compiler and no first minutes
and is faster than the compiled modules at 1.5 M (docs/performance.md); the gain on CUDA has not been measured. What was decided goes
to the log as one line. A wish that cannot be met is said, not an error: the numbers are the same either way.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdraft.recipe.run import Compile

MIN_TOKENS = 50_000_000
"""Training tokens below which an accelerator is done before a compilation has paid."""


@dataclass(frozen=True)
class Choice:
    """Whether to compile, and one line for the log."""

    compile: bool
    words: str


def choose(asked: Compile, device: torch.device, tokens: int) -> Choice:
    """What `run.compile` means on this device for a stage of that many tokens."""
    if asked is False:
        return Choice(False, "not compiled: run.compile is false")
    if asked == "auto":
        if device.type != "cuda":
            return Choice(False, "not compiled: auto compiles on CUDA devices only")
        if tokens < MIN_TOKENS:
            return Choice(False, f"not compiled: {tokens / 1e6:.0f}M tokens are done before it pays")
    missing = _missing(device)
    if missing:
        return Choice(False, f"not compiled: {missing}")
    return Choice(True, "compiled: the first steps take up to some minutes")


def settle(asked: Compile, device: torch.device, tokens: int, say: Callable[[str], None]) -> bool:
    """`choose`, with its reason in the log wherever there was something to decide: on an accelerator, or by the recipe's wish."""
    choice = choose(asked, device, tokens)
    if device.type != "cpu" or asked is True:
        say(f"  {choice.words}")
    return choice.compile


def _missing(device: torch.device) -> str:
    """What the compiler of that device lacks; empty when nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "torch.compile needs the package triton here"
    if device.type != "cpu":
        return f"torch.compile is not used on {device.type}"
    compilers = (
        [os.environ.get("CXX", ""), "cl"]
        if sys.platform == "win32"
        else [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    )
    return (
        ""
        if any(name and shutil.which(name) for name in compilers)
        else "torch.compile needs a C++ compiler here, and none was found"
    )
