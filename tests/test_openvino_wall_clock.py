"""OpenVINO under the clock: texts, moments, rounds counted as ours, near-ties. Skipped where it is not installed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

import torch
from transformers import PreTrainedModel

from fastdraft.decoding.autoregressive import generate_batch
from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import DataError, FastDraftError, RecipeError, TargetError
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.modeling.drafts import load_draft
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes import openvino_passes
from fastdraft.runtimes.openvino_passes import OneByOne, is_npu
from fastdraft.runtimes.openvino_speculative import DYNAMIC_PLACES, cut_rounds, with_proposals
from fastdraft.runtimes.openvino_ties import TieJudge, explain_differences, first_difference
from fastdraft.runtimes.openvino_wall_clock import OpenVINOPair, OpenVINOTarget
from fastdraft.runtimes.wall_clock import TimedBatch
from fastdraft.target import Target

PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 17, 30, 120, 90, 100)]
"""More than 256 tokens in all: OpenVINO's default would cut the last ones into pieces."""
GREEDY = Sampling(0.0)
TOKENS = 24


@pytest.fixture(scope="module")
def vocabulary(tiny_target: Path) -> Vocabulary:
    # OpenVINO masks none of the draft's ids.
    return replace(Target.at(tiny_target).vocabulary, missing_ids=())


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return Target.at(tiny_target).model("cpu")


@pytest.fixture(scope="module")
def models(target: PreTrainedModel, near_draft: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    return target, load_draft(near_draft)


@pytest.fixture(scope="module")
def expected(target: PreTrainedModel, vocabulary: Vocabulary) -> list[Generation]:
    return generate_batch(target, PROMPTS, GREEDY, TOKENS, set(vocabulary.eos_token_ids), torch.Generator())


@pytest.fixture(scope="module")
def alone(exported_target: Path, vocabulary: Vocabulary) -> OpenVINOTarget:
    return OpenVINOTarget(exported_target, vocabulary.eos_token_ids, precision="exact", threads=1)


@pytest.fixture(scope="module")
def pair(exported_target: Path, exported_draft: Path, vocabulary: Vocabulary) -> OpenVINOPair:
    return OpenVINOPair(
        exported_target, exported_draft, vocabulary.eos_token_ids, precision="exact", threads=1
    )


@pytest.fixture(scope="module")
def endless(exported_target: Path, exported_draft: Path) -> OpenVINOPair:
    """Ends at no token, and runs the pipeline of NPUs."""
    return OpenVINOPair(exported_target, exported_draft, (), precision="exact", threads=1, one_by_one=True)


def texts(batch: TimedBatch) -> list[list[int]]:
    return [text.response_ids for text in batch.texts]


def counts(batch: TimedBatch) -> list[Counts]:
    return [text.counts for text in batch.texts]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_greedy_counts_agree_with_our_decoder_and_with_replay(
    pair: OpenVINOPair,
    models: tuple[PreTrainedModel, PreTrainedModel],
    vocabulary: Vocabulary,
    expected: list[Generation],
    k: int,
) -> None:
    target, draft = models
    decoder, total = SpeculativeDecoder(target, draft, vocabulary, k), []
    written = pair.at(k).write(PROMPTS, GREEDY, TOKENS, 0, exact_counts=True)
    for prompt, own, text in zip(PROMPTS, expected, written.texts, strict=True):
        assert text.response_ids == own.response_ids
        # OpenVINO's first pass proposes nothing: its token belongs to the prompt.
        behind = decoder.generate([*prompt, own.response_ids[0]], GREEDY, len(own.response_ids) - 1, seed=0)
        assert text.counts == behind.counts
        row = SimpleNamespace(
            prompt_ids=[*prompt, own.response_ids[0]],
            response_ids=own.response_ids[1:],
            logprobs=own.logprobs[1:],
            temperature=0.0,
            top_k=0,
            top_p=1.0,
        )
        assert (
            replay(draft, [row], [k], vocabulary)[0][k].num_accepted_tokens == text.counts.num_accepted_tokens
        )
        total.append(text.counts)
    assert 0.05 < add_counts(total).acceptance_rate < 0.95, (
        "the pair must accept some and refuse some, or nothing was tested"
    )


def test_prompts_that_are_answered_together_get_the_texts_and_rounds_that_they_get_alone(
    alone: OpenVINOTarget, pair: OpenVINOPair, expected: list[Generation]
) -> None:
    own = [generation.response_ids for generation in expected]
    assert texts(alone.write(PROMPTS, GREEDY, TOKENS, 0)) == own
    for exact in (False, True):
        contender = pair.at(3)
        together = contender.write(PROMPTS, GREEDY, TOKENS, 0, exact_counts=exact)
        assert texts(together) == own
        for prompt, text in zip(PROMPTS, together.texts, strict=True):
            one = contender.write([prompt], GREEDY, TOKENS, 0, exact_counts=exact).texts[0]
            assert (text.response_ids, text.rounds) == (one.response_ids, one.rounds)


def test_a_timed_run_counts_as_an_exact_one_but_for_the_last_proposal_of_a_text(pair: OpenVINOPair) -> None:
    timed, exact = (
        counts(pair.at(3).write(PROMPTS, GREEDY, TOKENS, 0, exact_counts=value)) for value in (False, True)
    )
    for quick, whole in zip(timed, exact, strict=True):
        assert (quick.num_drafts, quick.num_generated_tokens) == (
            whole.num_drafts,
            whole.num_generated_tokens,
        )
        assert 0 <= whole.num_accepted_tokens - quick.num_accepted_tokens <= 1


def test_moments_are_in_the_order_in_which_tokens_come(alone: OpenVINOTarget, pair: OpenVINOPair) -> None:
    for contender in (alone, pair.at(2)):
        for exact in (False, True):
            batch = contender.write(PROMPTS, GREEDY, TOKENS, 0, exact_counts=exact)
            assert batch.seconds == max(text.seconds for text in batch.texts)
            assert all(0 < text.first_token_seconds <= text.seconds for text in batch.texts)
            assert all(
                text.first_token_seconds < text.seconds for text in batch.texts if len(text.response_ids) > 3
            )
    [single] = alone.write(PROMPTS[:1], GREEDY, 1, 0).texts
    assert single.first_token_seconds == single.seconds
    assert not single.rounds


def test_a_sampled_text_is_the_targets_own_only_without_a_draft(
    alone: OpenVINOTarget, pair: OpenVINOPair
) -> None:
    same = [PROMPTS[1]] * 3
    for contender in (alone, pair.at(3)):
        first = contender.write(same, Sampling(0.8), TOKENS, 1)
        assert len(set(map(tuple, texts(first)))) > 1
        if contender is alone:  # with a draft the same seed does not always give the same text
            assert texts(first) == texts(contender.write(same, Sampling(0.8), TOKENS, 1))
    assert (alone.lossless_sampling, pair.at(3).lossless_sampling) == (True, False)
    for text in first.texts:
        assert text.counts.num_generated_tokens == len(text.response_ids) - 1


def test_a_threshold_counts_the_tokens_that_were_proposed(
    endless: OpenVINOPair, exported_target: Path, exported_draft: Path
) -> None:
    """Near 0 the draft proposes to the text's end, near 1 a single token: both totals are known."""
    batched = OpenVINOPair(exported_target, exported_draft, (), precision="exact", threads=1)
    prompts = PROMPTS[:3]
    own = texts(batched.at(1).write(prompts, GREEDY, TOKENS, 0))
    for one in (batched, endless):
        for threshold in (1e-30, 0.999999, 0.5):
            batch = one.at(1, threshold).write(prompts, GREEDY, TOKENS, 0, exact_counts=True)
            assert texts(batch) == own
            for text in batch.texts:
                proposed = text.counts.num_draft_tokens
                assert proposed == sum(r.counts.num_draft_tokens for r in text.rounds) == int(proposed)
                begins = np.cumsum([1, *(len(r.tokens) for r in text.rounds)])[:-1]
                if threshold == 1e-30:
                    assert proposed == sum(TOKENS - begin - 1 for begin in begins)
                elif threshold == 0.999999:
                    assert proposed == sum(begin < TOKENS - 1 for begin in begins)
                assert text.counts.num_accepted_tokens <= proposed
                assert len(text.counts.num_accepted_tokens_per_pos) == DYNAMIC_PLACES
                assert sum(text.counts.num_accepted_tokens_per_pos) == text.counts.num_accepted_tokens
                assert math.isnan(text.counts.num_examined_tokens)


def test_a_timed_run_with_a_threshold_knows_rounds_and_accepted_tokens_but_not_the_proposals(
    pair: OpenVINOPair,
) -> None:
    timed, exact = (
        pair.at(3, 0.4).write(PROMPTS, GREEDY, TOKENS, 0, exact_counts=value) for value in (False, True)
    )
    assert texts(timed) == texts(exact)
    for quick, whole in zip(counts(timed), counts(exact), strict=True):
        assert (quick.num_drafts, quick.num_accepted_tokens) == (whole.num_drafts, whole.num_accepted_tokens)
        assert math.isnan(quick.num_draft_tokens)
        assert quick.block_efficiency == whole.block_efficiency
        assert whole.acceptance_rate <= 1
    assert add_counts(counts(exact)).num_draft_tokens == sum(c.num_draft_tokens for c in counts(exact))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_breakdown_of_an_answer_adds_up(
    exported_target: Path, exported_draft: Path, one_by_one: bool
) -> None:
    pair = OpenVINOPair(exported_target, exported_draft, (), threads=1, one_by_one=one_by_one)
    for tokens in (
        1,
        2,
        TOKENS,
        TOKENS,
        2,
        1,
        *range(TOKENS - 4, TOKENS),
    ):  # a fresh pipeline lists otherwise than a used one
        found = pair.breakdown(PROMPTS[1], tokens, 2)
        rounds = pair.at(2).write([PROMPTS[1]], GREEDY, tokens, 0).texts[0].rounds
        assert found.target_seconds > 0
        assert (found.draft_seconds > 0) == (tokens > 2)
        assert found.target_seconds + found.draft_seconds < found.total_seconds
        assert found.target_passes == len(rounds) + 1
        # min(K, tokens left - 1) proposals in each round
        begins = np.cumsum([1, *(len(r.tokens) for r in rounds)])[:-1]
        assert found.draft_passes == sum(min(2, tokens - begin - 1) for begin in begins)


def test_the_pipeline_of_npus_writes_and_counts_the_same(
    endless: OpenVINOPair,
    exported_target: Path,
    exported_draft: Path,
    alone: OpenVINOTarget,
    vocabulary: Vocabulary,
) -> None:
    ends = vocabulary.eos_token_ids
    settings: dict[str, Any] = {"precision": "exact", "threads": 1, "one_by_one": True}
    assert texts(
        OpenVINOTarget(exported_target, ends, **settings).write(PROMPTS, GREEDY, TOKENS, 0)
    ) == texts(alone.write(PROMPTS, GREEDY, TOKENS, 0))
    batched = OpenVINOPair(exported_target, exported_draft, ends, precision="exact", threads=1)
    one_by_one = OpenVINOPair(exported_target, exported_draft, ends, **settings)
    for exact in (False, True):
        both = [
            pair.at(3).write(PROMPTS, GREEDY, TOKENS, 0, exact_counts=exact) for pair in (batched, one_by_one)
        ]
        assert texts(both[0]) == texts(both[1])
        assert counts(both[0]) == counts(both[1])
    moments = [text.first_token_seconds for text in both[1].texts]
    assert moments == sorted(moments), "prompts that wait for their turn see their first token later"


class NPU:
    """As OpenVINO's pipeline for NPUs calls a streamer and lists passes: those of all answers so far, and one of each prompt."""

    def __init__(self) -> None:
        self.listed: list[int] = []
        self.passes = 0

    def generate(self, prompt: object, config: object, streamer: Any) -> SimpleNamespace:
        for tokens in (7, [8, 9, 10], [11]):
            streamer.write(tokens)
        self.listed += [1] * (1 + 3 + 5)
        self.passes += 3
        models = (
            SimpleNamespace(raw_metrics=_metrics(passes, size))
            for passes, size in ((self.passes, 100), (len(self.listed), 10))
        )
        names = ("main_model_metrics", "draft_model_metrics")
        whole = SimpleNamespace(raw_metrics=SimpleNamespace(generate_durations=[500.0]))
        return SimpleNamespace(
            extended_perf_metrics=SimpleNamespace(**dict(zip(names, models, strict=True))), perf_metrics=whole
        )


def _metrics(passes: int, microseconds: float) -> SimpleNamespace:
    return SimpleNamespace(
        m_batch_sizes=[1] * passes, m_durations=[microseconds] * passes, inference_durations=[0.0]
    )


@pytest.fixture
def on_npu(exported_target: Path, exported_draft: Path, monkeypatch: pytest.MonkeyPatch) -> OpenVINOPair:
    def open_npu(*_: object, **__: object) -> OneByOne:
        opened = object.__new__(OneByOne)
        opened.pipeline, opened.adapts, opened._has_drafted, opened._listed = NPU(), True, False, 0
        return opened

    monkeypatch.setattr("fastdraft.runtimes.openvino_wall_clock.open_pipeline", open_npu)
    return OpenVINOPair(exported_target, exported_draft, (), device="NPU")


def test_on_an_npu_proposals_are_those_listed_since_the_answer_before(on_npu: OpenVINOPair) -> None:
    for _ in range(2):
        for text in on_npu.at(3).write(PROMPTS[:2], GREEDY, 5, 0, exact_counts=True).texts:
            assert text.response_ids == [7, 8, 9, 10, 11]
            assert [len(r.tokens) for r in text.rounds] == [3, 1]
            assert (text.counts.num_draft_tokens, text.counts.num_accepted_tokens) == (8, 2)


def test_the_breakdown_on_an_npu_is_of_one_answer(on_npu: OpenVINOPair) -> None:
    for _ in range(2):
        found = on_npu.breakdown(PROMPTS[0], 5, 3)
        assert (found.target_passes, found.draft_passes) == (3, 8)
        assert (found.target_seconds, found.draft_seconds, found.total_seconds) == pytest.approx(
            (300e-6, 90e-6, 500e-6)
        )


def test_what_an_npu_cannot_do_is_refused(on_npu: OpenVINOPair) -> None:
    with pytest.raises(RecipeError, match="begins with at most 5"):
        on_npu.at(6)
    with pytest.raises(RecipeError, match="knows no threshold"):
        on_npu.at(3, 0.4)
    with pytest.raises(RecipeError, match="is greedy"):
        on_npu.at(3).write(PROMPTS, Sampling(0.6), TOKENS, 0)
    with pytest.raises(DataError, match="prompt 1 on an NPU"):
        replace_context(on_npu).at(3).write([[5], [5] * 1025], GREEDY, TOKENS, 0)


def replace_context(pair: OpenVINOPair) -> OpenVINOPair:
    pair._loaded = replace(pair._loaded, context_length=2037)
    return pair


def test_devices_are_named_as_openvino_names_them(
    exported_target: Path, exported_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(openvino_passes, "device_properties", lambda device, *_: {})
    genai = SimpleNamespace(
        draft_model=lambda folder, device, **properties: (
            asked.update(draft=(device, properties)) or "of the draft"
        ),
        LLMPipeline=lambda folder, device, properties: asked.update(target=(device, properties)),
    )
    monkeypatch.setattr(openvino_passes, "import_genai", lambda: genai)
    monkeypatch.setattr(
        openvino_passes,
        "load_pipeline",
        lambda folder, device, properties, rows, tokens: asked.update(batched=device),
    )
    OpenVINOPair(exported_target, exported_draft, (), device="GPU.1")
    assert (asked["batched"], asked["draft"]) == ("GPU.1", ("GPU.1", {}))
    OpenVINOPair(exported_target, exported_draft, (), device="NPU", draft_device="CPU")
    lengths = {"MAX_PROMPT_LEN": 1024, "MIN_RESPONSE_LEN": 1024}
    assert asked["target"] == ("NPU", {**lengths, "draft_model": "of the draft"})
    assert asked["draft"] == ("CPU", {})
    assert [is_npu(name) for name in ("NPU", "NPU.0", "GPU", "CPU")] == [True, True, False, False]


def test_what_does_not_fit_is_refused(
    pair: OpenVINOPair, exported_target: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    with pytest.raises(RecipeError, match="must be at least 1"):
        pair.at(0)
    with pytest.raises(RecipeError, match="below 1"):
        pair.at(3, 1.0)
    with pytest.raises(DataError, match="prompt 1: no tokens"):
        pair.at(3).write([[5], []], GREEDY, TOKENS, 0)
    with pytest.raises(DataError, match="prompt 0: 230 tokens"):
        pair.at(3).write([[5] * 230], GREEDY, TOKENS, 0, exact_counts=True)
    assert pair.at(3).write([[5] * 230], GREEDY, TOKENS, 0).texts[0].response_ids
    with pytest.raises(FastDraftError, match=r"no openvino_model\.xml"):
        OpenVINOPair(exported_target, tiny_draft, ())
    with pytest.raises(FastDraftError, match=r"no openvino_model\.xml"):
        TieJudge(tiny_target)
    with pytest.raises(RecipeError, match="OpenVINO sees"):
        OpenVINOTarget(exported_target, (), device="GPU.7")
    with pytest.raises(RecipeError, match="OpenVINO sees"):
        OpenVINOPair(exported_target, exported_target, (), draft_device="NPU")


def test_a_pair_that_does_not_fit_is_refused_before_anything_is_loaded(
    exported_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import write_target

    monkeypatch.setattr(
        "fastdraft.runtimes.openvino_wall_clock.open_pipeline", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(TargetError, match="draft 384, target 320"):
        OpenVINOPair(exported_target, write_target(tmp_path, padded_vocab=384), ())


def test_a_failure_of_openvino_is_one_line(alone: OpenVINOTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Exception from src/x.cpp:1:\nno memory left\n")

    monkeypatch.setattr(alone._loaded.pipeline, "write", fail)
    with pytest.raises(RecipeError, match="device: CPU: OpenVINO failed: no memory left"):
        alone.write(PROMPTS, GREEDY, TOKENS, 0)
    monkeypatch.setattr(alone._loaded.pipeline, "write", lambda *_: [[]])
    with pytest.raises(RecipeError, match="left without an answer"):
        alone.write(PROMPTS[:1], GREEDY, TOKENS, 0)


def test_the_judges_log_probs_are_those_of_transformers(
    exported_target: Path, target: PreTrainedModel
) -> None:
    judge = TieJudge(exported_target)
    for prompt in PROMPTS[3:1:-1]:  # the longer one first: nothing of it may be left
        with torch.no_grad():
            exact = target(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        assert judge.logprobs(prompt) == pytest.approx(exact.numpy(), abs=1e-3)
        assert (
            judge.gap(prompt, 7, 9)
            == judge.gap(prompt, 9, 7)
            == pytest.approx(float(abs(exact[7] - exact[9])), abs=1e-3)
        )
        assert judge.gap(prompt, 7, 7) == 0
        assert judge.gap(prompt, 7, -1) == math.inf


def test_differences_are_found_and_explained(exported_target: Path, expected: list[Generation]) -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == (1, 2, 5)
    assert first_difference([1, 2], [1]) == (1, 2, -1)
    own = [generation.response_ids for generation in expected]
    other = [list(text) for text in own]
    other[2][4] = (other[2][4] + 1) % 300
    judge = TieJudge(exported_target)
    [(index, place, gap)] = explain_differences(judge, PROMPTS, own, other)
    assert (index, place) == (2, 4)
    assert gap == judge.gap([*PROMPTS[2], *own[2][:4]], own[2][4], other[2][4]) > 0
    assert explain_differences(judge, PROMPTS, own, own) == []


def test_rounds_are_cut_where_the_text_ends() -> None:
    passes = [[10], [11, 12, 13, 14], [15], [16, 17, 3, 18], [19]]
    text, rounds = cut_rounds(passes, 99, (3,), 3)
    assert text == [10, 11, 12, 13, 14, 15, 16, 17, 3]
    assert [(r.num_accepted, r.num_examined) for r in rounds] == [(3, 3), (0, 1), (3, 3)]
    text, rounds = cut_rounds(passes, 7, (), 3)
    assert text == [10, 11, 12, 13, 14, 15, 16]
    assert [(r.num_accepted, r.num_examined) for r in rounds] == [(3, 3), (0, 1), (1, 1)]
    assert cut_rounds([[10]], 5, (), 3) == ([10], [])
    assert add_counts(r.counts for r in rounds) == Counts(3, 9, 4, (2, 1, 1), 5, 6, 4, 5)


def test_shared_out_proposals_add_up() -> None:
    _, rounds = cut_rounds([[10], [11, 12, 13, 14], [15], [16, 17]], 99, (), 3)
    assert [r.counts.num_draft_tokens for r in with_proposals(rounds, 8)] == [3, 3, 2]
    assert add_counts(r.counts for r in with_proposals(rounds, 8)).num_accepted_tokens == 4
    assert all(math.isnan(r.counts.num_draft_tokens) for r in with_proposals(rounds, None))
    assert with_proposals([], 8) == []
