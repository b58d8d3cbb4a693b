"""Logits beside the rows: size on disk, error against whole distributions, slices, the scoring pass."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from fastdraft.data.rows import SyntheticRow
from fastdraft.data.sparse_logits import SparseLogits, read_sparse_logits, write_sparse_logits
from fastdraft.errors import TargetError
from fastdraft.functional.distillation import SparseTarget, top_k_buckets
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.runtimes.synthesis import sparse_logits, unit_logits
from fastdraft.target import Target


def made(tokens: int, k: int, vocab_size: int, seed: int = 0) -> SparseLogits:
    rng = np.random.default_rng(seed)
    ids = [rng.choice(vocab_size, k, replace=False) for _ in range(tokens)] or np.zeros((0, k))
    logprobs = np.log(rng.dirichlet(np.ones(k + 1), tokens) + 1e-9)
    return SparseLogits(np.asarray(ids, np.int32), logprobs.astype(np.float32))


@pytest.mark.parametrize(("vocab_size", "size"), [(320, 258), (65_536, 258), (65_537, 386), (262_144, 386)])
def test_a_kept_distribution_takes_few_bytes(tmp_path: Path, vocab_size: int, size: int) -> None:
    write_sparse_logits(tmp_path / "u", made(1000, 64, vocab_size), vocab_size)
    assert (tmp_path / "u").stat().st_size < 1000 * size + 300


def test_equal_logits_make_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write_sparse_logits(tmp_path / name, made(20, 8, 300), 300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 20), k=st.integers(1, 9), bits=st.integers(4, 20), seed=st.integers(0, 99))
def test_any_slice_reads_back_ids_exactly_and_log_probs_to_half_precision(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, k: int, bits: int, seed: int
) -> None:
    path, vocab_size, draw = tmp_path_factory.mktemp("l") / "u", 2**bits - 3, random.Random(seed)
    logits = made(tokens, k, vocab_size, seed)
    write_sparse_logits(path, logits, vocab_size)
    start, stop = sorted((draw.randint(0, tokens), draw.randint(0, tokens)))
    found = read_sparse_logits(path, start, stop)
    np.testing.assert_array_equal(found.ids, logits.ids[start:stop])
    np.testing.assert_allclose(found.logprobs, logits.logprobs[start:stop], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 30.0])
def test_what_is_stored_is_the_bucketed_distribution_to_a_millionth_of_a_nat(
    tmp_path: Path, sharpness: float
) -> None:
    logits = sharpness * torch.randn(500, 8192, generator=torch.Generator().manual_seed(0))
    exact = top_k_buckets(logits.double(), 64)
    kept = SparseLogits(exact.ids.int().numpy(), exact.logprobs.float().numpy())
    write_sparse_logits(tmp_path / "u", kept, 8192)
    read = read_sparse_logits(tmp_path / "u", 0, 500)
    target = SparseTarget(torch.from_numpy(read.ids), torch.from_numpy(read.logprobs))
    found = target.normalized().logprobs.double()
    divergence = (exact.logprobs.exp() * (exact.logprobs - found)).sum(-1)
    assert divergence.mean() < 1e-6
    assert divergence.max() < 1e-5
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(500, dtype=torch.float64), rtol=1e-5, atol=0)
    assert (found.exp() - exact.logprobs.exp()).abs().sum(-1).max() / 2 < 1e-3


def test_probabilities_too_small_for_half_precision_stay_finite(tmp_path: Path) -> None:
    tiny = SparseLogits(np.array([[4]], np.int32), np.array([[0, -1e30]], np.float32))
    write_sparse_logits(tmp_path / "u", tiny, 8)
    assert read_sparse_logits(tmp_path / "u", 0, 1).logprobs.tolist() == [[0.0, -1e4]]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return Target.at(tiny_target).model("cpu")


ROWS = [
    SyntheticRow.of(Generation([5, 6, 7 + i], [8] * (1 + i % 5) + [3], [], "stop"), "s", Sampling(0.0))
    for i in range(9)
]


def test_a_rows_logits_are_the_targets_own_at_temperature_1_with_no_id_masked(
    target: PreTrainedModel,
) -> None:
    padding_ids_seen = False
    for row, found in zip(ROWS, sparse_logits(target, ROWS, 16), strict=True):
        with torch.inference_mode():
            raw = target(torch.tensor([row.prompt_ids + row.response_ids])).logits[0]
        expected = top_k_buckets(raw[len(row.prompt_ids) - 1 : -1].float(), 16)
        assert np.array_equal(np.sort(found.ids), np.sort(expected.ids.numpy()))
        np.testing.assert_allclose(found.logprobs[:, -1], expected.logprobs[:, -1], atol=1e-3)
        padding_ids_seen |= bool((found.ids >= 300).any())
    assert padding_ids_seen, "the tiny target gives its padding ids a share; it must not be taken from them"


def test_scoring_in_small_batches_gives_the_same_rows(target: PreTrainedModel) -> None:
    whole, pieces = sparse_logits(target, ROWS, 8), sparse_logits(target, ROWS, 8, batch_tokens=1)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
        assert (one.ids == other.ids).mean() > 0.99


def test_a_unit_is_its_rows_one_behind_the_other_and_numbers_that_are_not_finite_are_refused(
    tiny_target: Path,
) -> None:
    model = Target.at(tiny_target).model("cpu")
    assert len(unit_logits(model, ROWS, 8)) == sum(len(row.response_ids) for row in ROWS)
    assert unit_logits(model, [], 8).ids.shape == (0, 8)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(TargetError, match="not finite"):
        unit_logits(model, ROWS, 8)
