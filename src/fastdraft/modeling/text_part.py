"""The text part of a multimodal model as a plain language model, for what takes no other kind."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fastdraft.modeling.families import MULTIMODAL, plain_rope, special_id, text_config
from fastdraft.modeling.model_files import quiet
from fastdraft.target import Target

# These decoders are Qwen2's but for counting positions on three axes, which for text are equal.
_STANDS_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_KEPT = ("model_type", "architectures", "transformers_version", "_name_or_path")


def text_family(target: Target) -> str:
    """The family that a target's text part has by itself; the target's own where there is no other part."""
    family = str(text_config(target.config).model_type)
    return _STANDS_AS.get(family, family)


def text_only(config: PreTrainedConfig, tied: bool) -> PreTrainedConfig:
    """The text part's config as that of a model by itself; `tied`: whether its matrices are one."""
    text = text_config(config)
    if text is config:
        return config
    values: dict[str, Any] = {name: value for name, value in text.to_dict().items() if name not in _NOT_KEPT}
    values |= {name: special_id(config, name) for name in _SPECIAL} | {"tie_word_embeddings": tied}
    if text.model_type in _STANDS_AS:
        values["rope_parameters"] = plain_rope(text)
    return AutoConfig.for_model(_STANDS_AS.get(text.model_type, text.model_type), **values)


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The text part as a causal language model, to be saved, not run: tables of positions are not made."""
    # What the parts of the config say about tying may contradict each other: the weights know.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(text_only(model.config, tied), dtype=model.dtype)
    text.get_decoder().load_state_dict(model.get_decoder().state_dict(), assign=True)
    text.get_output_embeddings().weight = model.get_output_embeddings().weight
    text.generation_config = copy.deepcopy(model.generation_config)
    return text


@contextlib.contextmanager
def as_text_model(target: Target, beside: Path) -> Iterator[Target]:
    """The target itself where it is text only; else its text part, in a temporary directory by `beside`."""
    if target.config.model_type not in MULTIMODAL:
        yield target
        return
    with TemporaryDirectory(dir=beside.parent, prefix=".text-part-") as folder:
        with quiet():
            text_model(target.model("cpu")).save_pretrained(folder)
        target.copy_tokenizer(Path(folder))
        yield Target.at(folder)
