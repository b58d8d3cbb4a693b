"""Frozen dataclasses that stand in a JSON file: `Row.from_json(value)` and `row.to_json()`.

A class lists its fields in the file's order; a field that a newer release added is passed over.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import Field, field, fields
from functools import cache
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

Number = int | float


class JsonRow:
    """Base of such a dataclass; its fields may hold other rows, lists and mappings of them."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        hints, known = _hints(cls), [each for each in _names(cls) if each[1] in value]  # type: ignore[arg-type]
        return cls(**{name: _decoded(hints[name], value[key]) for name, key in known})

    def to_json(self) -> dict[str, Any]:
        return {key: _encoded(getattr(self, name)) for name, key in _names(type(self))}


def called(name: str) -> Any:
    """A field whose name in the file is no good name in Python, as `from`."""
    return field(metadata={"json": name})


def _names(cls: type[JsonRow]) -> list[tuple[str, str]]:
    return [(each.name, each.metadata.get("json", each.name)) for each in fields(cls)]


_hints = cache(get_type_hints)


def _decoded(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if get_origin(hint) in (Union, types.UnionType):
        return _decoded(
            get_args(hint)[0], value
        )  # the other parts are None, or numbers, which stay as they are
    if get_origin(hint) is list:
        return [_decoded(get_args(hint)[0], item) for item in value]
    if get_origin(hint) is dict:
        key_type, item_type = get_args(hint)
        return {key_type(key): _decoded(item_type, item) for key, item in value.items()}
    return hint.from_json(value) if isinstance(hint, type) and issubclass(hint, JsonRow) else value


def _encoded(value: Any) -> Any:
    if isinstance(value, JsonRow):
        return value.to_json()
    if isinstance(value, dict):
        return {str(key): _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, (list, tuple)) else value
