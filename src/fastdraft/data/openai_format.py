"""One answer in the OpenAI format, as a server sends it or a log keeps it, read as token ids.

Decides where token ids and log-probs are looked for (vLLM, SGLang, llama.cpp and OpenAI put them in different places); that
text without ids is tokenised again behind its prompt and is no use when it does not come back exactly; that an answer ends at
the first EOS id; when a log-prob is one of the distribution that the token was drawn from; and that a number which no log-prob can
be counts as not told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastdraft.functional.generation import Generation, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LogprobKind = Literal["processed", "raw", "none"]
"""processed: of the very distribution drawn from (after temperature, top-k, top-p); raw: of the model's own logits."""

STOP_WORDS = frozenset({"stop", "eos", "eos_token", "end_turn"})
LENGTH_WORDS = frozenset({"length", "max_tokens"})
_TOKEN_ID = re.compile(r"token_id:([0-9]{1,12})")
_UNTOLD, _ROUNDING = -9999.0, 1e-3
"""What OpenAI writes for a token that was not among the most likely; how far above 0 rounding may carry a log-prob."""


@dataclass(frozen=True)
class Choice:
    """What one choice of an answer says, nothing added."""

    text: str | None
    """None where the answer is not plain text: a tool call, or thinking kept apart."""
    token_ids: list[int] | None
    logprobs: list[float] | None
    finish_reason: str | None
    """The writer's own word."""
    stop_id: int | None = None
    """The id that ended the text, where the writer tells it."""
    stop_string: bool = False
    """A string of the request ended the text, not a token of the target."""
    num_tokens: int | None = None
    """Tokens of this answer as the writer counted them."""
    prompt_ids: list[int] | None = None
    num_prompt_tokens: int | None = None


def read_choices(body: Mapping[str, Any]) -> list[Choice]:
    """Every choice of an answer's JSON object.

    Raises:
        ValueError: with a few words, when the object is not such an answer.
    """
    choices = body.get("choices")
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, dict) for choice in choices)
    ):
        raise ValueError("no 'choices'")
    if any("delta" in choice for choice in choices):
        raise ValueError("a piece of a streamed answer")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) and len(choices) == 1 else {}
    return [_choice(choice, body, usage) for choice in choices]


def _choice(choice: Mapping[str, Any], body: Mapping[str, Any], usage: Mapping[str, Any]) -> Choice:
    tokens = _listed_tokens(choice)
    ids = _ids(choice.get("token_ids")) or _ids(choice.get("output_ids")) or _ids(choice.get("tokens"))
    if ids is None and tokens and all(token_id is not None for token_id, _ in tokens):
        ids = [token_id for token_id, _ in tokens if token_id is not None]
    logprobs = [value for _, value in tokens if value is not None]
    stop = choice.get("stop_reason", choice.get("matched_stop"))
    return Choice(
        text=_text(choice),
        token_ids=ids,
        logprobs=logprobs if tokens and len(logprobs) == len(tokens) else None,
        finish_reason=_word(choice.get("finish_reason")),
        stop_id=stop if isinstance(stop, int) and not isinstance(stop, bool) else None,
        stop_string=isinstance(stop, str),
        num_tokens=_count(usage.get("completion_tokens")),
        prompt_ids=_ids(choice.get("prompt_token_ids")) or _ids(body.get("prompt_token_ids")),
        num_prompt_tokens=_count(usage.get("prompt_tokens")),
    )


def _text(choice: Mapping[str, Any]) -> str | None:
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
        return text if isinstance(text, str) else None
    if any(message.get(key) for key in ("tool_calls", "function_call", "reasoning_content", "reasoning")):
        return None
    content = message.get("content")
    return content if isinstance(content, str) else None


def _listed_tokens(choice: Mapping[str, Any]) -> list[tuple[int | None, float | None]]:
    """(id, log-prob) of each token as the choice lists them; None for what it does not tell."""
    meta, logprobs = choice.get("meta_info"), choice.get("logprobs")
    if isinstance(meta, dict) and isinstance(meta.get("output_token_logprobs"), list):  # SGLang's own
        return [_sglang_entry(entry) for entry in meta["output_token_logprobs"]]
    if not isinstance(logprobs, dict):
        return []
    if isinstance(logprobs.get("content"), list):  # chat answers, and llama.cpp's in both APIs
        return [_content_entry(entry) for entry in logprobs["content"]]
    values = logprobs.get("token_logprobs")
    if not isinstance(values, list):
        return []
    names = logprobs.get("tokens")
    listed = names if isinstance(names, list) and len(names) == len(values) else [None] * len(values)
    return [(_named_id(name), read_logprob(value)) for name, value in zip(listed, values, strict=True)]


def _sglang_entry(entry: object) -> tuple[int | None, float | None]:
    if not isinstance(entry, list | tuple) or len(entry) < 2:
        return None, None  # a token all the same: without it the others would move up
    return _count(entry[1]), read_logprob(entry[0])


def _content_entry(entry: object) -> tuple[int | None, float | None]:
    if not isinstance(entry, dict):
        return None, None
    token_id = _count(entry.get("id"))
    value, prob = read_logprob(entry.get("logprob")), entry.get("prob")
    if (
        value is None
        and isinstance(prob, int | float)
        and not isinstance(prob, bool)
        and 0 < prob < 1 + _ROUNDING
    ):
        value = read_logprob(math.log(prob))
    return token_id if token_id is not None else _named_id(entry.get("token")), value


def _named_id(name: object) -> int | None:
    """17 of `token_id:17`, as vLLM writes tokens when asked."""
    match = _TOKEN_ID.fullmatch(name) if isinstance(name, str) else None
    return int(match[1]) if match else None


def _ids(value: object) -> list[int] | None:
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        return None
    return list(value)


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def read_logprob(value: object) -> float | None:
    """A natural log of a probability; None for what cannot be one. NaN stays: it says that the target's numbers were not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    return min(float(value), 0.0) if _UNTOLD < value <= _ROUNDING else None


def _word(value: object) -> str | None:
    """A finish reason; llama.cpp's own API and SGLang's keep it inside an object."""
    if isinstance(value, dict):
        value = value.get("type")
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class AnswerReader:
    """From a choice to a generation in the target's vocabulary."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    """Ids that end an answer, the one to assume first."""
    vocabulary_size: int
    logprobs: LogprobKind

    def generation(
        self, prompt_ids: Sequence[int], choice: Choice, sampling: Sampling, max_new_tokens: int | None = None
    ) -> Generation:
        """The choice as an answer to `prompt_ids`; one that cannot be used says why in `fault`.

        Args:
            prompt_ids: What the target was asked.
            choice: What it answered.
            sampling: How it was drawn.
            max_new_tokens: Longer answers are cut there; None takes any length.
        """
        prompt, word = list(prompt_ids), choice.finish_reason
        ids = choice.token_ids if choice.token_ids is not None else self._tokenise(prompt, choice)
        if word not in STOP_WORDS | LENGTH_WORDS:
            return Generation(
                prompt, [], [], "length", fault=f"finish_{re.sub(r'[^a-z_]', '', word or 'none')[:24]}"
            )
        if ids is None:
            return Generation(prompt, [], [], "length", fault="not_round_trip")
        if any(not 0 <= token_id < self.vocabulary_size for token_id in ids):
            return Generation(prompt, [], [], "length", fault="unknown_id")
        logprobs = (
            choice.logprobs if choice.logprobs is not None and len(choice.logprobs) == len(ids) else None
        )
        ids, logprobs = self._ended(ids, logprobs, choice)
        if max_new_tokens is not None:
            ids, logprobs = ids[:max_new_tokens], logprobs[:max_new_tokens] if logprobs is not None else None
        finish: Literal["stop", "length"] = "stop" if ids and ids[-1] in self.eos_ids else "length"
        return Generation(prompt, ids, self._kept_logprobs(ids, logprobs, sampling), finish)

    def _ended(
        self, ids: list[int], logprobs: list[float] | None, choice: Choice
    ) -> tuple[list[int], list[float] | None]:
        """Cut behind the first EOS; with the EOS that the writer drew but left out, whose log-prob nobody tells."""
        end = next((place for place, token_id in enumerate(ids) if token_id in self.eos_ids), None)
        if end is not None:
            return ids[: end + 1], logprobs[: end + 1] if logprobs is not None else None
        drawn = choice.finish_reason in STOP_WORDS and not choice.stop_string and bool(self.eos_ids)
        if not drawn or (choice.stop_id is not None and choice.stop_id not in self.eos_ids):
            return ids, logprobs
        return [*ids, choice.stop_id if choice.stop_id is not None else self.eos_ids[0]], None

    def _kept_logprobs(self, ids: list[int], logprobs: list[float] | None, sampling: Sampling) -> list[float]:
        if sampling.temperature == 0:
            return [0.0] * len(ids)
        return logprobs if logprobs is not None and serves_replay(self.logprobs, sampling) else []

    def _tokenise(self, prompt_ids: list[int], choice: Choice) -> list[int] | None:
        """The ids that text without ids stands for; None where they cannot be the ones that were drawn.

        The text is read behind its prompt, as it was written; ids and text must give each other exactly, and there must be
        as many ids as the writer counted (a text can be written with other tokens than a tokenizer would choose).
        """
        text = choice.text
        if (
            text is None or "\ufffd" in text or _has_half_characters(text)
        ):  # half a character at the end: the bytes are lost
            return None
        before, short = self._decode(prompt_ids), [choice.num_tokens, (choice.num_tokens or 0) - 1]
        whole = self._encode(before + text)
        behind = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else None
        for ids in (behind, self._encode(text)):
            if ids is None or self._decode([*prompt_ids, *ids]) != before + text:
                continue
            if not self._special.isdisjoint(
                ids
            ):  # the words of a special token, which the target wrote as plain text
                continue
            stopped = choice.finish_reason in STOP_WORDS
            if choice.num_tokens is None or len(ids) in short[: 2 if stopped else 1]:
                return ids
        return None

    @property
    def _special(self) -> frozenset[int]:
        return frozenset(map(int, self.tokenizer.all_special_ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _encode(self, text: str) -> list[int]:
        return [
            int(token) for token in self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ]


def _has_half_characters(text: str) -> bool:
    """JSON can hold one half of a surrogate pair, which is no unicode text and no tokenizer reads."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def serves_replay(kind: LogprobKind, sampling: Sampling) -> bool:
    """Whether log-probs of this kind are those of the distribution drawn from: raw ones only at temperature 1 without truncation."""
    plain = sampling.temperature == 1 and sampling.top_k == 0 and sampling.top_p == 1
    return kind == "processed" or (kind == "raw" and plain)
