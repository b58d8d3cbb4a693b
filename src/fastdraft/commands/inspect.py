"""`fastdraft inspect TARGET`: what a target is, what its vocabulary hides, which drafts would suit it and
could gain.

Reads config and tokenizer only, no weights; results go to stdout, in 80 columns. With `--measure`, costs are
measured too (measure.py).
"""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from fastdraft.commands.measure import MeasureSettings, measure
from fastdraft.console import Console, format_count, format_table
from fastdraft.errors import TargetError
from fastdraft.forecast import PAPER_K, RATES, mbsu_at
from fastdraft.modeling.architecture import Architecture, has_rotary_factors
from fastdraft.modeling.families import draft_family, text_config, why_draft_family
from fastdraft.modeling.gguf_fields import tokenizer_fields
from fastdraft.modeling.shapes import PRESETS, natural, preset
from fastdraft.modeling.traps import find_traps
from fastdraft.target import Target

KS = tuple(range(1, 9))
_WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_SHOWN, _WISHED_RATIO, _LARGEST_RATIO = 6, 0.02, 0.5


@dataclass(frozen=True)
class Candidate:
    """A draft that could be designed for the target."""

    name: str  # of a preset; else empty
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
        """Bytes read per token, both in one precision; twice that for an int8 draft of an int4 target."""
        return self.draft.read_parameters / self.target.read_parameters

    def mbsu(self, rate: float) -> list[float]:
        """Memory-bound speed-up by bytes for every K, the acceptance rate being known at K = 3."""
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
            "cost_ratio_bytes_int8_draft_int4_target": 2 * self.by_bytes,
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
    """Prints anatomy, traps and candidate drafts of a target, and when asked for what they cost here."""
    target = Target.at(location, revision)
    traps, candidates = [*find_traps(target), *_of_gguf(target)], find_candidates(target)
    if not candidates:
        console.warn("no draft would cost less than half of this target: a draft cannot pay here")
    if not as_json:
        print(_text(target, traps, candidates), flush=True)
    measured = measure(target, [c.draft for c in candidates], measuring, console) if measuring else None
    if as_json:
        found = _as_dict(target, traps, candidates) | ({"measured": measured.as_dict()} if measured else {})
        print(json.dumps(found, indent=1))
    elif measured:
        print("\n" + measured.text())


def _of_gguf(target: Target) -> list[str]:
    """Whether llama.cpp could read a draft's tokenizer."""
    try:
        tokenizer_fields(target)
    except TargetError as error:
        found = error.message.partition(": ")[2].removeprefix("its ")
        return [f"No draft for llama.cpp: the {found}. Leave gguf out of export.formats."]
    return []


def find_candidates(target: Target) -> list[Candidate]:
    """Natural shapes that cost nearest to a fiftieth of the target, and its family's presets, by size."""
    shape, keep_heads = target.architecture, has_rotary_factors(target.config)
    found = [Candidate("", natural(shape, width, keep_heads), shape) for width in _WIDTHS]
    affordable = [c for c in found if max(c.by_bytes, c.by_parameters) <= _LARGEST_RATIO]
    chosen = sorted(affordable, key=lambda c: abs(math.log(c.by_bytes / _WISHED_RATIO)))[:_SHOWN]
    for name, (family, *_) in PRESETS.items():
        if family == shape.family:
            chosen.append(Candidate(name, preset(name, shape), shape))
    return sorted((c for c in chosen if c.by_bytes <= _LARGEST_RATIO), key=lambda c: c.draft.parameters)


def _as_dict(target: Target, traps: list[str], candidates: list[Candidate]) -> dict[str, Any]:
    shape = target.architecture
    return {
        "target": target.name,
        "parameters": shape.parameters,
        "architecture": shape.as_dict(),
        "draft_family": {"family": draft_family(shape.family), "reason": why_draft_family(shape.family)},
        "bytes_per_token_int4": shape.bytes_per_token(4),
        "flops_per_token": shape.flops_per_token,
        "vocabulary": target.vocabulary.as_dict(),
        "traps": traps,
        "acceptance_rates_at_k": PAPER_K,
        "candidates": [candidate.as_dict() for candidate in candidates],
    }


def _text(target: Target, traps: list[str], candidates: list[Candidate]) -> str:
    """Everything in 80 columns."""
    family, parts = target.architecture.family, [_anatomy(target)]
    if reason := why_draft_family(family):
        parts.append(textwrap.fill(f"Drafts are of the family {draft_family(family)}: {reason}.", 78))
    wrapped = [textwrap.fill(t, 78, initial_indent="- ", subsequent_indent="  ") for t in traps]
    parts.append("\n".join(["Traps", *(wrapped or ["- none found"])]))
    if candidates:
        parts += [_costs(candidates), _gains(candidates)]
    return "\n\n".join(parts)


def _anatomy(target: Target) -> str:
    a, v = target.architecture, target.vocabulary
    few = a.read and a.read < 0.9 * (a.parameters - a.embedding_parameters)
    active = f", {format_count(a.read)} read per token" if few else ""
    rope: dict[str, Any] = getattr(text_config(target.config), "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope  # of several, that of the layers which see everything
    turned = (
        f"rope {rope.get('rope_type', 'default')}, theta {rope.get('rope_theta', 0):g}" if rope else "no rope"
    )
    reads = [
        f"{_bytes(a.bytes_per_token(bits))} {name}" for bits, name in ((4, "int4"), (8, "int8"), (16, "bf16"))
    ]
    share = (2 - a.tied) * a.embedding_parameters / a.parameters
    tied, eos = "tied" if a.tied else "untied", ", ".join(map(str, v.eos_token_ids))
    cache = 1024 * 2 * 2 * a.num_layers * a.num_kv_heads * a.head_dim  # keys and values, two bytes each
    rows = {
        "family": a.family,
        "parameters": f"{format_count(a.parameters)} ({a.parameters:,}), {tied}{active}",
        "layers": f"{a.num_layers}, hidden {a.hidden_size}, feed-forward {a.intermediate_size}",
        "attention": f"{a.num_heads} heads of {a.head_dim}, {a.num_kv_heads} key-value heads",
        "context": f"{a.context_length}, {turned}",
        "vocabulary": f"{v.size} rows, {v.num_tokens} tokens, {share:.1%} of the parameters",
        "special ids": f"BOS {v.bos_token_id}, EOS {eos}, padding {v.pad_token_id}",
        "read per token": ", ".join(reads),
        "compute per token": f"{format_count(a.flops_per_token)} FLOPs",
        "cache": f"{_bytes(cache)} for 1024 tokens in bf16",
    }
    return "\n".join([target.name, *(f"  {name:<18} {text}" for name, text in rows.items())])


def _costs(candidates: list[Candidate]) -> str:
    columns = ["draft", "hidden", "layers", "FFN", "int8/token", "FLOPs", "c param", "c bytes", "c 8on4"]
    rows = []
    for c in candidates:
        d, ratios = c.draft, (c.by_parameters, c.by_bytes, 2 * c.by_bytes)
        costs = [_bytes(d.bytes_per_token(8)), format_count(d.flops_per_token), *(f"{r:.4f}" for r in ratios)]
        rows.append([c.label, d.hidden_size, d.num_layers, d.intermediate_size, *costs])
    note = (
        "c: cost of a draft token over a target token by parameters; by bytes read; int8 draft on int4. "
        "Widths and FFNs that are no multiples of 256 cannot have K-quants in llama.cpp."
    )
    named = [f"* preset {c.name}, {c.draft.parameters:,} parameters." for c in candidates if c.name]
    return "\n".join([format_table("Candidate drafts", columns, rows), textwrap.fill(note, 79), *named])


def _gains(candidates: list[Candidate]) -> str:
    rows = []
    for c, rate in ((c, rate) for c in candidates for rate in RATES):
        gains = c.mbsu(rate)
        rows.append([c.label, f"{rate:g}", *(f"{gain:.2f}" for gain in gains), KS[gains.index(max(gains))]])
    note = (
        f"The acceptance rate (accepted / proposed) is the one at K = {PAPER_K}, as the paper prints it: "
        "there text reaches about 0.3, instructions 0.35 and code 0.6. Other K follow from a constant "
        "chance for each further token. Below 1.00 a draft does harm."
    )
    columns = ["draft", "rate", *(f"K={k}" for k in KS), "best K"]
    table = format_table("Memory-bound speed-up by bytes at equal precision", columns, rows)
    return table + "\n" + textwrap.fill(note, 79)


def _bytes(count: float) -> str:
    return f"{format_count(count)}B".replace("BB", "GB")
