"""Damaged files of a run, by the hundred: a reader gives what was written or one line of our own, never another exception.

Derandomised: the same damage every time. Whatever a disk, an editor or a copy half-way may leave stands for the rest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdraft.data.rows import SyntheticRow, read_metadata, read_rows, write_rows
from fastdraft.data.shards import open_corpus
from fastdraft.data.sparse_logits import SparseLogits, StoredLogits, write_sparse_logits
from fastdraft.errors import FastDraftError
from fastdraft.run_folder import StageFolder
from fastdraft.training.metrics import Metrics, read_metrics

few = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cuts a file off, changes bytes in it, puts bytes into it, or writes others in its place."""
    kind, place = (
        draw(st.sampled_from(["cut", "change", "insert", "other"])),
        draw(st.floats(0, 1, exclude_max=True)),
    )
    new = draw(st.binary(min_size=1, max_size=12))

    def apply(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "other":
            return new
        if kind == "cut":
            return content[:at]
        return content[:at] + new + content[at + (len(new) if kind == "change" else 0) :]

    return apply


def read(reader: Callable[[], Any]) -> Any:
    """What the reader gives; None where it refuses in a line of ours."""
    with contextlib.suppress(FastDraftError):
        return reader()
    return None


@few
@given(damage())
def test_a_damaged_manifest_or_fingerprint_is_a_mapping_or_one_line(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    artifact = StageFolder(tmp_path / "stage")
    (artifact.path / "fingerprint.json").unlink(missing_ok=True)
    artifact.begin({"settings": {"tokens": 5}})
    artifact.complete(rows=3)
    for name, reader in (
        ("manifest.json", artifact.manifest),
        ("fingerprint.json", artifact.stored_fingerprint),
    ):
        path = artifact.path / name
        path.write_bytes(damaged(path.read_bytes()))
        found = read(reader)
        assert found is None or isinstance(found, dict)


@few
@given(values)
def test_a_manifest_of_any_json_is_refused_or_a_mapping(tmp_path: Path, value: Any) -> None:
    artifact = StageFolder(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(value), encoding="utf-8")
    found = read(artifact.manifest)
    assert found is None or found["schema"] == 1


@few
@given(damage())
def test_damaged_metrics_give_only_records_of_steps(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 6):
            metrics.write(step=step, loss=1.5 / step)
    path.write_bytes(damaged(path.read_bytes()))
    for record in read_metrics(tmp_path):
        assert type(record["step"]) is int
    with Metrics(tmp_path, 3) as metrics:
        metrics.write(step=4, loss=0.5)
    assert read_metrics(tmp_path)[-1] == {"step": 4, "loss": 0.5}


ROWS = [
    SyntheticRow(f"r{i}", "own", f"p{i}", [1, 2, i], [4, i], [-0.5, -0.25], 1.0, 0, 1.0, "stop")
    for i in range(20)
]


@few
@given(damage())
def test_damaged_rows_of_a_unit_are_the_rows_that_were_written_or_one_line(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "unit.parquet"
    write_rows(path, ROWS, {"seen": 20})
    path.write_bytes(damaged(path.read_bytes()))
    assert read(lambda: read_rows(path)) in (None, ROWS)
    assert read(lambda: read_metadata(path)) in (None, {"seen": 20}, {})


@few
@given(damage())
def test_damaged_logits_are_the_logits_that_were_written_or_one_line(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "unit.safetensors"
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)
    logprobs = np.full((4, 4), -1.25, dtype=np.float32)
    write_sparse_logits(path, SparseLogits(ids, logprobs), 320, "rows")
    path.write_bytes(damaged(path.read_bytes()))
    stored = StoredLogits(path)
    if read(lambda: stored.facts) is not None and (found := read(lambda: stored.read(0, 4))) is not None:
        assert np.array_equal(found.ids, ids)
        assert np.allclose(found.logprobs, logprobs, atol=0.01)


def corpus_of(folder: Path) -> StageFolder:
    """A finished prepare stage of three rows."""
    rows = np.arange(27, dtype="<u2").reshape(3, 9)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    (folder / "text" / "train-00000.bin").write_bytes(rows.tobytes())
    from fastdraft.run_folder import file_sha256, write_json

    shard = {"file": "train-00000.bin", "rows": 3, "sha256": file_sha256(folder / "text" / "train-00000.bin")}
    corpora = {"text": {"train": {"shards": [shard]}, "validation": {"shards": []}}}
    write_json(
        folder / "manifest.json", {"schema": 1, "row_length": 8, "dtype": "uint16", "corpora": corpora}
    )
    return StageFolder(folder)


@few
@given(damage(), st.sampled_from(["manifest.json", "text/train-00000.bin"]))
def test_a_damaged_corpus_is_the_corpus_that_was_written_or_one_line(
    tmp_path: Path, damaged: Callable[[bytes], bytes], name: str
) -> None:
    prepare = corpus_of(tmp_path)
    path = tmp_path / name
    path.write_bytes(damaged(path.read_bytes()))
    found = read(lambda: open_corpus(prepare, "text", "train").take([0]))
    assert found is None or found.tolist() == [list(range(9))]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema": 1' + "0" * 5000 + "}", "\ufeff{}"])
def test_json_that_a_parser_stumbles_over_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(FastDraftError):
        StageFolder(tmp_path).manifest()
