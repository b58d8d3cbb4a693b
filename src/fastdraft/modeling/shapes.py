"""Which shape a draft gets: `search` by a budget, `preset` by name, `natural` for a width, `explicit` by
numbers.

Shallow and wide is preferred: at a fixed budget depth dominates latency, because layers run one after
another. Widths and feed-forwards are multiples of 64, with 256 preferred: llama.cpp's K-quants need rows of
256.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fastdraft.console import format_count
from fastdraft.errors import RecipeError
from fastdraft.modeling.architecture import Architecture

TOLERANCE = 0.03
TIED_BELOW = 14_000_000  # of tied targets: one matrix more would eat the body of so small a draft
_STEP, _WIDTHS = 64, 4096
_DEPTHS = (2, 4)  # times the ideal; the deeper ones where the shallow leave a gap between two widths
_WIDTH_PER_LAYER, _FEED_FORWARD = 96, 3.0
# Published drafts, reconstructed from file sizes (52,107,776 and 154,147,328 parameters): family, width,
# depth, heads, feed-forward.
PRESETS = {"phi-3-mini-50m": ("phi3", 512, 6, 8, 1408), "llama-3.1-8b-150m": ("llama", 512, 6, 8, 1792)}


def preset(name: str, target: Architecture) -> Architecture:
    """A reconstructed FastDraft shape (full multi-head attention, untied) in the target's vocabulary."""
    family, width, layers, heads, feed_forward = PRESETS[name]
    if family != target.family:
        found = f"{name}; this preset is for {family} targets, this target is {target.family}"
        raise RecipeError(f"design.draft.name: {found}", "use kind: budget")
    return explicit(target, width, layers, feed_forward, heads, heads, tied=False)


def explicit(
    target: Architecture,
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    tied: bool | None = None,
) -> Architecture:
    """A shape given by numbers; heads and tying left out follow the same rules as the search."""
    base = replace(target.draft_base, tied=False)
    shape = _at_width(base, hidden_size, num_layers, intermediate_size)
    if num_heads or num_kv_heads:
        heads = num_heads or shape.num_heads
        kv_heads = num_kv_heads or _kv_heads(heads, target)
        shape = replace(shape, num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden_size // heads)
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if hidden_size % heads or shape.head_dim % 2:
        rule = f"must divide hidden_size {hidden_size} into heads of even width"
        raise RecipeError(f"design.draft.num_heads: {heads}; {rule}", "change one of them")
    if heads % kv_heads:
        found = f"{kv_heads}; must divide num_heads {heads}"
        raise RecipeError(f"design.draft.num_kv_heads: {found}", "change one of them")
    return replace(shape, tied=_is_tied(shape, target) if tied is None else tied)


def search(
    target: Architecture, budget: int, num_layers: int | None = None, keep_head_dim: bool = False
) -> Architecture:
    """The best shape within 3 % of a parameter budget, which counts both vocabulary matrices when untied.

    `num_layers` fixes the depth; `keep_head_dim` prefers the target's head width (a rope with a factor per
    frequency).
    """
    key = f"design.draft.parameters: {format_count(budget)}"
    base = replace(target.draft_base, tied=target.tied and budget < TIED_BELOW)
    smallest = _at_width(base, _STEP, num_layers or 1, _STEP, keep_head_dim)
    if budget < smallest.parameters * (1 - TOLERANCE):
        matrices = format_count(smallest.parameters - smallest.body_parameters)
        found = f"{key}, of which the vocabulary of {target.vocab_size} alone takes {matrices}"
        least = math.ceil(smallest.parameters / 1000) * 1000
        raise RecipeError(f"{found}; must be at least {least}", "raise the budget")
    for depth in _DEPTHS:
        candidates = list(_candidates(base, budget, num_layers, keep_head_dim, depth))
        fitting = [shape for shape in candidates if abs(shape.parameters - budget) <= TOLERANCE * budget]
        if fitting:
            return min(fitting, key=lambda shape: _penalty(shape, target, budget, num_layers))
    sizes = {shape.parameters for shape in candidates}
    near = [
        max((s for s in sizes if s < budget), default=0),
        min((s for s in sizes if s > budget), default=0),
    ]
    rule = f"no sensible shape within 3 %; the nearest: {' and '.join(map(format_count, filter(None, near)))}"
    raise RecipeError(f"{key}; {rule}", "use one of these, or kind: shape")


def natural(target: Architecture, hidden_size: int, keep_head_dim: bool = False) -> Architecture:
    """The shape that the search would like best at this width, whatever its size."""
    step = 256 if hidden_size >= 256 else _STEP
    feed_forward = max(step, round(_FEED_FORWARD * hidden_size / step) * step)
    base, layers = replace(target.draft_base, tied=False), round(_ideal_layers(hidden_size))
    shape = _at_width(base, hidden_size, layers, feed_forward, keep_head_dim)
    return replace(shape, tied=_is_tied(shape, target))


def _kv_heads(heads: int, target: Architecture) -> int:
    group = max(1, target.num_heads // target.num_kv_heads)
    while heads % group or (heads // group < 2 and group > 1):
        group -= 1
    return heads // group


def _is_tied(untied: Architecture, target: Architecture) -> bool:
    return target.tied and replace(untied, tied=True).parameters < TIED_BELOW


def _ideal_layers(hidden_size: int) -> float:
    return max(2.0, hidden_size / _WIDTH_PER_LAYER)


def _at_width(
    base: Architecture, hidden_size: int, num_layers: int, intermediate_size: int, keep_head_dim: bool = False
) -> Architecture:
    """A shape at a width, its heads 64 wide, narrower below a width of 256 so that four remain.

    From a width of 1024 on, and wherever its rope asks for it, heads are as wide as the target's. The
    target's ratio of heads to key-value heads is kept where it divides and leaves two.
    """
    wanted = [base.head_dim] if keep_head_dim or hidden_size >= 1024 else []
    head_dim, heads = hidden_size, 1
    for width in [*wanted, 64, 32, 16, 8, 4, 2]:
        few = 2 if keep_head_dim and width == base.head_dim else 4
        if hidden_size % width == 0 and hidden_size // width >= few:
            head_dim, heads = width, hidden_size // width
            break
    kv_heads = _kv_heads(heads, base)
    wide = replace(base, hidden_size=hidden_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    return replace(wide, num_layers=num_layers, intermediate_size=intermediate_size)


def _candidates(
    base: Architecture, budget: int, num_layers: int | None, keep_head_dim: bool, depth: int
) -> Iterator[Architecture]:
    """For every width and depth the feed-forwards around the budget, from 1 to 8 times the width."""
    for hidden_size in range(_STEP, _WIDTHS + 1, _STEP):
        empty = _at_width(base, hidden_size, 1, 0, keep_head_dim)
        if replace(empty, num_layers=0).parameters > 2 * budget:
            return
        for layers in [num_layers] if num_layers else range(1, round(depth * _ideal_layers(hidden_size)) + 1):
            room = budget - replace(empty, num_layers=layers).parameters
            one = replace(empty, intermediate_size=_STEP).layer_parameters - empty.layer_parameters
            per_unit = one / _STEP * layers
            sizes = {math.floor(room / per_unit / step + up) * step for step in (_STEP, 256) for up in (0, 1)}
            for size in sorted({min(max(size, hidden_size), 8 * hidden_size) for size in sizes}):
                yield replace(empty, num_layers=layers, intermediate_size=size)


def _penalty(shape: Architecture, target: Architecture, budget: int, num_layers: int | None) -> float:
    """Distance from the preferred proportions; a depth given by the user costs nothing."""
    depth = 0.0 if num_layers else math.log(shape.num_layers / _ideal_layers(shape.hidden_size))
    aspect = 2 * depth * depth * (1.5 if depth > 0 else 1.0)
    feed_forward = math.log(shape.intermediate_size / (_FEED_FORWARD * shape.hidden_size)) ** 2
    uneven = 0.1 * (shape.intermediate_size % 256 != 0)
    uneven += (0.3 if shape.hidden_size >= 512 else 0.1) * (shape.hidden_size % 256 != 0)
    uneven += 0.2 * (shape.num_heads == shape.num_kv_heads and target.num_heads > target.num_kv_heads)
    return aspect + feed_forward + uneven + 2 * abs(shape.parameters - budget) / budget
