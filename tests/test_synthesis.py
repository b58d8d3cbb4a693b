"""One unit through a scripted engine: Magpie's two steps, every turn of conversations, answers that leave no
room.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import CHAT_TEMPLATE, write_tokenizer
from fastdraft.data.chat import ChatTemplate, Conversation
from fastdraft.data.filters import RowCounts, RowFilter
from fastdraft.data.rows import SyntheticRow
from fastdraft.data.synthesis_plan import Unit
from fastdraft.errors import TargetError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.runtimes.synthesis import Answers, UnitWriter, keep_rows

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
TWO = Conversation(("First?", "Second?"))
ANSWERS = {"First?": "One.", "Second?": "Two.", "Third?": "Three."}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


class Scripted:
    """An engine that answers the last question with its text, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, tokenizer: Any, template: Any, answers: dict[str, str], finish: Any = "stop") -> None:
        tokenizer.chat_template = template
        self.tokenizer, self.answers, self.finish, self.asked = tokenizer, answers, finish, list[str]()

    def generate(self, prompts: Any, *how: Any) -> list[Generation]:
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
            self.asked.append(text)
            key = max(self.answers, key=text.rfind)
            ids = self.tokenizer(self.answers[key], add_special_tokens=False).input_ids
            ids += [3] if self.finish == "stop" else []
            found.append(Generation(list(prompt), ids, [-0.5] * len(ids), self.finish))
        return found

    def converse(self, *talks: Conversation, context_length: int = 500) -> tuple[list[Any], Any]:
        """Rows and counts of a unit of conversations."""
        chat = ChatTemplate(self.tokenizer)
        prompts = tuple(map(chat.prompt_ids, talks))
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        row_filter = RowFilter(range(300, 320), decode)
        writer = UnitWriter(self, self, chat, range(300, 320), 40, context_length)
        return keep_rows(writer.write(Unit("talks", 0.7, prompts, conversations=talks), 5), row_filter)


def test_every_turn_of_a_conversation_becomes_a_row_behind_the_targets_own_answers(tokenizer: Any) -> None:
    rows, counts = Scripted(tokenizer, WITH_SYSTEM, ANSWERS).converse(TALK)
    said = [tokenizer.decode(row.response_ids) for row in rows]
    assert said == ["One.<|end|>", "Two.<|end|>", "Three.<|end|>"]
    assert tokenizer.decode(rows[2].prompt_ids) == (
        "<|user|>\nBe brief.<|end|>\n<|user|>\nFirst?<|end|>\n<|assistant|>\nOne.<|end|>\n"
        "<|user|>\nSecond?<|end|>\n<|assistant|>\nTwo.<|end|>\n<|user|>\nThird?<|end|>\n<|assistant|>\n"
    )
    assert (counts.asked, counts.written, counts.balance()) == (3, 3, 0)
    assert len({row.prompt_key for row in rows}) == 1, "held out together or not at all"
    assert len({row.row_id for row in rows}) == 3


def test_conversations_of_different_lengths_are_asked_together_turn_by_turn(tokenizer: Any) -> None:
    engine = Scripted(tokenizer, WITH_SYSTEM, ANSWERS)
    rows, counts = engine.converse(TALK, Conversation(("Second?",)), Conversation(("Third?", "First?")))
    assert counts.asked == counts.written == len(rows) == 6
    assert sum("Be brief." in text for text in engine.asked) == 3
    assert len({row.prompt_key for row in rows}) == 3


def test_a_template_that_strips_earlier_thinking_strips_it_and_the_row_still_holds_it(tokenizer: Any) -> None:
    thoughts = {"First?": "<think>hm</think>One.", "Second?": "<think>so</think>Two."}
    rows, _ = Scripted(tokenizer, STRIPS, thoughts).converse(TWO)
    said = [tokenizer.decode(row.response_ids) for row in rows]
    assert said == ["<think>hm</think>One.<|end|>", "<think>so</think>Two.<|end|>"]
    assert "hm" not in tokenizer.decode(rows[1].prompt_ids)
    assert "<|assistant|>\nOne.<|end|>" in tokenizer.decode(rows[1].prompt_ids)


def test_thinking_that_the_template_opens_is_part_of_the_prompt_and_no_answer_holds_its_mark(
    tokenizer: Any,
) -> None:
    thoughts = {"First?": "hm</think>One.", "Second?": "so</think>Two."}
    rows, _ = Scripted(tokenizer, OPENS, thoughts).converse(TWO)
    assert all(tokenizer.decode(row.prompt_ids).endswith("<|assistant|>\n<think>\n") for row in rows)
    assert tokenizer.decode(rows[0].response_ids) == "hm</think>One.<|end|>"
    assert "hm" not in tokenizer.decode(rows[1].prompt_ids)
    rows, _ = Scripted(tokenizer, KEEPS_AND_OPENS, thoughts).converse(TWO)
    assert "<|assistant|>\n<think>\nhm</think>One.<|end|>" in tokenizer.decode(rows[1].prompt_ids)


@pytest.mark.parametrize(
    ("template", "answer", "finish", "kept"),
    [
        (STRIPS, "<think>hm", "length", 1),
        (OPENS, "hm and hm", "length", 1),
        (CLOSES, "One", "length", 2),
        (WITH_SYSTEM, "", "stop", 0),
        (WITH_SYSTEM, " a b" * 40, "stop", 1),
    ],
    ids=["thinking", "thinking opened", "thought", "empty", "loop"],
)
def test_a_conversation_ends_behind_an_answer_that_is_no_history(
    tokenizer: Any, template: str, answer: str, finish: str, kept: int
) -> None:
    engine = Scripted(tokenizer, template, {"First?": answer, "Second?": "Two."}, finish)
    rows, counts = engine.converse(TWO)
    assert len(rows) == kept
    assert (counts.filtered.get("conversation_ended", 0), counts.balance()) == (int(kept < 2), 0)


def test_an_answer_of_the_harmony_format_goes_on_with_its_last_channel(tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_SYSTEM
    chat = ChatTemplate(tokenizer)

    def answer(text: str) -> str | None:
        return chat.answer(Generation([1], tokenizer(text).input_ids, [], "length"))

    assert answer("<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>One.") == "One."
    assert answer("<|channel|>analysis<|message|>hm") is None


@pytest.mark.parametrize("template", [NO_SYSTEM, CHAT_TEMPLATE], ids=["refused", "dropped"])
def test_a_system_message_that_the_template_does_not_take_stands_before_the_first_question(
    tokenizer: Any, template: str
) -> None:
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer)
    assert "head of the first user turn" in chat.note([TALK])
    assert tokenizer.decode(chat.prompt_ids(TALK, ["One."])) == (
        "<|user|>\nBe brief.\n\nFirst?<|end|>\n<|assistant|>\nOne.<|end|>\n<|user|>\nSecond?<|end|>\n<|assistant|>\n"
    )
    assert not chat.note([TWO])


def test_without_a_template_a_conversation_is_text_with_user_and_assistant(tokenizer: Any) -> None:
    answers = {"First?": " One.\n\nUser: What else?\nAssistant: That.", "Second?": "Two."}
    rows, _ = Scripted(tokenizer, None, answers, "length").converse(Conversation(TWO.users, "Be brief."))
    first = "Be brief.\n\nUser: First?\nAssistant:"
    assert tokenizer.decode(rows[0].prompt_ids) == first
    assert tokenizer.decode(rows[1].prompt_ids) == f"{first} One.\n\nUser: Second?\nAssistant:"
    assert "What else?" in tokenizer.decode(rows[0].response_ids), "trained as it stands"
    assert tokenizer.decode(ChatTemplate(tokenizer).prompt_ids("bare")) == "bare"


@pytest.mark.parametrize(
    ("template", "found"), [(ONE_TURN, "one turn only"), (FORGETS, "drops earlier answers")]
)
def test_a_template_that_cannot_go_on_is_refused_for_conversations_of_several_turns_only(
    tokenizer: Any, template: str, found: str
) -> None:
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer)
    assert chat.note([Conversation(("First?",))]) == ""
    with pytest.raises(TargetError, match=found):
        chat.note([TALK])


def test_turns_that_do_not_fit_are_counted_and_end_their_conversation(tokenizer: Any) -> None:
    engine = Scripted(tokenizer, WITH_SYSTEM, ANSWERS)
    length = len(ChatTemplate(tokenizer).prompt_ids(TALK))
    rows, counts = engine.converse(TALK, context_length=length + 40)
    assert (len(rows), counts.filtered) == (1, {"prompt_too_long": 2})


class Script:
    """An engine that says what it is told to, whatever it is asked."""

    name = "script"

    def __init__(self, *answers: tuple[list[int], Any]) -> None:
        self.answers, self.asked, self.sampling = list(answers), list[list[int]](), list[Sampling]()

    def generate(self, prompts: Any, sampling: Sampling, *how: Any) -> list[Generation]:
        self.asked += [list(prompt) for prompt in prompts]
        self.sampling.append(sampling)
        pairs = zip(prompts, self.answers * len(prompts), strict=False)
        return [Generation(list(prompt), ids, [-1.0] * len(ids), finish) for prompt, (ids, finish) in pairs]


def writer(tokenizer: Any, instructions: Any, answers: Any) -> UnitWriter:
    return UnitWriter(answers, instructions, ChatTemplate(tokenizer), {310}, 8, 256, held_out={"the fox"})


def kept(tokenizer: Any, *answers: Answers) -> list[tuple[list[SyntheticRow], RowCounts]]:
    """The rows and counts of units, one after the other."""
    row_filter = RowFilter({310}, tokenizer.decode)
    return [keep_rows(each, row_filter) for each in answers]


def test_magpie_asks_what_the_target_invented_and_counts_what_is_no_use(tokenizer: Any) -> None:
    def said(text: str) -> tuple[list[int], str]:
        return [*tokenizer(text).input_ids, 3], "stop"

    odd = [([300, 310, 3], "stop"), ([1, 40, 3], "stop"), ([41] * 8, "length"), ([42] * 60, "length")]
    bad = [said("The fox"), said("What is this?"), said("12 + 4"), *odd]
    instructions, answers = Script(said("What is this?"), *bad), Script(([50, 51, 3], "stop"))
    unit = Unit("magpie", 0.6, tuple(ChatTemplate(tokenizer).user_prefix_ids() for _ in range(8)), 60)
    ((rows, counts),) = kept(tokenizer, writer(tokenizer, instructions, answers).write(unit, seed=5))
    assert answers.asked == [ChatTemplate(tokenizer).prompt_ids("What is this?")]
    assert (instructions.sampling, answers.sampling) == ([Sampling(1.0)], [Sampling(0.6)])
    assert [row.response_ids for row in rows] == [[50, 51, 3]]
    once = ["evaluation", "duplicate", "empty", "too_long", "looping"]
    assert counts.filtered == {"instruction_malformed": 2, **{f"instruction_{reason}": 1 for reason in once}}
    assert (counts.asked, counts.written, counts.balance()) == (8, 1, 0)


def test_an_instruction_of_an_earlier_unit_is_a_duplicate(tokenizer: Any) -> None:
    said = ([*tokenizer("Name a river").input_ids, 3], "stop")
    unit_writer = writer(tokenizer, Script(said), Script(([50, 3], "stop"), ([51, 3], "stop")))
    unit = Unit("magpie", 0.6, (ChatTemplate(tokenizer).user_prefix_ids(),), 60)
    first, second = kept(tokenizer, unit_writer.write(unit, 1), unit_writer.write(unit, 2))
    assert first[1].written == 1
    assert second[1].filtered == {"instruction_duplicate": 1}
    assert (second[1].balance(), second[1].generated) == (0, len(said[0]) + 2), "its answer was written too"


def test_prompts_that_leave_no_room_for_an_answer_are_counted_and_not_asked(tokenizer: Any) -> None:
    answers = Script(([50, 3], "stop"))
    unit = Unit("p", 0.6, ([7] * 249, [8] * 248))
    ((rows, counts),) = kept(tokenizer, writer(tokenizer, Script(), answers).write(unit, 1))
    assert (len(rows), counts.filtered, counts.balance()) == (1, {"prompt_too_long": 1}, 0)
    assert answers.asked == [[8] * 248]
