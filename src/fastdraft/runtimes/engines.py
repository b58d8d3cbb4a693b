"""Which runtime writes as the target: `choose_engine` settles `auto`, `open_engine` loads the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdraft.console import Console
from fastdraft.decoding.scoring import ScoringEngine
from fastdraft.errors import Halving, MissingExtra
from fastdraft.functional.generation import Engine
from fastdraft.modeling.drafts import pick_device
from fastdraft.ray_workers import Place
from fastdraft.recipe.synthesize import (
    TRANSPORT,
    AutoEngineConfig,
    ChosenEngine,
    EngineConfig,
    HuggingFaceEngineConfig,
    LlamaCppEngineConfig,
    OpenAIEngineConfig,
    OpenVINOEngineConfig,
)
from fastdraft.run_folder import FINGERPRINT, StageFolder, atomic_folder
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.runtimes.llama_cpp_engine import LlamaCppEngine, check_vocabulary, gguf_of
from fastdraft.runtimes.llama_cpp_server import require_llama_cpp
from fastdraft.runtimes.openai import OpenAIEngine
from fastdraft.runtimes.openai_servers import Servers
from fastdraft.runtimes.openvino import OpenVINOEngine, device_properties, require_openvino
from fastdraft.runtimes.openvino_export import (
    NOT_CONVERTED,
    Weights,
    conversion,
    convert,
    export_openvino,
    unconverted_family,
)
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.target import Target

# What `auto` runs for a `target.dtype`: a precision that the recipe names is kept.
_OPENVINO_FOR = {
    "auto": OpenVINOEngineConfig(),
    "fp32": OpenVINOEngineConfig(weights="fp32", precision="exact"),
    "bf16": OpenVINOEngineConfig(weights="fp16"),
    "fp16": OpenVINOEngineConfig(weights="fp16"),
}


@dataclass(frozen=True)
class EngineChoice:
    """The engine that writes, and why it is this one."""

    settings: ChosenEngine
    reason: str  # a clause for the user

    def __str__(self) -> str:
        """For example `openvino (int8, CPU): the fastest on a CPU`."""
        engine = self.settings
        weights = f" ({engine.weights}, {engine.device})" if isinstance(engine, OpenVINOEngineConfig) else ""
        return f"{engine.kind}{weights}: {self.reason}"


def require_installed(settings: EngineConfig) -> None:
    """Looks whether what the named engine needs is installed; `auto` takes what there is."""
    if isinstance(settings, OpenVINOEngineConfig):
        require_openvino()
    if isinstance(settings, OpenAIEngineConfig) and find_spec("openai") is None:
        raise MissingExtra("openai", "server")
    if isinstance(settings, LlamaCppEngineConfig):
        gguf_of(settings)
        require_llama_cpp(settings.server)


def uses_weights(settings: EngineConfig) -> bool:
    """Whether the target's weights must be on this machine; `auto` only stands for engines that load them."""
    if isinstance(settings, OpenAIEngineConfig):
        return settings.logprobs == "target"
    return not isinstance(settings, LlamaCppEngineConfig)


def describe_engine(settings: ChosenEngine | None) -> dict[str, Any]:
    """What of an engine the text depends on, for fingerprints; None: every answer is there already."""
    if settings is None:
        return {"kind": "none"}
    described = settings.model_dump(mode="json", exclude=set(TRANSPORT))
    if isinstance(settings, LlamaCppEngineConfig):
        described["model"] = gguf_of(settings).digest  # wherever the file lies
    return described


def choose_engine(settings: EngineConfig, target: Target, device: str, folder: StageFolder) -> EngineChoice:
    """Settles `auto` before the fingerprint, which names the engine that really writes.

    A GGUF file by llama.cpp, which will serve it; other targets on a CPU by OpenVINO where it is installed
    and converts the family; else transformers, never a server of the user's. What was begun in `folder`, of
    synthesize, is finished by the engine that began it.
    """
    if not isinstance(settings, AutoEngineConfig):
        return EngineChoice(settings, "as the recipe says")
    if (folder.path / FINGERPRINT).exists():
        begun = folder.stored_fingerprint()["settings"]["engine"]
        if begun["kind"] == "huggingface":
            return EngineChoice(HuggingFaceEngineConfig(), "it began what is there")
        if begun["kind"] == "openvino":
            if not folder.is_complete():
                require_openvino()
            return EngineChoice(OpenVINOEngineConfig(**begun), "it began what is there")
        if begun["kind"] == "llamacpp" and not folder.is_complete():
            require_llama_cpp()
    if target.gguf_file:
        try:
            require_llama_cpp()
        except MissingExtra as error:
            reason = f"{error.library} is not installed; with it llama.cpp would write, as the file is served"
            return EngineChoice(HuggingFaceEngineConfig(), f"{reason}: {error.fix}")
        named = LlamaCppEngineConfig(kind="llamacpp", model=str(target.gguf_file))
        return EngineChoice(named, "the target is a GGUF file, and its text differs elsewhere")
    chosen = pick_device(device)
    if chosen.type != "cpu":
        return EngineChoice(HuggingFaceEngineConfig(), f"the target runs on {chosen}")
    try:
        require_openvino()
    except MissingExtra as error:
        reason = f"{error.library} is not installed; with it OpenVINO would write, faster on a CPU"
        return EngineChoice(HuggingFaceEngineConfig(), f"{reason}: {error.fix}")
    if family := unconverted_family(target):
        reason = f"{family} is not converted to OpenVINO: {NOT_CONVERTED[family]}"
        return EngineChoice(HuggingFaceEngineConfig(), reason)
    return EngineChoice(_OPENVINO_FOR[target.dtype], "the fastest on a CPU")


def convert_for_all(
    settings: ChosenEngine | None, target: Target, folder: StageFolder, console: Console
) -> None:
    """Makes in the run's folder what many workers will look for there, so that they do not all make it."""
    if isinstance(settings, OpenVINOEngineConfig):
        converted(target, settings.weights, folder, console)


def place_of(settings: ChosenEngine | None) -> Place:
    """What of a cluster's machines each that runs the engine needs; None: the target in transformers."""
    return "node" if isinstance(settings, OpenVINOEngineConfig | LlamaCppEngineConfig) else "device"


def open_engine(
    settings: ChosenEngine,
    target: Target,
    folder: StageFolder,
    console: Console,
    *,
    device: str = "auto",
    threads: int = 0,
    batch_rows: int = 64,
    end_loops: bool = False,
    on_answer: Callable[[int], None] = lambda answers: None,
) -> Engine:
    """Loads the target where it writes.

    `folder` is that of the stage that asks; the run's folder holds the target's export for OpenVINO.
    `device` is that of transformers, and of the weights that score another engine's text.
    """
    if isinstance(settings, HuggingFaceEngineConfig):
        halving = Halving(f"{folder.name}.batch_rows", console.warn)
        model, written = target.model(pick_device(device)), (target.vocabulary, batch_rows, on_answer)
        return HuggingFaceEngine(model, *written, end_loops=end_loops, halving=halving)
    engine: Engine
    if isinstance(settings, OpenAIEngineConfig):
        servers = Servers(settings, partial(console.stop.check, folder.path.parent))
        served = (target.tokenizer, target.vocabulary, target.context_length)
        engine = OpenAIEngine(servers, *served, on_answer=on_answer, say=console.say)
    elif isinstance(settings, LlamaCppEngineConfig):
        file = gguf_of(settings)
        check_vocabulary(file, target)
        return LlamaCppEngine(
            file.path,
            target.vocabulary,
            target.context_length,
            settings,
            threads=threads,
            on_answer=on_answer,
            check=partial(console.stop.check, folder.path.parent),
        )
    else:
        device_properties(settings.device, settings.precision)  # refuses before minutes of converting
        engine = OpenVINOEngine(
            converted(target, settings.weights, folder, console),
            target.vocabulary,
            target.context_length,
            batch_rows,
            on_answer,
            device=settings.device,
            precision=settings.precision,
            threads=threads,
            end_loops=end_loops,
        )
    scored = settings.logprobs == "target"
    return ScoringEngine(engine, target.model(pick_device(device))) if scored else engine


def converted(target: Target, weights: Weights, folder: StageFolder, console: Console) -> Path:
    """The target's export for OpenVINO, made if no stage of this run made it: `folder` is a stage's."""
    exported = conversion(folder.path.parent, target, weights)
    if not exported.is_dir():
        console.say(f"converting the target for OpenVINO ({weights})")
        export_openvino(target, exported, weights)
    return exported


def exact_pair(
    engine: OpenVINOEngineConfig,
    target: Target,
    draft: Target,
    folder: StageFolder,
    console: Console,
    threads: int,
) -> tuple[OpenVINOModel, OpenVINOModel]:
    """The weights with which an engine writes as the target, and a draft, both in float32 arithmetic."""
    exported, made = converted(target, engine.weights, folder, console), folder.path / "converted" / "draft"
    if not made.is_dir():
        console.say("converting the draft for OpenVINO (fp32)")
        with atomic_folder(made) as temporary:
            convert(draft, temporary, "fp32")
    return OpenVINOModel(exported, "exact", threads), OpenVINOModel(made, "exact", threads, narrow=True)
