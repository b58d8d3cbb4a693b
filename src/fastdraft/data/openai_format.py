"""One answer in the OpenAI format, as a server sends it or a log keeps it, read as token ids.

`read_choices` takes an answer's JSON apart, `AnswerReader` turns a choice into a `Generation`. vLLM, SGLang,
llama.cpp and OpenAI put ids and log-probs in different places; text without ids is tokenised again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from fastdraft.data.messages import message_text
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.synthesize import LogprobKind

STOP_WORDS = frozenset({"stop", "eos", "eos_token", "end_turn"})
LENGTH_WORDS = frozenset({"length", "max_tokens"})
STRING_WORD = "stop_sequence"  # Anthropic's and TGI's, where a string ended the text
_TOKEN_ID = re.compile(r"token_id:([0-9]{1,12})")
# What OpenAI writes for an unlikely token; how far above 0 rounding may carry a log-prob.
_UNTOLD, _ROUNDING = -9999.0, 1e-3


@dataclass(frozen=True)
class Choice:
    """What one choice of an answer says, nothing added."""

    text: str | None
    token_ids: list[int] | None
    logprobs: list[float] | None
    finish_reason: str | None  # the writer's own word; `stop_sequence` where a string ended it for certain
    stop_id: int | None = None  # that ended the text, where the writer tells it
    stop_strings: tuple[str, ...] = ()  # of which one ended the text, or may have
    beyond: str = ""  # what there is beside the text, or instead: thinking, a call, a refusal
    num_tokens: int | None = None  # of this answer as the writer counted them
    prompt_ids: list[int] | None = None
    num_prompt_tokens: int | None = None


def read_choices(body: Mapping[str, Any], stop: object = None) -> list[Choice]:
    """Every choice of an answer's JSON object; ValueError, with a few words, when it is none.

    `stop` is the request's: a string or several that end an answer.
    """
    choices, usage = body.get("choices"), body.get("usage")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
        raise ValueError("no 'choices'")
    if any(choice.get("delta") is not None for choice in choices):
        raise ValueError("a piece of a streamed answer")
    usage = usage if isinstance(usage, dict) and len(choices) == 1 else {}
    strings = tuple(text for text in (stop if isinstance(stop, list) else [stop]) if isinstance(text, str))
    return [_choice(choice, body, usage, strings) for choice in choices]


def _choice(
    choice: Mapping[str, Any], body: Mapping[str, Any], usage: Mapping[str, Any], strings: tuple[str, ...]
) -> Choice:
    tokens, message = _listed_tokens(choice.get("logprobs")), choice.get("message")
    ids = read_ids(choice.get("token_ids"))
    if ids is None and tokens and all(token_id is not None for token_id, _ in tokens):
        ids = [token_id for token_id, _ in tokens if token_id is not None]
    logprobs = [value for _, value in tokens if value is not None]
    stop, reason = choice.get("stop_reason", choice.get("matched_stop")), choice.get("finish_reason")
    text, beyond = message_text({**choice, **(message if isinstance(message, dict) else {})})
    if isinstance(stop, str):
        strings, reason = (stop,), STRING_WORD
    elif reason != STRING_WORD and (reason != "stop" or {"stop_reason", "matched_stop"} & choice.keys()):
        strings = ()  # an EOS, by a word of its own or by the null beside it
    return Choice(
        text=text,
        token_ids=ids,
        logprobs=logprobs if tokens and len(logprobs) == len(tokens) else None,
        finish_reason=reason if isinstance(reason, str) else None,
        stop_id=stop if type(stop) is int else None,
        stop_strings=strings,
        beyond=beyond,
        num_tokens=_count(usage.get("completion_tokens")),
        prompt_ids=read_ids(choice.get("prompt_token_ids")) or read_ids(body.get("prompt_token_ids")),
        num_prompt_tokens=_count(usage.get("prompt_tokens")),
    )


def _listed_tokens(logprobs: object) -> list[tuple[int | None, float | None]]:
    """(id, log-prob) of each token as the choice lists them; None for what it does not tell."""
    if isinstance(logprobs, list):
        return [(None, read_logprob(value)) for value in logprobs]
    if not isinstance(logprobs, dict):
        return []
    if isinstance(logprobs.get("content"), list):  # chat answers, and llama.cpp's in both APIs
        return [_content_entry(entry) for entry in logprobs["content"]]
    values, names = logprobs.get("token_logprobs"), logprobs.get("tokens")
    if not isinstance(values, list):
        return []
    listed = names if isinstance(names, list) and len(names) == len(values) else [None] * len(values)
    return [(_named_id(name), read_logprob(value)) for name, value in zip(listed, values, strict=True)]


def _content_entry(entry: object) -> tuple[int | None, float | None]:
    if not isinstance(entry, dict):
        return None, None  # a token all the same: without it the others would move up
    token_id, value, prob = _count(entry.get("id")), read_logprob(entry.get("logprob")), entry.get("prob")
    if value is None and isinstance(prob, int | float) and 0 < prob < 1 + _ROUNDING:  # llama.cpp
        value = read_logprob(math.log(prob))
    return token_id if token_id is not None else _named_id(entry.get("token")), value


def _named_id(name: object) -> int | None:
    """17 of `token_id:17`, as vLLM writes tokens when asked."""
    match = _TOKEN_ID.fullmatch(name) if isinstance(name, str) else None
    return int(match[1]) if match else None


def read_ids(value: object) -> list[int] | None:
    """Token ids; None for anything else."""
    whole = isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value)
    return list(value) if whole else None  # type: ignore[call-overload]


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def read_logprob(value: object) -> float | None:
    """A natural log of a probability; None for what cannot be one. NaN stays: the target computed it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isnan(value):
        return math.nan
    return min(float(value), 0.0) if _UNTOLD < value <= _ROUNDING else None


def serves_replay(kind: str, sampling: Sampling) -> bool:
    """Whether these are of the distribution drawn from: raw ones at temperature 1 without truncation."""
    return kind == "processed" or (kind == "raw" and sampling == Sampling(1.0))


@dataclass(frozen=True)
class AnswerReader:
    """From a choice to a generation in the target's vocabulary."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]  # that end an answer, the one to assume first
    vocabulary_size: int
    logprobs: LogprobKind

    def generation(
        self, prompt_ids: Sequence[int], choice: Choice, sampling: Sampling, max_new_tokens: int | None = None
    ) -> Generation:
        """The choice as an answer to `prompt_ids`, cut at `max_new_tokens`; `fault` says why it is no use."""
        prompt, word = list(prompt_ids), choice.finish_reason
        if choice.token_ids is None and choice.beyond:  # its text is not all that the target wrote
            return Generation.failed(prompt, choice.beyond)
        if word not in STOP_WORDS | LENGTH_WORDS | {STRING_WORD}:
            return Generation.failed(prompt, f"finish_{re.sub(r'[^a-z_]', '', word or 'none')[:24]}")
        ids = choice.token_ids if choice.token_ids is not None else self._tokenise(prompt, choice)
        if ids is None:
            return Generation.failed(prompt, "not_round_trip")
        if any(not 0 <= token_id < self.vocabulary_size for token_id in ids):
            return Generation.failed(prompt, "unknown_id")
        told = choice.logprobs is not None and len(choice.logprobs) == len(ids)
        logprobs = choice.logprobs if told else None
        first = next((place for place, token_id in enumerate(ids) if token_id in self.eos_ids), None)
        if first is not None:
            ids = ids[: first + 1]
        elif (end := self._unseen_end(choice)) is not None:
            ids, logprobs = [*ids, end], None  # its log-prob nobody tells
        ids = ids[:max_new_tokens]
        finish: Literal["stop", "length"] = "stop" if ids and ids[-1] in self.eos_ids else "length"
        kept = logprobs[: len(ids)] if logprobs and serves_replay(self.logprobs, sampling) else []
        return Generation(prompt, ids, [0.0] * len(ids) if sampling.temperature == 0 else kept, finish)

    def _unseen_end(self, choice: Choice) -> int | None:
        """The EOS that the writer drew but left out; None where something else ended the text."""
        if choice.finish_reason in LENGTH_WORDS or not self.eos_ids:
            return None
        by_text = {self._decode([token_id]): token_id for token_id in self.eos_ids}
        if choice.stop_strings or choice.finish_reason == STRING_WORD:
            ends = [by_text.get(string) for string in choice.stop_strings]  # of a string that writes an EOS
            return ends[0] if ends and None not in ends else None
        end = self.eos_ids[0] if choice.stop_id is None else choice.stop_id
        return end if end in self.eos_ids else None

    def _tokenise(self, prompt_ids: list[int], choice: Choice) -> list[int] | None:
        """The ids that text without ids stands for; None where they cannot be the ones that were drawn.

        The text is read behind its prompt; ids and text must give each other exactly, with as many
        ids as the writer counted (other tokens can write the same text).
        """
        text = choice.text
        if text is None or "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):
            return None  # half a character: its bytes are lost
        before, special = self._decode(prompt_ids), frozenset(map(int, self.tokenizer.all_special_ids))
        for start, read in ((before, prompt_ids), ("", [])):
            whole = self._encode(start + text)
            ids = whole[len(read) :]
            if whole[: len(read)] != read or self._decode([*prompt_ids, *ids]) != before + text:
                continue
            # The EOS that the target drew is counted and not shown, and so is the string that ended it.
            counted = {None, len(ids), len(ids) + (choice.finish_reason in STOP_WORDS)}
            counted |= {len(self._encode(start + text + end)) - len(read) for end in choice.stop_strings}
            # None may be a special token's words, which the target wrote as plain text.
            if special.isdisjoint(ids) and choice.num_tokens in counted:
                return ids
        return None

    def _decode(self, ids: Sequence[int]) -> str:
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **plain))

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
