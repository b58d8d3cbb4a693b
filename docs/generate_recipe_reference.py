"""Writes docs/recipe.md: every key of a recipe with its type, default and meaning, from the docstrings in the code.

python docs/generate_recipe_reference.py
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastdraft.recipe.recipe import Recipe

HEAD = """# Every key of a recipe

Generated from the code by `python docs/generate_recipe_reference.py`. Counts may be written `250k`, `2M`, `10B`.
Alternatives are told apart by `kind`. Any key can be set on the command line:
`fastdraft run demo pretrain.tokens=4M "prepare.corpora[0].tokens=1M"`. A stage runs when its section is present;
unknown keys are refused.
"""


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML thinks of it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return (
            "count"
            if arguments[0] is int and len(arguments) > 1 and "parse_count" in str(arguments[1])
            else type_name(arguments[0])
        )
    if origin is Literal:
        return " or ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(a) for a in arguments if a is not type(None)))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of name to {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        return (
            f"`{{kind: {get_args(kind.annotation)[0]}, ...}}`"
            if kind and get_args(kind.annotation)
            else "section"
        )
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def models(annotation: Any) -> list[type[BaseModel]]:
    """Section classes inside a type, in the order written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]


def default(field: Any) -> str:
    """A field's default as YAML would have it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "-"
    if isinstance(value, BaseModel):
        return f"`{{kind: {value.kind}}}`" if hasattr(value, "kind") else "its defaults"
    if isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
        entries = (
            ", ".join(f"{key}: {setting}" for key, setting in entry.model_dump().items()) for entry in value
        )
        return f"`[{', '.join(f'{{{entry}}}' for entry in entries)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(cls: type[BaseModel]) -> str:
    """One section's keys."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        if name == "kind":
            continue
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        kind = type_name(field.annotation).replace("|", "\\|")
        if any("parse_count" in str(m) for m in field.metadata):
            kind = "count"
        rows.append(f"| `{field.alias or name}` | {kind} | {default(field)} | {meaning} |")
    return "\n".join(rows) if len(rows) > 2 else "No further keys."


def section(cls: type[BaseModel], title: str, level: int, seen: set[type[BaseModel]]) -> list[str]:
    """A section's table, then those of the alternatives inside it."""
    seen.add(cls)
    summary = " ".join((cls.__doc__ or "").split())
    parts = [f"{'#' * level} {title}\n\n{summary}\n\n{table(cls)}"]
    for name, field in cls.model_fields.items():
        for model in models(field.annotation):
            if model not in seen:
                kind = model.model_fields.get("kind")
                tag = f" `kind: {get_args(kind.annotation)[0]}`" if kind and get_args(kind.annotation) else ""
                parts += section(
                    model,
                    f"{title}.{name}{tag}" if level > 2 else f"{title.strip('`')}.{name}{tag}",
                    level + 1 if level < 3 else level,
                    seen,
                )
    return parts


def reference() -> str:
    """The whole page."""
    parts, seen = [HEAD], {Recipe}
    for name, field in Recipe.model_fields.items():
        for model in models(field.annotation):
            seen.discard(model)
            parts += section(model, f"`{name}`", 2, seen)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "recipe.md").write_text(reference(), encoding="utf-8")
