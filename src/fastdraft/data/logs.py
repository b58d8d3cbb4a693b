"""Logs of a target, one request with its answer a line or row, as prompts and answers in token ids.

`read_transcripts` reads a source of the recipe; data/log_formats.py knows how lines are written, and
data/openai_format.py makes ids of an answer. What cannot be used is counted by its reason.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.files import ROWS, describe_files, find_files
from fastdraft.data.log_formats import (
    TALKS,
    answered,
    asked,
    flat_answer,
    has_failed,
    system_words,
    template_arguments,
)
from fastdraft.data.messages import Message, read_messages
from fastdraft.data.openai_format import AnswerReader, Choice, read_choices, read_ids
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
# Arguments of a request that are about its last message alone.
_OF_THE_LAST = {"add_generation_prompt", "continue_final_message"}
# Why lines are refused; what they say beyond text has further names: `tools`, `thinking`, `unsupported_echo`
_REASONS = ("evaluation", "empty", "unrendered", "no_answer", "unknown_id")
_HOTTEST, _LARGEST_TOP_K, _GREEDY = 10, 1 << 30, Sampling(0.0)


@dataclass(frozen=True)
class LogEntry:
    """One line of a log, before anything is tokenised."""

    messages: list[Message] | None
    prompt: str | list[int] = ""  # instead of messages
    choices: list[Choice] = field(default_factory=list)
    sampling: Sampling = _GREEDY
    arguments: dict[str, Any] = field(default_factory=dict)  # of the request, for the chat template
    bent: bool = False  # the request bent the distribution by other means than temperature, top-k and top-p
    refused: str = ""  # why it is of no use
    names: frozenset[str] = frozenset()  # of roles that nobody knows, taken as the assistant's; or refused

    @property
    def texts(self) -> list[str]:
        """Everything that the user said, or the prompt's text; empty for a prompt of ids."""
        if self.messages is not None:
            return [message.text for message in self.messages if message.role == "user"]
        return [self.prompt] if isinstance(self.prompt, str) else []

    def prompt_ids(self, chat: ChatTemplate) -> list[int]:
        """As the target read it."""
        "".join(self.texts).encode()  # half a character alone (a lone surrogate) cannot be read
        if all(choice.prompt_ids for choice in self.choices):
            return self.choices[0].prompt_ids or []
        if self.messages:
            return chat.render([message.plain for message in self.messages], self.arguments)
        if isinstance(self.prompt, str):
            return chat.prompt_ids(self.prompt, chat=False) if self.prompt else []
        return list(self.prompt)

    def key(self, chat: ChatTemplate) -> str:
        """Of a later turn the hash of what stands before its conversation's first answer; else empty."""
        roles = [message.role for message in self.messages or ()]
        first = (self.messages or [])[: roles.index("assistant")] if "assistant" in roles else []
        arguments = {key: value for key, value in self.arguments.items() if key not in _OF_THE_LAST}
        return ids_hash(chat.render([message.plain for message in first], arguments)) if first else ""


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
    note: str = ""  # what the user should know of how lines were read


def describe(config: TranscriptLog) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    found = {**config.model_dump(mode="json"), **describe_files(find_files(config.path, ROWS).files)}
    if config.requests:
        found["requests_files"] = describe_files(find_files(config.requests, ROWS).files)
    return found


def look(config: TranscriptLog, chat: ChatTemplate) -> None:
    """Reads up to the first line of use, so that a wrong path, shape or template shows before other work."""
    why = "no line of use in it; must hold logged answers"
    for entry in read_entries(config):
        try:
            if not entry.refused and entry.prompt_ids(chat):
                return
        except (TargetError, UnicodeEncodeError) as error:
            why = f"no prompt of it can be rendered ({str(error)[:160]})"
    raise DataError(f"{config.path}: {why}", "add some or correct the path")


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
    refused = Counter(dict.fromkeys(_REASONS, 0))
    names, strangers = Counter[str](), Counter[str]()
    rows: list[Transcript] = []
    for entry in read_entries(config):
        reason, prompt, key = entry.refused, list[int](), ""
        (strangers if reason == "unknown_role" else names).update(entry.names)
        if not reason and any(map(is_evaluation, filter(None, entry.texts))):
            reason = "evaluation"
        if not reason:
            try:
                prompt, key = entry.prompt_ids(chat), entry.key(chat)
                reason = "" if prompt else "empty"
            except UnknownId:
                reason = "unknown_id"
            except (TargetError, UnicodeEncodeError):
                reason = "unrendered"
        if reason:
            refused[reason] += len(entry.choices) or 1
            continue
        reader = readers["none" if entry.bent else config.logprobs]
        answers = [_generation(chat, reader, prompt, choice, entry) for choice in entry.choices]
        rows += [Transcript(answer, entry.sampling, key) for answer in answers]
    if not rows:
        told = tell_counts(refused) or "no answer"
        raise DataError(
            f"transcripts '{config.name}': {told}; one must be left", "add answers or correct `path`"
        )
    order = list(range(len(rows)))
    random.Random(f"{seed}/{config.name}").shuffle(order)
    chosen = order[: config.count]
    notes = [f"roles taken as the assistant's: {tell_counts(names)}"] if names else []
    notes += [f"unknown_role: {tell_counts(strangers)}"] if strangers else []
    return Transcripts(
        [rows[place] for place in (chosen if shuffled else sorted(chosen))], refused, "; ".join(notes)
    )


def _generation(
    chat: ChatTemplate, reader: AnswerReader, prompt: Sequence[int], choice: Choice, entry: LogEntry
) -> Generation:
    """The logged prompt ids count where there are any: they are what the target read."""
    prompt = list(choice.prompt_ids or prompt)
    if any(not 0 <= token_id < reader.vocabulary_size for token_id in prompt):
        return Generation.failed([], "unknown_id")
    if not choice.prompt_ids and choice.num_prompt_tokens not in (None, len(prompt)):
        return Generation.failed(prompt, "prompt_read_otherwise")
    if choice.logprobs and any(map(math.isnan, choice.logprobs)):
        return Generation.failed(prompt, "not_finite")
    if (
        choice.token_ids is None
        and choice.num_tokens is None
        and chat.lacks_thinking(prompt, choice.text or "")
    ):
        return Generation.failed(prompt, "thinking")
    return reader.generation(prompt, choice, entry.sampling)


def read_entries(config: TranscriptLog) -> Iterator[LogEntry]:
    """Every line of a log; the errors name file and line."""
    requests = {
        str(row["custom_id"]): row.get("body") or row.get("params")  # Anthropic's
        for path in (find_files(config.requests, ROWS).files.values() if config.requests else ())
        for _, row in read_rows(path)
        if "custom_id" in row
    }
    for path in find_files(config.path, ROWS).files.values():
        for where, row in read_rows(path):
            name = str(row.get("custom_id"))
            if config.requests and name not in requests:
                found = f"{where}: custom_id {name[:60]!r}; must be in the file that `requests` names"
                raise DataError(found, "add that file to `requests`, or delete the line")
            yield _entry(where, {**row, "request": requests[name]} if config.requests else row, config)


def _entry(where: str, row: Mapping[str, Any], config: TranscriptLog) -> LogEntry:
    if has_failed(row):
        return LogEntry(None, refused="no_answer")
    told = asked(row)
    listed = isinstance(told.get("messages"), list | dict)
    messages = read_messages(told["messages"], where) if listed else None
    if isinstance(messages, str):
        return LogEntry(None, refused="unknown_role", names=frozenset([messages]))
    is_talk = any(map(told.get, TALKS))
    names = frozenset(message.name for message in messages or () if message.name)
    choices = _choices(where, row, told, chat=messages is not None)
    if not choices and messages:
        messages, choices = _last_answer(row, told, messages, is_talk=is_talk)
    if not choices and (is_talk or row.get("error")):
        return LogEntry(None, refused="no_answer")
    prompt = told.get("prompt")
    if not choices or not (messages is not None or isinstance(prompt, str) or read_ids(prompt)):
        batch = bool(choices) and "custom_id" in row
        fix = "set `requests` to the batch's input" if batch else "correct or delete the line"
        keys = ", ".join(map(str, list(row)[:8])) or "none"
        found = f"{where}: keys {keys}; must hold `messages` or `prompt`, and"
        raise DataError(f"{found} `choices`, `response` or a last message of the assistant", fix)
    arguments = template_arguments(told)
    reason = _beyond_text(messages or [], arguments)
    if reason and not (isinstance(arguments, str) and all(choice.prompt_ids for choice in choices)):
        return LogEntry(messages, choices=choices, refused=reason)
    if (
        messages is not None
        and (system := system_words(told))
        and system not in (m.text for m in messages[:1])
    ):
        messages = [Message("system", system), *messages]
    bent = any(told.get(key) not in (None, value) for key, value in _NEUTRAL.items())
    bent = bent or any(told.get(key) for key in _BENDING)
    given = arguments if isinstance(arguments, dict) else {}
    return LogEntry(messages, prompt or [], choices, _sampling(where, told, config), given, bent, names=names)


def _beyond_text(messages: Sequence[Message], arguments: Mapping[str, Any] | str) -> str:
    """Why the prompt cannot be rendered as the target read it; empty where it can."""
    if beyond := next((message.beyond for message in messages if message.beyond), ""):
        return beyond
    if isinstance(arguments, str):
        return f"unsupported_{arguments}"
    # Some servers go on with a last message of the assistant, others close it: the request must tell.
    ends_open = bool(messages) and messages[-1].role == "assistant" and not _OF_THE_LAST & arguments.keys()
    return "unsupported_prefix" if ends_open else ""


def _choices(where: str, row: Mapping[str, Any], told: Mapping[str, Any], *, chat: bool) -> list[Choice]:
    """The line's answers, none where there is none but for the last of its messages."""
    body = answered(row, chat=chat)
    try:
        choices = read_choices(body, told.get("stop", told.get("stop_sequences"))) if body else []
    except ValueError as error:
        rule, fix = (
            "an answer must stand in one piece",
            "join the pieces of each answer, or log whole answers",
        )
        raise DataError(f"{where}: {error}; {rule}", fix) from None
    ids = read_ids(row.get("prompt_token_ids"))
    return [replace(choice, prompt_ids=choice.prompt_ids or ids) for choice in choices]


def _last_answer(
    row: Mapping[str, Any], told: Mapping[str, Any], messages: list[Message], *, is_talk: bool
) -> tuple[list[Message], list[Choice]]:
    """A conversation apart from its last answer, behind which data sets may have a question more."""
    roles = [message.role for message in messages]
    if is_talk and "assistant" in roles:
        messages = messages[: len(roles) - roles[::-1].index("assistant")]
    if messages[-1].role != "assistant":
        return messages, []
    answer = flat_answer(row, {"content": messages[-1].text}, "stop")
    choices = read_choices(answer, told.get("stop"))
    return messages[:-1], [replace(choice, beyond=messages[-1].beyond) for choice in choices]


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
