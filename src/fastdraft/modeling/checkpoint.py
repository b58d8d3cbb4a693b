"""What a checkpoint holds against what the model of its config has places for.

transformers passes over a tensor that it has no place for, even where that is the scale without which the
others mean nothing. Names and shapes go through its own loader on the meta device: of the files only the
heads are read.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from fastdraft.errors import TargetError
from fastdraft.modeling.architecture import auto_class
from fastdraft.modeling.model_files import Header

# Names of the two matrices in the families' files, the draft's own first.
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.model.embed_tokens.weight",
)
HEADS = ("lm_head.weight", "embed_out.weight", "language_model.lm_head.weight")
# Computed tables; masks of old GPT-2 and GPT-NeoX files; the part that sees; layers that predict more.
_PASSED_OVER = re.compile(
    r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$"
    r"|(^|\.)(visual|vision_tower|vision_model|multi_modal_projector)\.|(^|\.)mtp(_\w+)?\."
)
_FURTHER_AHEAD = re.compile(r"(.*layers\.\d+\.)eh_proj\.")
_META = torch.device("meta")
_CHUNK = 16_384
_FIX = "take config.json and weights from the same model, unquantised, adapters merged"


def check_header(where: str, config: PreTrainedConfig, header: Header) -> tuple[list[str], bool]:
    """Refuses tensors that do not fit the config's model; the names passed over, and whether it says tied."""
    with _META:
        model = auto_class(config).from_config(copy.deepcopy(config))
    tensors = {name: torch.empty(shape, device=_META) for name, (_, shape) in header.items()}
    mapping = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(device_map={"": _META}, dtype=torch.float32, weight_mapping=mapping)
    report, _ = convert_and_load_state_dict_in_model(model, tensors, how, tp_plan=None)
    missing, tied = set(report.missing_keys), model.all_tied_weights_keys
    for pair in tied.items():  # either of the two serves as both
        missing -= set(pair) if not missing.issuperset(pair) else set()
    passed = refuse_misfits(where, missing, report.unexpected_keys, report.mismatched_keys)
    for name, (kind, _) in header.items():
        if kind[0] in "IU" and name.endswith("weight") and name not in passed:
            rule = "only quantised weights are, and config.json has no quantization_config"
            raise TargetError(f"{where}: {name} is of type {kind}; {rule}", "choose an unquantised copy")
    return passed, bool(tied)


def refuse_misfits(
    where: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any] = ()
) -> list[str]:
    """Of the unexpected names those that may be passed over; anything else is refused by its first name."""
    if wrong := sorted(mismatched, key=str):
        name, found, wanted = wrong[0]
        shapes = f"{name} is {list(found)}, config.json makes it {list(wanted)}"
        raise TargetError(f"{where}: weights of other shapes than config.json says: {shapes}", _FIX)
    names = sorted(unexpected, key=_in_order)
    ahead = tuple(found[1] for name in names if (found := _FURTHER_AHEAD.match(name)))
    passed = [name for name in names if _PASSED_OVER.search(name) or name.startswith(ahead)]
    if unused := [name for name in names if name not in passed]:
        rule = "config.json describes a model that has no place for it"
        raise TargetError(f"{where}: unused tensor {_first(unused)}; {rule}", _FIX)
    if absent := sorted(missing, key=_in_order):
        tie = "write tie_word_embeddings: true there if its head is its embedding"
        found = f"no weights for {_first(absent)}, which config.json asks for"
        raise TargetError(f"{where}: {found}", tie if absent[0] in HEADS else _FIX)
    return passed


def refuse_second_head(where: str, paths: Sequence[Path]) -> list[str]:
    """Of a model that says tied: the name of a head that is its embedding once more; another one is refused,
    because half of the runtimes would use it.
    """
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        found = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
        names = [next((name for name in wanted if name in found), "") for wanted in (EMBEDDINGS, HEADS)]
        if not all(names):
            return []
        embedding, head = (found[name] for name in names)
        starts = range(0, embedding.get_shape()[0], _CHUNK)
        pairs = ((embedding[start : start + _CHUNK], head[start : start + _CHUNK]) for start in starts)
        if all(torch.equal(one, other) for one, other in pairs):
            return names[1:]
    rule = f"{names[1]} is not {names[0]}, but config.json says tie_word_embeddings: true"
    raise TargetError(f"{where}: {rule}", "write false there, or take the head out of the file")


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _in_order(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
