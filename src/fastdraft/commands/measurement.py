"""What measured passes promise: speed-up of each draft for three acceptance rates and every K, as tables and
JSON.

The forecast is `block_efficiency * t_target(1) / (K * t_draft + t_target(K + 1))`, with one constant chance
of acceptance for each further token.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from fastdraft.console import format_count, format_table
from fastdraft.forecast import (
    PAPER_K,
    RATES,
    block_efficiency,
    conditional_acceptance_rate,
    predicted_speedup,
)
from fastdraft.modeling.architecture import Architecture
from fastdraft.reporting.verdict import RUNTIMES

_AROUND = {
    "openvino": "OpenVINO GenAI does around the passes",
    "llamacpp": "llama.cpp does around the passes, and its further pass of the draft in every round,",
    "vllm": "vLLM does around the passes",
}


@dataclass(frozen=True)
class MeasuredModel:
    """A model that is timed: an export, or its shape with random weights."""

    name: str  # HIDDENxLAYERS, or the folder's
    architecture: Architecture
    weights: str
    config: PreTrainedConfig
    export: Path | None = None
    seconds: float = 0.0  # of one token
    file_bytes: float = 0.0  # read of a GGUF file for one token

    @property
    def read_bytes(self) -> float:
        """For one token, at the weights measured."""
        return self.file_bytes or self.architecture.exported_bytes_per_token(self.weights)


@dataclass(frozen=True)
class SyntheticPair:
    """A draft's shape beside the target in a server that accepts proposals by chance."""

    draft: str
    num_speculative_tokens: int
    acceptance_rate: float  # accepted / proposed at K = 3
    predicted_speedup: float
    speedup: float


@dataclass(frozen=True)
class MeasuredShapes:
    """All that was measured, and what follows from it."""

    runtime: dict[str, Any]  # name, version, device, device_name, threads
    prefix_tokens: int
    repeats: int
    target: MeasuredModel
    target_seconds: dict[int, float]  # by the number of tokens read at once: 1, and K + 1 for every K
    drafts: list[MeasuredModel]
    num_speculative_tokens: tuple[int, ...]  # rising
    synthetic: SyntheticPair | None = None

    def speedup(self, draft: MeasuredModel, rate: float, k: int) -> float:
        """Forecast at one K for an acceptance rate (accepted / proposed) known at K = 3."""
        efficiency, seconds = block_efficiency(conditional_acceptance_rate(rate), k), self.target_seconds
        return predicted_speedup(efficiency, k, draft.seconds, seconds[1], seconds[k + 1])

    def ceiling(self, k: int) -> float:
        """The speed-up of a draft that costs nothing and is always right: what verifying leaves of K + 1."""
        return (k + 1) * self.target_seconds[1] / self.target_seconds[k + 1]

    def best_k(self, draft: MeasuredModel, rate: float) -> int:
        return max(self.num_speculative_tokens, key=lambda k: self.speedup(draft, rate, k))

    def best(self, rate: float) -> tuple[MeasuredModel, int, float]:
        """The draft with the highest forecast, its K and the forecast."""
        found = [(draft, self.best_k(draft, rate)) for draft in self.drafts]
        return max(((draft, k, self.speedup(draft, rate, k)) for draft, k in found), key=lambda item: item[2])

    def break_even(self, draft: MeasuredModel) -> float | None:
        """The acceptance rate (at K = 3) above which the draft gains at its best K; None when none does."""
        low, high = 0.0, 1.0
        if self.speedup(draft, high, self.best_k(draft, high)) <= 1:
            return None
        for _ in range(30):
            middle = (low + high) / 2
            gains = self.speedup(draft, middle, self.best_k(draft, middle)) > 1
            low, high = (low, middle) if gains else (middle, high)
        return high

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; seconds, and rates as keys."""
        seconds, ks = self.target_seconds, self.num_speculative_tokens
        drafts = [
            {
                "name": draft.name,
                "architecture": draft.architecture.as_dict(),
                "parameters": draft.architecture.parameters,
                "weights": draft.weights,
                "random": draft.export is None,
                "seconds": draft.seconds,
                "cost_ratio_latency": draft.seconds / seconds[1],
                "cost_ratio_bytes": draft.read_bytes / self.target.read_bytes,
                "break_even_acceptance_rate": self.break_even(draft),
                "predicted_speedup": {str(r): {str(k): self.speedup(draft, r, k) for k in ks} for r in RATES},
            }
            for draft in self.drafts
        ]
        best = {}
        for rate in RATES:
            draft, k, speedup = self.best(rate)
            figures = {"predicted_speedup": speedup, "use_a_draft": speedup > 1}
            best[str(rate)] = {"draft": draft.name, "num_speculative_tokens": k, **figures}
        target = {"weights": self.target.weights, "random": self.target.export is None}
        target["ceiling"] = {str(k): self.ceiling(k) for k in ks}
        return {
            "runtime": self.runtime,
            "prefix_tokens": self.prefix_tokens,
            "repeats": self.repeats,
            "target": {**target, "seconds": {str(width): value for width, value in seconds.items()}},
            "drafts": drafts,
            "best": best,
            "sentence": self.sentence(),
            **({"synthetic": asdict(self.synthetic)} if self.synthetic else {}),
        }

    def sentence(self) -> str:
        """Which draft for which acceptance rate, or none."""
        parts = []
        for rate in RATES:
            draft, k, speedup = self.best(rate)
            advice = "" if speedup > 1 else "do not use a draft: "
            forecast = f"{draft.name} at K = {k} is forecast to be {speedup:.2f} times as fast."
            parts.append(f"At an acceptance rate of {rate:g}, {advice}{forecast}")
        k = max(self.num_speculative_tokens, key=self.ceiling)
        if one := self.synthetic:
            parts.append(
                f"Served with {one.draft} and an acceptance of {one.acceptance_rate:g} by chance, "
                f"K = {one.num_speculative_tokens}: measured {one.speedup:.2f} times as fast."
            )
        parts.append(f"A free draft that is always right would reach {self.ceiling(k):.2f} at K = {k}.")
        return " ".join(parts)

    def text(self) -> str:
        """Tables in 80 columns and the closing sentences."""
        return "\n\n".join([self._passes(), self._costs(), self._gains(), textwrap.fill(self.sentence(), 79)])

    def _passes(self) -> str:
        r, seconds = self.runtime, self.target_seconds
        kind = "the exported model" if self.target.export else "random weights of this shape"
        note = (
            f"{RUNTIMES[r['name']]} {r['version']} on {r['device']} ({r['device_name']}), "
            f"{r['threads'] or 'auto'} threads; target in {self.target.weights}, {kind}; "
            f"behind {self.prefix_tokens} tokens, batch 1, medians of {self.repeats} turns. "
            "Ceiling: the speed-up of a draft that costs nothing and is "
            "always right; what is missing to the number of tokens is the price of verifying."
        )
        times = ["milliseconds", *(f"{1e3 * value:.3g}" for value in seconds.values())]
        shares = ["over one token", *(f"{value / seconds[1]:.2f}" for value in seconds.values())]
        ceilings = ["ceiling", *(f"{width * seconds[1] / value:.2f}" for width, value in seconds.items())]
        title = "Measured: one target pass over several tokens"
        return _table(title, ["tokens", *map(str, seconds)], [times, shares, ceilings], note)

    def _costs(self) -> str:
        columns = ["draft", "parameters", "FFN", "weights", "ms/token", "c latency", "c bytes", "pays above"]
        rows = []
        for draft in self.drafts:
            a, rate = draft.architecture, self.break_even(draft)
            ratios = (draft.seconds / self.target_seconds[1], draft.read_bytes / self.target.read_bytes)
            row = [_label(draft), format_count(a.parameters), a.intermediate_size, draft.weights]
            row += [f"{1e3 * draft.seconds:.3g}", *(f"{ratio:.4f}" for ratio in ratios)]
            rows.append([*row, "-" if rate is None else f"{rate:.2f}"])
        note = (
            "draft: hidden x layers. c: cost of a draft token over a target token, by the clock and by bytes "
            "read. pays above: the acceptance rate from which it gains at its best K; -: it never does."
        )
        return _table("Measured: one draft token", columns, rows, note)

    def _gains(self) -> str:
        rows = []
        for draft, rate in ((draft, rate) for draft in self.drafts for rate in (*RATES, 1.0)):
            gains = [f"{self.speedup(draft, rate, k):.2f}" for k in self.num_speculative_tokens]
            rows.append([_label(draft), f"{rate:g}", *gains, self.best_k(draft, rate)])
        note = (
            f"The acceptance rate (accepted / proposed) is the one at K = {PAPER_K}; other K follow from a "
            "constant chance for each further token. At one rate the cheapest draft wins, but a larger is "
            "accepted more often. At 1 every proposal is accepted: more "
            f"is not to be had. What {_AROUND[self.runtime['name']]} comes on top: a real pair gains "
            "less, most of all where a pass takes few milliseconds; `fastdraft benchmark` measures it."
        )
        columns = ["draft", "rate", *(f"K={k}" for k in self.num_speculative_tokens), "best K"]
        return _table("Forecast: speed-up by measured passes", columns, rows, note)


def _label(draft: MeasuredModel) -> str:
    return draft.name if len(draft.name) <= 14 else f"...{draft.name[-11:]}"


def _table(title: str, columns: list[str], rows: list[list[Any]], note: str) -> str:
    return f"{format_table(title, columns, rows)}\n{textwrap.fill(note, 79)}"
