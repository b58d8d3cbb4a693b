"""The evaluate stage on a tiny pair: its files, what it resumes, what it checks, what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEXT, write_target
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, unit_name, write_rows
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.latency import Latency, measure_latency
from fastdraft.errors import DataError, FastDraftError, Interrupted, TargetError
from fastdraft.evaluation import work
from fastdraft.evaluation.results import EvaluationResults, LookupRow, ResultRow
from fastdraft.evaluation.rows import next_token_judge
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.modeling.drafts import load_draft
from fastdraft.recipe.base import load_config
from fastdraft.recipe.evaluation import EvaluateConfig
from fastdraft.recipe.run import RunConfig
from fastdraft.recipe.synthesize import SynthesizeConfig
from fastdraft.run_folder import RunFolder, read_json, write_json
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.stages import evaluate
from fastdraft.stages.context import StageContext
from fastdraft.target import Target


def settings(folder: Path, **changes: Any) -> EvaluateConfig:
    tasks = []
    for name, tokens in (("first", 12), ("second", 8)):
        path = folder / f"{name}.jsonl"
        rows = [{"id": f"{name}{i}", "prompt": f"{t} {i}", "reference": "yes"} for i, t in enumerate(TEXT)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        tasks.append({"kind": "file", "name": name, "path": str(path), "max_new_tokens": tokens})
    value = {
        "tasks": [tasks[0], {**tasks[1], "chat": True, "prompts": 3}],
        "temperatures": [0, 0.6],
        "num_speculative_tokens": [1, 3],
        "exact": {"num_speculative_tokens": [3], "prompts": 2},
    }
    return load_config(EvaluateConfig, value | changes, "evaluate")


def context(root: Path, target: Path, config: EvaluateConfig, checkpoints: dict[str, Path]) -> StageContext:
    for name, source in checkpoints.items():
        folder = root / name
        if not folder.exists():
            shutil.copytree(source, folder / "checkpoint")
            write_json(folder / "fingerprint.json", {"source": name})
            write_json(folder / "manifest.json", {"schema": 1, "stage": name})
    sections = {**dict.fromkeys(checkpoints, config), "evaluate": config}
    run_config = RunConfig(name="r", threads=1, device="cpu")
    return StageContext(RunFolder(root), run_config, Target.at(target), sections, Console(quiet=True))


def run(config: EvaluateConfig, where: StageContext) -> EvaluationResults:
    folder = where.folder("evaluate")
    folder.begin(evaluate.fingerprint(config, where))
    evaluate.run(config, where)
    value = (folder.path / "results.json").read_text(encoding="utf-8")
    value = json.loads(value, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    results = EvaluationResults.from_json(value)
    assert results.to_json() == value
    return results


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path
) -> tuple[EvaluateConfig, StageContext, EvaluationResults]:
    root = tmp_path_factory.mktemp("run")
    config = settings(root)
    where = context(root, tiny_target, config, {"pretrain": tiny_draft, "align": tiny_target})
    return config, where, run(config, where)


def test_results_hold_every_row_of_the_plan(finished) -> None:
    results = finished[2]
    assert (results.schema, results.draft) == (1, "align/checkpoint")
    tasks, temperatures = ("first", "second"), (0.0, 0.6)
    replayed, exact = results.select(method="replay"), results.select(method="exact")
    found = [(r.checkpoint, r.task, r.temperature, r.num_speculative_tokens) for r in replayed]
    assert sorted(found) == sorted(itertools.product(("pretrain", "align"), tasks, temperatures, (1, 3)))
    found = [(r.checkpoint, r.task, r.temperature, r.num_prompts) for r in exact]
    assert sorted(found) == sorted(itertools.product(("align",), tasks, temperatures, (2,)))
    manifest = finished[1].folder("evaluate").manifest()
    none = {"empty": 0, "too_long": 0}
    assert manifest["tasks"]["second"] == {"prompts": 3, "skipped": 0, "why": none}
    assert manifest["differences"] == results.to_json()["differences"]


def test_rates_in_a_row_follow_from_its_counts(finished) -> None:
    for row in finished[2].rows:
        k, ratio = row.num_speculative_tokens, finished[2].cost_ratio_parameters
        assert row.num_draft_tokens == pytest.approx(k * row.num_drafts, abs=1e-4)
        assert sum(row.num_accepted_tokens_per_pos) == pytest.approx(row.num_accepted_tokens, abs=1e-4)
        assert row.acceptance_rate == pytest.approx(row.num_accepted_tokens / row.num_draft_tokens, abs=1e-5)
        assert row.block_efficiency == pytest.approx(row.num_generated_tokens / row.num_drafts, abs=1e-5)
        assert row.mbsu_parameters == pytest.approx(row.block_efficiency / (k * ratio + 1), abs=1e-4)
        assert row.acceptance_rate_low <= row.acceptance_rate <= row.acceptance_rate_high


def test_lookup_is_counted_on_the_very_texts_alone_and_before_each_draft(finished) -> None:
    results = finished[2]
    drafts = {(r.checkpoint, *place(r)): r for r in results.select(method="replay")}
    replayed = [row for row in results.lookup if row.method == "replay"]
    alone = {place(row): row for row in replayed if row.checkpoint is None}
    both = [row for row in replayed if row.checkpoint]
    assert {(row.checkpoint, *place(row)) for row in both} == set(drafts)
    assert set(alone) == {key[1:] for key in drafts}
    assert any(row.num_lookups for row in both)
    for row in both:
        draft, lookup, k = drafts[row.checkpoint, *place(row)], alone[place(row)], row.num_speculative_tokens
        assert row.num_generated_tokens == draft.num_generated_tokens == lookup.num_generated_tokens
        assert row.block_efficiency >= lookup.block_efficiency == lookup.mbsu_parameters == lookup.mbsu_bytes
        drafted = k * (1 - row.num_lookups / row.num_drafts)
        expected = row.block_efficiency / (drafted * results.cost_ratio_parameters + 1)
        assert row.mbsu_parameters == pytest.approx(expected, abs=1e-5)
        if not row.num_lookups:
            assert row.num_drafts == pytest.approx(draft.num_drafts)


def place(row: Any) -> tuple[str, float, int]:
    return row.task, row.temperature, row.num_speculative_tokens


def test_a_draft_equal_to_the_target_costs_the_same_and_is_mostly_accepted(finished) -> None:
    results = finished[2]
    assert results.cost_ratio_parameters == results.cost_ratio_bytes == 1
    assert results.cost_ratio_latency > 0
    # Not always: this random target writes padding ids too, which no draft may propose.
    greedy = results.select(checkpoint="align", temperature=0, method="exact")
    assert all(row.conditional_acceptance_rate > 0.7 for row in greedy)


def test_exact_and_replay_agree_on_greedy_text(finished) -> None:
    config, where, _ = finished
    exact = {"exact": {"num_speculative_tokens": [1, 3], "prompts": 5}}
    everything = load_config(EvaluateConfig, config.model_dump() | exact)
    root, draft = where.run.root.parent / "agree", where.run.root / "pretrain" / "checkpoint"
    agree = context(root, Path(where.target.location), everything, {"pretrain": draft})
    rows = {m: run(everything, agree).select(method=m, temperature=0) for m in ("exact", "replay")}
    assert len(rows["exact"]) == 4
    names = [field.name for field in fields(ResultRow) if field.name.startswith("num_")]
    found, replayed = ([[getattr(row, name) for name in names] for row in rows[method]] for method in rows)
    assert found == replayed
    results = EvaluationResults.from_json(read_json(agree.folder("evaluate").path / "results.json"))
    lookups: dict[Any, Any] = {"exact": {}, "replay": {}}
    for row in results.lookup:
        counts = [getattr(row, f.name) for f in fields(LookupRow) if f.name.startswith("num_")]
        lookups[row.method][row.proposer, *place(row)] = counts
    greedy = {key: counts for key, counts in lookups["exact"].items() if key[2] == 0}
    assert len(greedy) == 2 * len(rows["exact"])
    for key, counts in greedy.items():
        assert counts == lookups["replay"][key]


def test_greedy_exact_text_is_checked_against_the_targets_own(finished) -> None:
    check = finished[2].greedy_check
    assert (check.texts, check.different) == (4, 0)


def test_checkpoints_are_compared_with_an_interval(finished) -> None:
    rows = finished[2].differences
    assert {(r.before, r.after, r.num_speculative_tokens) for r in rows} == {("pretrain", "align", 3)}
    assert all(r.difference > 0 and r.difference_low <= r.difference <= r.difference_high for r in rows)


def test_samples_are_pieces_of_the_exact_text(finished) -> None:
    samples = read_json(finished[1].folder("evaluate").path / "samples.json")
    assert [s["task"] for s in samples] == ["first", "first", "second", "second"]
    assert all({"text", "accepted"} == set(piece) for s in samples for piece in s["pieces"])


def test_a_second_run_over_finished_units_writes_the_same_results(
    finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, where, results = finished
    for name in ("exact_runs", "replay_texts", "measure_latency", "write_rows"):
        monkeypatch.setattr(work, name, lambda *_, **__: pytest.fail("finished work was done again"))
    assert run(config, where) == results


def test_a_stopped_run_goes_on_and_ends_with_the_same_counts(
    finished, tmp_path: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    config, _, undisturbed = finished
    where = context(tmp_path, tiny_target, config, {"pretrain": tiny_draft, "align": tiny_target})
    where.console.stop.requested = True
    with pytest.raises(Interrupted):
        run(config, where)
    assert not where.folder("evaluate").is_complete()
    where.console.stop.requested = False
    timed = {"mbsu_latency": None, "predicted_speedup": None}
    found, expected = ([replace(r, **timed) for r in s.rows] for s in (run(config, where), undisturbed))
    assert found == expected


def test_a_damaged_result_is_named(finished, tmp_path: Path) -> None:
    config, where, _ = finished
    root = tmp_path / "copy"
    shutil.copytree(where.run.root, root)
    (root / "evaluate" / "replay" / "align-first-0.npz").write_bytes(b"nonsense")
    damaged = context(root, Path(where.target.location), config, {"pretrain": root, "align": root})
    with pytest.raises(FastDraftError, match=r"align-first-0\.npz: unreadable"):
        evaluate.run(config, damaged)


def test_prompts_that_do_not_fit_are_left_out_and_told(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("short", "long " * 400)))
    task = {"kind": "file", "name": "mixed", "path": str(path), "max_new_tokens": 4}
    few = {"exact": {"prompts": 0}, "num_speculative_tokens": [2], "temperatures": [0]}
    config = settings(tmp_path, tasks=[task], **few)
    results = run(config, context(tmp_path / "run", tiny_target, config, {"pretrain": tiny_draft}))
    assert [row.num_prompts for row in results.rows] == [1]
    assert "mixed: of 2 prompts skipped: 1 too_long" in capsys.readouterr().err
    only_long = settings(tmp_path, tasks=[{**task, "max_new_tokens": 255}])
    with pytest.raises(DataError, match="none of 2 prompts"):
        run(only_long, context(tmp_path / "other", tiny_target, only_long, {"pretrain": tiny_draft}))


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path, tiny_target: Path) -> None:
    other = write_target(tmp_path / "other-model", padded_vocab=330, layers=1, hidden=16)
    config = settings(tmp_path)
    with pytest.raises(TargetError, match="vocab_size"):
        run(config, context(tmp_path / "run", tiny_target, config, {"pretrain": other}))


def test_latency_is_measured_for_every_width_and_survives_json(tiny_target: Path, tiny_draft: Path) -> None:
    pair = load_draft(tiny_target), load_draft(tiny_draft)
    latency = measure_latency(*pair, [2, 4], prefix_tokens=400, repeats=3)
    assert list(latency.target_seconds) == [1, 2, 4]
    assert latency.prefix_tokens == 252
    assert latency.cost_ratio > 0
    assert Latency.from_json(json.loads(json.dumps(latency.to_json()))) == latency


def test_a_difference_in_greedy_text_is_found_with_its_gap(tiny_target: Path) -> None:
    target = load_draft(tiny_target)
    found = compare_texts([5, 6], [7, 8, 9], [7, 10, 9], next_token_judge(lambda: ReadableModel(target)))
    assert found is not None
    assert (found.place, found.is_near_tie("float32")) == (1, False)
    with torch.inference_mode():
        logits = target(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert found.gap == pytest.approx(abs(float(logits[8] - logits[10])), abs=1e-4)


def test_evaluation_texts_among_the_training_rows_are_counted(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    few = {"exact": {"prompts": 0}, "num_speculative_tokens": [2], "temperatures": [0], "texts": "target"}
    config = settings(tmp_path, **few)
    where = context(tmp_path / "run", tiny_target, config, {"pretrain": tiny_draft})
    synthesize = where.folder("synthesize")
    seen = Target.at(tiny_target).tokenizer(f"{TEXT[2]} 2", add_special_tokens=False).input_ids
    write_rows(
        synthesize.path / unit_name(0),
        [
            SyntheticRow.of(
                Generation([5, 6], [*seen, 3], [0.0] * (len(seen) + 1), "stop"), "x", Sampling(0.0)
            )
        ],
    )
    write_json(synthesize.path / "fingerprint.json", {"made": 1})
    synthesize.complete()
    where = replace(where, sections={**where.sections, "synthesize": config})
    found = run(config, where).contamination["first"]
    assert (found.prompts, found.prompts_with_overlap) == (5, 1)
    assert 0 < found.ngrams_matched < found.ngrams


def test_the_fingerprint_follows_the_targets_files_and_what_was_trained_on(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    config, target = settings(tmp_path), shutil.copytree(tiny_target, tmp_path / "target")
    where = context(tmp_path / "run", target, config, {"pretrain": tiny_draft})
    base = evaluate.fingerprint(config, where)
    assert json.loads(json.dumps(base)) == base == evaluate.fingerprint(config, where)
    shutil.copy(write_target(tmp_path / "other", seed=9) / "model.safetensors", target)
    assert evaluate.fingerprint(config, where)["target"] != base["target"], "another fine-tune lies there"
    prepare = where.folder("prepare")
    write_json(prepare.path / "fingerprint.json", {"made": 1})
    prepare.complete()
    where = replace(where, sections={**where.sections, "prepare": config})
    assert evaluate.fingerprint(config, where)["trained_on"] == {"prepare": prepare.digest()}


def with_engine(where: StageContext, engine: dict[str, Any]) -> StageContext:
    value = {"prompts": [{"kind": "corpus", "name": "any", "corpus": "text"}], "engine": engine}
    section = load_config(SynthesizeConfig, value, "synthesize")
    return replace(where, sections={**where.sections, "synthesize": section})


@pytest.mark.parametrize(
    ("texts", "engine", "writes"),
    [
        ("auto", {"kind": "huggingface"}, None),
        ("auto", {"kind": "openvino"}, "openvino"),
        ("auto", {"kind": "openai", "servers": ["http://localhost:1/v1"], "model": "m"}, None),
        ("target", {"kind": "openvino"}, None),
        ("engine", {"kind": "huggingface"}, "huggingface"),
    ],
)
def test_texts_are_written_as_the_training_rows_are_where_that_is_here(
    tmp_path: Path,
    tiny_target: Path,
    tiny_draft: Path,
    texts: str,
    engine: dict[str, Any],
    writes: str | None,
) -> None:
    config = settings(tmp_path, texts=texts)
    where = with_engine(context(tmp_path / "run", tiny_target, config, {"pretrain": tiny_draft}), engine)
    found = evaluate.fingerprint(config, where)["texts"]
    assert found.get("engine", {}).get("kind") == writes
    assert found["kind"] == ("engine" if texts == "engine" else "target")


def test_greedy_exact_text_is_held_against_the_models_own_where_an_engine_wrote(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Target.at(write_target(tmp_path / "other", seed=9))  # as far from the target as rounding never is
    engine = HuggingFaceEngine(other.model(torch.device("cpu")), other.vocabulary)
    monkeypatch.setattr(evaluate, "open_engine", lambda *_, **__: engine)
    pair = [ReadableModel(load_draft(folder)) for folder in (tiny_target, tiny_draft)]
    monkeypatch.setattr(evaluate, "exact_pair", lambda *_: pair)  # of OpenVINO: tests/test_openvino.py
    config = settings(tmp_path, temperatures=[0])
    where = context(tmp_path / "run", tiny_target, config, {"pretrain": tiny_draft})
    results = run(config, with_engine(where, {"kind": "openvino"}))
    assert results.texts.kind == "engine"
    assert (results.greedy_check.texts, results.greedy_check.different) == (4, 0)
