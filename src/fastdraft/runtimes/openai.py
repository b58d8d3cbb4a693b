"""The target behind servers with an OpenAI-compatible API: `OpenAIEngine` writes text over them.

There are two ways of asking: token ids to /completions, or messages to /chat/completions.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastdraft.data.openai_format import AnswerReader, Choice, read_choices, serves_replay
from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, RenderedPrompt, Sampling, check_prompts
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes.openai_servers import ServerRefused, Servers
from fastdraft.runtimes.openvino import answer_seed

READS_AGAIN = 3  # times that one question is asked when its answer cannot be read
# Log-probs nearer than this count as equal: half precision rounds, and not every server is deterministic.
EQUAL = 1e-3


class Way(NamedTuple):
    """How a question is put."""

    route: str
    chat: bool
    extras: bool = True  # with the keys that servers of open models take beyond OpenAI's


WAYS = (
    Way("/completions", chat=False),
    Way("/chat/completions", chat=True),
    Way("/chat/completions", chat=True, extras=False),
)


class OpenAIEngine:
    """The `Engine` protocol over servers.

    `on_answer` is called with 1 after each answer; `say` is told once how the servers are asked.
    """

    name = "openai"

    def __init__(
        self,
        servers: Servers,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        context_length: int,
        *,
        on_answer: Callable[[int], None] = lambda answers: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.servers, self.context_length, self.on_answer, self.say = servers, context_length, on_answer, say
        # Log-probs of the weights are scored later: the servers' are no use then.
        self.logprobs = "none" if servers.settings.logprobs == "target" else servers.settings.logprobs
        self.reader = AnswerReader(tokenizer, vocabulary.eos_token_ids, vocabulary.size, self.logprobs)
        self.way: Way | None = None
        self.model = servers.settings.model
        # Log-probs were seen to follow the temperature (False), the truncation (True).
        self._proven: set[bool] = set()

    def with_ends(self, eos_ids: Sequence[int]) -> OpenAIEngine:
        """The same servers, whose answers end at these ids; without log-probs."""
        twin = copy.copy(self)
        twin.logprobs, twin.on_answer = "none", lambda answers: None
        twin.reader = replace(self.reader, eos_ids=tuple(eos_ids), logprobs="none")
        return twin

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt, in order; as reproducible as the servers are."""
        check_prompts(prompts, max_new_tokens, self.context_length)
        if not prompts:
            return []
        return self.servers.wait_for(self._generate(prompts, sampling, max_new_tokens, seed))

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        if self.way is None:
            self.model = await self._find_model()
            self.way = await self._find_way(prompts, sampling)
        way = self.way
        if self.logprobs == "processed" and sampling.temperature > 0 and not serves_replay("raw", sampling):
            await self._prove_processed(way, prompts[0], sampling)
        bodies = [  # each answer with a seed of its own
            self.question(way, prompt, sampling, max_new_tokens, answer_seed(seed, index))
            for index, prompt in enumerate(prompts)
        ]

        async def answer(body: dict[str, Any] | None, prompt: list[int]) -> Generation:
            if body is None:
                return Generation.failed(prompt, "prompt_not_text")
            choice = await self._choice(way, body)
            if _reads_differently(way, prompt, choice):
                return Generation.failed(prompt, "prompt_read_otherwise")
            self.on_answer(1)
            return self.reader.generation(prompt, choice, sampling, max_new_tokens)

        if not any(bodies):
            rule = "these servers take messages only: a conversation, or a user message in the template"
            fix = "use prompts with chat: true, or a server with /completions"
            raise DataError(f"prompts: none can be sent to /chat/completions; {rule}", fix)
        asked = zip(bodies, map(list, prompts), strict=True)
        tasks = [asyncio.ensure_future(answer(body, prompt)) for body, prompt in asked]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _choice(self, way: Way, body: dict[str, Any]) -> Choice:
        """The first choice of the answer; an answer that cannot be read or has no end is asked for again."""
        found = ""
        for _ in range(READS_AGAIN):
            try:
                choice = read_choices(await self.servers.ask(way.route, body))[0]
            except ValueError as error:
                found = str(error)
                continue
            if choice.finish_reason not in (None, "abort"):
                return choice
            found = "an answer without end (no finish_reason)"
        rule = f"answers must be in the OpenAI format (asked {READS_AGAIN} times)"
        raise TargetError(f"{self.servers.names}: {found}; {rule}", "see the server's log")

    def question(
        self, way: Way, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> dict[str, Any] | None:
        """A question as JSON; None for a prompt that cannot be put in this way."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_new_tokens, "seed": seed}
        if not way.chat:
            body["prompt"] = list(prompt)
        elif isinstance(prompt, RenderedPrompt):
            body["messages"] = prompt.messages
            # The name of one of several templates is for the renderer here.
            if told := {key: value for key, value in prompt.arguments.items() if key != "chat_template"}:
                body["chat_template_kwargs"] = told
        else:
            return None
        body["temperature"] = sampling.temperature
        if sampling.temperature > 0:
            body["top_p"] = sampling.top_p
        if way.extras or (self.logprobs != "none" and sampling.temperature > 0):
            body |= {"logprobs": True, "top_logprobs": 1} if way.chat else {"logprobs": 1}
        if way.extras or sampling.top_k:
            body["top_k"] = sampling.top_k or -1
        if way.extras:  # each server reads those that it knows
            # What a server might add by itself is switched off by name.
            body |= {
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            }
            body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}  # vLLM
            body["post_sampling_probs"] = self.logprobs == "processed"  # llama.cpp
            if self.reader.eos_ids:
                body["stop_token_ids"] = list(self.reader.eos_ids)
        return body

    async def _find_model(self) -> str:
        """The target's name, which every server must have; the first words to a server."""
        name = self.model
        for url in self.servers.urls:
            try:
                listed = (await self.servers.request("get", url, "/models")).get("data")
            except (ServerRefused, ValueError) as error:
                status = getattr(error, "status", 0)
                if name and status in (404, 405):
                    continue  # not every server lists its models
                if status in (401, 403):
                    raise
                rule = f"must be an OpenAI-compatible server with a list of models at {url}/models"
                fix = "correct synthesize.engine.servers (most such addresses end in /v1)"
                raise TargetError(f"{getattr(error, 'message', f'{url}: {error}')}; {rule}", fix) from None
            entries = listed if isinstance(listed, list) else []
            served = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and entry.get("id")]
            name = name or (served[0] if len(served) == 1 else "")
            if not name or (served and name not in served):
                found = f"no model '{name}'" if name else f"{len(served)} models"
                fix = "set synthesize.engine.model to the target's name there"
                raise TargetError(f"{url}: {found}; it serves {', '.join(served[:8]) or 'none'}", fix)
        return name

    async def _find_way(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Way:
        """The richest way in which the servers answer a question of one token, as the target would."""
        api, names = self.servers.settings.api, self.servers.names
        refused = "no prompt that can be sent as messages"
        for way in WAYS:
            prompt = next((prompt for prompt in prompts if self.question(way, prompt, sampling, 1, 0)), None)
            if api not in ("auto", "chat" if way.chat else "completions") or prompt is None:
                continue
            body = self.question(way, prompt, sampling, 1, 0) or {}
            try:
                choice = read_choices(await self.servers.ask(way.route, body))[0]
            except (ServerRefused, ValueError) as error:
                refused = str(getattr(error, "message", error))
                continue
            if _reads_differently(way, list(prompt), choice):
                told = len(choice.prompt_ids) if choice.prompt_ids is not None else choice.num_prompt_tokens
                read = f"reads a prompt of {len(prompt)} tokens as {told}"
                refused = f"{read}: its tokenizer or chat template is not target.model's"
                continue
            if self.logprobs != "none" and sampling.temperature > 0 and choice.logprobs is None:
                fix = (
                    "set synthesize.engine.logprobs=none, or target to have them from target.model's weights"
                )
                rule = f"the recipe says logprobs: {self.logprobs}"
                raise TargetError(f"{names}: answers without log-probs; {rule}", fix)
            if choice.token_ids is None:
                kept = "their text is tokenised again, and left out where that is not exact"
                self.say(f"{names}: no token ids in its answers; {kept}")
            if not way.extras:
                self.say(f"{names}: takes OpenAI's keys only; make sure it adds no top-k, min-p or penalties")
            return way
        fix = "correct synthesize.engine.servers, .model or .api; see the server's log"
        raise TargetError(f"{names}: {refused}; the server must answer as the target does", fix)

    async def _prove_processed(self, way: Way, prompt: Sequence[int], sampling: Sampling) -> None:
        """Sees once that the likeliest token's log-prob follows what the recipe does to the distribution."""
        truncated = sampling.top_k > 0 or sampling.top_p < 1
        if truncated in self._proven:
            return
        values = []
        for drawn in (Sampling(1.0), Sampling(1.0, top_k=1) if truncated else Sampling(0.25)):
            body = self.question(way, prompt, drawn, 1, 0)
            values.append(_likeliest(await self.servers.ask(way.route, body)) if body else None)
        plain, other = values
        if plain is None or other is None or plain > -10 * EQUAL:
            return  # where one token has it all, nothing can be told
        if abs(other - plain) <= EQUAL:
            rule = "logprobs: processed needs those of the sampled distribution"
            fix = "start it so (vLLM --logprobs-mode processed_logprobs), or set engine.logprobs=none"
            raise TargetError(f"{self.servers.names}: log-probs of the raw logits; {rule}", fix)
        self._proven.add(truncated)


def _reads_differently(way: Way, prompt: list[int], choice: Choice) -> bool:
    """The server's tokenizer or chat template gave it another prompt."""
    if choice.prompt_ids is not None:
        return choice.prompt_ids != prompt
    return way.chat and choice.num_prompt_tokens not in (None, len(prompt))


def _likeliest(answer: Mapping[str, Any]) -> float | None:
    """The log-prob of the first token's likeliest alternative; None where the server does not tell it."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        if logprobs.get("content"):
            return max(float(entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"])
        return max(float(value) for value in logprobs["top_logprobs"][0].values())
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
