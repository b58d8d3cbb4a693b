"""Log-probs added by a teacher-forced pass are those that were recorded when the text was drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fastdraft.decoding.autoregressive import generate_batch
from fastdraft.decoding.scoring import ScoringEngine, score
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.target import Target

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44], [100]]


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> PreTrainedModel:
    return Target.at(tiny_target).model("cpu")


def write(model: PreTrainedModel, sampling: Sampling) -> list[Generation]:
    return generate_batch(model, PROMPTS, sampling, 12, {3}, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.6), Sampling(0.8, top_k=7), Sampling(0.9, top_p=0.7), Sampling(0.7, 20, 0.9)],
)
def test_scored_log_probs_are_those_recorded_while_writing(
    model: PreTrainedModel, sampling: Sampling
) -> None:
    written = write(model, sampling)
    forgotten = [replace(g, logprobs=[math.nan] * len(g.logprobs)) for g in written]
    for scored, recorded in zip(score(model, forgotten, sampling, batch_tokens=32), written, strict=True):
        assert (scored.prompt_ids, scored.response_ids) == (recorded.prompt_ids, recorded.response_ids)
        assert scored.logprobs == pytest.approx(recorded.logprobs, abs=2e-4)


def test_a_token_outside_the_kept_ones_has_no_probability(model: PreTrainedModel) -> None:
    written = write(model, Sampling(1.0))[:1]
    best = int(model(torch.tensor([written[0].prompt_ids])).logits[0, -1].argmax())
    other = replace(written[0], response_ids=[(best + 1) % 320])
    assert score(model, [other], Sampling(1.0, top_k=1))[0].logprobs == [-math.inf]


def test_an_engine_is_given_the_models_log_probs(model: PreTrainedModel) -> None:
    class Writer:
        name = "writer"

        def generate(
            self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
        ) -> list[Generation]:
            return [replace(g, logprobs=[math.nan] * len(g.response_ids)) for g in write(model, sampling)]

    engine = ScoringEngine(Writer(), model)
    assert engine.name == "writer"
    found = engine.generate(PROMPTS, Sampling(0.8), 12, 0)
    assert [g.logprobs for g in found] == [
        pytest.approx(g.logprobs, abs=2e-4) for g in write(model, Sampling(0.8))
    ]
