"""What stages will read and need, tried before any of them works: by `fastdraft check` and the head of a run.

Configs, listings and first rows are read, prompts rendered, heads of weights compared; no weights are read,
no server is asked, and of a data set of the hub only the first row is waited for.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from fastdraft.data import logs
from fastdraft.data.chat import Conversation
from fastdraft.data.corpora import data_set_files, documents, source_files
from fastdraft.data.files import ROWS, FoundFiles, find_files, local_folder
from fastdraft.data.prompts import usable_prompts
from fastdraft.errors import DataError, RecipeError, TargetError
from fastdraft.evaluation.tasks import load_task
from fastdraft.modeling.tokenizer import UnknownId
from fastdraft.ray_workers import require_ray
from fastdraft.recipe.evaluation import BenchmarkConfig
from fastdraft.recipe.prepare import FileSource, HubRows, SourceConfig
from fastdraft.recipe.synthesize import JsonlPrompts, PromptConfig, TranscriptLog
from fastdraft.runtimes.gguf_export import require_writable
from fastdraft.runtimes.llama_cpp_engine import check_vocabulary, gguf_of
from fastdraft.runtimes.openvino_export import require_convertible
from fastdraft.runtimes.vllm_runtime import VLLMRuntime, check_shapes
from fastdraft.stages import SPREAD, benchmark, design, evaluate, export, synthesize
from fastdraft.stages.context import StageContext

HUB_SECONDS = 10
# Of a source so many rows are tried for one that serves.
TRIED = 1000
_INSTALLED: dict[str, Callable[[Any], None]] = {
    "synthesize": synthesize.check_installed,
    "export": export.check_installed,
}


def try_inputs(names: Collection[str], context: StageContext) -> list[str]:
    """Refuses what would stop one of these stages, all unfinished; lines of what the user should know."""
    sections: dict[str, Any] = {name: each for name, each in context.sections.items() if name in names}
    if context.settings.cluster and not sections.keys().isdisjoint(SPREAD):
        require_ray()
    for name, section in sections.items():
        _INSTALLED.get(name, lambda _: None)(section)
    if "benchmark" in sections:
        benchmark.check_installed(sections["benchmark"], context)
    if "align" in sections and not context.has("synthesize"):
        message = "align: no synthesize section: alignment trains on what the target wrote"
        raise RecipeError(message, "add `synthesize:` to the recipe")
    read = [name for name in sections if _reads_weights(name, context)]  # all are asked
    if read:
        context.target.check_quantiser()
        context.target.check_tensors()
    _try_runtimes(sections, context)
    return [told for name in sections if name in _TRIED for told in _TRIED[name](sections[name], context)]


def check_lengths(sections: Mapping[str, Any], plan: design.DraftDesign) -> None:
    """Lengths against contexts, and the number of stored logits against the vocabulary."""
    context, synthesize = (
        min(plan.draft.context_length, plan.target.context_length),
        sections.get("synthesize"),
    )
    tasks = sections["evaluate"].tasks if "evaluate" in sections else ()
    named = [(f"evaluate.tasks[{number}]", task) for number, task in enumerate(tasks)]
    for where, section in [*named, ("synthesize", synthesize)]:
        if section and section.max_new_tokens >= context:
            rule = f"answer and prompt must fit the context of {context}"
            raise RecipeError(f"{where}.max_new_tokens: {section.max_new_tokens}: {rule}", "lower it")
    logits = synthesize.logits if synthesize else None
    if logits and logits.kind == "top_k" and logits.k >= plan.target.vocab_size:
        rule = f"must be below the {plan.target.vocab_size} ids of the target's vocabulary"
        raise RecipeError(f"synthesize.logits.k: {logits.k}: {rule}", "lower it; 64 is usual")
    if "benchmark" in sections and "vllm" in (sections["benchmark"].runtimes or ()):
        device = VLLMRuntime(**sections["benchmark"].vllm.model_dump()).device
        check_shapes(plan.target, plan.draft, "design.draft", device)
    length = sections["prepare"].row_length if "prepare" in sections else 0
    if length > plan.draft.context_length:
        rule = f"must be at most the draft's context of {plan.draft.context_length}"
        raise RecipeError(f"prepare.row_length: {length}: {rule}", "lower it")
    for name in ("pretrain", "continue_pretrain"):
        batch = getattr(sections.get(name), "batch_tokens", None)
        if batch and batch < length:
            rule = f"must hold one row of {length} tokens"
            raise RecipeError(f"{name}.batch_tokens: {batch}: {rule}", "raise it")


def _reads_weights(name: str, context: StageContext) -> bool:
    """Whether the stage loads the target's weights; refused where they are not here: of a target behind an
    API or of logs only the config may be.
    """
    config: Any = context.sections[name]
    if name == "synthesize":
        writer = synthesize.writer_of(config, context)
        synthesize.require_weights(config, writer)
        return bool(config.needs_weights and writer is context.target)
    if name == "align" and config.objective.kind == "token_kd" and config.objective.source == "target":
        rule, fix = "align.objective: source: target reads the target", "leave out align.objective"
    elif name == "evaluate" and evaluate.needs_weights(config, context.sections):
        rule = f"evaluate.texts: kind: {config.texts.kind} runs the target here"
        fix = "set evaluate.texts: {kind: engine}, or {kind: synthesize} for rows with their own log-probs"
    elif name == "export" and "openvino" in config.formats and config.openvino.target != "none":
        rule, fix = "export.formats: openvino converts the target too", "set export.openvino.target: none"
    elif name == "benchmark" and {"openvino", "vllm"} & set(benchmark.named_runtimes(config, context)):
        rule, fix = "benchmark runs the target here", "leave out `benchmark`"
    else:
        return False
    if not context.target.has_weights:
        message = f"{context.target.location}: no model.safetensors: {rule}"
        raise TargetError(message, f"put the weights there, or {fix}")
    return True


def _try_runtimes(sections: Mapping[str, Any], context: StageContext) -> None:
    """What OpenVINO takes over must be of a family that it converts."""
    exported, written = sections.get("export"), sections.get("synthesize")
    converts = exported and "openvino" in exported.formats and exported.openvino.target != "none"
    if converts or (written and written.engine.kind == "openvino"):
        require_convertible(context.target)
    if written and written.engine.kind == "llamacpp":
        check_vocabulary(gguf_of(written.engine), context.target)
    if exported and "gguf" in exported.formats:
        require_writable(context.target)
    if "benchmark" in sections:
        _try_benchmark(sections["benchmark"], context)


def _try_benchmark(config: BenchmarkConfig, context: StageContext) -> None:
    length, most = context.target.context_length, max(config.num_speculative_tokens)
    for task in config.tasks_of(context.sections):
        _try_task(task, context)
        if task.max_new_tokens + most + 1 >= length:
            found = f"task '{task.name}' writes {task.max_new_tokens} tokens with K = {most}"
            rule = f"prompt, answer and one round must fit the context of {length}"
            raise RecipeError(f"benchmark: {found}: {rule}", "lower max_new_tokens")


def _try_corpora(config: Any, context: StageContext) -> Iterator[str]:
    for number, source in enumerate(config.corpora):
        yield from _try_source(f"prepare.corpora[{number}]", source, partial(_try_corpus, context), context)


def _try_corpus(context: StageContext, source: SourceConfig) -> None:
    """Reads up to the first text."""
    read = itertools.islice(documents(source, context.settings.seed), TRIED)
    next((text for _, _, text in read if text and not text.isspace()), None)


def _try_prompts(config: Any, context: StageContext) -> Iterator[str]:
    for number, source in enumerate(config.prompts):
        where = f"synthesize.prompts[{number}]"
        yield from _try_source(where, source, partial(_try_prompt, where, context), context)


def _try_prompt(where: str, context: StageContext, source: PromptConfig) -> None:
    """Renders the first prompt that can be asked."""
    chat = context.chat
    if source.kind == "transcripts":
        logs.look(source, chat)
    elif source.kind == "magpie":
        if not chat.exists:
            found = (
                f"{where}: {context.target.name}: kind: magpie needs a chat template, which this target lacks"
            )
            raise RecipeError(found, "take that source out; corpus prompts serve base models")
        chat.user_prefix_ids()
    elif source.kind != "corpus":
        unknown: UnknownId | None = None
        for prompt in itertools.islice(usable_prompts(source), TRIED):
            try:
                chat.note([prompt] if isinstance(prompt, Conversation) else [])
                chat.prompt_ids(prompt, chat=source.chat)
                return
            except UnknownId as error:  # such prompts are counted, not asked
                unknown = error
        if unknown:
            raise unknown


def _try_tasks(config: Any, context: StageContext) -> Iterator[str]:
    for task in config.tasks:
        _try_task(task, context)
    if config.texts.kind == "transcripts":
        look = partial(logs.look, chat=context.chat)
        yield from _try_source("evaluate.texts", config.texts, look, context)


def _try_task(config: Any, context: StageContext) -> None:
    with _hint(context, config.path):
        task = load_task(config)
    context.chat.note([prompt.conversation for prompt in task.prompts if prompt.conversation])
    for prompt in task.prompts:
        context.chat.prompt_ids(prompt.prompt, chat=task.chat)


def _try_source(
    where: str, source: Any, attempt: Callable[[Any], None], context: StageContext
) -> Iterator[str]:
    """Tries a source and tells its files; one of the hub for some seconds, and that it does not answer."""
    named = [getattr(source, key, "") for key in ("path", "requests", "dataset")]
    folder = local_folder(source.dataset) if isinstance(source, HubRows) else None
    with _hint(context, *named):
        if isinstance(source, HubRows) and not folder:
            if not _answers(lambda: attempt(source)):
                if context.recipe_folder and (context.recipe_folder / source.dataset).is_dir():
                    raise DataError(f"{where}: {source.dataset}: no such folder, and the hub does not answer")
                yield f"not looked at (the hub does not answer): {where}: {source.dataset}"
            return
        attempt(source)
        if folder:
            yield f"{where}: {source.dataset}: {data_set_files(source, folder).told}"
        elif isinstance(source, FileSource):
            yield from _told(where, source.path, source_files(source))
        for path in named[:2] if isinstance(source, JsonlPrompts | TranscriptLog) else ():
            if path:
                yield from _told(where, path, find_files(path, ROWS))


def _told(where: str, path: str, found: FoundFiles) -> Iterator[str]:
    """Of a folder or a pattern."""
    if len(found.files) > 1 or found.passed_over or path.rpartition("/")[2] not in found.files:
        yield f"{where}: {path}: {found.told}"


def _answers(work: Callable[[], None]) -> bool:
    """Whether the hub answers in time; what else goes wrong is raised."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # nothing waits for it at the end
    thread.start()
    thread.join(HUB_SECONDS)
    if errors and not isinstance(errors[0].__cause__, ConnectionError | TimeoutError):
        raise errors[0]
    return not errors and not thread.is_alive()


@contextlib.contextmanager
def _hint(context: StageContext, *named: str) -> Iterator[None]:
    """Adds to an error that what is missing here lies beside the recipe."""
    try:
        yield
    except DataError as error:
        folder = context.recipe_folder
        for name in filter(None, named if folder else ()):
            beside = f"{glob.escape(str(folder))}/{name}"
            if not glob.glob(name, recursive=True) and glob.glob(beside, recursive=True):
                fix = (
                    f"paths are relative to the working directory: run in {folder}, or write {folder}/{name}"
                )
                raise DataError(f"{error.message}; {name} lies beside the recipe", fix) from None
        raise


_TRIED: dict[str, Callable[[Any, StageContext], Iterator[str]]] = {
    "prepare": _try_corpora,
    "synthesize": _try_prompts,
    "evaluate": _try_tasks,
}
