"""The plan of what the target is asked: units, their order and temperatures, shares, prefixes of a corpus."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft.data.chat import ChatTemplate, Conversation
from fastdraft.data.filters import RowCounts
from fastdraft.data.synthesis_plan import (
    DRY_UNITS,
    Account,
    CorpusPrefixes,
    Planner,
    SourcePlan,
    Unit,
    unit_seed,
)
from fastdraft.recipe.synthesize import JsonlPrompts, MagpiePrompts, SynthesizeConfig


class Numbers:
    """A tokenizer of texts of numbers, without a template."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split() if word.isdigit()])


def plan(folder: Path, texts: list[Any], **changes: Any) -> SourcePlan:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in texts), encoding="utf-8")
    source = JsonlPrompts(kind="jsonl", name="p", path=str(path))
    settings: Any = {"prompts": [source], "temperatures": [0.0, 0.6, 1.0], "batch_rows": 8, **changes}
    config = SynthesizeConfig(**settings)
    planner = Planner(config, ChatTemplate(Numbers()), None, set(), 1, lambda: pytest.fail("no corpus"))  # type: ignore[arg-type]
    return planner.plans()[0]


def numbered(folder: Path, **changes: Any) -> SourcePlan:
    """Prompt i is i, one to seven times."""
    return plan(folder, [" ".join([str(i)] * (1 + i % 7)) for i in range(100)], **changes)


def all_units(source: SourcePlan) -> list[Unit]:
    return [source.unit(number) for number in range(int(source.units))]


def test_every_prompt_is_asked_once_before_any_is_asked_twice(tmp_path: Path) -> None:
    first = all_units(numbered(tmp_path))[:13]
    assert sorted(prompt[0] for unit in first for prompt in unit.prompts) == list(range(100))


def test_every_prompt_is_asked_at_every_temperature_and_greedily_once(tmp_path: Path) -> None:
    units = all_units(numbered(tmp_path, samples=2))
    asked = [(prompt[0], unit.temperature) for unit in units for prompt in unit.prompts]
    assert sorted(asked) == sorted((i, t) for i in range(100) for t in (0.0, 0.6, 0.6, 1.0, 1.0))


def test_prompts_of_a_unit_have_similar_lengths(tmp_path: Path) -> None:
    for unit in all_units(numbered(tmp_path))[:8]:
        lengths = [len(prompt) for prompt in unit.prompts]
        assert max(lengths) - min(lengths) <= 1


def test_a_unit_is_the_same_whichever_was_asked_before(tmp_path: Path) -> None:
    in_order = all_units(numbered(tmp_path))
    places = random.Random(0).sample(range(len(in_order)), len(in_order))
    other = numbered(tmp_path)
    assert [other.unit(place) for place in places] == [in_order[place] for place in places]


def test_texts_among_conversations_are_conversations_of_one_turn(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]
    unit = plan(tmp_path, ["3", talk]).unit(0)
    assert {talk.users for talk in unit.conversations} == {("3",), ("1\n\n2",)}
    assert isinstance(unit.conversations[0], Conversation)
    assert not plan(tmp_path, ["3"]).unit(0).conversations


def test_an_endless_source_always_has_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatTemplate, "user_prefix_ids", lambda chat: [1, 2])
    endless = plan(tmp_path, [], prompts=[MagpiePrompts(kind="magpie", name="m")])
    assert endless.unit(10**9 + 1) == Unit("m", 1.0, ([1, 2],) * 8, 256)
    few = plan(tmp_path, [], prompts=[MagpiePrompts(kind="magpie", name="m", count=20)])
    assert [len(unit.prompts) for unit in all_units(few)] == [8, 8, 4]


def test_units_have_seeds_of_their_own() -> None:
    seeds = {unit_seed(seed, source, n) for seed in range(20) for source in "ab" for n in range(100)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_the_source_furthest_behind_its_share_is_next_and_one_that_gives_nothing_is_given_up() -> None:
    plans = [
        SourcePlan("a", 2.0, 99, lambda n: Unit("a", 0.0)),
        SourcePlan("b", 1.0, 1, lambda n: Unit("b", 0.0)),
    ]
    account, asked = Account(plans), []
    while next_plan := account.next_plan():
        asked.append(next_plan.name)
        kept = len(asked) < 4
        account.add(next_plan.name, 0.5, RowCounts(asked=1, written=int(kept), tokens=10 * kept))
    assert asked == ["a", "b", "a", *["a"] * DRY_UNITS]
    assert (account.is_dry("a"), account.units, account.total.tokens) == (True, len(asked), 30)
    assert account.by_temperature[0.5] == account.total


def test_the_units_ahead_are_those_that_come_if_sources_go_on_as_they_began() -> None:
    plans = [SourcePlan(name, share, 50, lambda n: Unit("", 0.0)) for name, share in (("a", 3.0), ("b", 1.0))]
    account, guesses, came = Account(plans), list[list[tuple[str, int]]](), list[tuple[str, int]]()
    while account.total.tokens < 400 and (chosen := account.next_plan()):
        guesses.append([(plan.name, number) for plan, number in islice(account.ahead(400), 8)])
        came.append((chosen.name, account.units_of[chosen.name]))
        account.add(chosen.name, 0.0, RowCounts(written=1, tokens=10))
    assert [guess[0] for guess in guesses] == came
    assert all(guess == came[place : place + 8] for place, guess in enumerate(guesses) if place > 1)
    assert len(guesses[-1]) == 1, "none beyond the budget"


class Rows:
    """A packed corpus in memory."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows, self.rows = rows, len(rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self._rows[index])


def test_prefixes_start_at_documents_and_never_cross_into_the_next() -> None:
    row = [5, 6, 0, 10, 11, 12, 13, 14, 15, 0, 20, 21, 22, 23, 24, 25, 26]
    prefixes = CorpusPrefixes(Rows([row] * 40), 0, (3, 5), [0], seed=0)  # type: ignore[arg-type]
    found = [prefixes(i) for i in range(40)]
    assert {prompt[1] for prompt in found} == {10, 20}
    assert {len(prompt) for prompt in found} == {4, 5, 6}
    assert all(prompt[0] == 0 and 0 not in prompt[1:] for prompt in found)
    assert found == [prefixes(i) for i in range(40)]


def test_a_row_without_a_document_start_gives_its_beginning_without_bos() -> None:
    prefixes = CorpusPrefixes(Rows([list(range(1, 30))]), 0, (4, 4), [0], seed=0)  # type: ignore[arg-type]
    assert prefixes(0) == [1, 2, 3, 4]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 5))
def test_a_prefix_is_never_empty(row: list[int], shortest: int) -> None:
    assert CorpusPrefixes(Rows([row]), 0, (shortest, shortest + 3), [], seed=0)(0)  # type: ignore[arg-type]
