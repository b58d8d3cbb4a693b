"""align: a draft that predicts this very target, by training on what the target wrote.

Decides where it begins (the latest pre-trained weights), that the loss covers response tokens only by the generator's own boundaries, that
a share of the steps comes from the pre-training mixture against forgetting, and that the step with the best block efficiency
on held-out prompts wins, not the one with the lowest loss. What is taught is the objective: the target's tokens, or its distribution
at each of them, from the loaded target or as synthesize stored it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.provenance import describe_run
from fastdraft.recipe.base import format_count
from fastdraft.recipe.training import AlignConfig, TokenKDConfig
from fastdraft.run_folder import StageFolder
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastdraft.data.rows import SyntheticRow
    from fastdraft.training.assemble import Resolved
    from fastdraft.training.batches import AlignmentBatches, PackedBatches, ResponseLogits, Sample
    from fastdraft.training.checkpoint import TrainingState
    from fastdraft.training.objective import Objective
    from fastdraft.training.trainer import Trainer

VALIDATION_ROWS = 128
DEFAULT_PRETRAINING_SHARE = 0.1
DEFAULT_NUM_SPECULATIVE_TOKENS = 3
DEFAULT_EPOCHS = 3.0
_PRETRAINING = ("continue_pretrain", "pretrain")
"""Stages that may come before, the latest first."""
_NO_EFFECT = {"micro_batch_tokens", "checkpoint_every"}
_MIXTURE_SEED = 0x5EED
"""Added to the seed, so that alignment sees the mixture's rows in another order than pre-training did."""


def fingerprint(config: AlignConfig, context: StageContext) -> dict[str, Any]:
    """What the weights depend on: the start, the synthetic rows, the mixture, these settings, the seed."""
    mixture = _mixture(context) if _pretraining_share(config, context) else None
    teaching = {"target": _target_identity(context.target)} if _needs_target(config) else {}
    return {
        "config": config.model_dump(mode="json", exclude=_NO_EFFECT),
        "precision": context.settings.precision,
        "seed": context.settings.seed,
        "start": _start(context)[1],
        "synthesize": context.folder("synthesize").digest(),
        "mixture": mixture,
        "prepare": context.folder("prepare").digest() if mixture else None,
        "num_speculative_tokens": _num_speculative_tokens(context),
        **teaching,
    }


def _needs_target(config: AlignConfig) -> bool:
    return isinstance(config.objective, TokenKDConfig) and config.objective.source == "target"


def _target_identity(target: Target) -> dict[str, Any]:

    return target.identity()


def run(config: AlignConfig, context: StageContext) -> None:
    """Trains, or goes on training, and leaves the best step's weights in `checkpoint/`."""
    import torch

    from fastdraft.modeling.drafts import load_draft, pick_device, save_draft, set_threads
    from fastdraft.training.allocator import kept_memory

    set_threads(context.settings.threads)
    device = pick_device(context.settings.device)
    torch.manual_seed(context.settings.seed)
    artifact = context.folder("align")
    model = load_draft(_start(context)[0], device=device, dtype=torch.float32)
    trainer, resolved, counts = _build_trainer(config, context, model, device)
    responses = f"{format_count(counts['rows'])} responses, {counts['rows_cut']} cut to the draft's context"
    context.console.say(f"  {resolved}, {trainer.source.steps} steps; {responses}")
    with kept_memory(device):
        state = trainer.run()
    if not trainer.world.is_main:
        return
    save_draft(model, artifact.path / "checkpoint", Target.at(context.folder("design").path / "draft"))
    fields = _summary(artifact.path, state)
    artifact.complete(
        **fields,
        **counts,
        settings=resolved.as_dict(),
        processes=trainer.world.size,
        provenance=describe_run(),
    )
    trainer.checkpoints.discard()
    before, after = fields["start_block_efficiency"], fields["validation_block_efficiency"]
    if before is not None and after is not None:
        best = f"best at step {state.best_step} of {state.step}"
        context.console.say(f"  block efficiency on held-out prompts: {before:.3f} -> {after:.3f}, {best}")


def _build_trainer(
    config: AlignConfig, context: StageContext, model: PreTrainedModel, device: Any
) -> tuple[Trainer, Resolved, dict[str, int]]:
    from fastdraft.data.rows import read_all
    from fastdraft.training import assemble
    from fastdraft.training.compilation import settle
    from fastdraft.training.sharding import in_parts, outside
    from fastdraft.training.trainer import Plan, Trainer
    from fastdraft.training.transfer import ahead
    from fastdraft.training.validation import HeldOutResponses

    artifact, synthesize = context.folder("align"), context.require("synthesize")
    source, resolved, counts = _batches(config, context, model, device)
    compiled = settle(context.settings.compile, device, source.tokens, context.console.say)
    trained = in_parts(model, "ddp", config.optimizer.kind)
    step = assemble.build_step(
        trained, resolved, _objective(config, context, model, device), device, compiled=compiled
    )
    held_out = _held_out(list(read_all(synthesize, "validation")))
    if not held_out:
        context.console.warn(
            "align: no held-out responses, so the last step's weights are kept instead of the best"
        )
    plan = Plan(
        title="align",
        key="align",
        factor=assemble.rate_factor(config.schedule, source.steps),
        peak_rate=resolved.learning_rate,
        validate_every=assemble.validate_every(config.validate_every, source.steps),
        validate_first=True,
        checkpoint_every=assemble.checkpoint_every(config.checkpoint_every, source.steps),
        tensorboard=context.settings.tensorboard,
    )
    k, vocabulary, size = (
        _num_speculative_tokens(context),
        context.target.vocabulary,
        resolved.micro_batch_tokens,
    )
    validate = (
        HeldOutResponses(model, outside(step, model, trained), held_out, k, vocabulary, size)
        if held_out
        else None
    )
    trainer = Trainer(
        artifact.path, model, step, ahead(source, device), plan, context.console, validate, trained=trained
    )
    return trainer, resolved, counts


def training_batches(config: AlignConfig, context: StageContext) -> AlignmentBatches:
    """What training reads at each step, for whoever wants to look at it.

    Raises:
        FastDraftError: when a stage that it builds on has not finished. FastDraftError: when nothing is left to train on.
    """
    import torch

    from fastdraft.modeling.drafts import load_draft

    device = torch.device("cpu")
    return _batches(
        config, context, load_draft(_start(context)[0], device=device, dtype=torch.float32), device
    )[0]


def _batches(
    config: AlignConfig, context: StageContext, model: PreTrainedModel, device: Any
) -> tuple[AlignmentBatches, Resolved, dict[str, int]]:
    """The steps, the settings with which they were cut, and what became of the rows."""
    from fastdraft.training import assemble, rates

    samples, counts = _samples(
        _responses(config, context.require("synthesize"), model), model.config.max_position_embeddings
    )
    total = sum(sample.num_tokens for sample in samples)
    budget = config.tokens or round(total * DEFAULT_EPOCHS)
    batch_tokens = config.batch_tokens or rates.batch_tokens(
        "align", assemble.count_parameters(model), budget
    )
    resolved = assemble.resolve(
        config.optimizer,
        "align",
        model,
        device,
        batch_tokens=batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        precision=context.settings.precision,
    )
    return _source(config, context, samples, resolved), resolved, counts


def _objective(config: AlignConfig, context: StageContext, model: PreTrainedModel, device: Any) -> Objective:
    """What the recipe's objective teaches, with the target loaded where it is asked at every step.

    Raises:
        TargetError: when the target scores other ids than the draft.
    """
    from fastdraft.functional.distillation import token_loss
    from fastdraft.modeling.heads import output_head
    from fastdraft.training.loss_path import cross_entropy
    from fastdraft.training.objective import LoadedTarget, TokenDistillation

    objective = config.objective
    if not isinstance(objective, TokenKDConfig):
        return cross_entropy("auto", device)
    loss = token_loss(objective.loss, 0.5)
    if objective.source == "stored":
        return TokenDistillation(loss)
    target = LoadedTarget(*output_head(context.target.model(device)))
    _same_vocabulary("target.model", target.head.vocab_size, model)
    return TokenDistillation(loss, target)


def _same_vocabulary(where: str, size: int, model: PreTrainedModel) -> None:
    wanted = int(model.config.vocab_size)
    if size != wanted:
        rule = f"the draft's vocabulary has {wanted}; both must be the target's"
        raise TargetError(
            where, f"distributions over {size} ids", rule, "redo the run from design on with this target"
        )


def _responses(
    config: AlignConfig, synthesize: StageFolder, model: PreTrainedModel
) -> Iterator[tuple[SyntheticRow, ResponseLogits | None]]:
    """The training rows, each with its stored logits where the objective wants them.

    Raises:
        FastDraftError: when the logits are missing, damaged or another unit's.
        TargetError: when they are over other ids than the draft's.
    """
    from fastdraft.data.rows import read_all
    from fastdraft.data.sparse_logits import read_with_logits

    if not isinstance(config.objective, TokenKDConfig) or config.objective.source == "target":
        yield from ((row, None) for row in read_all(synthesize, "train"))
        return
    yield from read_with_logits(synthesize, "train")


def _samples(
    rows: Iterable[tuple[SyntheticRow, ResponseLogits | None]], context_length: int
) -> tuple[list[Sample], dict[str, int]]:
    """What is trained on, and how many rows were whole, cut to the draft's context, or dropped because nothing was left.

    Raises:
        FastDraftError: when no response token is left to train on.
    """
    from fastdraft.training.batches import as_samples, cut_to_context

    samples = as_samples(rows)
    kept, num_cut, num_dropped = cut_to_context(samples, context_length)
    if not kept:
        found, rule = (
            f"0 trained tokens in {len(samples)} responses",
            "there must be response tokens to train on",
        )
        raise FastDraftError("align", found, rule, "raise synthesize.tokens, or shorten the prompts")
    return kept, {"rows": len(kept), "rows_cut": num_cut, "rows_dropped": num_dropped}


def _source(
    config: AlignConfig, context: StageContext, samples: list[Sample], resolved: Resolved
) -> AlignmentBatches:
    import numpy as np

    from fastdraft.training.batches import AlignmentBatches, plan_batches
    from fastdraft.training.distributed import current

    lengths = np.array([sample.num_tokens for sample in samples], dtype=np.int64)
    plan = plan_batches(
        lengths,
        resolved.batch_tokens,
        context.settings.seed,
        epochs=None if config.tokens else DEFAULT_EPOCHS,
        tokens=config.tokens,
    )
    share = _pretraining_share(config, context)
    packed = _packed(context, resolved) if share else None
    return AlignmentBatches(
        samples, plan, 0, resolved.micro_batch_tokens, packed, share, share=current().share
    )


def _packed(context: StageContext, resolved: Resolved) -> PackedBatches:
    """Steps of the pre-training mixture, each of as many tokens as a synthetic step."""
    from fastdraft.data.mixture import open_mixture
    from fastdraft.training.batches import PackedBatches, text_separator
    from fastdraft.training.distributed import current

    prepare, weights = context.require("prepare"), _mixture(context)
    row_length, separator = prepare.manifest()["row_length"], text_separator(prepare.manifest())
    rows = max(1, resolved.batch_tokens // row_length)
    mixture = open_mixture(prepare, weights, rows, context.settings.seed + _MIXTURE_SEED)
    rows_per_micro = max(1, resolved.micro_batch_tokens // row_length)
    return PackedBatches(mixture, 0, row_length, rows, rows_per_micro, separator, share=current().share)


def _pretraining_share(config: AlignConfig, context: StageContext) -> float:
    """The share asked for; left open it is 0 only where there is nothing to take it from."""
    if config.pretraining_share is not None:
        return config.pretraining_share
    return DEFAULT_PRETRAINING_SHARE if any(map(context.has, (*_PRETRAINING, "prepare"))) else 0.0


def _mixture(context: StageContext) -> dict[str, float]:
    """That of the last pre-training stage; for a draft that an earlier run pre-trained, every prepared corpus in equal parts."""
    for stage in _PRETRAINING:
        if context.has(stage):
            return dict(context.section(stage).mixture)
    if context.has("prepare"):
        return dict.fromkeys(context.section("prepare").sources, 1.0)
    rule = "needs the mixture of continue_pretrain or pretrain, or prepared corpora"
    raise RecipeError(
        "align.pretraining_share",
        "no such section",
        rule,
        "add one of them or set align.pretraining_share: 0",
    )


def _start(context: StageContext) -> tuple[Path, str]:
    """Folder and digest of the latest weights before alignment.

    Raises:
        FastDraftError: when the stage that trains them has not finished.
    """
    for stage in _PRETRAINING:
        if context.has(stage):
            artifact = context.require(stage)
            return artifact.path / "checkpoint", artifact.digest()
    design = context.require("design")
    return design.path / "draft", design.digest()


def _num_speculative_tokens(context: StageContext) -> int:
    """K at which the best step is chosen: the export's, else 3."""
    return (
        int(context.section("export").num_speculative_tokens)
        if context.has("export")
        else DEFAULT_NUM_SPECULATIVE_TOKENS
    )


def _held_out(rows: list[SyntheticRow]) -> list[SyntheticRow]:
    """At most VALIDATION_ROWS rows, chosen by hash so that every source and temperature is among them."""
    return sorted(
        (row for row in rows if row.response_ids),
        key=lambda row: hashlib.sha256(row.row_id.encode()).digest(),
    )[:VALIDATION_ROWS]


def _summary(folder: Path, state: TrainingState) -> dict[str, Any]:
    from fastdraft.training.metrics import read_metrics
    from fastdraft.training.trainer import final_train_loss

    records = read_metrics(folder)
    validations = {record["step"]: record for record in records if "validation_loss" in record}
    last = validations.get(state.best_step) or validations.get(state.step) or {}
    return {
        "tokens": state.tokens,
        "trained_tokens": state.trained_tokens,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "micro_batch_limit": state.micro_batch_limit or None,
        "best_step": state.best_step if state.best_step >= 0 else state.step,
        "start_block_efficiency": validations.get(0, {}).get("validation_block_efficiency"),
        "validation_block_efficiency": state.best_score,
        "validation_loss": last.get("validation_loss", {}),
        "train_loss": final_train_loss(records),
        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        "seconds": round(state.seconds, 1),
    }
