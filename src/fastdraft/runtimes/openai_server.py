"""The target behind an HTTP address: any server that speaks the OpenAI API (vLLM, llama.cpp, SGLang, OVMS, transformers).

Decides how prompts reach it (token ids where the server takes them, else text, else messages) by asking once and going down
from the richest way; that everything a server might add by itself (top-k, min-p, penalties) is switched off by name; that
each answer has a seed of its own; and that log-probs said to be of the sampled distribution are put to the proof.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastdraft.data.chat import plain_prefix_ids
from fastdraft.data.openai_format import AnswerReader, Choice, LogprobKind, read_choices, serves_replay
from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, RenderedPrompt, Sampling, check_prompts
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes.openai_requests import RefusedError, Servers
from fastdraft.runtimes.openvino import answer_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Api = Literal["auto", "completions", "chat"]
READS_AGAIN = 3
"""Times that one question is asked when its answer cannot be read; a server that fails so is not worth a long wait."""
EQUAL = 1e-3
"""Log-probs nearer than this count as equal: half precision rounds more than float32, and not every server is deterministic."""


@dataclass(frozen=True)
class Way:
    """How a question is put."""

    route: Literal["/completions", "/chat/completions"]
    prompt: Literal["ids", "text", "messages"]
    extras: bool
    """With the keys that servers of open models take beyond OpenAI's."""

    def __str__(self) -> str:
        sent = {"ids": "token ids", "text": "text", "messages": "messages"}[self.prompt]
        return f"{sent} to {self.route}{'' if self.extras else ', OpenAI keys only'}"


WAYS = (
    Way("/completions", "ids", True),
    Way("/completions", "ids", False),
    Way("/completions", "text", True),
    Way("/completions", "text", False),
    Way("/chat/completions", "messages", True),
    Way("/chat/completions", "messages", False),
)


class OpenAIEngine:
    """The `Engine` protocol over a pool of servers.

    Args:
        servers: Where to ask.
        tokenizer: The target's.
        vocabulary: Gives the ids that end an answer.
        context_length: Most positions that the target was made for.
        model: The target's name at the servers; empty takes the only one that they have.
        api: Which of the two APIs; auto takes completions where the server has them.
        logprobs: What the servers' log-probs are of; none leaves them out.
        on_answer: Called with 1 after each answer.
        say: Told once, in one line, how the servers are asked.
    """

    name = "openai"

    def __init__(
        self,
        servers: Servers,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        context_length: int,
        *,
        model: str = "",
        api: Api = "auto",
        logprobs: LogprobKind = "none",
        on_answer: Callable[[int], None] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.servers, self.tokenizer, self.vocabulary, self.context_length = (
            servers,
            tokenizer,
            vocabulary,
            context_length,
        )
        self.model, self.api, self.logprobs, self.on_answer, self.say = model, api, logprobs, on_answer, say
        self.reader = AnswerReader(tokenizer, vocabulary.eos_token_ids, vocabulary.size, logprobs)
        self.way: Way | None = None
        self._before_text = plain_prefix_ids(tokenizer)
        self._proven: set[str] = set()
        """What the log-probs were seen to follow."""

    def with_ends(self, vocabulary: Vocabulary) -> OpenAIEngine:
        """The same servers, whose answers end at other ids."""
        return OpenAIEngine(
            self.servers,
            self.tokenizer,
            vocabulary,
            self.context_length,
            model=self.model,
            api=self.api,
            logprobs="none",
            say=self.say,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt, in order; as reproducible for equal prompts, order and seed as the servers are.

        Raises:
            DataError: when a prompt leaves no room for `max_new_tokens`, or no prompt can be sent in the way that the servers take.
            TargetError: when the servers have another model, refuse, or do not answer after all tries.
        """
        check_prompts(prompts, max_new_tokens, self.context_length)
        return (
            self.servers.wait_for(self._generate(prompts, sampling, max_new_tokens, seed)) if prompts else []
        )

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        if self.way is None:
            self.model = await self.check_model()
            self.way = await self.find_way(prompts, sampling)
        if self.logprobs == "processed" and not serves_replay("raw", sampling) and sampling.temperature > 0:
            await self._prove_processed(self.way, prompts[0], sampling)
        way = self.way
        bodies = [
            self.question(way, prompt, sampling, max_new_tokens, answer_seed(seed, index))
            for index, prompt in enumerate(prompts)
        ]
        if not any(bodies):
            rule = "these servers take messages only: a prompt must be a conversation or a user message in the target's chat template"
            raise DataError(
                "prompts",
                "none can be sent to /chat/completions",
                rule,
                "use prompts with chat: true, or a server with /completions",
            )
        tasks = [
            asyncio.ensure_future(self._answer(way, body, list(prompt), sampling, max_new_tokens))
            for body, prompt in zip(bodies, prompts, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(
        self,
        way: Way,
        body: dict[str, Any] | None,
        prompt: list[int],
        sampling: Sampling,
        max_new_tokens: int,
    ) -> Generation:
        if body is None:
            return Generation(prompt, [], [], "length", fault="prompt_not_text")
        choice = await self._choice(way, body)
        if self._counts_differently(way, prompt, choice):
            return Generation(prompt, [], [], "length", fault="prompt_read_otherwise")
        if self.on_answer:
            self.on_answer(1)
        return self.reader.generation(prompt, choice, sampling, max_new_tokens)

    async def _choice(self, way: Way, body: dict[str, Any]) -> Choice:
        """The first choice of the answer; an answer that breaks off is asked for again.

        Raises:
            TargetError: when the server refuses, or none of a few answers can be read.
        """
        found = ""
        for _ in range(READS_AGAIN):
            try:
                answer = await self.servers.ask(way.route, body)
                choice = read_choices(answer)[0]
            except RefusedError as error:
                raise TargetError(
                    error.server,
                    f"HTTP {error.status} ({error.message})",
                    "the server must answer",
                    "see its log",
                ) from None
            except ValueError as error:
                found = str(error)
                continue
            if choice.finish_reason not in (None, "abort"):
                return choice
            found = "an answer without end (no finish_reason)"
        raise TargetError(
            self.servers.names,
            found,
            f"asked {READS_AGAIN} times: answers must be in the OpenAI format",
            "see the server's log",
        )

    def question(
        self, way: Way, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> dict[str, Any] | None:
        """A question as JSON; None for a prompt that cannot be put in this way."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
        }
        body |= {"top_p": sampling.top_p} if sampling.temperature > 0 else {}
        if way.prompt == "ids":
            body["prompt"] = list(prompt)
        elif way.prompt == "text":
            text = self._as_text(prompt)
            if text is None:
                return None
            body["prompt"] = text
        else:
            messages = self._as_messages(prompt)
            if messages is None:
                return None
            body["messages"] = messages
        if way.extras or (self.logprobs != "none" and sampling.temperature > 0):
            body |= {"logprobs": 1} if way.route == "/completions" else {"logprobs": True, "top_logprobs": 1}
        if way.extras or sampling.top_k:
            body["top_k"] = sampling.top_k or -1
        return body | self._extras() if way.extras else body

    def _extras(self) -> dict[str, Any]:
        """Keys beyond OpenAI's; each server reads those that it knows."""
        neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        asked_for = {
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "return_tokens": True,
        }  # vLLM, vLLM, llama.cpp
        ends = (
            {"stop_token_ids": list(self.vocabulary.eos_token_ids)} if self.vocabulary.eos_token_ids else {}
        )
        return {**neutral, **asked_for, **ends, "post_sampling_probs": self.logprobs == "processed"}

    def _as_text(self, prompt: Sequence[int]) -> str | None:
        """Text that the server will tokenise to these very ids, putting before it what it puts before every text; None without one."""
        before = len(self._before_text)
        if list(prompt[:before]) != self._before_text:
            return None
        text = str(
            self.tokenizer.decode(
                list(prompt[before:]), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        return (
            text
            if [int(token) for token in self.tokenizer(text, verbose=False).input_ids] == list(prompt)
            else None
        )

    def _as_messages(self, prompt: Sequence[int]) -> list[dict[str, str]] | None:
        """Messages that the server will render to these very ids; None without them."""
        if isinstance(prompt, RenderedPrompt):
            return prompt.messages
        return None

    def _counts_differently(self, way: Way, prompt: list[int], choice: Choice) -> bool:
        if choice.prompt_ids is not None:
            return choice.prompt_ids != prompt
        return (
            way.prompt != "ids"
            and choice.num_prompt_tokens is not None
            and choice.num_prompt_tokens != len(prompt)
        )

    async def check_model(self) -> str:
        """The target's name at every server.

        Raises:
            TargetError: when a server has no model of that name, or several and none is named.
        """
        name = self.model
        for url in self.servers.urls:
            try:
                listed = await self.servers.get(url, "/models")
            except RefusedError as error:
                if error.status in (404, 405) and name:  # not every server lists its models
                    continue
                rule = f"must be an OpenAI-compatible server with a list of models at {url}/models"
                remedy = "correct synthesize.engine.servers (most such addresses end in /v1)"
                raise TargetError(url, f"HTTP {error.status} ({error.message})", rule, remedy) from None
            entries = listed.get("data")
            served = (
                [str(entry["id"]) for entry in entries if isinstance(entry, dict) and entry.get("id")]
                if isinstance(entries, list)
                else []
            )
            name = name or (served[0] if len(served) == 1 else "")
            if served and name not in served:
                found = f"no model '{name}'" if name else f"{len(served)} models"
                raise TargetError(
                    url,
                    found,
                    f"it serves {', '.join(served[:8])}",
                    "set synthesize.engine.model to the target's name there",
                )
            if not name:
                raise TargetError(
                    url,
                    "no list of models",
                    "the target's name there must be known",
                    "set synthesize.engine.model",
                )
        return name

    async def find_way(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Way:
        """The richest way in which the servers answer a question of one token.

        Raises:
            TargetError: when they refuse every way, or lack the log-probs that the recipe counts on.
        """
        refused = ""
        for way in WAYS:
            if self.api != "auto" and (way.route == "/completions") != (self.api == "completions"):
                continue
            prompt = next((prompt for prompt in prompts if self.question(way, prompt, sampling, 1, 0)), None)
            body = self.question(way, prompt, sampling, 1, 0) if prompt is not None else None
            if body is None or prompt is None:
                continue
            try:
                choice = read_choices(await self.servers.ask(way.route, body))[0]
            except RefusedError as error:
                refused = refused or f"HTTP {error.status} ({error.message})"
                continue
            except ValueError as error:
                refused = refused or str(error)
                continue
            if self._counts_differently(way, list(prompt), choice):
                count = len(choice.prompt_ids) if choice.prompt_ids is not None else choice.num_prompt_tokens
                refused = f"reads a prompt of {len(prompt)} tokens as {count}: its tokenizer or chat template is not target.model's"
                continue
            self._check_logprobs(choice, sampling)
            self._tell(way, choice)
            return way
        if not refused:
            rule = "api: chat takes user messages and conversations, which need a chat template"
            raise TargetError(
                self.servers.names,
                "no prompt that can be sent as messages",
                rule,
                "set synthesize.engine.api: completions",
            )
        remedy = "correct synthesize.engine.servers, .model or .api; see the server's log"
        raise TargetError(self.servers.names, refused, "the server must answer as the target does", remedy)

    def _check_logprobs(self, choice: Choice, sampling: Sampling) -> None:
        if self.logprobs != "none" and sampling.temperature > 0 and choice.logprobs is None:
            remedy = "set synthesize.engine.logprobs=none, or target to have them from target.model's weights"
            raise TargetError(
                self.servers.names,
                "answers without log-probs",
                f"the recipe says logprobs: {self.logprobs}",
                remedy,
            )

    def _tell(self, way: Way, choice: Choice) -> None:
        if choice.token_ids is None:
            self.say(
                f"{self.servers.names}: no token ids in its answers; their text is tokenised again, and left out where that is not exact"
            )
        if not way.extras:
            self.say(
                f"{self.servers.names}: takes OpenAI's keys only; make sure that it adds no top-k, min-p or penalties of its own"
            )

    async def _prove_processed(self, way: Way, prompt: Sequence[int], sampling: Sampling) -> None:
        """Asks whether the likeliest token's log-prob follows temperature and truncation, once for each of the two.

        Raises:
            TargetError: when it does not: the server gives log-probs of the raw logits.
        """
        truncated = sampling.top_k > 0 or sampling.top_p < 1
        wanted = {"temperature"} if sampling.temperature != 1 else set[str]()
        wanted = (wanted | ({"truncation"} if truncated else set())) - self._proven
        plain = await self.first_logprob(way, prompt, Sampling(1.0)) if wanted else None
        if plain is None or plain > -10 * EQUAL:  # where one token has it all, nothing can be told
            return
        for what in sorted(wanted):
            other = await self.first_logprob(
                way, prompt, Sampling(0.25) if what == "temperature" else Sampling(1.0, 1)
            )
            follows = other is None or (
                abs(other - plain) > EQUAL if what == "temperature" else other > -EQUAL
            )
            if not follows:
                rule = f"logprobs: processed needs those of the sampled distribution, but these do not follow the {what}"
                remedy = "start the server so (vLLM: --logprobs-mode processed_logprobs), or set synthesize.engine.logprobs=none"
                raise TargetError(self.servers.names, "log-probs of the raw logits", rule, remedy)
            self._proven.add(what)

    async def first_logprob(self, way: Way, prompt: Sequence[int], sampling: Sampling) -> float | None:
        """The likeliest first token's log-prob as the server tells it; None where it does not."""
        body = self.question(way, prompt, sampling, 1, 0)
        return _likeliest(await self.servers.ask(way.route, body)) if body else None


def _likeliest(answer: dict[str, Any]) -> float | None:
    """Of the first token's alternatives."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    logprobs = first.get("logprobs") if isinstance(first, dict) else None
    if not isinstance(logprobs, dict):
        return None
    tops, content = logprobs.get("top_logprobs"), logprobs.get("content")
    if isinstance(tops, list) and tops and isinstance(tops[0], dict) and tops[0]:
        return max(
            (float(value) for value in tops[0].values() if isinstance(value, int | float)), default=None
        )
    if isinstance(content, list) and content and isinstance(content[0], dict):
        entries = content[0].get("top_logprobs")
        values = (
            [entry.get("logprob") for entry in entries if isinstance(entry, dict)]
            if isinstance(entries, list)
            else []
        )
        return max((float(value) for value in values if isinstance(value, int | float)), default=None)
    return None
