"""Which runtime writes as the target, as a recipe names it or as `auto` finds it, and how it is opened.

Decides what `auto` stands for on this machine (OpenVINO on a CPU where it is installed and its converter takes the target's family,
else transformers, never a server; but begun text is finished by the engine that began it, since a run's rows come from one
distribution); which engines need the target's weights here; and that two engines over one
loaded target are opened: one that answers, one that ends a text at the end of the user's turn (Magpie). Imports no runtime
before one is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter, ValidationError

from fastdraft.errors import FastDraftError, Halving, MissingExtra
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.data import (
    AutoEngineConfig,
    ChosenEngine,
    EngineConfig,
    HuggingFaceEngineConfig,
    OpenAIEngineConfig,
    OpenVINOEngineConfig,
)
from fastdraft.run_folder import FINGERPRINT
from fastdraft.runtimes.openvino import require_openvino
from fastdraft.runtimes.openvino_export import NOT_CONVERTED, export_openvino, unconverted_family

if TYPE_CHECKING:
    from fastdraft.functional.generation import Engine
    from fastdraft.modeling.vocabulary import Vocabulary
    from fastdraft.run_folder import StageFolder
    from fastdraft.stages.context import StageContext


_STAGE = "synthesize"
_CONVERTED = "converted"
"""Scratch of the stage (see `artifacts.SCRATCH`): the target as OpenVINO runs it."""
NOBODY = "none"
"""Stands for the engine where every answer is there already."""


def require_installed(settings: EngineConfig) -> None:
    """Looks whether what the named engine needs is installed; `auto` takes what there is.

    Raises:
        MissingExtra: naming the first library that is missing.
    """
    if isinstance(settings, OpenVINOEngineConfig):
        require_openvino()
    if isinstance(settings, OpenAIEngineConfig) and find_spec("httpx") is None:
        raise MissingExtra("httpx", "server")


_Local = HuggingFaceEngineConfig | OpenVINOEngineConfig
"""What `auto` may stand for: it never asks a server."""
_LOCAL: TypeAdapter[_Local] = TypeAdapter(Annotated[_Local, Field(discriminator="kind")])
_OPENVINO_FOR: dict[str, OpenVINOEngineConfig] = {
    "auto": OpenVINOEngineConfig(),
    "fp32": OpenVINOEngineConfig(weights="fp32", precision="exact"),
    "bf16": OpenVINOEngineConfig(weights="fp16"),
    "fp16": OpenVINOEngineConfig(weights="fp16"),
}
"""What `auto` runs for a `target.dtype`: a precision that the recipe names is kept."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine that writes, and why it is this one."""

    settings: ChosenEngine
    reason: str
    """A clause for the user."""
    by_recipe: bool = False
    """The recipe names it: nothing may take its place."""

    def __str__(self) -> str:
        """For example `openvino (int8): on a CPU the fastest that is installed`."""
        settings = self.settings
        weights = (
            f" ({settings.weights}, {settings.device})" if isinstance(settings, OpenVINOEngineConfig) else ""
        )
        return f"{settings.kind}{weights}: {self.reason}"


def choose_engine(settings: EngineConfig, context: StageContext) -> EngineChoice:
    """Settles `auto`; called before the fingerprint, so that it names the engine that really writes.

    Args:
        settings: The recipe's `engine`.
        context: Names the device, the target's precision and the folder in which work may have begun.

    Raises:
        RecipeError: for a `run.device` that is unknown or not there.
        FastDraftError: when unfinished work was begun by OpenVINO, which is not installed here.
    """
    if not isinstance(settings, AutoEngineConfig):
        return EngineChoice(settings, "as the recipe says", by_recipe=True)
    artifact = context.folder(_STAGE)
    begun = _begun(artifact)
    if begun is not None and artifact.is_complete():
        return EngineChoice(begun, "it wrote what is there")
    if isinstance(begun, OpenVINOEngineConfig):
        _require_to_go_on(artifact)
    choice = _fastest_here(context)
    return choice if begun in (None, choice.settings) else EngineChoice(begun, "it began what is there")


def _fastest_here(context: StageContext) -> EngineChoice:
    from fastdraft.modeling.drafts import pick_device

    device = pick_device(context.settings.device)
    if device.type != "cpu":
        return EngineChoice(HuggingFaceEngineConfig(), f"the target runs on {device}")
    try:
        require_openvino()
    except MissingExtra as error:
        reason = (
            f"{error.library} is not installed; with it OpenVINO would write, faster on a CPU: {error.remedy}"
        )
        return EngineChoice(HuggingFaceEngineConfig(), reason)
    family = unconverted_family(context.target)
    if family:
        return EngineChoice(
            HuggingFaceEngineConfig(), f"{family} is not converted to OpenVINO: {NOT_CONVERTED[family]}"
        )
    return EngineChoice(_OPENVINO_FOR[context.target.dtype], "the fastest on a CPU")


def _begun(artifact: StageFolder) -> _Local | None:
    """The engine of work that was begun; None when there is none, or none that `auto` could stand for."""
    if not (artifact.path / FINGERPRINT).exists():
        return None
    settings = artifact.stored_fingerprint().get("settings")
    try:
        return _LOCAL.validate_python(settings.get("engine") if isinstance(settings, dict) else None)
    except ValidationError:
        return None


def _require_to_go_on(artifact: StageFolder) -> None:
    try:
        require_openvino()
    except MissingExtra as error:
        found = f"settings.engine.kind (openvino -> huggingface, for {error.library} is not installed here)"
        rule = "the engine that began this text must finish it"
        raise FastDraftError(
            artifact.path, found, rule, f"{error.remedy}; or redo it with --redo {_STAGE}"
        ) from None


def uses_weights(settings: EngineConfig) -> bool:
    """Whether the target's weights must be on this machine; `auto` only stands for engines that load them."""
    return not isinstance(settings, OpenAIEngineConfig) or settings.logprobs == "target"


@dataclass(frozen=True)
class Engines:
    """What synthesize asks."""

    answering: Engine
    instructing: Engine
    """Ends a text where a user's turn ends."""
    context_length: int
    """Most positions of a prompt and its answer."""


class NoEngine:
    """Stands where every answer is there already: asking it would be a fault in this program."""

    name = NOBODY

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """Raises:
        AssertionError: always.
        """
        raise AssertionError("nothing is to be asked")


def no_engines(context_length: int) -> Engines:
    """For answers that stand already."""
    return Engines(NoEngine(), NoEngine(), context_length)


def open_engines(
    settings: ChosenEngine,
    context: StageContext,
    vocabulary: Vocabulary,
    turns: Vocabulary,
    *,
    batch_rows: int,
    end_loops: bool,
    on_answer: Callable[[int], None] | None = None,
    stage: str = _STAGE,
) -> Engines:
    """Loads the target once and opens both engines over it.

    Args:
        settings: From `choose_engine`.
        context: Names the target, the device, the threads and, for an export, the folder.
        vocabulary: Says which ids end an answer.
        turns: The same for an instruction.
        batch_rows: Prompts written together.
        end_loops: Ends an answer that has run into a loop.
        on_answer: Called with the number of answers finished since the last call.
        stage: Whose folder holds the target's export, as its scratch.

    Raises:
        FastDraftError: when the target cannot be loaded, converted or run there.
    """
    if isinstance(settings, OpenVINOEngineConfig):
        return _open_openvino(
            settings,
            context,
            vocabulary,
            turns,
            batch_rows=batch_rows,
            end_loops=end_loops,
            on_answer=on_answer,
            stage=stage,
        )
    if isinstance(settings, OpenAIEngineConfig):
        return _open_openai(settings, context, vocabulary, turns, on_answer)
    from fastdraft.modeling.drafts import pick_device
    from fastdraft.runtimes.huggingface import HuggingFaceEngine

    model = context.target.model(pick_device(context.settings.device))
    halving = Halving(f"{stage}.batch_rows", context.console.warn)
    answering = HuggingFaceEngine(
        model, vocabulary, batch_rows, on_answer, end_loops=end_loops, halving=halving
    )
    instructing = HuggingFaceEngine(model, turns, batch_rows, end_loops=True, halving=halving)
    return Engines(answering, instructing, answering.context_length)


def _open_openvino(
    settings: OpenVINOEngineConfig,
    context: StageContext,
    vocabulary: Vocabulary,
    turns: Vocabulary,
    *,
    batch_rows: int,
    end_loops: bool,
    on_answer: Callable[[int], None] | None,
    stage: str,
) -> Engines:
    from fastdraft.decoding.scoring import ScoringEngine
    from fastdraft.modeling.drafts import pick_device
    from fastdraft.runtimes.openvino import OpenVINOEngine, device_properties

    device_properties(settings.device, settings.precision)  # refuses before minutes of converting
    engine = OpenVINOEngine(
        _exported_target(settings, context, stage),
        vocabulary,
        context.target.context_length,
        batch_rows,
        on_answer,
        device=settings.device,
        precision=settings.precision,
        threads=context.settings.threads,
        end_loops=end_loops,
    )
    answering: Engine = engine
    if settings.logprobs == "target":
        answering = ScoringEngine(engine, context.target.model(pick_device(context.settings.device)))
    return Engines(answering, engine.with_ends(turns, end_loops=True), engine.context_length)


def _open_openai(
    settings: OpenAIEngineConfig,
    context: StageContext,
    vocabulary: Vocabulary,
    turns: Vocabulary,
    on_answer: Callable[[int], None] | None,
) -> Engines:
    from functools import partial

    from fastdraft.modeling.drafts import pick_device
    from fastdraft.runtimes.openai_requests import Servers
    from fastdraft.runtimes.openai_server import OpenAIEngine

    target = context.target
    config = target.config
    servers = Servers(
        settings.servers,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        api_key_env=settings.api_key_env,
        check=partial(context.console.stop.check, context.run.root),
    )
    engine = OpenAIEngine(
        servers,
        target.tokenizer,
        vocabulary,
        int(getattr(config, "max_position_embeddings", 2**31)),
        model=settings.model,
        api=settings.api,
        logprobs="none" if settings.logprobs == "target" else settings.logprobs,
        on_answer=on_answer,
        say=context.console.say,
    )
    answering: Engine = engine
    if settings.logprobs == "target":
        from fastdraft.decoding.scoring import ScoringEngine

        answering = ScoringEngine(engine, target.model(pick_device(context.settings.device)))
    return Engines(answering, engine.with_ends(turns), engine.context_length)


def _exported_target(settings: OpenVINOEngineConfig, context: StageContext, stage: str) -> Path:
    """The target's export beside the units, until the stage is complete: converted once, found again by a process that goes on."""
    folder = context.folder(stage).path / _CONVERTED / settings.weights
    if not folder.is_dir():
        context.console.say(f"converting the target for OpenVINO ({settings.weights})")
        export_openvino(context.target, folder, settings.weights)
    return folder
