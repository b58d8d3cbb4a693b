"""Parameters of the real modules' text part, counted on the meta device: no memory, no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastdraft.modeling.families import MULTIMODAL, text_config


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
    return AutoModelForImageTextToText if hf_config.model_type in MULTIMODAL else AutoModelForCausalLM


def count(hf_config: PreTrainedConfig) -> Counted:
    """Counts the modules that a config describes."""
    return _count(hf_config.model_type, hf_config.to_json_string(use_diff=False))


@lru_cache(maxsize=32)
def _count(family: str, text: str) -> Counted:
    values = {name: value for name, value in json.loads(text).items() if name != "model_type"}
    hf_config = AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        return count_model(auto_class(hf_config).from_config(hf_config))


def count_model(model: PreTrainedModel) -> Counted:
    """Counts the text part of a model that was built, on any device."""
    embedding, head, decoder = (
        model.get_input_embeddings().weight,
        model.get_output_embeddings(),
        model.get_decoder(),
    )
    parts = {id(p): p.numel() for module in (decoder, head) for p in module.parameters()}
    tied = head.weight is embedding
    # Of an untied input embedding and of a table of positions one row is read, which is not counted.
    tables = [module for module in decoder.modules() if isinstance(module, torch.nn.Embedding)]
    rows = {id(table.weight) for table in tables if not (tied and table.weight is embedding)}
    idle = sum(parts[row] for row in rows)
    config: Any = text_config(model.config)
    experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)
    if experts:  # a token reads those that it is sent to; several tokens in one pass read more than this
        routed = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
        idle += routed * (experts - int(config.num_experts_per_tok)) // experts
    stored = sum(parts.values())
    return Counted(stored, stored - idle, tied)
