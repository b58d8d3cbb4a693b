"""Reading files of text: JSONL (plain, gz, xz, zst), Parquet and plain text, one document at a time.

Decides that a damaged file stops the run with its name and line (a truncated download, a bad line, a missing field,
bytes that are not UTF-8) instead of yielding less than the user thinks, and that memory does not grow with the file.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fastdraft.errors import DataError

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".xz", ".zst")
PARQUET_ROWS = 1024
"""Rows of a Parquet file held at a time."""


def open_binary(path: Path) -> IO[bytes]:
    """A file's content as bytes, decompressed as its suffix says.

    Raises:
        DataError: when it cannot be opened.
    """
    try:
        if path.suffix == ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        if path.suffix == ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        if path.suffix == ".zst":
            return _open_zst(path)
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            path,
            error.strerror or "unreadable",
            "the file must exist and be readable",
            "correct the path or its rights",
        ) from None


def _open_zst(path: Path) -> IO[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
    return cast(IO[bytes], _BufferedArrow(stream))


class _BufferedArrow:
    """Lines out of a pyarrow stream, whose own readline is slow."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> _BufferedArrow:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[bytes]:
        parts: list[bytes] = []
        while block := self._stream.read(1 << 20):
            *lines, rest = block.split(b"\n")
            for line in lines:
                yield b"".join([*parts, line, b"\n"])
                parts = []
            parts.append(rest)
        if last := b"".join(parts):
            yield last

    def read(self) -> bytes:
        return cast(bytes, self._stream.read())


def read_lines(path: Path, after: int = 0) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, behind line `after`; a line ends at a newline and nowhere else.

    Raises:
        DataError: naming the line at which the file turns out to be damaged or not UTF-8.
    """
    number = 0
    with open_binary(path) as file:
        lines = iter(file)
        while True:
            try:
                line = next(lines, None)
            except (
                EOFError,
                OSError,
                ValueError,
                lzma.LZMAError,
                zlib.error,
            ) as error:  # ValueError: pyarrow's, of a bad frame
                raise DataError(
                    f"{path} line {number + 1}",
                    f"damaged ({error})",
                    "the file must be whole",
                    "download it again",
                ) from None
            if line is None:
                return
            number += 1
            if number <= after:
                continue
            if number == 1:
                line = line.removeprefix(BOM)
            try:
                text = line.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{path} line {number}"
                if error.reason == "unexpected end of data" and not line.endswith(b"\n"):
                    raise DataError(
                        where,
                        "cut off inside a character",
                        "the file must be whole",
                        "copy or download it again",
                    ) from None
                raise DataError(
                    where, f"byte {error.start} is not UTF-8", "text files must be UTF-8", "convert the file"
                ) from None
            del line  # a document may be a line of 50 MB: hold it once
            yield number, text


def _ends_inside_a_line(path: Path) -> bool:
    """Whether a plain file's last byte is no line end, as after a copy that was cut off."""
    if path.suffix in COMPRESSED:
        return False
    try:
        with open(path, "rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"
    except OSError:
        return False


def _is_at_its_end(lines: Iterator[tuple[int, str]]) -> bool:
    try:
        return next(lines, None) is None
    except DataError:  # a fault further down; the first one is told
        return False


def read_jsonl(path: Path, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line behind line `after` that is not blank.

    Raises:
        DataError: when the file is damaged or a line is not a JSON object.
    """
    lines = read_lines(path, after)
    for number, line in lines:
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if _ends_inside_a_line(path) and _is_at_its_end(lines):
                rule, remedy = "the file must be whole", "copy or download it again, or delete its last line"
                raise DataError(
                    f"{path} line {number}", f"cut off inside a line ({error})", rule, remedy
                ) from None
            raise DataError(
                f"{path} line {number}",
                f"not JSON ({error})",
                "each line must be one JSON object",
                "mend or delete the line",
            ) from None
        del line
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number}",
                f"a JSON {type(row).__name__}",
                "each line must be one JSON object",
                "mend or delete the line",
            )
        yield number, row


def jsonl_texts(path: Path, field: str, after: int = 0) -> Iterator[tuple[int, str]]:
    """(line number, text under `field`) of each line behind line `after`; a null counts as an empty text.

    Raises:
        DataError: when the file is damaged, or a line has no such field or no text under it.
    """
    for number, row in read_jsonl(path, after):
        yield number, _text(_value(row, path, number, field), f"{path} line {number}", field)


def jsonl_values(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """(file and line, whatever stands under `field`) of each line.

    Raises:
        DataError: when the file is damaged, or a line has no such field.
    """
    for number, row in read_jsonl(path):
        yield f"{path} line {number}", _value(row, path, number, field)


def _value(row: dict[str, Any], path: Path, number: int, field: str) -> Any:
    if field not in row:
        raise DataError(
            f"{path} line {number}",
            f"no field '{field}'",
            f"has {', '.join(map(str, list(row)[:8])) or 'no field'}",
            "set `field` to the one that holds the text",
        )
    return row[field]


def parquet_texts(path: Path, field: str, after: int = 0) -> Iterator[tuple[int, str]]:
    """(row number from 1, text under column `field`) of each row behind row `after`; a null counts as an empty text.

    Raises:
        DataError: when the file is damaged or has no such column of text.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise DataError(
                    path,
                    f"no column '{field}'",
                    f"has {', '.join(file.schema_arrow.names[:8])}",
                    "set `field` to the one that holds the text",
                )
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= after:
                    number += rows  # not read at all
                    continue
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
                    for value in batch.column(0):
                        number += 1
                        if number > after:
                            yield number, _text(value.as_py(), f"{path} row {number}", field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} row {number + 1}",
            f"damaged ({error})",
            "must be a whole Parquet file",
            "download it again",
        ) from None


def read_text(path: Path) -> str:
    """A whole UTF-8 file, line ends made newlines, without a byte order mark.

    Raises:
        DataError: when it cannot be read, or naming the line that is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(
            path,
            error.strerror or "unreadable",
            "the file must exist and be readable",
            "correct the path or its rights",
        ) from None
    try:
        if b"\r\n" in content:
            content = content.replace(b"\r\n", b"\n")  # keeps the numbers of lines
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {number}", "not UTF-8", "text files must be UTF-8", "convert the file"
        ) from None


def _text(value: object, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            where,
            f"'{field}' is a {type(value).__name__}",
            "must be text",
            "set `field` to the one that holds the text",
        )
    return value
