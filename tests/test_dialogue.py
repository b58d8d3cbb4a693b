"""Conversations: what is read of a log, how each turn's prompt is written, and that every turn of the target's becomes a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import CHAT_TEMPLATE, write_tokenizer
from fastdraft.data.chat import (
    Conversation,
    conversation_plan,
    dialogue_format,
    first_prompt_ids,
    read_conversation,
)
from fastdraft.data.filters import RowFilter
from fastdraft.data.prompts import select_texts
from fastdraft.data.units import Unit, UnitPlan
from fastdraft.decoding.conversations import take_turns
from fastdraft.decoding.unit_writer import UnitWriter
from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.data import JsonlPrompts

WITH_SYSTEM = (
    "{% for m in messages %}<|{{ m['role'] if m['role'] != 'system' else 'user' }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRIPS = WITH_SYSTEM.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
OPENS = STRIPS.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
KEEPS_AND_OPENS = WITH_SYSTEM.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
CLOSES = WITH_SYSTEM.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n\n</think>\n{% endif %}")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHAT_TEMPLATE
FORGETS = "<|user|>\n{{ messages[-1]['content'] }}<|end|>\n<|assistant|>\n"

TALK = Conversation(("First?", "Second?", "Third?"), "Be brief.")


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def templated(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    return tokenizer


class Scripted:
    """An engine that answers with given texts, by the number of the question, and remembers what it was asked."""

    name = "scripted"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, answers: dict[str, str], finish: str = "stop"
    ) -> None:
        self.tokenizer, self.answers, self.finish, self.asked = tokenizer, answers, finish, list[str]()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
            self.asked.append(text)
            key = max(self.answers, key=text.rfind)
            ids = self.tokenizer(self.answers[key], add_special_tokens=False).input_ids + (
                [3] if self.finish == "stop" else []
            )
            found.append(Generation(list(prompt), ids, [-0.5] * len(ids), self.finish))  # type: ignore[arg-type]
        return found


def written(
    tokenizer: PreTrainedTokenizerBase, engine: Scripted, talks: list[Conversation], context_length: int = 500
) -> tuple[list, Any]:
    found = conversation_plan(tokenizer, talks)
    assert found is not None
    unit = UnitPlan(name="talks", temperatures=[0.7], unit_rows=8, **found.fields).unit(0)
    assert unit is not None
    row_filter = RowFilter(range(300, 320), lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
    writer = UnitWriter(
        engine,
        instruction_engine=engine,
        tokenizer=tokenizer,
        row_filter=row_filter,
        max_new_tokens=40,
        context_length=context_length,
    )
    return writer.write(unit, 5)


ANSWERS = {"First?": "One.", "Second?": "Two.", "Third?": "Three."}


def test_every_turn_of_a_conversation_becomes_a_row_behind_the_targets_own_answers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = Scripted(templated(tokenizer, WITH_SYSTEM), ANSWERS)
    rows, counts = written(tokenizer, engine, [TALK])
    assert [tokenizer.decode(row.response_ids) for row in rows] == [
        "One.<|end|>",
        "Two.<|end|>",
        "Three.<|end|>",
    ]
    assert tokenizer.decode(rows[2].prompt_ids) == (
        "<|user|>\nBe brief.<|end|>\n<|user|>\nFirst?<|end|>\n<|assistant|>\nOne.<|end|>\n"
        "<|user|>\nSecond?<|end|>\n<|assistant|>\nTwo.<|end|>\n<|user|>\nThird?<|end|>\n<|assistant|>\n"
    )
    assert (counts.asked, counts.written, counts.balance()) == (3, 3, 0)
    assert len({row.prompt_key for row in rows}) == 1  # held out together or not at all
    assert len({row.row_id for row in rows}) == 3


def test_conversations_of_different_lengths_are_asked_together_turn_by_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = Scripted(templated(tokenizer, WITH_SYSTEM), ANSWERS)
    rows, counts = written(
        tokenizer, engine, [TALK, Conversation(("Second?",)), Conversation(("Third?", "First?"))]
    )
    assert counts.asked == counts.written == len(rows) == 6
    assert sum("Be brief." in text for text in engine.asked) == 3
    assert len({row.prompt_key for row in rows}) == 3


def test_answers_of_the_log_are_never_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "LOGGED"},
        {"role": "user", "content": "Second?"},
    ]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    chosen = select_texts(
        JsonlPrompts(kind="jsonl", name="talks", path=str(tmp_path / "talks.jsonl"), field="messages"),
        set(),
        0,
    ).texts
    engine = Scripted(templated(tokenizer, WITH_SYSTEM), ANSWERS)
    rows, _ = written(tokenizer, engine, [talk for talk in chosen if isinstance(talk, Conversation)])
    assert len(rows) == 2
    assert not any("LOGGED" in text for text in engine.asked)
    assert "One." in engine.asked[1]


def test_a_template_that_strips_earlier_thinking_strips_it_and_the_row_still_holds_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = Scripted(
        templated(tokenizer, STRIPS), {"First?": "<think>hm</think>One.", "Second?": "<think>so</think>Two."}
    )
    rows, _ = written(tokenizer, engine, [Conversation(("First?", "Second?"))])
    assert [tokenizer.decode(row.response_ids) for row in rows] == [
        "<think>hm</think>One.<|end|>",
        "<think>so</think>Two.<|end|>",
    ]
    assert "hm" not in tokenizer.decode(rows[1].prompt_ids)
    assert "<|assistant|>\nOne.<|end|>" in tokenizer.decode(rows[1].prompt_ids)


def test_thinking_that_the_template_opens_is_part_of_the_prompt_and_no_answer_holds_its_mark(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = Scripted(templated(tokenizer, OPENS), {"First?": "hm</think>One.", "Second?": "so</think>Two."})
    rows, _ = written(tokenizer, engine, [Conversation(("First?", "Second?"))])
    assert all(tokenizer.decode(row.prompt_ids).endswith("<|assistant|>\n<think>\n") for row in rows)
    assert [tokenizer.decode(row.response_ids) for row in rows] == [
        "hm</think>One.<|end|>",
        "so</think>Two.<|end|>",
    ]
    assert "hm" not in tokenizer.decode(rows[1].prompt_ids)
    engine = Scripted(
        templated(tokenizer, KEEPS_AND_OPENS), {"First?": "hm</think>One.", "Second?": "so</think>Two."}
    )
    rows, _ = written(tokenizer, engine, [Conversation(("First?", "Second?"))])
    assert "<|assistant|>\n<think>\nhm</think>One.<|end|>" in tokenizer.decode(rows[1].prompt_ids)


def test_a_conversation_ends_where_the_target_is_still_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    for template, answer in ((STRIPS, "<think>hm"), (OPENS, "hm and hm")):
        engine = Scripted(templated(tokenizer, template), {"First?": answer, "Second?": "Two."}, "length")
        rows, counts = written(tokenizer, engine, [Conversation(("First?", "Second?", "Second?"))])
        assert len(rows) == 1
        assert counts.filtered == {"conversation_ended": 2}
    engine = Scripted(templated(tokenizer, CLOSES), {"First?": "One", "Second?": "Two."}, "length")
    assert len(written(tokenizer, engine, [Conversation(("First?", "Second?"))])[0]) == 2


def test_an_answer_of_the_harmony_format_goes_on_with_its_last_channel(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    form = dialogue_format(templated(tokenizer, WITH_SYSTEM), 2)

    def answer(text: str) -> str | None:
        return form.answer(Generation([1], tokenizer(text).input_ids, [], "length"))

    assert answer("<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>One.") == "One."
    assert answer("<|channel|>analysis<|message|>hm") is None


@pytest.mark.parametrize("template", [NO_SYSTEM, CHAT_TEMPLATE], ids=["refused", "dropped"])
def test_a_system_message_that_the_template_does_not_take_stands_before_the_first_question(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    found = conversation_plan(templated(tokenizer, template), [TALK])
    assert found is not None
    assert "head of the first user turn" in found.format.note
    assert tokenizer.decode(found.format.prompt_ids(TALK, ["One."])) == (
        "<|user|>\nBe brief.\n\nFirst?<|end|>\n<|assistant|>\nOne.<|end|>\n<|user|>\nSecond?<|end|>\n<|assistant|>\n"
    )
    without = conversation_plan(tokenizer, [Conversation(("First?",))])
    assert without is not None
    assert not without.format.note


def test_without_a_template_a_conversation_is_text_with_user_and_assistant(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = Scripted(
        templated(tokenizer, None),
        {"First?": " One.\n\nUser: What else?\nAssistant: That.", "Second?": "Two."},
        "length",
    )
    rows, _ = written(tokenizer, engine, [Conversation(("First?", "Second?"), "Be brief.")])
    assert tokenizer.decode(rows[0].prompt_ids) == "Be brief.\n\nUser: First?\nAssistant:"
    assert (
        tokenizer.decode(rows[1].prompt_ids)
        == "Be brief.\n\nUser: First?\nAssistant: One.\n\nUser: Second?\nAssistant:"
    )
    assert "What else?" in tokenizer.decode(
        rows[0].response_ids
    )  # the target's own text is trained as it stands
    assert tokenizer.decode(first_prompt_ids(tokenizer, "bare", chat=True)) == "bare"


@pytest.mark.parametrize(
    ("template", "found"), [(ONE_TURN, "one turn only"), (FORGETS, "drops earlier answers")]
)
def test_a_template_that_cannot_go_on_is_refused_for_conversations_of_several_turns_only(
    tokenizer: PreTrainedTokenizerBase, template: str, found: str
) -> None:
    templated(tokenizer, template)
    assert conversation_plan(tokenizer, [Conversation(("First?",))])
    with pytest.raises(TargetError, match=found):
        conversation_plan(tokenizer, [TALK])


def test_turns_that_do_not_fit_are_counted_and_end_their_conversation(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = Scripted(templated(tokenizer, WITH_SYSTEM), ANSWERS)
    length = len(first_prompt_ids(tokenizer, TALK, chat=True))
    rows, counts = written(tokenizer, engine, [TALK], context_length=length + 40)
    assert len(rows) == 1
    assert counts.filtered == {"prompt_too_long": 2}


@pytest.mark.parametrize("answer", ["", " a b" * 40], ids=["empty", "loop"])
def test_a_conversation_ends_behind_an_answer_that_is_no_history(
    tokenizer: PreTrainedTokenizerBase, answer: str
) -> None:
    engine = Scripted(templated(tokenizer, WITH_SYSTEM), {"First?": answer})
    _, counts = written(tokenizer, engine, [TALK])
    assert counts.filtered["conversation_ended"] == 2
    assert counts.balance() == 0


def test_prompts_alone_need_no_last_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Scripted(templated(tokenizer, WITH_SYSTEM), ANSWERS)
    form = dialogue_format(tokenizer, 3)
    found = take_turns(
        form,
        [TALK],
        lambda number, prompts: engine.generate(prompts, Sampling(0.0), 9, number),
        room=400,
        last_answers=False,
    )
    assert len(engine.asked) == 2
    assert [turn.answer is None for turn in found.turns] == [False, False, True]


def test_texts_among_conversations_are_conversations_of_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    found = conversation_plan(templated(tokenizer, None), ["One?", TALK])
    assert found is not None
    plan = UnitPlan(name="mixed", temperatures=[0.0], **found.fields)
    unit = plan.unit(0)
    assert isinstance(unit, Unit)
    assert {talk.users for talk in unit.conversations} == {("One?",), TALK.users}
    assert conversation_plan(tokenizer, ["One?"]) is None


def messages(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_a_log_gives_what_was_said_to_the_target() -> None:
    log = messages(
        ("system", "S"),
        ("developer", "D"),
        ("assistant", "Hi"),
        ("user", "a"),
        ("user", "b"),
        ("assistant", "x"),
        ("user", "c"),
    )
    assert read_conversation(log, "here") == Conversation(("a\n\nb", "c"), "S\n\nD")
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]
    assert read_conversation(shared, "here") == Conversation(("a",))
    parts = messages(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))
    assert read_conversation(parts, "here") == Conversation(("ab",))


@pytest.mark.parametrize(
    "log",
    [
        messages(("user", "a"), ("tool", "42")),
        [*messages(("user", "a")), {"role": "assistant", "content": None, "tool_calls": [{}]}],
        messages(("user", [{"type": "image_url", "image_url": "x"}])),
        messages(("user", "a"), ("system", "late")),
    ],
)
def test_what_cannot_be_asked_again_is_counted(log: list[dict[str, Any]], tmp_path: Path) -> None:
    assert read_conversation(log, "here") is None
    path = tmp_path / "talks.jsonl"
    path.write_text(
        json.dumps({"messages": log}) + "\n" + json.dumps({"messages": messages(("user", "a"))}) + "\n"
    )
    assert (
        select_texts(
            JsonlPrompts(kind="jsonl", name="t", path=str(path), field="messages"), set(), 0
        ).refused["unsupported"]
        == 1
    )


@pytest.mark.parametrize(
    "log", [7, ["a"], [{"content": "a"}], [{"role": "user"}], [{"role": "user", "content": 7}]]
)
def test_a_damaged_conversation_stops_the_run_with_its_line(log: Any, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": log}) + "\n")
    with pytest.raises(DataError, match=r"talks.jsonl line 1"):
        select_texts(JsonlPrompts(kind="jsonl", name="t", path=str(path), field="messages"), set(), 0)


def test_a_conversation_is_refused_where_any_of_its_questions_is_an_evaluation_prompt(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    logs = [
        messages(("user", "a"), ("user", "x"), ("assistant", "y"), ("user", "Held  OUT?")),
        messages(("user", "b")),
        messages(),
    ]
    path.write_text("".join(json.dumps({"messages": log}) + "\n" for log in [*logs, logs[1]]))
    chosen = select_texts(
        JsonlPrompts(kind="jsonl", name="t", path=str(path), field="messages"), {"held out?"}, 0
    )
    assert chosen.texts == [Conversation(("b",))]
    assert chosen.refused == {"evaluation": 1, "empty": 1, "repeated": 1}
    assert chosen.digest
