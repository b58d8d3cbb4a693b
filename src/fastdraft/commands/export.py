"""`fastdraft export DIR --format openvino`: any Hugging Face directory for a runtime, without a recipe.

Decides where the result goes when no folder is named, and what is said about it. A recipe's export is stages/export.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastdraft.console import Console
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.run import PYTHON, SHIPPED, resolve_path, user_path


def run(
    source: str,
    *,
    format: Literal["openvino"],
    weights: Literal["fp32", "fp16", "int8", "int4"],
    output: str | None,
    target: str | None,
    console: Console,
) -> Path:
    """Exports a model and returns its folder.

    Args:
        source: Directory, hub id or `shipped:` name.
        format: The runtime.
        weights: Precision of the weights.
        output: The new folder; None: `NAME-FORMAT-WEIGHTS` in the working directory.
        target: An exported target that the model must serve as a draft; None tries the model alone.
        console: Where the outcome is told.

    Raises:
        FastDraftError: when the pair does not fit (before anything is loaded), or source or result cannot be used.
    """
    from fastdraft.runtimes.openvino import MODEL_FILE
    from fastdraft.runtimes.openvino_export import export_openvino

    location = str(resolve_path(source, "export")) if source.startswith((SHIPPED, PYTHON)) else source
    folder = user_path(output or f"{Path(location).name}-{format}-{weights}", "--output")
    if folder.exists() and not (folder / MODEL_FILE).is_file():
        raise RecipeError("--output", folder, "exists and is not an earlier export", "name another folder")
    pair = None if target is None else user_path(target, "--target")
    if pair is not None and not (pair / MODEL_FILE).is_file():
        raise FastDraftError(
            pair, f"no {MODEL_FILE}", "--target must be an exported target", "export the target first"
        )
    check = export_openvino(location, folder, weights, pair=pair)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    partner = f"as the draft of {pair}" if pair else "as its own draft"
    same = "equal" if check.same_text else f"equal up to a near-tie ({check.near_tie_gap:.1g})"
    console.say(
        f"{folder}: {size:.1f} MB; {partner}: {check.num_tokens} greedy tokens with and without it {same}"
    )
    return folder
