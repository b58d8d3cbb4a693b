"""What `fastdraft check` holds against each other before anything runs: lengths against contexts, K against the vocabulary, the folder.

Decides which settings, each right by itself, cannot work together on this target and machine: what a stage would otherwise refuse
after hours of other stages.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.recipe import Recipe
from fastdraft.stages import design


def check_fit(recipe: Recipe, plan: design.DraftDesign) -> None:
    """Refuses a folder that cannot be made, and lengths or counts that the target or its draft cannot take.

    Raises:
        FastDraftError: when the run's folder cannot be made. RecipeError: naming the setting that does not fit.
    """
    check_folder(recipe.run.root)
    context = min(plan.draft.context_length, plan.target.context_length)
    asked = (
        [(f"evaluate.tasks[{i}]", task.max_new_tokens) for i, task in enumerate(recipe.evaluate.tasks)]
        if recipe.evaluate
        else []
    )
    if recipe.synthesize and recipe.synthesize.asks:
        asked.append(("synthesize", recipe.synthesize.max_new_tokens))
    for where, length in asked:
        if length >= context:
            rule = f"an answer and its prompt must fit the context of {context}"
            raise RecipeError(f"{where}.max_new_tokens", length, rule, "lower it")
    logits = recipe.synthesize.logits if recipe.synthesize else None
    if logits and logits.kind == "top_k" and logits.k >= plan.target.vocab_size:
        rule = f"must be below the {plan.target.vocab_size} ids of the target's vocabulary"
        raise RecipeError("synthesize.logits.k", logits.k, rule, "lower it; 64 is usual")


def check_folder(root: Path) -> None:
    """Refuses a place where no folder can be made or written; makes nothing.

    Raises:
        FastDraftError: naming what stands in the way.
    """
    place = root.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise FastDraftError(
            root,
            f"{place} is a file",
            "the run's folder must be one that can be made",
            "set another run.folder",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise FastDraftError(
            root,
            f"{place} cannot be written",
            "the run's folder must be writable",
            "change its rights or set run.folder",
        )
