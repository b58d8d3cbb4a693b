"""Clients of OpenAI-compatible servers, asked in turn: `Servers(settings).ask(route, body)`.

The library `openai`, imported here alone, asks again what fails; what lasts is one line without any secret.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import wait
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastdraft.errors import MissingExtra, TargetError
from fastdraft.recipe.synthesize import OpenAIEngineConfig

T = TypeVar("T")

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerRefused(TargetError):
    """The server understood and said no: asking again or another server would not help."""

    status = 0


class Servers:
    """Clients of servers that hold the same model, asked in turn.

    `check` is called several times a second while waiting; what it raises cancels all questions.
    """

    def __init__(self, settings: OpenAIEngineConfig, check: Callable[[], None] = lambda: None) -> None:
        try:
            import openai
        except ImportError:
            raise MissingExtra("openai", "server") from None
        self.settings, self.urls, self._check, self._library = settings, settings.servers, check, openai
        self._key = os.environ.get(settings.api_key_env, "").strip()
        self._clients = {
            url: openai.AsyncOpenAI(
                base_url=url,
                api_key=self._key or "none",
                max_retries=settings.retries,
                timeout=settings.timeout,
                # A proxy does not know this machine's own servers.
                http_client=openai.DefaultAsyncHttpxClient(trust_env=urlsplit(url).hostname not in _LOOPBACK),
            )
            for url in self.urls
        }
        self._turn, self._room = count(), asyncio.Semaphore(settings.concurrency * len(self.urls))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="openai-servers", daemon=True).start()

    @property
    def names(self) -> str:
        return ", ".join(self.urls)

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs the work to its end in a thread of its own, looking at `check` meanwhile."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not wait([future], 0.2).done:
                self._check()
            return future.result()
        finally:
            future.cancel()

    async def ask(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON answer of the next server, or of another where that one gives none after all tries."""
        turn = next(self._turn) % len(self.urls)
        failures = []
        async with self._room:
            for url in self.urls[turn:] + self.urls[:turn]:
                try:
                    return await self.request("post", url, route, body=dict(body))
                except ServerRefused:
                    raise
                except TargetError as error:
                    failures.append(error)
        raise failures[0]

    async def request(self, method: str, url: str, route: str, **options: Any) -> dict[str, Any]:
        """One server's JSON answer; every failure is one line that names the server and no key."""
        library, name = self._library, self.settings.api_key_env
        try:
            answer = await getattr(self._clients[url], method)(route, cast_to=object, **options)
        except library.APIStatusError as error:
            status, said = error.status_code, self._clean(error.body or error.message)
            if status >= 500 or status in (408, 409, 429):
                raise self._away(url, f"HTTP {status} ({said})") from None
            told = f"HTTP {status} ({said})", "correct synthesize.engine, or see its log"
            found, fix = no_key(status, name, self._key) or told
            refused = ServerRefused(f"{url}: {found}", fix)
            refused.status = status
            raise refused from None
        except library.APITimeoutError:
            raise self._away(url, f"no answer within {self.settings.timeout:g} s") from None
        except library.APIConnectionError as error:
            raise self._away(url, f"no connection ({self._clean(error.__cause__ or error)})") from None
        except ValueError as error:  # of a broken body: the library hands it on
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(answer, dict):
            raise ValueError(f"not JSON: {self._clean(answer)[:60]!r}")
        return answer

    def _away(self, url: str, found: str) -> TargetError:
        tries = f"a server must answer (asked {self.settings.retries + 1} times)"
        fix = "start the server or look at its log, then run the same command again: finished work is kept"
        return TargetError(f"{url}: {found}; {tries}", fix)

    def _clean(self, told: Any) -> str:
        return words_of(told, self._key)


def no_key(status: int, name: str, key: str) -> tuple[str, str] | None:
    """What is wrong and what helps, where a server refused the key of that environment variable."""
    if status not in (401, 403):
        return None
    rule = f"the key in {name} is not accepted" if key else f"wants a key; {name} is not set"
    return f"HTTP {status}; {rule}", f"set the environment variable {name}"


def words_of(told: Any, secret: str) -> str:
    """A server's words in one short line, without the key that some of them repeat."""
    for key in ("error", "message", "detail"):
        told = told.get(key, told) if isinstance(told, dict) else told
    line = " ".join(str(told).split())
    return (line.replace(secret, "***") if secret else line)[:200]
