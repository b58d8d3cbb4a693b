"""What every recipe section is built on: the frozen base class, counts written `10B`, folder names, and one-line errors."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from fastdraft.errors import RecipeError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmbt]?)", re.IGNORECASE)
_LARGEST_COUNT = 10**18
# Values of keys with such names, and texts that look like this, are not repeated in a message.
_SECRET_KEY = re.compile(r"key|secret|passw|credential|authorization|bearer|token$", re.IGNORECASE)
_SECRET = re.compile(r"\b(sk-|hf_|ghp_|xox[a-z]-|Bearer\s+)[A-Za-z0-9._~+/=-]{6,}")

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """A recipe section: frozen, unknown keys refused; the docstrings of its fields are the reference."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


def parse_count(value: Any) -> int:
    """`"10B"` -> 10_000_000_000; `"250k"`, `2_000_000`, `"1.5M"` likewise; ValueError for what is no whole count."""
    count = value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        match = _COUNT.fullmatch("" if isinstance(value, bool) else str(value).strip())
        count = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()] if match else -1
    if not 0 <= count <= _LARGEST_COUNT or abs(count - round(count)) > 1e-6:  # NaN too
        raise ValueError("must be a whole count such as 250k, 2M or 10B")
    return round(count)


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError(
            "must be letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit: it names a folder"
        )
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that recipes may write `10B`, `2M`, `250k`."""
FolderName = Annotated[str, AfterValidator(_folder_name)]
"""A name that becomes a folder or a file, and no path."""


def each_between(low: float, high: float, in_order: bool = True) -> AfterValidator:
    """For a list of numbers in a recipe: all from `low` to `high`, each once, in rising order or as given."""

    def check(values: list[Any]) -> list[Any]:
        if any(not low <= value <= high for value in values):
            raise ValueError(f"must be between {low:g} and {high:g}")
        if len({f"{value:g}" for value in values}) < len(set(values)):  # files and tables call them so
            raise ValueError("numbers must differ in their first six digits")
        return sorted(set(values)) if in_order else list(dict.fromkeys(values))

    return AfterValidator(check)


def _names_differ(entries: list[Any]) -> list[Any]:
    names = [entry.name.casefold() for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two entries are called '{name}' (capitals aside); give one a name of its own")
    return entries


NAMES_DIFFER = AfterValidator(_names_differ)
"""For a list of entries whose names become files."""
EACH_ONCE = AfterValidator(lambda values: list(dict.fromkeys(values)))
Ks = Annotated[list[int], each_between(1, 64)]
"""Values of num_speculative_tokens."""
Temperatures = Annotated[list[float], each_between(0, 10)]


def load_config(cls: type[C], value: Mapping[str, Any], where: str = "") -> C:
    """Validates `value`; the first failure becomes a RecipeError: dotted key, value found, pydantic's words, nearest key."""
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise _recipe_error(error, cls, value, where) from None


def _recipe_error(error: ValidationError, cls: type[BaseModel], value: object, where: str) -> RecipeError:
    first = error.errors(include_url=False)[0]
    loc, kind = first["loc"], first["type"]
    rule = re.sub(
        r"^(Input|String|List|Dictionary) should", "must", str(first["msg"]).removeprefix("Value error, ")
    )
    key, fix = _dotted(loc, value, where) or "recipe", "change it in the recipe or on the command line"
    if kind == "missing":
        return RecipeError(f"{key}: missing: this key is required", "add it to the recipe")
    found = short(first["input"])
    if kind == "extra_forbidden":
        known = sorted({name for section in _sections(cls, loc[:-1]) for name in section.model_fields})
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        rule, fix = (
            "unknown key",
            f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known) or 'none'}",
        )
        if _SECRET_KEY.search(str(loc[-1])):
            found, fix = "a secret", "keys are not for recipes: use api_key_env"
    elif isinstance(first["input"], Mapping) and kind == "value_error":
        return RecipeError(f"{key}: {rule}", fix)
    return RecipeError(f"{key}: {found}: {rule[0].lower()}{rule[1:]}", fix)


def _dotted(loc: tuple[int | str, ...], value: object, text: str) -> str:
    """The key as a recipe has it: without the tags that pydantic puts in for a union's member, which are no keys of the value."""
    for part in loc:
        try:
            value = value[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            if part is not loc[-1] or part == (value.get("kind") if isinstance(value, Mapping) else value):
                continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def short(value: object) -> str:
    """A value on one line of at most 80 characters, however large it is; what looks like a secret is left out."""
    text = _SECRET.sub(
        r"\1(not shown)", type(value).__name__ if isinstance(value, BaseModel) else _repr.repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 160
_repr.maxdict = _repr.maxlist = _repr.maxlevel = 6


def models(annotation: object) -> list[type[BaseModel]]:
    """Every section class inside a type annotation, in the order written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]


def _sections(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """The section classes that may stand at `loc`; the tag of a union's member picks that member."""
    found = [cls]
    for part in (part for part in loc if isinstance(part, str)):
        tagged = [
            m
            for m in found
            if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)
        ]
        found = tagged or [
            model
            for m in found
            if part in m.model_fields
            for model in models(m.model_fields[part].annotation)
        ]
    return found
