"""FastDraft: makes a small draft model for any language model, so that speculative decoding answers faster.

The command line and this package are the same objects: `load_recipe` reads a recipe, `run` takes it through
its stages. Importing this package does not import torch; names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdraft.decoding.speculative import SpeculativeDecoder
    from fastdraft.errors import FastDraftError
    from fastdraft.functional.acceptance import Counts
    from fastdraft.pipeline import run
    from fastdraft.recipe.recipe import Recipe, load_recipe

__version__ = "0.3.0"
__all__ = ["Counts", "FastDraftError", "Recipe", "SpeculativeDecoder", "__version__", "load_recipe", "run"]

_HOME = {
    "Counts": "fastdraft.functional.acceptance",
    "FastDraftError": "fastdraft.errors",
    "Recipe": "fastdraft.recipe.recipe",
    "SpeculativeDecoder": "fastdraft.decoding.speculative",
    "load_recipe": "fastdraft.recipe.recipe",
    "run": "fastdraft.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdraft' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
