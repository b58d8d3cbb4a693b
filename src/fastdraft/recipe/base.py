"""What every recipe section is built on: a frozen base class, counts such as `10B`, one-line errors."""

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
# Values of keys with such names, and texts that look like this, are not repeated in a message.
_SECRET_KEY = re.compile(r"key|secret|passw|credential|authorization|bearer|token$", re.IGNORECASE)
_SECRET = re.compile(r"\b(sk-|hf_|ghp_|xox[a-z]-|Bearer\s+)[A-Za-z0-9._~+/=-]{6,}")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 160
_repr.maxdict = _repr.maxlist = _repr.maxlevel = 6

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """A recipe section: frozen, unknown keys refused; the docstrings of its fields are the reference."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


def parse_count(value: Any) -> int:
    """`"10B"` -> 10_000_000_000; `"250k"`, `2_000_000`, `"1.5M"` likewise."""
    count = value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        match = _COUNT.fullmatch("" if isinstance(value, bool) else str(value).strip())
        count = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()] if match else -1
    if not 0 <= count <= 10**18 or abs(count - round(count)) > 1e-6:  # NaN too
        raise ValueError("must be a whole count such as 250k, 2M or 10B")
    whole: int = round(count)
    return whole


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        rule = "must be letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
        raise ValueError(f"{rule}: it names a folder")
    return value


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


Count = Annotated[int, BeforeValidator(parse_count)]  # recipes may write it `10B`, `2M`, `250k`
FolderName = Annotated[str, AfterValidator(_folder_name)]  # becomes a folder or a file, and is no path
NAMES_DIFFER = AfterValidator(_names_differ)  # for a list of entries whose names become files
EACH_ONCE = AfterValidator(lambda values: list(dict.fromkeys(values)))
Ks = Annotated[list[int], each_between(1, 64)]  # values of num_speculative_tokens
Temperatures = Annotated[list[float], each_between(0, 10)]


def load_config(cls: type[C], value: Mapping[str, Any], where: str = "") -> C:
    """Validates `value`; the first failure becomes a RecipeError: dotted key, value, rule, nearest key."""
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise _recipe_error(error, cls, value, where) from None


def _recipe_error(error: ValidationError, cls: type[BaseModel], value: object, where: str) -> RecipeError:
    first = error.errors(include_url=False)[0]
    kind, found, rule = first["type"], short(first["input"]), str(first["msg"]).removeprefix("Value error, ")
    rule = re.sub(r"^(Input|String|List|Dictionary) should", "must", rule)
    key, sections = _locate(first["loc"], cls, value, where)
    fix = "change it in the recipe or on the command line"
    if kind == "missing":
        return RecipeError(f"{key}: missing: this key is required", "add it to the recipe")
    if kind == "extra_forbidden":
        name, known = str(first["loc"][-1]), sorted({name for cls in sections for name in cls.model_fields})
        near, rule = difflib.get_close_matches(name, known, n=1), "unknown key"
        fix = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known) or 'none'}"
        if _SECRET_KEY.search(name):
            found, fix = "a secret", "keys are not for recipes: use api_key_env"
    elif kind == "value_error" and isinstance(first["input"], Mapping):
        return RecipeError(f"{key}: {rule}", fix)
    return RecipeError(f"{key}: {found}: {rule[0].lower()}{rule[1:]}", fix)


def _locate(
    loc: tuple[int | str, ...], cls: type[BaseModel], value: Any, key: str
) -> tuple[str, list[type[BaseModel]]]:
    """The key as a recipe has it (without pydantic's tags of unions), and the sections that may hold it."""
    found, above = [cls], [cls]
    for part in loc:
        if isinstance(part, int):
            key, value = f"{key}[{part}]", value[part] if isinstance(value, list) else None
            continue
        tagged = [
            m for m in found if "kind" in (f := m.model_fields) and part in get_args(f["kind"].annotation)
        ]
        fields = [model.model_fields[part] for model in found if part in model.model_fields]
        if tagged:
            found = tagged
        elif fields or (isinstance(value, Mapping) and part in value):
            key, above = f"{key}.{part}" if key else part, found
            found = [model for field in fields for model in models(field.annotation)]
            value = value.get(part) if isinstance(value, Mapping) else None
    return key or "recipe", above


def short(value: object) -> str:
    """A value on one line of at most 80 characters; what looks like a secret is left out."""
    text = type(value).__name__ if isinstance(value, BaseModel) else _repr.repr(value)
    text = _SECRET.sub(r"\1(not shown)", text)
    return text if len(text) <= 80 else text[:77] + "..."


def models(annotation: object) -> list[type[BaseModel]]:
    """Every section class inside a type annotation, in the order written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]
