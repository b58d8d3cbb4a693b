"""Files of text line by line or whole: JSONL and UTF-8 text (plain, .gz, .xz, .zst), Parquet; in flat memory.

A damaged file stops the run with its name and line, instead of giving less text than the user thinks.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
from pyarrow import parquet

from fastdraft.errors import DataError

BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
DAMAGE = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)


def open_binary(path: Path) -> IO[bytes]:
    """A file's content, decompressed as its suffix says."""
    try:
        if path.suffix == ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        if path.suffix == ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        if path.suffix == ".zst":
            # pyarrow's reader tells a truncated file from its end; zstandard's does not.
            stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
            return cast(IO[bytes], io.BufferedReader(stream, 1 << 20))
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(path: Path, after: int = 0) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) behind line `after`; only a newline ends a line."""
    number = 0
    with open_binary(path) as file:
        while True:
            try:
                line = file.readline()
            except DAMAGE as error:
                message = f"{path}: line {number + 1}: damaged ({error}); the file must be whole"
                raise DataError(message, "download it again") from None
            if not line:
                return
            number += 1
            if number > after:
                content = line.removeprefix(BOM) if number == 1 else line
                try:
                    yield number, content.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    message = f"{path}: line {number}: byte {error.start} is not UTF-8; files must be UTF-8"
                    raise DataError(message, "convert the file, or copy it again if it was cut off") from None


def read_jsonl(path: Path, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line behind line `after` that is not blank."""
    for number, line in read_lines(path, after):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"{path}: line {number}: not JSON ({error}); each line must be one JSON object"
            raise DataError(message, "mend the line, or copy the file again if it was cut off") from None
        if not isinstance(row, dict):
            message = f"{path}: line {number}: a JSON {type(row).__name__}; each line must be one JSON object"
            raise DataError(message, "mend or delete the line")
        yield number, row


def jsonl_values(path: Path, field: str, after: int = 0) -> Iterator[tuple[int, Any]]:
    """(line number, whatever stands under `field`) of each line behind line `after`."""
    for number, row in read_jsonl(path, after):
        if field not in row:
            raise missing_field(f"{path}: line {number}", field, row)
        yield number, row[field]


def parquet_values(path: Path, field: str, after: int = 0) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value of column `field`) of each row behind row `after`."""
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise missing_field(path, field, file.schema_arrow.names)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if number > after:
                        yield number, value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{path}: row {number + 1}: damaged ({error}); must be a whole Parquet file"
        raise DataError(message, "download it again") from None


def read_text(path: Path) -> str:
    """A whole UTF-8 file, line ends made newlines, without a byte order mark."""
    with open_binary(path) as file:
        try:
            content = file.read().replace(b"\r\n", b"\n")
        except DAMAGE as error:
            message = f"{path}: damaged ({error}); the file must be whole"
            raise DataError(message, "download it again") from None
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"{path}: line {line}: not UTF-8; text files must be UTF-8"
        raise DataError(message, "convert the file") from None


def missing_field(where: object, field: str, found: Any) -> DataError:
    """For a row or file that has `found` instead."""
    has = ", ".join(map(str, list(found)[:8])) or "no field"
    return DataError(f"{where}: no '{field}'; has {has}", "set `field` to the one that holds the text")


def unreadable(path: Path, error: OSError) -> DataError:
    """For a file that cannot be opened."""
    message = f"{path}: {error.strerror or 'unreadable'}; the file must exist and be readable"
    return DataError(message, "correct the path or its rights")
