"""Questions to OpenAI-compatible servers over HTTP: several at once, over several servers, asked again when something fails.

Decides what is worth asking again (no connection, a time-out, a cut or damaged answer, 408, 425, 429, 5xx) and how long to
wait (exponential with jitter, never less than the server's Retry-After); that a server which cannot be reached is left out
for a while; and that what the user must mend is one line without any secret. The only file that imports httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from fastdraft.errors import MissingExtra, TargetError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

LONGEST_PAUSE, LONGEST_RETRY_AFTER = 60.0, 600.0
_ASK_AGAIN = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
_OVERLOADED = frozenset({429, 502, 503, 504})
"""Answers that speak of the whole server, not of one question."""
_LOOK_EVERY = 0.2
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RefusedError(Exception):
    """The server understood and said no: asking again would not help."""

    def __init__(self, server: str, status: int, message: str) -> None:
        self.server, self.status, self.message = server, status, message
        super().__init__(f"HTTP {status}: {message}")


class _FailedError(Exception):
    """Worth asking again."""

    def __init__(self, found: str, *, whole_server: bool, retry_after: float = 0.0) -> None:
        self.found, self.whole_server, self.retry_after = found, whole_server, retry_after
        super().__init__(found)


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    failures: int = 0
    back_at: float = 0.0
    """Monotonic time before which it is left alone."""


class Servers:
    """A pool of servers that hold the same model.

    Args:
        urls: Their base addresses, such as http://127.0.0.1:8000/v1.
        concurrency: Questions under way at each server.
        timeout: Seconds for one whole answer.
        retries: Times that a question is asked again.
        api_key_env: Name of the environment variable that holds the key.
        check: Called several times a second while waiting; what it raises ends the waiting and cancels all questions.
        pause: Seconds before a question is asked the second time; they double from time to time.

    Raises:
        MissingExtra: without httpx.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        concurrency: int,
        timeout: float,
        retries: int,
        api_key_env: str,
        check: Callable[[], None] = lambda: None,
        pause: float = 1.0,
    ) -> None:
        self.timeout, self.retries, self.pause, self._check, self._key_name = (
            timeout,
            retries,
            pause,
            check,
            api_key_env,
        )
        self._key = os.environ.get(api_key_env, "").strip()
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._room = asyncio.Semaphore(concurrency * len(urls))
        self._client = _client(self._key, timeout, concurrency * len(urls), urls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-servers", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @property
    def names(self) -> str:
        return ", ".join(server.url for server in self._servers)

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers]

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs the work to its end in the pool's own thread, looking at `check` meanwhile; cancels it when that raises."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(_LOOK_EVERY) if not future.done() else future.result()
                if future.done():  # a TimeoutError of the work itself would be a fault in this program
                    return future.result()
                self._check()
        finally:
            future.cancel()

    def close(self) -> None:
        """Ends every connection; the pool cannot be used afterwards."""
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(2)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2)

    async def ask(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON answer of some server of the pool.

        Raises:
            RefusedError: when a server says no (400, 404, 422 and the like).
            TargetError: when the key is not accepted, or no server answered after all tries.
        """
        last: _Server | None = None
        failure = _FailedError("not asked", whole_server=False)
        async with self._room:
            for attempt in range(self.retries + 1):
                server = await self._pick(last)
                try:
                    answer = await self._once(server, "POST", route, body)
                except _FailedError as error:
                    failure, last = error, server
                    self._rest(server, error)
                    alone = len(self._servers) == 1 or all(
                        other.back_at > time.monotonic() for other in self._servers
                    )
                    if attempt < self.retries and (alone or not error.whole_server):
                        await asyncio.sleep(
                            max(self._backoff(attempt), 0.0 if error.whole_server else error.retry_after)
                        )
                else:
                    server.failures = 0
                    return answer
        raise self._given_up(last, failure)

    async def get(self, url: str, route: str) -> dict[str, Any]:
        """The JSON answer of one server to a GET, asked again like any question.

        Raises:
            RefusedError: when the server says no. TargetError: see `ask`.
        """
        server = next(server for server in self._servers if server.url == url)
        failure = _FailedError("not asked", whole_server=True)
        for attempt in range(self.retries + 1):
            try:
                return await self._once(server, "GET", route, None)
            except _FailedError as error:
                failure = error
                if error.found.startswith("not JSON"):
                    break
                if attempt < self.retries:
                    await asyncio.sleep(max(self._backoff(attempt), error.retry_after))
        raise self._given_up(server, failure)

    async def _pick(self, last: _Server | None) -> _Server:
        """The least busy server that is not resting, another than the last one where there is one; waits while all rest."""
        while True:
            now = time.monotonic()
            ready = [server for server in self._servers if server.back_at <= now]
            if ready:
                return min(ready, key=lambda server: (server is last, server.in_flight))
            await asyncio.sleep(max(0.01, min(server.back_at for server in self._servers) - now))

    def _rest(self, server: _Server, failure: _FailedError) -> None:
        """Leaves a server alone for a while, longer each time; questions that failed together count once."""
        now = time.monotonic()
        if not failure.whole_server:
            return
        if server.back_at <= now:
            server.back_at = now + self._backoff(server.failures)
            server.failures += 1
        server.back_at = max(server.back_at, now + failure.retry_after)

    def _backoff(self, attempt: int) -> float:
        """Between half and the whole of a pause that doubles from attempt to attempt."""
        return min(self.pause * 2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)

    async def _once(
        self, server: _Server, method: str, route: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        import httpx

        server.in_flight += 1
        try:
            async with asyncio.timeout(self.timeout):
                response = await self._client.request(method, f"{server.url}{route}", json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise _FailedError(f"no answer within {self.timeout:g} s", whole_server=True) from None
        except httpx.ConnectError as error:
            raise _FailedError(f"no connection ({self._clean(str(error))})", whole_server=True) from None
        except httpx.HTTPError as error:
            cut = self._clean(str(error)) or type(error).__name__
            raise _FailedError(f"the answer broke off ({cut})", whole_server=False) from None
        finally:
            server.in_flight -= 1
        return self._read(server, response)

    def _read(self, server: _Server, response: httpx.Response) -> dict[str, Any]:
        status = response.status_code
        if status in (401, 403):
            key = f"the key in the environment variable {self._key_name} is not accepted"
            rule = (
                key
                if self._key
                else f"it wants a key, and the environment variable {self._key_name} is not set"
            )
            raise TargetError(
                server.url,
                f"HTTP {status}",
                rule,
                "set the variable that synthesize.engine.api_key_env names",
            )
        if status in _ASK_AGAIN:
            wait = _retry_after(response.headers.get("retry-after", ""))
            message = self._clean(_message(response.text))
            raise _FailedError(
                f"HTTP {status} ({message})", whole_server=status in _OVERLOADED, retry_after=wait
            )
        if status != 200:
            raise RefusedError(server.url, status, self._clean(_message(response.text)))
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise _FailedError(f"not JSON: {self._clean(response.text[:60])!r}", whole_server=False)
        return answer

    def _given_up(self, server: _Server | None, failure: _FailedError) -> TargetError:
        where = server.url if server else self.names
        if failure.found.startswith("not JSON"):
            rule = "must be an OpenAI-compatible server"
            return TargetError(
                where,
                failure.found,
                rule,
                "correct synthesize.engine.servers (most such addresses end in /v1)",
            )
        tries = f"asked {self.retries + 1} times" if self.retries else "asked once"
        remedy = "start the server or look at its log, then run the same command again: finished work is kept"
        return TargetError(where, failure.found, f"a server must answer ({tries})", remedy)

    def _clean(self, text: str) -> str:
        """A server's words in one short line, without the key that some of them repeat."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:200]


def _client(key: str, timeout: float, connections: int, urls: Sequence[str]) -> httpx.AsyncClient:
    try:
        import httpx
    except ImportError:
        raise MissingExtra("httpx", "server") from None
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=not all(
            urlsplit(url).hostname in _LOOPBACK for url in urls
        ),  # a proxy does not know this machine's own servers
    )


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 where it is neither."""
    seconds = 0.0
    try:
        seconds = float(value)
    except ValueError:
        with contextlib.suppress(ValueError, TypeError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else 0.0


def _message(text: str) -> str:
    """What an error's body says, in whichever of the usual places."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        body = body.get(key, body) if isinstance(body, dict) else body
    return body if isinstance(body, str) else json.dumps(body)
