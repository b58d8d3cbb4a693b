"""Logits on disk: size, error against whole distributions, a file tied to its unit, kills between a unit and its logits."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.data import sparse_logits as stored_logits
from fastdraft.data.rows import read_all, read_rows, unit_paths
from fastdraft.data.sparse_logits import (
    SparseLogits,
    StoredLogits,
    logits_path,
    read_with_logits,
    record_type,
    rows_digest,
    write_sparse_logits,
)
from fastdraft.decoding import logit_writer
from fastdraft.decoding.logit_writer import LogitWriter, sparse_logits
from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.functional.distillation import SparseTarget, top_k_buckets
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.run_folder import StageFolder
from fastdraft.target import Target


def made(tokens: int, k: int, vocab_size: int, seed: int = 0) -> SparseLogits:
    rng = np.random.default_rng(seed)
    ids = (
        np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(tokens)])
        if tokens
        else np.zeros((0, k))
    )
    return SparseLogits(
        ids.astype(np.int32), np.log(rng.dirichlet(np.ones(k + 1), tokens) + 1e-9).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("vocab_size", "size"),
    [(320, 258), (8192, 258), (32_064, 258), (65_536, 258), (128_256, 266), (262_144, 274)],
)
def test_64_kept_tokens_take_less_than_300_bytes(tmp_path: Path, vocab_size: int, size: int) -> None:
    assert record_type(64, vocab_size).itemsize == size < 300
    path = tmp_path / "unit-00000.logits.safetensors"
    write_sparse_logits(path, made(1000, 64, vocab_size), vocab_size, "rows")
    assert path.stat().st_size < 1000 * size + 300


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), k=st.integers(1, 9), bits=st.integers(4, 20), seed=st.integers(0, 99))
def test_any_slice_reads_back_ids_exactly_and_log_probs_to_half_precision(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, k: int, bits: int, seed: int
) -> None:
    path, vocab_size, draw = (
        tmp_path_factory.mktemp("l") / "u.logits.safetensors",
        2**bits - 3,
        random.Random(seed),
    )
    logits = made(tokens, k, vocab_size, seed)
    write_sparse_logits(path, logits, vocab_size, "rows")
    start, stop = sorted((draw.randint(0, tokens), draw.randint(0, tokens)))
    found = StoredLogits(path).read(start, stop)
    np.testing.assert_array_equal(found.ids, logits.ids[start:stop])
    np.testing.assert_allclose(found.logprobs, logits.logprobs[start:stop], rtol=1e-3, atol=1e-6)
    facts = StoredLogits(path).facts
    assert len(facts.pop("sha256")) == 64
    assert facts == {"tokens": tokens, "k": k, "vocab_size": vocab_size, "rows": "rows"}


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 30.0])
def test_what_is_stored_is_the_bucketed_distribution_to_a_millionth_of_a_nat(
    tmp_path: Path, sharpness: float
) -> None:
    path, logits = (
        tmp_path / "u.logits.safetensors",
        sharpness * torch.randn(500, 8192, generator=torch.Generator().manual_seed(0)),
    )
    exact = top_k_buckets(logits.double(), 64)
    write_sparse_logits(
        path, SparseLogits(exact.ids.int().numpy(), exact.logprobs.float().numpy()), 8192, "rows"
    )
    read = StoredLogits(path).read(0, 500)
    found = (
        SparseTarget(torch.from_numpy(read.ids), torch.from_numpy(read.logprobs))
        .normalized()
        .logprobs.double()
    )
    divergence = (exact.logprobs.exp() * (exact.logprobs - found)).sum(-1)
    assert divergence.mean() < 1e-6
    assert divergence.max() < 1e-5
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(500, dtype=torch.float64), rtol=1e-5, atol=0)
    assert (found.exp() - exact.logprobs.exp()).abs().sum(-1).max() / 2 < 1e-3


def test_probabilities_too_small_for_half_precision_stay_finite(tmp_path: Path) -> None:
    path = tmp_path / "u.logits.safetensors"
    write_sparse_logits(
        path, SparseLogits(np.array([[4]], np.int32), np.array([[0, -1e30]], np.float32)), 8, "rows"
    )
    assert StoredLogits(path).read(0, 1).logprobs.tolist() == [[0.0, -1e4]]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return Target.at(tiny_target).model("cpu")


class Folder:
    """Recipes and runs in one folder; design and prepare are done once and copied into every run."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root, self.target, self.number = root, target, 0
        self.prepared = pipeline.run(self.recipe(), only=("design", "prepare")).root

    def recipe(self, **changes: object) -> Recipe:
        self.number += 1
        value = yaml.safe_load(write_recipe(self.root, self.target).read_text(encoding="utf-8"))
        value["run"]["name"] = f"run-{self.number}"
        value["synthesize"]["prompts"].pop(1)
        value["synthesize"].update(
            {"tokens": 400, "batch_rows": 8, "logits": {"kind": "top_k", "k": 16}, **changes}
        )
        path = self.root / f"recipe-{self.number}.yaml"
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        return load_recipe(str(path))

    def run(self, recipe: Recipe) -> StageFolder:
        for stage in ("design", "prepare"):
            if not (recipe.run.root / stage).exists():
                shutil.copytree(self.prepared / stage, recipe.run.root / stage)
        return pipeline.run(recipe, only=["synthesize"]).folder("synthesize")


@pytest.fixture(scope="module")
def folder(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("logits"), tiny_target)


@pytest.fixture(scope="module")
def written(folder: Folder) -> StageFolder:
    """A finished stage with logits; tests only read it."""
    return folder.run(folder.recipe())


def contents(artifact: StageFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (artifact.path / "units").iterdir()}


def test_every_unit_has_its_logits_and_every_token_its_record(written: StageFolder) -> None:
    assert written.manifest()["logits"] == {"kind": "top_k", "k": 16}
    for path in unit_paths(written):
        facts = StoredLogits(logits_path(path)).facts
        rows = read_rows(path)
        assert facts["tokens"] == sum(len(row.response_ids) for row in rows)
        assert (facts["k"], facts["vocab_size"], facts["rows"]) == (
            16,
            320,
            rows_digest([row.row_id for row in rows]),
        )


def test_a_rows_logits_are_the_targets_own_at_temperature_1_with_no_id_masked(
    written: StageFolder, target: PreTrainedModel
) -> None:
    placed = list(read_with_logits(written))
    assert [row.row_id for row, _ in placed] == [row.row_id for row in read_all(written)]
    padding_ids_seen = False
    for row, logits in placed:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        with torch.inference_mode():
            raw = target(ids).logits[0, len(row.prompt_ids) - 1 : -1].float()
        expected = top_k_buckets(raw, 16)
        found = logits.read(0, len(row.response_ids))
        assert np.array_equal(np.sort(found.ids), np.sort(expected.ids.numpy()))
        np.testing.assert_allclose(found.logprobs[:, -1], expected.logprobs[:, -1], atol=2e-2)
        np.testing.assert_allclose(found.logprobs.max(1), expected.logprobs.max(-1).values, atol=2e-2)
        np.testing.assert_array_equal(logits.read(1, 3).ids, found.ids[1:3])
        padding_ids_seen |= bool((found.ids >= 300).any())
    assert padding_ids_seen, (
        "the tiny target gives its 20 padding ids a share; it must not be taken from them"
    )


def test_scoring_in_small_batches_gives_the_same_rows(written: StageFolder, target: PreTrainedModel) -> None:
    rows = list(read_all(written))[:9]
    for one, other in zip(
        sparse_logits(target, rows, 8), sparse_logits(target, rows, 8, batch_tokens=1), strict=True
    ):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
        assert (one.ids == other.ids).mean() > 0.99


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_between_a_unit_and_its_logits_resumes_to_the_very_files_of_an_undisturbed_run(
    folder: Folder, written: StageFolder, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    recipe, real, calls = folder.recipe(), logit_writer.write_sparse_logits, 0

    def killed(path: Path, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0 and moment == "before":
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, *arguments)  # type: ignore[arg-type]
        if calls % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(logit_writer, "write_sparse_logits", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            folder.run(recipe)
    monkeypatch.setattr(logit_writer, "write_sparse_logits", real)
    assert contents(folder.run(recipe)) == contents(written)


def test_finished_logits_are_not_made_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = folder.recipe()
    artifact = folder.run(recipe)
    (artifact.path / "manifest.json").unlink()
    before = contents(artifact)
    monkeypatch.setattr(logit_writer, "sparse_logits", lambda *_: pytest.fail("scored again"))
    assert contents(folder.run(recipe)) == before


def test_without_logits_nothing_is_scored_and_the_fingerprint_is_as_before_there_was_a_choice(
    folder: Folder,
) -> None:
    artifact = folder.run(folder.recipe(logits={"kind": "none"}))
    assert all(path.suffix == ".parquet" for path in (artifact.path / "units").iterdir())
    assert "logits" not in artifact.stored_fingerprint()["settings"]
    assert artifact.manifest()["logits"] == {"kind": "none"}


def test_logits_of_other_rows_are_refused(written: StageFolder, tmp_path: Path) -> None:
    artifact = StageFolder(shutil.copytree(written.path, tmp_path / "synthesize"))
    full = [path for path in unit_paths(artifact) if read_rows(path)]
    shutil.copyfile(logits_path(full[0]), logits_path(full[1]))
    with pytest.raises(FastDraftError, match="belongs to other rows"):
        list(read_with_logits(artifact))


def test_missing_and_damaged_files_are_the_users_error_whatever_bytes_they_hold(
    written: StageFolder, tmp_path: Path
) -> None:
    path = logits_path(next(path for path in unit_paths(written) if read_rows(path)))
    whole, draw, damaged = path.read_bytes(), random.Random(0), tmp_path / "u.logits.safetensors"
    versions = [b"", b"junk", whole[:40], whole[:-7], whole + b"x", whole.replace(b'k\\": 16', b'k\\": 99')]
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(170)] = draw.randrange(256)
        versions.append(bytes(content))
    for version in versions:
        damaged.write_bytes(version)
        stored = StoredLogits(damaged)
        with contextlib.suppress(FastDraftError):
            stored.read(0, stored.facts["tokens"])
    with pytest.raises(FastDraftError, match="missing"):
        StoredLogits(tmp_path / "nowhere").read(0, 1)
    with pytest.raises(FastDraftError, match="asked for"):
        StoredLogits(path).read(0, 10**6)


def test_a_k_that_leaves_no_tail_is_refused(folder: Folder) -> None:
    with pytest.raises(RecipeError, match=r"synthesize\.logits\.k: 320: must be below the 320 ids"):
        folder.run(folder.recipe(logits={"kind": "top_k", "k": 320}))


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(
    written: StageFolder, tiny_target: Path, tmp_path: Path
) -> None:
    broken = Target.at(tiny_target).model("cpu")
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    unit = next(path for path in unit_paths(written) if read_rows(path))
    copy = Path(shutil.copy(unit, tmp_path / unit.name))
    with pytest.raises(TargetError, match="not finite"):
        LogitWriter(broken, 8).write(copy)
    assert not logits_path(copy).exists()


def test_a_record_has_no_gaps() -> None:
    for k, vocab_size in ((1, 300), (7, 70_000), (64, 1_000_000)):
        high = stored_logits.record_type(k, vocab_size)["high_bits"].itemsize
        assert record_type(k, vocab_size).itemsize == 4 * k + 2 + high
