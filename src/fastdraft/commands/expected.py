"""What acceptance a recipe may expect: the range of the experiments near it, or that none is near."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from fastdraft.recipe.recipe import Recipe
from fastdraft.recipe.run import resolve_path
from fastdraft.stages.align import DEFAULT_EPOCHS
from fastdraft.stages.design import DraftDesign, cost_ratios

_NEAR = 4.0  # times more or less, of every figure below; the experiments are few


@dataclass(frozen=True)
class Expected:
    """Tokens per target pass, greedy, K = 3, a draft alone."""

    low: float | None = None  # of the least predictable task of any experiment that is near
    high: float | None = None
    experiments: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.low is None:
            return "acceptance to expect: no experiment is near this recipe, so nothing is promised"
        rests = "; ".join(self.experiments)
        return (
            f"acceptance to expect: {self.low:.1f} to {self.high:.1f} tokens per target pass by task "
            f"(greedy, K = 3, without lookup): what one run each brought of {rests}. Your text is another"
        )


def expected(recipe: Recipe, plan: DraftDesign) -> Expected:
    """By the experiments with the same start and about the same sizes."""
    path = resolve_path("shipped:data/experiments.json", "experiments")
    asked = _asked(recipe, plan)
    near = [each for each in json.loads(path.read_text(encoding="utf-8")) if _is_near(asked, each)]
    if not near:
        return Expected()
    found = [value for each in near for value in each["tokens_per_pass"].values()]
    return Expected(min(found), max(found), tuple(f"{each['name']} ({each['where']})" for each in near))


def _asked(recipe: Recipe, plan: DraftDesign) -> dict[str, Any]:
    """The recipe in the words of an experiment."""
    assert recipe.design
    kind, align = recipe.design.draft.kind, recipe.align
    before = [stage.tokens for stage in (recipe.pretrain, recipe.continue_pretrain) if stage]
    written = recipe.synthesize.tokens if recipe.synthesize else 0
    return {
        "start": kind if kind in ("from", "pruned", "transplant") else "random",
        "target_parameters": plan.target.parameters,
        "read_ratio": cost_ratios(plan.draft, plan.target)["bytes"],
        "pretrained": sum(before),
        "written": written,
        "aligned": (align.tokens or written * DEFAULT_EPOCHS) if align else 0,
    }


def _is_near(asked: dict[str, Any], experiment: dict[str, Any]) -> bool:
    # What an earlier draft was trained on before is not told.
    compared = ["target_parameters", "read_ratio", "written", "aligned"]
    compared += ["pretrained"] if asked["start"] == "random" else []
    pairs = [(asked[name], experiment[name]) for name in compared]
    return asked["start"] == experiment["start"] and all(
        low == high or (min(low, high) > 0 and abs(math.log(low / high)) <= math.log(_NEAR))
        for low, high in pairs
    )
