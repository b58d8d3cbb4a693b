"""Logs of a target in the OpenAI format, one JSON object a line, as prompts and answers in token ids.

A line is {messages or prompt, choices or response}, with its request's keys beside it or under `request` or
`body`; or the Batch API's output with the requests it answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.corpora import JSONL, describe_files, find_files
from fastdraft.data.openai_format import AnswerReader, Choice, read_choices, read_ids, read_logprob
from fastdraft.data.prompts import digest_of, normalised, tell_counts
from fastdraft.data.readers import read_rows
from fastdraft.data.rows import ids_hash
from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.modeling.tokenizer import UnknownId
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.evaluation import LoggedTexts
from fastdraft.recipe.synthesize import TranscriptLog, TranscriptPrompts

# What a request may say without bending the distribution; other values make its log-probs no use for replay.
_NEUTRAL = {"min_p": 0, "typical_p": 1, "repetition_penalty": 1, "repeat_penalty": 1}
_NEUTRAL |= {"presence_penalty": 0, "frequency_penalty": 0}
_BENDING = ["logit_bias", "response_format", "grammar", "bad_words"]
_BENDING += [f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar")]
_HOTTEST, _LARGEST_TOP_K = 10, 1 << 30


@dataclass(frozen=True)
class LogEntry:
    """One line of a log, before anything is tokenised."""

    messages: list[dict[str, str]] | None
    prompt: str | list[int]  # instead of messages
    choices: list[Choice]
    sampling: Sampling
    bent: bool = False  # the request bent the distribution by other means than temperature, top-k and top-p
    refused: str = ""  # why it is of no use: `no_answer` (the call failed) or `unsupported` (tools, pictures)

    @property
    def texts(self) -> list[str]:
        """Everything that the user said, or the prompt's text; empty for a prompt of ids."""
        if self.messages is not None:
            return [message["content"] for message in self.messages if message["role"] == "user"]
        return [self.prompt] if isinstance(self.prompt, str) else []

    @property
    def first_turn(self) -> list[dict[str, str]]:
        """Of a later turn what stands before the conversation's first answer; else empty."""
        roles = [message["role"] for message in self.messages or ()]
        return (self.messages or [])[: roles.index("assistant")] if "assistant" in roles else []


@dataclass(frozen=True)
class Transcript:
    """One answer of a log."""

    generation: Generation
    sampling: Sampling
    key: str = ""  # of a later turn the hash of its conversation's first prompt, with whose rows it belongs


@dataclass(frozen=True)
class Transcripts:
    """A log's answers, and how many were refused before they were looked at."""

    rows: list[Transcript]
    # `evaluation` (also of a task), `empty`, `unrendered` (the template refuses it), or as LogEntry's.
    refused: dict[str, int]


def describe(config: TranscriptLog) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    found = {**config.model_dump(mode="json"), **describe_files(find_files(config.path, JSONL))}
    if config.requests:
        found["requests_files"] = describe_files(find_files(config.requests, JSONL))
    return found


def look(config: TranscriptLog) -> None:
    """Reads the first line, so that a wrong path or shape shows before hours of other work."""
    if next(read_entries(config), None) is None:
        found = f"{config.path}: no line in it; must hold logged answers"
        raise DataError(found, "add some or correct the path")


def refused_digest(config: TranscriptLog, held_out: Iterable[str]) -> str:
    """Digest of the log's prompts that are evaluation prompts too; empty without any."""
    wanted = set(held_out)
    said = (normalised(text) for entry in read_entries(config) if wanted for text in entry.texts)
    return digest_of(text for text in said if text in wanted)


def read_transcripts(
    config: TranscriptPrompts | LoggedTexts,
    chat: ChatTemplate,
    vocabulary: Vocabulary,
    seed: int,
    is_evaluation: Callable[[str], bool] = lambda text: False,
    *,
    shuffled: bool = True,
) -> Transcripts:
    """Every answer of a log as the target's own text in token ids, without what `is_evaluation` tells.

    `shuffled` brings the answers into an order of the seed, of which the config's `count` takes the first.
    """
    # `target`: scored later, so that the logged ones serve nobody.
    ends: Any = vocabulary.eos_token_ids
    kinds: Any = ("none", config.logprobs)
    readers = {kind: AnswerReader(chat.tokenizer, ends, vocabulary.size, kind) for kind in kinds}
    reasons = ("evaluation", "empty", "unrendered", "no_answer", "unsupported", "unknown_id")
    refused = dict.fromkeys(reasons, 0)
    rows: list[Transcript] = []
    for entry in read_entries(config):
        reason, prompt, key = entry.refused, list[int](), ""
        if not reason and any(map(is_evaluation, filter(None, entry.texts))):
            reason = "evaluation"
        if not reason:
            try:
                prompt = _prompt_ids(entry, chat)
                key = ids_hash(chat.render(entry.first_turn)) if entry.first_turn else ""
                reason = "" if prompt else "empty"
            except UnknownId:
                reason = "unknown_id"
            except (TargetError, UnicodeEncodeError):
                reason = "unrendered"
        if reason:
            refused[reason] += len(entry.choices) or 1
            continue
        reader = readers["none" if entry.bent else config.logprobs]
        answers = [_generation(reader, prompt, choice, entry) for choice in entry.choices]
        rows += [Transcript(answer, entry.sampling, key) for answer in answers]
    if not rows:
        told = tell_counts(refused) or "no answer"
        raise DataError(
            f"transcripts '{config.name}': {told}; one must be left", "add answers or correct `path`"
        )
    order = list(range(len(rows)))
    random.Random(f"{seed}/{config.name}").shuffle(order)
    chosen = order[: config.count]
    return Transcripts([rows[place] for place in (chosen if shuffled else sorted(chosen))], refused)


def _prompt_ids(entry: LogEntry, chat: ChatTemplate) -> list[int]:
    "".join(entry.texts).encode()  # half a character alone (a lone surrogate) cannot be read
    if entry.messages is not None:
        return chat.render(entry.messages)
    if isinstance(entry.prompt, str):
        return chat.prompt_ids(entry.prompt, chat=False)
    return list(entry.prompt)


def _generation(reader: AnswerReader, prompt: Sequence[int], choice: Choice, entry: LogEntry) -> Generation:
    """The logged prompt ids count where there are any: they are what the target read."""
    prompt = list(choice.prompt_ids or prompt)
    if any(not 0 <= token_id < reader.vocabulary_size for token_id in prompt):
        return Generation.failed([], "unknown_id")
    if not choice.prompt_ids and choice.num_prompt_tokens not in (None, len(prompt)):
        return Generation.failed(prompt, "prompt_read_otherwise")
    if choice.logprobs and any(map(math.isnan, choice.logprobs)):
        return Generation.failed(prompt, "not_finite")
    return reader.generation(prompt, choice, entry.sampling)


def read_entries(config: TranscriptLog) -> Iterator[LogEntry]:
    """Every line of a log; the errors name file and line."""
    requests = {
        str(row["custom_id"]): row["body"]
        for path in (find_files(config.requests, JSONL).values() if config.requests else ())
        for _, row in read_rows(path)
        if "custom_id" in row and isinstance(row.get("body"), dict)
    }
    for path in find_files(config.path, JSONL).values():
        for where, row in read_rows(path):
            name = str(row.get("custom_id"))
            if config.requests and name not in requests:
                found = f"{where}: custom_id {name[:60]!r}; must be in the file that `requests` names"
                raise DataError(found, "add that file to `requests`, or delete the line")
            yield _entry(where, {**row, "request": requests[name]} if config.requests else row, config)


def _entry(where: str, row: Mapping[str, Any], config: TranscriptLog) -> LogEntry:
    request = next((row[key] for key in ("request", "body") if isinstance(row.get(key), dict)), row)
    told = {**row, **request}
    messages, prompt = told.get("messages"), told.get("prompt")
    if reason := "no_answer" if _failed(row) else "unsupported" if _is_unsupported(messages) else "":
        return LogEntry(None, "", [], Sampling(0.0), refused=reason)
    messages = _messages(where, messages)
    choices = _choices(where, row, chat=messages is not None)
    if not choices and messages and messages[-1]["role"] == "assistant":
        choices = [Choice(messages[-1]["content"], None, None, str(row.get("finish_reason") or "stop"))]
        messages = messages[:-1]
    if not choices or not (messages or isinstance(prompt, str) or read_ids(prompt)):
        batch = bool(choices) and "custom_id" in row
        fix = "set `requests` to the batch's input" if batch else "correct or delete the line"
        keys = ", ".join(map(str, list(row)[:8])) or "none"
        found = f"{where}: keys {keys}; must hold `messages` or `prompt`, and"
        raise DataError(f"{found} `choices`, `response` or a last message of the assistant", fix)
    bent = any(told.get(key) not in (None, value) for key, value in _NEUTRAL.items())
    bent = bent or any(told.get(key) for key in _BENDING)
    return LogEntry(messages, [] if messages else prompt or [], choices, _sampling(where, told, config), bent)


def _failed(row: Mapping[str, Any]) -> bool:
    """The call gave no answer: an empty response, an error in its place, or a status that is not 2xx."""
    answers = [row[key] for key in ("response", "choices") if key in row]
    if answers and all(answer is None for answer in answers):
        return True
    bodies = [row, *(answer for answer in answers if isinstance(answer, dict))]
    bodies += [body["body"] for body in bodies if isinstance(body.get("body"), dict)]
    codes = [body.get("status_code") for body in bodies]
    if any(type(code) is int and not 200 <= code < 300 for code in codes):
        return True
    return any(b.get("error") and not b.get("choices") and not b.get("content") for b in bodies[1:])


def _is_unsupported(messages: object) -> bool:
    """A conversation of more than text: tools called or answering, pictures or sounds among its parts."""
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        parts = message["content"] if isinstance(message.get("content"), list) else []
        called = message.get("tool_calls") or message.get("function_call")
        if called or message.get("role") in ("tool", "function"):
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
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(text for text in parts if isinstance(text, str))
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            found = f"{where}: a message without text; each needs a `role` and a `content`"
            raise DataError(found, "correct or delete the line")
        messages.append({"role": message["role"], "content": content})
    return messages


def _choices(where: str, row: Mapping[str, Any], *, chat: bool) -> list[Choice]:
    """The line's answers: `choices`, its own or its response's, or a response of text."""
    response = row.get("response")
    bodies = [row, *([response] if isinstance(response, dict) else [])]
    bodies += [body["body"] for body in bodies if isinstance(body.get("body"), dict)]
    prompt_ids = read_ids(row.get("prompt_token_ids"))
    for body in bodies:
        try:
            choices = read_choices(body)
        except ValueError as error:
            if "streamed" in str(error):
                fix = "join the pieces of each answer, or log whole answers"
                raise DataError(f"{where}: {error}; an answer must stand in one piece", fix) from None
            continue
        return [replace(choice, prompt_ids=choice.prompt_ids or prompt_ids) for choice in choices]
    text = response.get("content") if isinstance(response, dict) else response
    if not isinstance(text, str):
        return []
    ids = read_ids(row.get("response_token_ids")) or read_ids(row.get("token_ids"))
    reason = str(row.get("finish_reason") or ("stop" if chat else "length"))
    told = row.get("logprobs")
    values = [read_logprob(value) for value in told] if isinstance(told, list) else [None]
    logprobs = [value for value in values if value is not None] if None not in values else None
    return [Choice(text, ids, logprobs, reason, prompt_ids=prompt_ids)]


def _sampling(where: str, told: Mapping[str, Any], config: TranscriptLog) -> Sampling:
    values = {
        key: _number(told[key]) if told.get(key) is not None else getattr(config, key)
        for key in ("temperature", "top_k", "top_p")
    }
    if values["temperature"] is None:
        found = f"{where}: no temperature; it must be known how an answer was drawn"
        raise DataError(found, "set the source's `temperature` for lines that do not tell it")
    fits = {"temperature": 0 <= values["temperature"] <= _HOTTEST}
    if values["temperature"] != 0:  # of a greedy answer only the temperature counts
        fits |= {"top_k": values["top_k"] % 1 == 0, "top_p": 0 < values["top_p"] <= 1}
    if wrong := [name for name, fit in fits.items() if not fit]:
        rule = f"temperature must be from 0 to {_HOTTEST}, top_k a whole number, top_p above 0 and at most 1"
        raise DataError(
            f"{where}: {wrong[0]} {told.get(wrong[0])!r:.40}; {rule}", "correct or delete the line"
        )
    # In six digits, by which files and tables call it: 0.7 and float32's 0.699999988 are one temperature.
    temperature = float(f"{values['temperature']:g}")
    if temperature == 0:
        return Sampling(0.0)
    return Sampling(temperature, max(0, min(int(values["top_k"]), _LARGEST_TOP_K)), values["top_p"])


def _number(value: object) -> float:
    """NaN for what is none, which is smaller than nothing and no multiple of 1."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan
