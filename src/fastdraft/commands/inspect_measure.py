"""`fastdraft inspect TARGET --measure`: what target and candidate drafts cost on this device, before anything is trained.

Decides what is measured and what is said about it. Every candidate, and the target unless it is an exported model, is
built with random weights in a temporary folder (`runtimes/openvino_export.py`), and single passes are timed in the order of
decoding (`runtimes/openvino_latency.py`). What follows from the times is in inspect_forecast.py. The temporary folder goes
in every case but a kill without warning.
"""

from __future__ import annotations

import contextlib
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from fastdraft.commands.inspect_forecast import DraftCost, Measurement
from fastdraft.console import Console
from fastdraft.errors import RecipeError, TargetError
from fastdraft.recipe.base import format_count
from fastdraft.recipe.run import user_path
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastdraft.modeling.architecture import Architecture

Weights = Literal["fp32", "fp16", "int8", "int4"]
REPEATS = 15
"""Turns whose medians are taken."""
UNSTEADY = 0.3
"""Relative spread of equal passes from which a warning is given."""
_SHAPE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure; the defaults are the command's."""

    runtime: Literal["openvino"] = "openvino"
    weights: Weights = "int4"
    draft_weights: Weights = "int8"
    draft: Sequence[str] = ()
    """Shapes HIDDENxLAYERS, or folders of exported drafts; none: the listed candidates."""
    device: str = "CPU"
    threads: int = 0
    num_speculative_tokens: Sequence[int] = (1, 2, 3, 4, 5)
    prefix: int = 128

    def check(self) -> None:
        """Raises:
        RecipeError: for a number that makes no sense.
        """
        for name, value, least in (("prefix", self.prefix, 1), ("threads", self.threads, 0)):
            if value < least:
                raise RecipeError(f"--{name}", value, f"must be at least {least}", "leave it out")
        for k in self.num_speculative_tokens:
            if k < 1:
                raise RecipeError(
                    "--num-speculative-tokens", k, "must be at least 1", "3 to 5 suits most drafts"
                )


def settings_of(arguments: Mapping[str, Any]) -> MeasureSettings | None:
    """The settings among the command line's arguments; None without `--measure`.

    Raises:
        RecipeError: when one is given without `--measure`.
    """
    given = {
        field.name: arguments[field.name] for field in fields(MeasureSettings) if field.name in arguments
    }
    if arguments["measure"]:
        return MeasureSettings(**given)
    if given:
        name = "--" + next(iter(given)).replace("_", "-")
        raise RecipeError(name, "given without --measure", "it says how to measure", "add --measure")
    return None


@dataclass(frozen=True)
class Built:
    """A model that is, or will be, on the disk as an export."""

    name: str
    """HIDDENxLAYERS, or the folder."""
    architecture: Architecture
    config: PreTrainedConfig
    folder: Path
    weights: Weights
    random: bool


def measure(
    location: str,
    config: PreTrainedConfig,
    candidates: Sequence[Architecture],
    settings: MeasureSettings,
    console: Console,
    *,
    revision: str | None = None,
) -> Measurement:
    """Builds what has to be built, times all passes in turn, and throws the built models away.

    Args:
        location: The target: a Hugging Face directory or hub id (its weights are not read), or an exported model (timed itself).
        config: The target's.
        candidates: Drafts that are measured when `settings.draft` names none.
        settings: How.
        console: Progress.
        revision: On the hub.

    Raises:
        RecipeError: for settings that make no sense. MissingExtra: without OpenVINO or its converter.
        RecipeError: for a device that is not there. FastDraftError: when there is no room for the random models.
        TargetError, FastDraftError: when a shape cannot be converted or run.
    """
    from fastdraft.runtimes.openvino import describe_device, device_properties

    settings.check()
    device_properties(settings.device, "fast", settings.threads)
    described = describe_device(settings.device)
    with (
        _end_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="fastdraft-measure-", ignore_cleanup_errors=True) as temporary,
    ):
        target, drafts = _plan(location, config, candidates, settings, Path(temporary))
        _build([*drafts, target], location, revision, Path(temporary), console)
        return _time(target, drafts, settings, described, console)


def _plan(
    location: str,
    config: PreTrainedConfig,
    candidates: Sequence[Architecture],
    settings: MeasureSettings,
    temporary: Path,
) -> tuple[Built, list[Built]]:
    """What is measured, and where it is or will be."""
    from fastdraft.modeling.architecture import draft_hf_config, read_architecture
    from fastdraft.runtimes.openvino import MODEL_FILE

    architecture = read_architecture(config)
    exported = (Path(location) / MODEL_FILE).is_file()
    target = Built(
        "target",
        architecture,
        config,
        Path(location) if exported else temporary / "target",
        settings.weights,
        not exported,
    )
    drafts = [_exported_draft(name, location) for name in settings.draft if not _SHAPE.fullmatch(name)]
    shapes = [_shape(name, config, architecture) for name in settings.draft if _SHAPE.fullmatch(name)]
    for shape in shapes or ([] if drafts else candidates):
        name = f"{shape.hidden_size}x{shape.num_layers}"
        taken = sum(draft.name.split("/")[0] == name for draft in drafts)
        folder = temporary / f"draft-{len(drafts)}"
        label = f"{name}/{shape.intermediate_size}" if taken else name
        drafts.append(
            Built(label, shape, draft_hf_config(config, shape), folder, settings.draft_weights, True)
        )
    if not drafts:
        rule = "a draft must cost less than half of the target"
        raise TargetError(
            location, "no candidate", rule, "name a shape with --draft, for example --draft 64x1"
        )
    return target, drafts


def _shape(name: str, config: PreTrainedConfig, target: Architecture) -> Architecture:
    """The shape that the listed candidates would have at this width, at the asked depth."""
    from fastdraft.modeling.architecture import has_rotary_factors
    from fastdraft.modeling.shapes import explicit, natural

    hidden, layers = map(int, name.split("x"))
    if not hidden or not layers:
        raise RecipeError("--draft", name, "width and layers must be at least 1", "for example 512x6")
    base = natural(target, hidden, has_rotary_factors(config))
    return explicit(
        target,
        hidden_size=hidden,
        num_layers=layers,
        intermediate_size=base.intermediate_size,
        num_heads=base.num_heads,
        num_kv_heads=base.num_kv_heads,
    )


def _exported_draft(name: str, target: str) -> Built:
    from fastdraft.modeling.architecture import read_architecture
    from fastdraft.runtimes.openvino import MODEL_FILE, check_pair

    folder = user_path(name, "--draft")
    if not (folder / MODEL_FILE).is_file():
        rule = "must be HIDDENxLAYERS, such as 512x6, or the folder of an exported draft"
        raise RecipeError("--draft", name, rule, "run fastdraft export first for a folder")
    check_pair(Target.at(target), Target.at(folder))
    config = Target.at(folder).config
    return Built(folder.name, read_architecture(config), config, folder, "int8", False)


def _build(
    models: Sequence[Built], tokenizer: str, revision: str | None, temporary: Path, console: Console
) -> None:
    """Makes those that are to be random, the drafts first: what fails, fails soon."""
    from fastdraft.runtimes.openvino_export import export_random

    to_build = [model for model in models if model.random]
    with console.progress("building", len(to_build), "models") as progress:
        for model in to_build:
            what = "the target" if model.name == "target" else f"draft {model.name}"
            console.say(
                f"building {what} with random weights: {format_count(model.architecture.parameters)} parameters, {model.weights}"
            )
            model.folder.mkdir()
            export_random(model.config, Target.at(tokenizer, revision), model.folder, model.weights)
            progress.advance(1)


def _time(
    target: Built,
    drafts: Sequence[Built],
    settings: MeasureSettings,
    described: dict[str, str],
    console: Console,
) -> Measurement:
    """Loads all, and times them in turn."""
    from fastdraft.runtimes.openvino_latency import WARM_TURNS, LoadedModel, fitting_prefix, time_passes

    widths = sorted({1, *(k + 1 for k in settings.num_speculative_tokens)})
    prefix = fitting_prefix(
        [target.folder, *(draft.folder for draft in drafts)], settings.prefix, max(widths)
    )
    console.say(f"loading {1 + len(drafts)} models and reading {prefix} tokens with each")
    loaded = [
        LoadedModel(model.folder, prefix, max(widths), device=settings.device, threads=settings.threads)
        for model in (target, *drafts)
    ]
    with console.progress("measuring", REPEATS + WARM_TURNS, "turns") as progress:
        costs = time_passes(loaded[0], loaded[1:], widths, REPEATS, lambda: progress.advance(1))
    if costs.spread > UNSTEADY:
        console.warn(
            f"passes differ by {costs.spread:.0%} from turn to turn: other work on this machine disturbs the figures"
        )
    of_target = target.architecture.exported_bytes_per_token(loaded[0].weights)
    measured = [
        DraftCost(
            name=draft.name,
            architecture=draft.architecture,
            weights=model.weights,
            random=draft.random,
            seconds=seconds,
            bytes_ratio=draft.architecture.exported_bytes_per_token(model.weights) / of_target,
        )
        for draft, model, seconds in zip(drafts, loaded[1:], costs.draft_seconds, strict=True)
    ]
    runtime = {"name": settings.runtime, "device": settings.device, "threads": settings.threads, **described}
    return Measurement(
        runtime,
        prefix,
        REPEATS,
        loaded[0].weights,
        target.random,
        costs.target_seconds,
        measured,
        tuple(sorted(set(settings.num_speculative_tokens))),
    )


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does, so that the temporary folder goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
