"""The rows of published files: what a release wrote is read, and written again as it was."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from fastdraft.benchmark.rows import BenchmarkResults, BenchmarkRow, best_k, judged_rows
from fastdraft.evaluation.results import AnswerSample, EvaluationResults, ResultRow
from fastdraft.json_rows import JsonRow
from report_fixture import golden


def written(row: JsonRow) -> Any:
    return json.loads(json.dumps(row.to_json()))


def as_far_as(old: Any, new: Any) -> Any:
    """What is written now, without the keys that the old file does not have; in the order of now."""
    if isinstance(old, dict):
        return {key: as_far_as(old[key], item) for key, item in new.items() if key in old}
    return [as_far_as(*both) for both in zip(old, new, strict=True)] if isinstance(old, list) else new


FILES = [(EvaluationResults, "results.json"), (BenchmarkResults, "benchmark.json")]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_file_of_the_first_release_comes_back_as_it_was(kind: type[JsonRow], name: str) -> None:
    value = golden(name)
    assert json.dumps(as_far_as(value, kind.from_json(value).to_json())) == json.dumps(value)


def test_rows_of_the_first_release_are_of_a_draft_in_openvino() -> None:
    rows = BenchmarkResults.from_json(golden("benchmark.json")).rows
    assert {(row.runtime, row.proposer) for row in rows} == {("openvino", "draft")}


def test_samples_come_back_as_they_were() -> None:
    value = golden("samples.json")
    assert [written(AnswerSample.from_json(item)) for item in value] == value


def test_what_a_newer_release_added_is_passed_over() -> None:
    value = golden("results.json")
    newer = value | {"new": 1, "rows": [row | {"new": [1]} for row in value["rows"]]}
    assert as_far_as(value, written(EvaluationResults.from_json(newer))) == value


@pytest.mark.parametrize(("kind", "name"), [(ResultRow, "results.json"), (BenchmarkRow, "benchmark.json")])
def test_a_published_field_is_never_dropped_and_new_ones_come_behind(kind: Any, name: str) -> None:
    published = list(golden(name)["rows"][0])
    assert published == [each.metadata.get("json", each.name) for each in fields(kind)][: len(published)]


def results() -> EvaluationResults:
    return EvaluationResults.from_json(golden("results.json"))


def test_replay_stands_for_a_setting_that_was_counted_both_ways() -> None:
    found = results()
    exact = next(row for row in found.rows if row.method == "exact")
    chosen = found.row(exact.checkpoint, exact.task, exact.temperature, exact.num_speculative_tokens)
    assert chosen is not None
    assert chosen.method == "replay"


def row_like(row: Any, **changes: Any) -> Any:
    return type(row).from_json(row.to_json() | changes)


def test_the_best_k_has_the_highest_speed_up_and_is_the_smallest_when_equal() -> None:
    value = golden("results.json")
    row = value["rows"][0]
    speedups = ((3, 1.3), (2, 1.3), (1, 1.1), (4, None))
    value["rows"] = [row | {"num_speculative_tokens": k, "mbsu_bytes": speedup} for k, speedup in speedups]
    best = EvaluationResults.from_json(value).best(row["task"], row["temperature"], "mbsu_bytes")
    assert best is not None
    assert best.num_speculative_tokens == 2


def test_a_speed_up_has_the_interval_of_block_efficiency_scaled() -> None:
    known = {"block_efficiency": 2.0, "block_efficiency_low": 1.9, "block_efficiency_high": 2.2}
    row = row_like(results().rows[0], **known, mbsu_bytes=1.0)
    assert row.interval("mbsu_bytes") == pytest.approx((0.95, 1.1))
    assert row.interval("overlap") is None


def benchmark_rows(*settings: dict[str, Any]) -> list[BenchmarkRow]:
    row = BenchmarkResults.from_json(golden("benchmark.json")).rows[0]
    plain = {"part": "tasks", "lossless": True, "temperature": 0.0, "speedup": 1.0}
    return [row_like(row, **plain | changes) for changes in settings]


def test_a_verdict_rests_on_lossless_rows_of_whole_tasks_at_the_lowest_temperature() -> None:
    rows = benchmark_rows(
        {"speedup": 1.5, "num_speculative_tokens": 4},
        {"speedup": 9.0, "part": "concurrency"},
        {"speedup": 9.0, "lossless": False},
        {"speedup": 9.0, "temperature": 0.6},
        {"speedup": 9.0, "target_weights": "another"},
        {"speedup": 9.0, "num_speculative_tokens": None, "confidence_threshold": 0.4},
        {"speedup": 9.0, "runtime": "another"},
        {"speedup": 9.0, "proposer": "lookup"},
        {"speedup": None},
    )
    assert [row.speedup for row in judged_rows(rows, rows[0].key)] == [1.5]


def test_the_best_k_of_all_tasks_is_that_of_the_largest_geometric_mean() -> None:
    rows = benchmark_rows(
        {"task": "code", "num_speculative_tokens": 2, "speedup": 1.4},
        {"task": "code", "num_speculative_tokens": 4, "speedup": 1.9},
        {"task": "text", "num_speculative_tokens": 2, "speedup": 1.2},
        {"task": "text", "num_speculative_tokens": 4, "speedup": 0.7},
    )
    found = best_k(judged_rows(rows, rows[0].key))
    assert (found.num_speculative_tokens, found.by_task["code"].num_speculative_tokens) == (2, 4)
    assert found.by_task["text"].speedup == 1.2
    assert best_k([]).num_speculative_tokens is None
