"""A server of vLLM, asked over HTTP: one that runs already, or one that is started here and ends with us.

VLLMServer("http://127.0.0.1:8000").write([1, 2, 3], Sampling(0.0), max_new_tokens=16, seed=0)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from fastdraft.errors import FastDraftError
from fastdraft.functional.generation import Sampling
from fastdraft.runtimes import vllm_process
from fastdraft.runtimes.openai_servers import no_key, words_of
from fastdraft.runtimes.passes import Pass

HOST = "127.0.0.1"
_START_SECONDS = 1800
_ANSWER_SECONDS = 7200  # of one text; on a CPU a long one takes many minutes
_COUNTERS_SECONDS = 2  # within which /metrics knows of a text that has ended
_COUNTER = re.compile(r"vllm:(?:spec_decode_num_|request_)(\w+)_total\{([^}]*)\} (\S+)")
_TOTALS = ("drafts", "draft_tokens", "accepted_tokens", "success")
_POSITION = re.compile(r'position="(\d+)"')
# What its log says of an end: an exception, or what pydantic found; warnings name exceptions too.
_ERROR = re.compile(
    r"(?!.*\b(?:INFO|WARNING) \d|.*ValidationError:).*?((?<!\w)\w*(?:Error|Exception): \S.*|Value error, .*)"
)
_AGAIN = "run the same command again: finished work is kept"


@dataclass(frozen=True)
class Counters:
    """vLLM's own, since the server started; of a server that proposes nothing all are 0."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    success: int = 0  # texts that have ended
    per_pos: tuple[int, ...] = ()  # as many as the server proposes in a round

    def since(self, before: Counters) -> Counters:
        """The difference."""
        rest = {name: getattr(self, name) - getattr(before, name) for name in _TOTALS}
        pairs = zip(self.per_pos, before.per_pos, strict=True)
        return Counters(**rest, per_pos=tuple(now - then for now, then in pairs))


class VLLMServer:
    """A server at an address, whoever started it, with the key that an environment variable may hold."""

    def __init__(self, url: str, api_key_env: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._parts = urlsplit(self.url)
        self._key_name, self._key = api_key_env, os.environ.get(api_key_env, "").strip()

    def close(self) -> None:
        """Nothing: whoever started it ends it."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Of /v1/models the model that is served: `id`, `max_model_len`."""
        found: dict[str, Any] = json.loads(self.get("/v1/models"))["data"][0]
        return found

    @cached_property
    def version(self) -> str:
        return str(json.loads(self.get("/version"))["version"])

    def counters(self) -> Counters:
        """What /metrics says now, of all its engines together."""
        totals, by_position = dict[str, int](), dict[int, int]()
        for name, labels, value in _COUNTER.findall(self.get("/metrics").decode()):
            if found := _POSITION.search(labels):
                by_position[int(found[1])] = by_position.get(int(found[1]), 0) + int(float(value))
            else:
                totals[name] = totals.get(name, 0) + int(float(value))
        named = {name: totals.get(name, 0) for name in _TOTALS}
        return Counters(**named, per_pos=tuple(value for _, value in sorted(by_position.items())))

    def write(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        begun: float | None = None,
        **more: Any,
    ) -> list[Pass]:
        """One answer, by the passes that wrote it: a chunk of the stream is what one pass wrote.

        The distribution is ours, whatever the model's generation config says. `begun` is when the batch was
        handed over, by `time.perf_counter`.
        """
        body: dict[str, Any] = {
            "model": self.facts["id"],
            "prompt": list(prompt),
            "max_tokens": max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": uuid4().hex,  # a prompt that came before is read again
        }
        passes, start = list[Pass](), begun or time.perf_counter()
        for line in self._lines("/v1/completions", body | more):
            if not line.startswith(b"data: {"):
                continue
            told = json.loads(line[6:])
            if "error" in told:
                raise self._refused(json.dumps(told).encode(), 500)
            for choice in told.get("choices", ()):
                ids = choice.get("token_ids")
                if ids is None:
                    found = f"{self.url}: no token ids in its answers"
                    raise FastDraftError(found, "it must be vLLM 0.11 or later: return_token_ids")
                if ids:
                    passes.append(Pass(ids, time.perf_counter() - start))
        if not passes:
            raise FastDraftError(f"{self.url}: an answer without a token", "see its log")
        return passes

    def write_counted(self, *question: Any, **more: Any) -> tuple[list[Pass], Counters]:
        """An answer, and what the server counted for it; none else may be asked meanwhile."""
        before, passes = self.counters(), self.write(*question, **more)
        until = time.monotonic() + _COUNTERS_SECONDS
        while not (found := self.counters().since(before)).success and time.monotonic() < until:
            time.sleep(0.02)  # the answer is there before it is counted
        return passes, found

    def next_logprobs(self, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        """Log-probs at temperature 1 of these next tokens: each is asked for as the prompt's own."""
        found = []
        for token in ids:
            body = {
                "model": self.facts["id"],
                "prompt": [*prompt, token],
                "max_tokens": 1,
                "prompt_logprobs": 0,
            }
            told = json.loads(b"".join(self._lines("/v1/completions", body)))
            found.append(float(told["choices"][0]["prompt_logprobs"][-1][str(token)]["logprob"]))
        return found

    def get(self, route: str) -> bytes:
        return b"".join(self._lines(route))

    def _lines(self, route: str, body: dict[str, Any] | None = None) -> Iterator[bytes]:
        """The lines of an answer; every failure is one line that names the server."""
        secure, way = self._parts.scheme == "https", f"{self._parts.path}{route}"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.netloc, timeout=_ANSWER_SECONDS if body else 60)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request("POST" if body else "GET", way, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise self._refused(answer.read(), answer.status)
            yield from answer
        except (OSError, http.client.HTTPException) as error:
            raise self._away(f"no answer ({error or type(error).__name__})") from None
        finally:
            connection.close()

    def _away(self, found: str) -> FastDraftError:
        return FastDraftError(f"{self.url}: {found}", f"start the server, and {_AGAIN}")

    def _refused(self, told: bytes, status: int) -> FastDraftError:
        said: Any = told.decode(errors="replace")
        with contextlib.suppress(ValueError):
            said = json.loads(said)
        refused = no_key(status, self._key_name, self._key)
        found, fix = refused or (f"HTTP {status} ({words_of(said, self._key)})", "see its log")
        return FastDraftError(f"{self.url}: {found}", fix)


class StartedServer(VLLMServer):
    """One that is started here, on a free port; it ends with `close`, with this object, with this process."""

    def __init__(self, command: Sequence[str], name: str, environment: dict[str, str]) -> None:
        with socket.create_server((HOST, 0)) as free:
            port = int(free.getsockname()[1])
        super().__init__(f"http://{HOST}:{port}")
        self.name, self._log = name, tempfile.TemporaryFile("a+b")  # noqa: SIM115 (goes with this object)
        line = [sys.executable, "-I", vllm_process.__file__, *command, "--host", HOST, "--port", str(port)]
        # Another environment's Python must not find the libraries of this one, and no key is asked for here.
        kept_back = ("PYTHONPATH", "VLLM_API_KEY")
        inherited = {key: value for key, value in os.environ.items() if key not in kept_back}
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for this process, which finishes what is under way
            env=inherited | environment,
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes and waits until they are gone."""
        self._end()

    def _await(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise self._away("could not start")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(self._parts.netloc, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.1)
        raise self._away(f"did not answer within {_START_SECONDS} s")

    def _refused(self, told: bytes, status: int) -> FastDraftError:
        return self._away(f"answered HTTP {status}") if status >= 500 else super()._refused(told, status)

    def _away(self, found: str) -> FastDraftError:
        self._log.seek(0)
        told = self._log.read().decode(errors="replace").split("\n")
        lines = [line.strip() for line in told if line.strip()] or ["its log is empty"]
        why = next((error[1] for line in lines if (error := _ERROR.match(line))), lines[-1])
        return FastDraftError(
            f"vLLM's server for {self.name} {found}: {why[:300]}", f"see the line, then {_AGAIN}"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait()
