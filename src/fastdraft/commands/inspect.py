"""`fastdraft inspect TARGET`: what a target is, what its vocabulary hides, which drafts would suit it and what they could gain.

Decides which candidates are shown (the natural shape at six widths, the presets that fit) and how costs are counted: by
parameters, and by bytes read per token at equal precision and for an int8 draft beside an int4 target. Reads config and
tokenizer only; no weights. Results go to stdout, in 80 columns. With `--measure`, costs are measured too: inspect_measure.py.
"""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft.commands.inspect_measure import MeasureSettings, measure
from fastdraft.console import Console, format_table
from fastdraft.errors import RecipeError
from fastdraft.forecast import PAPER_K, RATES, mbsu_at
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.base import format_count
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastdraft.modeling.architecture import Architecture

KS = tuple(range(1, 9))
_WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_SHOWN, _WISHED_RATIO, _LARGEST_RATIO = 6, 0.02, 0.5


@dataclass(frozen=True)
class Candidate:
    """A draft that could be designed for the target."""

    name: str
    draft: Architecture
    target: Architecture

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
            "mbsu_bytes": {
                str(rate): dict(zip(map(str, KS), self.mbsu(rate), strict=True)) for rate in RATES
            },
        }


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` tells."""

    name: str
    config: PreTrainedConfig
    architecture: Architecture
    parameters: int
    vocabulary: Vocabulary
    traps: list[str]
    candidates: list[Candidate]


def run(
    location: str,
    *,
    revision: str | None = None,
    console: Console,
    as_json: bool = False,
    measuring: MeasureSettings | None = None,
) -> None:
    """Prints anatomy, vocabulary traps and candidate drafts of a target; then, when asked for, what they cost on this device.

    Args:
        location: A directory, a hub id, or `shipped:targets/starter`.
        revision: Branch, tag or commit on the hub.
        console: For notes and progress; results go to stdout.
        as_json: JSON instead of text.
        measuring: How passes are to be measured; None measures nothing.

    Raises:
        TargetError: when the target cannot be read or is not supported.
        TargetError: when its tokenizer and config contradict each other.
        FastDraftError: when measuring fails; see `inspect_measure.measure`.
    """
    target = Target.at(location, revision)
    inspection = inspect(target)
    if not inspection.candidates:
        console.warn("no draft would cost less than half of this target: a draft cannot pay here")
    if not as_json:
        print(_text(inspection), flush=True)
    measured = None
    if measuring is not None:
        shapes = [candidate.draft for candidate in inspection.candidates]
        measured = measure(target.location, inspection.config, shapes, measuring, console, revision=revision)
    if as_json:
        print(
            json.dumps(
                {**_as_dict(inspection), **({"measured": measured.as_dict()} if measured else {})}, indent=1
            )
        )
    elif measured:
        print("\n" + measured.text())


def inspect(target: Target) -> Inspection:
    """Reads config and tokenizer and works out the rest.

    Raises:
        TargetError, TargetError: as `run`.
    """
    from fastdraft.modeling.counting import count
    from fastdraft.modeling.traps import find_traps

    config = target.config
    vocabulary = target.vocabulary
    architecture = target.architecture
    traps = find_traps(target)
    return Inspection(
        target.name, config, architecture, count(config).stored, vocabulary, traps, find_candidates(config)
    )


def find_candidates(config: PreTrainedConfig) -> list[Candidate]:
    """Natural shapes whose cost lies nearest to a fiftieth of the target's, and the presets of its family, by size."""
    from fastdraft.modeling.architecture import has_rotary_factors, read_architecture
    from fastdraft.modeling.shapes import PRESETS, natural, preset

    target = read_architecture(config)
    found = [Candidate("", natural(target, width, has_rotary_factors(config)), target) for width in _WIDTHS]
    affordable = [c for c in found if max(c.by_bytes, c.by_parameters) <= _LARGEST_RATIO]
    chosen = sorted(affordable, key=lambda c: abs(math.log(c.by_bytes / _WISHED_RATIO)))[:_SHOWN]
    for name in PRESETS:
        try:
            named = Candidate(name, preset(name, target), target)
        except RecipeError:
            continue
        if named.by_bytes <= _LARGEST_RATIO:
            chosen.append(named)
    return sorted(chosen, key=lambda c: c.draft.parameters)


def _as_dict(inspection: Inspection) -> dict[str, Any]:
    from fastdraft.modeling.families import draft_family, why_draft_family

    family = inspection.architecture.family
    return {
        "target": inspection.name,
        "parameters": inspection.parameters,
        "architecture": inspection.architecture.as_dict(),
        "draft_family": {"family": draft_family(family), "reason": why_draft_family(family)},
        "bytes_per_token_int4": inspection.architecture.bytes_per_token(4),
        "flops_per_token": inspection.architecture.flops_per_token,
        "vocabulary": inspection.vocabulary.as_dict(),
        "traps": inspection.traps,
        "acceptance_rates_at_k": PAPER_K,
        "candidates": [candidate.as_dict() for candidate in inspection.candidates],
    }


def _text(inspection: Inspection) -> str:
    traps = [
        textwrap.fill(trap, 78, initial_indent="- ", subsequent_indent="  ") for trap in inspection.traps
    ] or ["- none found"]
    parts = [_anatomy(inspection), _family(inspection), "\n".join(["Traps", *traps])]
    if inspection.candidates:
        parts += [_costs(inspection), _gains(inspection)]
    return "\n\n".join(part for part in parts if part)


def _family(inspection: Inspection) -> str:
    """Which family a draft has, where it is not the target's own."""
    from fastdraft.modeling.families import draft_family, why_draft_family

    reason = why_draft_family(inspection.architecture.family)
    line = f"Drafts are of the family {draft_family(inspection.architecture.family)}: {reason}."
    return textwrap.fill(line, 78) if reason else ""


def _anatomy(inspection: Inspection) -> str:
    a, v = inspection.architecture, inspection.vocabulary
    rope = _rope(inspection)
    active = (
        f", {format_count(a.read)} read per token"
        if a.read and a.read < 0.9 * (a.parameters - a.embedding_parameters)
        else ""
    )
    reads = ", ".join(
        f"{_bytes(a.bytes_per_token(bits))} {name}" for bits, name in ((4, "int4"), (8, "int8"), (16, "bf16"))
    )
    rows = [
        ("family", a.family),
        (
            "parameters",
            f"{format_count(inspection.parameters)} ({inspection.parameters:,}), {'tied' if a.tied else 'untied'}{active}",
        ),
        ("layers", f"{a.num_layers}, hidden {a.hidden_size}, feed-forward {a.intermediate_size}"),
        ("attention", f"{a.num_heads} heads of {a.head_dim}, {a.num_kv_heads} key-value heads"),
        ("context", f"{a.context_length}, {rope}"),
        (
            "vocabulary",
            f"{v.size} rows, {v.num_tokens} tokens, {(2 - a.tied) * a.embedding_parameters / a.parameters:.1%} of the parameters",
        ),
        (
            "special ids",
            f"BOS {v.bos_token_id}, EOS {', '.join(map(str, v.eos_token_ids))}, padding {v.pad_token_id}",
        ),
        ("read per token", reads),
        ("compute per token", f"{format_count(a.flops_per_token)} FLOPs"),
        ("cache", f"{_bytes(1024 * a.cache_bytes_per_position())} for 1024 tokens in bf16"),
    ]
    return "\n".join([inspection.name, *(f"  {name:<18} {text}" for name, text in rows)])


def _rope(inspection: Inspection) -> str:
    """The rope in a few words; of several the one of the layers that see everything."""
    from fastdraft.modeling.families import text_config

    rope: dict[str, Any] = getattr(text_config(inspection.config), "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    return (
        f"rope {rope.get('rope_type', 'default')}, theta {rope.get('rope_theta', 0):g}" if rope else "no rope"
    )


def _costs(inspection: Inspection) -> str:
    columns = ["draft", "hidden", "layers", "FFN", "int8/token", "FLOPs", "c param", "c bytes", "c 8on4"]
    rows = []
    for c in inspection.candidates:
        d = c.draft
        shape = [d.hidden_size, d.num_layers, d.intermediate_size]
        ratios = [f"{c.by_parameters:.4f}", f"{c.by_bytes:.4f}", f"{c.int8_on_int4:.4f}"]
        rows.append(
            [_label(c), *shape, _bytes(d.bytes_per_token(8)), format_count(d.flops_per_token), *ratios]
        )
    note = "c: cost of a draft token over a target token by parameters; by bytes read, equal precision; int8 draft on int4 target."
    named = [
        f"* preset {c.name}, {c.draft.parameters:,} parameters." for c in inspection.candidates if c.name
    ]
    uneven = [
        _label(c)
        for c in inspection.candidates
        if c.draft.hidden_size % 256 or c.draft.intermediate_size % 256
    ]
    if uneven:
        note += f" Rows not all multiples of 256, so no K-quants in llama.cpp: {', '.join(uneven)}."
    return (
        format_table("Candidate drafts", columns, rows) + "\n" + "\n".join([textwrap.fill(note, 79), *named])
    )


def _gains(inspection: Inspection) -> str:
    rows = []
    for c in inspection.candidates:
        for rate in RATES:
            gains = c.mbsu(rate)
            rows.append(
                [_label(c), f"{rate:g}", *(f"{gain:.2f}" for gain in gains), KS[gains.index(max(gains))]]
            )
    note = (
        f"The acceptance rate (accepted / proposed) is the one at K = {PAPER_K}, as the paper prints it: there text reaches about 0.3, "
        "instructions 0.35 and code 0.6. Other K follow from a constant chance for each further token. Below 1.00 a draft does harm."
    )
    columns = ["draft", "rate", *(f"K={k}" for k in KS), "best K"]
    return (
        format_table("Memory-bound speed-up by bytes at equal precision", columns, rows)
        + "\n"
        + textwrap.fill(note, 79)
    )


def _label(candidate: Candidate) -> str:
    return format_count(candidate.draft.parameters) + ("*" if candidate.name else "")


def _bytes(count: float) -> str:
    return f"{format_count(count)}B".replace("BB", "GB")
