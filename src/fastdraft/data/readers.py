"""Files of rows and of text in flat memory: JSON objects one a line or in an array, Parquet, UTF-8 text.

A file's beginning tells its form and compression, whatever it is called. A damaged file stops the run with
its name and line, instead of giving less text than the user thinks.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
from pyarrow import parquet

from fastdraft.data.remote import DataFile
from fastdraft.errors import DataError

BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
# Of a JSON array so many bytes are read at once, and an object of it may have so many.
ARRAY_BYTES, LONGEST_OBJECT = 1 << 20, 1 << 26
DAMAGE = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
_GAPS = (" ", "\n", "\r", "\t", ",")


def _open_zstd(path: Any) -> Any:
    # pyarrow's reader tells a truncated file from its end; zstandard's does not.
    raw = pyarrow.OSFile(str(path), "rb") if isinstance(path, Path) else pyarrow.PythonFile(path, "r")
    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream, 1 << 20)


# How a compressed file begins, and what opens it: names are not to be relied on.
COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ": lzma.open,
    b"BZh": bz2.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
_ICONV = "convert it, for example by `iconv -f UTF-16 -t UTF-8`"
# How a file begins that is no text, what it is, what to do.
_FOREIGN = (
    (b"\xff\xfe", "UTF-16 text", _ICONV),
    (b"\xfe\xff", "UTF-16 text", _ICONV),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"PAR1", "a Parquet file", "set kind: parquet"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file by `git lfs pull`"),
)


def open_binary(path: DataFile) -> IO[bytes]:
    """A file's content, decompressed; what cannot be text in UTF-8 is refused by its first bytes."""
    try:
        with path.open("rb") as raw:
            head = raw.read(8)
        known = next((how for magic, how in COMPRESSED.items() if head.startswith(magic)), None)
        file: Any = known(path if isinstance(path, Path) else path.open("rb")) if known else path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    head = b""
    with contextlib.suppress(*DAMAGE):  # whoever reads on tells where
        head = file.peek(256)[:256]
    found = next(((what, fix) for magic, what, fix in _FOREIGN if head.startswith(magic)), None)
    if found is None and b"\0" in head:
        found = "binary data, or UTF-16 text", "name another file or convert it"
    if found:
        file.close()
        raise DataError(f"{path}: {found[0]}; must be text in UTF-8", found[1])
    return cast(IO[bytes], file)


def read_lines(path: DataFile, after: int = 0) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) behind line `after`; only a newline ends a line."""
    number = 0
    with open_binary(path) as file:
        while True:
            try:
                line = file.readline()
            except DAMAGE as error:
                raise _damaged(f"{path}: line {number + 1}", error) from None
            if not line:
                return
            number += 1
            if number > after:
                content = line.removeprefix(BOM) if number == 1 else line
                try:
                    yield number, content.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, number, error) from None


def read_rows(path: DataFile, after: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE: line 3` or `FILE: row 3`, object) of each row behind line or row `after`.

    A file of JSON objects one a line, of one JSON array of objects, of objects broken into lines, or Parquet.
    """
    return ((where, row) for _, where, row in numbered_rows(path, after))


def numbered_rows(
    path: DataFile, after: int = 0, columns: Sequence[str] | None = None, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The same with the line's or row's number before it; of a Parquet file only these columns, and the row
    groups of one of so many shares (any other file is all in the first).
    """
    form = _form(path)
    if form == "parquet":
        rows = _parquet(path, columns, share)
        yield from ((n, f"{path}: row {n}", row) for n, row in rows if n > after)
    elif not share[0] and form == "lines":
        yield from ((n, f"{path}: line {n}", row) for n, row in _lines_of_json(path, after))
    elif not share[0]:
        yield from ((n, f"{path}: row {n}", row) for n, row in enumerate(_objects(path), 1) if n > after)


def field_values(
    path: DataFile, field: str, after: int = 0, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, str, Any]]:
    """(number, where, whatever stands under `field`) of each row behind row `after`."""
    for number, where, row in numbered_rows(path, after, [field], share):
        if field not in row:
            raise missing_field(where, field, row)
        yield number, where, row[field]


def _form(path: DataFile) -> str:
    """parquet, lines or objects, by the file's beginning."""
    try:
        with path.open("rb") as raw:
            if raw.read(4) == b"PAR1" or path.suffix.lower() == ".parquet":
                return "parquet"
    except OSError as error:
        raise unreadable(path, error) from None
    line = b""
    # Damage is told with its line by whoever reads on.
    with open_binary(path) as file, contextlib.suppress(*DAMAGE):
        line = file.readline(LONGEST_OBJECT).removeprefix(BOM).lstrip()
        while not line and file.peek(1):  # type: ignore[attr-defined]
            line = file.readline(LONGEST_OBJECT).lstrip()
    if line[:1] == b"{":
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return "objects"
    return "objects" if line[:1] == b"[" else "lines"


def _lines_of_json(path: DataFile, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path, after):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = f"{path}: line {number}: not JSON ({error}: {line.strip()[:40]!r})"
            fix = "mend the line, or copy the file again if it was cut off"
            raise DataError(f"{found}; each line must be one JSON object", fix) from None
        if not isinstance(row, dict):
            message = f"{path}: line {number}: a JSON {type(row).__name__}; each line must be one JSON object"
            raise DataError(message, "mend or delete the line")
        yield number, row


def _objects(path: DataFile) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array, or objects one behind the other, however they are broken into lines."""
    scan, decoder = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")()
    text, line, why, place, more = "", 1, "", 0, b"to come"
    array: bool | None = None
    with open_binary(path) as file:
        while more:
            at, why, place = 0, "", 0
            try:
                # Twice as much each time that an object does not end yet.
                more = file.read(max(ARRAY_BYTES, len(text))) if len(text) < LONGEST_OBJECT else b""
                text += decoder.decode(more, not more)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line + text.count("\n"), error) from None
            except DAMAGE as error:
                raise _damaged(f"{path}: behind line {line}", error) from None
            if array is None:
                array = text.lstrip().startswith("[")
                text = text.replace("[", " ", 1) if array else text
            while True:
                while text[at : at + 1] in _GAPS:
                    at += 1
                if text[at : at + 1] != "{":
                    break
                try:
                    row, at = scan(text, at)
                except (ValueError, RecursionError) as error:
                    why, place = getattr(error, "msg", "nested too deeply"), getattr(error, "pos", at) - at
                    break
                yield row
            line, text = line + text.count("\n", 0, at), text[at:]
    if text.strip() != ("]" if array else ""):
        why = (
            f"no end within {LONGEST_OBJECT >> 20} MB" if len(text) >= LONGEST_OBJECT else why or "no object"
        )
        found = f"{path}: line {line + text.count(chr(10), 0, place)}: not JSON ({why}: {text[:40]!r})"
        fix = "mend it, or copy the file again if it was cut off"
        raise DataError(f"{found}; must be JSON objects, one a line or in an array", fix)


def _parquet(
    path: DataFile, columns: Sequence[str] | None, share: tuple[int, int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb")) as file:
            if lacking := set(columns or ()).difference(file.schema_arrow.names):
                raise missing_field(path, lacking.pop(), file.schema_arrow.names)
            first, stop = (file.num_row_groups * place // share[1] for place in (share[0], share[0] + 1))
            number = sum(file.metadata.row_group(group).num_rows for group in range(first))
            for batch in file.iter_batches(PARQUET_ROWS, range(first, stop), columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{path}: row {number + 1}: damaged ({error}); must be a whole Parquet file"
        raise DataError(message, "download it again") from None


def read_text(path: DataFile) -> str:
    """A whole UTF-8 file, line ends made newlines, without a byte order mark."""
    with open_binary(path) as file:
        try:
            content = file.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        except DAMAGE as error:
            raise _damaged(path, error) from None
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, 1, error) from None


def missing_field(where: object, field: str, found: Any) -> DataError:
    """For a row or file that has `found` instead."""
    has = ", ".join(map(str, list(found)[:8])) or "no field"
    return DataError(f"{where}: no '{field}'; has {has}", "set `field` to the one that holds the text")


def unreadable(path: DataFile, error: OSError) -> DataError:
    """For a file that cannot be opened."""
    message = f"{path}: {error.strerror or 'unreadable'}; the file must exist and be readable"
    return DataError(message, "correct the path or its rights")


def _damaged(where: object, error: Exception) -> DataError:
    return DataError(f"{where}: damaged ({error}); the file must be whole", "download it again")


def _not_utf8(path: DataFile, line: int, error: UnicodeDecodeError) -> DataError:
    """`line` is that of the first byte which was to be decoded."""
    before = error.object[: error.start]
    place = f"line {line + before.count(10)}: byte {error.start - before.rfind(10) - 1}"
    found = f"{path}: {place} is not UTF-8 (0x{error.object[error.start]:02X}); files must be UTF-8"
    fix = "convert it (western text by `iconv -f WINDOWS-1252 -t UTF-8`), or copy it again if it was cut off"
    return DataError(found, fix)
