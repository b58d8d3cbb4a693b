"""Parameters of the real modules, counted on the meta device: no memory, no weights.

Decides what a token reads of a model whose family has no formula: the decoder and the head of its text part; of an untied
input embedding and of a table of positions one row, which is not counted; of routed experts the share that a token is
sent to. Several tokens in one pass are sent to more experts, so a pass that verifies proposals reads more than this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastdraft.modeling.families import MULTIMODAL, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NUM_EXPERTS, _ACTIVE_EXPERTS = ("num_local_experts", "num_experts"), "num_experts_per_tok"


@dataclass(frozen=True)
class Counted:
    """Parameters of a model's text part."""

    stored: int
    """All; a tied matrix counts once."""
    read: int
    """Those read for one token."""
    tied: bool
    """Whether embedding and head are one matrix."""


def auto_class(hf_config: PreTrainedConfig) -> Any:
    """The class of transformers that loads a model with this config and writes text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hf_config.model_type in MULTIMODAL else AutoModelForCausalLM


def count(hf_config: PreTrainedConfig) -> Counted:
    """Counts the modules that a config describes."""
    text: str = hf_config.to_json_string(use_diff=False)
    return _count(hf_config.model_type, text)


@lru_cache(maxsize=32)
def _count(family: str, text: str) -> Counted:
    import json

    import torch
    from transformers import AutoConfig

    values = {name: value for name, value in json.loads(text).items() if name != "model_type"}
    hf_config = AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        model = auto_class(hf_config).from_config(hf_config)
    return count_model(model)


def count_model(model: PreTrainedModel) -> Counted:
    """Counts the text part of a model that was built, on any device."""
    from torch.nn import Embedding

    embedding, head, decoder = (
        model.get_input_embeddings().weight,
        model.get_output_embeddings(),
        model.get_decoder(),
    )
    parts = {id(p): p.numel() for module in (decoder, head) for p in module.parameters()}
    tied = head.weight is embedding
    rows = {
        id(m.weight)
        for m in decoder.modules()
        if isinstance(m, Embedding) and not (tied and m.weight is embedding)
    }
    idle = sum(parts[row] for row in rows)
    config: Any = text_config(model.config)
    experts = next((int(getattr(config, name)) for name in _NUM_EXPERTS if getattr(config, name, None)), 0)
    if experts:
        routed = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
        idle += routed * (experts - int(getattr(config, _ACTIVE_EXPERTS))) // experts
    stored = sum(parts.values())
    return Counted(stored, stored - idle, tied)
