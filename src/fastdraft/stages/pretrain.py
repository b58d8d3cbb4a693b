"""pretrain and continue_pretrain: packed shards -> a language model. One stage, two sections.

Leaves `checkpoint/`, `undecayed/` (the weights from before the rate's decay, for schedule kind wsd) and `metrics.jsonl`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fastdraft.data.mixture import open_mixture
from fastdraft.data.shards import open_corpus
from fastdraft.errors import DataError, RecipeError
from fastdraft.modeling.drafts import load_draft, pick_device, save_draft, set_threads
from fastdraft.provenance import describe_run
from fastdraft.recipe.base import format_count
from fastdraft.recipe.training import ContinuePretrainConfig, PretrainConfig
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.training import defaults
from fastdraft.training.batches import PackedBatches, text_separator
from fastdraft.training.checkpoint import TrainingState
from fastdraft.training.distributed import World, join, own_device
from fastdraft.training.fast_decoder import kept_memory
from fastdraft.training.metrics import final_train_loss, read_metrics
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.trainer import Trainer, TrainingSchedule
from fastdraft.training.validation import corpus_losses

Name = Literal["pretrain", "continue_pretrain"]
GOOD_EPOCHS = 4
"""More passes over a corpus add little (arXiv 2305.16264)."""
Z_LOSS = 1e-5
"""Weight of the squared log-partition in the loss (PaLM, arXiv 2204.02311)."""
_NO_EFFECT = {"micro_batch_tokens", "checkpoint_every", "validate_every"}
"""Keys that may change while a run is under way: they do not change what is learned."""
_CONTINUED_SEED = 0xC0DE
"""Added to the seed: continue_pretrain must not meet a corpus in the order in which pretrain did, the rows already learned first."""


def fingerprint(config: PretrainConfig, context: StageContext, name: Name) -> dict[str, Any]:
    """What the weights depend on: the draft's shape, vocabulary and start, the prepared rows, these settings, the seed."""
    return {
        "config": config.model_dump(mode="json", exclude=_NO_EFFECT),
        "precision": context.settings.precision,
        "seed": context.settings.seed,
        "start": _start_digest(context, name),
        "prepare": context.folder("prepare").digest(),
    }


def run(config: PretrainConfig, context: StageContext, name: Name) -> None:
    """Trains, or goes on training, until the budget is used; then writes `checkpoint/` and the manifest."""
    folder, tokenizer = context.folder(name), Target.at(context.folder("design").path / "draft")
    set_threads(context.settings.threads)
    device = own_device(pick_device(context.settings.device))
    torch.manual_seed(context.settings.seed)
    model = load_draft(_start_folder(config, context, name), device=device, dtype=torch.float32)
    with join(device, name) as world, kept_memory(device):
        settings, source = _settings_and_rows(config, context, name, model, world)
        if world.is_main:
            context.console.say(f"  {settings}, {source.steps} steps")
        compiled, why = defaults.compiles(context.settings.compile, device, source.tokens)
        if why and world.is_main:
            context.console.say(f"  {why}")
        step = defaults.build_step(model, settings, CrossEntropy(Z_LOSS), device, compiled=compiled)
        schedule = TrainingSchedule(
            name=name,
            factor=defaults.rate_factor(config.schedule, source.steps),
            peak_rate=settings.learning_rate,
            micro_batch_tokens=settings.micro_batch_tokens,
            validate_every=defaults.validate_every(config.validate_every, source.steps),
            checkpoint_every=defaults.checkpoint_every(config.checkpoint_every, source.steps),
            undecayed_step=defaults.undecayed_step(config.schedule, source.steps),
            tensorboard=context.settings.tensorboard,
        )
        prepare = context.require("prepare")
        held_out = {
            corpus: open_corpus(prepare, corpus, "validation") for corpus in prepare.manifest()["corpora"]
        }
        validate = corpus_losses(step, held_out, settings.micro_batch_tokens, source.separator)
        trainer = Trainer(folder.path, model, step, source, schedule, context.console, validate, world=world)
        trainer.save_undecayed = lambda: save_draft(model, folder.path / "undecayed", tokenizer)
        state = trainer.run()
    if not world.is_main:
        return
    save_draft(model, folder.path / "checkpoint", tokenizer)
    fields = _summary(folder.path, state)
    folder.complete(**fields, settings=settings.as_dict(), processes=world.size, provenance=describe_run())
    trainer.checkpoints.discard()
    losses = ", ".join(f"{corpus} {loss:.3f}" for corpus, loss in fields["validation_loss"].items())
    context.console.say(
        f"  {format_count(state.tokens)} tokens, validation loss: {losses or 'no validation rows'}"
    )


def _settings_and_rows(
    config: PretrainConfig, context: StageContext, name: Name, model: PreTrainedModel, world: World
) -> tuple[defaults.TrainingSettings, PackedBatches]:
    """The settings that the recipe leaves open or not, and steps of the mixture that use up the budget."""
    prepare = context.require("prepare")
    row_length = prepare.manifest()["row_length"]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and row_length > limit:
        raise RecipeError(
            f"prepare.row_length: {row_length}; must be at most the draft's context of {limit}", "lower it"
        )
    suggested = defaults.batch_tokens("pretrain", defaults.count_parameters(model), config.tokens)
    settings = defaults.resolve(
        config.optimizer,
        "pretrain",
        model,
        model.device,
        batch_tokens=config.batch_tokens or max(row_length, suggested),
        micro_batch_tokens=config.micro_batch_tokens,
        precision=context.settings.precision,
        halved=isinstance(config, ContinuePretrainConfig) and config.start == "decayed",
    )
    if settings.batch_tokens < row_length:
        rule = f"must hold one row of {row_length} tokens"
        raise RecipeError(
            f"{name}.batch_tokens: {settings.batch_tokens}; {rule}", "raise it or lower prepare.row_length"
        )
    rows = settings.batch_tokens // row_length
    steps = max(1, round(config.tokens / (rows * row_length)))
    seed = context.settings.seed + (_CONTINUED_SEED if name == "continue_pretrain" else 0)
    mixture = open_mixture(prepare, config.mixture, rows, seed)
    epochs = mixture.epochs(steps)
    for corpus in mixture.names:
        share = config.mixture[corpus] / sum(config.mixture.values())
        found = mixture.corpora[corpus].rows
        if found < share * rows:
            raise DataError(
                f"{name}.mixture.{corpus}: {found} rows of {row_length} tokens; its share of one batch is {share * rows:.0f} rows",
                f"add data or lower {name}.batch_tokens",
            )
        if epochs[corpus] > GOOD_EPOCHS and world.is_main:
            more = f"more than {GOOD_EPOCHS} passes add little"
            context.console.warn(f"{name}: the corpus '{corpus}' is read {epochs[corpus]:.1f} times; {more}")
    separator = text_separator(prepare.manifest())
    return settings, PackedBatches(mixture, steps, separator, world.rank, world.size)


def _start_digest(context: StageContext, name: Name) -> str:
    if name == "continue_pretrain" and context.has("pretrain"):
        return context.folder("pretrain").digest()
    design = context.folder("design")
    shape = design.manifest().get("shape_digest") if design.is_complete() else None
    return str(shape or design.digest())


def _start_folder(config: PretrainConfig, context: StageContext, name: Name) -> Path:
    """Where the first weights lie."""
    if name == "pretrain" or not context.has("pretrain"):
        return context.require("design").path / "draft"
    before = context.require("pretrain").path
    if isinstance(config, ContinuePretrainConfig) and config.start == "decayed":
        return before / "checkpoint"
    if not (before / "undecayed").is_dir():
        rule = "pretrain keeps such weights only with schedule kind wsd"
        raise RecipeError(f"continue_pretrain.start: undecayed; {rule}", "set start: decayed")
    return before / "undecayed"


def _summary(folder: Path, state: TrainingState) -> dict[str, Any]:
    records = read_metrics(folder)
    validations = [record["validation_loss"] for record in records if "validation_loss" in record]
    return {
        **state.summary(),
        "train_loss": final_train_loss(records),
        "validation_loss": validations[-1] if validations else {},
    }
