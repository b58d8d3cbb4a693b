"""pretrain and continue_pretrain: packed shards -> a language model. One stage, two sections.

Leaves `checkpoint/`, `undecayed/` (the weights from before the rate's decay, with schedule kind wsd) and
`metrics.jsonl`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from fastdraft.console import format_count
from fastdraft.data.mixture import open_mixture
from fastdraft.data.shards import open_corpus
from fastdraft.errors import DataError, RecipeError
from fastdraft.modeling.drafts import load_draft, pick_device, save_draft, set_threads
from fastdraft.provenance import describe_run
from fastdraft.recipe.training import ContinuePretrainConfig, PretrainConfig
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.training import defaults
from fastdraft.training.batches import PackedBatches, text_separator
from fastdraft.training.distributed import World, join, own_device
from fastdraft.training.fast_decoder import kept_memory
from fastdraft.training.metrics import final_train_loss, read_metrics
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.trainer import Trainer
from fastdraft.training.validation import corpus_losses

Name = Literal["pretrain", "continue_pretrain"]
GOOD_EPOCHS = 4  # more passes over a corpus add little (arXiv 2305.16264)
Z_LOSS = 1e-5  # weight of the squared log-partition in the loss (PaLM, arXiv 2204.02311)
_NO_EFFECT = {"micro_batch_tokens", "checkpoint_every", "validate_every"}  # on what is learned
# Added to the seed: continue_pretrain must not meet a corpus in the order in which pretrain did.
_CONTINUED_SEED = 0xC0DE


def fingerprint(config: PretrainConfig, context: StageContext, name: Name) -> dict[str, Any]:
    """What the weights depend on: the draft's start, the prepared rows, these settings, the seed."""
    if name == "continue_pretrain" and context.has("pretrain"):
        start = context.folder("pretrain").digest()
    else:
        design = context.folder("design")
        shape = design.manifest().get("shape_digest") if design.is_complete() else None
        start = str(shape or design.digest())
    return {
        "config": config.model_dump(mode="json", exclude=_NO_EFFECT),
        "precision": context.settings.precision,
        "seed": context.settings.seed,
        "start": start,
        "prepare": context.folder("prepare").digest(),
    }


def run(config: PretrainConfig, context: StageContext, name: Name) -> None:
    """Trains, or goes on training, until the budget is used; then writes `checkpoint/` and the manifest."""
    folder, prepare, console = context.folder(name), context.require("prepare"), context.console
    tokenizer, common = Target.at(context.folder("design").path / "draft"), context.settings
    set_threads(common.threads)
    device = own_device(pick_device(common.device))
    torch.manual_seed(common.seed)
    model = load_draft(_start_folder(config, context, name), device=device, dtype=torch.float32)
    row_length, limit = prepare.manifest()["row_length"], model.config.max_position_embeddings
    if row_length > limit:
        rule = f"must be at most the draft's context of {limit}"
        raise RecipeError(f"prepare.row_length: {row_length}; {rule}", "lower it")
    halved = isinstance(config, ContinuePretrainConfig) and config.start == "decayed"
    settings = defaults.resolve(
        config, "pretrain", model, config.tokens, common.precision, row_length=row_length, halved=halved
    )
    with join(device, name) as world, kept_memory(device):
        source = _rows(config, context, name, settings.batch_tokens, world)
        compiled = defaults.compiles(common.compile, device, source.tokens)
        console.say(f"  {settings}, {source.steps} steps{defaults.COMPILED if compiled else ''}")
        step = defaults.build_step(model, settings, CrossEntropy(Z_LOSS), compiled=compiled)
        held_out = {name: open_corpus(prepare, name, "validation") for name in prepare.manifest()["corpora"]}
        validate = corpus_losses(step, held_out, settings.micro_batch_tokens, source.separator)
        schedule = defaults.schedule_of(config, name, settings, source.steps, tensorboard=common.tensorboard)
        trainer = Trainer(folder.path, model, step, source, schedule, console, validate, world=world)
        trainer.save_undecayed = lambda: save_draft(model, folder.path / "undecayed", tokenizer)
        state = trainer.run()
    if not world.is_main:
        return
    save_draft(model, folder.path / "checkpoint", tokenizer)
    records = read_metrics(folder.path)
    losses: dict[str, float] = next(
        (r["validation_loss"] for r in reversed(records) if "validation_loss" in r), {}
    )
    fields = {"train_loss": final_train_loss(records), "validation_loss": losses}
    about = {"settings": asdict(settings), "processes": world.size, "provenance": describe_run()}
    folder.complete(**state.summary(), trained_tokens=state.trained_tokens, **fields, **about)
    trainer.checkpoints.discard()
    words = ", ".join(f"{corpus} {loss:.3f}" for corpus, loss in losses.items()) or "no validation rows"
    console.say(f"  {format_count(state.tokens)} tokens, validation loss: {words}")


def _rows(
    config: PretrainConfig, context: StageContext, name: Name, batch_tokens: int, world: World
) -> PackedBatches:
    """Steps of the mixture that use up the budget."""
    prepare = context.require("prepare")
    row_length = prepare.manifest()["row_length"]
    if batch_tokens < row_length:
        message = f"{name}.batch_tokens: {batch_tokens}; must hold one row of {row_length} tokens"
        raise RecipeError(message, "raise it or lower prepare.row_length")
    rows = batch_tokens // row_length
    steps = max(1, round(config.tokens / (rows * row_length)))
    seed = context.settings.seed + (_CONTINUED_SEED if name == "continue_pretrain" else 0)
    mixture = open_mixture(prepare, config.mixture, rows, seed)
    for corpus, epochs in mixture.epochs(steps).items():
        share = config.mixture[corpus] / sum(config.mixture.values()) * rows
        found = mixture.corpora[corpus].rows
        if found < share:
            rule = f"its share of one batch is {share:.0f} rows"
            message = f"{name}.mixture.{corpus}: {found} rows of {row_length} tokens; {rule}"
            raise DataError(message, f"add data or lower {name}.batch_tokens")
        if epochs > GOOD_EPOCHS and world.is_main:
            more = f"more than {GOOD_EPOCHS} passes add little"
            context.console.warn(f"{name}: the corpus '{corpus}' is read {epochs:.1f} times; {more}")
    return PackedBatches(mixture, steps, text_separator(prepare.manifest()), world.rank, world.size)


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
