"""Design: a target's config and vocabulary -> a draft's architecture and first weights, as a Hugging Face
directory.

The manifest's `shape_digest` stands for vocabulary, shape and first weights alone, which pre-training depends
on: one pre-trained draft serves every fine-tune of a family. The stage's own fingerprint adds what it copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedConfig

from fastdraft.console import Console, format_count
from fastdraft.data.shards import SPLITS
from fastdraft.data.token_counts import count_tokens, covered, most_written
from fastdraft.errors import DataError, RecipeError
from fastdraft.forecast import PAPER_K, RATES, mbsu_at
from fastdraft.modeling import shapes
from fastdraft.modeling.architecture import Architecture, draft_hf_config, has_rotary_factors, rope_switch
from fastdraft.modeling.drafts import build_draft, load_draft, save_draft, set_projected_embeddings
from fastdraft.modeling.families import special_id, why_draft_family
from fastdraft.modeling.gguf_files import SUFFIX
from fastdraft.modeling.traps import SWITCH
from fastdraft.modeling.trimmed_head import trim
from fastdraft.modeling.vocabulary import check_same
from fastdraft.provenance import describe_run
from fastdraft.recipe.run import resolve_path
from fastdraft.recipe.training import (
    DesignConfig,
    EarlierDraft,
    FrequentVocabulary,
    PresetDraft,
    ShapeDraft,
    TrainedStart,
)
from fastdraft.run_folder import digest, file_sha256
from fastdraft.stages.context import StageContext
from fastdraft.stages.trained_start import check_family, pruned_shape, start_from, trained_model
from fastdraft.target import Target

NAME = "design"
_TOO_LARGE = 0.35  # by bytes: above it even an acceptance rate of 0.6 gains less than 1.4 times at K = 3
_INHERITED = [
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
]


@dataclass(frozen=True)
class DraftDesign:
    """What is to be built, before any weight exists."""

    target: Architecture
    draft: Architecture
    draft_config: PreTrainedConfig
    source: Path | None = None  # an earlier draft's directory or GGUF file; None for new weights
    trained: Target | None = None  # the model of which parts are taken

    @property
    def reason(self) -> str:
        """Why the draft's family is not the target's, as a clause; empty when it is."""
        if self.draft.family == self.target.family:
            return ""
        return why_draft_family(self.target.family) or "the model that it begins from is one"

    @property
    def warning(self) -> str:
        """What a user should know before anything is trained; empty where there is nothing."""
        if self.draft.context_length >= self.target.context_length:
            return ""
        lengths = f"{self.draft.context_length} tokens, the target's {self.target.context_length}"
        return f"the draft's context is {lengths}: keep prompt and answer within it"


def plan(config: DesignConfig, target: Target) -> DraftDesign:
    """Resolves the section against the target's config and tokenizer; reads no weights.

    A head that is to cover a share of the text counts whole until `run` has read the rows.
    """
    shape, wanted = target.architecture, config.draft
    if isinstance(wanted, EarlierDraft):
        source = _earlier(wanted, target)
        draft = _headed(config, source.architecture, target)
        return DraftDesign(shape, draft, source.config, source.gguf_file or Path(source.location))
    if isinstance(wanted, TrainedStart):
        trained = trained_model(wanted, target)
        draft = pruned_shape(wanted, trained.architecture, shape)
        inherited = draft_hf_config(trained.config, draft)
        inherited.vocab_size, inherited.max_position_embeddings = draft.vocab_size, draft.context_length
        return DraftDesign(shape, _headed(config, draft, target), inherited, trained=trained)
    if isinstance(wanted, PresetDraft):
        draft = shapes.preset(wanted.name, shape)
    elif isinstance(wanted, ShapeDraft):
        draft = shapes.explicit(shape, **wanted.model_dump(exclude={"kind"}))
    else:
        draft = shapes.search(shape, wanted.parameters, wanted.layers, has_rotary_factors(target.config))
    draft = _headed(config, draft, target)
    return DraftDesign(shape, draft, draft_hf_config(target.config, draft))


def _headed(config: DesignConfig, draft: Architecture, target: Target) -> Architecture:
    """The shape with the head that `vocabulary` asks for: a trimmed one is never the embedding."""
    if not isinstance(config.vocabulary, FrequentVocabulary):
        return draft
    size, least = config.vocabulary.size, len(_always(target))
    if size is not None and not least <= size < draft.vocab_size:
        rule = f"must be below the {draft.vocab_size} ids of the target, and hold its {least} special ones"
        raise RecipeError(f"design.vocabulary.size: {size}: {rule}", "change it, or set kind: full")
    return replace(draft, tied=False, head_size=size or draft.vocab_size)


def _always(target: Target) -> set[int]:
    """Ids that every head has: special tokens, and what begins and ends a text."""
    vocabulary, added = target.vocabulary, target.tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special and token_id < vocabulary.size}
    ends = {*vocabulary.eos_token_ids, vocabulary.bos_token_id, vocabulary.pad_token_id}
    return special | {token_id for token_id in ends if token_id is not None}


def _earlier(wanted: EarlierDraft, target: Target) -> Target:
    """An earlier draft, its vocabulary checked; special tokens may differ between fine-tunes."""
    key, root = "design.draft.path", resolve_path(wanted.path, "design.draft.path")
    folders = [root, *(root / name for name in ("checkpoint", "huggingface", "draft"))]
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    found = root if root.suffix == SUFFIX and root.is_file() else found
    if found is None:
        rule = "must be a directory with config.json, a GGUF file, or a stage's folder"
        raise RecipeError(f"{key}: {wanted.path}; {rule}", "correct the path")
    draft = Target.at(found)
    check_family(key, draft)
    draft.check_tensors()
    check_same(target.vocabulary, draft.vocabulary, special_tokens=False, where=key)
    return draft


def fingerprint(config: DesignConfig, context: StageContext) -> dict[str, Any]:
    """Shape, vocabulary, first weights, and what is copied from the target; its weights only if used."""
    target = context.target
    return {
        "shape": _shape(config, plan(config, target), context),
        "target": target.architecture.as_dict(),
        "tokenizer_files": target.tokenizer_digest(),
        "eos_token_ids": list(target.vocabulary.eos_token_ids),
    }


def _shape(config: DesignConfig, design: DraftDesign, context: StageContext) -> dict[str, Any]:
    """All that decides the draft's modules, its token ids and its first weights."""
    target, seed = context.target, context.settings.seed
    names = ("size", "digest", "special_digest")
    shape: dict[str, Any] = {
        "vocabulary": {name: getattr(target.vocabulary, name) for name in names},
        "architecture": design.draft.as_dict(),
        "inherited": {key: getattr(design.draft_config, key, None) for key in _INHERITED},
    }
    if isinstance(config.vocabulary, FrequentVocabulary):
        shape["head"] = config.vocabulary.model_dump()
    if read := {name: context.folder(name).digest() for name in config.reads if context.has(name)}:
        shape["reads"] = read
    if design.source is not None:
        files = sorted(design.source.glob("*.safetensors")) or [design.source]
        return shape | {"from": digest([file_sha256(path) for path in files])}
    if design.trained is not None:
        return shape | {"draft": config.draft.model_dump(), "from": design.trained.identity()}
    shape |= {"initialization": config.initialization, "seed": seed}
    return shape | ({"target": target.identity()} if config.initialization == "target_embeddings" else {})


def run(config: DesignConfig, context: StageContext) -> None:
    """Writes `draft/`, a Hugging Face directory, and a manifest with sizes and cost ratios."""
    target, seed, folder = context.target, context.settings.seed, context.folder(NAME)
    design, vocabulary = plan(config, target), target.vocabulary
    about: dict[str, Any] = {}
    if design.trained and isinstance(config.draft, TrainedStart):
        model, about = start_from(design.draft_config, config.draft, design.trained, context)
    else:
        model = load_draft(design.source) if design.source else build_draft(design.draft_config, seed)
    if config.initialization == "target_embeddings":
        set_projected_embeddings(model, target, seed)
    head: dict[str, Any] = {}
    if isinstance(config.vocabulary, FrequentVocabulary):
        ids, head = _frequent_ids(config.vocabulary, context)
        trim(model, torch.from_numpy(ids))
        design = replace(design, draft=replace(design.draft, head_size=len(ids)))
    # The target's special ids, none of its sampling settings.
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, key, special_id(target.config, key))
    eos = list(vocabulary.eos_token_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=vocabulary.pad_token_id,
    )
    save_draft(model, folder.path / "draft", target)
    ratios = cost_ratios(design.draft, design.target)
    folder.complete(
        architecture=design.draft.as_dict(),
        parameters=design.draft.parameters,
        family={"draft": design.draft.family, "target": design.target.family, "reason": design.reason},
        target={
            "model": target.name,
            "revision": target.revision,
            "parameters": design.target.parameters,
            "architecture": design.target.as_dict(),
        },
        cost_ratio_parameters=ratios["parameters"],
        cost_ratio_bytes=ratios["bytes"],
        vocabulary=vocabulary.as_dict(),
        **({"head": head} if head else {}),
        initialization=config.draft.kind if design.source or design.trained else config.initialization,
        source=config.draft.path if isinstance(config.draft, EarlierDraft) else about.get("source"),
        **({"start": about} if about else {}),
        reads=list(config.reads),
        shape_digest=digest(_shape(config, design, context)),
        provenance=describe_run(),
    )
    _show(design, target, head, context.console)


def _frequent_ids(
    wanted: FrequentVocabulary, context: StageContext
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """The ids of the head, and for the manifest how many and what they cover of the text; held out: of rows
    that were not counted.
    """
    vocabulary = context.target.vocabulary
    prepare, written = (context.require(n) if context.has(n) else None for n in ("prepare", "synthesize"))
    counts, held_out = (count_tokens(prepare, written, vocabulary.size, split) for split in SPLITS)
    if not counts:
        raise DataError("design.vocabulary: 0 tokens to count in prepare and synthesize", "add some text")
    always, never = _always(context.target), vocabulary.missing_ids
    ids = most_written(counts, always, never, wanted.size, wanted.coverage)
    about = {"size": len(ids), "coverage": covered(counts, ids), "held_out_coverage": covered(held_out, ids)}
    return ids, about


def cost_ratios(draft: Architecture, target: Architecture) -> dict[str, float]:
    """Draft / target by parameters, and by bytes read per token at equal precision."""
    return {
        "parameters": draft.parameters / target.parameters,
        "bytes": draft.read_parameters / target.read_parameters,
    }


def _show(design: DraftDesign, of_target: Target, head: dict[str, Any], console: Console) -> None:
    draft, target, ratios = design.draft, design.target, cost_ratios(design.draft, design.target)
    pair, by_bytes = (draft, target), ratios["bytes"]
    rows: list[list[object]] = [
        ["parameters", *(format_count(a.parameters) for a in pair), f"{ratios['parameters']:.4f}"],
        ["read per token", *(format_count(a.read_parameters) for a in pair), f"{by_bytes:.4f}"],
        ["layers x hidden", *(f"{a.num_layers} x {a.hidden_size}" for a in pair), ""],
        ["feed-forward", *(a.intermediate_size for a in pair), ""],
        ["heads (key-value)", *(f"{a.num_heads} ({a.num_kv_heads})" for a in pair), ""],
    ]
    console.table(f"draft for {of_target.name} ({draft.family})", ["", "draft", "target", "cost ratio"], rows)
    if head:
        shares = (f"{share:.2%} of the {name}" for name, share in head["coverage"].items())
        console.say(f"the head is over {head['size']} of {draft.vocab_size} ids: {', '.join(shares)}")
    if design.reason:
        console.say(f"the draft is of the family {draft.family}, not {target.family}: {design.reason}")
    if switch := rope_switch(of_target.config):
        console.warn(SWITCH.format(switch))
    if design.warning:
        console.warn(design.warning)
    if by_bytes > _TOO_LARGE:
        console.warn(f"a draft token costs {by_bytes:.2f} of a target token: make the draft smaller")
    gains = ", ".join(f"{mbsu_at(rate, PAPER_K, by_bytes):.2f} at {rate}" for rate in RATES)
    console.say(f"memory-bound speed-up (by bytes, K = {PAPER_K}) by acceptance rate: {gains}")
