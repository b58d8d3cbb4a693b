"""A small honest OpenAI-compatible server over transformers, which can also be told to misbehave.

    python tests/serving.py MODEL_FOLDER --port 8000

Decides what the tests' servers understand: completions and chat, token ids, log-probs (processed or raw), seeds; in the style of
vLLM (`full`), of llama.cpp (ids inside the log-probs), of a server that takes and gives text only and refuses unknown keys
(`plain`), or of one with chat only (`chat`). Faults are named in a list and used up one for each question.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from fastdraft.decoding.scoring import score
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import probabilities
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.target import Target

PLAIN_KEYS = {
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "seed",
    "temperature",
    "top_p",
    "logprobs",
    "top_logprobs",
}


class Served:
    """One model behind one port of this machine."""

    def __init__(
        self,
        folder: Path,
        *,
        style: str = "full",
        logprobs: str = "processed",
        key: str = "",
        name: str = "target",
        port: int = 0,
    ) -> None:
        config = Target.at(folder)
        self.model, self.tokenizer, self.vocabulary = (
            config.model("cpu"),
            Target.at(folder).tokenizer,
            config.vocabulary,
        )
        self.style, self.logprobs, self.key, self.name = style, logprobs, key, name
        self.context_length = int(self.model.config.max_position_embeddings)
        self.faults: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.released = threading.Event()
        self.connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        served = self

        class Handler(_Handler):
            of = served

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator[Served]:
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self.http.shutdown()
            self.http.server_close()
            for connection in list(
                self.connections
            ):  # a dead server answers nobody, not even those who were connected before
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def next_fault(self) -> str:
        with self._lock:
            return self.faults.pop(0) if self.faults else ""

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        chat = route.endswith("/chat/completions")
        if route not in ("/v1/completions", "/v1/chat/completions") or (self.style == "chat" and not chat):
            return 404, {"error": {"message": f"no route {route}"}}
        if body.get("model") != self.name:
            return 404, {"error": {"message": f"The model {body.get('model')} does not exist"}}
        strange = set(body) - PLAIN_KEYS
        if self.style in ("plain", "chat") and (strange or isinstance(body.get("prompt"), list)):
            return 400, {"error": {"message": f"unknown: {sorted(strange) or 'prompt of ids'}"}}
        prompt = self._prompt(body, chat)
        top_k = max(0, int(body.get("top_k") or 0))
        temperature = float(body["temperature"])
        sampling = (
            Sampling(temperature, top_k, float(body.get("top_p", 1.0))) if temperature > 0 else Sampling(0.0)
        )
        with self._lock:
            written = self._with_logprobs(
                self.write(prompt, sampling, body["max_tokens"], body["seed"]), sampling
            )
            top = self._top(prompt, sampling)
        return 200, self._say(written, top, body, chat)

    def write(self, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int) -> Generation:
        """The model's answer; a test may put another in its place."""
        return HuggingFaceEngine(self.model, self.vocabulary).generate(
            [prompt], sampling, max_new_tokens, seed
        )[0]

    def _prompt(self, body: dict[str, Any], chat: bool) -> list[int]:
        if chat:
            text = self.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return (
            list(body["prompt"])
            if isinstance(body["prompt"], list)
            else list(self.tokenizer(body["prompt"]).input_ids)
        )

    def _with_logprobs(self, written: Generation, sampling: Sampling) -> Generation:
        if self.logprobs == "raw":
            return score(self.model, [written], Sampling(1.0))[0]
        return written

    def _top(self, prompt: list[int], sampling: Sampling) -> float:
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        raw = self.logprobs == "raw" or sampling.temperature == 0
        return float(
            (
                logits.float().log_softmax(-1)
                if raw
                else probabilities(logits, *vars(sampling).values()).log()
            ).max()
        )

    def _say(self, written: Generation, top: float, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        ids, stopped = written.response_ids, written.finish_reason == "stop"
        text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": written.finish_reason}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs") and self.logprobs != "none":
            named = bool(body.get("return_tokens_as_token_ids")) and self.style == "full"
            tokens = [f"token_id:{i}" if named else self.tokenizer.decode([i]) for i in ids]
            if chat or self.style == "llama":
                extra = [{"id": i} if self.style == "llama" else {} for i in ids]
                content = [
                    {"token": t, "logprob": p, **e}
                    for t, p, e in zip(tokens, written.logprobs, extra, strict=True)
                ]
                if content:
                    content[0]["top_logprobs"] = [{"token": "x", "logprob": top}]
                choice["logprobs"] = {"content": content}
            else:
                choice["logprobs"] = {
                    "tokens": tokens,
                    "token_logprobs": written.logprobs,
                    "top_logprobs": [{"x": top}] * len(ids),
                }
        if body.get("return_token_ids") and self.style == "full":
            choice |= {"token_ids": ids, "prompt_token_ids": written.prompt_ids, "stop_reason": None}
        if body.get("prompt_logprobs") and self.style == "full":
            choice["prompt_logprobs"] = [None] * len(written.prompt_ids)
        usage = {"prompt_tokens": len(written.prompt_ids), "completion_tokens": len(ids)}
        return {
            "object": "chat.completion" if chat else "text_completion",
            "model": self.name,
            "choices": [choice],
            "usage": usage,
        }


class _Handler(BaseHTTPRequestHandler):
    of: Served
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.of.connections.add(self.connection)

    def handle(self) -> None:
        with suppress(ConnectionError):  # whoever asked has gone
            super().handle()

    def finish(self) -> None:
        self.of.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self._welcome():
            return None
        if self.path != "/v1/models":
            return self._json(404, {"detail": "Not Found"})
        told = {"max_model_len": self.of.context_length} if self.of.style == "full" else {}
        return self._json(200, {"object": "list", "data": [{"id": self.of.name, "object": "model", **told}]})

    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        sent = self.rfile.read(size)
        if len(sent) < size:  # whoever asked has gone
            self.close_connection = True
            return None
        body = json.loads(sent)
        if not self._welcome():
            return None
        self.of.asked.append(body)
        self.of.times.append(time.monotonic())
        fault = self.of.next_fault()
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if fault == "stall":
            self.of.released.wait(30)
            self.close_connection = True
            return None
        if fault in ("500", "503"):
            return self._json(int(fault), {"error": {"message": "out of luck"}})
        if fault == "429":
            return self._json(429, {"error": "slow down"}, {"Retry-After": "1"})
        if fault == "html":
            return self._raw(200, b"<html>a page</html>")
        status, answer = self.of.answer(self.path, body)
        if fault == "wrong":
            answer = {"result": "of another kind"}
        if fault == "endless":
            answer["choices"][0]["finish_reason"] = None
        if fault == "cut":
            self.close_connection = True
            return self._raw(status, json.dumps(answer).encode(), keep=40)
        return self._json(status, answer)

    def _welcome(self) -> bool:
        sent = self.headers.get("authorization", "")
        if self.of.key and sent != f"Bearer {self.of.key}":
            self._json(
                401, {"error": {"message": f"Incorrect API key provided: {sent.removeprefix('Bearer ')}"}}
            )
            return False
        return True

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._raw(status, json.dumps(value).encode(), headers=headers)

    def _raw(
        self, status: int, content: bytes, *, headers: dict[str, str] | None = None, keep: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:keep])
        self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--style", default="full", choices=["full", "llama", "plain", "chat"])
    parser.add_argument("--logprobs", default="processed", choices=["processed", "raw", "none"])
    arguments = parser.parse_args()
    served = Served(arguments.model, style=arguments.style, logprobs=arguments.logprobs, port=arguments.port)
    print(f"serving at {served.url}", flush=True)
    served.http.serve_forever()


if __name__ == "__main__":
    main()
