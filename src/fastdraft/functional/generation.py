"""What is asked of a text that a model writes, and what is known of it afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastdraft.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """The distribution from which the target writes: temperature first, then top-k, then top-p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all


@dataclass(frozen=True)
class Generation:
    """One answer of the target."""

    prompt_ids: list[int]
    response_ids: list[int]  # without the prompt; ends with the EOS id when `finish_reason` is `stop`
    # Natural log of the probability of each response id under the very distribution it was drawn from; 0 when
    # greedy. Empty where a server does not tell it: such text can be trained on, and replayed only where no
    # probability is asked.
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    fault: str = ""  # why this answer is no use as a row, in one word; empty for every good one

    @classmethod
    def failed(cls, prompt_ids: list[int], fault: str) -> Generation:
        return cls(prompt_ids, [], [], "length", fault)

    @property
    def body(self) -> list[int]:
        """The response without the EOS id that ended it."""
        return self.response_ids[:-1] if self.finish_reason == "stop" else self.response_ids


class RenderedPrompt(list[int]):
    """Token ids that still know their messages, for servers that render messages themselves."""

    def __init__(
        self,
        ids: Iterable[int],
        messages: Iterable[Mapping[str, str]],
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(ids)
        self.messages = [dict(message) for message in messages]
        self.arguments = dict(arguments or {})  # variables of the template


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, context_length: int) -> None:
    """Raises DataError when a prompt is empty or leaves no room for `max_new_tokens` in the context."""
    for index, count in enumerate(map(len, prompts)):
        where, room = f"prompt {index}", context_length - max_new_tokens
        if not count:
            raise DataError(f"{where}: no tokens; needs at least one token", "give some text")
        if count > room:
            found = f"{count} tokens and {max_new_tokens} new ones; the context holds {context_length}"
            raise DataError(f"{where}: {found}", "shorten the prompt or lower max_new_tokens")


class Engine(Protocol):
    """A runtime that writes text as the target. Implementations: runtimes/."""

    name: str

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt (token ids), reproducible for equal prompts, order and seed."""
        ...

    def with_ends(self, eos_ids: Sequence[int]) -> Engine:
        """The same target, whose answers end at these ids; for text that nobody replays."""
        ...
