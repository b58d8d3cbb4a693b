"""What the target wrote: one row for each response, kept as Parquet in units, token ids in and token ids out.

A prompt belongs to the validation split by its hash: never on both sides, and more rows move none.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

from fastdraft.errors import FastDraftError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.run_folder import StageFolder

Split = Literal["train", "validation"]

VALIDATION_SHARE = 0.05
MIN_VALIDATION_PROMPTS = 4
_FACTS = b"fastdraft"
_TYPES = {"temperature": pa.float64(), "top_k": pa.int32(), "top_p": pa.float64()}
_TYPES |= {name: pa.list_(pa.int32()) for name in ("prompt_ids", "response_ids")}
_TYPES["logprobs"] = pa.list_(pa.float32())


@dataclass(frozen=True)
class SyntheticRow:
    """One response of the target with everything that training and replay need of it."""

    row_id: str  # hash of prompt and response ids
    source: str  # name of the prompt source in the recipe
    prompt_key: str  # hash of the prompt ids, of a conversation those of its first turn
    prompt_ids: list[int]
    # Without the prompt; ends with the EOS id when `finish_reason` is `stop`. Training's loss covers these.
    response_ids: list[int]
    # Natural log of each response token's probability under what it was drawn from; 0 when greedy.
    # Empty where it is not known (a server or a log that does not tell it).
    logprobs: list[float]
    temperature: float
    top_k: int
    top_p: float
    finish_reason: str  # `stop` (the target ended its answer) or `length` (the limit on new tokens did)

    @classmethod
    def of(cls, answer: Generation, source: str, sampling: Sampling) -> SyntheticRow:
        prompt, response = answer.prompt_ids, answer.response_ids
        drawn = (sampling.temperature, sampling.top_k, sampling.top_p, answer.finish_reason)
        key = ids_hash(prompt)
        return cls(ids_hash(prompt, response), source, key, prompt, response, answer.logprobs, *drawn)

    @property
    def is_replayable(self) -> bool:
        """Whether replay can tell what is accepted: greedy text, or log-probs of every token."""
        return self.temperature == 0 or len(self.logprobs) == len(self.response_ids)


def ids_hash(*parts: Sequence[int]) -> str:
    """Hash of sequences of token ids, 24 hex digits; where one ends and the next begins counts."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(array("q", part).tobytes())
    return state.hexdigest()[:24]


def write_rows(path: Path, rows: Iterable[SyntheticRow], facts: Mapping[str, Any] | None = None) -> None:
    """Writes all rows, and any JSON-able facts about them, as one Parquet file."""
    names, listed = [field.name for field in fields(SyntheticRow)], list(rows)
    schema = pa.schema([pa.field(name, _TYPES.get(name, pa.string()), nullable=False) for name in names])
    columns = {name: [getattr(row, name) for row in listed] for name in names}
    table = pa.Table.from_pydict(columns, schema.with_metadata({_FACTS: json.dumps(facts or {}).encode()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, compression="zstd")


def read_rows(path: Path) -> list[SyntheticRow]:
    """All rows of one file, in order."""
    return [SyntheticRow(**row) for row in _read(path).to_pylist()]


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of one file, by name."""
    columns: dict[str, list[Any]] = _read(path, list(names)).to_pydict()
    return columns


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that `write_rows` kept beside the rows."""
    facts: dict[str, Any] = json.loads(_read(path, ["row_id"]).schema.metadata[_FACTS])
    return facts


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return parquet.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise FastDraftError(f"{path}: unreadable ({str(error)[:80]})", "delete it and run again") from None


def unit_name(index: int) -> str:
    """Where the unit of that index is kept in its stage's folder."""
    return f"units/unit-{index:05}.parquet"


def unit_paths(folder: StageFolder) -> list[Path]:
    """Every unit that is there, in the order of writing."""
    return sorted(folder.path.glob("units/unit-*.parquet"), key=lambda path: int(path.stem[5:]))


def read_all(folder: StageFolder, split: Split | None = None) -> Iterator[SyntheticRow]:
    """Every row in the order of writing, one unit in memory at a time; None gives both splits."""
    return (row for _, _, row in read_with_places(folder, split))


def read_with_places(
    folder: StageFolder, split: Split | None = None
) -> Iterator[tuple[Path, int, SyntheticRow]]:
    """As `read_all`; each row with its unit and the number of response tokens that stand before it there."""
    paths, held = unit_paths(folder), frozenset[str]()
    if folder.is_complete():  # a unit that is gone is an error here: training on the rest would go unnoticed
        paths = [folder.path / unit_name(i) for i in range(folder.manifest().get("units", len(paths)))]
    if split:
        held = validation_keys(k for path in paths for k in read_columns(path, ["prompt_key"])["prompt_key"])
    for path in paths:
        before = 0
        for row in read_rows(path):
            if split is None or (row.prompt_key in held) == (split == "validation"):
                yield path, before, row
            before += len(row.response_ids)


def validation_keys(prompt_keys: Iterable[str]) -> frozenset[str]:
    """The prompts held back for validation: those whose hash falls into the first 5 %.

    When these are fewer than 4, the 4 smallest hashes are taken, but never more than half of the prompts.
    """
    keys = sorted(set(prompt_keys))
    limit = f"{round(VALIDATION_SHARE * 2**32):08x}"
    held = [key for key in keys if key[:8] < limit]
    if len(held) < MIN_VALIDATION_PROMPTS:
        held = keys[: min(MIN_VALIDATION_PROMPTS, len(keys) // 2)]
    return frozenset(held)
