"""A narrower model from a trained one: the heads and neurons that add most, the residual stream in fewer
directions.

The stream is written in the main directions of the states that the model has on real text, one basis for all
layers. An RMS norm commutes with a rotation once its gains are in the matrices behind it (SliceGPT, arXiv
2401.15024), so nothing is lost but the directions left out; embedding and head become two matrices. Shapes:
D hidden, W hidden of the draft, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_READ = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITTEN = ("self_attn.o_proj", "mlp.down_proj")


def narrow_layers(
    weights: dict[str, Tensor], source: Any, config: Any, contributions: Sequence[dict[str, Tensor]]
) -> None:
    """Leaves each layer as many key-value groups, with their query heads, and neurons as `config` has.

    `contributions`: for each layer the mean square of what each input of `o_proj` and `down_proj` adds.
    """
    of_head = int(getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads)
    for place, found in enumerate(contributions):
        start = f"model.layers.{place}."
        by_group = found["o_proj"].view(source.num_key_value_heads, -1)
        groups = _largest(by_group.sum(1), config.num_key_value_heads)
        neurons = _largest(found["down_proj"], config.intermediate_size)
        everything = torch.arange(by_group.numel(), device=groups.device).view_as(by_group)
        queries = everything[groups].flatten()
        keys = everything.flatten()[: len(by_group) * of_head].view(len(by_group), -1)[groups].flatten()
        rows = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
        rows |= dict.fromkeys(_READ["post_attention_layernorm"], neurons)
        for name, kept in rows.items():
            for kind in ("weight", "bias"):
                if f"{start}{name}.{kind}" in weights:
                    weights[f"{start}{name}.{kind}"] = weights[f"{start}{name}.{kind}"][kept]
        for name, kept in zip(_WRITTEN, (queries, neurons), strict=True):
            weights[f"{start}{name}.weight"] = weights[f"{start}{name}.weight"][:, kept]


def _largest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest, ascending."""
    return scores.topk(count).indices.sort().values


def main_directions(states: Sequence[Tensor], width: int) -> Tensor:
    """The directions [D, W] that hold most of the states [rows, tokens, D], all scaled to one length."""
    size = states[0].shape[-1]
    moment_DD = torch.zeros(size, size, dtype=torch.float64)
    for state in states:
        unit_ND = torch.nn.functional.normalize(state.flatten(0, 1).float(), dim=-1)
        moment_DD += (unit_ND.T @ unit_ND).cpu().double()
    basis_DW: Tensor = torch.linalg.eigh(moment_DD)[1][:, -width:].flip(1)
    return basis_DW.float().to(states[0].device)


def rotate(weights: dict[str, Tensor], layers: int, basis_DW: Tensor) -> None:
    """Writes the residual stream in this basis, gains folded into the matrices behind the norms."""
    size, width = basis_DW.shape
    # What is left of a state is nearly all of its length: the norm must divide by the same as before.
    gain_W = torch.full((width,), (size / width) ** 0.5, device=basis_DW.device)
    for start in (f"model.layers.{place}." for place in range(layers)):
        for norm, readers in _READ.items():
            gain_D = weights[f"{start}{norm}.weight"]
            for name in readers:
                weights[f"{start}{name}.weight"] = (weights[f"{start}{name}.weight"] * gain_D) @ basis_DW
            weights[f"{start}{norm}.weight"] = gain_W
        for name in _WRITTEN:
            for kind in ("weight", "bias"):
                if f"{start}{name}.{kind}" in weights:
                    weights[f"{start}{name}.{kind}"] = basis_DW.T @ weights[f"{start}{name}.{kind}"]
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    weights["lm_head.weight"] = (head * weights["model.norm.weight"]) @ basis_DW
    weights["model.embed_tokens.weight"] = embedding @ basis_DW
    weights["model.norm.weight"] = gain_W


def is_cut(source: PreTrainedConfig, config: PreTrainedConfig) -> bool:
    """Whether the draft is narrower than its source."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return any(getattr(source, name) != getattr(config, name) for name in names)
