"""Design: a target's config and vocabulary -> a draft's architecture and first weights, as a Hugging Face directory.

Decides what a draft inherits (vocabulary with its padding, tokenizer files byte for byte, context length, rope, special ids;
family, norm and activation where the family scales down, see modeling/families.py) and what it does not (width, depth,
heads). The manifest's `shape_digest` stands for vocabulary, shape and first weights alone: what pre-training depends on, so
that one pre-trained draft serves every fine-tune of a family; the stage's own fingerprint adds the tokenizer files and
special ids that it copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.errors import RecipeError, TargetError
from fastdraft.forecast import PAPER_K, RATES, mbsu_at
from fastdraft.recipe.base import format_count
from fastdraft.recipe.run import resolve_path
from fastdraft.recipe.training import BudgetDraft, DesignConfig, EarlierDraft, PresetDraft, ShapeDraft
from fastdraft.run_folder import digest, file_sha256
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fastdraft.modeling.architecture import Architecture
    from fastdraft.modeling.vocabulary import Vocabulary

NAME = "design"
_TOO_LARGE = 0.35  # by bytes: above it even an acceptance rate of 0.6 gains less than 1.4 times at K = 3
_INHERITED = (
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Plan:
    """What is to be built, before any weight exists."""

    target: Architecture
    draft: Architecture
    draft_config: PreTrainedConfig
    vocabulary: Vocabulary
    source: Path | None
    """Directory of an earlier draft; None for new weights."""

    @property
    def reason(self) -> str:
        """Why the draft's family is not the target's, as a clause; empty when it is."""
        from fastdraft.modeling.families import why_draft_family

        if self.draft.family == self.target.family:
            return ""
        return why_draft_family(self.target.family) or "the earlier draft is one"


def plan(config: DesignConfig, target: Target) -> Plan:
    """Resolves the section against the target's config and tokenizer; reads no weights.

    Raises:
        TargetError, TargetError: when the target cannot serve. RecipeError: when no such draft can exist.
    """
    from fastdraft.modeling.architecture import draft_hf_config, read_architecture

    target_config = target.config
    vocabulary = target.vocabulary
    shape = read_architecture(target_config, target.location)
    if isinstance(config.draft, EarlierDraft):
        source, draft_config = _earlier(config.draft, vocabulary)
        return Plan(shape, read_architecture(draft_config, str(source)), draft_config, vocabulary, source)
    draft = resolve_shape(config.draft, target_config)
    return Plan(shape, draft, draft_hf_config(target_config, draft), vocabulary, None)


def resolve_shape(
    draft: BudgetDraft | ShapeDraft | PresetDraft, target_config: PreTrainedConfig
) -> Architecture:
    """The architecture that a recipe asks for.

    Raises:
        RecipeError: when it cannot exist in this vocabulary or family.
    """
    from fastdraft.modeling import shapes
    from fastdraft.modeling.architecture import has_rotary_factors, read_architecture

    target = read_architecture(target_config)
    if isinstance(draft, PresetDraft):
        return shapes.preset(draft.name, target)
    if isinstance(draft, ShapeDraft):
        return shapes.explicit(target, **draft.model_dump(exclude={"kind"}))
    return shapes.search(target, draft.parameters, draft.layers, has_rotary_factors(target_config))


def _earlier(draft: EarlierDraft, vocabulary: Vocabulary) -> tuple[Path, PreTrainedConfig]:
    """The directory and config of an earlier draft, its vocabulary checked; special tokens may differ between fine-tunes."""
    from fastdraft.modeling.families import DRAFT_FAMILIES
    from fastdraft.modeling.vocabulary import check_same

    where = "design.draft.path"
    root = resolve_path(draft.path, where)
    found = [
        folder
        for folder in (root, *(root / name for name in ("checkpoint", "huggingface", "draft")))
        if (folder / "config.json").is_file()
    ]
    if not found:
        raise RecipeError(
            where, draft.path, "must be a directory with config.json, or a stage's folder", "correct the path"
        )
    source = found[0]
    draft_config = Target.at(source).config
    if draft_config.model_type not in DRAFT_FAMILIES:
        rule = f"a draft's family must be one of {', '.join(DRAFT_FAMILIES)}"
        raise RecipeError(where, f"family {draft_config.model_type}", rule, "design a new draft")
    check_same(vocabulary, Target.at(source).vocabulary, special_tokens=False, where=where)
    return source, draft_config


def fingerprint(config: DesignConfig, context: StageContext) -> dict[str, Any]:
    """Shape, vocabulary, first weights, and what is copied from the target; not the target's weights unless they are used."""

    planned = plan(config, context.target)
    return {
        "shape": _shape(config, context, planned),
        "target": planned.target.as_dict(),
        "tokenizer_files": context.target.tokenizer_digest(),
        "eos_token_ids": list(planned.vocabulary.eos_token_ids),
    }


def _shape(config: DesignConfig, context: StageContext, planned: Plan) -> dict[str, Any]:
    """All that decides the draft's modules, its token ids and its first weights."""
    inherited = {key: getattr(planned.draft_config, key, None) for key in _INHERITED}
    vocabulary = planned.vocabulary
    shape: dict[str, Any] = {
        "vocabulary": {
            "size": vocabulary.size,
            "digest": vocabulary.digest,
            "special_digest": vocabulary.special_digest,
        },
        "architecture": planned.draft.as_dict(),
        "inherited": inherited,
    }
    if planned.source is not None:
        return shape | {"from": _weights_digest(planned.source)}
    shape |= {"initialization": config.initialization, "seed": context.settings.seed}
    if config.initialization == "target_embeddings":
        from fastdraft.modeling.initialize import matrices_digest

        shape["target_embeddings"] = matrices_digest(context.target)
    return shape


def _weights_digest(folder: Path) -> str:
    return digest([file_sha256(path) for path in sorted(folder.glob("*.safetensors"))])


def run(config: DesignConfig, context: StageContext) -> None:
    """Writes `draft/`, a Hugging Face directory, and a manifest with sizes and cost ratios.

    Raises:
        TargetError, TargetError, RecipeError, FastDraftError: each in one line.
    """
    from fastdraft.modeling.drafts import save_draft
    from fastdraft.provenance import describe_run

    artifact = context.folder(NAME)
    planned = plan(config, context.target)
    model = _first_weights(config, context, planned)
    _set_special_ids(model, planned.vocabulary, context.target)
    save_draft(model, artifact.path / "draft", context.target)
    ratios = cost_ratios(planned.draft, planned.target)
    artifact.complete(
        architecture=planned.draft.as_dict(),
        parameters=planned.draft.parameters,
        family={"draft": planned.draft.family, "target": planned.target.family, "reason": planned.reason},
        target={
            "model": context.target.name,
            "revision": context.target.revision,
            "parameters": planned.target.parameters,
            "architecture": planned.target.as_dict(),
        },
        cost_ratio_parameters=ratios["parameters"],
        cost_ratio_bytes=ratios["bytes"],
        vocabulary=planned.vocabulary.as_dict(),
        initialization="from" if planned.source else config.initialization,
        shape_digest=digest(_shape(config, context, planned)),
        provenance=describe_run(),
    )
    _show(context, planned)


def _first_weights(config: DesignConfig, context: StageContext, planned: Plan) -> PreTrainedModel:
    from fastdraft.modeling.drafts import load_draft
    from fastdraft.modeling.initialize import build_draft, set_projected_embeddings

    if planned.source is not None:
        return load_draft(planned.source)
    model = build_draft(planned.draft_config, context.settings.seed)
    if config.initialization == "target_embeddings":
        set_projected_embeddings(model, context.target, context.settings.seed)
    counted = sum(parameter.numel() for parameter in model.parameters())
    if counted != planned.draft.parameters:
        raise TargetError(
            context.target.location,
            f"{counted} parameters",
            f"the formula says {planned.draft.parameters}",
            "report this config as a bug",
        )
    return model


def _set_special_ids(model: PreTrainedModel, vocabulary: Vocabulary, target: Target) -> None:
    """The target's BOS, EOS and padding ids in config and generation config; none of its sampling settings."""
    from transformers import GenerationConfig

    from fastdraft.modeling.families import special_id

    target_config: Any = target.config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, key, special_id(target_config, key))
    eos = list(vocabulary.eos_token_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=vocabulary.pad_token_id,
    )


def cost_ratios(draft: Architecture, target: Architecture) -> dict[str, float]:
    """Draft / target by parameters, and by bytes read per token at equal precision (an untied input embedding is not read)."""
    return {
        "parameters": draft.parameters / target.parameters,
        "bytes": draft.bytes_per_token(8) / target.bytes_per_token(8),
    }


def _show(context: StageContext, planned: Plan) -> None:
    from fastdraft.modeling.architecture import rope_switch
    from fastdraft.modeling.traps import switch_warning

    draft, target = planned.draft, planned.target
    ratios = cost_ratios(draft, target)
    rows: list[list[object]] = [
        [
            "parameters",
            format_count(draft.parameters),
            format_count(target.parameters),
            f"{ratios['parameters']:.4f}",
        ],
        [
            "read per token",
            format_count(draft.read_parameters),
            format_count(target.read_parameters),
            f"{ratios['bytes']:.4f}",
        ],
        ["layers", draft.num_layers, target.num_layers, ""],
        ["hidden size", draft.hidden_size, target.hidden_size, ""],
        ["feed-forward", draft.intermediate_size, target.intermediate_size, ""],
        [
            "heads (key-value)",
            f"{draft.num_heads} ({draft.num_kv_heads})",
            f"{target.num_heads} ({target.num_kv_heads})",
            "",
        ],
    ]
    context.console.table(
        f"draft for {context.target.name} ({draft.family}, vocabulary {draft.vocab_size})",
        ["", "draft", "target", "cost ratio"],
        rows,
    )
    if planned.reason:
        context.console.say(
            f"the draft is of the family {draft.family}, not {target.family}: {planned.reason}"
        )
    if planned.draft.context_length < target.context_length:
        context.console.warn(
            f"the draft's context is {planned.draft.context_length}, the target's {target.context_length}: servers clip to the shorter one"
        )
    if switch := rope_switch(context.target.config):
        context.console.warn(switch_warning(switch))
    if ratios["bytes"] > _TOO_LARGE:
        context.console.warn(
            f"a draft token costs {ratios['bytes']:.2f} of a target token: this draft can hardly pay; make it smaller"
        )
    gains = [f"{mbsu_at(rate, PAPER_K, ratios['bytes']):.2f} at {rate}" for rate in RATES]
    context.console.say(
        f"memory-bound speed-up (by bytes, K = {PAPER_K}) by acceptance rate: {', '.join(gains)}"
    )
