"""The base of every recipe section, and the few value types that recipes share.

Decides that a section is frozen, refuses unknown keys (naming the nearest known one), reads counts written `10B`, which names
make a folder on every system, and that a failed validation is one readable line, which never shows a key or a password.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from fastdraft.errors import RecipeError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmbt]?)", re.IGNORECASE)
_LARGEST_COUNT = 10**18
"""More than anything that can be counted here; what is larger is a slip of the pen."""
_SECRET = re.compile(
    r"(^|_)(key|secret|password|passwd|credentials?|authorization|bearer|token)($|_)|^key|key$", re.IGNORECASE
)
_LOOKS_SECRET = re.compile(r"\b(sk-|hf_|ghp_|xox[a-z]-|Bearer\s+)[A-Za-z0-9._~+/=-]{6,}")
"""What is not to be repeated, were a recipe to have it: values of such keys, and such texts."""

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{name}{number}" for name in ("com", "lpt") for number in range(10)),
}


def names_a_device(name: str) -> bool:
    """Whether Windows takes this name, whatever its ending, for a device such as `con` or `lpt1`: no folder can have it there."""
    return name.split(".", maxsplit=1)[0].casefold() in _DEVICES


class Config(BaseModel):
    """A recipe section: frozen, unknown keys refused, docstrings of the fields are the reference."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def parse_count(value: object) -> int:
    """`"10B"` -> 10_000_000_000; `"250k"`, `2_000_000`, `"1.5M"` likewise.

    Raises:
        ValueError: for anything that is not a whole non-negative count.
    """
    if isinstance(value, bool):
        raise ValueError("must be a count such as 250k, 2M or 10B")
    if isinstance(value, (int, float)):
        count = value
    else:
        match = _COUNT.fullmatch(str(value).strip())
        if not match:
            raise ValueError("must be a count such as 250k, 2M or 10B")
        count = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
    if not count <= _LARGEST_COUNT:  # NaN too
        raise ValueError("must be a count of at most 1,000,000T")
    if count < 0 or abs(count - round(count)) > (0 if isinstance(value, (int, float)) else 1e-6):
        raise ValueError("must be a whole count such as 250k, 2M or 10B")
    return round(count)


def folder_name(value: str) -> str:
    """The name itself, when a folder may be called so on Linux, macOS and Windows.

    Raises:
        ValueError: for other characters, more than 100 of them, a dot at the end, or a name that Windows keeps for a device.
    """
    if not _FOLDER.fullmatch(value):
        raise ValueError(
            "must be letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit: it names a folder"
        )
    if value.endswith(".") or names_a_device(value):
        raise ValueError("cannot name a folder on Windows, so choose another name")
    return value


def distinct(values: list[Number], low: float, high: float, rule: str) -> list[Number]:
    """A recipe's numbers in rising order, each once.

    Args:
        values: As given.
        low: The smallest allowed.
        high: The largest allowed.
        rule: Told of a number outside.

    Raises:
        ValueError: with `rule`; or for two that are equal in six digits, which is how files and tables call them.
    """
    if any(not low <= value <= high for value in values):
        raise ValueError(rule)
    found = sorted(set(values))
    if any(isinstance(value, float) for value in found) and len({f"{value:g}" for value in found}) < len(
        found
    ):
        raise ValueError("numbers must differ in their first six digits, by which files and tables call them")
    return found


def format_count(count: float) -> str:
    """1_048_576 -> `"1.05M"`: three digits and a suffix."""
    for suffix in ("T", "B", "M", "k"):
        size = _SUFFIX[suffix.lower()]
        if abs(count) >= size * 0.9995:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.3g}"


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that recipes may write `10B`, `2M`, `250k`."""

FolderName = Annotated[str, AfterValidator(folder_name)]
"""A name that becomes a folder, and no path."""

C = TypeVar("C", bound=BaseModel)
Number = TypeVar("Number", int, float)


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
    loc, kind = first["loc"], first["type"]
    key, known = _dotted(cls, loc, where), _known_keys(cls, loc[:-1]) if kind == "extra_forbidden" else []
    secret = bool(loc) and _SECRET.search(str(loc[-1])) is not None and loc[-1] not in known
    found = "a secret" if secret else short(first["input"])
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        remedy = (
            f"did you mean '{near[0]}'?"
            if near
            else f"known keys: {', '.join(known)}"
            if known
            else "remove it"
        )
        tag = str(loc[-2]) if len(loc) > 2 and loc[-2] in _kinds(cls, loc[:-2]) else ""
        if tag and not near:  # most often a key left over from another kind, which the recipe's file has
            remedy += f"; to change the kind set all of it, '{key.rpartition('.')[0]}={{kind: {tag}}}'"
        return RecipeError(
            key, found, "unknown key", "keys are not for recipes: use api_key_env" if secret else remedy
        )
    if kind == "missing":
        return RecipeError(key, "missing", "this key is required", "add it to the recipe")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _kind_error(first, key, sorted(_kinds(cls, loc)))
    if kind == "value_error" and isinstance(first["input"], Mapping):
        found = "its settings do not fit together"
    return RecipeError(key, found, _rule(first), "change it in the recipe or on the command line")


def _kind_error(first: Mapping[str, Any], key: str, kinds: list[str]) -> RecipeError:
    """For an entry told apart by `kind` whose kind is unknown or not given."""
    rule = f"must be one of {', '.join(kinds)}"
    if first["type"] == "union_tag_not_found":
        return RecipeError(f"{key}.kind", "missing", rule, "add it to the recipe")
    tag = str(first["ctx"]["tag"])
    near = difflib.get_close_matches(tag, kinds, n=1)
    return RecipeError(
        f"{key}.kind", short(tag), rule, f"did you mean '{near[0]}'?" if near else "choose one of them"
    )


_WORDS = (
    (r"^(Input|String|List|Dictionary|Tuple|Set) should (?=be|have|match)", "must "),
    (r"a valid (dictionary|mapping).*", "a section of keys and values"),
    (r"a valid boolean.*", "true or false"),
    (r"a valid integer.*", "a whole number"),
    (r"a valid number.*", "a number"),
    (r"a valid string", "text (in quotes)"),
    (r"a valid (list|tuple)", "a list such as [a, b]"),
    (r"(\d+) items? after validation, not \d+", r"\1 in it"),
    (
        r"match pattern '\^\(?\[A-Za-z0-9\]\[A-Za-z0-9\._-\]\*\)?\??\$'",
        "be letters, digits, '.', '_' and '-', beginning with a letter or digit",
    ),
    (
        r"match pattern '\^\[A-Za-z_\]\[A-Za-z0-9_\]\*\$'",
        "be the name of an environment variable: letters, digits and '_'",
    ),
)
"""pydantic's words -> a user's."""


def _rule(first: Mapping[str, Any]) -> str:
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message[0].lower() + message[1:]


def _dotted(cls: type[BaseModel], loc: tuple[int | str, ...], where: str) -> str:
    """The path as it is written in the recipe: without the tags that pydantic puts in for a union's member."""
    text = where
    for part, is_tag, _ in _walk(cls, loc):
        text += "" if is_tag else f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "recipe"


def short(value: object) -> str:
    """A value on one line of at most 80 characters, however large it is; what looks like a secret is left out."""
    text = type(value).__name__ if isinstance(value, BaseModel) else _repr.repr(value)
    text = _LOOKS_SECRET.sub(r"\1(not shown)", text)
    return text if len(text) <= 80 else text[:77] + "..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 160
_repr.maxdict = _repr.maxlist = _repr.maxlevel = 6


def _models(annotation: object) -> list[type[BaseModel]]:
    """Every section class named inside a type annotation (unions, lists, Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _walk(
    cls: type[BaseModel], loc: tuple[int | str, ...]
) -> Iterator[tuple[int | str, bool, list[type[BaseModel]]]]:
    """(part, whether it is the tag of a union's member, the sections that may stand there) along a path of pydantic's."""
    models: list[type[BaseModel]] = [cls]
    open_union = False
    for part in loc:
        tagged = [m for m in models if part in _tags(m)] if open_union else []
        if tagged:
            models, open_union = tagged, False
        elif isinstance(part, str):
            fields = [f for m in models for n, f in m.model_fields.items() if part in (n, f.alias)]
            models, open_union = [m for f in fields for m in _models(f.annotation)], True
        yield part, bool(tagged), models


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _sections_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[type[BaseModel]]:
    return [*_walk(cls, loc)][-1][2] if loc else [cls]


def _kinds(cls: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """The values that `kind` may have at `loc`."""
    return {tag for model in _sections_at(cls, loc) for tag in _tags(model)}


def _known_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `loc`; a tag of a union in `loc` picks the member with that tag."""
    return sorted({f.alias or n for m in _sections_at(cls, loc) for n, f in m.model_fields.items()})
