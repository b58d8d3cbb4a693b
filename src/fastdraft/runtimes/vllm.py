"""vLLM under the clock: a target alone, with a draft, with its own lookup, each in a server of its own.

`VLLMPair(target, draft, settings)` is the `LoadedPair` that a benchmark asks.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from fastdraft.decoding.latency import Latency
from fastdraft.errors import FastDraftError
from fastdraft.functional.generation import Sampling, check_prompts
from fastdraft.runtimes.llama_cpp_process import room_for
from fastdraft.runtimes.llama_cpp_server import ANY_ID
from fastdraft.runtimes.openvino import answer_seed
from fastdraft.runtimes.passes import Pass, cut_rounds, timed
from fastdraft.runtimes.runtime import Proposer, TimedText
from fastdraft.runtimes.vllm_server import Counters, StartedServer, VLLMServer
from fastdraft.target import Target

NGRAMS = (2, 3)  # the shortest and the longest run of last tokens that its lookup looks for
_MODULE = ("-m", "vllm.entrypoints.openai.api_server")
MEASURED_PASSES = 12  # in which all texts have a part, for the cost of a pass
_SYNTHETIC_TOKENS = 96  # of a text whose proposals are accepted by chance
_PREFILL = 512  # tokens of prompts that a pass reads at the least
_TRIES = 4  # to be told every pass by itself
_LONGEST = 2048  # tokens of a text for which there is room, so that few servers are started again
_LEAST_CACHE = 2**24
_MOST_TEXTS = 256  # at a time, for the cost of a pass
_PRIVATE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class VLLMSettings:
    """How vLLM runs a pair: by a program that is started, or at addresses."""

    server: str = ""  # Python of an environment with vLLM, or its program `vllm`; "": of this environment
    arguments: str = ""  # further ones of every server
    base_url: str = ""  # of a server of the target alone that runs already
    draft_base_url: str = ""  # of one with the draft
    api_key_env: str = "OPENAI_API_KEY"  # variable of the environment with the key of both
    threads: int = 0  # of a CPU; 0: vLLM's own choice
    eos_ids: tuple[int, ...] = ()

    def command(self, target: str) -> list[str]:
        """What starts a server, without its settings."""
        program = self.server or (sys.executable if find_spec("vllm") else "vllm")
        if not which(program):
            found = f"benchmark.vllm.server: {self.server or 'empty, and no vLLM here'}"
            rule = "must be the Python of an environment that has vLLM, or its program vllm"
            raise FastDraftError(
                f"{found}; {rule}", "python -m venv vllm-env && vllm-env/bin/pip install vllm"
            )
        is_python = Path(program).name.startswith("python")
        return [program, *_MODULE, "--model", target] if is_python else [program, "serve", target]


def speculation(proposer: Proposer, draft: str, **more: Any) -> dict[str, Any]:
    """What `--speculative-config` says."""
    k = {"num_speculative_tokens": proposer.num_speculative_tokens}
    if proposer.kind == "lookup":
        return {"method": "ngram", **k, "prompt_lookup_min": NGRAMS[0], "prompt_lookup_max": NGRAMS[1]}
    return {"method": "draft_model", "model": draft, **k, **more}


@dataclass(frozen=True)
class Room:
    """What a server holds at a time."""

    texts: int
    tokens: int  # of all texts together
    longest: int  # of one text


@dataclass
class VLLMPair:
    """Weights of a target and its draft; a server for each proposer starts when it is first asked.

    K is a setting of a server's start, so each K is a server too. All stay, because a benchmark asks them in
    turn; each holds its models and a cache for the texts that it is asked.
    """

    target: Path
    draft: Path
    settings: VLLMSettings
    _servers: dict[Proposer | None, tuple[VLLMServer, Room]] = field(default_factory=dict)

    @cached_property
    def context_length(self) -> int:
        return min(Target.at(model).context_length for model in (self.target, self.draft))

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        proposer: Proposer | None = None,
        *,
        exact_counts: bool = False,
    ) -> list[TimedText]:
        """A draft proposes its likeliest tokens, which are accepted such that the text follows the target."""
        k, ends = proposer.num_speculative_tokens if proposer else 0, list(self.settings.eos_ids)
        check_prompts(prompts, max_new_tokens, self.context_length)
        room = max(map(len, prompts)) + max_new_tokens + 2 * k + 3
        server = self._server(proposer, len(prompts), room)
        # vLLM counts what is accepted beyond a text's limit: the text is written one round further, and cut.
        further = k + 1 if exact_counts and proposer else 0
        begun, asked = time.perf_counter(), max_new_tokens + further

        def ask(index: int) -> tuple[list[Pass], list[list[int]] | None]:
            question = prompts[index], sampling, asked, answer_seed(seed, index)
            if not further:
                return server.write(*question, begun=begun, stop_token_ids=ends), None
            for _ in range(_TRIES):  # a busy machine hands on two passes as one
                passes, counters = server.write_counted(*question, stop_token_ids=ends)
                if counted := as_counted(passes, counters, k):
                    break
            return passes, counted

        # Where it counts one after the other, since the counters are of all texts together.
        with ThreadPoolExecutor(1 if further else len(prompts)) as pool:
            answers = list(pool.map(ask, range(len(prompts))))
        found = []
        for passes, counted in answers:
            written = counted or [each.tokens for each in passes]
            text, rounds = cut_rounds(written, max_new_tokens, ends, k)
            found.append(timed(passes, text, rounds if counted else []))
        return found

    def gap(self, prefix_ids: list[int], first: int, second: int) -> float:
        """Distance of two log-probs as the server that serves the target alone computes them."""
        one, two = self._server(None, 1, len(prefix_ids) + 2).next_logprobs(prefix_ids, (first, second))
        return abs(one - two)

    def time_spent(self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int) -> None:
        """The server does not tell."""

    def close(self) -> None:
        """Ends the servers that were started here."""
        while self._servers:
            self._servers.popitem()[1][0].close()

    def _server(self, proposer: Proposer | None, texts: int, room: int) -> VLLMServer:
        """One with room for so many texts of so many tokens; ours are started again where they have less."""
        room = min(room, self.context_length)
        running, has = self._servers.get(proposer, (None, Room(0, 0, 0)))
        if running and has.texts >= texts and has.tokens >= texts * room and has.longest >= room:
            return running
        if running:
            self._servers.pop(proposer)[0].close()
        server: VLLMServer
        if url := self.settings.draft_base_url if proposer else self.settings.base_url:
            server = VLLMServer(url, self.settings.api_key_env)
            check_address(server, proposer)
            has = Room(2**31, 2**31, int(server.facts["max_model_len"]))
            if has.longest < room:
                found = f"{url}: max_model_len {has.longest}; must be {room} for prompt and answer"
                raise FastDraftError(found, "start it with more, or shorten both")
        else:
            longest = max(min(max(room, _LONGEST), self.context_length), has.longest)
            has = Room(max(texts, has.texts), max(texts * room_for(room), longest, has.tokens), longest)
            server = start(self.target, self.draft, self.settings, proposer, has)
        self._servers[proposer] = server, has
        return server


def check_address(server: VLLMServer, proposer: Proposer | None) -> None:
    """Refuses a running server that proposes something else than what is measured."""
    proposes, k = len(server.counters().per_pos), proposer.num_speculative_tokens if proposer else 0
    if proposes != k:
        rule = f"must be {k or 'none'} here"
        fix = "start it with another --speculative-config" if k else "name a server of the target alone"
        raise FastDraftError(f"{server.url}: proposes {proposes} tokens a round; {rule}", fix)


def start(
    target: Path, draft: Path, settings: VLLMSettings, proposer: Proposer | None, room: Room, **more: Any
) -> StartedServer:
    """A server whose cache is as large as that needs; `more` goes into the speculative config."""
    models = [target, draft] if proposer and proposer.kind == "draft" else [target]
    shapes = [Target.at(model).architecture for model in models]
    token = sum(8 * shape.num_layers * shape.num_kv_heads * shape.head_dim for shape in shapes)  # in float32
    # A half more for blocks that are begun, and what few layers of one model leave empty in the other's.
    cache = int(1.5 * token * max(room.tokens, room.longest)) + _LEAST_CACHE
    sizes = {"max-model-len": room.longest, "max-num-seqs": room.texts, "kv-cache-memory-bytes": cache}
    command = settings.command(str(target))
    command += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    if proposer:
        command += ["--speculative-config", json.dumps(speculation(proposer, str(draft)) | more)]
    threads = {"OMP_NUM_THREADS": str(settings.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = _PRIVATE | (threads if settings.threads else {})
    return StartedServer([*command, *shlex.split(settings.arguments)], target.name, environment)


def as_counted(passes: Sequence[Pass], counters: Counters, k: int) -> list[list[int]] | None:
    """Tokens by pass, checked against the server's counters; None where the two do not agree.

    What the text's end cuts off its last round stands there as -1, since the server counts it as accepted.
    """
    written = [list(each.tokens) for each in passes]
    beyond = counters.accepted_tokens - sum(len(each) - 1 for each in written[1:])
    rounds = counters.drafts == len(written) - 1 or counters.draft_tokens < k * (len(written) - 1)
    if len(written[0]) > 1 or not 0 <= beyond <= k or not rounds:
        return None  # two passes in one chunk of the stream, or other requests meanwhile
    written[-1] += [-1] * beyond
    return written


def measure_passes(
    target: Path,
    draft: Path,
    settings: VLLMSettings,
    widths: Sequence[int],
    prefix_tokens: int,
    texts: Sequence[int],
) -> Latency | None:
    """What a pass over so many tokens takes, measured as one over the next tokens of so many texts.

    So one and the same curve tells a pass that verifies K + 1 tokens of each of several texts. None where the
    servers run already: there the draft is never asked alone.
    """
    if settings.base_url:
        return None
    of_target = sorted({n * width for n in texts for width in widths if n * width <= _MOST_TEXTS} | {1})
    by_texts = timed_passes(draft, settings, sorted({1, *texts}), prefix_tokens)
    by_tokens = timed_passes(target, settings, of_target, prefix_tokens)
    return Latency(by_texts[1], by_tokens, prefix_tokens, "vllm", "", "", draft_seconds_by_texts=by_texts)


def timed_passes(
    model: Path, settings: VLLMSettings, texts: Sequence[int], prefix_tokens: int
) -> dict[int, float]:
    """What a pass over the next token of so many texts takes, in a server of that model alone."""
    room = prefix_tokens + _asked(max(texts), prefix_tokens) + 1
    server = start(model, model, settings, None, Room(max(texts), max(texts) * room, room))
    try:
        return {count: pass_seconds(server, count, prefix_tokens) for count in texts}
    finally:
        server.close()


def seconds_by_chance(
    target: Path,
    draft: Path,
    settings: VLLMSettings,
    k: int,
    chance: float,
    texts: Sequence[int],
    prefix_tokens: int,
) -> dict[int, float]:
    """Seconds for a token of each of so many texts, served with a draft of whatever weights.

    vLLM accepts each further proposal with that chance, whatever was proposed.
    """
    most, tokens = max(texts), _SYNTHETIC_TOKENS + max(texts)
    room = prefix_tokens + tokens + 2 * k + 4
    rates = [round(chance**place, 6) for place in range(1, k + 1)]
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    proposer, sizes = Proposer("draft", k), Room(most, most * room, room)
    server, found = start(target, draft, settings, proposer, sizes, **synthetic), {}
    try:
        for count in texts:
            pass_seconds(server, count, prefix_tokens)  # warms up
            found[count] = pass_seconds(server, count, prefix_tokens, tokens)
        return found
    finally:
        server.close()


def _asked(texts: int, prefix_tokens: int) -> int:
    return 2 + MEASURED_PASSES + texts * prefix_tokens // _PREFILL  # others' prompts are read meanwhile


def pass_seconds(server: VLLMServer, texts: int, prefix_tokens: int, tokens: int = 0) -> float:
    """Seconds for the next token of each of so many texts, while all are being written; the median text's.

    `tokens` are written of each, by default enough for some passes that all have a part in.
    """
    prompts = [[ANY_ID + (text + place) % 16 for place in range(prefix_tokens)] for text in range(texts)]
    asked, begun = tokens or _asked(texts, prefix_tokens), time.perf_counter()
    with ThreadPoolExecutor(texts) as pool:
        more = {"ignore_eos": True, "begun": begun}
        wait = [pool.submit(server.write, prompt, Sampling(0.0), asked, 0, **more) for prompt in prompts]
        answers = [each.result() for each in wait]
    first, last = max(each[0].seconds for each in answers), min(each[-1].seconds for each in answers)
    rates = []
    for each in answers:
        inside = [one for one in each if first <= one.seconds <= last]
        if len(inside) > 1:
            written = sum(len(one.tokens) for one in inside[1:])
            rates.append((inside[-1].seconds - inside[0].seconds) / written)
    if not rates:
        raise FastDraftError(f"{server.url}: {texts} texts never wrote together", "lower sweep.concurrency")
    return statistics.median(rates)
