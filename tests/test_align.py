"""The stage align over hand-made responses: what is trained on, which step wins, exact resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastdraft.data.rows import SyntheticRow, ids_hash, read_all, unit_name, write_rows
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.modeling.drafts import load_draft
from fastdraft.recipe.base import Config, load_config
from fastdraft.recipe.training import AlignConfig, PretrainConfig
from fastdraft.run_folder import digest, write_json
from fastdraft.stages import align
from fastdraft.stages.context import StageContext
from fastdraft.training.metrics import read_metrics
from test_pretrain import make_context

SETTINGS: dict[str, Any] = {
    "tokens": 1400,
    "batch_tokens": 200,
    "pretraining_share": 0.2,
    "checkpoint_every": 3,
    "validate_every": 4,
    "optimizer": {"kind": "adamw", "learning_rate": 0.01},
}


def make_rows(count: int = 60, prompt: int = 6) -> list[SyntheticRow]:
    """Responses that count on from the prompt's last id: easy to learn, and greedy, so that replay is
    exact.
    """
    rows = []
    for number in range(count):
        length = 4 + number % 9
        ids = [4 + (number * 11 + i) % 280 for i in range(prompt + length)]
        prompt_ids, response_ids = ids[:prompt], ids[prompt:]
        rows.append(
            SyntheticRow(
                row_id=ids_hash(prompt_ids, response_ids),
                source="made",
                prompt_key=ids_hash(prompt_ids),
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                logprobs=[0.0] * length,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                finish_reason="length",
            )
        )
    return rows


def synthesize(context: StageContext, rows: list[SyntheticRow]) -> None:
    artifact = context.folder("synthesize")
    shutil.rmtree(artifact.path, ignore_errors=True)
    write_rows(artifact.path / unit_name(0), rows)
    write_json(artifact.path / "fingerprint.json", {"rows": len(rows)})
    artifact.complete(written=len(rows))


@pytest.fixture
def new_context(tmp_path: Path, tiny_draft: Path) -> Any:
    def make(name: str = "run", rows: list[SyntheticRow] | None = None, **changes: Any) -> StageContext:
        merged = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not None}
        sections: dict[str, Config] = {
            "pretrain": load_config(PretrainConfig, {"tokens": 100}),
            "align": load_config(AlignConfig, merged),
        }
        context = make_context(tmp_path / name, tiny_draft, sections)
        pretrained = context.folder("pretrain")
        shutil.copytree(tiny_draft, pretrained.path / "checkpoint")
        write_json(pretrained.path / "fingerprint.json", {"pretrain": 1})
        pretrained.complete()
        synthesize(context, make_rows() if rows is None else rows)
        return context

    return make


def run_stage(context: StageContext) -> dict[str, Any]:
    config = context.section("align")
    context.folder("align").begin(align.fingerprint(config, context))
    align.run(config, context)
    return context.folder("align").manifest()


def test_alignment_raises_block_efficiency_on_held_out_prompts(new_context: Any) -> None:
    context = new_context(tokens=14000)
    manifest = run_stage(context)
    records = read_metrics(context.folder("align").path)
    key = "validation_block_efficiency"
    scores = {record["step"]: record[key] for record in records if key in record}
    best = max(scores.values())
    assert manifest["start_block_efficiency"] == scores[0]
    assert manifest["validation_block_efficiency"] == best > scores[0]
    assert manifest["best_step"] == min(step for step, score in scores.items() if score == best)
    assert manifest["validation_loss"]["responses"] > 0
    assert (manifest["rows"], manifest["rows_cut"], manifest["rows_dropped"]) == (56, 0, 0)
    assert (context.folder("align").path / "checkpoint/tokenizer.json").is_file()
    assert not (context.folder("align").path / "steps").exists()


def test_when_alignment_only_harms_the_starting_weights_are_kept(
    new_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter(np.linspace(2.0, 1.0, 20))
    counts = lambda found: SimpleNamespace(block_efficiency=float(next(scores)))  # noqa: E731
    monkeypatch.setattr("fastdraft.training.validation.add_counts", counts)
    context = new_context()
    assert run_stage(context)["best_step"] == 0
    start = load_draft(context.folder("pretrain").path / "checkpoint").state_dict()
    kept = load_draft(context.folder("align").path / "checkpoint").state_dict()
    assert all(bool((start[name] == kept[name]).all()) for name in start)


def test_trained_tokens_are_the_response_tokens_of_the_training_split(new_context: Any) -> None:
    context = new_context(tokens=None, pretraining_share=0)
    manifest = run_stage(context)
    train = list(read_all(context.folder("synthesize"), "train"))
    assert manifest["trained_tokens"] == 3 * sum(len(row.response_ids) for row in train)
    assert manifest["tokens"] == 3 * sum(len(row.prompt_ids) + len(row.response_ids) - 1 for row in train)


def test_a_token_budget_takes_the_place_of_three_passes(new_context: Any) -> None:
    manifest = run_stage(new_context(tokens=500, pretraining_share=0))
    assert 500 <= manifest["tokens"] < 520


def test_rows_longer_than_the_drafts_context_are_cut_and_counted(new_context: Any) -> None:
    row = make_rows(1)[0]
    ids = [5] * 300
    long = dataclasses.replace(
        row, row_id="long", prompt_key="f" * 24, response_ids=ids, logprobs=[0.0] * 300
    )
    hopeless = dataclasses.replace(row, row_id="hopeless", prompt_key="e" * 24, prompt_ids=ids)
    manifest = run_stage(new_context(rows=[*make_rows(), long, hopeless]))
    assert (manifest["rows_cut"], manifest["rows_dropped"]) == (1, 1)


def test_zero_trained_tokens_is_an_error(new_context: Any) -> None:
    rows = [dataclasses.replace(row, prompt_ids=[5] * 300) for row in make_rows(12)]
    with pytest.raises(FastDraftError, match="0 trained tokens"):
        run_stage(new_context(rows=rows))


def test_without_held_out_responses_the_last_step_is_kept_with_a_warning(
    new_context: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run_stage(new_context(rows=make_rows(1)))
    assert "no held-out responses" in capsys.readouterr().err
    assert manifest["best_step"] == manifest["steps"]


def test_a_mixture_is_needed_only_where_a_share_is_asked_for(tmp_path: Path, tiny_draft: Path) -> None:
    for share in (0.1, 0.0):
        config = load_config(AlignConfig, {**SETTINGS, "pretraining_share": share})
        context = make_context(tmp_path / f"run{share}", tiny_draft, {"align": config})
        synthesize(context, make_rows())
        if share:
            with pytest.raises(RecipeError, match=r"align\.pretraining_share"):
                run_stage(context)
        else:
            assert run_stage(context)["steps"] > 0


def test_the_fingerprint_holds_what_the_weights_depend_on(new_context: Any) -> None:
    context = new_context()
    base = align.fingerprint(context.section("align"), context)
    assert json.loads(json.dumps(base)) == base
    same: list[Any] = [{"micro_batch_tokens": 16}, {"checkpoint_every": 1}]
    other: list[Any] = [{"tokens": 900}, {"validate_every": 2}, {"pretraining_share": 0}]
    for change in (*same, *other):
        found = align.fingerprint(load_config(AlignConfig, {**SETTINGS, **change}), context)
        assert (digest(found) == digest(base)) == (change in same)
