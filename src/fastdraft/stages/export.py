"""Export: the last checkpoint of a run -> the directory that runtimes load, tested, with a model card.

`export_model` does the same for any model without a recipe. A failed test with transformers is told and
recorded, not fatal; a conversion that does not load or changes greedy text is a fault of the files.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.console import Console
from fastdraft.data.shards import open_corpus
from fastdraft.errors import RecipeError, TargetError
from fastdraft.modeling.architecture import auto_class
from fastdraft.modeling.drafts import pick_device, set_threads
from fastdraft.modeling.gguf_files import require_gguf
from fastdraft.modeling.tokenizer import plain_prompt_ids
from fastdraft.modeling.trimmed_head import read_head_ids
from fastdraft.modeling.vocabulary import check_same
from fastdraft.provenance import describe_run
from fastdraft.recipe.evaluation import ExportConfig, GGUFFormat, OpenVINOFormat
from fastdraft.recipe.run import resolve_path, user_path
from fastdraft.reporting.page import read_run, render
from fastdraft.run_folder import file_sha256, write_atomic
from fastdraft.runtimes.gguf_export import GGUF_FILE, as_stored, export_gguf
from fastdraft.runtimes.huggingface_export import (
    OUTSIDE_MASS_LIMIT,
    PADDING_MASS_LIMIT,
    check_assisted,
    load_assistant,
    needs_positions,
    outside_head,
    padding_mass,
    write_huggingface,
)
from fastdraft.runtimes.openvino import MODEL_FILE, require_openvino
from fastdraft.runtimes.openvino_export import Weights, check_pair, conversion, export_openvino
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

NAME = "export"
_STAGES = ("align", "continue_pretrain", "pretrain", "design")  # that make drafts, the last first
_PROMPT = "Once upon a time there was a small town by the sea, and in that town"
_ROWS_PER_CORPUS = 4  # held-out rows on which the mass on padding ids is measured
_TRIED_TOKENS = 48


def check_installed(config: ExportConfig) -> None:
    """MissingExtra where a library is not there: told before hours of training."""
    if "openvino" in config.formats:
        require_openvino()
    if "gguf" in config.formats:
        require_gguf()


def source_of(context: StageContext) -> tuple[str, Path]:
    """The last stage that made a draft, which must have finished, and the draft's directory."""
    name = next((stage for stage in _STAGES if context.has(stage)), "design")
    return name, context.require(name).path / ("draft" if name == "design" else "checkpoint")


def fingerprint(config: ExportConfig, context: StageContext) -> dict[str, Any]:
    """Settings, the exported draft, the target it is tested with, and the figures on its card."""
    name, _ = source_of(context)
    results = context.folder("evaluate").path / "results.json"
    return {
        **config.model_dump(exclude={"openvino", "gguf"} - set(config.formats)),
        "source": {name: context.require(name).digest()},
        "target": context.target.identity(weights=context.target.has_weights),
        "results": file_sha256(results) if results.is_file() else None,
    }


def run(config: ExportConfig, context: StageContext) -> None:
    """Writes `huggingface/`, loads it back beside the target, and `openvino/` where it is asked for."""
    start, artifact, console, target = time.monotonic(), context.folder(NAME), context.console, context.target
    set_threads(context.settings.threads)
    name, checkpoint = source_of(context)
    vocabulary = Target.at(checkpoint).vocabulary
    check_same(target.vocabulary, vocabulary, special_tokens=False, where=str(checkpoint))
    folder = artifact.path / "huggingface"
    write_huggingface(checkpoint, folder, config.num_speculative_tokens)
    console.stop.check(artifact.path)
    checks = _check(config, Target.at(folder), context)
    card = render("model_card.md.j2", read_run(context.run), k=config.num_speculative_tokens, checks=checks)
    write_atomic(folder / "README.md", card)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    others: dict[str, Any] = {}
    if "openvino" in config.formats:
        others["openvino"] = _openvino(config.openvino, artifact.path, target, Target.at(folder), console)
    if "gguf" in config.formats:
        others["gguf"] = _gguf(config.gguf, artifact.path, target, Target.at(folder), console)
    artifact.complete(
        formats=config.formats,
        source=name,
        num_speculative_tokens=config.num_speculative_tokens,
        confidence_threshold=0.0,
        files=described,
        checks=checks,
        **others,
        seconds=round(time.monotonic() - start, 1),
        provenance=describe_run(),
    )
    tried = "loads"
    if "assistant_same_greedy_text" in checks:
        same = "equal" if checks["assistant_same_greedy_text"] else "NOT equal"
        tried = f"as assistant_model, greedy text {same} over {checks['assistant_tokens_compared']} tokens"
    console.say(f"{folder}: {tried}; mean probability on padding ids {checks['padding_mass_mean']:.1e}")


def _check(config: ExportConfig, draft: Target, context: StageContext) -> dict[str, Any]:
    """Assisted generation with the target, where its weights are, and the mass on ids never meant."""
    target, prepare, console = context.target, context.folder("prepare"), context.console
    assistant = load_assistant(Path(draft.location), pick_device(context.settings.device))
    prompt = plain_prompt_ids(draft.tokenizer, _PROMPT)
    checks: dict[str, Any] = {}
    texts = [prompt]
    if target.has_weights:
        model = target.model(assistant.device)
        room = max(1, min(_TRIED_TOKENS, target.context_length - len(prompt) - 8))
        same, response_ids = check_assisted(model, assistant, prompt, target.vocabulary, room)
        if not same:
            console.warn(f"transformers wrote other greedy text with the draft than without ({model.dtype})")
        texts = [prompt + response_ids]
        checks = {
            "assistant_same_greedy_text": same,
            "assistant_tokens_compared": len(response_ids),
            "assistant_dtype": str(model.dtype).removeprefix("torch."),
        }
    else:
        console.warn(f"the target's weights are not in {target.location}: the draft was not tried with it")
    corpora = prepare.manifest()["corpora"] if prepare.is_complete() else ()
    for corpus in (open_corpus(prepare, name, "validation") for name in corpora):
        texts += corpus.take(range(min(_ROWS_PER_CORPUS, corpus.rows))).tolist()
    mean, largest = padding_mass(assistant, target.vocabulary, texts)
    ids_K = read_head_ids(Path(draft.location), target.vocabulary.size)
    if ids_K is not None:
        checks |= _check_head(config, assistant, ids_K, texts, console)
    elif mean >= PADDING_MASS_LIMIT:
        rule = f"of its probability to ids without a token (limit {PADDING_MASS_LIMIT:.0e})"
        console.warn(f"the draft gives {mean:.1e} {rule}: train it longer")
    return {
        **checks,
        # How `generate` must be called, for the card.
        "assistant_target_class": auto_class(target.config).__name__,
        "assistant_needs_position_ids": needs_positions(target.config),
        "padding_mass_mean": mean,
        "padding_mass_max": largest,
        "padding_mass_limit": PADDING_MASS_LIMIT,
        "padding_mass_ok": mean < PADDING_MASS_LIMIT,
    }


def _check_head(
    config: ExportConfig, assistant: PreTrainedModel, ids_K: Tensor, texts: list[list[int]], console: Console
) -> dict[str, Any]:
    """Of a trimmed head, which these runtimes load whole: greedy drafting must stay inside of it; the
    probability that sampling gives to other ids is told.
    """
    head_VD, masses = assistant.get_output_embeddings().weight.detach().cpu(), dict[str, float]()
    heads = {"huggingface": head_VD}
    if "gguf" in config.formats:
        heads["gguf"] = as_stored(head_VD, config.gguf.draft)
    for name, each in heads.items():
        proposed, mass = outside_head(assistant, ids_K, texts, each)
        if proposed:
            found = f"export.{name}: {proposed} times an id that the draft's head lacks was the likeliest"
            raise TargetError(f"{found}; it must never be", "train it longer, or store it in more bits")
        masses[name] = mass
    fine = masses["huggingface"] <= OUTSIDE_MASS_LIMIT  # llama.cpp proposes greedily
    if not fine:
        told = f"{masses['huggingface']:.1%} of the draft's proposals would be ids that its head lacks"
        console.warn(f"not for sampling in transformers or vLLM: {told} (limit {OUTSIDE_MASS_LIMIT:.0%})")
    about = {"outside_mass_limit": OUTSIDE_MASS_LIMIT, "outside_mass_ok": fine}
    return {"head_size": len(ids_K), "outside_mass": masses, **about}


def _openvino(
    settings: OpenVINOFormat, folder: Path, target: Target, draft: Target, console: Console
) -> dict[str, Any]:
    """Writes `openvino/target` and `openvino/draft`, each tried alone, then together; what was found."""
    found: dict[str, Any] = {"target": settings.target, "draft": settings.draft}
    check_pair(target, draft)
    pair = None
    if settings.target != "none":
        pair = folder / "openvino" / "target"
        made = conversion(folder.parent, target, settings.target)
        found["target_alone"] = asdict(export_openvino(target, pair, settings.target, made=made))
        console.stop.check(folder)
    tried = export_openvino(draft, folder / "openvino" / "draft", settings.draft, pair=pair)
    found["pair" if pair else "draft_alone"] = asdict(tried)
    console.say(f"{folder / 'openvino'}: OpenVINO loads it; target {settings.target}, draft {settings.draft}")
    return found


def _gguf(
    settings: GGUFFormat, folder: Path, target: Target, draft: Target, console: Console
) -> dict[str, Any]:
    """Writes `gguf/draft`, and `gguf/target` where it is asked for, each one file; bytes of each."""
    asked = {"draft": (draft, settings.draft)}
    if settings.target != "none" and target.gguf is None:
        asked["target"] = (target, settings.target)
    sizes = {}
    for role, (model, weights) in asked.items():
        file = folder / "gguf" / role / GGUF_FILE
        export_gguf(model, file, weights, target)
        sizes[f"{role}_bytes"] = file.stat().st_size
        console.say(f"{file}: {weights}, {sizes[f'{role}_bytes'] / 1e6:.1f} MB")
        console.stop.check(folder)
    return {**settings.model_dump(), **sizes}


def export_model(
    source: str,
    *,
    format: Literal["openvino"],
    weights: Weights,
    output: str | None,
    target: str | None,
    console: Console,
) -> Path:
    """Exports any Hugging Face directory, hub id or `shipped:` model without a recipe and returns its folder.

    `output` None is `NAME-FORMAT-WEIGHTS` in the working directory; `target` is an export that the model must
    serve as a draft, None tries it alone.
    """
    location = resolve_path(source, "export").as_posix()
    folder = user_path(output or f"{Path(location).name}-{format}-{weights}", "--output")
    if folder.exists() and not (folder / MODEL_FILE).is_file():
        raise RecipeError(f"--output {folder}: exists and is not an earlier export", "name another folder")
    pair = user_path(target, "--target") if target else None
    if pair and not (pair / MODEL_FILE).is_file():
        raise TargetError(f"--target {pair}: no {MODEL_FILE} in it", "export the target first")
    check = export_openvino(Target.at(location), folder, weights, pair=pair)
    partner = f"as the draft of {pair}" if pair else "as its own draft"
    same = "equal" if check.same_text else f"equal up to a near-tie ({check.near_tie_gap:.1g})"
    console.say(f"{folder}: {partner}: {check.num_tokens} greedy tokens with and without it {same}")
    return folder
