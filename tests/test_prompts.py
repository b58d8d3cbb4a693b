"""Sources of prompts: what of a log was said to the target, which prompts are refused, in which order the
others come.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdraft.data.chat import Conversation
from fastdraft.data.prompts import normalised, read_conversation, select_prompts, usable_prompts
from fastdraft.errors import DataError
from fastdraft.recipe.synthesize import JsonlPrompts


def source(tmp_path: Path, *values: object) -> JsonlPrompts:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values), encoding="utf-8")
    return JsonlPrompts(kind="jsonl", name="p", path=str(path))


def messages(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_evaluation_prompts_are_refused_however_spaced_and_capitalised(tmp_path: Path) -> None:
    texts = ["Tell me\n  about FOXES", "Other", "", "other ", "Third"]
    chosen = select_prompts(source(tmp_path, *texts), {normalised("tell me about foxes")}, 0)
    assert sorted(map(str, chosen.prompts)) == ["Other", "Third"]
    assert chosen.refused == {"evaluation": 1, "empty": 1, "repeated": 1}


def test_a_conversation_is_refused_where_any_of_its_questions_is_an_evaluation_prompt(tmp_path: Path) -> None:
    leaks = messages(("user", "a"), ("assistant", "y"), ("user", "Held  OUT?"))
    fine = messages(("user", "b"))
    chosen = select_prompts(source(tmp_path, leaks, fine, [], fine), {"held out?"}, 0)
    assert chosen.prompts == [Conversation(("b",))]
    assert chosen.refused == {"evaluation": 1, "empty": 1, "repeated": 1}


def test_a_prompt_with_half_a_character_is_counted_and_not_asked(tmp_path: Path) -> None:
    chosen = select_prompts(
        source(tmp_path, "a \ud83d", messages(("user", "\udc00")), "whole \U0001f98a"), {}, 0
    )
    assert chosen.prompts == ["whole \U0001f98a"]
    assert chosen.refused["unsupported"] == 2


def test_the_digest_tells_only_which_prompts_evaluation_forbids(tmp_path: Path) -> None:
    config = source(tmp_path, "one", "two", "three")
    assert select_prompts(config, {"elsewhere"}, 0).digest == select_prompts(config, set(), 0).digest == ""
    assert select_prompts(config, {"one"}, 0).digest not in ("", select_prompts(config, {"two"}, 0).digest)


def test_prompts_come_in_an_order_of_the_seed_and_count_takes_the_first(tmp_path: Path) -> None:
    config = source(tmp_path, *(f"prompt {i}" for i in range(50)))
    order = select_prompts(config, set(), 1).prompts
    assert order == select_prompts(config, set(), 1).prompts != select_prompts(config, set(), 2).prompts
    assert select_prompts(config.model_copy(update={"count": 5}), set(), 1).prompts == order[:5]


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 evaluation"):
        select_prompts(source(tmp_path, "A b", "a  B"), {"a b"}, 0)
    with pytest.raises(DataError, match="no prompt that can be asked"):
        next(usable_prompts(source(tmp_path)))


def test_a_log_gives_what_was_said_to_the_target() -> None:
    log = messages(("system", "S"), ("developer", "D"), ("assistant", "Hi"), ("user", "a"), ("user", "b"))
    log += messages(("assistant", "x"), ("user", "c"))
    assert read_conversation(log, "here") == Conversation(("a\n\nb", "c"), "S\n\nD")
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]
    assert read_conversation(shared, "here") == Conversation(("a",))
    parts = messages(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))
    assert read_conversation(parts, "here") == Conversation(("ab",))


CALLS = {"role": "assistant", "content": None, "tool_calls": [{}]}


@pytest.mark.parametrize(
    "log",
    [
        messages(("user", "a"), ("tool", "42")),
        [*messages(("user", "a")), CALLS],
        messages(("user", [{"type": "image_url", "image_url": "x"}])),
        messages(("user", "a"), ("system", "late")),
    ],
)
def test_what_cannot_be_asked_again_is_counted(log: list[dict[str, Any]], tmp_path: Path) -> None:
    chosen = select_prompts(source(tmp_path, log, messages(("user", "a"))), set(), 0)
    assert chosen.refused["unsupported"] == 1


BAD = [7, ["a"], [{"content": "a"}], [{"role": "user"}], [{"role": "user", "content": 7}]]


@pytest.mark.parametrize("log", BAD)
def test_a_damaged_conversation_stops_the_run_with_its_line(log: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.jsonl:? line 1"):
        select_prompts(source(tmp_path, log), set(), 0)
