"""Draft, lookup and both: the text stays the target's own, the counts are those of replay, a text's end is a
clean one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.replay import accept_probabilities, counts_of_accepts
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import DataError, RecipeError
from fastdraft.functional.acceptance import TOTALS, counts_from_array, counts_table
from fastdraft.functional.generation import Sampling
from fastdraft.functional.lookup import PromptLookup, look_up, lookup_counts
from fastdraft.modeling.vocabulary import Vocabulary
from lossless import PROMPT, SIZE, WRONG_RULES, tables, written

KINDS: tuple[ProposerKind, ...] = ("draft", "lookup", "lookup_draft")
GREEDY = Sampling(0.0)
COOL, WARM = Sampling(0.7, top_k=4), Sampling(1.0, top_p=0.9)
TOY = Vocabulary(SIZE, SIZE, (), None, (), None, "")


TINY = Vocabulary(320, 300, tuple(range(300, 320)), 0, (3,), 0, "")


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()


def decoder(kind: ProposerKind | None, k: int = 3, context: int = 10_000, **how: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(*tables(context), how.pop("vocabulary", TOY), k, proposer=kind, **how)


# --- the same text


@pytest.mark.parametrize(
    ("kind", "sampling", "texts"),
    [
        ("draft", COOL, 2000),
        ("lookup", WARM, 2000),
        ("lookup_draft", replace(COOL, top_p=0.95), 2000),
        ("draft", WARM, 250),
        ("lookup", COOL, 250),
        ("lookup_draft", WARM, 250),
    ],
)
def test_the_joint_distribution_of_three_tokens_is_the_targets(
    kind: ProposerKind, sampling: Sampling, texts: int
) -> None:
    found = written(tables(), sampling, kind, texts)
    assert found.p_value > 0.01 / 6
    assert found.accepted_share > 0.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", WRONG_RULES)
def test_wrong_rules_are_found_out_by_the_same_test(
    rule: Callable[[pytest.MonkeyPatch], None], kind: ProposerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule(monkeypatch)
    assert written(tables(), COOL, kind, 250).p_value < 1e-6


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_alone_and_with_every_proposer(
    target: PreTrainedModel, near: PreTrainedModel, kind: ProposerKind, k: int
) -> None:
    pair, prompts = (ReadableModel(target), ReadableModel(near)), [[5, 6, 7], [9, 8] * 6, [*range(4, 24)] * 2]
    alone = SpeculativeDecoder(pair[0], None, TINY, 0, proposer=None)
    found = SpeculativeDecoder(*pair, TINY, k, proposer=kind)
    for prompt in prompts:
        own = alone.generate(prompt, GREEDY, 60, 0)
        assert found.generate(prompt, GREEDY, 60, 0).generation == own.generation
        assert own.counts.num_drafts == own.counts.num_generated_tokens == len(own.generation.response_ids)
        assert own.counts.num_draft_tokens == 0


@pytest.mark.parametrize(
    "how", [{"proposer": "lookup"}, {"proposer": "lookup_draft", "draft_temperature": 0.0}]
)
def test_where_proposals_are_certain_a_seed_gives_the_text_that_it_gives_alone(how: dict[str, Any]) -> None:
    alone = SpeculativeDecoder(tables()[0], None, TOY, 0, proposer=None)
    for seed in range(20):
        found = SpeculativeDecoder(*tables(), TOY, 3, **how).generate(PROMPT, WARM, 30, seed)
        own = alone.generate(PROMPT, WARM, 30, seed).generation
        assert found.generation.response_ids == own.response_ids
        assert found.generation.logprobs == pytest.approx(own.logprobs)
        assert found.counts.num_accepted_tokens > 0


# --- counts


@pytest.mark.parametrize(("sampling", "draft_temperature"), [(GREEDY, None), (Sampling(1.0, top_k=2), 0.0)])
@pytest.mark.parametrize(
    ("kind", "n"), [*((kind, 3) for kind in KINDS), ("lookup_draft", 5), ("lookup_draft", 1)]
)
def test_replay_of_a_text_gives_the_very_counts_of_its_rounds(
    target: PreTrainedModel,
    near: PreTrainedModel,
    kind: ProposerKind,
    n: int,
    sampling: Sampling,
    draft_temperature: float | None,
) -> None:
    pair, prompts = (ReadableModel(target), ReadableModel(near)), [[5, 6, 7], [9, 8] * 6, [*range(4, 24)] * 2]
    found = SpeculativeDecoder(*pair, TINY, 3, draft_temperature, proposer=kind, num_lookup_tokens=n)
    runs = [found.generate(prompt, sampling, 50, seed) for seed, prompt in enumerate(prompts)]
    rows = [SyntheticRow.of(run.generation, "", sampling) for run in runs]
    accepts = accept_probabilities(near, rows, TINY, draft_temperature)
    if kind == "draft":
        table = counts_table([by_k[3] for by_k in counts_of_accepts(accepts, [3])])
    else:
        lookups = [look_up(row.prompt_ids, row.response_ids, n) for row in rows]
        table = lookup_counts(lookups, [3], accepts if kind == "lookup_draft" else None, n)[0]
        assert table[:, -1].tolist() == [sum(r.proposer == "lookup" for r in run.rounds) for run in runs]
        late = [run.num_caught_up if kind == "lookup_draft" else 0 for run in runs]
        assert table[:, -2].tolist() == late
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    for line, run in zip(table, runs, strict=True):
        replayed = counts_from_array(line[: TOTALS + (3 if kind == "draft" else max(3, n))])
        for name in (*names, "num_examined_tokens", "num_generated_tokens"):
            assert getattr(replayed, name) == getattr(run.counts, name), name
    assert sum(run.counts.num_draft_tokens for run in runs) > 0


# --- what is proposed, by whom


def test_lookup_goes_before_the_draft_which_then_reads_what_it_missed() -> None:
    pair = tables()
    found = SpeculativeDecoder(*pair, TOY, 4, proposer="lookup_draft", num_lookup_tokens=2)
    result = found.generate(PROMPT, WARM, 60, 3)
    by = [r.proposer for r in result.rounds]
    assert set(by) == {"draft", "lookup"}
    text = [*PROMPT, *result.generation.response_ids]
    length = len(PROMPT)
    for r in result.rounds:
        known = PromptLookup(text[:length]).find(2)
        assert (r.proposer, r.num_proposed) == (("lookup", len(known)) if known else ("draft", 4))
        length += len(r.tokens)
    assert result.accepted.count("lookup") == sum(
        r.num_accepted for r in result.rounds if r.proposer == "lookup"
    )
    assert result.accepted.count("draft") == sum(
        r.num_accepted for r in result.rounds if r.proposer == "draft"
    )
    # The draft reads the prompt and all that stands before its last round; of its own proposals in every
    # round all but the last, and that too where all were accepted.
    last = max(place for place, name in enumerate(by) if name == "draft")
    before = len(PROMPT) + sum(len(r.tokens) for r in result.rounds[:last])
    kept = sum(min(r.num_accepted, 3) for r in result.rounds[:last] if r.proposer == "draft")
    assert pair[1].num_read == before - kept + 3 * by.count("draft")


@pytest.mark.parametrize("missing", [(), (2,)])
@pytest.mark.parametrize("sampling", [GREEDY, COOL, WARM])
def test_a_draft_with_logits_of_some_ids_alone_proposes_as_if_the_others_were_at_minus_infinity(
    sampling: Sampling, missing: tuple[int, ...]
) -> None:
    columns, vocabulary, results = torch.tensor([0, 2, 3]), replace(TOY, missing_ids=missing), []
    for narrow in (False, True):
        target, draft = tables()
        lacking = torch.full_like(draft.logits, -torch.inf)
        kept = draft.logits[..., columns]
        draft.logits = kept if narrow else lacking.index_copy_(-1, columns, kept)
        draft.columns = columns if narrow else None
        results.append(SpeculativeDecoder(target, draft, vocabulary, 3).generate(PROMPT, sampling, 60, 1))
    wide, found = results
    assert found.generation == wide.generation
    assert [(r.num_accepted, r.num_examined) for r in found.rounds] == [
        (r.num_accepted, r.num_examined) for r in wide.rounds
    ]
    assert found.counts.overlap == pytest.approx(wide.counts.overlap)
    assert found.counts.num_accepted_tokens > 5


def test_a_round_without_a_find_proposes_nothing_where_there_is_no_draft() -> None:
    result = decoder("lookup").generate([0, 2], WARM, 40, 0)
    first = result.rounds[0]
    assert (first.proposer, first.num_proposed, first.num_accepted, len(first.tokens)) == ("", 0, 0, 1)
    assert result.counts.num_draft_tokens < 3 * result.counts.num_drafts
    assert decoder("lookup").draft is None


# --- ends


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_a_text_may_fill_the_context_to_its_last_place(kind: ProposerKind | None, sampling: Sampling) -> None:
    found = decoder(kind, 4, context=30)
    result = found.generate(PROMPT, sampling, 21, 0)
    assert len(result.generation.response_ids) == 21
    with pytest.raises(DataError, match="9 tokens and 22 new ones; the context holds 30"):
        found.generate(PROMPT, sampling, 22, 0)
    with pytest.raises(DataError, match="no tokens"):
        found.generate([], sampling, 4, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_among_the_proposals_ends_the_text(kind: ProposerKind) -> None:
    # Greedy, the target writes 1, 2, 3 and again; of the prompt lookup proposes 4 behind 1, 2, 3.
    ending = replace(TOY, eos_token_ids=(3,))
    result = decoder(kind, 3, vocabulary=ending).generate(PROMPT, GREEDY, 12, 0)
    free = decoder(None).generate(PROMPT, GREEDY, 12, 0).generation.response_ids
    assert result.generation.response_ids == free[: free.index(3) + 1]
    assert result.generation.finish_reason == "stop"
    assert len(result.accepted) == len(result.generation.response_ids)
    assert result.counts.num_accepted_tokens <= result.counts.num_examined_tokens <= len(result.accepted)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_answers_leave_nothing_behind_and_neither_does_one_that_is_stopped(
    target: PreTrainedModel, near: PreTrainedModel, sampling: Sampling
) -> None:
    pair = ReadableModel(target), ReadableModel(near)
    found = SpeculativeDecoder(*pair, TINY, 3, proposer="lookup_draft")

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    def answer(count: int) -> None:
        for seed in range(count):
            rounds = found.rounds([5, 6, 7, 5, 6], sampling, 8, seed)
            next(rounds)
            if seed % 2:
                assert sum(len(r.tokens) for r in rounds)
            rounds.close()

    answer(2)
    before = held()
    answer(60)
    assert held() == before


def test_impossible_settings_of_a_proposer_are_refused() -> None:
    target, draft = tables()
    for given, message in (
        ((target, None, TOY, 3), "draft: missing"),
        ((target, draft, TOY, 0), "num_speculative_tokens: 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            SpeculativeDecoder(*given, proposer="lookup_draft")
    with pytest.raises(RecipeError, match="num_lookup_tokens: 0"):
        SpeculativeDecoder(target, None, TOY, 3, proposer="lookup", num_lookup_tokens=0)
