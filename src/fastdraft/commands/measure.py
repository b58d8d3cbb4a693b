"""`fastdraft inspect TARGET --measure`: what target and drafts cost on this device, before anything is
trained.

Each is built with random weights in a temporary folder, unless an export is named, and single passes are
timed in the order of decoding (runtimes/openvino_latency.py). measurement.py tells what follows from the
times.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig

from fastdraft.commands.measure_served import measure_served
from fastdraft.commands.measurement import MeasuredModel, MeasuredShapes
from fastdraft.console import Console, format_count
from fastdraft.errors import RecipeError, TargetError
from fastdraft.forecast import RATES
from fastdraft.modeling.architecture import Architecture, draft_hf_config, has_rotary_factors
from fastdraft.modeling.drafts import build_draft, save_draft
from fastdraft.modeling.gguf_files import read_gguf
from fastdraft.modeling.shapes import natural
from fastdraft.modeling.text_part import text_only
from fastdraft.recipe.evaluation import GGUFWeights, RuntimeName
from fastdraft.recipe.run import user_path
from fastdraft.runtimes.gguf_export import GGUF_FILE, export_gguf
from fastdraft.runtimes.llama_cpp import PASSES, pass_seconds
from fastdraft.runtimes.llama_cpp import REPEATS as REPEATS_OF_PASSES
from fastdraft.runtimes.llama_cpp_runtime import LlamaCppRuntime, check_files, file_type
from fastdraft.runtimes.openvino import MODEL_FILE, describe_device
from fastdraft.runtimes.openvino_export import Weights, check_pair, export_random
from fastdraft.runtimes.openvino_latency import WARM_TURNS, LoadedModel, fitting_prefix, time_passes
from fastdraft.runtimes.vllm_runtime import VLLMRuntime
from fastdraft.target import Target

REPEATS = 15  # turns whose medians are taken
# A deeper model is converted with so many of its layers, twice: that tells what each further one costs.
DEPTHS = (2, 4)
UNSTEADY = 0.3  # relative spread of equal passes from which a warning is given
_GGUF: dict[str, GGUFWeights] = {"fp32": "f32", "fp16": "f16", "int8": "q8_0"}
_DEPTH_KEYS = [
    "layer_types",
    "max_window_layers",
    "quantization_config",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "num_hidden_layers",
]


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure; the defaults are the command's."""

    weights: Weights = "int4"
    draft_weights: Weights = "int8"
    draft: Sequence[
        str
    ] = ()  # shapes HIDDENxLAYERS, or folders of exported drafts; none: the listed candidates
    threads: int = 0
    num_speculative_tokens: Sequence[int] = (1, 2, 3, 4, 5)
    prefix: int = 128
    runtime: RuntimeName = "openvino"
    server: str = ""  # as benchmark.llamacpp.server or benchmark.vllm.server
    acceptance: float = RATES[1]  # accepted / proposed at K = 3, at which vLLM runs an untrained draft


class ByLayers:
    """Times a deep model by two shallow ones, read in turn: a missing layer costs what the last ones do."""

    def __init__(self, shallow: LoadedModel, deep: LoadedModel, layers: int) -> None:
        self.shallow, self.deep, self.weights = shallow, deep, deep.weights
        self.missing = (layers - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])

    def read(self, width: int) -> float:
        """Seconds that the whole model would take for one pass."""
        shallow, deep = self.shallow.read(width), self.deep.read(width)
        return deep + self.missing * (deep - shallow)


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same config at another depth, in bfloat16."""
    values = {key: value for key, value in config.to_dict().items() if key not in _DEPTH_KEYS}
    return type(config)(**values, num_hidden_layers=layers, dtype="bfloat16")


def measure(
    target: Target, candidates: Sequence[Architecture], settings: MeasureSettings, console: Console
) -> MeasuredShapes:
    """Builds what has to be built, times all passes in turn, and throws the built models away.

    `candidates` are measured where the settings name no draft.
    """
    if settings.runtime == "llamacpp":
        return _measure_files(target, candidates, settings, console)
    if settings.runtime == "vllm":
        runtime = VLLMRuntime(settings.server, "--load-format dummy", threads=settings.threads)
        drafts, ks = (
            _drafts(target, candidates, settings, _directory),
            sorted(set(settings.num_speculative_tokens)),
        )
        how = ks, settings.prefix, settings.acceptance, console
        return measure_served(target, drafts, runtime, *how)
    described = describe_device("CPU")
    whole = Path(target.location) if (Path(target.location) / MODEL_FILE).is_file() else None
    config = text_only(target.config, target.architecture.tied)
    models = [
        MeasuredModel("target", target.architecture, settings.weights, config, whole),
        *_drafts(target, candidates, settings, partial(_exported, target, settings.draft_weights)),
    ]
    with console.stop.listen(), tempfile.TemporaryDirectory(prefix="fastdraft-measure-") as temporary:
        # The drafts first: what fails, fails soon.
        folders = [_build(model, target, Path(temporary), console) for model in reversed(models)][::-1]
        return _time(models, folders, settings, described, console)


def _directory(name: str) -> MeasuredModel:
    """A draft's Hugging Face directory."""
    draft = Target.at(user_path(name, "--draft"))
    return MeasuredModel(
        Path(draft.location).name, draft.architecture, "", draft.config, Path(draft.location)
    )


def _exported(target: Target, weights: str, name: str) -> MeasuredModel:
    """A draft that was exported for OpenVINO."""
    folder = user_path(name, "--draft")
    if not (folder / MODEL_FILE).is_file():
        rule = "must be HIDDENxLAYERS, such as 512x6, or the folder of an exported draft"
        raise RecipeError(f"--draft: {name}; {rule}", "run fastdraft export first for a folder")
    draft = Target.at(folder)
    check_pair(target, draft)
    return MeasuredModel(folder.name, draft.architecture, weights, draft.config, folder)


def _drafts(
    target: Target,
    candidates: Sequence[Architecture],
    settings: MeasureSettings,
    opened: Callable[[str], MeasuredModel],
) -> list[MeasuredModel]:
    """What the settings name, as shapes or as something that `opened` reads, else the candidates."""
    found, shapes, weights = [], [], settings.draft_weights
    for name in settings.draft:
        if numbers := re.fullmatch(r"(\d+)x(\d+)", name):
            hidden, layers = map(int, numbers.groups())
            if hidden % 2 or not hidden or not layers:
                rule = "the width must be even, and both at least 1"
                raise RecipeError(f"--draft: {name}; {rule}", "for example 512x6")
            shape = natural(target.architecture, hidden, has_rotary_factors(target.config))
            shapes.append(replace(shape, num_layers=layers))
            continue
        found.append(opened(name))
    for shape in shapes or ([] if found else candidates):
        name = f"{shape.hidden_size}x{shape.num_layers}"
        if any(draft.name.split("/")[0] == name for draft in found):
            name = f"{name}/{shape.intermediate_size}"
        found.append(MeasuredModel(name, shape, weights, draft_hf_config(target.config, shape)))
    if not found:
        rule = "no candidate; a draft must cost less than half of the target"
        raise TargetError(f"{target.location}: {rule}", "name a shape with --draft, for example --draft 64x1")
    return found


def _build(model: MeasuredModel, target: Target, temporary: Path, console: Console) -> list[Path]:
    """The exports by which a model is timed, made with random weights where it is none itself."""
    if model.export:
        return [model.export]
    count, deep = format_count(model.architecture.parameters), model.architecture.num_layers
    console.say(f"building {model.name} with random weights: {count} parameters, {model.weights}")
    folders = []
    for layers in (deep,) if deep <= sum(DEPTHS) else DEPTHS:
        if console.stop.requested:
            raise KeyboardInterrupt
        folders.append(temporary / f"{model.name.replace('/', '-')}-{layers}")
        folders[-1].mkdir()
        export_random(with_layers(model.config, layers), target, folders[-1], cast(Weights, model.weights))
    return folders


def _measure_files(
    target: Target, candidates: Sequence[Architecture], settings: MeasureSettings, console: Console
) -> MeasuredShapes:
    """The same in llama.cpp: the target's own file, drafts as files; one server after the other."""
    runtime, kind = LlamaCppRuntime(settings.server, settings.threads), _GGUF.get(settings.draft_weights)
    described, file = runtime.describe(), target.gguf_file
    if file is None:
        rule, fix = "llama.cpp runs a GGUF file", "name FILE.gguf, or leave out --runtime"
        raise TargetError(f"{target.location}: no GGUF file; {rule}", fix)
    if kind is None:
        found = f"--draft-weights: {settings.draft_weights}; of a GGUF draft fp32, fp16 or int8"
        raise RecipeError(found, "int8 is usual")
    ks = tuple(sorted(set(settings.num_speculative_tokens)))
    context = min([target.context_length, *(shape.context_length for shape in candidates)])
    prefix = max(1, min(settings.prefix, context - (1 + PASSES) * (ks[-1] + 1) - 1))
    spread = [0.0]

    def timed(path: Path, width: int) -> float:
        if console.stop.requested:
            raise KeyboardInterrupt
        found = pass_seconds(path, width, runtime, prefix)
        if not found:
            rule = "does not go on with a text that repeats itself, by which passes over several are timed"
            raise TargetError(f"{path}: {rule}", "let `fastdraft benchmark` measure it")
        spread.append((max(found) - min(found)) / statistics.median(found))
        progress.advance(1)
        return statistics.median(found)

    opened = partial(_named_file, target)
    drafts, timed_drafts = _drafts(target, candidates, settings, opened), []
    with (
        console.stop.listen(),
        tempfile.TemporaryDirectory(prefix="fastdraft-measure-") as temporary,
        console.progress("measuring", len(drafts) + len(ks) + 1, "kinds of passes") as progress,
    ):
        for draft in drafts:  # first: what fails, fails soon
            path = draft.export or _write_random(draft, target, Path(temporary), kind)
            read, weights = runtime.bytes_per_token(target, path, ""), file_type(read_gguf(path))
            timed_drafts.append(replace(draft, weights=weights, seconds=timed(path, 1), file_bytes=read))
        seconds = {width: timed(file, width) for width in (1, *(k + 1 for k in ks))}
    if max(spread) > UNSTEADY:
        console.warn(f"passes differ by {max(spread):.0%}: other work on this machine disturbs the figures")
    read, weights = runtime.bytes_per_token(target, file, ""), file_type(read_gguf(file))
    own = MeasuredModel("target", target.architecture, weights, target.config, file, seconds[1], read)
    return MeasuredShapes(described, prefix, REPEATS_OF_PASSES, own, seconds, timed_drafts, ks)


def _named_file(target: Target, name: str) -> MeasuredModel:
    path = user_path(name, "--draft")
    if not path.is_file():
        rule = "must be HIDDENxLAYERS, such as 512x6, or a draft's GGUF file"
        raise RecipeError(f"--draft: {name}; {rule}", "correct the path")
    assert target.gguf
    draft = Target.at(path)
    check_files(target.gguf, read_gguf(path))
    return MeasuredModel(path.name, draft.architecture, "", draft.config, path)


def _write_random(model: MeasuredModel, target: Target, temporary: Path, kind: GGUFWeights) -> Path:
    """The shape with random weights."""
    folder = temporary / model.name.replace("/", "-")
    save_draft(build_draft(model.config, 0), folder, target)
    export_gguf(Target.at(folder), folder / GGUF_FILE, kind, target)
    return folder / GGUF_FILE


def _time(
    models: Sequence[MeasuredModel],
    folders: Sequence[Sequence[Path]],
    settings: MeasureSettings,
    described: dict[str, str],
    console: Console,
) -> MeasuredShapes:
    """Loads all, and times them in turn."""
    ks = sorted(set(settings.num_speculative_tokens))
    widths = sorted({1, *(k + 1 for k in ks)})
    prefix = fitting_prefix([folder for group in folders for folder in group], settings.prefix, widths[-1])
    console.say(f"loading {len(models)} models and reading {prefix} tokens with each")
    passes: list[Any] = []
    for model, group in zip(models, folders, strict=True):
        loaded = [LoadedModel(folder, prefix, widths[-1], threads=settings.threads) for folder in group]
        deep = model.architecture.num_layers
        passes.append(loaded[0] if len(loaded) == 1 else ByLayers(loaded[0], loaded[1], deep))
    with console.progress("measuring", REPEATS + WARM_TURNS, "turns") as progress:

        def on_turn() -> None:
            progress.advance(1)
            if console.stop.requested:
                raise KeyboardInterrupt

        costs = time_passes(passes[0], passes[1:], widths, REPEATS, on_turn)
    if costs.spread > UNSTEADY:
        disturbed = "other work on this machine disturbs the figures"
        console.warn(f"passes differ by {costs.spread:.0%} from turn to turn: {disturbed}")
    seconds = [costs.target_seconds[1], *costs.draft_seconds]
    timed = [
        replace(m, weights=p.weights, seconds=s) for m, p, s in zip(models, passes, seconds, strict=True)
    ]
    runtime = {"name": "openvino", "device": "CPU", "threads": settings.threads, **described}
    return MeasuredShapes(runtime, prefix, REPEATS, timed[0], costs.target_seconds, timed[1:], tuple(ks))
