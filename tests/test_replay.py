"""Replay against the exact decoder: equal counts when greedy, equal expectation when sampled, one pass for
every K.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastdraft.console import Console
from fastdraft.data.chat import ChatTemplate
from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding import replay as module
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.replay import accept_probabilities, length_batches, replay
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.evaluation.tasks import EncodedTask
from fastdraft.evaluation.work import EvaluationWork, TextWorker, exact_runs
from fastdraft.functional.acceptance import add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import probabilities
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.evaluation import EvaluateConfig
from fastdraft.run_folder import StageFolder
from fastdraft.workers import LocalWorkers

VOCABULARY = Vocabulary(320, 300, tuple(range(300, 320)), 0, (3,), 0, "")


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 300, (2 + i % 9,), generator=generator).tolist() for i in range(count)]


def written(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    sampling: Sampling,
    count: int,
    *,
    k: int = 3,
    draft_temperature: float | None = None,
) -> tuple[list[SyntheticRow], list]:
    decoder = SpeculativeDecoder(
        ReadableModel(target), ReadableModel(draft), VOCABULARY, k, draft_temperature
    )
    results = exact_runs(decoder, prompts(count), sampling, 20, seed=1)
    return [SyntheticRow.of(result.generation, "test", sampling) for result in results], [
        result.counts for result in results
    ]


def whole(counts) -> list[float]:
    c = counts
    proposals = [c.num_drafts, c.num_draft_tokens, c.num_accepted_tokens, c.num_examined_tokens]
    return [*proposals, c.num_generated_tokens, *c.num_accepted_tokens_per_pos]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_replay_of_greedy_text_gives_the_very_counts_of_the_run(
    target: PreTrainedModel, near: PreTrainedModel, k: int
) -> None:
    rows, exact = written(target, near, Sampling(0.0), 6, k=k)
    found = replay(near, rows, [k], VOCABULARY)
    assert [whole(counts[k]) for counts in found] == [whole(counts) for counts in exact]
    assert 0.1 < add_counts(exact).conditional_acceptance_rate < 0.98


@pytest.mark.parametrize(
    ("sampling", "draft_temperature"),
    [
        (Sampling(1.0), None),
        (Sampling(0.7, top_k=30, top_p=0.9), None),
        (Sampling(1.0), 0.0),
        (Sampling(1.0), 0.6),
    ],
)
def test_replay_of_sampled_text_gives_the_expected_counts_of_the_run(
    target: PreTrainedModel, near: PreTrainedModel, sampling: Sampling, draft_temperature: float | None
) -> None:
    rows, exact = written(target, near, sampling, 60, draft_temperature=draft_temperature)
    found = [counts[3] for counts in replay(near, rows, [3], VOCABULARY, draft_temperature)]
    gaps = np.array([e.num_drafts - r.num_drafts for e, r in zip(exact, found, strict=True)])
    assert abs(gaps.mean()) <= 3.5 * gaps.std() / len(gaps) ** 0.5 + 1e-9
    assert add_counts(found).acceptance_rate == pytest.approx(add_counts(exact).acceptance_rate, abs=0.06)
    assert add_counts(found).num_generated_tokens == add_counts(exact).num_generated_tokens


def test_accept_probabilities_are_the_smaller_of_one_and_draft_over_target(
    target: PreTrainedModel, near: PreTrainedModel
) -> None:
    sampling = Sampling(0.8, top_k=40)
    rows, _ = written(target, near, sampling, 3)
    found = accept_probabilities(near, rows, VOCABULARY)
    for row, accept in zip(rows, found, strict=True):
        with torch.inference_mode():
            logits = near(torch.tensor([row.prompt_ids + row.response_ids])).logits.clone()
            logits[:, :, 300:] = -torch.inf
        probs = probabilities(logits[0, len(row.prompt_ids) - 1 : -1], 0.8, 40)
        draft_probs = probs.gather(-1, torch.tensor(row.response_ids)[:, None]).squeeze(-1).numpy()
        assert np.allclose(accept, np.minimum(1, draft_probs / np.exp(row.logprobs)), atol=1e-3)


def test_padding_ids_are_never_accepted(target: PreTrainedModel, near: PreTrainedModel) -> None:
    for temperature in (0.0, 1.0):
        row = SyntheticRow("", "", "", [5, 6], [310, 7, 319], [-0.5] * 3, temperature, 0, 1.0, "length")
        accept = accept_probabilities(near, [row], VOCABULARY)[0]
        assert accept[0] == accept[2] == 0


def test_a_row_counts_the_same_whatever_it_is_batched_with(
    target: PreTrainedModel, near: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = written(target, near, Sampling(1.0), 9)
    together = replay(near, rows, [1, 4], VOCABULARY)
    monkeypatch.setitem(module.LOGITS_HELD, "cpu", 320 * 3)  # three positions at a time
    alone = [replay(near, [row], [4], VOCABULARY, batch_tokens=1)[0] for row in rows]
    for a, b in zip(together, alone, strict=True):
        assert np.allclose(whole(a[4]), whole(b[4]), atol=1e-3)


def test_batches_hold_every_row_once_and_respect_the_budget() -> None:
    lengths = [5, 100, 7, 7, 30, 1, 64]
    rows = [
        SyntheticRow("", "", "", [5] * (n // 2), [6] * (n - n // 2), [], 0.0, 0, 1.0, "length")
        for n in lengths
    ]
    batches = list(length_batches(rows, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)


def test_a_draft_that_is_the_target_accepts_everything(target: PreTrainedModel) -> None:
    everything = Vocabulary(320, 320, (), 0, (), 0, "")
    decoder = SpeculativeDecoder(ReadableModel(target), ReadableModel(target), everything, 3)
    rows = [
        SyntheticRow.of(r.generation, "", Sampling(1.0))
        for r in exact_runs(decoder, prompts(4), Sampling(1.0), 20, seed=0)
    ]
    found = add_counts(counts[4] for counts in replay(target, rows, [4], everything))
    assert found.block_efficiency == pytest.approx(5, rel=1e-2)  # 20 tokens: 4 rounds of 5
    assert found.overlap == pytest.approx(1, abs=1e-3)


def test_an_empty_answer_has_no_counts(near: PreTrainedModel) -> None:
    empty = SyntheticRow("", "", "", [5], [], [], 1.0, 0, 1.0, "stop")
    assert replay(near, [empty], [2], VOCABULARY)[0][2].num_drafts == 0
    assert replay(near, [], [2], VOCABULARY) == []


def test_the_progress_of_given_texts_ends_at_their_number(
    target: PreTrainedModel, near: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        ("log", t): [SyntheticRow.of(g, "log", Sampling(t)) for g in answers(count)]
        for t, count in ((0.0, 3), (0.7, 2))
    }
    every = [row for found in rows.values() for row in found]
    task = EncodedTask("log", [row.row_id for row in every], [row.prompt_ids for row in every], 4)
    config, folder = EvaluateConfig(texts="synthesize", num_speculative_tokens=[3]), StageFolder(tmp_path)
    work = EvaluationWork(config, [task], 0, folder, Console(), VOCABULARY, None, rows)
    asked, chat, drafts = (lambda: pytest.fail("asked")), ChatTemplate(None), {"align": lambda: near}  # type: ignore[arg-type]
    work.workers = LocalWorkers(lambda: TextWorker(asked, drafts, VOCABULARY, chat, work.advance))
    work.write_texts()
    work.replay(["align"])
    assert "5/5 texts" in capsys.readouterr().err


def answers(count: int) -> list[Generation]:
    return [Generation([5, 6, 7 + i], [9, 10, 11 + i], [-1.0, -2.0, -1.5], "length") for i in range(count)]
