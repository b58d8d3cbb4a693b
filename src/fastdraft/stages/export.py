"""Export: the last checkpoint of a run -> the directory that runtimes load, tested, with a model card.

Decides which draft of a run is exported (the last that was trained), what is tested on the exported files themselves, and
that a failed test is told and recorded rather than fatal: a draft can be worse than hoped, but never change the output.
A conversion for another runtime that does not load or changes greedy text is fatal: that is a fault of the files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.recipe.evaluation import ExportConfig, OpenVINOFormat
from fastdraft.run_folder import StageFolder, file_sha256, write_atomic
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastdraft.modeling.vocabulary import Vocabulary

NAME = "export"
_CHECKPOINTS = {
    "align": "checkpoint",
    "continue_pretrain": "checkpoint",
    "pretrain": "checkpoint",
    "design": "draft",
}
_PROMPT = "Once upon a time there was a small town by the sea, and in that town"
_ROWS_PER_CORPUS = 4


def check_installed(config: ExportConfig) -> None:
    """Raises:
    MissingExtra: when a format needs a library that is not there.
    """
    if "openvino" in config.formats:
        from fastdraft.runtimes.engines import require_openvino

        require_openvino()


def source_of(context: StageContext) -> tuple[str, Path]:
    """The stage whose draft is exported, and the draft's directory.

    Raises:
        FastDraftError: when that stage has not finished.
    """
    name = next((stage for stage in _CHECKPOINTS if context.has(stage)), "design")
    return name, context.require(name).path / _CHECKPOINTS[name]


def fingerprint(config: ExportConfig, context: StageContext) -> dict[str, Any]:
    """Settings, the exported draft, the target it is tested with, and the figures on its card."""

    name, _ = source_of(context)
    target = context.target
    results = context.folder("evaluate").path / "results.json"
    return {
        **config.model_dump(exclude=set() if "openvino" in config.formats else {"openvino"}),
        "source": {name: context.require(name).digest()},
        "target": target.identity(weights=target.has_weights),
        "results": file_sha256(results) if results.is_file() else None,
    }


def run(config: ExportConfig, context: StageContext) -> None:
    """Writes `huggingface/`, loads it back beside the target and records what was found.

    Raises:
        FastDraftError: when the checkpoint is missing or damaged. TargetError: when it is not the target's.
        TargetError: when the target cannot be loaded. FastDraftError: when the disk is full.
        MissingExtra: for formats of a runtime that is not installed.
    """
    from fastdraft.modeling.drafts import set_threads
    from fastdraft.modeling.vocabulary import check_same
    from fastdraft.provenance import describe_run
    from fastdraft.reporting.page import read_run, render
    from fastdraft.runtimes.huggingface_export import write_huggingface

    start = time.monotonic()
    set_threads(context.settings.threads)
    artifact = context.folder(NAME)
    name, checkpoint = source_of(context)
    vocabulary = context.target.vocabulary
    check_same(vocabulary, Target.at(checkpoint).vocabulary, special_tokens=False, where=str(checkpoint))
    folder = artifact.path / "huggingface"
    files = write_huggingface(checkpoint, folder, config.num_speculative_tokens, 0.0)
    context.console.stop.check(artifact.path)
    checks = _check(folder, vocabulary, context)
    card = render("model_card.md.j2", read_run(context.run), k=config.num_speculative_tokens, checks=checks)
    write_atomic(folder / "README.md", card)
    openvino = _openvino(config.openvino, folder, context) if "openvino" in config.formats else None
    artifact.complete(
        formats=config.formats,
        source=name,
        num_speculative_tokens=config.num_speculative_tokens,
        confidence_threshold=0.0,
        files={
            file: {"bytes": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
            for file in (*files, "README.md")
        },
        checks=checks,
        **({"openvino": openvino} if openvino else {}),
        seconds=round(time.monotonic() - start, 1),
        provenance=describe_run(),
    )
    context.console.say(_summary(folder, checks))


def _openvino(settings: OpenVINOFormat, draft: Path, context: StageContext) -> dict[str, Any]:
    """Writes `openvino/target` and `openvino/draft`, each tried alone, then together; what was found."""
    from fastdraft.runtimes.openvino_export import export_openvino
    from fastdraft.runtimes.openvino_pair import check_pair

    root, source = context.folder(NAME).path / "openvino", context.target
    found: dict[str, Any] = {"target": settings.target, "draft": settings.draft}
    check_pair(source.location, draft)
    pair = None
    if settings.target != "none":
        pair = root / "target"
        found["target_alone"] = export_openvino(
            source.location, pair, settings.target, revision=source.revision
        ).as_dict()
        context.console.stop.check(context.folder(NAME).path)
    found["pair" if pair else "draft_alone"] = export_openvino(
        draft, root / "draft", settings.draft, pair=pair
    ).as_dict()
    context.console.say(f"{root}: OpenVINO loads it; target {settings.target}, draft {settings.draft}")
    return found


def _check(folder: Path, vocabulary: Vocabulary, context: StageContext) -> dict[str, Any]:
    """Assisted generation with the target, where its weights are, and the mass on padding ids; warnings for what is not as it should be."""
    from fastdraft.modeling.drafts import pick_device
    from fastdraft.runtimes.huggingface_export import PADDING_MASS_LIMIT, load_assistant, padding_mass

    draft = load_assistant(folder, pick_device(context.settings.device))
    prompt = [int(token) for token in Target.at(folder).tokenizer(_PROMPT).input_ids]
    response, assisted = (
        _try_assisted(draft, prompt, vocabulary, context) if context.target.has_weights else ([], {})
    )
    if not assisted:
        context.console.warn(
            f"the target's weights are not in {context.target.location}: the draft was loaded, but not tried with the target"
        )
    mean, largest = padding_mass(draft, vocabulary, [prompt + response, *_validation_rows(context)])
    if mean >= PADDING_MASS_LIMIT:
        context.console.warn(
            f"the draft gives {mean:.1e} of its probability to ids without a token (limit {PADDING_MASS_LIMIT:.0e}): train it longer"
        )
    return {**assisted, **_as_loaded(context), **_padding(mean, largest)}


def _try_assisted(
    draft: PreTrainedModel, prompt: list[int], vocabulary: Vocabulary, context: StageContext
) -> tuple[list[int], dict[str, Any]]:
    """The target's greedy text, and whether it is the same with the draft."""
    from fastdraft.modeling.families import text_config
    from fastdraft.runtimes.huggingface_export import check_assisted

    target = context.target.model(draft.device)
    room = int(text_config(target.config).max_position_embeddings) - len(prompt) - 8
    found = check_assisted(target, draft, prompt, vocabulary, max_new_tokens=min(48, max(1, room)))
    if not found.same_text:
        context.console.warn(
            f"with the draft, transformers wrote other greedy text than the target alone ({target.dtype}; a near-tie, or a runtime fault)"
        )
    return found.response_ids, {
        "assistant_same_greedy_text": found.same_text,
        "assistant_tokens_compared": found.num_tokens,
        "assistant_dtype": str(target.dtype).removeprefix("torch."),
    }


def _as_loaded(context: StageContext) -> dict[str, Any]:
    """How `generate` must be called, as the target's config tells."""
    from fastdraft.modeling.counting import auto_class
    from fastdraft.runtimes.huggingface_export import needs_positions

    target = context.target
    config = target.config
    return {
        "assistant_target_class": auto_class(config).__name__,
        "assistant_needs_position_ids": needs_positions(config),
    }


def _padding(mean: float, largest: float) -> dict[str, Any]:
    from fastdraft.runtimes.huggingface_export import PADDING_MASS_LIMIT

    return {
        "padding_mass_mean": mean,
        "padding_mass_max": largest,
        "padding_mass_limit": PADDING_MASS_LIMIT,
        "padding_mass_ok": mean < PADDING_MASS_LIMIT,
    }


def _validation_rows(context: StageContext) -> list[list[int]]:
    """A few held-out rows of every corpus, when corpora were prepared."""
    prepare: StageFolder = context.folder("prepare")
    if not prepare.is_complete():
        return []
    from fastdraft.data.shards import open_corpus

    rows = []
    for name in prepare.manifest()["corpora"]:
        corpus = open_corpus(prepare, name, "validation")
        rows += [corpus[index].tolist() for index in range(min(_ROWS_PER_CORPUS, corpus.rows))]
    return rows


def _summary(folder: Path, checks: dict[str, Any]) -> str:
    tried = "loads"
    if "assistant_same_greedy_text" in checks:
        same = "equal" if checks["assistant_same_greedy_text"] else "NOT equal"
        tried += f" as assistant_model; greedy text with and without it {same} over {checks['assistant_tokens_compared']} tokens"
    return f"{folder}: {tried}; mean probability on padding ids {checks['padding_mass_mean']:.1e}"
