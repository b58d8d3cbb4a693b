"""Finds target and draft for the commands that use a pair: from a run's folder, from two paths, or both.

Decides that a run's best draft is its export, else the checkpoint of its latest finished training stage.
"""

from __future__ import annotations

from pathlib import Path

from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.base import load_config
from fastdraft.recipe.recipe import read_yaml
from fastdraft.recipe.run import TargetConfig

_DRAFTS = (
    "export/huggingface",
    "align/checkpoint",
    "continue_pretrain/checkpoint",
    "pretrain/checkpoint",
    "design/draft",
)


def find_pair(run: str | None, target: str | None, draft: str | None) -> tuple[TargetConfig, str]:
    """Target, with the revision and precision that the run used, and the draft's location.

    What is given by name wins over what the run says.

    Raises:
        RecipeError: when neither a run nor both locations are given.
        FastDraftError: when the run has no recipe or no draft yet.
    """
    if run is None:
        if not (target and draft):
            raise RecipeError(
                "RUN",
                "missing",
                "a run's folder, or both --target and --draft, must be given",
                "for example fastdraft generate runs/demo",
            )
        return TargetConfig(model=target), draft
    return TargetConfig(model=target) if target else _target_of(Path(run)), draft or _draft_of(Path(run))


def _target_of(run: Path) -> TargetConfig:
    try:
        recipe = read_yaml(run / "recipe.yaml")
        return load_config(TargetConfig, recipe["target"], "target")
    except (RecipeError, TypeError, KeyError):
        raise FastDraftError(
            run,
            "has no readable recipe.yaml",
            "must be the folder of a run",
            "give a folder such as runs/demo",
        ) from None


def _draft_of(run: Path) -> str:
    for name in _DRAFTS:
        if (run / name / "config.json").is_file():
            return str(run / name)
    raise FastDraftError(
        run, "holds no draft yet", "the design stage must have finished", "run `fastdraft run RECIPE` first"
    )
