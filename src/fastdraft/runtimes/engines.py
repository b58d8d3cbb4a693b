"""Which runtime writes as the target, as a recipe names it, and how it is opened.

Decides the keys of `synthesize.engine` and that two engines over one loaded target are opened: one that answers, one that
ends a text at the end of the user's turn (Magpie). Imports no runtime before one is opened.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fastdraft.config import Config
from fastdraft.errors import MissingExtraError

if TYPE_CHECKING:
    from fastdraft.interfaces import Engine, StageContext
    from fastdraft.vocabulary import Vocabulary


INSTALL_CONVERTER = "pip install --no-deps optimum-intel optimum; pip install requests (with its dependencies it brings torchvision)"


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


EngineConfig = Annotated[HuggingFaceEngineConfig | OpenVINOEngineConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Engines:
    """What synthesize asks."""

    answering: Engine
    instructing: Engine
    """Ends a text where a user's turn ends."""
    context_length: int
    """Most positions of a prompt and its answer."""


def open_engines(
    settings: EngineConfig, context: StageContext, vocabulary: Vocabulary, turns: Vocabulary, *, batch_rows: int, end_loops: bool
) -> Engines:
    """Loads the target once and opens both engines over it.

    Args:
        settings: The recipe's `engine`.
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
    """The target's export beside the units: converted once, found again by a process that goes on."""
    from fastdraft.runtimes.openvino_export import export_openvino

    folder = context.artifact("synthesize").path / f"target-{settings.weights}"
    for leftover in folder.parent.glob(".target-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not folder.is_dir():
        context.console.say(f"converting the target for OpenVINO ({settings.weights})")
        export_openvino(context.target.location, folder, settings.weights, revision=context.target.revision)
    return folder
