"""llama.cpp's server in a process of its own: started, waited for, asked over HTTP, ended with this process.

with LlamaServer(ServerSettings("target.gguf")) as server:
    server.complete([1, 2, 3], Sampling(0.0), max_new_tokens=16, seed=0).ids
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from fastdraft.errors import FastDraftError, MissingExtra
from fastdraft.functional.generation import Sampling
from fastdraft.runtimes.llama_cpp_process import HOST, ServerSettings

ANY_ID = 64  # an ordinary token in every vocabulary: a byte or a short piece
_START_SECONDS = 1800
_ANSWER_SECONDS = 7200  # of one text; on a CPU a long one takes many minutes
_LOG_SECONDS = 2
_ROUND = re.compile(rb"accepted +(\d+)/ *(\d+) draft tokens")
_PROCESS = "fastdraft.runtimes.llama_cpp_process"
_STAMP = re.compile(r"[\d.]+ ([A-Z]) ")  # of a line of the log: time and kind
NEWER = "a llama-server must be of November 2026 or later; without `server` that of xllamacpp runs"


@dataclass(frozen=True)
class Answer:
    """A text as the server told it."""

    ids: list[int]  # the end token too
    seconds: float
    first_token_seconds: float
    writing_seconds: float  # from the first token to the last, by the server's clock
    logprobs: list[
        float
    ]  # under the distribution drawn from; empty where they were not asked for or left out
    num_drafted: int
    num_accepted: int


def require_llama_cpp(program: str = "") -> None:
    """Refuses where there is nothing to start."""
    if not program and find_spec("xllamacpp") is None:
        raise MissingExtra("xllamacpp", "llamacpp")
    if program and not which(program):
        rule = "must be llama.cpp's llama-server, a program that can be run"
        raise FastDraftError(f"server: {program}: {rule}", "correct the path, or leave it out")


class LlamaServer:
    """A running server. It ends with `close`, with this object, and with this process, however that ends."""

    def __init__(self, settings: ServerSettings) -> None:
        require_llama_cpp(settings.program)
        self.settings = settings
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (goes with this object)
        with socket.create_server((HOST, 0)) as free:
            self._port = int(free.getsockname()[1])
        command = [sys.executable, "-m", _PROCESS, json.dumps(asdict(settings)), str(self._port)]
        # A session of its own: Ctrl-C is for this process, which finishes what is under way.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            # LLAMA_TRACE: the log has a line for each round.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LLAMA_TRACE": "1"},
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._await()
            if settings.draft:
                self._prove_draft()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and waits until it is gone."""
        self._end()

    def _await(self) -> None:
        """Until the model is loaded."""
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise self._died("could not start", f"see the file and the keys of llama.cpp; {NEWER}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.02)
        raise self._died(f"did not answer within {_START_SECONDS} s", "try a smaller model")

    def _prove_draft(self) -> None:
        """The server goes on without a draft that does not fit, and says so in its log alone."""
        # `ignore_eos`: enough tokens for a round.
        if not self.complete([ANY_ID] * 4, Sampling(0.0), 8, 0, ignore_eos=True).num_drafted:
            found = f"{self.settings.draft}: the server left the draft out"
            raise FastDraftError(f"{found}: {self._last_line()}", f"export the draft again; {NEWER}")

    def complete(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        logprobs: bool = False,
        **more: Any,
    ) -> Answer:
        """One answer. The distribution is ours: temperature, top-k, top-p in this order, and nothing else.

        Where a draft proposes, the server gives no log-probs.
        """
        # Streamed, a token whose bytes are no whole character would come without its id.
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "samplers": ["temperature", "top_k", "top_p"],
            "cache_prompt": False,  # an answer must not depend on which prompt came before
            "return_tokens": True,
        }
        body |= {"n_probs": 1, "post_sampling_probs": True} if logprobs else {}
        start = time.perf_counter()
        told = self.ask("/completion", body | more)
        seconds, ids, timings = time.perf_counter() - start, told.get("tokens"), told.get("timings", {})
        if not ids:
            raise FastDraftError("llama.cpp's server: no token ids in its answers", NEWER)
        probs = [each.get("prob", 0.0) for each in told.get("completion_probabilities", ())]
        # Here too, tokens that are no whole character are missing.
        whole = len(probs) == len(ids) and all(probs)
        return Answer(
            ids,
            seconds,
            timings["prompt_ms"] / 1000,
            timings["predicted_ms"] / 1000,
            [math.log(prob) for prob in probs] if whole else [],
            timings.get("draft_n", 0),
            timings.get("draft_n_accepted", 0),
        )

    def complete_in_rounds(self, *question: Any) -> tuple[Answer, list[int] | None]:
        """An answer, and how many proposals each round accepted; none else may be asked meanwhile.

        Only the log tells rounds one by one; None where this server's does not.
        """
        before = self._log.seek(0, os.SEEK_END)
        answer, until = self.complete(*question), time.monotonic() + _LOG_SECONDS
        wanted = (answer.num_accepted, answer.num_drafted)
        while time.monotonic() < until:  # the log is written by a thread of its own
            self._log.seek(before)
            rounds = [(int(accepted), int(of)) for accepted, of in _ROUND.findall(self._log.read())]
            if (sum(each[0] for each in rounds), sum(each[1] for each in rounds)) == wanted:
                return answer, [accepted for accepted, _ in rounds]
            time.sleep(0.005)
        return answer, None

    def next_logprobs(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        """Log-probs of the likeliest next tokens, at temperature 1."""
        # The log-probs are of the logits before the bias; a whole character, so that they are told.
        forced = {"logit_bias": [[ANY_ID, 1e6]], "temperature": 0.0, "samplers": ["temperature"]}
        body = {"prompt": list(prompt), "n_predict": 1, "cache_prompt": False, "n_probs": count}
        told = self.ask("/completion", body | forced).get("completion_probabilities")
        if not told:
            raise FastDraftError("llama.cpp's server: no log-probs in its answers", NEWER)
        return {int(each["id"]): float(each["logprob"]) for each in told[0]["top_logprobs"]}

    def ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a question; every failure is one line."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._died(f"gave no answer ({error or type(error).__name__})") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise self._refused(text)
        told: dict[str, Any] = json.loads(text)
        return told

    def _refused(self, told: bytes) -> FastDraftError:
        text = told.decode(errors="replace")
        with contextlib.suppress(ValueError, AttributeError):
            error = json.loads(text)
            error = error.get("error", error)
            text = error.get("message", text) if isinstance(error, dict) else error
        return FastDraftError(
            f"llama.cpp's server: {str(text)[:200]}", "shorten the prompts, or see its help"
        )

    def _died(
        self, found: str, fix: str = "run the same command again: finished work is kept"
    ) -> FastDraftError:
        with contextlib.suppress(subprocess.TimeoutExpired):  # a broken connection may come before the end
            code = self._process.wait(5)
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            found = f"{found} ({why})"
        name = Path(self.settings.target).name
        return FastDraftError(f"llama.cpp's server for {name} {found}: {self._last_line()}", fix)

    def _last_line(self) -> str:
        """The first line of the log that tells an error, else its last."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        told = [(_STAMP.sub("", line).strip(), _STAMP.match(line)) for line in lines if line.strip()]
        errors = (text for text, stamp in told if (stamp and stamp[1] == "E") or text.startswith("error"))
        return (next(errors, "") or (told[-1][0] if told else "its log is empty"))[:300]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process ends when its stdin does; one that does not is killed."""
    assert process.stdin
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
