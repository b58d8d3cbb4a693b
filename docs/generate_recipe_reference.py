"""Writes docs/recipe.md: every key of a recipe with its type, default and meaning, from the docstrings in the
code.

python docs/generate_recipe_reference.py
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastdraft.recipe.base import models
from fastdraft.recipe.recipe import Recipe

HEAD = """# Every key of a recipe

Generated from the code by `python docs/generate_recipe_reference.py`. Counts may be written `250k`, `2M`, `10B`.
Alternatives are told apart by `kind`. Any key can be set on the command line:
`fastdraft run starter pretrain.tokens=4M "prepare.corpora[0].tokens=1M"`. A stage runs when its section is present;
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
        return f"mapping of name to {'value' if arguments[1] is Any else type_name(arguments[1])}"
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


def own_fields(cls: type[BaseModel]) -> dict[str, Any]:
    """The keys that a section class adds to those of its bases; `kind` is in the headings."""
    return {
        name: cls.model_fields[name]
        for name in cls.__annotations__
        if name in cls.model_fields and name != "kind"
    }


def table(cls: type[BaseModel]) -> str:
    """The keys that a section class adds."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in own_fields(cls).items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        kind = type_name(field.annotation).replace("|", "\\|")
        if any("parse_count" in str(m) for m in field.metadata):
            kind = "count"
        rows.append(f"| `{name}` | {kind} | {default(field)} | {meaning} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def kinds(cls: type[BaseModel]) -> str:
    """` kind: jsonl or parquet` of an alternative."""
    kind = cls.model_fields.get("kind")
    values = get_args(kind.annotation) if kind else ()
    return f" `kind: {' or '.join(values)}`" if values else ""


def section(cls: type[BaseModel], title: str, level: int, seen: dict[type[BaseModel], str]) -> list[str]:
    """Its keys, then those of the alternatives inside it. Keys that several sections share are listed once,
    and named in the others.
    """
    parts, shared = [], []
    for base in cls.__mro__[1:]:
        if issubclass(base, BaseModel) and base.__module__ != BaseModel.__module__ and own_fields(base):
            if base not in seen:
                seen[base] = f"{title.partition(' ')[0]} ({base.__name__})"
                parts.append(f"{'#' * level} {seen[base]}\n\n{summary(base)}\n\n{table(base)}")
            shared.append(seen[base])
    seen[cls] = title
    also = f"Has the keys of {' and of '.join(shared)}{', and:' if table(cls) else '.'}" if shared else ""
    texts = (
        f"{'#' * level} {title}{kinds(cls)}",
        summary(cls),
        also,
        table(cls) or ("" if also else "No further keys."),
    )
    parts.append("\n\n".join(text for text in texts if text))
    for name, field in own_fields(cls).items():
        for model in models(field.annotation):
            if model not in seen:
                parts += section(model, f"{title.strip('`')}.{name}", min(level + 1, 3), seen)
    return parts


def summary(cls: type[BaseModel]) -> str:
    """A section class's docstring in one line."""
    return " ".join((cls.__doc__ or "").split())


def reference() -> str:
    """The whole page."""
    parts: list[str] = [HEAD]
    seen: dict[type[BaseModel], str] = {}
    for name, field in Recipe.model_fields.items():
        for model in models(field.annotation):
            parts += section(model, f"`{name}`", 2, seen)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "recipe.md").write_text(reference(), encoding="utf-8")
