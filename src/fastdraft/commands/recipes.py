"""`fastdraft recipes`: lists the shipped recipes, or copies one to edit.

Decides that a recipe's first comment line is its summary and that a copy never overwrites a file.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from fastdraft.errors import RecipeError
from fastdraft.recipe.recipe import shipped_recipes
from fastdraft.run_folder import write_atomic


def run(copy: str | None = None) -> None:
    """Prints name and summary of each shipped recipe, or writes `COPY.yaml` into the working directory.

    Raises:
        RecipeError: for an unknown name or a file that stands already.
    """
    shipped = shipped_recipes()
    if copy is None:
        wide = max(map(len, shipped)) + 2
        for name, path in shipped.items():
            print(
                textwrap.fill(
                    _summary(path), 79, initial_indent=name.ljust(wide), subsequent_indent=" " * wide
                )
            )
        print("\nedit one: fastdraft recipes --copy NAME; or run it as it is: fastdraft run NAME")
        return
    name = copy.removesuffix(".yaml")
    if name not in shipped:
        raise RecipeError("--copy", copy, f"must be one of {', '.join(shipped)}", "see `fastdraft recipes`")
    target = Path(f"{name}.yaml")
    if target.exists():
        raise RecipeError(target, "exists already", "a copy never overwrites", "move it away first")
    write_atomic(target, shipped[name].read_text(encoding="utf-8"))
    print(f"wrote {target}: edit it, then `fastdraft check {target}` and `fastdraft run {target}`")


def _summary(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip()
