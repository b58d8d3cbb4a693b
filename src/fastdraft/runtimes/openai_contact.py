"""What a server of the recipe really is: its model, its context, and what its answers tell; asked only by the user's word.

Decides which few questions of one token are enough to know (the list of models; the way in which it takes prompts; whether
log-probs follow temperature and truncation; whether those of a prompt can be had), and what of it contradicts the recipe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdraft.data.openai_format import read_choices
from fastdraft.errors import TargetError
from fastdraft.functional.generation import Sampling
from fastdraft.recipe.data import OpenAIEngineConfig
from fastdraft.runtimes.openai_requests import RefusedError, Servers
from fastdraft.runtimes.openai_server import EQUAL, OpenAIEngine, Way
from fastdraft.target import Target

HELLO = "Hello"
RETRIES = 1
"""A server that does not answer twice is told as it is; a run waits longer."""
CONTEXT_KEYS = ("max_model_len", "n_ctx", "context_length", "max_context_length")
"""Where servers tell their context in the list of models: vLLM and SGLang, llama.cpp, others."""


@dataclass(frozen=True)
class Contact:
    """One server, as it answered; a question that it refused counts as a no."""

    server: str
    model: str
    context_length: int | None
    """Positions that it serves; None where it does not tell."""
    prompts: str
    """How it takes prompts, for example `token ids to /completions`."""
    token_ids: bool
    """Its answers tell the ids of their tokens."""
    logprobs: str
    """none; raw, of the logits; processed, of the sampled distribution; given, where one question could not tell which."""
    prompt_logprobs: bool
    """It can score a prompt (vLLM's `prompt_logprobs`). For the reader: FastDraft asks for none."""
    seconds: float
    """Of one question of one token."""


def contact(settings: OpenAIEngineConfig, target: Target) -> list[Contact | TargetError]:
    """Asks every server of a recipe a handful of questions, one after the other.

    Args:
        settings: The recipe's `synthesize.engine`.
        target: Its config and tokenizer are read, never its weights.

    Returns:
        For each server what it said, or why it is no use.
    """
    from fastdraft.data.chat import has_chat_template, prompt_ids

    tokenizer = target.tokenizer
    prompts = [
        prompt_ids(tokenizer, HELLO, chat)
        for chat in ((True, False) if has_chat_template(tokenizer) else (False,))
    ]
    vocabulary = target.vocabulary
    found: list[Contact | TargetError] = []
    for url in settings.servers:
        pool = Servers(
            [url], concurrency=1, timeout=settings.timeout, retries=RETRIES, api_key_env=settings.api_key_env
        )
        # The kind that the recipe counts on, since llama.cpp gives the one asked for.
        kind = settings.logprobs if settings.logprobs in ("raw", "processed") else "raw"
        engine = OpenAIEngine(
            pool, tokenizer, vocabulary, 2**31, model=settings.model, api=settings.api, logprobs=kind
        )
        try:
            found.append(pool.wait_for(_ask(engine, url, prompts, settings)))
        except TargetError as error:
            found.append(error)
        finally:
            pool.close()
    return found


async def _ask(
    engine: OpenAIEngine, url: str, prompts: Sequence[Sequence[int]], settings: OpenAIEngineConfig
) -> Contact:
    """Raises:
    TargetError: when the server cannot be used as the recipe says.
    """
    engine.model = await engine.check_model()
    way = await engine.find_way(prompts, Sampling(0.0))
    prompt = next(prompt for prompt in prompts if engine.question(way, prompt, Sampling(0.0), 1, 0))
    body = engine.question(way, prompt, Sampling(0.0), 1, 0) or {}
    start = time.monotonic()
    choice = read_choices(await engine.servers.ask(way.route, body))[0]
    seconds = time.monotonic() - start
    logprobs = await _logprobs(engine, way, prompt)
    # Processed ones serve as raw ones: a recipe that says raw samples at temperature 1 without truncation only.
    enough = {
        "raw": ("raw", "processed", "processed but for truncation", "given"),
        "processed": ("processed", "given"),
    }
    if logprobs not in enough.get(settings.logprobs, (logprobs,)):
        rule = f"the recipe says logprobs: {settings.logprobs}"
        remedy = "start the server so (vLLM: --logprobs-mode processed_logprobs), or set synthesize.engine.logprobs to what it gives"
        raise TargetError(
            url,
            "answers without log-probs" if logprobs == "none" else f"log-probs are {logprobs}",
            rule,
            remedy,
        )
    scores = await _scores_prompts(engine, way, prompt)
    context = await _context_length(engine, url)
    return Contact(
        url,
        engine.model,
        context,
        str(way),
        choice.token_ids is not None,
        logprobs,
        scores,
        round(seconds, 3),
    )


async def _logprobs(engine: OpenAIEngine, way: Way, prompt: Sequence[int]) -> str:
    """What log-probs are of, told by whether the likeliest token's follows temperature and truncation."""
    try:
        body = engine.question(way, prompt, Sampling(1.0), 1, 0) or {}
        if read_choices(await engine.servers.ask(way.route, body))[0].logprobs is None:
            return "none"
    except (RefusedError, ValueError):
        return "none"
    plain, cold, first = [
        await _likeliest(engine, way, prompt, s) for s in (Sampling(1.0), Sampling(0.25), Sampling(1.0, 1))
    ]
    if (
        plain is None or cold is None or plain > -10 * EQUAL
    ):  # where one token has it all, nothing can be told
        return "given"
    if abs(cold - plain) <= EQUAL:
        return "raw"
    return "processed" if first is None or first > -EQUAL else "processed but for truncation"


async def _likeliest(
    engine: OpenAIEngine, way: Way, prompt: Sequence[int], sampling: Sampling
) -> float | None:
    """Its log-prob; None where the server does not tell, or does not take such sampling (OpenAI's API knows no top-k)."""
    try:
        return await engine.first_logprob(way, prompt, sampling)
    except RefusedError:
        return None


async def _scores_prompts(engine: OpenAIEngine, way: Way, prompt: Sequence[int]) -> bool:
    body = engine.question(way, prompt, Sampling(0.0), 1, 0) or {}
    try:
        answer = await engine.servers.ask(way.route, {**body, "prompt_logprobs": 1})
    except RefusedError:
        return False
    choices = answer.get("choices")
    places: list[Any] = [answer, *(choices if isinstance(choices, list) else [])]
    return any(isinstance(place, dict) and isinstance(place.get("prompt_logprobs"), list) for place in places)


async def _context_length(engine: OpenAIEngine, url: str) -> int | None:
    """As the list of models tells it."""
    try:
        listed = (await engine.servers.get(url, "/models")).get("data")
    except RefusedError:
        return None
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and entry.get("id") == engine.model:
            facts = {**(entry["meta"] if isinstance(entry.get("meta"), dict) else {}), **entry}
            return next(
                (int(facts[key]) for key in CONTEXT_KEYS if type(facts.get(key)) is int and facts[key] > 0),
                None,
            )
    return None
