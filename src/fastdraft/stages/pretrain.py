"""pretrain and continue_pretrain: packed shards -> a language model. One stage, two sections.

Decides where each begins (pretrain: the designed draft; continue_pretrain: pretrain's weights from before the rate's decay), how a
token budget becomes steps, and what is left behind: `checkpoint/`, `undecayed/` (WSD only) and `metrics.jsonl`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft.errors import DataError, RecipeError
from fastdraft.provenance import describe_run
from fastdraft.recipe.base import format_count
from fastdraft.recipe.training import ContinuePretrainConfig, PretrainConfig
from fastdraft.run_folder import StageFolder
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastdraft.training.assemble import Resolved
    from fastdraft.training.batches import PackedBatches
    from fastdraft.training.checkpoint import TrainingState
    from fastdraft.training.step import TrainStep
    from fastdraft.training.trainer import Trainer

Name = Literal["pretrain", "continue_pretrain"]
GOOD_EPOCHS = 4
_NO_EFFECT = {"micro_batch_tokens", "checkpoint_every", "validate_every"}
"""Keys that may change while a run is under way: they do not change what is learned."""
_CONTINUED_SEED = 0xC0DE
"""Added to the seed where continue_pretrain would else meet a corpus in the order in which pretrain did."""


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
    import torch

    from fastdraft.modeling.drafts import load_draft, pick_device, save_draft, set_threads
    from fastdraft.training.allocator import kept_memory

    set_threads(context.settings.threads)
    device = pick_device(context.settings.device)
    torch.manual_seed(context.settings.seed)
    artifact, console = context.folder(name), context.console
    model = load_draft(_start_folder(config, context, name), device=device, dtype=torch.float32)
    trainer, resolved = _build_trainer(config, context, name, model, device)
    console.say(f"  {resolved}, {trainer.source.steps} steps")
    with kept_memory(device):
        state = trainer.run()
    if not trainer.world.is_main:
        return
    save_draft(model, artifact.path / "checkpoint", Target.at(_tokenizer_folder(context)))
    fields = _summary(artifact, state)
    artifact.complete(
        **fields, settings=resolved.as_dict(), processes=trainer.world.size, provenance=describe_run()
    )
    trainer.checkpoints.discard()
    losses = ", ".join(f"{corpus} {loss:.3f}" for corpus, loss in fields["validation_loss"].items())
    console.say(f"  {format_count(state.tokens)} tokens, validation loss: {losses or 'no validation rows'}")


def _build_trainer(
    config: PretrainConfig, context: StageContext, name: Name, model: PreTrainedModel, device: Any
) -> tuple[Trainer, Resolved]:
    from fastdraft.modeling.drafts import save_draft
    from fastdraft.training import assemble, rates
    from fastdraft.training.compilation import settle
    from fastdraft.training.loss_path import cross_entropy
    from fastdraft.training.sharding import in_parts, outside
    from fastdraft.training.trainer import Plan, Trainer
    from fastdraft.training.transfer import ahead

    artifact = context.folder(name)
    row_length = context.require("prepare").manifest()["row_length"]
    suggested = rates.batch_tokens("pretrain", assemble.count_parameters(model), config.tokens)
    batch_tokens = config.batch_tokens or max(row_length, suggested)
    halved = isinstance(config, ContinuePretrainConfig) and config.start == "decayed"
    resolved = assemble.resolve(
        config.optimizer,
        "pretrain",
        model,
        device,
        batch_tokens=batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        precision=context.settings.precision,
        halved=halved,
    )
    source = _source(config, context, name, resolved)
    _check_context(model, source.row_length)
    compiled = settle(context.settings.compile, device, source.tokens, context.console.say)
    trained = in_parts(model, "ddp", config.optimizer.kind)
    objective = cross_entropy("auto", device, 1e-5)
    step = assemble.build_step(trained, resolved, objective, device, compiled=compiled)
    plan = Plan(
        title=name,
        key=name,
        factor=assemble.rate_factor(config.schedule, source.steps),
        peak_rate=resolved.learning_rate,
        validate_every=assemble.validate_every(config.validate_every, source.steps),
        checkpoint_every=assemble.checkpoint_every(config.checkpoint_every, source.steps),
        undecayed_step=assemble.undecayed_step(config.schedule, source.steps),
        tensorboard=context.settings.tensorboard,
    )
    validate = _validation(outside(step, model, trained), context, source.rows_per_micro)
    trainer = Trainer(
        artifact.path, model, step, ahead(source, device), plan, context.console, validate, trained=trained
    )
    trainer.save_undecayed = lambda: save_draft(
        model, artifact.path / "undecayed", Target.at(_tokenizer_folder(context))
    )
    return trainer, resolved


def _validation(step: TrainStep, context: StageContext, rows_per_micro: int) -> Any:
    from fastdraft.training.trainer import Validation
    from fastdraft.training.validation import corpus_losses

    losses = corpus_losses(step, context.require("prepare"), rows_per_micro)
    return lambda: Validation({"validation_loss": losses()})


def _source(config: PretrainConfig, context: StageContext, name: Name, resolved: Resolved) -> PackedBatches:
    """Steps of the mixture that use up the budget.

    Raises:
        DataError: when a corpus has fewer rows than its share of one batch.
    """
    from fastdraft.data.mixture import open_mixture
    from fastdraft.training.batches import PackedBatches, text_separator
    from fastdraft.training.distributed import current

    prepare = context.require("prepare")
    row_length = prepare.manifest()["row_length"]
    if resolved.batch_tokens < row_length:
        rule = f"must hold one row of {row_length} tokens"
        raise RecipeError(
            f"{name}.batch_tokens", resolved.batch_tokens, rule, "raise it or lower prepare.row_length"
        )
    rows = resolved.batch_tokens // row_length
    steps = max(1, round(config.tokens / (rows * row_length)))
    used = {corpus: weight for corpus, weight in config.mixture.items() if weight > 0}
    mixture = open_mixture(prepare, used, rows, _row_seed(config, context, name))
    for corpus, epochs in mixture.epochs(steps).items():
        share = used[corpus] / sum(used.values())
        found = mixture.corpora[corpus].rows
        if found < share * rows:
            rule, remedy = (
                f"its share of one batch is {share * rows:.0f} rows",
                f"add data or lower {name}.batch_tokens",
            )
            raise DataError(f"{name}.mixture.{corpus}", f"{found} rows of {row_length} tokens", rule, remedy)
        if epochs > GOOD_EPOCHS:
            context.console.warn(
                f"{name}: the corpus '{corpus}' is read {epochs:.1f} times; more than {GOOD_EPOCHS} passes add little"
            )
    rows_per_micro = max(1, resolved.micro_batch_tokens // row_length)
    separator = text_separator(prepare.manifest())
    return PackedBatches(mixture, steps, row_length, rows, rows_per_micro, separator, share=current().share)


def _row_seed(config: PretrainConfig, context: StageContext, name: Name) -> int:
    """The seed of the order of rows.

    That order follows from the seed and a corpus's place among the mixture's names. A corpus of pretrain's at the same place would come
    in the same order again, the rows already learned first. Other runs keep the run's own seed.
    """
    seed = context.settings.seed
    if name == "pretrain" or not context.has("pretrain"):
        return seed
    before, now = (
        sorted(corpus for corpus, weight in of.mixture.items() if weight > 0)
        for of in (context.section("pretrain"), config)
    )
    return seed + _CONTINUED_SEED if any(a == b for a, b in zip(before, now, strict=False)) else seed


def _check_context(model: PreTrainedModel, row_length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and row_length > limit:
        raise RecipeError(
            "prepare.row_length", row_length, f"must be at most the draft's context of {limit}", "lower it"
        )


def _start_digest(context: StageContext, name: Name) -> str:
    if name == "continue_pretrain" and context.has("pretrain"):
        return context.folder("pretrain").digest()
    design = context.folder("design")
    shape = design.manifest().get("shape_digest") if design.is_complete() else None
    return str(shape or design.digest())


def _start_folder(config: PretrainConfig, context: StageContext, name: Name) -> Path:
    """Where the first weights lie.

    Raises:
        RecipeError: when un-decayed weights are asked for but pretrain's schedule keeps none.
    """
    if name == "pretrain" or not context.has("pretrain"):
        return context.require("design").path / "draft"
    before = context.require("pretrain").path
    if getattr(config, "start", "undecayed") == "decayed":
        return before / "checkpoint"
    if not (before / "undecayed").is_dir():
        rule = "pretrain keeps such weights only with schedule kind wsd"
        raise RecipeError("continue_pretrain.start", "undecayed", rule, "set start: decayed")
    return before / "undecayed"


def _tokenizer_folder(context: StageContext) -> Path:
    return context.folder("design").path / "draft"


def _summary(artifact: StageFolder, state: TrainingState) -> dict[str, Any]:
    from fastdraft.training.metrics import read_metrics
    from fastdraft.training.trainer import final_train_loss

    records = read_metrics(artifact.path)
    validations = [record["validation_loss"] for record in records if "validation_loss" in record]
    return {
        "tokens": state.tokens,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "micro_batch_limit": state.micro_batch_limit or None,
        "train_loss": final_train_loss(records),
        "validation_loss": validations[-1] if validations else {},
        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        "seconds": round(state.seconds, 1),
    }
