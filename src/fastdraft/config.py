"""The base of every recipe section, and the few value types that recipes share.

Decides that a section is frozen, refuses unknown keys (naming the nearest known one), reads counts written `10B`, and
that a failed validation is one readable line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from fastdraft.errors import RecipeError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmbt]?)", re.IGNORECASE)

_SECRET = re.compile(r"(api|access|auth|hf|secret)?_?(key|token|password|secret)", re.IGNORECASE)
"""Keys whose value is not to be repeated, were a recipe to have them."""

_DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{number}" for name in ("com", "lpt") for number in range(10))}


def names_a_device(name: str) -> bool:
    """Whether Windows takes this name, whatever its ending, for a device such as `con` or `lpt1`: no folder can have it there."""
    return name.split(".", maxsplit=1)[0].casefold() in _DEVICES


class Config(BaseModel):
    """A recipe section: frozen, unknown keys refused, docstrings of the fields are the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True, validate_default=True)


def parse_count(value: object) -> int:
    """`"10B"` -> 10_000_000_000; `"250k"`, `2_000_000`, `"1.5M"` likewise.

    Raises:
        ValueError: for anything that is not a whole non-negative count.
    """
    if isinstance(value, bool):
        raise ValueError("must be a count such as 250k, 2M or 10B")
    if isinstance(value, (int, float)):
        if value < 0 or value != int(value):
            raise ValueError("must be a whole count such as 250k, 2M or 10B")
        return int(value)
    match = _COUNT.fullmatch(str(value).strip())
    if not match:
        raise ValueError("must be a count such as 250k, 2M or 10B")
    count = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
    if abs(count - round(count)) > 1e-6:
        raise ValueError("must be a whole count such as 250k, 2M or 10B")
    return round(count)


def format_count(count: float) -> str:
    """1_048_576 -> `"1.05M"`: three digits and a suffix."""
    for suffix in ("T", "B", "M", "k"):
        size = _SUFFIX[suffix.lower()]
        if abs(count) >= size * 0.9995:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.3g}"


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that recipes may write `10B`, `2M`, `250k`."""

C = TypeVar("C", bound=BaseModel)


def load_config(cls: type[C], value: Mapping[str, Any], where: str = "") -> C:
    """Validates `value` against `cls`; the first failure becomes one line.

    Raises:
        RecipeError: naming the key, the value, the rule and the remedy.
    """
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise recipe_error(error, cls, where) from None


def recipe_error(error: ValidationError, cls: type[BaseModel], where: str = "") -> RecipeError:
    """The first failure of a pydantic validation as one line for the user."""
    first = error.errors(include_url=False)[0]
    key = _dotted(first["loc"], where)
    if first["type"] == "extra_forbidden":
        known = _known_keys(cls, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}" if known else "remove it"
        found = "a secret" if _SECRET.fullmatch(str(first["loc"][-1])) else _short(first["input"])
        return RecipeError(key, found, "unknown key", "keys are not for recipes: use api_key_env" if found == "a secret" else remedy)
    if first["type"] == "missing":
        return RecipeError(key, "missing", "this key is required", "add it to the recipe")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return RecipeError(key, _short(first["input"]), message[0].lower() + message[1:], "change it in the recipe or on the command line")


def _dotted(loc: tuple[int | str, ...], where: str) -> str:
    text = where
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "recipe"


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, BaseModel) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _models(annotation: object) -> list[type[BaseModel]]:
    """Every section class named inside a type annotation (unions, lists, Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _known_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `loc`; a tag of a union in `loc` picks the member with that tag."""
    models: list[type[BaseModel]] = [cls]
    for part in loc:
        tagged = [m for m in models if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)]
        if tagged:
            models = tagged
        elif isinstance(part, str):
            fields = [f for m in models for n, f in m.model_fields.items() if part in (n, f.alias)]
            models = [m for f in fields for m in _models(f.annotation)]
    return sorted({f.alias or n for m in models for n, f in m.model_fields.items()})
