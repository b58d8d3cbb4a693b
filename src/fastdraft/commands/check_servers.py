"""`fastdraft check --contact`: what the recipe's servers serve, in a small table.

Decides what is shown of each server and what is worth a note; the questions are those of `runtimes.openai_contact`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastdraft.console import format_table
from fastdraft.errors import RecipeError, TargetError
from fastdraft.recipe import Recipe

if TYPE_CHECKING:
    from fastdraft.runtimes.openai_contact import Contact


def ask(recipe: Recipe) -> list[Contact | TargetError]:
    """Asks the servers of `synthesize.engine`.

    Raises:
        RecipeError: when the recipe names none. MissingExtraError: without httpx.
    """
    from fastdraft.runtimes.openai_contact import contact

    engine = recipe.synthesize.engine if recipe.synthesize else None
    if engine is None or engine.kind != "openai":
        found = f"engine: {engine.kind}" if engine else "no synthesize section"
        raise RecipeError("--contact", found, "only engine: {kind: openai} has servers to ask", "leave --contact out")
    return contact(engine, recipe.target)


def faults(contacts: Sequence[Contact | TargetError]) -> list[TargetError]:
    """Of the servers that are no use as the recipe says."""
    return [found for found in contacts if isinstance(found, TargetError)]


def as_dicts(contacts: Sequence[Contact | TargetError]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{"server": found.where, "error": str(found)} if isinstance(found, TargetError) else asdict(found) for found in contacts]


def lines(contacts: Sequence[Contact | TargetError], context_length: int) -> Iterator[str]:
    """The table, and what should be known of those that answered.

    Args:
        contacts: From `ask`.
        context_length: Of the target's config.
    """
    answered = [found for found in contacts if not isinstance(found, TargetError)]
    columns = ("server", "model", "context", "takes", "token ids", "log-probs", "prompt log-probs", "seconds")
    yield format_table(
        "", columns, [_row(found) for found in answered] + [[f.where, "-", "-", f.found, "", "", "", ""] for f in faults(contacts)]
    )
    for found in answered:
        if found.context_length and found.context_length < context_length:
            fewer = f"serves {found.context_length:,} of the target's {context_length:,} positions"
            yield f"note: {found.server} {fewer}: it refuses longer prompts; keep prompts and max_new_tokens within them"
        if not found.token_ids:
            yield f"note: {found.server} gives text only: rows whose text does not come back as the same tokens are left out"
    if len({found.model for found in answered}) > 1:
        yield "note: the servers call their models by different names; make sure that they are the same"


def _row(found: Contact) -> list[str]:
    context = f"{found.context_length:,}" if found.context_length else "not told"
    yes = {True: "yes", False: "no"}
    return [
        found.server, found.model, context, found.prompts, yes[found.token_ids], found.logprobs, yes[found.prompt_logprobs],
        f"{found.seconds:.2f}",
    ]  # fmt: skip
