"""Rows of several lengths in one run: where documents go, what a step holds, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastdraft import pipeline
from fastdraft.commands import check
from fastdraft.console import Console
from fastdraft.data import build
from fastdraft.data.journal import Journal
from fastdraft.data.loader import MixtureSampler, open_mixture
from fastdraft.data.ordering import piece_chars
from fastdraft.data.row_lengths import length_for
from fastdraft.data.shards import PackedCorpus, open_corpus, open_lengths, row_lengths
from fastdraft.errors import DataError, Interrupted, RecipeError
from fastdraft.recipe.recipe import load_recipe
from fastdraft.reporting.run_sections import corpora_table
from fastdraft.training.batches import PackedBatches
from test_prepare import config_of, context_of, crash, execute, shards_of
from test_pretrain import StopAfter, weights_of

SEPARATOR = 0


@pytest.fixture
def mixed_corpus(tmp_path: Path) -> Path:
    """300 short documents and 40 long ones."""
    rows = [{"text": f"Number {i} is short. " * (1 + i % 3)} for i in range(300)]
    rows += [{"text": f"The long tale number {i} goes on and on about the river. " * 20} for i in range(40)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_document_goes_to_the_longest_rows_that_it_half_fills_and_that_have_not_their_share() -> None:
    shares = {64: 0.3, 256: 0.2}
    assert length_for(500, 16, shares, {}) == 256
    assert length_for(128, 16, shares, {}) == 256
    assert length_for(127, 16, shares, {}) == 64
    assert length_for(31, 16, shares, {}) == 16
    assert length_for(500, 16, shares, {16: 70, 256: 30}) == 64, "256 has more than its fifth"
    assert length_for(500, 16, shares, {16: 80, 256: 20}) == 256
    assert length_for(500, 16, shares, {16: 20, 64: 50, 256: 30}) == 16, "both have more than their shares"
    assert length_for(500, 16, {}, {}) == 16


def test_long_rows_hold_long_documents_in_their_share_and_short_ones_never(
    tmp_path: Path, tiny_target: Path, mixed_corpus: Path
) -> None:
    context = context_of(tmp_path / "run", tiny_target)
    entry = {"name": "t", "kind": "jsonl", "path": str(mixed_corpus)}
    manifest = execute(config_of(entry, long_rows={128: 0.25}, validation=0.2), context)
    assert row_lengths(manifest) == [32, 128]
    for split in ("train", "validation"):
        rows = open_lengths(context.folder("prepare"), "t", split)
        assert rows[128].rows > 0
        lengths = np.diff(np.flatnonzero(rows[128].take(range(rows[128].rows)).reshape(-1) == SEPARATOR))
        assert lengths.min() >= 64
        total = sum(corpus.tokens for corpus in rows.values())
        assert manifest["corpora"]["t"][split]["tokens"] == total
        assert abs(rows[128].tokens - 0.25 * total) < 2 * 400, "to within two documents"
    assert open_corpus(context.folder("prepare"), "t", "train").row_length == 32
    table = corpora_table(manifest)
    assert table is not None
    assert "rows of 32 and 128 tokens" in table.note


@pytest.mark.parametrize("death", [(Journal, "commit", 2), (Journal, "add", 4)])
def test_killed_work_with_long_rows_goes_on_to_the_same_bytes(
    tmp_path: Path,
    tiny_target: Path,
    mixed_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    death: tuple[type, str, int],
) -> None:
    config = config_of(
        {"name": "t", "kind": "jsonl", "path": str(mixed_corpus)}, long_rows={64: 0.2, 128: 0.2}
    )
    monkeypatch.setattr(build, "WINDOW_CHARS", 8000)
    expected = execute(config, context_of(tmp_path / "whole", tiny_target))
    monkeypatch.setattr(build, "BATCH_CHARS", 2000)
    monkeypatch.setattr(build, "COMMIT_CHARS", 4000)
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, *death, before=True)
        with pytest.raises(KeyboardInterrupt):
            execute(config, context_of(tmp_path / "killed", tiny_target))
    resumed = execute(config, context_of(tmp_path / "killed", tiny_target))
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert resumed["corpora"] == expected["corpora"]
    assert any("train.128-" in name for name in shards_of(tmp_path / "whole"))


def test_without_long_documents_there_are_no_long_rows_and_a_warning_says_so(
    tmp_path: Path, tiny_target: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(Console, "warn", lambda self, text: warnings.append(text))
    context = context_of(tmp_path / "run", tiny_target)
    manifest = execute(
        config_of({"name": "t", "kind": "jsonl", "path": str(small_corpus)}, long_rows={1024: 0.1}), context
    )
    assert any("0.0% of the tokens are in rows of 1024, 10.0% were asked for" in text for text in warnings)
    assert all("row_length" not in shard for shard in manifest["corpora"]["t"]["train"]["shards"])
    sampler = open_mixture(context.folder("prepare"), {"t": 1.0}, 0)
    assert sampler.row_length == 32
    assert sampler.names == ["t"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_rows": {16: 0.2}}, "must be longer than row_length"),
        ({"long_rows": {100: 0.2}}, "100 is no multiple of 32"),
        ({"long_rows": {64: 0.2, 96: 0.2}}, "96 is no multiple of 64"),
        ({"long_rows": {64: 0.5, 128: 0.5}}, "must leave some tokens"),
        ({"long_rows": {64: 0.0}}, "greater than 0"),
    ],
)
def test_impossible_lengths_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config_of({"name": "t", "kind": "jsonl", "path": "x"}, **changes)


def test_the_fingerprint_knows_long_rows_and_old_shards_still_fit(
    tmp_path: Path, tiny_target: Path, small_corpus: Path
) -> None:
    from fastdraft.stages import prepare

    entry = {"name": "t", "kind": "jsonl", "path": str(small_corpus)}
    context = context_of(tmp_path / "run", tiny_target)
    assert "long_rows" not in prepare.fingerprint(config_of(entry), context)
    mixed = config_of(entry, long_rows={64: 0.2})
    execute(mixed, context)
    assert not context.folder("prepare").differences(prepare.fingerprint(mixed, context))
    assert context.folder("prepare").differences(
        prepare.fingerprint(config_of(entry, long_rows={64: 0.3}), context)
    )


def test_pieces_of_long_documents_fill_long_rows() -> None:
    assert piece_chars(2048) == 20_000
    assert piece_chars(32_768) == 8 * 32_768


# ---- sampling


class Numbers(PackedCorpus):
    """A corpus without files whose rows hold their number."""

    def __init__(self, rows: int, row_length: int) -> None:
        super().__init__(Path("."), [{"file": "", "rows": rows}], row_length, "uint16")

    def shard(self, number: int) -> np.ndarray[Any, Any]:
        return np.repeat(np.arange(self.rows, dtype=np.uint16)[:, None], self.row_length + 1, 1)


MIXED = {"a": Numbers(80, 4), "a@16": Numbers(10, 16), "b": Numbers(30, 4)}
WEIGHTS = {"a": 0.4, "a@16": 0.2, "b": 0.4}


def test_every_number_of_a_mixture_of_lengths_is_as_many_tokens() -> None:
    sampler = MixtureSampler(MIXED, WEIGHTS, 0)
    assert sampler.row_length == 16
    for start, count in ((0, 1), (3, 7), (64, 64)):
        groups = sampler.groups(start, count)
        assert sum(rows.shape[0] * (rows.shape[1] - 1) for rows in groups) == count * 16
    assert sampler.num_rows("a") == 30
    assert sampler.num_rows("b") == 7


def test_each_length_is_walked_through_once_an_epoch_and_nothing_depends_on_the_cut() -> None:
    sampler = MixtureSampler(MIXED, WEIGHTS, 5)
    numbers = [name for name, _ in sampler.sources(0, 640)]
    last = [i for i, name in enumerate(numbers) if name == "a"][
        80 * 2 // 4 - 1
    ]  # 80 rows, four a number, two epochs
    rows = MixtureSampler({"a": MIXED["a"], "a@16": MIXED["a@16"]}, {"a": 1, "a@16": 1e-9}, 5).groups(0, 40)[
        -1
    ][:, 0]
    assert sorted(rows[:80].tolist()) == sorted(rows[80:160].tolist()) == list(range(80))
    assert last < 640
    whole = sampler.groups(0, 100)
    parts = [MixtureSampler(MIXED, WEIGHTS, 5).groups(start, 25) for start in (0, 25, 50, 75)]
    for length in (16, 4):
        pieces = [rows for part in parts for rows in part if rows.shape[1] == length + 1]
        (expected,) = (rows for rows in whole if rows.shape[1] == length + 1)
        assert (np.concatenate(pieces) == expected).all()


def test_lengths_that_do_not_fill_the_longest_are_refused() -> None:
    with pytest.raises(DataError, match="fill the longest exactly"):
        MixtureSampler({"a": Numbers(5, 4), "b": Numbers(5, 6)}, {"a": 1, "b": 1}, 0)


def test_every_step_has_the_same_tokens_and_every_micro_batch_one_length() -> None:
    source = PackedBatches(MixtureSampler(MIXED, WEIGHTS, 0), 20, 16, 6, 2)
    lengths = set()
    for step in range(20):
        batches = source.batches(step)
        assert sum(batch.num_tokens for batch in batches) == 6 * 16 == source.tokens / 20
        assert all(batch.num_tokens <= 2 * 16 for batch in batches)
        lengths |= {batch.input_ids.shape[1] for batch in batches}
        again = source.batches(step)
        assert all((a.input_ids == b.input_ids).all() for a, b in zip(batches, again, strict=True))
    assert lengths == {4, 16}


# ---- whole runs


def with_long_rows(recipe: Path, folder: str, **pretrain: Any) -> Path:
    value = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    text = recipe.parent / "text.jsonl"
    with open(text, "a", encoding="utf-8") as file:
        for i in range(60):
            file.write(
                json.dumps({"text": f"The long tale number {i} goes on about the river. " * 16}) + "\n"
            )
    value["prepare"] |= {"row_length": 32, "long_rows": {128: 0.3}}
    value["pretrain"] |= pretrain
    value["run"]["name"] = folder
    path = recipe.parent / f"{folder}.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


def test_a_run_trains_on_all_lengths_validates_each_and_goes_on_after_a_stop(tiny_recipe: Path) -> None:
    path = str(with_long_rows(tiny_recipe, "mixed"))
    whole = pipeline.run(load_recipe(path), only=("design", "prepare", "pretrain")).folder("pretrain")
    assert set(whole.manifest()["validation_loss"]) == {"text", "text@128", "code", "code@128"}
    assert whole.manifest()["tokens"] == 16 * 512
    recipe = load_recipe(path, ["run.name=stopped"])
    pipeline.run(recipe, only=("design", "prepare"))
    with pytest.raises(Interrupted):
        pipeline.run(recipe, StopAfter(7), only=("pretrain",))
    stopped = pipeline.run(recipe, only=("pretrain",)).folder("pretrain")
    assert weights_of(stopped.path / "checkpoint") == weights_of(whole.path / "checkpoint")


def test_check_refuses_rows_beyond_the_drafts_context_before_anything_is_prepared(tiny_recipe: Path) -> None:
    value = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    value["prepare"] |= {"row_length": 64, "long_rows": {512: 0.2}}
    tiny_recipe.write_text(yaml.safe_dump(value), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"prepare.long_rows: 512: must be at most the draft's context of 256"
    ):
        check.run(load_recipe(str(tiny_recipe)), Console(quiet=True))
