"""To which shapes a model can be grown, where its trained entries then lie, and what its config says.

Decides that every size may only grow and head_dim must stay; that a query head keeps its key-value head, which is copied where
it served more queries than the new ratio allows; that trained entries stay contiguous, and so in the groups of 128 in which
int4 found them; and which models are refused: other families, compressed weights, ropes that depend on the context's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.architecture import Architecture

GROUP = 128
"""Weights that share a scale in int4."""
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_OF_ANY_CONTEXT = ("default", "linear", "llama3")
_SIZES = {
    "--hidden-size": "hidden_size",
    "--layers": "num_layers",
    "--intermediate-size": "intermediate_size",
    "--heads": "num_heads",
    "--kv-heads": "num_kv_heads",
    "--context-length": "context_length",
}


@dataclass(frozen=True)
class Axis:
    """Where the trained entries of an axis lie in the larger one."""

    places: Tensor
    """Places in the larger axis [n]."""
    entries: Tensor
    """The source's entries that stand there [n]; some more than once when key-value heads are copied."""
    dead: Tensor
    """Bool [size]: new entries whose activation is held at zero, so that what reads them may hold any values."""

    @property
    def size(self) -> int:
        return len(self.dead)


def check_shape(source: Architecture, wanted: Architecture) -> None:
    """Refuses shapes to which no model can be grown with the same outputs.

    Raises:
        RecipeError: naming the option, both values, the rule and what would do.
    """
    if source.family not in _FAMILIES:
        raise RecipeError(
            "SOURCE",
            f"family '{source.family}'",
            f"must be one of {', '.join(_FAMILIES)}",
            "grow a model of one of these",
        )
    for option, field in _SIZES.items():
        old, new = getattr(source, field), getattr(wanted, field)
        if new < old:
            raise RecipeError(
                option, new, f"must not be smaller than the source's {old}", f"give at least {old}"
            )
    if wanted.head_dim != source.head_dim:
        rule = f"must stay {source.head_dim}, since rope and the scale of attention depend on it"
        raise RecipeError("--head-dim", wanted.head_dim, rule, "change the number of heads instead")
    if wanted.num_heads % wanted.num_kv_heads:
        rule = f"must divide --heads {wanted.num_heads}"
        raise RecipeError("--kv-heads", wanted.num_kv_heads, rule, "give a divisor")
    needed = len(head_places(source, wanted)[1])
    if needed > wanted.num_kv_heads:
        ratios = f"{wanted.num_heads // wanted.num_kv_heads} queries a key-value head, {source.num_heads // source.num_kv_heads} in the source"
        rule = f"must be at least {needed} at {ratios}"
        raise RecipeError("--kv-heads", wanted.num_kv_heads, rule, "give more --kv-heads or --heads")
    if wanted.family == "qwen2" and wanted.hidden_size != wanted.num_heads * wanted.head_dim:
        rule = f"qwen2 needs --heads times {wanted.head_dim} to be the width {wanted.hidden_size}"
        raise RecipeError("--heads", wanted.num_heads, rule, "change the width or the heads")


def head_places(source: Architecture, wanted: Architecture) -> tuple[list[int], list[int]]:
    """New place of every query head of the source, and for the first new key-value heads the source's that they copy."""
    group, new_group = source.num_heads // source.num_kv_heads, wanted.num_heads // wanted.num_kv_heads
    places: list[int] = []
    copies: list[int] = []
    for kv_head in range(source.num_kv_heads):
        for start in range(0, group, new_group):
            places += [len(copies) * new_group + i for i in range(min(new_group, group - start))]
            copies.append(kv_head)
    return places, copies


def find_axes(source: Architecture, wanted: Architecture, trained: bool) -> dict[str, Axis]:
    """Every axis that a matrix can have, in a trained layer or in a new one, where no entry is trained.

    Every other block of 128 new neurons and every other new key-value head, with its query heads, is dead.
    """
    queries, copies = head_places(source, wanted) if trained else ([], [])
    group, width = wanted.num_heads // wanted.num_kv_heads, source.head_dim
    new_inner = torch.arange(wanted.intermediate_size) >= (source.intermediate_size if trained else 0)
    dead_inner = new_inner & (torch.arange(wanted.intermediate_size) // GROUP % 2 == 0)
    kv_heads = torch.arange(wanted.num_kv_heads)
    dead_kv = (kv_heads >= len(copies)) & (kv_heads % 2 == 0)

    def first(old: int, new: int, dead: Tensor | None = None) -> Axis:
        places = torch.arange(old if trained else 0)
        return Axis(places, places, torch.zeros(new, dtype=torch.bool) if dead is None else dead)

    def spread(heads: Sequence[int]) -> Tensor:
        return (torch.tensor(list(heads), dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()

    def heads(where: Sequence[int], of: Sequence[int], dead: Tensor) -> Axis:
        return Axis(spread(where), spread(of), dead.repeat_interleave(width))

    return {
        "vocab": first(source.vocab_size, source.vocab_size),
        "hidden": first(source.hidden_size, wanted.hidden_size),
        "inner": first(source.intermediate_size, wanted.intermediate_size, dead_inner),
        "query": heads(queries, range(len(queries)), dead_kv.repeat_interleave(group)),
        "kv": heads(range(len(copies)), copies, dead_kv),
    }


def grown_config(
    raw: dict[str, Any], source: Architecture, wanted: Architecture, dtype: torch.dtype
) -> dict[str, Any]:
    """The source's config.json with the larger shape.

    Raises:
        TargetError: for compressed weights. RecipeError: when the rope depends on a context that would change.
    """
    if "quantization_config" in raw:
        raise TargetError(
            "SOURCE", "compressed weights", "only plain weights can be grown", "grow the uncompressed model"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if wanted.context_length != source.context_length and kind not in _ROPE_OF_ANY_CONTEXT:
        raise RecipeError(
            "--context-length",
            wanted.context_length,
            f"rope '{kind}' depends on it",
            f"leave it at {source.context_length}",
        )
    config = {key: value for key, value in raw.items() if key not in ("torch_dtype", "_name_or_path")}
    config |= {
        "hidden_size": wanted.hidden_size,
        "num_hidden_layers": wanted.num_layers,
        "intermediate_size": wanted.intermediate_size,
        "num_attention_heads": wanted.num_heads,
        "num_key_value_heads": wanted.num_kv_heads,
        "tie_word_embeddings": wanted.tied,
        "max_position_embeddings": wanted.context_length,
        "dtype": str(dtype).removeprefix("torch."),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6) * source.hidden_size / wanted.hidden_size,
    }
    if wanted.family != "qwen2":
        config["head_dim"] = wanted.head_dim
    if raw.get("layer_types"):
        config["layer_types"] = [
            *raw["layer_types"],
            *["full_attention"] * (wanted.num_layers - source.num_layers),
        ]
    return config
