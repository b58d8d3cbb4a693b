"""Conversations with a target: every turn in order, its own earlier answers in later prompts.

Answers of a log are never read: what stands before a later turn is what this target says, as when it is
served. Turns of the same number are asked together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fastdraft.data.chat import ChatTemplate, Conversation
from fastdraft.data.filters import is_looping
from fastdraft.functional.generation import Generation


@dataclass(frozen=True)
class Turn:
    """One turn of one conversation."""

    conversation: int  # its place among those asked
    number: int  # 0 is the first
    prompt_ids: list[int]
    answer: Generation | None  # None where only the prompt was wanted


@dataclass(frozen=True)
class Turns:
    """What became of every turn: `turns`, `too_long` and `ended` add up to the turns of all conversations."""

    turns: list[Turn]  # those asked, by number, then by conversation
    too_long: int  # turns whose prompt leaves no room for an answer, and those behind them
    # Turns behind an answer that leaves no history: it failed, is empty, loops or stops in the middle of
    # thinking.
    ended: int


def take_turns(
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    ask: Callable[[int, list[list[int]]], list[Generation]],
    *,
    room: int,
    missing_ids: Collection[int] = (),
    last_answers: bool = True,
) -> Turns:
    """Asks conversations turn by turn; `ask` answers the prompts of one turn, told its number.

    `room` is the most tokens of a prompt; an answer with one of `missing_ids`, ids without a token, ends its
    conversation; without `last_answers` the prompts of the last turns are all that is wanted.
    """
    answers: list[list[str]] = [[] for _ in conversations]
    open_talks = [place for place, talk in enumerate(conversations) if talk.users]
    turns, too_long, ended, missing = list[Turn](), 0, 0, set(missing_ids)
    for number in range(max((len(talk.users) for talk in conversations), default=0)):
        prompts: dict[int, list[int]] = {}
        for place in open_talks:
            ids = chat.prompt_ids(conversations[place], answers[place])
            if 0 < len(ids) <= room:
                prompts[place] = ids
            else:
                too_long += len(conversations[place].users) - number
        wanted = [place for place in prompts if last_answers or number + 1 < len(conversations[place].users)]
        given = ask(number, [prompts[place] for place in wanted]) if wanted else []
        written = dict(zip(wanted, given, strict=True))
        turns += [Turn(place, number, ids, written.get(place)) for place, ids in prompts.items()]
        open_talks = []
        for place, answer in written.items():
            left = len(conversations[place].users) - number - 1
            failed = answer.fault or any(map(math.isnan, answer.logprobs))
            unusable = failed or not missing.isdisjoint(answer.body) or is_looping(answer.body)
            said = None if unusable or not left else chat.answer(answer)
            if said is None:
                ended += left
            else:
                answers[place].append(said)
                open_talks.append(place)
    return Turns(turns, too_long, ended)
