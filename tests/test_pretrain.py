"""The stages pretrain and continue_pretrain over a hand-made prepared corpus."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastdraft.console import Console
from fastdraft.data.mixture import open_mixture
from fastdraft.errors import DataError, Interrupted, RecipeError
from fastdraft.recipe.base import Config, load_config
from fastdraft.recipe.run import RunConfig
from fastdraft.recipe.training import ContinuePretrainConfig, PretrainConfig
from fastdraft.run_folder import RunFolder, digest, file_sha256, write_json
from fastdraft.stages import pretrain
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.training.metrics import read_metrics

LENGTH = 16
SETTINGS: dict[str, Any] = {
    "tokens": 64 * 10,
    "batch_tokens": 64,
    "checkpoint_every": 2,
    "validate_every": 5,
    "optimizer": {"kind": "adamw", "learning_rate": 0.01},
    "schedule": {"kind": "wsd", "warmup": 0.1, "decay": 0.3},
}


def write_prepared(folder: Path, rows: dict[str, int], validation_rows: int = 4) -> None:
    """A finished prepare artifact: each corpus counts upwards in steps of its own, so that it can be
    learned.
    """
    corpora: dict[str, Any] = {}
    for number, (name, count) in enumerate(rows.items()):
        corpora[name] = {}
        for split, size in (("train", count), ("validation", validation_rows)):
            starts = np.arange(size)[:, None] * 7
            ids = 4 + (starts + (number + 1) * np.arange(LENGTH + 1)[None, :]) % 290
            file = folder / name / f"{split}-00000.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            ids.astype("<u2").tofile(file)
            shards = [{"file": file.name, "rows": size, "sha256": file_sha256(file)}] if size else []
            sizes = {"rows": size, "tokens": size * (LENGTH + 1), "documents": size}
            corpora[name][split] = {**sizes, "shards": shards}
    write_json(folder / "fingerprint.json", {"rows": rows})
    facts = {"row_length": LENGTH, "dtype": "uint16", "separator_id": 0, "corpora": corpora}
    write_json(folder / "manifest.json", {"schema": 1, "stage": "prepare", "fingerprint": "x", **facts})


def make_context(
    root: Path, draft: Path, sections: dict[str, Config], rows: dict[str, int] | None = None
) -> StageContext:
    """A run whose design and prepare are done."""
    if not (root / "design").exists():
        shutil.copytree(draft, root / "design/draft")
        write_json(root / "design/fingerprint.json", {"shape": "tiny"})
        facts = {"schema": 1, "stage": "design", "fingerprint": "x", "shape_digest": "shape"}
        write_json(root / "design/manifest.json", facts)
        write_prepared(root / "prepare", rows or {"text": 30, "code": 30})
    settings = RunConfig(name=root.name, folder=str(root.parent), device="cpu", threads=1, precision="fp32")
    return StageContext(RunFolder(root), settings, Target.at(draft), sections, Console(quiet=True))


def run_stage(context: StageContext, name: pretrain.Name) -> dict[str, Any]:
    config = context.section(name)
    context.folder(name).begin(pretrain.fingerprint(config, context, name))
    pretrain.run(config, context, name)
    return context.folder(name).manifest()


@pytest.fixture
def new_context(tmp_path: Path, tiny_draft: Path) -> Any:
    def make(name: str = "run", rows: dict[str, int] | None = None, **changes: Any) -> StageContext:
        later = {**SETTINGS, **changes, "mixture": {"code": 2, "text": 1}}
        sections: dict[str, Config] = {
            "pretrain": load_config(PretrainConfig, {**SETTINGS, **changes}),
            "continue_pretrain": load_config(ContinuePretrainConfig, later),
        }
        return make_context(tmp_path / name, tiny_draft, sections, rows)

    return make


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_pretrain_lowers_the_validation_loss_and_leaves_complete_model_folders(new_context: Any) -> None:
    context = new_context(tokens=64 * 60)
    manifest = run_stage(context, "pretrain")
    records = read_metrics(context.folder("pretrain").path)
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert losses[-1]["text"] < losses[0]["text"]
    assert set(losses[0]) == {"text", "code"}
    assert (manifest["steps"], manifest["tokens"]) == (60, 64 * 60)
    assert manifest["validation_loss"] == losses[-1]
    settings = manifest["settings"]
    assert (settings["learning_rate"], settings["precision"]) == (0.01, "fp32")
    for name in ("checkpoint", "undecayed"):
        files = {path.name for path in (context.folder("pretrain").path / name).iterdir()}
        assert files >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert not (context.folder("pretrain").path / "steps").exists()


def test_continue_pretrain_starts_from_the_undecayed_weights_unless_told_otherwise(new_context: Any) -> None:
    context = new_context()
    run_stage(context, "pretrain")
    before = context.folder("pretrain").path
    assert weights_of(before / "undecayed") != weights_of(before / "checkpoint")
    config = context.section("continue_pretrain")
    assert pretrain._start_folder(config, context, "continue_pretrain") == before / "undecayed"
    decayed = config.model_copy(update={"start": "decayed"})
    assert pretrain._start_folder(decayed, context, "continue_pretrain") == before / "checkpoint"
    assert run_stage(context, "continue_pretrain")["steps"] == 10


def test_continue_pretrain_without_a_pretrain_section_starts_from_the_design(
    tmp_path: Path, tiny_draft: Path
) -> None:
    config = load_config(ContinuePretrainConfig, SETTINGS)
    context = make_context(tmp_path / "run", tiny_draft, {"continue_pretrain": config})
    assert pretrain._start_folder(config, context, "continue_pretrain") == tmp_path / "run/design/draft"
    assert pretrain.fingerprint(config, context, "continue_pretrain")["start"] == "shape"


def test_undecayed_weights_that_pretrain_never_kept_are_refused(new_context: Any) -> None:
    context = new_context(schedule={"kind": "cosine"})
    run_stage(context, "pretrain")
    with pytest.raises(RecipeError, match="set start: decayed"):
        run_stage(context, "continue_pretrain")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_stopped_and_rerun_stage_ends_bit_for_bit_like_an_undisturbed_one(
    new_context: Any, kind: str
) -> None:
    optimizer = {"kind": kind, "learning_rate": 0.01}
    first, second = new_context("a", optimizer=optimizer), new_context("b", optimizer=optimizer)
    run_stage(first, "pretrain")
    config, rounds = second.section("pretrain"), 0
    second.folder("pretrain").begin(pretrain.fingerprint(config, second, "pretrain"))
    while not second.folder("pretrain").is_complete():
        stopping = dataclasses.replace(second, console=StopAfter(3))
        rounds += 1
        with contextlib.suppress(Interrupted):
            pretrain.run(config, stopping, "pretrain")
    assert rounds == 4
    for name in ("checkpoint", "undecayed"):
        found, expected = (context.folder("pretrain").path / name for context in (second, first))
        assert weights_of(found) == weights_of(expected)


class StopAfter(Console):
    """A console through which the user asks to stop after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(quiet=True)
        self.left = steps

    @contextlib.contextmanager
    def progress(self, *arguments: Any, **options: Any) -> Any:
        def advance(amount: float = 1, note: str = "") -> None:
            self.left -= 1
            self.stop.requested = self.left <= 0

        yield SimpleNamespace(advance=advance)


def test_the_micro_batch_may_change_half_way_without_losing_or_doubling_a_row(new_context: Any) -> None:
    """Only the order of sums changes: same rows at the same steps, losses equal to rounding."""
    first, second, smaller = new_context("a"), new_context("b"), new_context("b", micro_batch_tokens=16)
    run_stage(first, "pretrain")
    second.folder("pretrain").begin(pretrain.fingerprint(second.section("pretrain"), second, "pretrain"))
    with pytest.raises(Interrupted):
        pretrain.run(
            second.section("pretrain"), dataclasses.replace(second, console=StopAfter(5)), "pretrain"
        )
    assert run_stage(smaller, "pretrain")["settings"]["micro_batch_tokens"] == 16
    records = (read_metrics(context.folder("pretrain").path) for context in (first, smaller))
    whole, parts = ([record for record in found if "loss" in record] for found in records)
    for key in ("step", "tokens", "lr"):
        assert [record[key] for record in whole] == [record[key] for record in parts]
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in parts], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"rows": {"text": 3, "code": 30}},
            DataError,
            r"pretrain\.mixture\.text: 3 rows of 16 tokens; .* 4 rows",
        ),
        ({"batch_tokens": 8}, RecipeError, "must hold one row of 16 tokens"),
    ],
)
def test_too_few_rows_for_a_batch_and_a_batch_below_a_row_are_refused(
    new_context: Any, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        run_stage(new_context(**changes), "pretrain")


def test_a_corpus_read_too_often_is_warned_about(
    new_context: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(new_context(rows={"text": 8, "code": 8}), "pretrain")
    assert "read 5.0 times" in capsys.readouterr().err


def test_corpora_without_validation_rows_give_no_validation_loss(tmp_path: Path, new_context: Any) -> None:
    context = new_context()
    shutil.rmtree(context.folder("prepare").path)
    write_prepared(context.folder("prepare").path, {"text": 30}, validation_rows=0)
    assert run_stage(context, "pretrain")["validation_loss"] == {}


def test_the_fingerprint_holds_what_the_weights_depend_on_and_nothing_else(new_context: Any) -> None:
    context = new_context()
    base = pretrain.fingerprint(context.section("pretrain"), context, "pretrain")
    assert base["start"] == "shape"
    assert json.loads(json.dumps(base)) == base
    same: list[Any] = [{"micro_batch_tokens": 16}, {"checkpoint_every": 3}, {"validate_every": 1}]
    other: list[Any] = [{"tokens": 640 * 2}, {"batch_tokens": 32}, {"mixture": {"text": 1, "code": 1}}]
    for change in (*same, *other):
        config = load_config(PretrainConfig, {**SETTINGS, **change})
        found = digest(pretrain.fingerprint(config, context, "pretrain"))
        assert (found == digest(base)) == (change in same)


def test_continue_pretrain_does_not_meet_rows_in_the_order_in_which_pretrain_did(
    new_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def watched(prepare: Any, weights: Any, rows: int, seed: int) -> Any:
        seeds.append(seed)
        return open_mixture(prepare, weights, rows, seed)

    monkeypatch.setattr(pretrain, "open_mixture", watched)
    context = new_context()
    run_stage(context, "pretrain")
    run_stage(context, "continue_pretrain")
    assert len(set(seeds)) == 2
