"""GGUF files: the head (fields and the list of tensors), files in several parts, and whether two make a pair.

file = read_gguf(Path("model.gguf")); file.value("tokenizer.ggml.model"); file.tensors["output.weight"].shape

A plain parser: the `gguf` library's reader makes an array of every string, which takes tens of seconds for a
vocabulary of 152 k tokens.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastdraft.errors import MissingExtra, TargetError

SUFFIX = ".gguf"
PADDING_TOKEN = "[PAD{}]"  # how converters name the rows of a padded vocabulary
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_VERSIONS = (2, 3)
_AGAIN = "download the file again"
# Of the specification: struct's letter for each type of value; 8 is a string, 9 an array.
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# What fields that are read here must hold, by their names; the first pattern that fits counts.
_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        r"general\.(architecture|name)|tokenizer\.(ggml\.(model|pre)|chat_template)|.*\.scaling\.type",
        "a text",
        lambda value: isinstance(value, str),
    ),
    (
        r"tokenizer\.ggml\.(tokens|merges)",
        "a list of texts",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
    (
        r"tokenizer\.ggml\.(scores|token_type)",
        "a list of numbers",
        lambda value: (
            isinstance(value, list) and all(isinstance(n, int | float) and math.isfinite(n) for n in value)
        ),
    ),
    (
        r"general\.alignment",
        "a multiple of 8",
        lambda value: type(value) is int and value > 0 and value % 8 == 0,
    ),
    (
        r"tokenizer\.ggml\.\w+_token_id|split\.count",
        "a whole number",
        lambda value: type(value) is int and value >= 0,
    ),
    (r"tokenizer\.ggml\.add_\w+", "true or false", lambda value: isinstance(value, int)),
    (
        r".*(_epsilon|\.freq_base(_swa)?|\.scaling\.\w+|_softcapping|\.sliding_window)",
        "a number",
        lambda value: isinstance(value, int | float) and math.isfinite(value),
    ),
)
_SAMPLE = 4096  # bytes of each tensor in a file's digest
# Of llama.cpp's rules for a pair: how far sizes may differ, and the first id whose text is compared.
_SIZE_DIFFERENCE, _FIRST_COMPARED = 128, 5


@dataclass(frozen=True)
class GGUFField:
    """A value of the head with its type by the specification; `element` is the type inside an array."""

    kind: int
    element: int | None
    value: Any


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies; `shape` is in torch's order, `kind` is the number of its quantisation."""

    name: str
    shape: tuple[int, ...]
    kind: int
    path: Path
    offset: int
    size: int  # bytes

    def raw(self) -> np.ndarray[Any, Any]:
        """Its bytes as they lie in the file, a row for each row of the tensor [rows, bytes]."""
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        shape = (rows, self.size // rows)
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.offset, shape=shape)


@dataclass(frozen=True)
class GGUFFile:
    """The head of a file, of all its parts; `path` is the first part."""

    path: Path
    fields: Mapping[str, GGUFField]
    tensors: Mapping[str, GGUFTensor]

    def value(self, key: str, default: Any = None) -> Any:
        """A field's value; `{arch}` in the key is the architecture's name."""
        field = self.fields.get(key.replace("{arch}", str(self.fields["general.architecture"].value)))
        return default if field is None else field.value

    def wrong(self, found: str, fix: str = _AGAIN) -> TargetError:
        """What is the matter with this file, to be raised."""
        return TargetError(f"{self.path}: {found}", fix)

    @cached_property
    def digest(self) -> str:
        """Stands for the content: the head, and the first bytes of every tensor, so that a fine-tune saved
        over another is noticed without reading gigabytes.
        """
        state = hashlib.sha256()
        for key, field in self.fields.items():
            state.update(repr((key, field.kind, field.value)).encode())
        for tensor in self.tensors.values():
            state.update(repr((tensor.name, tensor.shape, tensor.kind)).encode())
            with open(tensor.path, "rb") as file:
                file.seek(tensor.offset)
                state.update(file.read(min(_SAMPLE, tensor.size)))
        return state.hexdigest()[:20]


def require_gguf() -> Any:
    """The `gguf` library; MissingExtra where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "llamacpp") from None
    return gguf


def read_gguf(path: Path) -> GGUFFile:
    """The head of a file, or of all parts of a split one, of which any may be named."""
    fields, tensors = _read_head(path)
    count = fields["split.count"].value if "split.count" in fields else 1
    parts = _parts(path, count)
    if len(parts) > 1:
        heads = [_read_head(part) for part in parts]
        fields = heads[0][0]
        tensors = {name: tensor for _, listed in heads for name, tensor in listed.items()}
    if "general.architecture" not in fields:
        raise TargetError(f"{path}: no general.architecture; a model's file names it", _AGAIN)
    return GGUFFile(parts[0], fields, tensors)


def _parts(path: Path, count: int) -> list[Path]:
    """All parts of a file, the first one first; each must be there."""
    if count == 1:
        return [path]
    match = _PART.fullmatch(path.name)
    if not match or int(match[3]) != count:
        rule = f"one of {count} parts; must be called NAME-00001-of-{count:05d}.gguf"
        raise TargetError(f"{path}: {rule}", "give the parts their own names back")
    parts = [path.with_name(f"{match[1]}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise TargetError(f"{path}: {part.name} is missing; all {count} parts must lie beside it", _AGAIN)
    return parts


def part_names(name: str) -> list[str]:
    """The names of all parts of the file of this name; the name alone where it is not one of several."""
    match = _PART.fullmatch(name)
    numbers = range(1, int(match[3]) + 1) if match else ()
    return [f"{match[1]}-{n:05d}-of-{match[3]}.gguf" for n in numbers] if match else [name]


class _Head:
    """Reads little-endian values one after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def cut(self, end: int) -> TargetError:
        found = f"{len(self.data)} bytes, of at least {end}; the file is cut short or damaged"
        return TargetError(f"{self.path}: {found}", _AGAIN)

    def number(self, letter: str) -> Any:
        size = struct.calcsize(f"<{letter}")
        if self.at + size > len(self.data):
            raise self.cut(self.at + size)
        [value] = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += size
        return value

    def texts(self, count: int) -> list[str]:
        data, at, found = self.data, self.at, []
        if at + 8 * count > len(data):
            raise self.cut(at + 8 * count)
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            found.append(data[start:at])
            if at > len(data):
                raise self.cut(at)
        self.at = at
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError as error:
            rule = "a text of the head is not UTF-8; the file is damaged"
            raise TargetError(f"{self.path}: {rule} ({error})", _AGAIN) from None

    def field(self) -> GGUFField:
        kind = self.number("I")
        if kind == STRING:
            return GGUFField(kind, None, self.texts(1)[0])
        if kind in _LETTERS:
            return GGUFField(kind, None, self.number(_LETTERS[kind]))
        element, count = (self.number("I"), self.number("Q")) if kind == ARRAY else (kind, 0)
        if element == STRING:
            return GGUFField(kind, element, self.texts(count))
        if element not in _LETTERS:
            rule = f"a value of type {element} in the head; must be one of the specification's"
            raise TargetError(f"{self.path}: {rule}", _AGAIN)
        letters, start = f"<{count}{_LETTERS[element]}", self.at
        self.at += count * struct.calcsize(f"<{_LETTERS[element]}")
        if self.at > len(self.data):
            raise self.cut(self.at)
        return GGUFField(kind, element, list(struct.unpack_from(letters, self.data, start)))


def _read_head(path: Path) -> tuple[dict[str, GGUFField], dict[str, GGUFTensor]]:
    """Fields and tensors of one file."""
    with open(path, "rb") as file:
        start = file.read(24)
        if start[:4] != b"GGUF":
            found = f"begins with {start[:4]!r}; a GGUF file begins with b'GGUF'"
            raise TargetError(f"{path}: {found}", "name a GGUF file, or the directory of a model")
        if len(start) < 24:
            raise TargetError(f"{path}: {len(start)} bytes; the file is cut short", _AGAIN)
        version = struct.unpack("<I", start[4:8])[0]
        if version & 0xFFFF == 0:
            found = "written for big-endian machines; must be little-endian"
            raise TargetError(f"{path}: {found}", "convert it, or take another copy")
        if version not in _VERSIONS:
            found = f"GGUF version {version}; must be {' or '.join(map(str, _VERSIONS))}"
            raise TargetError(f"{path}: {found}", "convert it again, or update fastdraft")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _Head(path, data)
            head.at = 8
            num_tensors, num_fields = head.number("Q"), head.number("Q")
            fields = {head.texts(1)[0]: head.field() for _ in range(num_fields)}
            _check_values(path, fields)
            alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
            return fields, {tensor.name: tensor for tensor in _tensors(head, num_tensors, alignment)}


def _check_values(path: Path, fields: Mapping[str, GGUFField]) -> None:
    """Refuses a value of another kind than its field is for."""
    for key, field in fields.items():
        rules = (found[1:] for found in _RULES if re.fullmatch(found[0], key))
        for rule, fits in rules:
            if not fits(field.value):
                raise TargetError(f"{path}: {key} {field.value!r:.40}; must be {rule}", _AGAIN)
            break


def _tensors(head: _Head, count: int, alignment: int) -> Iterator[GGUFTensor]:
    """Every tensor that the head lists; all of its bytes must be in the file."""
    sizes = require_gguf().GGML_QUANT_SIZES
    listed: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        [name] = head.texts(1)
        dimensions = [head.number("Q") for _ in range(head.number("I"))]
        listed.append((name, tuple(reversed(dimensions)), head.number("I"), head.number("Q")))
    start = (head.at + alignment - 1) // alignment * alignment
    for name, shape, kind, offset in listed:
        if kind not in sizes:
            found = f"{name} is of type {kind}, which the installed gguf does not know"
            raise TargetError(f"{head.path}: {found}", "update gguf, or take another quantisation")
        block, block_bytes = sizes[kind]
        elements = int(np.prod(shape, dtype=np.int64))
        if not shape or elements < 1 or shape[-1] % block:
            found = f"{name} has the shape {list(shape)}; rows must be multiples of {block}"
            raise TargetError(f"{head.path}: {found}", _AGAIN)
        size = elements // block * block_bytes
        if start + offset + size > len(head.data):
            raise head.cut(start + offset + size)
        yield GGUFTensor(name, shape, kind, head.path, start + offset, size)


def adds(fields: Mapping[str, GGUFField], name: str) -> bool:
    """Whether llama.cpp puts the token (bos, eos) at a text's beginning or end."""
    field = fields.get(f"tokenizer.ggml.add_{name}_token")
    if field is not None:
        return bool(field.value)
    of = {key: fields[f"tokenizer.ggml.{key}"].value for key in ("model", "pre") if _has(fields, key)}
    return name == "bos" and (of.get("model") == "llama" or of.get("pre") in _PRE_WITH_BOS)


# Pre-tokenizers whose texts begin with BOS unless the file says otherwise.
_PRE_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")


def _has(fields: Mapping[str, GGUFField], key: str) -> bool:
    return f"tokenizer.ggml.{key}" in fields


def check_pair(target: Mapping[str, GGUFField], draft: Mapping[str, GGUFField], where: str) -> None:
    """Refuses a draft that llama.cpp's server would drop without an error: the first rule that fails, of
    common/speculative.cpp. `where` names the draft.
    """

    def of(fields: Mapping[str, GGUFField], key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].value if _has(fields, key) else None

    rules: list[tuple[str, object, object]] = [
        ("tokenizer.ggml.model must be equal", of(draft, "model"), of(target, "model"))
    ]
    for name in ("bos", "eos"):
        added = adds(target, name)
        rules.append((f"add_{name}_token must be equal", adds(draft, name), added))
        if added:
            ids = (of(draft, f"{name}_token_id"), of(target, f"{name}_token_id"))
            rules.append((f"{name}_token_id must be equal", *ids))
    for rule, found, wanted in rules:
        if found != wanted:
            raise TargetError(f"{where}: draft {found}, target {wanted}: {rule}", _MADE_FOR)
    tokens, wanted_tokens = of(draft, "tokens") or [], of(target, "tokens") or []
    if abs(len(tokens) - len(wanted_tokens)) > _SIZE_DIFFERENCE:
        found = f"draft {len(tokens)}, target {len(wanted_tokens)} tokens"
        raise TargetError(f"{where}: {found}: must differ by at most {_SIZE_DIFFERENCE}", _MADE_FOR)
    for index in range(_FIRST_COMPARED, min(len(tokens), len(wanted_tokens))):
        if tokens[index] != wanted_tokens[index]:
            found = f"draft {tokens[index]!r:.40}, target {wanted_tokens[index]!r:.40}"
            raise TargetError(f"{where}: {found}: token {index} must be equal", _MADE_FOR)


_MADE_FOR = "use a draft that was made for this target's tokenizer"
