"""`fastdraft inspect TARGET`: what a target is, what its vocabulary hides, which drafts would suit it and what they could gain.

Reads config and tokenizer only, no weights; results go to stdout, in 80 columns. With `--measure`, costs are measured
too (measure.py).
"""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from fastdraft.commands.measure import MeasureSettings, measure
from fastdraft.console import Console, format_count, format_table
from fastdraft.errors import RecipeError
from fastdraft.forecast import PAPER_K, RATES, mbsu_at
from fastdraft.modeling.architecture import Architecture, has_rotary_factors
from fastdraft.modeling.counting import count
from fastdraft.modeling.families import draft_family, text_config, why_draft_family
from fastdraft.modeling.shapes import PRESETS, natural, preset
from fastdraft.modeling.traps import find_traps
from fastdraft.target import Target

KS = tuple(range(1, 9))
_WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_SHOWN, _WISHED_RATIO, _LARGEST_RATIO = 6, 0.02, 0.5


@dataclass(frozen=True)
class Candidate:
    """A draft that could be designed for the target."""

    name: str
    """Of a preset; else empty."""
    draft: Architecture
    target: Architecture

    @property
    def label(self) -> str:
        return format_count(self.draft.parameters) + ("*" if self.name else "")

    @property
    def by_parameters(self) -> float:
        return self.draft.parameters / self.target.parameters

    @property
    def by_bytes(self) -> float:
        """Bytes read per token, both in the same precision."""
        return self.draft.read_parameters / self.target.read_parameters

    @property
    def int8_on_int4(self) -> float:
        """Bytes read per token, the draft in int8 and the target in int4, as the paper serves them."""
        return self.draft.bytes_per_token(8) / self.target.bytes_per_token(4)

    def mbsu(self, rate: float) -> list[float]:
        """Memory-bound speed-up by bytes at equal precision for every K, the acceptance rate being known at K = 3."""
        return [mbsu_at(rate, k, self.by_bytes) for k in KS]

    def as_dict(self) -> dict[str, Any]:
        """All figures, for `--json`."""
        return {
            "name": self.name,
            "architecture": self.draft.as_dict(),
            "parameters": self.draft.parameters,
            "bytes_per_token_int8": self.draft.bytes_per_token(8),
            "flops_per_token": self.draft.flops_per_token,
            "cost_ratio_parameters": self.by_parameters,
            "cost_ratio_bytes": self.by_bytes,
            "cost_ratio_bytes_int8_draft_int4_target": self.int8_on_int4,
            "mbsu_bytes": {str(r): dict(zip(map(str, KS), self.mbsu(r), strict=True)) for r in RATES},
        }


def run(
    location: str,
    *,
    revision: str | None = None,
    console: Console,
    as_json: bool = False,
    measuring: MeasureSettings | None = None,
) -> None:
    """Prints anatomy, traps and candidate drafts of a target; then, when asked for, what they cost on this device.

    Args:
        location: A directory, a hub id, or `shipped:targets/starter`.
        revision: Branch, tag or commit on the hub.
        console: For notes and progress; results go to stdout.
        as_json: JSON instead of text.
        measuring: How passes are to be measured; None measures nothing.
    """
    inspection = Inspection(Target.at(location, revision))
    if not inspection.candidates:
        console.warn("no draft would cost less than half of this target: a draft cannot pay here")
    found = inspection.as_dict() if as_json else {}
    if not as_json:
        print(inspection.text(), flush=True)
    if measuring is not None:
        shapes = [candidate.draft for candidate in inspection.candidates]
        measured = measure(inspection.target, shapes, measuring, console)
        found["measured"] = measured.as_dict()
        if not as_json:
            print("\n" + measured.text())
    if as_json:
        print(json.dumps(found, indent=1))


def find_candidates(target: Target) -> list[Candidate]:
    """Natural shapes whose cost lies nearest to a fiftieth of the target's, and the presets of its family, by size."""
    shape, keep_heads = target.architecture, has_rotary_factors(target.config)
    found = [Candidate("", natural(shape, width, keep_heads), shape) for width in _WIDTHS]
    affordable = [c for c in found if max(c.by_bytes, c.by_parameters) <= _LARGEST_RATIO]
    chosen = sorted(affordable, key=lambda c: abs(math.log(c.by_bytes / _WISHED_RATIO)))[:_SHOWN]
    for name in PRESETS:
        try:
            named = Candidate(name, preset(name, shape), shape)
        except RecipeError:  # of another family
            continue
        if named.by_bytes <= _LARGEST_RATIO:
            chosen.append(named)
    return sorted(chosen, key=lambda c: c.draft.parameters)


class Inspection:
    """All that is told of a target without measuring."""

    def __init__(self, target: Target) -> None:
        self.target, self.shape, self.vocabulary = target, target.architecture, target.vocabulary
        self.traps, self.parameters = find_traps(target), count(target.config).stored
        self.candidates = find_candidates(target)

    def as_dict(self) -> dict[str, Any]:
        family = self.shape.family
        return {
            "target": self.target.name,
            "parameters": self.parameters,
            "architecture": self.shape.as_dict(),
            "draft_family": {"family": draft_family(family), "reason": why_draft_family(family)},
            "bytes_per_token_int4": self.shape.bytes_per_token(4),
            "flops_per_token": self.shape.flops_per_token,
            "vocabulary": self.vocabulary.as_dict(),
            "traps": self.traps,
            "acceptance_rates_at_k": PAPER_K,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
        }

    def text(self) -> str:
        """Everything in 80 columns."""
        parts = [self._anatomy()]
        if reason := why_draft_family(self.shape.family):
            line = f"Drafts are of the family {draft_family(self.shape.family)}: {reason}."
            parts.append(textwrap.fill(line, 78))
        traps = [textwrap.fill(t, 78, initial_indent="- ", subsequent_indent="  ") for t in self.traps]
        parts.append("\n".join(["Traps", *(traps or ["- none found"])]))
        if self.candidates:
            parts += [_costs(self.candidates), _gains(self.candidates)]
        return "\n\n".join(parts)

    def _anatomy(self) -> str:
        a, v, config = self.shape, self.vocabulary, self.target.config
        few = a.read and a.read < 0.9 * (a.parameters - a.embedding_parameters)
        active = f", {format_count(a.read)} read per token" if few else ""
        rope: dict[str, Any] = getattr(text_config(config), "rope_parameters", None) or {}
        rope = rope.get("full_attention") or rope  # of several, that of the layers which see everything
        kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 0)
        turned = f"rope {kind}, theta {theta:g}" if rope else "no rope"
        precisions = {4: "int4", 8: "int8", 16: "bf16"}
        reads = [f"{_bytes(a.bytes_per_token(bits))} {name}" for bits, name in precisions.items()]
        share = (2 - a.tied) * a.embedding_parameters / a.parameters
        tied = "tied" if a.tied else "untied"
        rows = {
            "family": a.family,
            "parameters": f"{format_count(self.parameters)} ({self.parameters:,}), {tied}{active}",
            "layers": f"{a.num_layers}, hidden {a.hidden_size}, feed-forward {a.intermediate_size}",
            "attention": f"{a.num_heads} heads of {a.head_dim}, {a.num_kv_heads} key-value heads",
            "context": f"{a.context_length}, {turned}",
            "vocabulary": f"{v.size} rows, {v.num_tokens} tokens, {share:.1%} of the parameters",
            "special ids": f"BOS {v.bos_token_id}, EOS {', '.join(map(str, v.eos_token_ids))}, padding {v.pad_token_id}",
            "read per token": ", ".join(reads),
            "compute per token": f"{format_count(a.flops_per_token)} FLOPs",
            "cache": f"{_bytes(1024 * a.cache_bytes_per_position())} for 1024 tokens in bf16",
        }
        return "\n".join([self.target.name, *(f"  {name:<18} {text}" for name, text in rows.items())])


def _costs(candidates: list[Candidate]) -> str:
    columns = ["draft", "hidden", "layers", "FFN", "int8/token", "FLOPs", "c param", "c bytes", "c 8on4"]
    rows = []
    for c in candidates:
        d = c.draft
        shape = [d.hidden_size, d.num_layers, d.intermediate_size]
        ratios = [f"{c.by_parameters:.4f}", f"{c.by_bytes:.4f}", f"{c.int8_on_int4:.4f}"]
        rows.append([c.label, *shape, _bytes(d.bytes_per_token(8)), format_count(d.flops_per_token), *ratios])
    note = (
        "c: cost of a draft token over a target token by parameters; by bytes read, equal precision; int8 draft on int4 "
        "target."
    )
    uneven = [c.label for c in candidates if c.draft.hidden_size % 256 or c.draft.intermediate_size % 256]
    if uneven:
        note += f" Rows not all multiples of 256, so no K-quants in llama.cpp: {', '.join(uneven)}."
    named = [f"* preset {c.name}, {c.draft.parameters:,} parameters." for c in candidates if c.name]
    return "\n".join([format_table("Candidate drafts", columns, rows), textwrap.fill(note, 79), *named])


def _gains(candidates: list[Candidate]) -> str:
    rows = []
    for c in candidates:
        for rate in RATES:
            gains = c.mbsu(rate)
            best = KS[gains.index(max(gains))]
            rows.append([c.label, f"{rate:g}", *(f"{gain:.2f}" for gain in gains), best])
    note = (
        f"The acceptance rate (accepted / proposed) is the one at K = {PAPER_K}, as the paper prints it: there text "
        "reaches about 0.3, instructions 0.35 and code 0.6. Other K follow from a constant chance for each further token. "
        "Below 1.00 a draft does harm."
    )
    columns = ["draft", "rate", *(f"K={k}" for k in KS), "best K"]
    title = "Memory-bound speed-up by bytes at equal precision"
    return format_table(title, columns, rows) + "\n" + textwrap.fill(note, 79)


def _bytes(count: float) -> str:
    return f"{format_count(count)}B".replace("BB", "GB")
