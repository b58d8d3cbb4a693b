"""Prompt lookup: what it proposes, against a search from scratch; its counts, against rounds one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft.functional.acceptance import TOTALS, batched_expected_counts, counts_from_array
from fastdraft.functional.lookup import look_up, lookup_counts

IDS = st.lists(st.integers(0, 3), max_size=24)


def searched(known: list[int], k: int) -> list[int]:
    """The proposal, by looking through all of what is known."""
    for n in (3, 2):
        for end in range(len(known) - 1, n - 1, -1):
            if known[end - n : end] == known[len(known) - n :]:
                return known[end : end + k]
    return []


def walked(
    prompt: list[int], response: list[int], k: int, draft: list[float] | None = None
) -> tuple[int, ...]:
    """Rounds, those with a find, what the draft reads late, proposed, accepted and examined tokens."""
    at = rounds = finds = proposed = accepted = examined = late = waiting = 0
    while at < len(response):
        proposal, own = searched(prompt + response[:at], k), response[at : at + k]
        right = [a == b for a, b in zip(proposal, own, strict=False)]
        finds += bool(proposal)
        if drafted := draft is not None and not proposal:
            proposal, right = own, [chance == 1 for chance in draft[at : at + k]]
            proposed, late, waiting = proposed + k, late + waiting, 0
        else:
            proposed += len(proposal)
        taken = next((j for j, same in enumerate(right) if not same), len(right))
        accepted, examined = accepted + taken, examined + min(taken + 1, len(right))
        waiting += (taken + 1) * (draft is not None and not drafted)
        rounds, at = rounds + 1, at + taken + 1
    return rounds, finds, late, proposed, accepted, examined


def told(line: np.ndarray, k: int) -> tuple[int, ...]:
    counts = counts_from_array(line[: TOTALS + k])
    assert sum(counts.num_accepted_tokens_per_pos) == counts.num_accepted_tokens
    figures = counts.num_draft_tokens, counts.num_accepted_tokens, counts.num_examined_tokens
    return counts.num_drafts, line[-1], line[-2], *figures  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("prompt", "response", "proposed", "right"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 7], [4, 4, 4], [2, 1, 0]),  # 3 tokens stood before, then 2 after
        ([5, 6, 7, 5, 6, 8, 5, 6], [8], [3], [1]),  # the latest place of two
        ([5, 6, 1, 7, 6, 2, 5, 6], [1], [4], [1]),
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [9], [4], [1]),  # three before two, though two stood later
        ([4, 4, 4], [4, 4, 4], [1, 1, 1], [1, 1, 1]),  # what is known ends one token behind
        ([1], [2, 3], [0, 0], [0, 0]),
        ([], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]),
    ],
)
def test_what_stood_behind_the_same_tokens_is_proposed(
    prompt: list[int], response: list[int], proposed: list[int], right: list[int]
) -> None:
    found = look_up(prompt, response, 4)
    assert (found.proposed.tolist(), found.right.tolist()) == (proposed, right)


@settings(deadline=None)
@given(IDS, IDS, st.integers(1, 5))
def test_lookup_finds_what_a_search_from_scratch_finds(
    prompt: list[int], response: list[int], k: int
) -> None:
    found = look_up(prompt, response, k)
    for place in range(len(response)):
        proposal = searched(prompt + response[:place], k)
        same = [a == b for a, b in zip(proposal, response[place:], strict=False)]
        right = same.index(False) if False in same else len(same)
        assert (found.proposed[place], found.right[place]) == (len(proposal), right)


@settings(deadline=None)
@given(
    st.lists(st.tuples(IDS, IDS, st.lists(st.booleans(), min_size=24, max_size=24)), min_size=1, max_size=4)
)
def test_counts_alone_and_with_a_draft_are_those_of_rounds_one_by_one(
    texts: list[tuple[list[int], list[int], list[bool]]],
) -> None:
    found = [look_up(prompt, response, 4) for prompt, response, _ in texts]
    accepts = [np.array(flags[: len(response)], dtype=float) for _, response, flags in texts]
    alone, both = lookup_counts(found, [4, 1]), lookup_counts(found, [4, 1], accepts)
    for i, (prompt, response, _) in enumerate(texts):
        for at, k in enumerate((4, 1)):
            assert told(alone[at, i], k) == walked(prompt, response, k)
            assert told(both[at, i], k) == walked(prompt, response, k, accepts[i].tolist())


def test_where_nothing_repeats_both_are_the_draft_and_lookup_is_nothing() -> None:
    response, accept = list(range(50)), np.linspace(0.2, 0.9, 50)
    found = [look_up([], response, 3)]
    both, (draft,) = lookup_counts(found, [3], [accept])[0, 0], batched_expected_counts([accept], [3])
    counts = counts_from_array(both[:-2])
    assert (counts.num_drafts, counts.num_accepted_tokens) == pytest.approx(
        (draft[3].num_drafts, draft[3].num_accepted_tokens)
    )
    assert counts_from_array(lookup_counts(found, [3])[0, 0, :-2]).num_drafts == 50


def test_a_draft_that_is_accepted_by_chance_is_weighed_where_lookup_finds_nothing() -> None:
    # Only a round at the last token finds something, and that is right; elsewhere half of the draft's
    # proposals are accepted: 0, 1 or 2 of them with 1/2, 1/4 and 1/4.
    found, accept = [look_up([], [1, 2, 3, 1, 2, 3], 2)], np.full(6, 0.5)
    assert found[0].proposed.tolist() == [0, 0, 0, 0, 0, 2]
    chances = np.array([1.0, *np.zeros(8)])
    for place in range(5):
        chances[place + 1 : place + 4] += chances[place] * np.array([0.5, 0.25, 0.25])
    both = lookup_counts(found, [2], [accept])[0, 0]
    assert counts_from_array(both[:-2]).num_drafts == pytest.approx(chances[:6].sum())
    assert both[-1] == pytest.approx(chances[5])
