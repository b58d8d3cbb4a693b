"""Temperature, top-k and top-p: what they keep, what they remove, and how they agree with transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdraft.functional.sampling import draw, mask_ids, precise, probabilities, token_at, warp


def test_temperature_zero_is_one_hot_at_the_argmax() -> None:
    probs = probabilities(torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 1.0]]), 0)
    assert probs.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_warp_refuses_temperature_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        warp(torch.zeros(3), 0.0)


def test_top_k_keeps_k_tokens_and_all_ties_at_the_last_place() -> None:
    for logits, kept in (([4.0, 3.0, 2.0, 1.0], 2), ([4.0, 3.0, 3.0, 1.0], 3)):
        found = probabilities(torch.tensor(logits), 1.0, top_k=2) > 0
        assert found.tolist() == [place < kept for place in range(4)]
    assert (probabilities(torch.tensor([4.0, 3.0]), 1.0, top_k=9) > 0).all()


def test_top_p_keeps_the_smallest_set_that_holds_the_mass() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert (probabilities(logits, 1.0, top_p=0.5) > 0).tolist() == [False, True, False]
    assert (probabilities(logits, 1.0, top_p=0.7) > 0).tolist() == [False, True, True]
    assert (probabilities(logits, 1.0, top_p=1.0) > 0).all()


def test_order_is_temperature_then_top_k_then_top_p_as_in_transformers() -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(64, 50) * 3
    reference = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)]
    )(None, logits.clone())
    assert torch.allclose(probabilities(logits, 0.7, 12, 0.8), reference.softmax(-1), atol=1e-6)


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(4, 9)
    before = logits.clone()
    probabilities(logits, 0.5, 3, 0.5)
    probabilities(logits, 1.0, 3)
    assert torch.equal(logits, before)


def test_masked_ids_have_no_probability_and_are_never_the_argmax() -> None:
    logits = mask_ids(torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([1]))
    assert probabilities(logits, 0).tolist() == [[0, 0, 1]]
    assert probabilities(logits, 1.0)[0, 1] == 0
    assert mask_ids(logits, None) is logits


def test_draw_follows_the_probabilities_and_the_seed() -> None:
    probs = torch.tensor([[0.2, 0.8], [1.0, 0.0]]).repeat(2000, 1, 1)
    first, second = (draw(probs, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2000, 2)
    assert first[:, 1].sum() == 0
    assert abs(float(first[:, 0].float().mean()) - 0.8) < 0.04


def test_draw_never_gives_a_token_without_probability() -> None:
    probs = torch.tensor([0.0, 1e-3, 0.0, 1e-7, 0.0]).repeat(5000, 1)
    assert set(draw(probs, torch.Generator().manual_seed(0)).tolist()) <= {1, 3}


def test_rare_tokens_of_a_large_vocabulary_keep_their_places() -> None:
    """In float32 a cumulated sum near 1 moves in steps of 6e-8: of these tokens only every sixth could be
    drawn.
    """
    rare, count = 1e-8, 100_000
    probs = torch.full((count + 1,), rare)
    probs[0] = 1 - rare * count
    places = torch.arange(1, count + 1, 997)
    exact = probs.double()
    middles = (exact.cumsum(-1)[places] - exact[places] / 2) / exact.sum()
    assert torch.equal(token_at(probs.expand(len(places), -1), middles), places)


def test_devices_without_float64_are_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_fp64, wanted in ((True, torch.float64), (False, torch.float32)):
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda device, has=has_fp64: SimpleNamespace(has_fp64=has)
        )
        assert precise(torch.device("xpu", int(has_fp64))) is wanted
    assert precise(torch.device("mps")) is torch.float32
    assert precise(torch.device("cpu")) is torch.float64
