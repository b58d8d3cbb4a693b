"""llama.cpp under the clock: a target alone, with a draft, with lookup, each in a server of its own.

`LlamaCppPair(target, draft, settings, context_length)` is the `LoadedPair` that a benchmark asks.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdraft.decoding.latency import Latency, seconds_more
from fastdraft.functional.generation import Sampling, check_prompts
from fastdraft.runtimes.llama_cpp_process import ServerSettings, room_for
from fastdraft.runtimes.llama_cpp_server import ANY_ID, Answer, LlamaServer
from fastdraft.runtimes.openvino import answer_seed
from fastdraft.runtimes.passes import cut_rounds
from fastdraft.runtimes.runtime import Proposer, TimedText

_LISTED = 1000  # next tokens whose log-probs are asked for, to tell a near-tie
_CYCLE = 16  # tokens after which the text for single passes repeats itself
PASSES, REPEATS = 12, 5  # of a text, and texts, for the cost of a pass


@dataclass(frozen=True)
class LlamaCppSettings:
    """How llama.cpp runs a pair."""

    server: str = ""  # the user's llama-server; "": the wheel's
    threads: int = 0  # 0: llama.cpp's own choice
    eos_ids: tuple[int, ...] = ()  # ids that end a text, beside those that end one in the file itself


@dataclass
class LlamaCppPair:
    """GGUF files of a target and its draft; a server for each proposer starts when it is first asked.

    K is a setting of a server's start, so each K is a server too. They stay, because a benchmark asks them in
    turn, as long as their weights take no more than half of the machine's memory; then the oldest goes.
    """

    target: Path
    draft: Path
    settings: LlamaCppSettings
    context_length: int
    _servers: dict[Proposer | None, LlamaServer] = field(default_factory=dict)

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
        """Sample and match: what is drawn from the target is compared with the draft's likeliest token.

        So sampled text follows the target, and one seed gives one text whoever proposes, rounding aside.
        """
        k, eos_ids = proposer.num_speculative_tokens if proposer else 0, self.settings.eos_ids
        # Near its limit a text has shorter rounds; for exact counts it is written one round further, and cut.
        # Not with lookup, of whose passes some propose nothing, nobody knows which.
        further = k + 1 if exact_counts and proposer and proposer.kind == "draft" else 0
        check_prompts(prompts, max_new_tokens + further, self.context_length)
        server = self._server(proposer, len(prompts), max(map(len, prompts)) + max_new_tokens + 2 * k + 3)

        def question(index: int) -> tuple[Any, ...]:
            return prompts[index], sampling, max_new_tokens + further, answer_seed(seed, index)

        if exact_counts and proposer:  # one after the other, since the log of rounds is one
            answers = [server.complete_in_rounds(*question(index)) for index in range(len(prompts))]
        else:
            with ThreadPoolExecutor(len(prompts)) as pool:
                asked = pool.map(lambda index: server.complete(*question(index)), range(len(prompts)))
                answers = [(answer, None) for answer in asked]
        return [_timed(answer, rounds, max_new_tokens, eos_ids, k) for answer, rounds in answers]

    def gap(self, prefix_ids: list[int], first: int, second: int) -> float:
        """Distance of two log-probs at the file's weights; of a token far down the list, at least that."""
        logprobs = self._server(None, 1, len(prefix_ids) + 2).next_logprobs(prefix_ids, _LISTED)
        least = min(logprobs.values())
        return abs(logprobs.get(first, least) - logprobs.get(second, least))

    def time_spent(self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int) -> None:
        """The server does not tell."""

    def close(self) -> None:
        """Ends all servers."""
        while self._servers:
            self._servers.popitem()[1].close()

    def _server(self, proposer: Proposer | None, slots: int, room: int) -> LlamaServer:
        """A server with so many texts at a time of so many tokens, started again where it has fewer."""
        running = self._servers.get(proposer)
        if running and running.settings.slots >= slots and running.settings.room >= room:
            return running
        if running:
            self._servers.pop(proposer).close()
        while self._servers and (len(self._servers) + 1) * self._bytes > _memory() / 2:
            self._servers.pop(next(iter(self._servers))).close()
        kind = proposer.kind if proposer else ""
        settings = ServerSettings(
            str(self.target),
            str(self.draft) if kind.endswith("draft") else "",
            proposer.num_speculative_tokens if proposer else 0,
            lookup=kind.startswith("lookup"),
            room=room_for(room),
            slots=slots,
            threads=self.settings.threads,
            program=self.settings.server,
        )
        self._servers[proposer] = LlamaServer(settings)
        return self._servers[proposer]

    @cached_property
    def _bytes(self) -> int:
        return self.target.stat().st_size + self.draft.stat().st_size


def _memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told by this system
        return 16e9


def _timed(
    answer: Answer, accepted: list[int] | None, max_new_tokens: int, eos_ids: Sequence[int], k: int
) -> TimedText:
    """An answer up to its end, with its rounds in our conventions."""
    text, rounds = cut_rounds(as_passes(answer.ids, accepted or []), max_new_tokens, eos_ids, k)
    return TimedText(text, answer.seconds, answer.first_token_seconds, [] if accepted is None else rounds)


def as_passes(ids: Sequence[int], accepted: Sequence[int]) -> list[list[int]]:
    """The tokens by the pass that wrote them, from how many proposals each round accepted.

    The prompt's pass writes one token, a round its accepted proposals and one more. What a text's end cuts
    off its last round stands there as -1, since the server counts it as accepted. Passes without a proposal
    come last: a draft has none elsewhere, and of those of lookup nobody tells the places.
    """
    plain = max(0, len(ids) - 1 - sum(each + 1 for each in accepted))
    passes, start = [], 0
    for size in [1, *(each + 1 for each in accepted), *[1] * plain]:
        if start < len(ids):
            passes.append([*ids[start : start + size], *[-1] * (start + size - len(ids))])
        start += size
    return passes


def measure_passes(
    target: Path, draft: Path, settings: LlamaCppSettings, widths: Sequence[int], prefix_tokens: int
) -> Latency | None:
    """Single passes behind a prefix as the server makes them, choosing of tokens included.

    Wider ones are rounds of lookup, which costs nothing beside the pass, over a text that repeats itself;
    None where the target does not repeat it. A round of a draft has one pass of K + 1 of the draft beside its
    K single ones, which is in no figure here.
    """
    prefix = max(4 * _CYCLE, prefix_tokens)
    widths = sorted({1, *widths})
    jobs = [(draft, 1), *((target, width) for width in widths)]
    found = [pass_seconds(*job, settings, prefix) for job in jobs]
    if not all(found):
        return None
    of_draft, *of_target = map(statistics.median, found)
    # A draft that does not repeat the text cannot be asked for a wider pass: nothing is added for it.
    wide = pass_seconds(draft, widths[-1], settings, prefix) or [of_draft]
    more = seconds_more(of_draft, statistics.median(wide), widths[-1])
    return Latency(of_draft, dict(zip(widths, of_target, strict=True)), prefix, "CPU", "gguf", "gguf", more)


def pass_seconds(model: Path, width: int, settings: LlamaCppSettings, prefix_tokens: int) -> list[float]:
    """What a pass over so many tokens takes, once for each of several texts; empty where a model does not go
    on with a text that repeats itself, so that lookup has not K proposals for every pass.
    """
    prompt, k = [ANY_ID + place % _CYCLE for place in range(prefix_tokens)], width - 1
    asked = 1 + PASSES * width
    room, more = room_for(prefix_tokens + asked + width + 1), (settings.threads, settings.server)
    with LlamaServer(ServerSettings(str(model), "", k, k > 0, room, 1, *more)) as server:
        question = prompt, Sampling(0.0), asked, 0
        answers = [server.complete(*question, cache_prompt=True, ignore_eos=True) for _ in range(1 + REPEATS)]
    passes = len(answers[0].ids) - 1 - answers[0].num_accepted
    if not passes or answers[0].num_drafted != passes * k:
        return []
    return [answer.writing_seconds / passes for answer in answers[1:]]
