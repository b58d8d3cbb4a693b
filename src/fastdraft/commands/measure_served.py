"""`fastdraft inspect TARGET --measure --runtime vllm`: passes in vLLM, and a shape at a given acceptance.

Only configs are needed: vLLM fills both models with random weights, and accepts proposals by chance at rates
that it is told (`rejection_sample_method: synthetic`), so that a pair is on the clock before it is trained.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastdraft.commands.measurement import MeasuredModel, MeasuredShapes, SyntheticPair
from fastdraft.console import Console
from fastdraft.errors import FastDraftError
from fastdraft.forecast import conditional_acceptance_rate
from fastdraft.runtimes.vllm import MEASURED_PASSES, seconds_by_chance, timed_passes
from fastdraft.runtimes.vllm_runtime import VLLMRuntime, check_shapes, check_target, precision
from fastdraft.target import Target


def measure_served(
    target: Target,
    drafts: Sequence[MeasuredModel],
    runtime: VLLMRuntime,
    ks: Sequence[int],
    prefix: int,
    acceptance: float,
    console: Console,
) -> MeasuredShapes:
    """Times each model alone in a server, then the best draft beside the target, accepted by chance."""
    check_target(target)
    for draft in drafts:
        check_shapes(target.architecture, draft.architecture, draft.name, runtime.device)
    described, own = runtime.describe(), precision(target, runtime.arguments)[0]
    widths, location = [1, *(k + 1 for k in ks)], Path(target.location)
    with (
        console.stop.listen(),
        tempfile.TemporaryDirectory(prefix="fastdraft-measure-") as temporary,
        console.progress("measuring", len(drafts) + 2, "servers") as progress,
    ):
        folders = [_folder(draft, target, Path(temporary)) for draft in drafts]
        timed = []
        for draft, folder in zip(drafts, folders, strict=True):
            [seconds] = timed_passes(folder, runtime, [1], prefix).values()
            read = draft.architecture.bytes_per_token(16)
            timed.append(replace(draft, weights=own, seconds=seconds, file_bytes=read))
            console.stop.check("measuring")
            progress.advance(1)
        by_width = timed_passes(location, runtime, widths, prefix)
        progress.advance(1)
        shape = target.architecture
        model = MeasuredModel(
            "target", shape, own, target.config, None, by_width[1], shape.bytes_per_token(16)
        )
        found = MeasuredShapes(described, prefix, MEASURED_PASSES, model, by_width, timed, tuple(ks))
        best, k, forecast = found.best(acceptance)
        chance, folder = conditional_acceptance_rate(acceptance), folders[timed.index(best)]
        try:
            [served] = seconds_by_chance(location, folder, runtime, k, chance, [1], prefix).values()
        except FastDraftError as error:
            if "Synthetic acceptance not supported" not in error.message:  # vLLM 0.32 on a CPU
                raise
            console.warn(
                "vLLM accepts nothing by chance on a CPU: no pair is served, all speed-ups are forecasts"
            )
            return found
        progress.advance(1)
    speedup = by_width[1] / served
    return replace(found, synthetic=SyntheticPair(best.name, k, acceptance, forecast, speedup))


def _folder(draft: MeasuredModel, target: Target, temporary: Path) -> Path:
    """What vLLM reads of a draft whose weights are random: its own directory, or config and tokenizer."""
    if draft.export:
        return draft.export
    folder = temporary / draft.name.replace("/", "-")
    config = copy.deepcopy(draft.config)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]  # by which vLLM knows it
    config.save_pretrained(folder)
    target.copy_tokenizer(folder)
    return folder
