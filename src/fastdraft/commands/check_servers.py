"""`fastdraft check --contact`: what the recipe's servers serve, in a few lines for each.

Decides what is shown of each server and what is worth a note; the questions are those of `runtimes.openai_contact`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastdraft.console import TABLE_WIDTH
from fastdraft.errors import RecipeError, TargetError
from fastdraft.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fastdraft.runtimes.openai_contact import Contact


def ask(recipe: Recipe) -> list[Contact | TargetError]:
    """Asks the servers of `synthesize.engine`.

    Raises:
        RecipeError: when the recipe names none. MissingExtra: without httpx.
    """
    from fastdraft.runtimes.openai_contact import contact

    engine = recipe.synthesize.engine if recipe.synthesize else None
    if engine is None or engine.kind != "openai":
        found = f"engine: {engine.kind}" if engine else "no synthesize section"
        raise RecipeError(
            "--contact", found, "only engine: {kind: openai} has servers to ask", "leave --contact out"
        )
    return contact(engine, recipe.target)


def faults(contacts: Sequence[Contact | TargetError]) -> list[TargetError]:
    """Of the servers that are no use as the recipe says."""
    return [found for found in contacts if isinstance(found, TargetError)]


def as_dicts(contacts: Sequence[Contact | TargetError]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"server": found.where, "error": str(found)} if isinstance(found, TargetError) else asdict(found)
        for found in contacts
    ]


def lines(contacts: Sequence[Contact | TargetError], context_length: int) -> Iterator[str]:
    """What each server answered, and what should be known of it; lines of at most 79 characters.

    Args:
        contacts: From `ask`.
        context_length: Of the target's config.
    """
    answered = [found for found in contacts if not isinstance(found, TargetError)]
    for found in answered:
        yield textwrap.fill(
            _line(found), TABLE_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    for fault in faults(contacts):
        yield textwrap.fill(
            f"{fault.where}: {fault.found}", TABLE_WIDTH, subsequent_indent="  ", break_long_words=False
        )
    for found in answered:
        if found.context_length and found.context_length < context_length:
            fewer = f"serves {found.context_length:,} of the target's {context_length:,} positions"
            yield f"note: {found.server} {fewer}: it refuses longer prompts; keep prompts and max_new_tokens within them"
        if not found.token_ids:
            yield f"note: {found.server} gives text only: rows whose text does not come back as the same tokens are left out"
    if len({found.model for found in answered}) > 1:
        yield "note: the servers call their models by different names; make sure that they are the same"


def _line(found: Contact) -> str:
    context = f"context {found.context_length:,}" if found.context_length else "context not told"
    ids = "answers with token ids" if found.token_ids else "answers with text only"
    scoring = "scores prompts" if found.prompt_logprobs else "does not score prompts"
    return (
        f"{found.server}: serves {found.model}, {context}; takes {found.prompts}; {ids}; log-probs: {found.logprobs}; {scoring}; "
        f"{found.seconds:.2f} s for one token"
    )
