"""Lines of a target's log in the OpenAI format, one JSON object each, before anything is tokenised.

Decides which shapes of a line are understood (a chat with its response, a conversation that ends with the assistant, a prompt
with its completion, a logged request with its response, the output of a batch with its requests), that a line which leaves open
how the answer was drawn stops the run instead of being guessed, and that calls which failed and conversations with tools or
pictures are named and not read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastdraft.data.openai_format import Choice, read_choices, read_logprob
from fastdraft.data.readers import read_jsonl
from fastdraft.data.corpora import JSONL, describe_files, find_files
from fastdraft.errors import DataError
from fastdraft.functional.generation import Sampling
from fastdraft.recipe.data import TranscriptLog

_NEUTRAL = {
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""What a request may say without bending the distribution; anything else in these keys makes its log-probs no use for replay."""
_BENDING = (
    "logit_bias",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "response_format",
    "grammar",
    "bad_words",
)
_ANSWERS = ("response", "completion", "answer", "output")
_HOTTEST, _LARGEST_TOP_K = 10, 1 << 30
_SHAPES = "must hold `messages` or `prompt`, and `choices`, `response` or a last message of the assistant"


def look(log: TranscriptLog) -> None:
    """Reads the first line, so that a wrong path or a shape that is not understood shows before hours of other work."""
    if next(read_entries(log), None) is None:
        raise DataError(
            f"{log.path}: no line in it: must hold logged answers", "add some or correct the path"
        )


def describe(log: TranscriptLog) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    own = log.model_dump(mode="json", exclude=set() if log.requests else {"requests"})
    asked = {"requests_files": describe_files(find_files(log.requests, JSONL))} if log.requests else {}
    return {**own, **describe_files(find_files(log.path, JSONL)), **asked}


def _asked(log: TranscriptLog) -> dict[str, Mapping[str, Any]]:
    """`custom_id` -> request, of `requests`; empty without them."""
    files = find_files(log.requests, JSONL).values() if log.requests else ()
    rows = (row for path in files for _, row in read_jsonl(path))
    return {
        str(row["custom_id"]): row["body"]
        for row in rows
        if "custom_id" in row and isinstance(row.get("body"), dict)
    }


@dataclass(frozen=True)
class Entry:
    """One line of a log, before anything is tokenised."""

    where: str
    messages: list[dict[str, str]] | None
    prompt: str | list[int]
    """Instead of messages."""
    choices: list[Choice]
    sampling: Sampling
    bent: bool
    """The request bent the distribution by other means than temperature, top-k and top-p."""
    refused: str = ""
    """Why the line is of no use, in one word: `no_answer` (the call failed) or `unsupported` (tools, pictures)."""

    @property
    def texts(self) -> list[str]:
        """Everything that the user said, or the prompt's text; empty for a prompt of ids."""
        if self.messages is not None:
            return [message["content"] for message in self.messages if message["role"] == "user"]
        return [self.prompt] if isinstance(self.prompt, str) else []

    @property
    def first_turn(self) -> list[dict[str, str]]:
        """Of a later turn what stands before the conversation's first answer; else empty."""
        answers = [
            place for place, message in enumerate(self.messages or ()) if message["role"] == "assistant"
        ]
        return (self.messages or [])[: answers[0]] if answers else []


def read_entries(config: TranscriptLog) -> Iterator[Entry]:
    """Every line of a log.

    Raises:
        DataError: naming the file and line that is damaged, of no known shape, or silent about its temperature.
    """
    asked = _asked(config)
    for path in find_files(config.path, JSONL).values():
        for number, row in read_jsonl(path):
            where = f"{path} line {number}"
            yield _entry(where, {**row, "request": _request(where, row, asked)} if asked else row, config)


def _request(where: str, row: Mapping[str, Any], asked: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a line of the Batch API's output answers."""
    request = asked.get(str(row.get("custom_id")))
    if request is None:
        rule = "must be in the file that `requests` names"
        raise DataError(
            where,
            f"custom_id {str(row.get('custom_id'))[:60]!r}",
            rule,
            "add that file to `requests`, or delete the line",
        )
    return request


def _entry(where: str, row: Mapping[str, Any], config: TranscriptLog) -> Entry:
    request = next((row[key] for key in ("request", "body") if isinstance(row.get(key), dict)), row)
    told_messages, prompt = (
        request.get("messages", row.get("messages")),
        request.get("prompt", row.get("prompt")),
    )
    if reason := "no_answer" if _failed(row) else "unsupported" if _is_unsupported(told_messages) else "":
        return Entry(where, None, "", [], Sampling(0.0), False, reason)
    messages = _messages(where, told_messages)
    choices = _choices(where, row, chat=messages is not None)
    if not choices and messages and messages[-1]["role"] == "assistant":
        choices = [Choice(messages[-1]["content"], None, None, str(row.get("finish_reason") or "stop"))]
        messages = messages[:-1]
    is_ids = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
    if not choices or not (messages or isinstance(prompt, str) or is_ids):
        remedy = (
            "set `requests` to the batch's input"
            if choices and "custom_id" in row
            else "mend or delete the line"
        )
        raise DataError(where, f"keys {', '.join(map(str, list(row)[:8])) or 'none'}", _SHAPES, remedy)
    told = {**row, **request}
    sampling = _sampling(where, told, config)
    bent = any(told.get(key) not in (None, value) for key, value in _NEUTRAL.items()) or any(
        told.get(key) for key in _BENDING
    )
    return Entry(
        where, messages, [] if messages else (prompt if prompt is not None else ""), choices, sampling, bent
    )


def _failed(row: Mapping[str, Any]) -> bool:
    """The log tells that the call gave no answer: an empty response, an error in its place, or a status of HTTP that is none of success."""
    answers = [row[key] for key in (*_ANSWERS, "choices") if key in row]
    if answers and all(answer is None for answer in answers):
        return True
    bodies = [row, *(answer for answer in answers if isinstance(answer, dict))]
    bodies += [body["body"] for body in bodies if isinstance(body.get("body"), dict)]
    if any(
        type(code) is int and not 200 <= code < 300 for body in bodies for code in [body.get("status_code")]
    ):
        return True
    return any(
        body.get("error") and not body.get("choices") and not body.get("content") for body in bodies[1:]
    )


def _is_unsupported(messages: object) -> bool:
    """A conversation of more than text: tools called or answering, pictures or sounds among the parts of a message."""
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if (
            message.get("role") in ("tool", "function")
            or message.get("tool_calls")
            or message.get("function_call")
        ):
            return True
        if any(isinstance(part, dict) and not isinstance(part.get("text"), str) for part in parts):
            return True
    return False


def _messages(where: str, value: object) -> list[dict[str, str]] | None:
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(
                part["text"]
                for part in content
                if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
        if (
            not isinstance(message, dict)
            or not isinstance(content, str)
            or not isinstance(message.get("role"), str)
        ):
            raise DataError(
                where,
                "a message without text",
                "each message needs a `role` and a `content`",
                "mend or delete the line",
            )
        messages.append({"role": message["role"], "content": content})
    return messages


def _choices(where: str, row: Mapping[str, Any], *, chat: bool) -> list[Choice]:
    """The line's answers, wherever they stand."""
    bodies = [row, *(row[key] for key in _ANSWERS if isinstance(row.get(key), dict))]
    bodies += [
        body["body"] for body in bodies if isinstance(body.get("body"), dict) and "choices" in body["body"]
    ]
    for body in bodies:
        if "choices" in body:
            try:
                choices = read_choices(body)
            except ValueError as error:
                if "streamed" in str(error):
                    rule, remedy = (
                        "an answer must stand in one piece",
                        "join the pieces of each answer, or log whole answers",
                    )
                    raise DataError(where, str(error), rule, remedy) from None
                continue
            return [
                choice
                if choice.prompt_ids
                else replace(choice, prompt_ids=_listed(row.get("prompt_token_ids")))
                for choice in choices
            ]
    for key in _ANSWERS:
        value = row.get(key)
        text = value if isinstance(value, str) else value.get("content") if isinstance(value, dict) else None
        if isinstance(text, str):
            ids = next(
                (ids for name in ("response_token_ids", "token_ids") if (ids := _listed(row.get(name)))), None
            )
            reason = str(row.get("finish_reason") or ("stop" if chat else "length"))
            values = row.get("logprobs")
            read = [read_logprob(value) for value in values] if isinstance(values, list) else [None]
            logprobs = [value for value in read if value is not None] if None not in read else None
            return [Choice(text, ids, logprobs, reason, prompt_ids=_listed(row.get("prompt_token_ids")))]
    return []


def _listed(value: object) -> list[int] | None:
    return (
        list(value)
        if isinstance(value, list) and value and all(type(item) is int for item in value)
        else None
    )


def _sampling(where: str, told: Mapping[str, Any], config: TranscriptLog) -> Sampling:
    keys = ("temperature", "top_k", "top_p")
    values: dict[str, Any] = {
        key: told.get(key) if told.get(key) is not None else getattr(config, key) for key in keys
    }
    if values["temperature"] is None:
        rule = "replay and tables must know how an answer was drawn"
        raise DataError(
            where,
            "no temperature",
            rule,
            f"set `temperature` of transcripts '{config.name}' for lines that do not tell it",
        )
    # In six digits, by which files and tables call it: 0.7 and float32's 0.699999988 are one temperature.
    temperature = float(
        f"{_setting(where, 'temperature', values, 0 <= _number(values['temperature']) <= _HOTTEST):g}"
    )
    if temperature == 0:
        return Sampling(0.0)
    top_k = _setting(where, "top_k", values, _number(values["top_k"]) % 1 == 0)
    top_p = _setting(where, "top_p", values, 0 < _number(values["top_p"]) <= 1)
    return Sampling(temperature, max(0, min(int(top_k), _LARGEST_TOP_K)), top_p)


def _setting(where: str, name: str, values: Mapping[str, Any], fits: bool) -> float:
    if not fits:
        rule = f"temperature must be from 0 to {_HOTTEST}, top_k a whole number, top_p above 0 and at most 1"
        raise DataError(where, f"{name} {values[name]!r:.40}", rule, "mend or delete the line")
    return _number(values[name])


def _number(value: object) -> float:
    """NaN for what is none, which is smaller than nothing and no multiple of 1."""
    if isinstance(value, bool):
        return math.nan
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return float(value)  # type: ignore[arg-type]
    return math.nan
