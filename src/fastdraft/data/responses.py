"""What the target wrote: one row for each response, kept as Parquet, token ids in and token ids out.

Decides the schema of a row, that a row's id and its prompt's key are content hashes, and that a prompt belongs to the
validation split by its hash, so that no prompt is ever on both sides and more rows never move an old one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft.errors import FastDraftError
from fastdraft.run_folder import StageFolder, atomic_path, digest

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "validation"]

VALIDATION_SHARE = 0.05
MIN_VALIDATION_PROMPTS = 4
UNITS = "units"
_METADATA, _DIGEST = b"fastdraft", "digest"


@functools.cache
def _schema() -> pa.Schema:
    import pyarrow as pa

    types = {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
    }
    types |= {"temperature": pa.float64(), "top_k": pa.int32(), "top_p": pa.float64()}
    return pa.schema(
        [
            pa.field(field.name, types.get(field.name, pa.string()), nullable=False)
            for field in fields(SyntheticRow)
        ]
    )


@dataclass(frozen=True)
class SyntheticRow:
    """One response of the target with everything that training and replay need of it."""

    row_id: str
    """Hash of prompt and response ids."""
    source: str
    """Name of the prompt source in the recipe."""
    prompt_key: str
    """Hash of the prompt ids, of a conversation those of its first turn: equal prompts have equal keys."""
    prompt_ids: list[int]
    response_ids: list[int]
    """Without the prompt; ends with the EOS id when `finish_reason` is `stop`. Training's loss covers exactly these."""
    logprobs: list[float]
    """Natural log of each response token's probability under the very distribution it was drawn from; 0 when greedy.
    Empty where it is not known (a server or a log that does not tell it)."""
    temperature: float
    top_k: int
    top_p: float
    finish_reason: str
    """`stop` (the target ended its answer) or `length` (the limit on new tokens did)."""

    @property
    def is_replayable(self) -> bool:
        """Whether replay can tell what speculative sampling would have accepted: greedy text, or log-probs of every token."""
        return self.temperature == 0 or len(self.logprobs) == len(self.response_ids)


def ids_hash(*parts: Sequence[int]) -> str:
    """Hash of one or more sequences of token ids, 24 hex digits; where one part ends and the next begins counts."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(array("q", part).tobytes())
    return state.hexdigest()[:24]


def write_rows(path: Path, rows: Iterable[SyntheticRow], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes all rows, and any facts about them, as one Parquet file: all of it or nothing.

    Raises:
        FastDraftError: when the disk is full or the folder cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    listed = list(rows)
    columns = {field.name: [getattr(row, field.name) for row in listed] for field in fields(SyntheticRow)}
    facts = json.loads(json.dumps(dict(metadata or {})))
    schema = _schema().with_metadata({_METADATA: json.dumps({**facts, _DIGEST: digest(facts)}).encode()})
    table = pa.Table.from_pydict(columns, schema=schema)
    with atomic_path(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_rows(path: Path) -> list[SyntheticRow]:
    """All rows of one file, in order.

    Raises:
        FastDraftError: when the file is missing or damaged.
    """
    with _one_line(path):
        return [
            SyntheticRow(**row) for row in _read(path).select(_schema().names).cast(_schema()).to_pylist()
        ]


def read_metadata(path: Path) -> dict[str, Any]:
    """The facts that `write_rows` kept beside the rows.

    Raises:
        FastDraftError: when the file is missing or damaged.
    """
    with _one_line(path):
        value = json.loads((_read(path, ["row_id"]).schema.metadata or {}).get(_METADATA, b"{}"))
        if not isinstance(value, dict) or value.pop(_DIGEST, digest(value)) != digest(value):
            raise ValueError("facts of other rows")
        return value


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of one file, by name.

    Raises:
        FastDraftError: when the file is missing or damaged.
    """
    with _one_line(path):
        columns: dict[str, list[Any]] = _read(path, list(names)).to_pydict()
        if columns.keys() != set(names):
            raise ValueError("columns are missing")
        return columns


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    from pyarrow import parquet

    with _one_line(path):
        return parquet.read_table(
            path, columns=columns, memory_map=False, partitioning=None, page_checksum_verification=True
        )


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes the library raise, as one line."""
    import pyarrow as pa

    try:
        yield
    except (
        OSError,
        pa.ArrowException,
        LookupError,
        ValueError,
        TypeError,
        MemoryError,
        RecursionError,
        OverflowError,
    ) as error:
        found = "missing" if not path.exists() else f"damaged ({str(error)[:80]})"
        raise FastDraftError(
            path, found, "must be a Parquet file of synthetic rows", "redo the stage that wrote it"
        ) from None


def unit_path(artifact: StageFolder, index: int) -> Path:
    """Where the unit of that index is kept."""
    return artifact.path / UNITS / f"unit-{index:05}.parquet"


def unit_paths(artifact: StageFolder) -> list[Path]:
    """Every unit that is there, in the order of writing."""
    return sorted(
        (artifact.path / UNITS).glob("unit-*.parquet"), key=lambda path: int(path.stem.removeprefix("unit-"))
    )


def read_all(synthesize: StageFolder, split: Split | None = None) -> Iterator[SyntheticRow]:
    """Every row in the order of writing, one unit in memory at a time.

    Args:
        synthesize: The finished stage's folder.
        split: `validation` holds about 5 % of the prompts (at least a few), `train` all the others; None gives both.

    Raises:
        FastDraftError: when a unit is damaged.
    """
    for _, _, row in read_placed(synthesize, split):
        yield row


def read_placed(
    synthesize: StageFolder, split: Split | None = None
) -> Iterator[tuple[Path, int, SyntheticRow]]:
    """As `read_all`; each row with its unit and the number of response tokens that stand before it there.

    Raises:
        FastDraftError: when a unit is damaged.
    """
    paths = unit_paths(synthesize)
    _check_whole(synthesize, paths)
    held = (
        validation_keys(key for path in paths for key in read_columns(path, ["prompt_key"])["prompt_key"])
        if split
        else frozenset()
    )
    for path in paths:
        before = 0
        for row in read_rows(path):
            if split is None or (row.prompt_key in held) == (split == "validation"):
                yield path, before, row
            before += len(row.response_ids)


def _check_whole(synthesize: StageFolder, paths: Sequence[Path]) -> None:
    """A finished stage has every unit that it wrote: training on what is left of them would go unnoticed."""
    written = synthesize.manifest().get("units", len(paths)) if synthesize.is_complete() else len(paths)
    missing = {unit_path(synthesize, index) for index in range(written)} - set(paths)
    if missing:
        rule = f"the {written} units of a finished stage must stay where they are"
        raise FastDraftError(
            min(missing), "missing", rule, "put it back, or do the stage again with --redo synthesize"
        )


def validation_keys(prompt_keys: Iterable[str]) -> frozenset[str]:
    """Which prompts are held back for validation: those whose hash falls into the first 5 %.

    When these are fewer than 4, the 4 smallest hashes are taken, but never more than half of the prompts.
    """
    keys = sorted(set(prompt_keys))
    limit = f"{round(VALIDATION_SHARE * 2**32):08x}"
    held = [key for key in keys if key[:8] < limit]
    if len(held) < MIN_VALIDATION_PROMPTS:
        held = keys[: min(MIN_VALIDATION_PROMPTS, len(keys) // 2)]
    return frozenset(held)
