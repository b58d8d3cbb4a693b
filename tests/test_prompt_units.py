"""What the target is asked: prompt sources, the plan of units, and Magpie's two steps."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdraft.data.chat import render_prompt, user_prefix_ids
from fastdraft.data.filters import RowFilter
from fastdraft.data.prompts import normalised, select_texts
from fastdraft.data.units import CorpusPrefixes, Unit, UnitPlan, unit_seed
from fastdraft.decoding.unit_writer import UnitWriter
from fastdraft.errors import DataError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.data import JsonlPrompts


def plan(**changes: object) -> UnitPlan:
    options = {
        "name": "p",
        "size": 100,
        "encode": lambda i: [i] * (1 + i % 7),
        "temperatures": [0.0, 0.6, 1.0],
        "unit_rows": 8,
        "seed": 1,
    }
    return UnitPlan(**{**options, **changes})  # type: ignore[arg-type]


def all_units(units: UnitPlan) -> list[Unit]:
    found = []
    while unit := units.unit(len(found)):
        assert units.has_unit(len(found))
        found.append(unit)
    assert not units.has_unit(len(found))
    return found


def test_every_prompt_is_asked_once_before_any_is_asked_twice() -> None:
    first = all_units(plan())[:13]
    assert sorted(prompt[0] for unit in first for prompt in unit.prompts) == list(range(100))


def test_every_prompt_is_asked_at_every_temperature_and_greedily_once() -> None:
    asked = [(prompt[0], unit.temperature) for unit in all_units(plan(samples=2)) for prompt in unit.prompts]
    assert sorted(asked) == sorted((i, t) for i in range(100) for t in (0.0, 0.6, 0.6, 1.0, 1.0))


def test_prompts_of_a_unit_have_similar_lengths() -> None:
    for unit in all_units(plan())[:8]:
        lengths = [len(prompt) for prompt in unit.prompts]
        assert max(lengths) - min(lengths) <= 1


def test_a_unit_is_the_same_whichever_was_asked_before() -> None:
    in_order = all_units(plan())
    places = list(range(len(in_order)))
    random.Random(0).shuffle(places)
    other = plan()
    assert [other.unit(place) for place in places] == [in_order[place] for place in places]


def test_an_endless_source_always_has_a_unit() -> None:
    units = plan(size=None, encode=lambda i: [1, 2], instruction_tokens=9)
    assert units.has_unit(10**9)
    assert units.unit(4) == Unit("p", 0.6, ([1, 2],) * 8, True, 9)


def test_units_have_seeds_of_their_own() -> None:
    seeds = {unit_seed(seed, index) for seed in range(20) for index in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**62 for seed in seeds)


class Rows:
    """A packed corpus in memory."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    @property
    def rows(self) -> int:
        return len(self._rows)

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


def prompt_file(tmp_path: Path, prompts: Sequence[str]) -> JsonlPrompts:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return JsonlPrompts(kind="jsonl", name="p", path=str(path))


def test_evaluation_prompts_are_refused_however_spaced_and_capitalised(tmp_path: Path) -> None:
    chosen = select_texts(
        prompt_file(tmp_path, ["Tell me\n  about FOXES", "Other", "", "other ", "Third"]),
        {normalised("tell me about foxes")},
        0,
    )
    assert sorted(chosen.texts) == ["Other", "Third"]
    assert chosen.refused == {"evaluation": 1, "empty": 1, "repeated": 1}


def test_the_digest_tells_only_which_prompts_evaluation_forbids(tmp_path: Path) -> None:
    config = prompt_file(tmp_path, ["one", "two", "three"])
    assert select_texts(config, {"elsewhere"}, 0).digest == select_texts(config, set(), 0).digest == ""
    assert select_texts(config, {"one"}, 0).digest not in ("", select_texts(config, {"two"}, 0).digest)


def test_prompts_come_in_an_order_of_the_seed_and_count_takes_the_first(tmp_path: Path) -> None:
    config = prompt_file(tmp_path, [f"prompt {i}" for i in range(50)])
    order = select_texts(config, set(), 1).texts
    assert order == select_texts(config, set(), 1).texts != select_texts(config, set(), 2).texts
    assert select_texts(config.model_copy(update={"count": 5}), set(), 1).texts == order[:5]


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 evaluation"):
        select_texts(prompt_file(tmp_path, ["A b", "a  B"]), {"a b"}, 0)


class Script:
    """An engine that says what it is told to, whatever it is asked."""

    name = "script"

    def __init__(self, answers: list[tuple[list[int], str]]) -> None:
        self.answers = answers
        self.asked: list[list[int]] = []
        self.sampling: list[Sampling] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        self.asked += [list(prompt) for prompt in prompts]
        self.sampling.append(sampling)
        pairs = zip(prompts, self.answers * len(prompts), strict=False)
        return [Generation(list(prompt), ids, [-1.0] * len(ids), finish) for prompt, (ids, finish) in pairs]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_target)


def writer(tokenizer: PreTrainedTokenizerBase, instructions: Script, answers: Script) -> UnitWriter:
    row_filter = RowFilter({310}, tokenizer.decode)
    return UnitWriter(
        answers,
        instructions,
        tokenizer,
        row_filter,
        max_new_tokens=8,
        context_length=256,
        is_evaluation=lambda text: text == "the fox",
    )


def test_magpie_asks_what_the_target_invented_and_counts_what_is_no_use(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def said(text: str) -> tuple[list[int], str]:
        return [*tokenizer(text).input_ids, 3], "stop"

    bad = [
        said("The fox"),
        said("What is this?"),
        said("12 + 4"),
        ([300, 310, 3], "stop"),
        ([1, 40, 3], "stop"),
        ([41] * 8, "length"),
        ([42] * 60, "length"),
    ]
    instructions, answers = Script([said("What is this?"), *bad]), Script([([50, 51, 3], "stop")])
    unit = Unit("magpie", 0.6, tuple(user_prefix_ids(tokenizer) for _ in range(8)), True, 60)
    rows, counts = writer(tokenizer, instructions, answers).write(unit, seed=5)
    assert answers.asked == [render_prompt(tokenizer, [{"role": "user", "content": "What is this?"}])]
    assert (instructions.sampling, answers.sampling) == ([Sampling(1.0)], [Sampling(0.6)])
    assert [row.response_ids for row in rows] == [[50, 51, 3]]
    expected = ["evaluation", "duplicate", "empty", "malformed", "too_long", "looping"]
    assert counts.filtered == {
        f"instruction_{reason}": 2 if reason == "malformed" else 1 for reason in expected
    }
    assert (counts.asked, counts.written, counts.balance()) == (8, 1, 0)


def test_an_instruction_of_an_earlier_unit_is_a_duplicate(tokenizer: PreTrainedTokenizerBase) -> None:
    said = ([*tokenizer("Name a river").input_ids, 3], "stop")
    unit_writer = writer(tokenizer, Script([said]), Script([([50, 3], "stop"), ([51, 3], "stop")]))
    unit = Unit("magpie", 0.6, (user_prefix_ids(tokenizer),), True, 60)
    assert unit_writer.write(unit, 1)[1].written == 1
    assert unit_writer.write(unit, 2)[1].filtered == {"instruction_duplicate": 1}


def test_prompts_that_leave_no_room_for_an_answer_are_counted_and_not_asked(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answers = Script([([50, 3], "stop")])
    rows, counts = writer(tokenizer, Script([]), answers).write(
        Unit("p", 0.6, ([7] * 249, [8] * 248), True), 1
    )
    assert (len(rows), counts.filtered, counts.balance()) == (1, {"prompt_too_long": 1}, 0)
    assert answers.asked == [[8] * 248]
