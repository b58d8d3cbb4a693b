"""Logs of a target: prompts with the answers that it gave, in the OpenAI format, one JSON object a line.

Decides which shapes of a line are understood (a chat with its response, a conversation that ends with the assistant, a prompt
with its completion, a logged request with its response), that an answer is taken as it stands, that a line which leaves open
how the answer was drawn stops the run instead of being guessed, that more than text (pictures, tool calls) is left out, and that
lines whose conversations begin with the same words belong together.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fastdraft.config import Config, Count
from fastdraft.conversation import whole_characters
from fastdraft.data.chat import render_prompt
from fastdraft.data.openai_format import AnswerReader, Choice, LogprobKind, read_choices, read_logprob
from fastdraft.data.readers import read_jsonl
from fastdraft.data.responses import ids_hash
from fastdraft.data.sources import FoundFile, JsonlSource
from fastdraft.errors import DataError, TargetError
from fastdraft.interfaces import Generation, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.vocabulary import Vocabulary

_NEUTRAL = {"min_p": 0, "typical_p": 1, "repetition_penalty": 1, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""What a request may say without bending the distribution; anything else in these keys makes its log-probs no use for replay."""
_BENDING = ("logit_bias", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "response_format", "grammar", "bad_words")
_ANSWERS = ("response", "completion", "answer", "output")
_HOTTEST, _LARGEST_TOP_K = 10, 1 << 30
_SHAPES = "must hold `messages` or `prompt`, and `choices`, `response` or a last message of the assistant"


class TranscriptLog(Config):
    """Logged prompts and answers of the target in the OpenAI format: nothing is asked, the target's weights are not needed."""

    kind: Literal["transcripts"]
    """JSONL: {"messages": [...], "response" or "choices": ...}, {"prompt": ..., "choices": ...}, or {"request": ..., "response": ...}."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """How manifests and tables call this log."""
    path: str = Field(min_length=1)
    """A file, a folder or a pattern; .gz, .xz and .zst too."""
    count: Count | None = Field(default=None, ge=1)
    """At most this many answers, after a seeded shuffle; unset takes all."""
    temperature: float | None = Field(default=None, ge=0, le=10)
    """Of lines that do not tell theirs; unset, such a line stops the run."""
    top_k: int = Field(default=0, ge=0)
    """Of lines that do not tell theirs."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of lines that do not tell theirs."""
    logprobs: LogprobKind = "none"
    """What the logged log-probs are of: processed, the sampled distribution; raw, the logits (of use at temperature 1 untruncated)."""

    def files(self) -> list[FoundFile]:
        """The log's files.

        Raises:
            DataError: when there is none.
        """
        return self._source().files()

    def look(self) -> None:
        """Reads the first line, so that a wrong path or a shape that is not understood shows before hours of other work.

        Raises:
            DataError: when there is no file, or no line, or the first one cannot be understood.
        """
        if next(read_entries(self), None) is None:
            raise DataError(self.path, "no line in it", "must hold logged answers", "add some or correct the path")

    def describe(self) -> dict[str, Any]:
        """The settings and what they point at now, for fingerprints."""
        return {**self.model_dump(mode="json"), **self._source().describe()}

    def _source(self) -> JsonlSource:
        return JsonlSource(name=self.name, path=self.path)


class TranscriptPrompts(TranscriptLog):
    """The same as training rows."""

    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Part of the budget's tokens, relative to the other sources."""


@dataclass(frozen=True)
class Transcript:
    """One answer of a log."""

    generation: Generation
    sampling: Sampling
    chat: bool
    """The prompt was a conversation."""
    key: str = ""
    """Of a later turn the hash of its conversation's first prompt, with whose rows it belongs; else empty."""


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
    more_than_text: bool = False
    """The conversation holds pictures or tool calls, without which the answer would stand behind another prompt."""

    @property
    def texts(self) -> list[str]:
        """Everything that the user said, or the prompt's text; empty for a prompt of ids."""
        if self.messages is not None:
            return [message["content"] for message in self.messages if message["role"] == "user"]
        return [self.prompt] if isinstance(self.prompt, str) else []

    @property
    def first_turn(self) -> list[dict[str, str]]:
        """Of a later turn what stands before the conversation's first answer; else empty."""
        answers = [place for place, message in enumerate(self.messages or ()) if message["role"] == "assistant"]
        return (self.messages or [])[: answers[0]] if answers else []


def read_entries(config: TranscriptLog) -> Iterator[Entry]:
    """Every line of a log.

    Raises:
        DataError: naming the file and line that is damaged, of no known shape, or silent about its temperature.
    """
    for file in config.files():
        for number, row in read_jsonl(file.path):
            yield _entry(f"{file.path} line {number}", whole_characters(row), config)


def _entry(where: str, row: Mapping[str, Any], config: TranscriptLog) -> Entry:
    request = next((row[key] for key in ("request", "body") if isinstance(row.get(key), dict)), row)
    listed = request.get("messages", row.get("messages"))
    messages, prompt = _messages(where, listed), request.get("prompt", row.get("prompt"))
    choices = _choices(where, row, chat=messages is not None)
    if not choices and messages and messages[-1]["role"] == "assistant":
        choices = [Choice(messages[-1]["content"], None, None, str(row.get("finish_reason") or "stop"))]
        messages = messages[:-1]
    is_ids = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
    if not choices or not (messages or isinstance(prompt, str) or is_ids):
        raise DataError(where, f"keys {', '.join(map(str, list(row)[:8])) or 'none'}", _SHAPES, "mend or delete the line")
    told = {**row, **request}
    sampling = _sampling(where, told, config)
    bent = any(told.get(key) not in (None, value) for key, value in _NEUTRAL.items()) or any(told.get(key) for key in _BENDING)
    more = messages is not None and any(map(_is_more_than_text, listed))
    return Entry(where, messages, [] if messages else (prompt if prompt is not None else ""), choices, sampling, bent, more)


def _is_more_than_text(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    other = any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in parts)
    return other or bool(message.get("tool_calls") or message.get("function_call"))


def _messages(where: str, value: object) -> list[dict[str, str]] | None:
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(message, dict) and content is None and _is_more_than_text(message):
            content = ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
        if not isinstance(message, dict) or not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise DataError(where, "a message without text", "each message needs a `role` and a `content`", "mend or delete the line")
        messages.append({"role": message["role"], "content": content})
    return messages


def _choices(where: str, row: Mapping[str, Any], *, chat: bool) -> list[Choice]:
    """The line's answers, wherever they stand."""
    bodies = [row, *(row[key] for key in _ANSWERS if isinstance(row.get(key), dict))]
    bodies += [body["body"] for body in bodies if isinstance(body.get("body"), dict) and "choices" in body["body"]]
    for body in bodies:
        if "choices" in body:
            try:
                choices = read_choices(body)
            except ValueError as error:
                if "streamed" in str(error):
                    rule, remedy = "an answer must stand in one piece", "join the pieces of each answer, or log whole answers"
                    raise DataError(where, str(error), rule, remedy) from None
                continue
            return [choice if choice.prompt_ids else replace(choice, prompt_ids=_listed(row.get("prompt_token_ids"))) for choice in choices]
    for key in _ANSWERS:
        value = row.get(key)
        text = value if isinstance(value, str) else value.get("content") if isinstance(value, dict) else None
        if isinstance(text, str):
            ids = next((ids for name in ("response_token_ids", "token_ids") if (ids := _listed(row.get(name)))), None)
            reason = str(row.get("finish_reason") or ("stop" if chat else "length"))
            values = row.get("logprobs")
            read = [read_logprob(value) for value in values] if isinstance(values, list) else [None]
            logprobs = [value for value in read if value is not None] if None not in read else None
            return [Choice(text, ids, logprobs, reason, prompt_ids=_listed(row.get("prompt_token_ids")))]
    return []


def _listed(value: object) -> list[int] | None:
    return list(value) if isinstance(value, list) and value and all(type(item) is int for item in value) else None


def _sampling(where: str, told: Mapping[str, Any], config: TranscriptLog) -> Sampling:
    keys = ("temperature", "top_k", "top_p")
    values: dict[str, Any] = {key: told.get(key) if told.get(key) is not None else getattr(config, key) for key in keys}
    if values["temperature"] is None:
        rule = "replay and tables must know how an answer was drawn"
        raise DataError(where, "no temperature", rule, f"set `temperature` of transcripts '{config.name}' for lines that do not tell it")
    temperature = _setting(where, "temperature", values, 0 <= _number(values["temperature"]) <= _HOTTEST)
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


@dataclass(frozen=True)
class Transcripts:
    """A log's answers, and how many were refused before they were looked at."""

    rows: list[Transcript]
    refused: dict[str, int] = field(default_factory=dict)
    """`evaluation` (the prompt is one of an evaluation task), `empty`, `unrendered` (the chat template refuses the conversation),
    `unsupported` (pictures or tool calls)."""


def read_transcripts(
    config: TranscriptLog,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    seed: int,
    is_evaluation: Callable[[str], bool] = lambda text: False,
    *,
    shuffled: bool = True,
) -> Transcripts:
    """Every answer of a log as the target's own text in token ids.

    Args:
        config: The log.
        tokenizer: The target's.
        vocabulary: Says which ids end an answer.
        seed: Of the order, and of which answers `count` leaves.
        is_evaluation: Whether a text is a prompt of an evaluation task.
        shuffled: Brings the answers into seeded order; false keeps the log's.

    Raises:
        DataError: when a line is damaged or no answer is left.
    """
    readers = {kind: AnswerReader(tokenizer, vocabulary.eos_token_ids, vocabulary.size, kind) for kind in ("none", config.logprobs)}
    refused = {"evaluation": 0, "empty": 0, "unrendered": 0}
    rows: list[Transcript] = []
    for entry in read_entries(config):
        if any(map(is_evaluation, filter(None, entry.texts))):
            refused["evaluation"] += len(entry.choices)
            continue
        if entry.more_than_text:
            refused["unsupported"] = refused.get("unsupported", 0) + len(entry.choices)
            continue
        try:
            prompt = _prompt_ids(entry, tokenizer)
            key = ids_hash(render_prompt(tokenizer, entry.first_turn)) if entry.first_turn else ""
        except TargetError:
            refused["unrendered"] += len(entry.choices)
            continue
        if not prompt:
            refused["empty"] += len(entry.choices)
            continue
        reader = readers["none" if entry.bent else config.logprobs]
        chat = entry.messages is not None
        rows += [Transcript(_generation(reader, prompt, choice, entry), entry.sampling, chat, key) for choice in entry.choices]
    if not rows:
        found = ", ".join(f"{count} {reason}" for reason, count in refused.items() if count) or "no answer"
        raise DataError(f"transcripts '{config.name}'", found, "at least one answer must be left", "add answers or correct `path`")
    order = list(range(len(rows)))
    random.Random(f"{seed}/{config.name}").shuffle(order)
    chosen = order[: config.count]
    return Transcripts([rows[place] for place in (chosen if shuffled else sorted(chosen))], refused)


def _prompt_ids(entry: Entry, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if entry.messages is not None:
        return render_prompt(tokenizer, entry.messages)
    if isinstance(entry.prompt, str):
        return [int(token) for token in tokenizer(entry.prompt, verbose=False).input_ids]
    return list(entry.prompt)


def _generation(reader: AnswerReader, prompt: Sequence[int], choice: Choice, entry: Entry) -> Generation:
    """The logged prompt ids count where there are any: they are what the target read."""
    if choice.prompt_ids:
        prompt = choice.prompt_ids
    if any(not 0 <= token_id < reader.vocabulary_size for token_id in prompt):
        return Generation([], [], [], "length", fault="unknown_id")
    if not choice.prompt_ids and choice.num_prompt_tokens not in (None, len(prompt)):
        return Generation(list(prompt), [], [], "length", fault="prompt_read_otherwise")
    if choice.logprobs and any(map(math.isnan, choice.logprobs)):
        return Generation(list(prompt), [], [], "length", fault="not_finite")
    return reader.generation(prompt, choice, entry.sampling)
