"""Our own decoder over OpenVINO's passes under the clock: a second way to run an exported pair on a CPU.

It is lossless for sampled text too, and has lookup with the draft behind it; GenAI's pipelines
(openvino_runtime.py) answer several requests in one pass, this one answers one after another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.speculative import Round, SpeculativeDecoder
from fastdraft.errors import RecipeError
from fastdraft.functional.generation import Sampling
from fastdraft.functional.lookup import Lookups, look_up
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.runtimes.openvino import answer_seed
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.runtimes.openvino_runtime import OpenVINORuntime
from fastdraft.runtimes.openvino_speculative import TieJudge
from fastdraft.runtimes.runtime import Proposer, TimedText, TimeSpent
from fastdraft.target import Target


@dataclass(frozen=True)
class OpenVINODecoderRuntime(OpenVINORuntime):
    """The `Runtime` with these settings."""

    name: ClassVar[str] = "fastdraft"
    proposers: ClassVar[tuple[ProposerKind, ...]] = ("draft", "lookup", "lookup_draft")
    lossless_sampling: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        if {self.device, self.draft_device or self.device} != {"CPU"}:
            found = f"benchmark.device: {self.device}; the runtime fastdraft runs on CPU alone"
            raise RecipeError(found, "use CPU, or leave it out of benchmark.runtimes")
        return super().describe()

    def look_up(self, prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int) -> Lookups:
        return look_up(prompt, response, num_speculative_tokens)

    def open(self, target: Path, draft: Path) -> DecoderPair:
        return DecoderPair((target, draft), self)

    def launch_line(self, target: str, draft: str, proposer: Proposer) -> str:
        kind, k = proposer.kind, proposer.num_speculative_tokens
        words = ["fastdraft generate RUN --runtime openvino --proposer", kind.replace("lookup_draft", "both")]
        n = proposer.lookup_tokens
        words += [f"-k {k}"] * ("draft" in kind) + [f"--num-lookup-tokens {n}"] * ("lookup" in kind)
        return " ".join(words)


@dataclass
class DecoderPair:
    """Exports of a target and a draft as `SpeculativeDecoder` reads them; each is loaded when first asked."""

    folders: tuple[Path, Path]
    settings: OpenVINODecoderRuntime = OpenVINODecoderRuntime()

    @cached_property
    def target(self) -> OpenVINOModel:
        return OpenVINOModel(self.folders[0], self.settings.precision, self.settings.threads)

    @cached_property
    def draft(self) -> OpenVINOModel:
        return OpenVINOModel(self.folders[1], self.settings.precision, self.settings.threads, narrow=True)

    @cached_property
    def judge(self) -> TieJudge:
        return TieJudge(self.folders[0])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return replace(Target.at(self.folders[0]).vocabulary, eos_token_ids=self.settings.eos_ids)

    def gap(self, prefix_ids: Sequence[int], first: int, second: int) -> float:
        """Distance of the log-probs of two next tokens, by the target in float32."""
        return self.judge.gap(prefix_ids, first, second)

    def decoder(self, proposer: Proposer | None) -> SpeculativeDecoder:
        if proposer is None:
            return SpeculativeDecoder(self.target, None, self.vocabulary, 0, proposer=None)
        draft = None if proposer.kind == "lookup" else self.draft
        kind, k, n = proposer.kind, proposer.num_speculative_tokens, proposer.num_lookup_tokens
        pair = self.target, draft, self.vocabulary
        return SpeculativeDecoder(*pair, k, proposer=kind, num_lookup_tokens=n)

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
        """One after another: a text waits for those before it, and its moments say so."""
        decoder, alone, start = self.decoder(proposer), self.decoder(None), time.perf_counter()
        found = []
        for index, prompt in enumerate(prompts):
            own_seed, begun = answer_seed(seed, index), list[int]()
            if proposer and exact_counts:
                # A runtime's counts begin behind the first token, which the prompt's own pass writes.
                begun = alone.generate([*prompt], sampling, 1, own_seed).generation.response_ids
            ended = begun and (begun[0] in self.settings.eos_ids or max_new_tokens == 1)
            rounds, moments = list[Round](), list[float]()
            if not ended:
                asked = ([*prompt, *begun], sampling, max_new_tokens - len(begun), own_seed)
                for each in decoder.rounds(*asked):
                    rounds.append(each)
                    moments.append(time.perf_counter() - start)
            text = begun + [token for each in rounds for token in each.tokens]
            moments = moments or [time.perf_counter() - start]
            found.append(TimedText(text, moments[-1], moments[0], rounds if proposer else []))
        return found

    def time_spent(
        self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int
    ) -> TimeSpent:
        """Where the time of one greedy answer goes, by our own clocks; it is written once before."""
        asked = ([prompt], Sampling(0.0), max_new_tokens, 0, Proposer("draft", num_speculative_tokens))
        self.write(*asked)
        models = (self.target, self.draft)
        before = [model.seconds for model in models]
        [text] = self.write(*asked)
        target, draft = (model.seconds - earlier for model, earlier in zip(models, before, strict=True))
        return TimeSpent(target, draft, text.seconds)
