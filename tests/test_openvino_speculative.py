"""OpenVINO under the clock: texts, moments, rounds counted as ours, near-ties. Skipped without OpenVINO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)

import torch
from transformers import PreTrainedModel

from fastdraft.decoding.autoregressive import generate_batch
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.replay import replay
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import DataError, FastDraftError, RecipeError, TargetError
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.modeling.drafts import load_draft
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes.openvino_speculative import OpenVINOPair, OpenVINOSettings, TieJudge
from fastdraft.runtimes.passes import cut_rounds
from fastdraft.runtimes.runtime import Proposer, TimedText
from fastdraft.target import Target

PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 17, 30, 120, 90, 100)]
"""More than 256 tokens in all: OpenVINO's default would cut the last ones into pieces."""
GREEDY = Sampling(0.0)
TOKENS = 24


@pytest.fixture(scope="module")
def vocabulary(tiny_target: Path) -> Vocabulary:
    return replace(
        Target.at(tiny_target).vocabulary, missing_ids=()
    )  # OpenVINO masks none of the draft's ids


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return Target.at(tiny_target).model("cpu")


@pytest.fixture(scope="module")
def expected(target: PreTrainedModel, vocabulary: Vocabulary) -> list[Generation]:
    return generate_batch(target, PROMPTS, GREEDY, TOKENS, set(vocabulary.eos_token_ids), torch.Generator())


@pytest.fixture(scope="module")
def pair(exported_target: Path, exported_draft: Path, vocabulary: Vocabulary) -> OpenVINOPair:
    settings = OpenVINOSettings(precision="exact", threads=1, eos_ids=vocabulary.eos_token_ids)
    return OpenVINOPair(exported_target, exported_draft, settings)


def texts(batch: list[TimedText]) -> list[list[int]]:
    return [text.response_ids for text in batch]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_greedy_counts_agree_with_our_decoder_and_with_replay(
    pair: OpenVINOPair,
    target: PreTrainedModel,
    near_draft: Path,
    vocabulary: Vocabulary,
    expected: list[Generation],
    k: int,
) -> None:
    draft = load_draft(near_draft)
    decoder, total = SpeculativeDecoder(ReadableModel(target), ReadableModel(draft), vocabulary, k), []
    written = pair.write(PROMPTS, GREEDY, TOKENS, 0, Proposer("draft", k), exact_counts=True)
    for prompt, own, text in zip(PROMPTS, expected, written, strict=True):
        assert text.response_ids == own.response_ids
        # OpenVINO's first pass proposes nothing: its token belongs to the prompt.
        behind = decoder.generate([*prompt, own.response_ids[0]], GREEDY, len(own.response_ids) - 1, seed=0)
        assert text.counts == behind.counts
        texts = {"prompt_ids": [*prompt, own.response_ids[0]], "response_ids": own.response_ids[1:]}
        row = SimpleNamespace(**texts, logprobs=own.logprobs[1:], temperature=0.0, top_k=0, top_p=1.0)
        replayed = replay(draft, [row], [k], vocabulary)[0][k]
        assert replayed.num_accepted_tokens == text.counts.num_accepted_tokens
        total.append(text.counts)
    rate = add_counts(total).acceptance_rate
    assert 0.05 < rate < 0.95, "the pair must accept some and refuse some, or nothing was tested"


def test_prompts_that_are_answered_together_get_the_texts_and_rounds_that_they_get_alone(
    pair: OpenVINOPair, expected: list[Generation]
) -> None:
    own = [generation.response_ids for generation in expected]
    assert texts(pair.write(PROMPTS, GREEDY, TOKENS, 0)) == own
    for exact in (False, True):
        together = pair.write(PROMPTS, GREEDY, TOKENS, 0, Proposer("draft", 3), exact_counts=exact)
        assert texts(together) == own
        for prompt, text in zip(PROMPTS, together, strict=True):
            [one] = pair.write([prompt], GREEDY, TOKENS, 0, Proposer("draft", 3), exact_counts=exact)
            assert (text.response_ids, text.rounds) == (one.response_ids, one.rounds)


@pytest.mark.parametrize("exact", [False, True])
def test_prompt_lookup_writes_the_targets_own_text_in_fewer_passes(
    pair: OpenVINOPair, expected: list[Generation], exact: bool
) -> None:
    again = [[*own.prompt_ids, *own.response_ids, *own.prompt_ids] for own in expected[:4]]
    written = pair.write(again, GREEDY, TOKENS, 0, Proposer("lookup", 3), exact_counts=exact)
    assert texts(written) == texts(pair.write(again, GREEDY, TOKENS, 0))
    for text in written:
        counts = text.counts
        assert [token for each in text.rounds for token in each.tokens] == text.response_ids[1:]
        assert 0 <= counts.num_accepted_tokens <= 3 * counts.num_drafts
    found = add_counts(text.counts for text in written)
    assert found.num_accepted_tokens > 0, "nothing was looked up, so nothing was tested"


def test_a_timed_run_counts_as_an_exact_one_but_for_the_last_proposal_of_a_text(pair: OpenVINOPair) -> None:
    timed, exact = (
        [t.counts for t in pair.write(PROMPTS, GREEDY, TOKENS, 0, Proposer("draft", 3), exact_counts=value)]
        for value in (False, True)
    )
    for quick, whole in zip(timed, exact, strict=True):
        assert quick.num_drafts == whole.num_drafts
        assert quick.num_generated_tokens == whole.num_generated_tokens
        assert 0 <= whole.num_accepted_tokens - quick.num_accepted_tokens <= 1


def test_moments_are_in_the_order_in_which_tokens_come(pair: OpenVINOPair) -> None:
    for batch in (
        pair.write(PROMPTS, GREEDY, TOKENS, 0),
        pair.write(PROMPTS, GREEDY, TOKENS, 0, Proposer("draft", 2)),
        pair.write(PROMPTS, GREEDY, TOKENS, 0, Proposer("draft", 2), exact_counts=True),
    ):
        for text in batch:
            assert 0 < text.first_token_seconds <= text.seconds
            assert text.first_token_seconds < text.seconds or len(text.response_ids) <= 3
    [single] = pair.write(PROMPTS[:1], GREEDY, 1, 0)
    assert single.first_token_seconds == single.seconds
    assert not single.rounds


def test_sampled_texts_differ_and_alone_follow_the_seed(pair: OpenVINOPair) -> None:
    same = [PROMPTS[1]] * 3
    first = pair.write(same, Sampling(0.8), TOKENS, 1)
    assert len(set(map(tuple, texts(first)))) > 1
    assert texts(first) == texts(pair.write(same, Sampling(0.8), TOKENS, 1))
    for text in pair.write(same, Sampling(0.8), TOKENS, 1, Proposer("draft", 3)):
        assert text.counts.num_generated_tokens == len(text.response_ids) - 1


def test_the_time_of_an_answer_is_the_targets_the_drafts_and_the_runtimes(
    exported_target: Path, exported_draft: Path
) -> None:
    pair = OpenVINOPair(exported_target, exported_draft, OpenVINOSettings(threads=1))
    for tokens in (
        1,
        2,
        TOKENS,
        TOKENS,
        2,
        1,
        TOKENS - 1,
    ):  # a fresh pipeline lists otherwise than a used one
        found = pair.time_spent(PROMPTS[1], tokens, 2)
        assert found.target_seconds > 0
        assert (found.draft_seconds > 0) == (tokens > 2)
        assert found.target_seconds + found.draft_seconds < found.total_seconds


def test_what_does_not_fit_is_refused(pair: OpenVINOPair, exported_target: Path, tiny_draft: Path) -> None:
    with pytest.raises(DataError, match="prompt 1: no tokens"):
        pair.write([[5], []], GREEDY, TOKENS, 0, Proposer("draft", 3))
    with pytest.raises(DataError, match="prompt 0: 230 tokens"):
        pair.write([[5] * 230], GREEDY, TOKENS, 0, Proposer("draft", 3), exact_counts=True)
    assert pair.write([[5] * 230], GREEDY, TOKENS, 0, Proposer("draft", 3))[0].response_ids
    with pytest.raises(TargetError, match=r"no openvino_model\.xml"):
        OpenVINOPair(exported_target, tiny_draft).write([[5]], GREEDY, 2, 0, Proposer("draft", 1))
    for devices in ({"device": "GPU.7"}, {"draft_device": "NPU"}):
        with pytest.raises(RecipeError, match="OpenVINO sees"):
            elsewhere = OpenVINOPair(exported_target, exported_target, OpenVINOSettings(**devices))
            elsewhere.write([[5]], GREEDY, 2, 0, Proposer("draft", 1))


def test_a_failure_of_openvino_is_one_line(exported_target: Path) -> None:
    pair = OpenVINOPair(exported_target, exported_target)

    def fail(*_: object) -> None:
        raise RuntimeError("Exception from src/x.cpp:1:\nno memory left\n")

    pair.__dict__["alone"] = SimpleNamespace(add_request=fail)
    with pytest.raises(FastDraftError, match="device CPU: OpenVINO failed: no memory left"):
        pair.write(PROMPTS, GREEDY, TOKENS, 0)
    empty = {"add_request": lambda *_: None, "has_non_finished_requests": lambda: False}
    pair.__dict__["alone"] = SimpleNamespace(**empty)
    with pytest.raises(FastDraftError, match="a prompt was left without an answer"):
        pair.write(PROMPTS[:1], GREEDY, TOKENS, 0)


def test_the_judges_log_probs_are_those_of_transformers(
    exported_target: Path, target: PreTrainedModel
) -> None:
    judge = TieJudge(exported_target)
    for prompt in PROMPTS[3:1:-1]:  # the longer one first: nothing of it may be left
        with torch.no_grad():
            exact = target(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        assert judge.logprobs(prompt) == pytest.approx(exact.numpy(), abs=1e-3)
        assert judge.gap(prompt, 7, 9) == pytest.approx(float(abs(exact[7] - exact[9])), abs=1e-3)
        assert judge.gap(prompt, 7, 7) == 0


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
