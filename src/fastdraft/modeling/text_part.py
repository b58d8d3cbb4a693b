"""The text part of a multimodal model as a plain language model, for what takes no other kind.

Decides which family it is of: its own where that stands by itself, and Qwen2 for Qwen2-VL and Qwen2.5-VL, whose decoder is Qwen2's but
for counting positions on three axes, which for text are equal. Weights are the model's own, not copied.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastdraft.machine import disk_errors
from fastdraft.modeling.families import MULTIMODAL, plain_rope, special_id, text_config
from fastdraft.modeling.source import copy_tokenizer_files, raw_config
from fastdraft.recipe.run import TargetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_STANDS_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_KEPT = ("model_type", "architectures", "transformers_version", "_name_or_path")


def text_family(config: dict[str, Any]) -> str:
    """The family that a raw config's text part has by itself; the config's own where there is no other part."""
    text = config.get("text_config") if config["model_type"] in MULTIMODAL else config
    family = str((text or {}).get("model_type") or f"{config['model_type']}_text")
    return _STANDS_AS.get(family, family)


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The text part as a causal language model that shares its weights; to be saved, not run: its tables of positions are not made."""
    import torch
    from transformers import AutoModelForCausalLM

    # What the parts of the config say about tying may contradict each other: the weights know.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(_standing_config(model.config, tied), dtype=model.dtype)
    text.get_decoder().load_state_dict(model.get_decoder().state_dict(), assign=True)
    text.get_output_embeddings().weight = model.get_output_embeddings().weight
    text.generation_config = copy.deepcopy(model.generation_config)
    return text


def _standing_config(config: PreTrainedConfig, tied: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    text = text_config(config)
    values: dict[str, Any] = {name: value for name, value in text.to_dict().items() if name not in _NOT_KEPT}
    values |= {name: special_id(config, name) for name in _SPECIAL} | {"tie_word_embeddings": tied}
    if text.model_type in _STANDS_AS:
        values["rope_parameters"] = plain_rope(text)
    return AutoConfig.for_model(_STANDS_AS.get(text.model_type, text.model_type), **values)


@contextlib.contextmanager
def as_text_model(location: str, revision: str | None, beside: Path) -> Iterator[tuple[str, str | None]]:
    """Location and revision of a model that is text only: the model's own, or a directory that lives as long as the block.

    Args:
        location: Directory or hub id.
        revision: Branch, tag or commit on the hub.
        beside: A directory on the disk that has room for the text part's weights.

    Raises:
        TargetError: when the model cannot be loaded. FastDraftError: when the disk is full.
    """
    if raw_config(location, revision)["model_type"] not in MULTIMODAL:
        yield location, revision
        return
    from fastdraft.modeling.loading import load_target, quiet

    with TemporaryDirectory(dir=beside.parent, prefix=".text-part-") as folder:
        with disk_errors(Path(folder)), quiet():
            text_model(load_target(TargetConfig(model=location, revision=revision), "cpu")).save_pretrained(
                folder
            )
        copy_tokenizer_files(location, Path(folder), revision)
        yield folder, None
