"""One reader of messages: names of roles, shapes of rows, and what in a message is more than its text."""

from __future__ import annotations

from typing import Any

import pytest

from fastdraft.data.messages import Message, read_messages
from fastdraft.errors import DataError

ASK = {"role": "user", "content": "q"}
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}


def said(message: dict[str, Any]) -> Message:
    found = read_messages([ASK, {"role": "assistant", **message}], "here")
    assert isinstance(found, list)
    return found[-1]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        ("system user assistant", "system user assistant"),
        ("developer Human GPT", "system user assistant"),
        ("prompter bing user Bard", "user assistant user assistant"),
        ("human model tool model", "user assistant tool assistant"),
        ("user qwen2.5-7b user qwen2.5-7b", "user assistant user assistant"),  # a model's own name
        ("user ipython observation function", "user tool tool tool"),
    ],
)
def test_roles_are_known_by_many_names(names: str, roles: str) -> None:
    found = read_messages([{"role": name, "content": "x"} for name in names.split()], "here")
    assert [message.role for message in found if isinstance(message, Message)] == roles.split()


@pytest.mark.parametrize(
    "names",
    [
        "user critic assistant",
        "moderator user",
        "user alice bob",
        "user a user b",
        "user gpt user a",
        "user a a",
        "npc",
    ],
)
def test_a_name_that_nobody_knows_and_that_does_not_alternate_with_a_user_is_told(names: str) -> None:
    found = read_messages([{"from": name, "value": "x"} for name in names.split()], "here")
    assert isinstance(found, str)
    assert found.startswith("role '")
    assert found.count("'") == 2 * len(
        {"critic", "moderator", "alice", "bob", "a", "b", "npc"} & {*names.split()}
    )


@pytest.mark.parametrize(
    "value",
    [
        [ASK, {"role": "assistant", "content": "a"}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"speaker": "Human", "text": "q"}, {"speaker": "Assistant", "text": "a"}],
        [
            {"from": "human", "value": "q", "role": None, "content": None},
            {"role": "assistant", "content": "a", "from": None, "value": None, "tool_calls": None},
        ],
        {"from": ["human", "gpt"], "value": ["q", "a"]},
        [ASK, {"role": "assistant", "content": [{"type": "text", "text": "a", "image_url": None}]}],
        [ASK, {"role": "assistant", "content": ["a"], "refusal": None, "reasoning_content": ""}],
    ],
)
def test_every_shape_of_a_conversation_reads_alike(value: Any) -> None:
    assert read_messages(value, "here") == [Message("user", "q"), Message("assistant", "a")]


@pytest.mark.parametrize(
    ("message", "beyond"),
    [
        ({"content": "a", "reasoning_content": "hm"}, "thinking"),
        ({"content": "a", "reasoning": "hm"}, "thinking"),
        ({"content": "a", "thinking": "hm"}, "thinking"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}, "thinking"),
        ({"content": None, "tool_calls": [{}], "reasoning": "hm"}, "tools"),
        ({"content": "a", "function_call": {"name": "f"}}, "tools"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "tool_use", "name": "f"}]}, "tools"),
        ({"content": None, "refusal": "no"}, "refusal"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "refusal"),
        ({"content": [{"type": "text", "text": "a"}, PICTURE]}, "media"),
        ({"content": [{"type": ["text"], "text": "b"}]}, "media"),
        ({"content": "a", "images": ["base64"]}, "media"),
        ({"content": None}, "no_text"),
    ],
)
def test_what_is_more_than_text_is_told_wherever_it_stands(message: dict[str, Any], beyond: str) -> None:
    found = said(message)
    assert (found.beyond, found.text in ("", "a")) == (beyond, True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hello", "a str; must be text or a list"),
        ({"from": ["human"], "value": ["q", "a"]}, "a dict; must be text or a list"),
        (["hello"], "a str instead of a message"),
        ([{"content": "a"}], "without role"),
        ([{"role": 7, "content": "a"}], "without role"),
        ([{"role": "user"}], "message of the user without text"),
        ([{"role": "user", "content": 7}], "message of the user without text"),
        ([ASK, {"role": "assistant", "content": 7}], "message of the assistant without text"),
    ],
)
def test_a_damaged_message_is_named(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"^file: line 3: .*{words}"):
        read_messages(value, "file: line 3")
