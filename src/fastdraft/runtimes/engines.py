"""Which runtime writes as the target, as a recipe names it or as `auto` finds it, and how it is opened.

Decides the keys of `synthesize.engine`; what `auto` stands for on this machine (OpenVINO on a CPU where it is installed and its
converter takes the target's family, else transformers; but begun text is finished by the engine that began it, since a run's
rows come from one distribution); and that two engines over one loaded target are opened: one that answers, one that ends a text
at the end of the user's turn (Magpie).
Imports no runtime before one is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fastdraft.artifacts import FINGERPRINT
from fastdraft.config import Config
from fastdraft.errors import ArtifactError, MissingExtraError, TargetError
from fastdraft.modeling.families import MULTIMODAL

if TYPE_CHECKING:
    from fastdraft.artifacts import Artifact
    from fastdraft.interfaces import Engine, StageContext
    from fastdraft.vocabulary import Vocabulary


INSTALL_CONVERTER = "pip install --no-deps optimum-intel optimum; pip install requests (with its dependencies it brings torchvision)"
_STAGE = "synthesize"
_CONVERTED = "converted"
"""Scratch of the stage (see `artifacts.SCRATCH`): the target as OpenVINO runs it."""


class AutoEngineConfig(Config):
    """OpenVINO on a CPU where it is installed, else transformers; `fastdraft check` and the manifest say which."""

    kind: Literal["auto"] = "auto"
    """OpenVINO then runs the target in int8 (starter: total variation of 0.01 a token from float32), or in what `target.dtype` names."""


class HuggingFaceEngineConfig(Config):
    """transformers, in this process."""

    kind: Literal["huggingface"] = "huggingface"
    """Runs wherever torch runs; reproducible bit for bit for equal threads."""


class OpenVINOEngineConfig(Config):
    """OpenVINO's continuous batching, in this process; needs the extra `openvino`."""

    kind: Literal["openvino"] = "openvino"
    """Runs on CPUs and Intel's GPUs; reproducible for equal threads."""
    weights: Literal["fp32", "fp16", "int8", "int4"] = "int8"
    """Precision of the target that writes: the fewer bits, the faster and the further from the original."""
    precision: Literal["fast", "exact"] = "fast"
    """fast: the device's own, on a CPU with an 8-bit KV cache; exact: float32 throughout."""
    device: str = "CPU"
    """OpenVINO's name: CPU, GPU, GPU.1."""
    logprobs: Literal["engine", "target"] = "engine"
    """engine: of the distribution that each token was drawn from; target: of the target in `target.dtype`, by a scoring pass."""


def require_openvino() -> None:
    """Looks whether everything that converting and running needs is installed, without importing it.

    Raises:
        MissingExtraError: naming the first library that is missing.
    """
    for module, library in (("openvino_genai", "openvino-genai"), ("openvino_tokenizers", "openvino-tokenizers"), ("nncf", "nncf")):
        if find_spec(module) is None:
            raise MissingExtraError(library, "openvino")
    if find_spec("optimum") is None or find_spec("optimum.intel") is None:
        raise MissingExtraError("optimum-intel", "openvino", INSTALL_CONVERTER)


def require_convertible(location: str, revision: str | None = None) -> None:
    """Looks whether OpenVINO's converter takes a target's family, before anything is trained for it.

    Raises:
        TargetError: when it does not.
    """
    family = _unconverted(location, revision)
    if family:
        rule = "the converter to OpenVINO takes text models of other families"
        raise TargetError(location, f"family {family}", rule, "leave out `benchmark`, and write export.openvino.target=none")


def _unconverted(location: str, revision: str | None) -> str:
    """The family of a target that is not converted; empty for one that is."""
    from fastdraft.modeling.source import raw_config

    family = str(raw_config(location, revision)["model_type"])
    return family if family in NOT_CONVERTED else ""


EngineConfig = Annotated[AutoEngineConfig | HuggingFaceEngineConfig | OpenVINOEngineConfig, Field(discriminator="kind")]
ChosenEngine = HuggingFaceEngineConfig | OpenVINOEngineConfig
_CHOSEN: TypeAdapter[ChosenEngine] = TypeAdapter(Annotated[ChosenEngine, Field(discriminator="kind")])
_OPENVINO_FOR: dict[str, ChosenEngine] = {
    "auto": OpenVINOEngineConfig(),
    "fp32": OpenVINOEngineConfig(weights="fp32", precision="exact"),
    "bf16": OpenVINOEngineConfig(weights="fp16"),
    "fp16": OpenVINOEngineConfig(weights="fp16"),
}
"""What `auto` runs for a `target.dtype`: a precision that the recipe names is kept."""
NOT_CONVERTED = ("gemma", "gemma2", "gemma3_text", *MULTIMODAL)
"""Families that optimum-intel 2.2 does not convert as text models beside transformers 5: transformers writes for these."""


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
        weights = f" ({settings.weights}, {settings.device})" if isinstance(settings, OpenVINOEngineConfig) else ""
        return f"{settings.kind}{weights}: {self.reason}"


def choose_engine(settings: EngineConfig, context: StageContext) -> EngineChoice:
    """Settles `auto`; called before the fingerprint, so that it names the engine that really writes.

    Args:
        settings: The recipe's `engine`.
        context: Names the device, the target's precision and the folder in which work may have begun.

    Raises:
        DeviceError: for a `run.device` that is unknown or not there.
        ArtifactError: when unfinished work was begun by OpenVINO, which is not installed here.
    """
    if not isinstance(settings, AutoEngineConfig):
        return EngineChoice(settings, "as the recipe says", by_recipe=True)
    artifact = context.artifact(_STAGE)
    begun = _begun(artifact)
    if begun is not None and artifact.is_complete():
        return EngineChoice(begun, "it wrote what is there")
    if isinstance(begun, OpenVINOEngineConfig):
        _require_to_go_on(artifact)
    choice = _fastest_here(context)
    return choice if begun in (None, choice.settings) else EngineChoice(begun, "it began what is there")


def _fastest_here(context: StageContext) -> EngineChoice:
    from fastdraft.modeling.loading import pick_device

    device = pick_device(context.settings.device)
    if device.type != "cpu":
        return EngineChoice(HuggingFaceEngineConfig(), f"the target runs on {device}")
    try:
        require_openvino()
    except MissingExtraError as error:
        reason = f"{error.library} is not installed; with it OpenVINO would write, faster on a CPU: {error.remedy}"
        return EngineChoice(HuggingFaceEngineConfig(), reason)
    family = _unconverted(context.target.location, context.target.revision)
    if family:
        return EngineChoice(HuggingFaceEngineConfig(), f"the converter to OpenVINO does not take {family}")
    return EngineChoice(_OPENVINO_FOR[context.target.dtype], "the fastest on a CPU")


def _begun(artifact: Artifact) -> ChosenEngine | None:
    """The engine of work that was begun; None when there is none, or none that this release knows."""
    if not (artifact.path / FINGERPRINT).exists():
        return None
    settings = artifact.stored_fingerprint().get("settings")
    try:
        return _CHOSEN.validate_python(settings.get("engine") if isinstance(settings, dict) else None)
    except ValidationError:
        return None


def _require_to_go_on(artifact: Artifact) -> None:
    try:
        require_openvino()
    except MissingExtraError as error:
        found = f"settings.engine.kind (openvino -> huggingface, for {error.library} is not installed here)"
        rule = "the engine that began this text must finish it"
        raise ArtifactError(artifact.path, found, rule, f"{error.remedy}; or redo it with --redo {_STAGE}") from None


@dataclass(frozen=True)
class Engines:
    """What synthesize asks."""

    answering: Engine
    instructing: Engine
    """Ends a text where a user's turn ends."""
    context_length: int
    """Most positions of a prompt and its answer."""


def open_engines(
    settings: ChosenEngine, context: StageContext, vocabulary: Vocabulary, turns: Vocabulary, *, batch_rows: int, end_loops: bool
) -> Engines:
    """Loads the target once and opens both engines over it.

    Args:
        settings: From `choose_engine`.
        context: Names the target, the device, the threads and, for an export, the folder.
        vocabulary: Says which ids end an answer.
        turns: The same for an instruction.
        batch_rows: Prompts written together.
        end_loops: Ends an answer that has run into a loop.

    Raises:
        FastDraftError: when the target cannot be loaded, converted or run there.
    """
    if isinstance(settings, OpenVINOEngineConfig):
        return _open_openvino(settings, context, vocabulary, turns, batch_rows=batch_rows, end_loops=end_loops)
    from fastdraft.modeling.loading import load_target, pick_device
    from fastdraft.runtimes.huggingface import HuggingFaceEngine

    model = load_target(context.target, pick_device(context.settings.device))
    answering = HuggingFaceEngine(model, vocabulary, batch_rows, end_loops=end_loops)
    return Engines(answering, HuggingFaceEngine(model, turns, batch_rows, end_loops=True), answering.context_length)


def _open_openvino(
    settings: OpenVINOEngineConfig, context: StageContext, vocabulary: Vocabulary, turns: Vocabulary, *, batch_rows: int, end_loops: bool
) -> Engines:
    from fastdraft.decoding.scoring import ScoringEngine
    from fastdraft.modeling.loading import load_target, pick_device
    from fastdraft.modeling.source import raw_config
    from fastdraft.runtimes.openvino import OpenVINOEngine, device_properties
    from fastdraft.runtimes.openvino_pair import context_length

    device_properties(settings.device, settings.precision)  # refuses before minutes of converting
    engine = OpenVINOEngine(
        _exported_target(settings, context),
        vocabulary,
        context_length(raw_config(context.target.location, context.target.revision)),
        batch_rows,
        device=settings.device,
        precision=settings.precision,
        threads=context.settings.threads,
        end_loops=end_loops,
    )
    answering: Engine = engine
    if settings.logprobs == "target":
        answering = ScoringEngine(engine, load_target(context.target, pick_device(context.settings.device)))
    return Engines(answering, engine.with_ends(turns, end_loops=True), engine.context_length)


def _exported_target(settings: OpenVINOEngineConfig, context: StageContext) -> Path:
    """The target's export beside the units, until the stage is complete: converted once, found again by a process that goes on."""
    from fastdraft.runtimes.openvino_export import export_openvino

    folder = context.artifact(_STAGE).path / _CONVERTED / settings.weights
    if not folder.is_dir():
        context.console.say(f"converting the target for OpenVINO ({settings.weights})")
        export_openvino(context.target.location, folder, settings.weights, revision=context.target.revision)
    return folder
