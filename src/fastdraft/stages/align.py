"""align: a draft that predicts this very target, by training on what the target wrote.

Begins with the latest pre-trained weights; the loss covers response tokens only; the step with the best block
efficiency on held-out prompts wins, not the lowest loss. Leaves `checkpoint/` and `metrics.jsonl`.
"""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft.console import format_count
from fastdraft.data.mixture import open_mixture
from fastdraft.data.rows import read_all
from fastdraft.data.sparse_logits import read_with_logits
from fastdraft.errors import DataError, RecipeError, TargetError
from fastdraft.functional.distillation import token_loss
from fastdraft.modeling.drafts import load_draft, pick_device, save_draft, set_threads
from fastdraft.modeling.heads import output_head
from fastdraft.modeling.trimmed_head import TrimmedHead
from fastdraft.provenance import describe_run
from fastdraft.recipe.training import AlignConfig, TokenKDConfig
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.training import defaults
from fastdraft.training.batches import (
    AlignmentBatches,
    PackedBatches,
    Sample,
    cut_to_context,
    plan_batches,
    text_separator,
)
from fastdraft.training.distributed import World, join, own_device
from fastdraft.training.fast_decoder import kept_memory
from fastdraft.training.metrics import final_train_loss, read_metrics
from fastdraft.training.objective import CrossEntropy, LoadedTarget, Objective, TokenDistillation
from fastdraft.training.trainer import Trainer
from fastdraft.training.validation import response_scores

VALIDATION_ROWS = 128
DEFAULT_EPOCHS = 3.0
DEFAULT_PRETRAINING_SHARE = 0.1
_PRETRAINING = ("continue_pretrain", "pretrain")  # stages that may come before, the latest first
_NO_EFFECT = {"micro_batch_tokens", "checkpoint_every"}
_MIXTURE_SEED = 0x5EED  # added to the seed: another order of the mixture's rows than in pre-training


def fingerprint(config: AlignConfig, context: StageContext) -> dict[str, Any]:
    """What the weights depend on: the start, the synthetic rows, the mixture, these settings, the seed."""
    mixture = _mixture(context) if _pretraining_share(config, context) else None
    taught = isinstance(config.objective, TokenKDConfig) and config.objective.source == "target"
    return {
        "config": config.model_dump(mode="json", exclude=_NO_EFFECT),
        "precision": context.settings.precision,
        "seed": context.settings.seed,
        "start": start(context)[1],
        "synthesize": context.folder("synthesize").digest(),
        "mixture": mixture,
        "prepare": context.folder("prepare").digest() if mixture else None,
        "num_speculative_tokens": _num_speculative_tokens(context),
        **({"target": context.target.identity()} if taught else {}),
    }


def run(config: AlignConfig, context: StageContext) -> None:
    """Trains, or goes on training, and leaves the best step's weights in `checkpoint/`."""
    console, folder, common = context.console, context.folder("align"), context.settings
    set_threads(common.threads)
    device = own_device(pick_device(common.device))
    torch.manual_seed(common.seed)
    model = load_draft(start(context)[0], device=device, dtype=torch.float32)
    written = [row for row in read_all(context.require("synthesize"), "validation") if row.response_ids]
    # By hash, so that every source and temperature is among them.
    held_out = sorted(written, key=lambda row: sha256(row.row_id.encode()).digest())[:VALIDATION_ROWS]
    with join(device, "align") as world, kept_memory(device):
        settings, source, counts = _settings_and_batches(config, context, model, world)
        compiled = defaults.compiles(common.compile, device, source.tokens)
        rows = f"{format_count(counts['rows'])} responses, {counts['rows_cut']} cut to the draft's context"
        console.say(f"  {settings}, {source.steps} steps{defaults.COMPILED if compiled else ''}; {rows}")
        if not held_out and world.is_main:
            console.warn("align: no held-out responses: the last step's weights are kept instead of the best")
        objective = _objective(config, context, model, device)
        step = defaults.build_step(model, settings, objective, compiled=compiled)
        k, vocabulary = _num_speculative_tokens(context), context.target.vocabulary
        measure = response_scores(step, model, held_out, k, vocabulary, settings.micro_batch_tokens)
        more = {"tensorboard": common.tensorboard, "validate_first": True}
        schedule = defaults.schedule_of(config, "align", settings, source.steps, **more)
        validate = measure if held_out else None
        trainer = Trainer(folder.path, model, step, source, schedule, console, validate, world=world)
        state = trainer.run()
    if not world.is_main:
        return
    save_draft(model, folder.path / "checkpoint", Target.at(context.folder("design").path / "draft"))
    records = read_metrics(folder.path)
    validations = {record["step"]: record for record in records if "validation_loss" in record}
    last = validations.get(state.best_step) or validations.get(state.step) or {}
    before, after = validations.get(0, {}).get("validation_block_efficiency"), state.best_score
    folder.complete(
        **state.summary(),
        **counts,
        trained_tokens=state.trained_tokens,
        best_step=state.best_step if state.best_step >= 0 else state.step,
        start_block_efficiency=before,
        validation_block_efficiency=after,
        validation_loss=last.get("validation_loss", {}),
        train_loss=final_train_loss(records),
        settings=asdict(settings),
        processes=world.size,
        provenance=describe_run(),
    )
    trainer.checkpoints.discard()
    if before is not None and after is not None:
        best = f"best at step {state.best_step} of {state.step}"
        console.say(f"  block efficiency on held-out prompts: {before:.3f} -> {after:.3f}, {best}")


def training_batches(config: AlignConfig, context: StageContext) -> AlignmentBatches:
    """What training reads at each step, for whoever wants to look at it."""
    model = load_draft(start(context)[0], device="cpu", dtype=torch.float32)
    return _settings_and_batches(config, context, model, World())[1]


def start(context: StageContext) -> tuple[Path, str]:
    """Folder and digest of the latest weights before alignment."""
    for stage in _PRETRAINING:
        if context.has(stage):
            folder = context.require(stage)
            return folder.path / "checkpoint", folder.digest()
    design = context.require("design")
    return design.path / "draft", design.digest()


def _settings_and_batches(
    config: AlignConfig, context: StageContext, model: PreTrainedModel, world: World
) -> tuple[defaults.TrainingSettings, AlignmentBatches, dict[str, int]]:
    """The settings, the steps cut with them, and how many rows were kept, cut to the context or dropped."""
    synthesize, seed = context.require("synthesize"), context.settings.seed
    if isinstance(config.objective, TokenKDConfig) and config.objective.source == "stored":
        rows = [Sample.of(*found) for found in read_with_logits(synthesize, "train")]
    else:
        rows = [Sample.of(row) for row in read_all(synthesize, "train")]
    samples, num_cut, num_dropped = cut_to_context(rows, model.config.max_position_embeddings)
    if not samples:
        message = f"align: 0 trained tokens in {len(rows)} responses"
        raise DataError(message, "raise synthesize.tokens, or shorten the prompts")
    lengths = np.array([sample.num_tokens for sample in samples], dtype=np.int64)
    tokens = config.tokens or round(int(lengths.sum()) * DEFAULT_EPOCHS)
    settings = defaults.resolve(config, "align", model, tokens, context.settings.precision)
    plan = plan_batches(lengths, settings.batch_tokens, seed, tokens)
    share, packed = _pretraining_share(config, context), None
    if share:  # steps of the mixture, each of as many tokens as a synthetic step
        prepare = context.require("prepare")
        count = max(1, settings.batch_tokens // prepare.manifest()["row_length"])
        mixture = open_mixture(prepare, _mixture(context), count, seed + _MIXTURE_SEED)
        packed = PackedBatches(mixture, 0, text_separator(prepare.manifest()), world.rank, world.size)
    batches = AlignmentBatches(samples, plan, packed, share, world.rank, world.size)
    return settings, batches, {"rows": len(samples), "rows_cut": num_cut, "rows_dropped": num_dropped}


def _objective(
    config: AlignConfig, context: StageContext, draft: PreTrainedModel, device: torch.device
) -> Objective:
    """What the recipe's objective teaches, with the target loaded where it is asked at every step."""
    objective = config.objective
    if not isinstance(objective, TokenKDConfig):
        return CrossEntropy()
    loss = token_loss(objective.loss)
    if objective.source == "stored":
        return TokenDistillation(loss)
    head = draft.get_output_embeddings()
    ids = head.ids if isinstance(head, TrimmedHead) else None
    target = LoadedTarget(*output_head(context.target.model(device)), ids)
    if target.head.vocab_size != (vocab := draft.config.vocab_size):
        rule = f"distributions over {target.head.vocab_size} ids; the draft's vocabulary has {vocab}"
        raise TargetError(f"target.model: {rule}", "redo the run from design on with this target")
    return TokenDistillation(loss, target)


def _pretraining_share(config: AlignConfig, context: StageContext) -> float:
    """The share asked for; left open it is 0 only where there is nothing to take it from."""
    if config.pretraining_share is not None:
        return config.pretraining_share
    return DEFAULT_PRETRAINING_SHARE if any(map(context.has, (*_PRETRAINING, "prepare"))) else 0.0


def _mixture(context: StageContext) -> dict[str, float]:
    """That of the last pre-training stage; without one every prepared corpus in equal parts."""
    for stage in _PRETRAINING:
        if context.has(stage):
            return dict(context.section(stage).mixture)
    if context.has("prepare"):
        return dict.fromkeys(context.section("prepare").sources, 1.0)
    message = "align.pretraining_share: needs a mixture: continue_pretrain, pretrain or prepared corpora"
    raise RecipeError(message, "add one of these sections or set align.pretraining_share: 0")


def _num_speculative_tokens(context: StageContext) -> int:
    """K at which the best step is chosen: the export's, else 3."""
    return int(getattr(context.sections.get("export"), "num_speculative_tokens", 3))
