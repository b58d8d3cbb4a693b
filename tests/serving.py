"""A small honest OpenAI-compatible server over transformers, which can also be told to misbehave.

    python tests/serving.py MODEL_FOLDER --port 8000

In the style of vLLM (`full`), of llama.cpp (ids inside the log-probs) or of a server that has
/chat/completions only, gives text only and refuses unknown keys (`chat`). Faults are named in a list and used
up one for each question."""

from __future__ import annotations

import argparse
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from fastdraft.decoding.scoring import score
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import probabilities
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.target import Target

OPENAI_KEYS = {"model", "messages", "max_tokens", "seed", "temperature", "top_p", "logprobs", "top_logprobs"}


class Served:
    """One model behind one port of this machine."""

    def __init__(
        self, folder: Path, *, style: str = "full", logprobs: str = "processed", key: str = "", port: int = 0
    ) -> None:
        target = Target.at(folder)
        self.tokenizer, self.model = target.tokenizer, target.model("cpu", torch.float32)
        self.engine = HuggingFaceEngine(self.model, target.vocabulary)
        self.style, self.logprobs, self.key = style, logprobs, key
        self.faults: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.released = threading.Event()
        self.connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        handler = type("Handler", (self.handles(),), {"of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handles(self) -> type[BaseHTTPRequestHandler]:
        return Handler

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
            for connection in list(self.connections):  # a dead server answers nobody
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        chat = route == "/v1/chat/completions"
        if not chat and (route != "/v1/completions" or self.style == "chat"):
            return 404, {"error": {"message": f"no route {route}"}}
        if body.get("model") != "target":
            return 404, {"error": {"message": f"The model {body.get('model')} does not exist"}}
        if self.style == "chat" and (strange := set(body) - OPENAI_KEYS):
            return 400, {"error": {"message": f"unknown: {sorted(strange)}"}}
        prompt = body.get("prompt")
        if chat:
            rendered: Any = {"add_generation_prompt": True, "return_dict": True}
            prompt = list(self.tokenizer.apply_chat_template(body["messages"], **rendered)["input_ids"])
        sampling = Sampling(0.0)
        if body["temperature"] > 0:
            sampling = Sampling(body["temperature"], max(0, body.get("top_k") or 0), body.get("top_p", 1.0))
        with self._lock:
            written = self.write(prompt, sampling, body["max_tokens"], body["seed"])
            raw = self.logprobs == "raw"
            if raw and written.logprobs:
                written = score(self.model, [written], Sampling(1.0))[0]
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
        greedy = raw or sampling.temperature == 0
        top = logits.log_softmax(-1) if greedy else probabilities(logits, *vars(sampling).values()).log()
        return 200, self._say(written, float(top.max()), body, chat)

    def write(self, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int) -> Generation:
        """The model's answer; a test may put another in its place."""
        return self.engine.generate([prompt], sampling, max_new_tokens, seed)[0]

    def _say(self, written: Generation, top: float, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        ids, full = written.response_ids, self.style == "full"
        text = self.tokenizer.decode(written.body, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": written.finish_reason}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs") and self.logprobs != "none":
            tokens = [f"token_id:{i}" if full else self.tokenizer.decode([i]) for i in ids]
            if chat or self.style == "llama":
                content = [
                    {"token": token, "logprob": p, "top_logprobs": [{"token": "x", "logprob": top}]}
                    | ({"id": i} if self.style == "llama" else {})
                    for i, token, p in zip(ids, tokens, written.logprobs, strict=True)
                ]
                choice["logprobs"] = {"content": content}
            else:
                told = {"tokens": tokens, "token_logprobs": written.logprobs}
                choice["logprobs"] = {**told, "top_logprobs": [{"x": top}] * len(ids)}
        if full:
            choice |= {"token_ids": ids, "prompt_token_ids": written.prompt_ids, "stop_reason": None}
        usage = {"prompt_tokens": len(written.prompt_ids), "completion_tokens": len(ids)}
        return {"model": "target", "choices": [choice], "usage": usage}


class Talking(Served):
    """Writes plain words that depend on all that was read, and survive a server that gives text only."""

    def write(self, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int) -> Generation:
        said = self.tokenizer(f"I read {sum(prompt)} of {len(prompt)}.", add_special_tokens=False).input_ids
        return Generation(prompt, [*said, 3], [0.0] * (len(said) + 1), "stop")

    def generate(self, prompts: Any, sampling: Sampling, max_new_tokens: int, seed: int) -> list[Generation]:
        """The same as an engine of this process."""
        written = [self.write(list(prompt), sampling, max_new_tokens, seed) for prompt in prompts]
        return [replace(answer, logprobs=[0.0] * len(answer.response_ids)) for answer in written]


class Handler(BaseHTTPRequestHandler):
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
        if self._welcome():
            known = self.path == "/v1/models"
            found = {"data": [{"id": "target"}]} if known else {"detail": "Not Found"}
            self._send(200 if known else 404, found)

    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        sent = self.rfile.read(size)
        if len(sent) < size:  # whoever asked has gone
            self.close_connection = True
        elif self._welcome():
            self._reply(json.loads(sent))

    def _reply(self, body: dict[str, Any]) -> None:
        self.of.asked.append(body)
        fault = self.of.faults.pop(0) if self.of.faults else ""
        if fault in ("drop", "stall"):
            self.of.released.wait(30 if fault == "stall" else 0)
            self.close_connection = True
            self.connection.close()
        elif fault in ("500", "429"):
            self._send(int(fault), {"error": {"message": "out of luck"}}, {"Retry-After": "0.1"})
        elif fault == "html":
            self._send(200, b"<html>a page</html>")
        else:
            status, answer = self.of.answer(self.path, body)
            if fault == "endless":
                answer["choices"][0]["finish_reason"] = None
            self.close_connection |= fault == "cut"
            wrong = {"result": "of another kind"}
            self._send(status, wrong if fault == "wrong" else answer, keep=40 if fault == "cut" else None)

    def _welcome(self) -> bool:
        sent = self.headers.get("authorization", "")
        if self.of.key and sent != f"Bearer {self.of.key}":
            self._send(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
            return False
        return True

    def _send(self, status: int, value: Any, headers: Any = None, keep: int | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        sizes = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, text in {**sizes, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content[:keep])
        self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--style", default="full", choices=["full", "llama", "chat"])
    parser.add_argument("--logprobs", default="processed", choices=["processed", "raw", "none"])
    arguments = parser.parse_args()
    served = Served(arguments.model, style=arguments.style, logprobs=arguments.logprobs, port=arguments.port)
    print(f"serving at {served.url}", flush=True)
    served.http.serve_forever()


if __name__ == "__main__":
    main()
