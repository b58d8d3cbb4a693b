"""vLLM's side of the conversation over transformers: streams a chunk a pass, and counts as vLLM does."""

from __future__ import annotations

import json
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch

from fastdraft.decoding.scoring import score
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.target import Target
from serving import Handler, Served


class ServedVLLM(Served):
    """A target, alone or with a draft that proposes its `k` likeliest tokens."""

    def __init__(self, folder: Path, draft: Path | None = None, k: int = 0) -> None:
        super().__init__(folder)
        self.folder, self.k, self.room = folder, k, 256
        self.draft = Target.at(draft).model("cpu", torch.float32) if draft else None
        self.counted: Counter[str] = Counter()
        self.merged = 0  # answers whose passes come in one chunk, as on a busy machine
        self.noise = 0  # of other requests, in the counters

    def handles(self) -> type[BaseHTTPRequestHandler]:
        return _VLLM

    def metrics(self) -> str:
        labels = 'engine="0",model_name="target"'
        lines = [
            f'vllm:request_success_total{{{labels},finished_reason="length"}} {float(self.counted["success"])}'
        ]
        for name in ("drafts", "draft_tokens", "accepted_tokens") if self.k else ():
            lines.append(f"vllm:spec_decode_num_{name}_total{{{labels}}} {float(self.counted[name])}")
            lines.append(f"vllm:spec_decode_num_{name}_created{{{labels}}} 1.7e9")
        for place in range(self.k):
            where = f'{labels},position="{place}"'
            found = float(self.counted[f"at {place}"])
            lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{where}}} {found}")
        return "\n".join(lines)

    def passes(self, body: dict[str, Any]) -> list[list[int]]:
        """The answer by pass, counted: the last may be cut by the limit, and counts whole."""
        sampling = (
            Sampling(body["temperature"], max(0, body["top_k"]), body["top_p"])
            if body["temperature"]
            else Sampling(0.0)
        )
        prompt, limit = body["prompt"], body["max_tokens"]
        written = self.write(prompt, sampling, limit + self.k, body["seed"]).response_ids
        ends = body.get("stop_token_ids", ())
        if body.get("ignore_eos"):
            ends = ()
        stop = next((place + 1 for place, token in enumerate(written[:limit]) if token in ends), limit)
        rounds, at = [written[:1]], 1
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *written]])
            known = len(self.tokenizer)  # a trained draft proposes no id without a token
            likeliest = (
                self.draft(input_ids=ids).logits[0, :, :known].argmax(-1).tolist() if self.draft else []
            )
        while at < min(stop, len(written)):
            right = [
                likeliest[len(prompt) + at + j - 1] == written[at + j]
                for j in range(min(self.k, len(written) - at))
            ]
            accepted = [*right, False].index(False)
            self.counted.update({"drafts": bool(self.k), "draft_tokens": self.k, "accepted_tokens": accepted})
            self.counted.update({f"at {place}": 1 for place in range(accepted)})
            rounds.append(written[at : min(at + accepted + 1, stop)])
            at += accepted + 1
        self.counted.update({"success": 1, "drafts": self.noise})
        if self.merged:
            self.merged -= 1
            return [[token for each in rounds for token in each]]
        return rounds


class _VLLM(Handler):
    of: ServedVLLM

    def do_GET(self) -> None:  # noqa: N802
        if self.path.startswith("/v1") and not self._welcome():
            return
        model = {"id": "target", "max_model_len": self.of.room}
        known: dict[str, Any] = {
            "/health": b"",
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [model]},
            "/metrics": self.of.metrics().encode(),
        }
        self._send(200, known[self.path])

    def _reply(self, body: dict[str, Any]) -> None:
        self.of.asked.append(body)
        if self.of.faults:
            super()._reply({**body, "model": "another"})
        elif "prompt_logprobs" in body:
            ids = body["prompt"]
            scored = score(self.of.model, [Generation(ids[:-1], ids[-1:], [0.0], "length")], Sampling(1.0))[0]
            told = [None, {str(ids[-1]): {"logprob": scored.logprobs[0]}}]
            self._send(200, {"choices": [{"prompt_logprobs": told}]})
        else:
            chunks = [{"choices": [{"token_ids": ids}]} for ids in self.of.passes(body)]
            lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, {"choices": []}])
            self._send(200, f"{lines}data: [DONE]\n\n".encode())
