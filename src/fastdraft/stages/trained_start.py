"""Design's first weights from a trained model: which one, in what shape, how it is measured and cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fastdraft.data.samples import prepared_sample, shipped_sample
from fastdraft.errors import RecipeError
from fastdraft.modeling.architecture import Architecture
from fastdraft.modeling.drafts import pick_device, set_threads
from fastdraft.modeling.families import DRAFT_FAMILIES
from fastdraft.modeling.pruning import fit_vocabulary, mean_loss, prune
from fastdraft.modeling.transplant import spell, transplant
from fastdraft.modeling.vocabulary import check_same
from fastdraft.recipe.run import resolve_path
from fastdraft.recipe.training import PrunedDraft, TransplantDraft
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

# Rows and ids of them on which a trained model's layers are chosen and fitted; rows on which losses are told.
_FITTED, _MEASURED, _ROW = 80, 16, 128
MEASURED_TOKENS = (_FITTED + _MEASURED) * _ROW
_IN_FP32 = 2_000_000_000  # parameters; larger ones are read in half precision
Start = PrunedDraft | TransplantDraft
_WIDTHS = ("hidden_size", "intermediate_size", "num_heads")


def check_family(key: str, source: Target) -> None:
    """Refuses a model that cannot be a draft."""
    if source.config.model_type not in DRAFT_FAMILIES:
        rule = f"a draft's family must be one of {', '.join(DRAFT_FAMILIES)}"
        raise RecipeError(f"{key}: family {source.config.model_type}; {rule}", "design a new draft")


def trained_model(wanted: Start, target: Target) -> Target:
    """The model whose layers are taken; the vocabulary of a pruned one checked but for padding rows."""
    key, source = "design.draft.model", target
    if wanted.model is not None:
        source = Target.at(resolve_path(wanted.model, key).as_posix())
        if isinstance(wanted, PrunedDraft):
            of_source = replace(source.vocabulary, size=target.vocabulary.size)
            check_same(target.vocabulary, of_source, special_tokens=False, where=key)
    check_family(key, source)
    source.files.check_weights()
    source.check_tensors()
    return source


def pruned_shape(wanted: Start, source: Architecture, target: Architecture) -> Architecture:
    """The source's shape with the sizes that are wanted, the target's vocabulary and at most its context."""
    count = source.num_layers
    listed = count if wanted.layers is None else wanted.layers
    layers = list(range(listed)) if isinstance(listed, int) else listed
    if not layers or layers != sorted(set(layers) & set(range(count))):
        rule = f"must be ascending numbers of the {count} layers of that model, or how many of them"
        raise RecipeError(f"design.draft.layers: {listed}: {rule}", "change it")
    sizes = {name: getattr(wanted, name) or getattr(source, name) for name in _WIDTHS}
    for name, size in sizes.items():
        if size > getattr(source, name):
            rule = f"must be at most that model's {getattr(source, name)}"
            raise RecipeError(f"design.draft.{name}: {size}: {rule}", "lower it")
    heads, width, group = sizes["num_heads"], sizes["hidden_size"], source.num_heads // source.num_kv_heads
    if heads % group:
        rule = f"must be a multiple of {group}, the heads of one key-value head"
        raise RecipeError(f"design.draft.num_heads: {heads}: {rule}", "change it")
    cut = sizes != {name: getattr(source, name) for name in _WIDTHS}
    if cut and source.family == "phi3":
        rule = "fused matrices are cut in depth only: leave out hidden_size, intermediate_size and num_heads"
        raise RecipeError(f"design.draft: family phi3: {rule}", "give layers alone")
    # Runtimes compute the width of Qwen2's heads.
    if cut and (width % heads or (source.family == "qwen2" and width != heads * source.head_dim)):
        rule = f"with {heads} heads it must be {heads * source.head_dim}" if source.family == "qwen2" else ""
        rule = rule or f"must be a multiple of the {heads} heads"
        raise RecipeError(f"design.draft.hidden_size: {width}: {rule}", "change it or num_heads")
    tied = source.tied and width == source.hidden_size and isinstance(wanted, PrunedDraft)
    kept: dict[str, Any] = {"num_layers": len(layers), "num_kv_heads": heads // group, "tied": tied}
    kept |= {"vocab_size": target.vocab_size}
    kept |= {"context_length": min(source.context_length, target.context_length)}
    return replace(source, **sizes, **kept)


def bytes_of_weights(source: Architecture) -> int:
    """As it is read here."""
    return (4 if source.parameters <= _IN_FP32 else 2) * source.parameters


def start_from(
    config: PreTrainedConfig, wanted: Start, source: Target, context: StageContext
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The draft, and for the manifest what was kept and what it cost."""
    count = _FITTED + _MEASURED
    if context.has("prepare"):
        rows = torch.from_numpy(prepared_sample(context.require("prepare"), count, _ROW + 1))
    else:
        rows = torch.from_numpy(shipped_sample(context.target, count, _ROW + 1))
    set_threads(context.settings.threads)
    measured = max(1, len(rows) * _MEASURED // count)
    # The losses are of rows to which nothing was fitted.
    fitted, held_out = rows[:-measured], rows[-measured:]
    dtype = torch.float32 if source.architecture.parameters <= _IN_FP32 else torch.bfloat16
    model = source.model(pick_device(context.settings.device), dtype)
    if isinstance(wanted, TransplantDraft):
        spelled = spell(context.target, source)
        transplant(model, spelled)
    else:
        fit_vocabulary(model, context.target.vocabulary.size)
    before = mean_loss(model, held_out)
    if not math.isfinite(before):
        raise source.files.wrong("its loss on text is not finite", "fetch the model again, or take another")
    layers = source.architecture.num_layers if wanted.layers is None else wanted.layers
    draft, kept, similarities = prune(model, config, layers, fitted[:, :-1])
    losses = {"loss_of_source": before, "loss": mean_loss(draft, held_out)}
    about = {"source": source.name, "license": source.license, "layers": kept, "of": len(similarities)}
    about |= {"similarities": similarities, "tokens": held_out[:, 1:].numel(), **losses}
    numbers = ", ".join(map(str, kept)) if len(kept) < len(similarities) else "all"
    context.console.say(f"layers: {numbers} of {len(similarities)} of {source.name} ({source.license})")
    context.console.say("nats per token: {loss_of_source:.3f} before, {loss:.3f} after".format(**losses))
    return draft, about
